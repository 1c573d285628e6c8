"""The EAGLE-3 head (Li et al., 2025): one widened decoder layer over fused low/mid/high features of the target.

Row t consumes the target's features at x_t and the embedding of x_{t+1} and predicts x_{t+2}. The layer input is
`[input_layernorm(embedding), hidden_norm(H)]`; the residual base is the un-normalised H; the pre-norm output is the
next step's H (training-time test). Embeddings are the target's, frozen; no bias anywhere; the rope is the target's.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Shared, TrainingFeatures
from draftsmith.models.heads import decoding, regression
from draftsmith.models.heads.adapted import matrix
from draftsmith.models.heads.attention import kernel_for, query_blocks
from draftsmith.models.heads.decoding import Beam, Context
from draftsmith.models.heads.distill import soft_cross_entropy, tally, teacher_distribution
from draftsmith.models.heads.layer import Layer, angles, copy_matrix, copy_norm, frequencies, rope_of
from draftsmith.models.heads.rooted import RootedTrees
from draftsmith.models.heads.unroll import Plan, turn, unroll


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
    def for_target(
        cls, config, intermediate_size: int | None = None, draft_vocab_size: int | None = None
    ) -> "Eagle3Config":
        """A head for a target's text config: its widths, its rope, taps (2, n // 2, n - 3).

        Raises UserError below 7 layers, without such a rope, and for more draft tokens than the target has.
        """
        if (draft_vocab_size or 0) > config.vocab_size:
            raise UserError(
                f"head.draft_vocab_size: found {draft_vocab_size}, expected at most the target's {config.vocab_size}"
            )
        layers = config.num_hidden_layers
        if layers < 7:
            raise UserError(
                f"eagle3: found a target of {layers} layers, expected at least 7 (taps 2, n // 2, n - 3 must differ)"
            )
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=intermediate_size or config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),  # the head's own where the target has other norms
            rope_parameters=rope_of(config, "eagle3"),
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            draft_vocab_size=draft_vocab_size or config.vocab_size,
            taps=(2, layers // 2, layers - 3),
        )

    @property
    def saved_per_row(self) -> int:
        """Numbers that training keeps for each row and step (what the forward of `unroll` keeps and its backward
        adds).
        """
        return (
            10 * self.hidden_size
            + 5 * self.intermediate_size
            + (3 * self.num_attention_heads + 4 * self.num_key_value_heads) * self.head_dim
        )


TURNING = 4  # rotations, the fastest ones, by which a row of a fresh head tells itself from the others
APART = 5.0  # how much less the row before scores: it gets a weight of exp(-5)


class WideLayer(Layer):
    """A layer whose attention reads an embedding beside the hidden state, each behind a norm of its own."""

    def __init__(self, config: Eagle3Config):
        super().__init__(config, 2 * config.hidden_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def widen(self, embedding, hidden):
        """[..., h], [..., h] -> the attention input [..., 2h]."""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], -1)


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
        self.midlayer = WideLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self._rope = frequencies(
            config, embedding.device
        )  # no buffer: fp32 frequencies must survive casts of the module
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if module is not self.fc else self.fc.in_features**-0.5)

    @torch.no_grad()
    def start_from(self, target) -> None:
        """Starts from the target's own weights, all of which are trained on: the output head from its rows and final
        norm, `fc` as a pass-through of the high tap, and the layer from the target's last one, whose matrices read H
        (the embedding's half of the attention keeps its random start). Parts of another shape keep their own start.
        """
        self.lm_head.weight.copy_(target.head.weight[self.ids])
        copy_norm(target.final_norm, self.norm)
        hidden, last = self.config.hidden_size, target.body.layers[-1]
        if self.embedding.size(1) == hidden:
            self.fc.weight.zero_()
            self.fc.weight[:, -hidden:] = torch.eye(hidden)
        attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
        normed = hasattr(attention, "q_norm")  # scores of another scale: the head has no such norms
        for name in ("v_proj",) if normed else ("q_proj", "k_proj", "v_proj"):
            copy_matrix(getattr(attention, name, None), getattr(self.midlayer.self_attn, name).weight[:, -hidden:])
        copy_matrix(getattr(attention, "o_proj", None), self.midlayer.self_attn.o_proj.weight)
        for name in ("gate_proj", "up_proj", "down_proj"):
            copy_matrix(getattr(mlp, name, None), getattr(self.midlayer.mlp, name).weight)
        copy_norm(getattr(last, "input_layernorm", None), self.midlayer.hidden_norm)
        before_mlp = (
            "pre_feedforward_layernorm" if hasattr(last, "pre_feedforward_layernorm") else "post_attention_layernorm"
        )
        copy_norm(getattr(last, before_mlp, None), self.midlayer.post_attention_layernorm)

    @property
    def regressors(self) -> int:
        """Inputs of the larger of the regressions that `regress` makes."""
        return max(self.fc.in_features, 2 * self.config.hidden_size)

    @torch.no_grad()
    def regress(self, samples: list[TrainingFeatures]) -> None:
        """Starts as two linear maps: `fc` from the taps to the state that the output head would read at this row, and
        the attention from this state and the next token's embedding to how the state changes with that token. For the
        second every row attends to itself: its values hold the directions that matter most, and queries and keys have
        one large constant part, whose rotations agree at distance 0 alone. What the MLP adds begins at zero.
        """
        layer, scale, parts = self.midlayer, self.norm.weight.abs().clamp_min(1e-2) * self.norm.weight.sign(), []
        for sample in samples:
            rows, places = regression.supervised_pairs(sample)
            final = sample.teacher.final.float() / scale
            parts.append((sample.hidden[rows], sample.tokens[rows + 1], final[places - 1], final[places]))
        taps, tokens, now, following = regression.joined(parts)
        self.fc.weight.copy_(regression.ridge(taps, now).T)
        state = taps @ self.fc.weight.T.float()
        seen = layer.widen(self._embed(tokens.long()), state.to(self.fc.weight.dtype)).float()
        change = regression.ridge(seen, following - state)
        attention, group = layer.self_attn, layer.self_attn.heads // layer.self_attn.kv_heads
        kept = regression.principal(seen @ change, attention.kv_heads * attention.head_dim)
        attention.v_proj.weight.copy_((change @ kept).T)
        shares = kept.unflatten(1, (attention.kv_heads, 1, attention.head_dim)) / group
        attention.o_proj.weight.copy_(shares.expand(-1, -1, group, -1).flatten(1))
        steady = regression.ridge(seen, torch.ones_like(seen[:, :1]))[:, 0]
        turning = self._rope[0][:TURNING].to(steady)
        size = (APART / (attention.scale * (1 - turning.cos()).sum())).sqrt()
        for projection in (attention.q_proj, attention.k_proj):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5 / 2)
            projection.weight.unflatten(0, (-1, attention.head_dim))[:, :TURNING] = size * steady
        layer.mlp.down_proj.weight.zero_()

    @property
    def shared(self) -> Shared:
        return Shared(self.embedding)

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(taps=self.config.taps)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Layer output [..., h] -> draft logits [..., Vd]."""
        return self.lm_head(self.norm(output))

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return angles(self._rope, positions, self.fc.weight.dtype)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Target ids [...] -> embeddings [..., h] in the head's dtype (which may differ from the target's)."""
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    @property
    def layer(self) -> WideLayer:
        return self.midlayer

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tapped states [..., taps * h] -> H of step 0."""
        return self.fc(hidden.to(self.fc.weight.dtype))

    def enter(self, tokens: torch.Tensor, hidden: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [...], H [..., h] -> residual base [..., h], what the attention reads [..., 2h]."""
        return hidden, self.midlayer.widen(self._embed(tokens), hidden)

    # Training

    def unroll(self, features: TrainingFeatures, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Training-time test over the rounds that decoding can reach: teacher tokens, the head's own features.

        For k = 0 .. steps - 1: (the rows [P_k] that take part (`Packing`), layer output [P_k, h]).
        """
        return features.packing.rounds(self._unroll(features, steps))

    def _unroll(self, features: TrainingFeatures, steps: int) -> torch.Tensor:
        """Layer outputs [K, P, h] of all `packing.rows` at all steps; where a row takes no part they mean nothing.

        The attention's input is `[embedding, H]`; a token's embedding is the same in every step, so that its half of
        the projections is computed once.
        """
        attention, layer, packing = self.midlayer.self_attn, self.midlayer, features.packing
        device, last = features.tokens.device, len(features.tokens) - 1
        rows, positions, ahead = (
            packing.rows.to(device),
            packing.positions.to(device),
            torch.arange(steps, device=device)[:, None],
        )
        hidden, queries = self.first(features.hidden), attention.heads * attention.head_dim
        for_embedding, for_hidden = attention.weight().split(hidden.size(-1), 1)
        embedded = F.linear(layer.input_layernorm(self._embed(features.tokens)), for_embedding)
        whole = F.linear(layer.hidden_norm(hidden), for_hidden[queries:]) + embedded[:, queries:].roll(-1, 0)
        key0, value0 = whole.unflatten(-1, (-1, attention.head_dim)).chunk(2, 1)
        key0, value0 = attention.repeat(turn(key0, *self.angles(positions)), 1), attention.repeat(value0, 1)
        kernel = kernel_for(device)
        plan = Plan(
            rows,
            (rows + 1 + ahead).clamp(max=last),
            *self.angles(positions[rows] + ahead),
            query_blocks(packing, packing.rows, kernel.block),
            kernel,
            attention.scale,
            (attention.heads, attention.kv_heads),
            self.config.rms_norm_eps,
        )
        mlp = layer.mlp
        weights = (
            for_hidden,
            layer.hidden_norm.weight,
            matrix(attention.o_proj),
            layer.post_attention_layernorm.weight,
            torch.cat([matrix(mlp.gate_proj), matrix(mlp.up_proj)]),
            matrix(mlp.down_proj),
        )
        return unroll(hidden, embedded, key0, value0, weights, plan)

    def loss(self, features: TrainingFeatures, objective: Eagle3Objective, counts: list[float] | None = None):
        """Soft cross-entropy against the target restricted to the draft vocabulary (EAGLE-3), mean over each step's
        rows:

        loss = sum_k decay^k / counts[k] sum_rows ( logsumexp(z) - <p, z> ), p = softmax(teacher[ids]) at x_{t+1+k};
        rows whose teacher argmax lies outside the draft vocabulary give no gradient and count as misses. counts: what
        to divide by where several packed rows make one batch; by default this one's own rows per step. Returns (loss,
        sums as `tally` has them).
        """
        packing, device, steps = features.packing, features.tokens.device, objective.steps
        rows, here = packing.rows, packing.counts(steps)
        if len(rows) == 0:
            none = torch.zeros(steps, 0, device=device)
            return sum(p.sum() * 0.0 for p in self.parameters()), tally(packing, none.bool(), none.bool(), none)
        parts = torch.stack([packing.takes_part(k) for k in range(steps)]).to(device)
        distribution = teacher_distribution(features.teacher, self.ids)
        shares = torch.tensor(
            [weight / max(n, 1) for weight, n in zip(objective.weights, counts or here)], device=device
        )
        total, losses, right = soft_cross_entropy(
            self.norm(self._unroll(features, steps)), matrix(self.lm_head), distribution, parts * shares[:, None]
        )
        return total, tally(packing, parts, right, losses)

    # Decoding

    def prefill(self, features: Features) -> Context:
        """Keys and values of all rows whose next token is known; the last row of each request stays pending."""
        return decoding.prefill(self, features)

    def extend(self, context: Context, features: Features) -> None:
        """Adds newly committed tokens (the last root and the accepted nodes); computed with the next root."""
        context.pending = features

    def roots(self, context: Context) -> Beam:
        """A beam that waits for the root tokens."""
        return Beam(context)

    def root_at(self, features: TrainingFeatures, at: torch.Tensor) -> RootedTrees:
        """A beam of P roots at packed indices at [P], each at least 1 inside its document: root p is tokens[at[p]]
        (whatever `expand` is given first) and sees features of its document before at[p] only, as in decoding. With
        gradient where it is enabled.
        """
        return decoding.root_at(self, features, at)

    def expand(
        self, beam: Beam | RootedTrees, tokens: torch.Tensor, parents: torch.Tensor
    ) -> tuple[torch.Tensor, Beam | RootedTrees]:
        """tokens [B, k] (target ids), parents [B, k] (rows of the last expand) -> log-probs [B, k, Vd] fp32, beam.

        The first call consumes the root tokens [B, 1]; it also completes the pending rows, which stay.
        """
        output, beam = decoding.expand(self, beam, tokens, parents)
        return torch.log_softmax(self.logits(output).float(), -1), beam
