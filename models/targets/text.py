"""A frozen Hugging Face causal language model, or vision-language model, as drafters see it.

Nothing outside this folder touches a key/value cache, an attention mask, a position id or an image. Token ids and pixel
values only: tokenizers and processors are handled by whoever reads prompts.
"""

import inspect
from functools import cached_property
from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec, Packing, Shared, TrainingFeatures
from draftsmith.models.graphs import Graphs
from draftsmith.models.prepacked import use_prepacked
from draftsmith.models.targets import checks, grouped
from draftsmith.models.targets.form import check_figures, completed, context_length, small_model
from draftsmith.models.targets.packed import KeptCache
from draftsmith.models.targets.place import read_config, read_generation
from draftsmith.models.targets.reading import Reading
from draftsmith.models.targets.recurrent import PackedCache, RecurrentSession, mixers_of
from draftsmith.models.targets.session import TextSession
from draftsmith.models.targets.training import training_features
from draftsmith.models.targets.vision import Vision
from draftsmith.models.targets.weights import Weights, identity_of, load_model, one_line, weights_of

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # as versions of transformers 5 and their models name it


class TextTarget:
    """A frozen decoder with its output head, and the forward hooks that read the taps a FeatureSpec names. weights:
    which ones they are, where that is known.
    """

    def __init__(self, model, name: str = "", weights: Weights | None = None):
        self.model, self.name, self.weights = model.eval().requires_grad_(False), name, weights
        self.config = completed(model.config.get_text_config())
        self.vision = Vision(model, name) if getattr(model.config, "vision_config", None) is not None else None
        self.window = getattr(self.config, "sliding_window", None)
        self.mixers = mixers_of(model, name, self.config.model_type)
        self.kinds = checks.kinds_of(self)
        if self.kinds:
            checks.check_attention(self)
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        if not hasattr(self.body, "layers") or self.head is None:
            raise UserError(
                f"target {name}: {self.config.model_type} is not supported; expected a decoder with `layers` and an "
                f"output head"
            )
        grouped.use_grouped(self.body.config)
        self.vocab_size = self.head.weight.size(0)
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        known = inspect.signature(self.body.forward).parameters
        self.cache_argument = next(name for name in CACHE_ARGUMENTS if name in known)
        self.scale, self.sharded = 1.0, None
        self.graphs = Graphs(self.head.weight.device)
        self._taps: dict[int, torch.Tensor] = {}
        self._hooked: set[int] = set()
        self.scale = checks.scale_of(self)
        self.layout = checks.cache_layout(self) if self.mixers else None
        checks.check_session(self)

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None):
        """Any name that `locate` takes. Default dtype: fp32 on a CPU, the checkpoint's own on an accelerator. Raises
        UserError.
        """
        place, config = read_config(name)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        cls.check(config, str(name))
        read_generation(place, str(name))
        known = weights_of(place, config)  # before loading, which may change the config
        return cls(load_model(place, str(name), config, dtype, device), str(name), known)

    @classmethod
    def check(cls, config, name: str) -> "TextTarget | None":
        """Raises UserError for a config (transformers') of which `load` would refuse every model: a small random model
        of its form goes through the checks of a loaded one -> that one; None where no small model can be made.
        """
        check_figures(config, name)
        try:
            model = small_model(config.get_text_config())
        except ImportError as error:
            raise UserError(f"target {name}: cannot be run here: {one_line(error)}") from None
        return None if model is None else cls(model, name)

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
    def identity(self) -> dict:
        """As `identity_of`."""
        return identity_of(self.name, self.weights)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context_length(self) -> int:
        """As `form.context_length`."""
        return context_length(self.config)

    @property
    def embedding(self) -> torch.Tensor:
        """[V, h], the frozen input embedding that heads share.

        The stored weight, which is what serving engines share with a drafter, even where the model scales it on the way
        in (Gemma: by sqrt(h)). Most heads normalise embeddings, so that the scale makes no difference to them; `shared`
        tells it to others.
        """
        return self.model.get_input_embeddings().weight

    @property
    def shared(self) -> Shared:
        scale = getattr(self.config, "embedding_multiplier", None) or 1.0
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", scale)
        return Shared(self.embedding, self.project, float(scale))

    @property
    def final_norm(self) -> torch.nn.Module | None:
        """The norm behind the last layer, whatever a family calls it."""
        names = ("norm", "norm_f", "final_layernorm", "embedding_norm")
        return next((getattr(self.body, name) for name in names if hasattr(self.body, name)), None)

    @property
    def image_token(self) -> int | None:
        """The id that stands for pieces of images; None where the target sees none."""
        return None if self.vision is None else self.vision.token

    def project(self, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Output head: hidden [..., h] after the final norm -> logits [..., V], or only the columns of `ids`. Some
        families keep their states in fp32 where their weights are not.
        """
        hidden = hidden.to(self.dtype)
        if ids is None:
            logits = self.head(hidden)
        else:
            bias = self.head.bias[ids] if getattr(self.head, "bias", None) is not None else None
            logits = torch.nn.functional.linear(hidden, self.head.weight[ids], bias)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def read(self, tokens: torch.Tensor, lengths: torch.Tensor, images: list[dict[str, torch.Tensor]]) -> Reading:
        """Right-padded documents tokens [B, S], lengths [B], with the images of each. Raises UserError for images where
        none can be seen.
        """
        if self.vision is not None:
            return self.vision.read(tokens, lengths, images)
        if any(images):
            raise UserError(
                f"target {self.name}: found a prompt with images, expected text ({self.config.model_type} sees none)"
            )
        return Reading.text(tokens, lengths)

    @torch.no_grad()
    def features(
        self, tokens: torch.Tensor, packing: Packing, spec: FeatureSpec, images: list[dict] | None = None
    ) -> TrainingFeatures:
        """Training features of one packed row of documents, tokens [T] on this target's device, with the images of each
        document. The target itself reads the documents as right-padded rows, each from position 0, so that every
        architecture sees what it sees in decoding. For a spec with a probe or with trees the features hold on to the
        keys and values of the row. Raises UserError where the target can do neither, and for images that do not fit.
        """
        self.check_features(spec)
        return training_features(self, tokens, packing, spec, images or [{}] * (len(packing.borders) - 1))

    def check_features(self, spec: FeatureSpec) -> None:
        """Raises UserError where `features` cannot give what a spec asks for."""
        checks.check_spec(self, spec)
        if spec.probe is not None or spec.trees:
            checks.check_whole(self)
            checks.check_behind(self)

    def open(self, spec: FeatureSpec, batch: int, capacity: int) -> "TextSession":
        """A decoding session for `batch` prompts with room for `capacity` rows each (prompt, new tokens, and one tree
        with its probes). Raises UserError for a spec with a probe where the target takes none.
        """
        checks.check_spec(self, spec)
        if self.sharded is None:
            use_prepacked(self.model)
        return (RecurrentSession if self.mixers else TextSession)(self, spec, batch, capacity)

    def keep(self) -> KeptCache:
        """A cache for one packed row, behind which probes and trees are run."""
        return PackedCache(self.layers, self.mixers) if self.mixers else KeptCache(self.layers)

    def shard(self, spread) -> None:
        """Lets `spread(layers)` partition the weights of this target's layers over processes. All else stays whole: how
        often the output head runs (once for so many rows) and the vision tower (once for each document with images)
        differs between processes, and partitioned weights would wait for one another. Raises UserError for layers with
        a state: they read weights of modules that they do not run, which nobody would gather.
        """
        if self.stateful:
            raise UserError(
                f"engine.target: found 'sharded' for {self.config.model_type}, whose layers have states, expected "
                f"'replicated'"
            )
        self.sharded = spread(self.body.layers)  # kept alive: its hooks gather the weights
        self.graphs.on = False  # gathered weights have no addresses of their own

    def whole(self, spec: FeatureSpec, reading: Reading, cache=None):
        """Runs documents from their beginnings -> (final [B, S, h], tapped [B, S, taps * h]). No mask where all
        attention is causal: that hides padding on the right from all real rows, and kernels need no [S, S] mask.
        """
        rows = slice(0, reading.tokens.size(1))
        inputs = reading.inputs(rows) | ({} if cache is None else self._cached(cache))
        if reading.blocks is not None:
            places = torch.arange(rows.stop, device=reading.tokens.device)[None]
            inputs["attention_mask"] = self._masks(reading.seen(rows), places, places)
        return self._forward(spec, **{"use_cache": False, **inputs})

    def behind(
        self, spec: FeatureSpec, cache, positions: torch.Tensor, seen: torch.Tensor, places: torch.Tensor, **inputs
    ):
        """Runs rows behind those that `cache` holds: positions [B, T]; seen [B, T, visible] bool, what each row sees of
        the cache's rows and of the new ones behind them, without windows; places [B, visible], the positions of these;
        inputs: `input_ids` or `inputs_embeds`, and `position_ids` [B, T] or [3, B, T] for the rope. -> (final [B, T,
        h], tapped [B, T, taps * h]).
        """
        if self.masked:
            inputs["attention_mask"] = self._masks(seen, positions, places)
        return self._forward(spec, **self._cached(cache), **inputs)

    @property
    def stateful(self) -> bool:
        """Whether some layers keep a state of all rows before, and not these rows."""
        return bool(self.mixers)

    @property
    def by_level(self) -> bool:
        """Whether a tree takes one step a level in some layers, instead of one for all of it."""
        return any(mixer.scan is not None and mixer.scan.by_level for mixer in self.mixers.values())

    @property
    def masked(self) -> bool:
        """Whether the body takes masks: Mamba's has no attention to mask."""
        return not self.mixers or hasattr(type(self.config), "num_attention_heads")

    def _masks(self, seen, positions, places):
        """What the body takes as `attention_mask`. A sliding layer also hides rows with position - place >= window; a
        cache keeps such rows, since the window of a node depends on its depth and the accepted path is not known yet.
        """
        masks = {}
        for kind in self.kinds:
            near = (
                seen & (positions[..., None] - places[:, None] < self.window) if kind == "sliding_attention" else seen
            )
            masks[kind] = additive(near, self.dtype)
        if self.mixers:  # nothing hides a row from a layer with a state but its own scan
            return dict.fromkeys({*self.config.layer_types, "linear_attention", "full_attention"}) | masks
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [...] -> the rows [..., h] that the body takes as `inputs_embeds`."""
        return self.model.get_input_embeddings()(tokens)

    def _cached(self, cache) -> dict:
        return {"use_cache": True, self.cache_argument: cache}

    def _hook(self, index: int) -> None:
        """Keeps the state entering layer `index` of every forward from now on (0: the embeddings, scaled where the
        model scales them).
        """
        self.body.layers[index].register_forward_pre_hook(lambda _module, inputs: self._taps.update({index: inputs[0]}))
        self._hooked.add(index)

    def _forward(self, spec: FeatureSpec, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the body: (final states [B, T, h], tapped states [B, T, taps * h])."""
        for index in set(spec.taps) - self._hooked - {"last"}:
            self._hook(index)
        final = self.body(**inputs).last_hidden_state.to(self.dtype)
        taps = [final if k == "last" else self._taps[k] for k in spec.taps]
        self._taps.clear()
        return final, torch.cat(taps, -1).to(self.dtype) if taps else final[..., :0]

    @cached_property
    @torch.no_grad()
    def takes_embeddings(self) -> bool:
        """Whether the body gives the same states for `embed(tokens)` as for the tokens, so that a probe can stand among
        them.
        """
        tokens = checks.spread_ids(self)
        own = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        try:
            ours = self.body(inputs_embeds=self.embed(tokens), use_cache=False).last_hidden_state
        except (RuntimeError, TypeError, ValueError):
            return False
        return torch.allclose(own.float(), ours.float(), rtol=1e-3, atol=1e-3)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, T, visible] bool -> [B, 1, T, visible]: 0 or the least value of dtype (bool masks are wrong with eager
    attention).
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
