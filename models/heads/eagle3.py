"""The EAGLE-3 head (Li et al., 2025): one widened decoder layer over fused low/mid/high features of the target.

Row t consumes the target's features at x_t and the embedding of x_{t+1} and predicts x_{t+2}. The layer input is
`[input_layernorm(embedding), hidden_norm(H)]`; the residual base is the un-normalised H; the pre-norm output is the
next step's H (training-time test). Embeddings are the target's, frozen; no bias anywhere; the rope is the target's.

EAGLE-3.1 has a norm for each tap before they are fused, and the output goes through the last norm before it is the next
step's H. The attention may have a sliding window; the output head may be one of low rank over the whole vocabulary.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from draftsmith.models.features import FeatureSpec, Shared, TrainingFeatures
from draftsmith.models.heads import regression
from draftsmith.models.heads.adapted import matrix
from draftsmith.models.heads.attention import kernel_for
from draftsmith.models.heads.decoding import LayerHead
from draftsmith.models.heads.distill import Dense, soft_cross_entropy, tally, teacher_distribution
from draftsmith.models.heads.eagle3_config import Eagle3Config, Eagle3Objective, Eagle3Shape
from draftsmith.models.heads.layer import Layer, angles, copy_matrix, copy_norm, frequencies
from draftsmith.models.heads.lowrank import LowRankHead, low_rank
from draftsmith.models.heads.rows import chooser
from draftsmith.models.heads.unroll import Chooser, Plan, turn, unroll

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


class Eagle3Head(LayerHead):
    """embedding [V, h] is the target's (not trained, not saved); ids [Vd] int64 is the draft vocabulary."""

    name, Shape, Objective, Config = "eagle3", Eagle3Shape, Eagle3Objective, Eagle3Config
    tables = ("lm_head",)

    def __init__(self, config: Eagle3Config, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__()
        self.config, embedding = config, shared.embedding
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        ids = torch.arange(config.vocab_size) if ids is None else ids
        self.register_buffer("ids", ids.to(embedding.device), persistent=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(embedding.size(1), config.rms_norm_eps) for _ in config.taps)
        self.fc = nn.Linear(len(config.taps) * embedding.size(1), config.hidden_size, bias=False)
        self.midlayer = WideLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            if config.candidate_rank is None
            else LowRankHead(config.hidden_size, config.vocab_size, config.candidate_rank, config.num_candidates)
        )
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
        if self.config.candidate_rank is None:
            self.lm_head.weight.copy_(target.head.weight[self.ids])
        else:
            self.lm_head.start_from(target.head.weight)
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

    def grow(self, config: Eagle3Config) -> None:
        """Takes on the window of another recipe, if that has one: a window has no weights."""
        self.config = replace(self.config, sliding_window=config.sliding_window or self.config.sliding_window)

    @property
    def window(self) -> int | None:
        return self.config.sliding_window

    @property
    def regressors(self) -> int:
        """Inputs of the larger of the regressions that `regress` makes."""
        return max(self.fc.in_features, 2 * self.config.hidden_size)

    @torch.no_grad()
    def regress(self, samples: list[TrainingFeatures]) -> None:
        """Starts as two linear maps: `fc` from the taps to the state that the output head would read at this row (with
        `norm_output` to what the last norm makes of it, which later steps begin with), and the attention from this
        state and the next token's embedding to how the state changes with that token. For the
        second every row attends to itself: its values hold the directions that matter most, and queries and keys have
        one large constant part, whose rotations agree at distance 0 alone. What the MLP adds begins at zero.
        """
        layer, scale, parts = self.midlayer, self.norm.weight.abs().clamp_min(1e-2) * self.norm.weight.sign(), []
        for sample in samples:
            rows, places = regression.supervised_pairs(sample)
            final = sample.teacher.final.float()
            begin = final if self.config.norm_output else final / scale
            taps = self._normed(sample.hidden[rows])
            parts.append((taps, sample.tokens[rows + 1], begin[places - 1], (final / scale)[places]))
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

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tapped states [..., taps * h] -> what `fc` reads."""
        hidden = hidden.to(self.fc.weight.dtype)
        if not self.config.fc_norm:
            return hidden
        parts = hidden.unflatten(-1, (len(self.config.taps), -1)).unbind(-2)
        return torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tapped states [..., taps * h] -> H of step 0."""
        return self.fc(self._normed(hidden))

    def enter(self, tokens: torch.Tensor, hidden: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [...], H [..., h] of step 0 or an earlier output -> residual base [..., h], what the attention reads
        [..., 2h].
        """
        if step > 0 and self.config.norm_output:
            hidden = self.norm(hidden)
        return hidden, self.midlayer.widen(self._embed(tokens), hidden)

    # Training

    def unroll(self, features: TrainingFeatures, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Training-time test over the rounds that decoding can reach: teacher tokens, the head's own features.

        For k = 0 .. steps - 1: (the rows [P_k] that take part (`Packing`), layer output [P_k, h]).
        """
        output, here = self._unroll(features, steps)
        return features.packing.rounds(output.unflatten(0, (steps, len(here[0]))))

    def _unroll(self, features: TrainingFeatures, steps: int, choose: Chooser | None = None):
        """Layer outputs [N, h], one step behind the other, and of which places in `packing.rows` each step's are: of
        all of them, or of those that `choose` lets go on (`Plan`). Where a row takes no part they mean nothing.

        The attention's input is `[embedding, H]`; a token's embedding is the same in every step, so that its half of
        the projections is computed once.
        """
        attention, layer, packing = self.midlayer.self_attn, self.midlayer, features.packing
        device = features.tokens.device
        positions = packing.positions.to(device)
        hidden, queries = self.first(features.hidden), attention.heads * attention.head_dim
        for_embedding, for_hidden = attention.weight().split(hidden.size(-1), 1)
        embedded = F.linear(layer.input_layernorm(self._embed(features.tokens)), for_embedding)
        whole = F.linear(layer.hidden_norm(hidden), for_hidden[queries:]) + embedded[:, queries:].roll(-1, 0)
        key0, value0 = whole.unflatten(-1, (-1, attention.head_dim)).chunk(2, 1)
        key0, value0 = attention.repeat(turn(key0, *self.angles(positions)), 1), attention.repeat(value0, 1)
        plan = Plan(
            packing,
            steps,
            self.angles,
            kernel_for(device),
            attention.scale,
            (attention.heads, attention.kv_heads),
            self.config.rms_norm_eps,
            self.window,
            choose,
        )
        mlp = layer.mlp
        weights = (
            for_hidden,
            layer.hidden_norm.weight,
            matrix(attention.o_proj),
            layer.post_attention_layernorm.weight,
            torch.cat([matrix(mlp.gate_proj), matrix(mlp.up_proj)]),
            matrix(mlp.down_proj),
            self.norm.weight if self.config.norm_output else None,
        )
        return unroll(hidden, embedded, key0, value0, weights, plan), plan.here

    def loss(self, features: TrainingFeatures, objective: Eagle3Objective, counts: list[float] | None = None):
        """Soft cross-entropy against the target restricted to the draft vocabulary (EAGLE-3), mean over each step's
        rows:

        loss = sum_k decay^k / counts[k] sum_rows ( logsumexp(z) - <p, z> ), p = softmax(teacher[ids]) at x_{t+1+k};
        rows whose teacher argmax lies outside the draft vocabulary give no gradient and count as misses. The objective
        may ask for another divergence, for weights by reach, and for fewer rows (`Distillation`, heads/rows.py); what
        is left out of a step counts in its mean with 0. counts: what to divide by where several packed rows make one
        batch; by default this one's own rows per step. Returns (loss, sums as `tally` has them).
        """
        packing, device, steps = features.packing, features.tokens.device, objective.steps
        rows, counts = packing.rows, counts or packing.counts(steps)
        if len(rows) == 0:
            none = torch.zeros(steps, 0, device=device)
            return self.nothing(), tally(packing, none.bool(), none.bool(), none)
        distribution = teacher_distribution(features.teacher, self.ids, objective)
        choose = chooser(objective.rows, packing, distribution, self.logits, features.seed)
        output, here = self._unroll(features, steps, choose)
        parts = packing.parts(steps).to(device)
        supervised = torch.cat([part[places] for part, places in zip(parts, here)])
        here = [places[part[places]] for part, places in zip(parts, here)]
        factors = [1.0] * steps if choose is None else choose.factors
        shares = [w * f / max(n, 1) for w, f, n in zip(objective.weights, factors, counts)]
        wide = torch.promote_types(output.dtype, torch.float32)
        scale = torch.cat([torch.full((len(p),), s, device=device, dtype=wide) for p, s in zip(here, shares)])
        dense = self.config.candidate_rank is None
        total, losses, right = soft_cross_entropy(
            self.norm(output[supervised]),
            (matrix(self.lm_head),) if dense else self.lm_head.weights,
            distribution,
            here,
            scale,
            objective,
            Dense if dense else low_rank(self.config.num_candidates),
        )
        at = torch.cat([places + k * len(rows) for k, places in enumerate(here)])
        spread = lambda x: x.new_zeros(parts.shape).flatten().index_copy_(0, at, x).view(parts.shape)  # noqa: E731
        return total, tally(packing, spread(torch.ones_like(right)), spread(right), spread(losses))
