"""A frozen Hugging Face causal language model as drafters see it.

Nothing outside this folder touches a key/value cache, an attention mask or a position id. Token ids only: tokenizers are
handled by whoever reads prompts.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Packing, Teacher, TrainingFeatures
from draftsmith.models.slots import SlotCache
from draftsmith.models.tree import DraftTree

PREFILL_ROWS = 512  # rows of one prefill chunk: the mask is [chunk, prefix], never [length, length]


@dataclass(frozen=True)
class Prefill:
    """logits [B, V] after each prompt's last token; features of all prompt rows."""

    logits: torch.Tensor
    features: Features


@dataclass(frozen=True)
class Verified:
    """logits [B, N, V] and hidden [B, N, taps * h] of every tree node."""

    logits: torch.Tensor
    hidden: torch.Tensor

    def features(self, tree: DraftTree, path: torch.Tensor, counts: torch.Tensor) -> Features:
        """Features of the committed nodes path [B, M], the first counts [B] of each row being real."""
        rows = torch.arange(len(path), device=path.device)[:, None]
        return Features(tree.tokens[rows, path], self.hidden[rows, path], counts)


class TextTarget:
    """A frozen decoder with its output head, and the forward hooks that read the taps a FeatureSpec names."""

    def __init__(self, model, name: str = ""):
        self.model, self.name = model.eval().requires_grad_(False), name
        self.config = model.config.get_text_config()
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        if not hasattr(self.body, "layers") or self.head is None:
            raise UserError(f"target {name}: {self.config.model_type} is not supported; expected a decoder with `layers` and an output head")
        self.vocab_size = self.head.weight.size(0)  # a partitioned weight no longer tells
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self._shared: torch.Tensor | None = None
        self._taps: dict[int, torch.Tensor] = {}
        self._hooked: set[int] = set()
        self._check_attention()
        self._check_projection()

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None):
        """A Hub id, a directory, or `bundled:NAME`. Default dtype: fp32 on a CPU, the checkpoint's own on an accelerator."""
        from draftsmith.models.targets import locate

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        place = locate(name)
        try:
            config = AutoConfig.from_pretrained(place)
            dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
            model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"target {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
        return cls(model.to(device), str(name))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def generation_config(self):
        return getattr(self.model, "generation_config", None)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def embedding(self) -> torch.Tensor:
        """[V, h], the frozen input embedding that heads share."""
        return self._shared if self._shared is not None else self.model.get_input_embeddings().weight

    def project(self, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Output head: hidden [..., h] after the final norm -> logits [..., V], or only the columns of `ids`."""
        if ids is None:
            logits = self.head(hidden)
        else:
            bias = self.head.bias[ids] if getattr(self.head, "bias", None) is not None else None
            logits = torch.nn.functional.linear(hidden, self.head.weight[ids], bias)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @torch.no_grad()
    def features(self, tokens: torch.Tensor, packing: Packing, spec: FeatureSpec) -> TrainingFeatures:
        """Training features of one packed row of documents, tokens [T] on this target's device. The target itself reads the documents
        as right-padded rows, each from position 0, so that every architecture sees what it sees in decoding."""
        lengths, places = torch.tensor(packing.borders).diff(), packing.positions.to(tokens.device)
        numbers = torch.arange(len(lengths)).repeat_interleave(lengths).to(tokens.device)
        padded = tokens.new_zeros(len(lengths), int(lengths.max()))
        padded[numbers, places] = tokens
        inside = (torch.arange(padded.size(1)) < lengths[:, None]).long().to(tokens.device)
        final, hidden = self._forward(spec, input_ids=padded, attention_mask=inside, use_cache=False)
        taught = packing.rows.to(tokens.device) + 1
        return TrainingFeatures(tokens, hidden[numbers, places], packing, Teacher(final[numbers[taught], places[taught]], self.project))

    def open(self, spec: FeatureSpec, batch: int, capacity: int) -> "TextSession":
        """A decoding session for `batch` prompts with room for `capacity` rows each (prompt, new tokens and one tree)."""
        return TextSession(self, spec, batch, capacity)

    def shard(self, spread) -> None:
        """Lets `spread(model)` partition the weights of this target over processes; the embedding that heads share stays whole."""
        self._shared = self.embedding.clone()
        self.sharded = spread(self.model)

    def _hook(self, index: int) -> None:
        """Keeps the state entering layer `index` (the output of the layer before) of every forward from now on."""
        def keep(_module, _inputs, out):
            self._taps[index] = out[0] if isinstance(out, tuple) else out

        self.body.layers[index - 1].register_forward_hook(keep)
        self._hooked.add(index)

    def _forward(self, spec: FeatureSpec, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the body: (final states [B, T, h], tapped states [B, T, taps * h])."""
        for index in set(spec.taps) - self._hooked - {0, "last"}:
            self._hook(index)
        final = self.body(**inputs).last_hidden_state
        taps = [final if k == "last" else self._embedded(inputs) if k == 0 else self._taps[k] for k in spec.taps]
        self._taps.clear()
        return final, torch.cat(taps, -1) if taps else final[..., :0]

    def _embedded(self, inputs):
        return self.model.get_input_embeddings()(inputs["input_ids"])

    def _check_attention(self):
        """Layers that see only a window of the context are refused where the window is shorter than the context."""
        kinds, window = getattr(self.config, "layer_types", None), getattr(self.config, "sliding_window", None)
        sliding = any(kind != "full_attention" for kind in kinds) if kinds else window is not None
        if sliding and (window or 0) < self.context_length:
            found = f"layers {sorted(set(kinds))}" if kinds else f"a window of {window}"
            raise UserError(f"target {self.name}: found {found}, expected full attention in every layer")

    @torch.no_grad()
    def _check_projection(self):
        """`project` must be the model's own way from final states to logits; models that scale them elsewhere are refused."""
        probe = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        own = self.model(input_ids=probe, use_cache=False)
        ours = self.project(self.body(input_ids=probe, use_cache=False).last_hidden_state)
        if not torch.allclose(own.logits.float(), ours.float(), rtol=1e-3, atol=1e-3):
            raise UserError(f"target {self.name}: {self.config.model_type} computes logits in a way that is not supported")


class TextSession:
    """One batch of prompts being decoded. lengths [B] are the rows the target has processed and kept."""

    def __init__(self, target: TextTarget, spec: FeatureSpec, batch: int, capacity: int):
        self.target, self.spec = target, spec
        config = target.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = SlotCache(config.num_hidden_layers, batch, config.num_key_value_heads, capacity, head_dim, target.dtype, target.device)

    @property
    def lengths(self) -> torch.Tensor:
        return self.cache.lengths

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Prefill:
        """Processes the prompts (ragged, none empty) in chunks."""
        device = self.target.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max())
        tokens = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)
        hidden, last = [], None
        for start in range(0, width, PREFILL_ROWS):
            chunk = tokens[:, start:start + PREFILL_ROWS]
            rows = torch.arange(start, start + chunk.size(1), device=device)
            seen = (torch.arange(start + chunk.size(1), device=device) <= rows[:, None]).expand(len(prompts), -1, -1)
            final, tapped = self._run(chunk, rows.expand(len(prompts), -1), seen)
            self.cache.lengths = self.cache.lengths + chunk.size(1)
            hidden.append(tapped)
            ends = (lengths - 1 - start).clamp(0, chunk.size(1) - 1)
            ending = final[torch.arange(len(prompts), device=device), ends]
            here = ((lengths - 1) // PREFILL_ROWS == start // PREFILL_ROWS)[:, None]
            last = ending if last is None else torch.where(here, ending, last)
        self.cache.lengths = lengths
        return Prefill(self.target.project(last), Features(tokens, torch.cat(hidden, 1), lengths))

    @torch.no_grad()
    def verify(self, tree: DraftTree) -> Verified:
        """One forward over all tree nodes; nothing is kept until `commit`."""
        lengths = self.cache.lengths
        columns = torch.arange(int(lengths.max()) + tree.size, device=lengths.device)
        seen = (columns < lengths[:, None])[:, None].repeat(1, tree.size, 1)
        slots = (lengths[:, None] + torch.arange(tree.size, device=lengths.device))[:, None].expand(-1, tree.size, -1)
        seen.scatter_(2, slots, tree.ancestors)
        final, hidden = self._run(tree.tokens, lengths[:, None] + tree.depths, seen)
        return Verified(self.target.project(final), hidden)

    def commit(self, path: torch.Tensor, counts: torch.Tensor) -> None:
        """Keeps the nodes path [B, M] (root first; only the first counts [B] of a row are real) of the last verified tree."""
        self.cache.commit(path, counts)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with only these batch rows."""
        self.cache.select(rows)

    def _run(self, tokens, positions, seen):
        """tokens [B, T], positions [B, T], seen [B, T, visible] bool -> (final, tapped)."""
        self.cache.place(tokens.size(1))
        mask = torch.zeros(seen.shape, dtype=self.target.dtype, device=seen.device)
        mask.masked_fill_(~seen, torch.finfo(self.target.dtype).min)
        return self.target._forward(self.spec, input_ids=tokens, position_ids=positions, attention_mask=mask[:, None],
                                    past_key_values=self.cache, use_cache=True)
