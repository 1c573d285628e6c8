"""The EAGLE-1 head (Li et al., 2024a; EAGLE-2 grows other trees with the same weights): one decoder layer that predicts
the target's next feature.

A feature is the target's last state after its final norm, where the output head reads it. Row t consumes feature f_t
and the embedding of x_{t+1}, `fc [embedding, feature]`, and predicts f_{t+1}, hence by the target's own frozen output
head the law of x_{t+2}. The layer has no norm before its attention, nothing stands behind it, and its output is the
next row's feature.

One objective has both trainings: EAGLE-1's is one forward over the target's features; HASS (Zhang et al., 2025) adds
forwards over the head's own features, detached, with the context that drafting has, and a cross-entropy over the
target's most probable tokens. HASS keeps rows at their absolute positions and moves features right; here, as in
EAGLE-3, row t of step k is the k-th token of the round that begins at row t, and tokens move left: the same
computation.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from draftsmith.models.features import FeatureSpec, Shared, TrainingFeatures
from draftsmith.models.heads import regression
from draftsmith.models.heads.attention import kernel_for, merged_attention, query_blocks
from draftsmith.models.heads.config import LayerConfig, of_target
from draftsmith.models.heads.decoding import LayerHead
from draftsmith.models.heads.distill import tally
from draftsmith.models.heads.divergences import Distillation
from draftsmith.models.heads.frozen import Weights, teacher_losses
from draftsmith.models.heads.layer import Layer, angles, frequencies

NOISE_LENGTH = 512  # tokens of the document whose noise is as wide as the objective says (EAGLE-1's code)


@dataclass(frozen=True)
class EagleShape:
    """What a recipe may choose of a head (None = as the target has it). bias: of `fc`; the authors' heads have one,
    vLLM applies none.
    """

    intermediate_size: Annotated[int, Gt(0)] | None
    bias: bool


@dataclass(frozen=True)
class EagleObjective(Distillation):
    """steps: forwards (EAGLE-1: 1, HASS: 3), each of weight 1; ce_weight: of the cross-entropy beside the regression
    (0.1 in both); topk_weight: of the part of it over the target's `topk` most probable tokens (EAGLE-1: 0; HASS: 1 and
    10); noise: width of the uniform noise on the target's features in a document of 512 tokens (0.2 in both), wider in
    shorter ones. What `Distillation` has is of the cross-entropies (total variation: of the first), but for `reach`,
    which weighs all of a step.
    """

    steps: Annotated[int, Gt(0)]
    ce_weight: Annotated[float, Ge(0)]
    topk_weight: Annotated[float, Ge(0)]
    topk: Annotated[int, Gt(0)]
    noise: Annotated[float, Ge(0)]

    @property
    def weights(self) -> list[float]:
        return [1.0] * self.steps


@dataclass(frozen=True)
class EagleConfig(LayerConfig):
    """Shapes of a head; it drafts all of the target's vocabulary."""

    bias: bool

    @classmethod
    def for_target(cls, config, intermediate_size: int | None = None, bias: bool = True) -> "EagleConfig":
        """A head for a target's text config: its widths and its rope. Raises UserError for a target without rope."""
        return cls(**of_target(config, "eagle", intermediate_size), bias=bias)

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return False

    @property
    def taps(self) -> tuple[str]:
        return ("last",)

    @property
    def saved_per_row(self) -> int:
        """Numbers that training keeps for each row and step: inputs of the products, norms and rotations, and what
        their gradients add.
        """
        return (
            12 * self.hidden_size
            + 6 * self.intermediate_size
            + (6 * self.num_attention_heads + 6 * self.num_key_value_heads) * self.head_dim
        )


class EagleHead(LayerHead):
    """shared: the target's embedding and output head (neither trained nor saved); ids [V] int64 is all of its
    vocabulary.
    """

    name, Shape, Objective, Config = "eagle", EagleShape, EagleObjective, EagleConfig
    inputs = 2  # vectors that `fc` joins

    def __init__(self, config: EagleConfig, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__()
        self.config, self.shared = config, Shared(shared.embedding.detach(), shared.project)
        device = shared.embedding.device
        self.register_buffer(
            "ids", torch.arange(config.vocab_size, device=device) if ids is None else ids.to(device), persistent=False
        )
        self.fc = nn.Linear(self.inputs * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([Layer(config, config.hidden_size, config.qkv_bias)])
        self._rope = frequencies(config, device)  # no buffer: fp32 frequencies must survive casts of the module
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def start_from(self, target) -> None:
        """Starts `fc` so that embeddings, whose numbers are small in most targets, weigh as much as features of unit
        size.
        """
        nn.init.normal_(self.fc.weight, std=self.fc.in_features**-0.5)
        self.fc.weight[:, : self.config.hidden_size] /= target.embedding.float().square().mean().sqrt()

    @property
    def regressors(self) -> int:
        """Inputs of the regression that `regress` makes."""
        return self.fc.in_features

    @torch.no_grad()
    def regress(self, samples: list[TrainingFeatures]) -> None:
        """Starts `fc` as the best linear map from token and feature to the next feature, and the layer as a
        pass-through.
        """
        parts = []
        for sample in samples:
            here, ahead = regression.every_row(sample)
            seen = torch.cat([self.embed(sample.tokens[ahead]), self.first(sample.hidden[here])], -1)
            parts.append((seen, sample.hidden[ahead]))
        self.fc.weight.copy_(regression.ridge(*regression.joined(parts)).T)
        for matrix in (self.layer.self_attn.o_proj, self.layer.mlp.down_proj):
            matrix.weight.zero_()

    @property
    def layer(self) -> Layer:
        return self.layers[0]

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(taps=self.config.taps)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Layer output [..., h] -> the target's output head on it [..., V]."""
        return self.shared.project(output.to(self.shared.embedding.dtype))

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return angles(self._rope, positions, self.fc.weight.dtype)

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's features, in the head's dtype."""
        return hidden.to(self.fc.weight.dtype)

    def enter(self, tokens: torch.Tensor, hidden: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [...], features [..., h] of the rows before them -> the layer's input, twice: residual base and what
        the attention reads.
        """
        x = self.fc(torch.cat([self.embed(tokens), hidden], -1))
        return x, x

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's embeddings of tokens [...], in the head's dtype."""
        return F.embedding(tokens, self.shared.embedding).to(self.fc.weight.dtype)

    def places(self, features: TrainingFeatures) -> torch.Tensor:
        """[T] positions of the packed rows."""
        return features.packing.positions

    # Training

    def unroll(self, features: TrainingFeatures, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The rounds that decoding can reach. For k = 0 .. steps - 1: (the rows [P_k] that take part (`Packing`), layer
        output [P_k, h]).
        """
        return features.packing.rounds(self._unroll(features, steps))

    def _unroll(self, features: TrainingFeatures, steps: int) -> torch.Tensor:
        """Layer outputs [K, P, h] of `packing.rows`: step 0 over the features given, step k over the outputs of step k
        - 1, detached, with teacher tokens. A row attends to its document's rows up to its own at step 0, and to its own
        earlier steps. Where a row takes no part in a step (`Packing`) its output means nothing.
        """
        attention, packing, device = self.layer.self_attn, features.packing, features.tokens.device
        rows, positions, last = packing.rows.to(device), self.places(features).to(device), len(features.tokens) - 1
        kernel = kernel_for(device)
        blocks = query_blocks(packing, packing.rows, kernel.block)
        _, whole = self.enter(
            features.tokens.roll(-1), self.first(features.hidden)
        )  # a document's last row is read by none
        key0, value0 = (attention.repeat(x, 1) for x in attention.key_value(whole, *self.angles(positions)))
        x, keys, values, outputs = whole[rows], [], [], []
        empty = key0.new_zeros(0, len(rows), attention.kv_heads, attention.head_dim)
        for k in range(steps):
            cos, sin = self.angles(positions[rows] + k)
            if k > 0:
                _, x = self.enter(features.tokens[(rows + 1 + k).clamp(max=last)], outputs[-1].detach(), k)
                key, value = attention.key_value(x, cos, sin)
                keys.append(key)
                values.append(value)
            own = (torch.stack(keys), torch.stack(values)) if keys else (empty, empty)
            attended = merged_attention(
                attention.query(x, cos, sin).contiguous(), key0, value0, *own, blocks, kernel, attention.scale
            )
            outputs.append(self.layer.finish(x, attended))
        return torch.stack(outputs)

    def loss(self, features: TrainingFeatures, objective: EagleObjective, counts: list[float] | None = None):
        """Regression of the features and classification through the frozen output head, mean over each step's rows:

        loss = sum_k 1 / counts[k] sum_rows ( SmoothL1(a, f) + ce_weight (lse(z) - <q, z>) + topk_weight sum_{v in top k
        of q} q_v (lse(z) - z_v) ), a the output at step k of row t, f the target's feature at x_{t+1+k}, z and q its
        output head on a and on f; SmoothL1 (beta 1) is a mean over the h numbers. counts: what to divide by where
        several packed rows make one batch; by default this one's own rows per step. Returns (loss, sums as `tally` has
        them, and "feature" [K]: the regression alone).
        """
        packing, teacher, steps = features.packing, features.teacher, objective.steps
        device, rows = features.tokens.device, packing.rows
        parts = packing.parts(steps).to(device)
        if len(rows) == 0:
            none = torch.zeros(steps, 0, device=device)
            return self.nothing(), tally(packing, parts, parts, none) | {"feature": none.sum(1)}
        outputs = self._unroll(noisy(features, objective.noise), steps)
        supervised = (torch.arange(len(rows), device=device) + torch.arange(steps, device=device)[:, None]).clamp(
            max=len(rows) - 1
        )
        wide = torch.promote_types(outputs.dtype, torch.float32)
        regression = F.smooth_l1_loss(outputs.to(wide), teacher.final[supervised].to(wide), reduction="none").mean(-1)
        weights = Weights(objective.ce_weight, objective.topk_weight, objective.topk)
        classification, rank, reach = teacher_losses(
            outputs, teacher, self.shared.project, self.config.vocab_size, weights, objective
        )
        losses, right = (regression + classification) * parts, rank == 0
        kept = self.alive(parts, rank, objective)
        shares = torch.tensor(
            [weight / max(n, 1) for weight, n in zip(objective.weights, counts or packing.counts(steps))], device=device
        )
        shares = shares * parts.sum(1) / kept.sum(1).clamp(min=1)
        return ((losses * reach * kept).sum(1) * shares).sum(), tally(packing, parts, right, losses.detach()) | {
            "feature": (regression.detach() * parts).sum(1)
        }

    def alive(self, parts: torch.Tensor, rank: torch.Tensor, objective: EagleObjective) -> torch.Tensor:
        """Which of the rows that take part (parts [K, P] bool) are trained on; a step's loss is the mean over them."""
        return parts


def noisy(features: TrainingFeatures, width: float) -> TrainingFeatures:
    """The features with uniform noise in +-width / 2 * 512 / (tokens of the document), keyed by their seed."""
    if width == 0:
        return features
    generator = torch.Generator().manual_seed(features.seed)
    lengths = torch.tensor(features.packing.borders).diff()
    widths = width * NOISE_LENGTH / lengths.repeat_interleave(lengths)
    noise = (torch.rand(features.hidden.shape, generator=generator) - 0.5) * widths[:, None]
    return replace(features, hidden=features.hidden + noise.to(features.hidden))
