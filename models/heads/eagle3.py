"""The EAGLE-3 head (Li et al., 2025): one widened decoder layer over fused low/mid/high features of the target.

Row t consumes the target's features at x_t and the embedding of x_{t+1} and predicts x_{t+2}. The layer input is
`[input_layernorm(embedding), hidden_norm(H)]`; the residual base is the un-normalised H; the pre-norm output is the next step's H
(training-time test). Embeddings are the target's, frozen; no bias anywhere; the rope is the target's.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Shared, TrainingFeatures
from draftsmith.models.heads.adapted import matrix
from draftsmith.models.heads.attention import kernel_for, strips_of
from draftsmith.models.heads.distill import chain_walk, soft_cross_entropy, teach
from draftsmith.models.heads.hung import Hung
from draftsmith.models.heads.unroll import Plan, turn, unroll
from draftsmith.models.slots import SlotCache

SUMS = ("rows", "right", "tried", "kept", "loss")


@dataclass(frozen=True)
class Eagle3Shape:
    """What a recipe may choose of a head (None = as the target has it)."""

    intermediate_size: Annotated[int, Gt(0)] | None
    draft_vocab_size: Annotated[int, Gt(0)] | None


@dataclass(frozen=True)
class Eagle3Objective:
    """Training-time test: steps (EAGLE-3 reference: 7), and decay (0.8): step k weighs decay^k."""

    steps: Annotated[int, Gt(0)]
    decay: Annotated[float, Gt(0), Le(1)]

    @property
    def weights(self) -> list[float]:
        return [self.decay**k for k in range(self.steps)]


@dataclass(frozen=True)
class Eagle3Config:
    """Shapes of a head. taps are Hugging Face `hidden_states` indices, ascending (low, mid, high)."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict
    max_position_embeddings: int
    vocab_size: int
    draft_vocab_size: int
    taps: tuple[int, ...]

    @classmethod
    def for_target(cls, config, intermediate_size: int | None = None, draft_vocab_size: int | None = None) -> "Eagle3Config":
        """A head for a target's text config: its widths, its rope, taps (2, n // 2, n - 3).

        Where kinds of layer have ropes of their own (Gemma 3) it is that of full attention, since the head attends to all rows.
        Raises UserError below 7 layers, without such a rope, and for more draft tokens than the target has.
        """
        if (draft_vocab_size or 0) > config.vocab_size:
            raise UserError(f"head.draft_vocab_size: found {draft_vocab_size}, expected at most the target's {config.vocab_size}")
        layers = config.num_hidden_layers
        if layers < 7:
            raise UserError(f"eagle3: found a target of {layers} layers, expected at least 7 (taps 2, n // 2, n - 3 must differ)")
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        if "rope_theta" not in rope:
            raise UserError(f"eagle3: rope_parameters: found {rope or 'none'}, expected one rope or one of full_attention")
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=intermediate_size or config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),  # the head's own where the target has other norms
            rope_parameters=dict(rope),
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            draft_vocab_size=draft_vocab_size or config.vocab_size,
            taps=(2, layers // 2, layers - 3),
        )

    @property
    def saved_per_row(self) -> int:
        """Numbers that training keeps for each row and step (what the forward of `unroll` keeps and its backward adds)."""
        return 10 * self.hidden_size + 5 * self.intermediate_size + (3 * self.num_attention_heads + 4 * self.num_key_value_heads) * self.head_dim


def _frequencies(config: "Eagle3Config", device) -> tuple[torch.Tensor, float]:
    """The target's rotary frequencies [D / 2] fp32 and attention scaling. Raises UserError for types that change with the length."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"rope_type: found {kind!r}, expected default, linear, llama3 or yarn")
    partial = config.rope_parameters.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise UserError(f"partial_rotary_factor: found {partial}, expected 1 (the head turns all of a query)")
    rope = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads, head_dim=config.head_dim,
        rope_parameters=dict(config.rope_parameters), max_position_embeddings=config.max_position_embeddings))
    return rope.inv_freq.to(device), rope.attention_scaling


class Attention(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        wide = 2 * config.hidden_size
        self.q_proj = nn.Linear(wide, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(wide, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(wide, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.scale = self.head_dim**-0.5

    def query(self, u, cos, sin):
        """u [..., 2h] -> [..., H, D], turned."""
        return turn(self.q_proj(u).unflatten(-1, (self.heads, self.head_dim)), cos, sin)

    def key_value(self, u, cos, sin):
        """u [..., 2h] -> keys (turned) and values [..., H_kv, D]."""
        key = turn(self.k_proj(u).unflatten(-1, (self.kv_heads, self.head_dim)), cos, sin)
        return key, self.v_proj(u).unflatten(-1, (self.kv_heads, self.head_dim))

    def weight(self):
        """Query, key and value projections as one matrix [(H + 2 H_kv) D, 2h]."""
        return torch.cat([matrix(self.q_proj), matrix(self.k_proj), matrix(self.v_proj)])

    def repeat(self, x, dim: int):
        """Key/value heads to query heads."""
        return x.repeat_interleave(self.heads // self.kv_heads, dim)


class MLP(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def widen(self, embedding, hidden):
        """[..., h], [..., h] -> the attention input [..., 2h]."""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], -1)

    def finish(self, hidden, attended):
        """hidden [..., h] (residual base), attended [..., H, D] -> layer output [..., h]."""
        y = hidden + self.self_attn.o_proj(attended.flatten(-2))
        return y + self.mlp(self.post_attention_layernorm(y))


@dataclass
class Context:
    """Committed rows of B requests. `cache` holds the keys and values of complete rows; `pending` are features whose rows wait
    for the next token (the last one waits for the root)."""

    cache: SlotCache
    pending: Features | None

    def select(self, rows: torch.Tensor) -> None:
        self.cache.select(rows)
        p = self.pending
        self.pending = Features(p.tokens[rows], p.hidden[rows], p.lengths[rows])


@dataclass(frozen=True)
class Beam:
    """Expanded nodes of B trees. hidden [B, k, h]: layer outputs of the last level; seen [B, k, nodes]: which expanded nodes each
    of them sees (itself included); depth: levels drafted so far."""

    context: Context
    hidden: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    depth: int = 0


class Eagle3Head(nn.Module):
    """embedding [V, h] is the target's (not trained, not saved); ids [Vd] int64 is the draft vocabulary."""

    name, Shape, Objective, Config = "eagle3", Eagle3Shape, Eagle3Objective, Eagle3Config
    tables = ("lm_head",)

    def __init__(self, config: Eagle3Config, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__()
        self.config, embedding = config, shared.embedding
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        ids = torch.arange(config.vocab_size) if ids is None else ids
        self.register_buffer("ids", ids.to(embedding.device), persistent=False)
        self.fc = nn.Linear(len(config.taps) * embedding.size(1), config.hidden_size, bias=False)
        self.midlayer = Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self._rope = _frequencies(config, embedding.device)  # no buffer: fp32 frequencies must survive casts of the module
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if module is not self.fc else self.fc.in_features**-0.5)

    @torch.no_grad()
    def start_from(self, target) -> None:
        """Starts the output head from the target's own rows and final norm; both are trained on (fresh starts learn slower)."""
        self.lm_head.weight.copy_(target.head.weight[self.ids])
        norm = getattr(target.body, "norm", None)
        if norm is not None and norm.weight.shape == self.norm.weight.shape:
            signs = torch.ones_like(norm.weight)
            signs[1::2] = -1
            # The factor that the norm applies, not what it stores: some families store it less one (Gemma), some have a bias as well
            self.norm.weight.copy_((norm(signs) - norm(-signs)) * signs / 2)

    @property
    def shared(self) -> Shared:
        return Shared(self.embedding)

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(taps=self.config.taps)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Layer output [..., h] -> draft logits [..., Vd]."""
        return self.lm_head(self.norm(output))

    def _angles(self, positions: torch.Tensor):
        """positions [...] -> cos, sin [..., 1, D] for `turn`, in the head's dtype."""
        frequencies, scaling = self._rope
        angles = positions[..., None, None].float() * frequencies.to(positions.device)
        cos, sin = (x.to(self.fc.weight.dtype) for x in (angles.cos() * scaling, angles.sin() * scaling))
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Target ids [...] -> embeddings [..., h] in the head's dtype (which may differ from the target's)."""
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    def _fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tapped states [..., taps * h] -> H of step 0."""
        return self.fc(hidden.to(self.fc.weight.dtype))

    # Training

    def unroll(self, features: TrainingFeatures, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Training-time test over the rounds that decoding can reach: teacher tokens, the head's own features.

        For k = 0 .. steps - 1: (the rows [P_k] that take part (`Packing`), layer output [P_k, h]).
        """
        packing, outputs = features.packing, self._unroll(features, steps)
        parts = [packing.takes_part(k) for k in range(steps)]
        return [(packing.rows[part].to(output.device), output[part.to(output.device)]) for part, output in zip(parts, outputs)]

    def _unroll(self, features: TrainingFeatures, steps: int) -> torch.Tensor:
        """Layer outputs [K, P, h] of all `packing.rows` at all steps; where a row takes no part they mean nothing.

        The attention's input is `[embedding, H]`; a token's embedding is the same in every step, so that its half of the projections is
        computed once.
        """
        attention, layer, packing = self.midlayer.self_attn, self.midlayer, features.packing
        device, last = features.tokens.device, len(features.tokens) - 1
        rows, positions, ahead = packing.rows.to(device), packing.positions.to(device), torch.arange(steps, device=device)[:, None]
        hidden, queries = self._fuse(features.hidden), attention.heads * attention.head_dim
        for_embedding, for_hidden = attention.weight().split(hidden.size(-1), 1)
        embedded = F.linear(layer.input_layernorm(self._embed(features.tokens)), for_embedding)
        whole = F.linear(layer.hidden_norm(hidden), for_hidden[queries:]) + embedded[:, queries:].roll(-1, 0)
        key0, value0 = whole.unflatten(-1, (-1, attention.head_dim)).chunk(2, 1)
        key0, value0 = attention.repeat(turn(key0, *self._angles(positions)), 1), attention.repeat(value0, 1)
        kernel = kernel_for(device)
        plan = Plan(rows, (rows + 1 + ahead).clamp(max=last), *self._angles(positions[rows] + ahead), strips_of(packing, kernel.block), kernel,
                    attention.scale, (attention.heads, attention.kv_heads), self.config.rms_norm_eps)
        mlp = layer.mlp
        weights = (for_hidden, layer.hidden_norm.weight, matrix(attention.o_proj), layer.post_attention_layernorm.weight,
                   torch.cat([matrix(mlp.gate_proj), matrix(mlp.up_proj)]), matrix(mlp.down_proj))
        return unroll(hidden, embedded, key0, value0, weights, plan)

    def loss(self, features: TrainingFeatures, objective: Eagle3Objective, counts: list[float] | None = None):
        """Soft cross-entropy against the target restricted to the draft vocabulary (EAGLE-3), mean over each step's rows:

        loss = sum_k decay^k / counts[k] sum_rows ( logsumexp(z) - <p, z> ), p = softmax(teacher[ids]) at x_{t+1+k}; rows whose teacher argmax
        lies outside the draft vocabulary give no gradient and count as misses. counts: what to divide by where several packed rows make one
        batch; by default this one's own rows per step.
        Returns (loss, sums that add up over packed rows, detached: {"rows", "right", "tried", "kept", "loss": [K], "walk": [2]}): of the
        `rows` of step k, `right` ones agree with the target; all earlier steps were right in `tried`, and step k too in `kept`; `walk` is
        (tokens, rounds) of the greedy chain that this predicts.
        """
        packing, device, steps = features.packing, features.tokens.device, objective.steps
        rows, here = packing.rows, packing.counts(steps)
        if len(rows) == 0:
            nothing = torch.zeros(steps, device=device)
            return sum(p.sum() * 0.0 for p in self.parameters()), {name: nothing for name in SUMS} | {"walk": torch.zeros(2, device=device)}
        parts = torch.stack([packing.takes_part(k) for k in range(steps)]).to(device)
        lesson = teach(features.teacher, self.ids)
        shares = torch.tensor([weight / max(n, 1) for weight, n in zip(objective.weights, counts or here)], device=device)
        total, losses, right = soft_cross_entropy(self.norm(self._unroll(features, steps)), matrix(self.lm_head), lesson, parts * shares[:, None])
        right &= parts
        alive = right.cumprod(0).bool()  # right so far
        before = torch.cat([torch.ones_like(parts[:1]), alive[:-1]]) & parts
        leading = torch.zeros(len(features.tokens), dtype=torch.int64)
        leading[rows] = alive.sum(0).cpu()
        sums = {"rows": parts, "right": right, "tried": before, "kept": alive, "loss": losses * parts}
        return total, {name: value.sum(1).float() for name, value in sums.items()} | {
            "walk": torch.tensor(chain_walk(packing, leading.tolist()), dtype=torch.float32, device=device)}

    def hang(self, features: TrainingFeatures, at: torch.Tensor) -> Hung:
        """A beam of P roots at packed indices at [P], each at least 1 inside its document: root p is tokens[at[p]] (whatever `expand` is given
        first) and sees features of its document before at[p] only, as in decoding. With gradient where it is enabled."""
        packing, hidden = features.packing, self._fuse(features.hidden)
        # A document's last row meets the next one's first token; no root sees it.
        u = self.midlayer.widen(self._embed(features.tokens.roll(-1)), hidden)
        row = self.midlayer.self_attn.key_value(u, *self._angles(packing.positions.to(hidden.device)))
        return Hung.at(packing, at, row, hidden)

    # Decoding

    def prefill(self, features: Features) -> Context:
        """Keys and values of all rows whose next token is known; the last row of each request stays pending."""
        config, batch = self.config, len(features.tokens)
        cache = SlotCache(1, batch, config.num_key_value_heads, features.tokens.size(1) + 64, config.head_dim,
                          self.fc.weight.dtype, features.hidden.device)
        last = (features.lengths - 1)[:, None]
        rows = torch.arange(batch, device=last.device)[:, None]
        if features.tokens.size(1) > 1:
            hidden = self._fuse(features.hidden[:, :-1])
            u = self.midlayer.widen(self._embed(features.tokens[:, 1:]), hidden)
            key, value = self.midlayer.self_attn.key_value(u, *self._angles(torch.arange(u.size(1), device=u.device)))
            cache.place(u.size(1))
            cache.layers[0].update(key.transpose(1, 2), value.transpose(1, 2))
        cache.lengths = features.lengths - 1
        pending = Features(features.tokens[rows, last], features.hidden[rows, last], torch.ones_like(features.lengths))
        return Context(cache, pending)

    def extend(self, context: Context, features: Features) -> None:
        """Adds newly committed tokens (the last root and the accepted nodes); computed with the next root."""
        context.pending = features

    def roots(self, context: Context) -> Beam:
        """A beam that waits for the root tokens."""
        return Beam(context)

    def expand(self, beam: Beam, tokens: torch.Tensor, parents: torch.Tensor) -> tuple[torch.Tensor, Beam]:
        """tokens [B, k] (target ids), parents [B, k] (rows of the last expand) -> log-probs [B, k, Vd], beam.

        The first call consumes the root tokens [B, 1]; it also completes the pending rows, which stay.
        """
        if isinstance(beam, Hung):
            output, beam = self._grow_hung(beam, tokens, parents)
        elif beam.depth == 0:
            output, beam = self._commit_root(beam.context, tokens)
        else:
            output, beam = self._grow(beam, tokens, parents)
        return torch.log_softmax(self.logits(output).float(), -1), beam

    def _grow_hung(self, beam: Hung, tokens: torch.Tensor, parents: torch.Tensor):
        layer, rows = self.midlayer, torch.arange(len(tokens), device=tokens.device)[:, None]
        hidden = beam.hidden[rows, parents]
        u = layer.widen(self._embed(tokens), hidden)
        cos, sin = self._angles(beam.positions[:, None])
        query, (key, value) = layer.self_attn.query(u, cos, sin), layer.self_attn.key_value(u, cos, sin)
        attended, own, seen = beam.attend(query, key, value, parents, layer.self_attn.scale)
        output = layer.finish(hidden, attended)
        return output, replace(beam, hidden=output, own=own, seen=seen, positions=beam.positions + 1)

    def _commit_root(self, context: Context, root: torch.Tensor):
        pending, cache = context.pending, context.cache
        if pending is None:
            raise RuntimeError("this context has no pending row: a root was already expanded and nothing was observed since")
        batch, width = pending.tokens.shape
        last = (pending.lengths - 1)[:, None]
        following = torch.cat([pending.tokens[:, 1:], root], 1).scatter(1, last, root)
        offsets = torch.arange(width, device=root.device)
        positions = cache.lengths[:, None] + offsets
        cache.place(width)
        seen = torch.arange(cache.visible, device=root.device) <= positions[..., None]
        output = self._attend(self._fuse(pending.hidden), following, positions, cache, seen)
        cache.lengths, context.pending = cache.lengths + pending.lengths, None
        output = output if width == 1 else output.gather(1, last[..., None].expand(-1, -1, output.size(-1)))
        empty = torch.zeros(batch, 1, 0, dtype=torch.bool, device=root.device)
        return output, Beam(context, output, empty, 1)

    def _grow(self, beam: Beam, tokens: torch.Tensor, parents: torch.Tensor):
        cache, (batch, new) = beam.context.cache, tokens.shape
        before = beam.seen.size(2)
        rows = torch.arange(batch, device=tokens.device)[:, None]
        own = torch.eye(new, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        seen = torch.cat([beam.seen[rows, parents], own], -1)
        positions = (cache.lengths + beam.depth - 1)[:, None].expand(-1, new)
        cache.place(new, offset=before)
        visible = (torch.arange(cache.visible, device=tokens.device) < cache.lengths[:, None])[:, None].repeat(1, new, 1)
        slots = cache.lengths[:, None] + torch.arange(before + new, device=tokens.device)
        visible.scatter_(2, slots[:, None].expand(-1, new, -1), seen)
        output = self._attend(beam.hidden[rows, parents], tokens, positions, cache, visible)
        return output, replace(beam, hidden=output, seen=seen, depth=beam.depth + 1)

    def _attend(self, hidden, tokens, positions, cache: SlotCache, seen):
        """One layer over new rows [B, T] placed in the cache; seen [B, T, visible] -> layer output [B, T, h]."""
        attention = self.midlayer.self_attn
        u = self.midlayer.widen(self._embed(tokens), hidden)
        cos, sin = self._angles(positions)
        key, value = attention.key_value(u, cos, sin)
        keys, values = cache.layers[0].update(key.transpose(1, 2), value.transpose(1, 2))
        attended = F.scaled_dot_product_attention(attention.query(u, cos, sin).transpose(1, 2), keys, values, attn_mask=seen[:, None],
                                                  scale=attention.scale, enable_gqa=attention.heads != attention.kv_heads)
        return self.midlayer.finish(hidden, attended.transpose(1, 2))
