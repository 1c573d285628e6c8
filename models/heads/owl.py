"""The OWL head (SnowflakeAI's `sum_lstm` speculator): an LSTM-like cell unrolled from one hidden state of the target.

Row t starts from the target's state after the final norm at x_t, with an empty cell state; step k consumes x_{t+1+k}
and predicts x_{t+2+k}. No attention, no positions, no cache: drafting costs the same at every context length. Gates are
sums of projected state and scaled embedding, one embedding for all four; GELU over an RMS norm stands where a textbook
LSTM has tanh; no biases but those of the norms. Embedding and output head are the drafter's own. The gates are stored
as one matrix, in the order forget, input, output, cell candidate.

`[SPEC]` (OWL, arXiv 2510.07535): one learned input vector of the frozen target, which it processes behind every prefix
in training and behind every tree node in decoding, invisible to its real rows. With spec_mode replace drafting starts
from the state there. Where none rode along (a prompt or a tree without probes) it starts from the target's own state,
which is what spec_dropout trains it for.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Shared, TrainingFeatures
from draftsmith.models.heads.adapted import matrix
from draftsmith.models.heads.distill import soft_cross_entropy, tally, teacher_distribution
from draftsmith.models.heads.divergences import Distillation
from draftsmith.models.heads.head import DraftHead
from draftsmith.models.heads.labels import choices, hard_cross_entropy

EPS = 1e-6  # of all norms
# [SPEC]'s vector is this times its parameter: it learns at an eighth of the rate, since embeddings are small beside it
SPEC_UNIT = 0.125


@dataclass(frozen=True)
class OwlShape:
    """inner_dim: width of the cell (None = the target's); n_predict: steps that it is trained for, 3 for chains, 8 for
    trees; spec_mode: whether drafting starts from the target's own state (off) or from that of a `[SPEC]` behind it
    (replace).
    """

    inner_dim: Annotated[int, Gt(0)] | None
    n_predict: Annotated[int, Gt(0)]
    spec_mode: Literal["off", "replace"]


@dataclass(frozen=True)
class OwlObjective(Distillation):
    """Plain cross-entropy on the data's own tokens; with labels: target on the target's distribution instead, by what
    `Distillation` has. steps: the head's n_predict. spec_dropout: share of documents that start from the target's own
    state in place of `[SPEC]`'s (0 without one).
    """

    steps: Annotated[int, Gt(0)]
    spec_dropout: Annotated[float, Ge(0), Le(1)]
    labels: Literal["data", "target"] = "data"

    @property
    def weights(self) -> list[float]:
        return [1.0] * self.steps


@dataclass(frozen=True)
class OwlConfig:
    """Shapes of a head; n_predict is one of them, since the embedding's scale follows from it. It has no positions."""

    max_position_embeddings, columns = None, False  # no fields

    input_hidden_dim: int
    inner_dim: int
    vocab_size: int
    n_predict: int
    spec_mode: str = "off"

    @classmethod
    def for_target(
        cls, config, inner_dim: int | None = None, n_predict: int = 8, spec_mode: str = "off"
    ) -> "OwlConfig":
        """A head for a target's text config."""
        return cls(config.hidden_size, inner_dim or config.hidden_size, config.vocab_size, n_predict, spec_mode)

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def alpha(self) -> float:
        """What embeddings are multiplied by: the state keeps half of its squared magnitude over n steps, a0 = 2^(-1 /
        2n), and alpha = sqrt((1 - a0^2) d / 2) / a0.
        """
        kept = 0.5 ** (1 / self.n_predict)  # a0^2
        return ((1 - kept) * self.inner_dim / 2 / kept) ** 0.5

    @property
    def saved_per_row(self) -> int:
        """Numbers that training keeps for each row and step: gates before and after their sigmoids, norms, states, and
        the gradient's share.
        """
        return 22 * self.inner_dim


class Norm(nn.Module):
    """RMS norm with weight and bias (no mean is taken away)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS) + self.bias


@dataclass
class Context:
    """What drafting starts from, of B requests: hidden [B, d0] of the last committed row. Nothing else of them is
    kept.
    """

    hidden: torch.Tensor

    def mark(self) -> torch.Tensor:
        """As `decoding.Context.mark`."""
        return self.hidden

    def restore(self, state: torch.Tensor) -> None:
        self.hidden = state

    def select(self, rows: torch.Tensor) -> None:
        self.hidden = self.hidden[rows]

    def join(self, other: "Context") -> None:
        self.hidden = torch.cat([self.hidden, other.hidden])


@dataclass(frozen=True)
class Beam:
    """B trees whose last level has k nodes: state [B, k, d] and cell [B, k, d] after these nodes' own tokens.

    At first, waiting for the roots: the state to start from [B, 1, d0] and no cell.
    """

    state: torch.Tensor
    cell: torch.Tensor | None = None


class OwlHead(DraftHead):
    """Shares nothing with the target but its hidden states. Its draft vocabulary is the target's."""

    name, Shape, Objective, Config = "owl", OwlShape, OwlObjective, OwlConfig
    tables = ("token_embedding", "output_head")

    def __init__(self, config: OwlConfig, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__()
        self.config, self.shared = config, shared
        self.register_buffer("ids", torch.arange(config.vocab_size, device=shared.embedding.device), persistent=False)
        width = config.inner_dim
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.first_gates = nn.Linear(config.input_hidden_dim, 4 * width, bias=False)
        self.gates = nn.Linear(width, 4 * width, bias=False)
        self.cell_norm, self.state_norm = Norm(width), Norm(width)
        self.output_head = nn.Linear(width, config.vocab_size, bias=False)
        self.spec = nn.Parameter(torch.zeros(config.input_hidden_dim)) if config.spec_mode == "replace" else None
        for layer, rows in (
            (self.token_embedding, config.vocab_size),
            (self.first_gates, width),
            (self.gates, width),
            (self.output_head, config.vocab_size),
        ):
            nn.init.normal_(layer.weight, std=min(rows, layer.weight.size(1)) ** -0.5)

    @torch.no_grad()
    def start_from(self, target) -> None:
        """`[SPEC]` starts as the mean of the target's embeddings; all else from noise, as in the reference."""
        if self.spec is not None:
            self.spec.copy_(
                target.embed(torch.arange(target.vocab_size, device=target.device)).float().mean(0) / SPEC_UNIT
            )

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(taps=("last",), probe=None if self.spec is None else self.spec.detach() * SPEC_UNIT)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """State [..., d] -> logits [..., V]."""
        return self.output_head(state)

    def _enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's state [..., d0] -> the first step's projected state [..., 4 d]."""
        hidden = hidden.to(self.gates.weight.dtype)
        return self.first_gates(F.rms_norm(hidden, hidden.shape[-1:], eps=EPS) * 0.5**0.5)

    def _step(self, projected: torch.Tensor, embedded: torch.Tensor, cell: torch.Tensor | None):
        """projected state [..., 4 d], embedded [..., d] (times alpha), cell [..., d] (None = empty) -> (state,
        cell).
        """
        *gates, candidate = (projected.unflatten(-1, (4, -1)) + embedded.unsqueeze(-2)).unbind(-2)
        forget, enter, leave = (gate.sigmoid() for gate in gates)
        new = enter * F.gelu(self.cell_norm(candidate))
        cell = new if cell is None else torch.addcmul(new, forget, cell)
        return leave * F.gelu(self.state_norm(cell)), cell

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(tokens) * self.config.alpha

    # Training

    def unroll(self, features: TrainingFeatures, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per step k: the rows [P_k] that take part in it, and their states [P_k, d]."""
        return features.packing.rounds(self._unroll(features, self._starts(features), steps))

    def _starts(self, features: TrainingFeatures, dropout: float = 0.0) -> torch.Tensor:
        """[T, d0]: what drafting starts from behind every token. Behind `packing.rows` that is `[SPEC]`'s state, except
        in the documents that are drawn with probability `dropout` (by the features' seed).
        """
        packing, hidden = features.packing, features.hidden
        if self.spec is None:
            return hidden
        documents = (
            torch.rand(len(packing.borders) - 1, generator=torch.Generator().manual_seed(features.seed)) < dropout
        )
        rows, left = packing.rows, documents.repeat_interleave(torch.tensor(packing.borders).diff())
        rows, left = rows.to(hidden.device), left[rows, None].to(hidden.device)
        probed = features.probe(self.spec * SPEC_UNIT).to(hidden.dtype)
        return hidden.index_copy(0, rows, torch.where(left, hidden[rows], probed))

    def _unroll(self, features: TrainingFeatures, starts: torch.Tensor, steps: int) -> torch.Tensor:
        """starts [T, d0] -> states [K, P, d] of all `packing.rows`, teacher-forced; where a row takes no part in a step
        they mean nothing.
        """
        rows, last = features.packing.rows.to(features.tokens.device), len(features.tokens) - 1
        embedded, cell, states = self._embed(features.tokens), None, []
        projected = self._enter(starts[rows])
        for k in range(steps):
            state, cell = self._step(projected, embedded[(rows + 1 + k).clamp(max=last)], cell)
            projected = self.gates(state) if k < steps - 1 else None
            states.append(state)
        return torch.stack(states)

    def loss(self, features: TrainingFeatures, objective: OwlObjective, counts: list[float] | None = None):
        """loss = sum_k 1 / counts[k] sum_rows (logsumexp(z) - z[x_{t+2+k}]), z the logits of step k at row t: a mean
        for each step, added up.

        counts: what to divide by where several packed rows make one batch; by default this one's own rows per step.
        Returns (loss, sums as `tally` has them): `right` rows agree with the target's own choice, which the data's
        token need not be.
        """
        packing, device, steps = features.packing, features.tokens.device, objective.steps
        if steps != self.config.n_predict:
            raise UserError(
                f"objective.steps: found {steps}, expected head.n_predict {self.config.n_predict} (the embedding's "
                f"scale follows from it)"
            )
        rows = packing.rows.to(device)
        parts = packing.parts(steps).to(device)
        if len(rows) == 0:
            return self.nothing(), tally(packing, parts, parts, torch.zeros(steps, 0, device=device))
        at, step = rows.expand(steps, -1)[parts], torch.arange(steps, device=device)[:, None].expand_as(parts)[parts]
        states = self._unroll(features, self._starts(features, objective.spec_dropout), steps)[parts]
        scale = torch.tensor(
            [1 / max(n, 1) for n in counts or packing.counts(steps)],
            device=device,
            dtype=torch.promote_types(states.dtype, torch.float32),
        )[step]
        if objective.labels == "target":
            distribution = teacher_distribution(features.teacher, self.ids, objective)
            here = [part.nonzero().flatten() for part in parts]
            total, losses, hits = soft_cross_entropy(
                states, (matrix(self.output_head),), distribution, here, scale, objective
            )
        else:
            chosen = torch.zeros_like(features.tokens).index_copy_(
                0, rows + 1, choices(features.teacher)
            )  # behind the token at this place
            total, losses, hits = hard_cross_entropy(
                states, matrix(self.output_head), features.tokens[at + 2 + step], chosen[at + 1 + step], scale
            )
        right = torch.zeros_like(parts).masked_scatter_(parts, hits)
        spread = losses.new_zeros(parts.shape).masked_scatter_(parts, losses)
        return total, tally(packing, parts, right, spread)

    # Decoding

    def prefill(self, features: Features) -> Context:
        return Context(self._last(features))

    def extend(self, context: Context, features: Features) -> None:
        """Adds newly committed tokens: only the last one counts."""
        context.hidden = self._last(features)

    def _last(self, features: Features) -> torch.Tensor:
        """[B, d0]: what drafting starts from, of each request's last row."""
        rows = torch.arange(len(features.lengths), device=features.hidden.device)
        states = features.hidden if features.probes is None else features.probes
        return states[rows, features.lengths - 1]

    def roots(self, context: Context) -> Beam:
        """A beam that waits for the root tokens."""
        return Beam(context.hidden[:, None])

    def expand(self, beam: Beam, tokens: torch.Tensor, parents: torch.Tensor) -> tuple[torch.Tensor, Beam]:
        """tokens [B, k] (target ids), parents [B, k] (rows of the last expand) -> log-probs [B, k, V], beam.

        The first call consumes the root tokens [B, 1]. Siblings share their parent's state and differ in the token that
        they consume.
        """
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        state = beam.state[rows, parents]
        projected, cell = (
            (self._enter(state), None) if beam.cell is None else (self.gates(state), beam.cell[rows, parents])
        )
        state, cell = self._step(projected, self._embed(tokens), cell)
        return torch.log_softmax(self.logits(state).float(), -1), Beam(state, cell)

    def root_at(self, features: TrainingFeatures, at: torch.Tensor) -> Beam:
        """A beam of P trees whose roots are the tokens at[p] of one packed row (each behind at least one more of its
        document).
        """
        return Beam(self._starts(features)[at - 1][:, None])
