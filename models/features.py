"""What a head asks of the target (`FeatureSpec`) and what it gets (`Features`), in training and in decoding alike.

One definition on both sides is what keeps training accuracy and decoding acceptance equal. In decoding `Features` are
right-padded rows of requests; in training they are one packed row of documents behind one another, without padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Middle:
    """Which intermediate state is supervised: of the decoder layers [lo, hi) (0-based) the one of least attention
    entropy, for every token or for the mean over a document (ties: the lowest); the state that leaves or enters that
    layer (DREAM, section 4).
    """

    granularity: Literal["token", "sample"]
    layers: tuple[int, int]
    feature: Literal["output", "input"]


@dataclass(frozen=True)
class DistributionSpec:
    """The distributions that the target draws tokens from (after penalty, temperature, top-k and top-p), each cut to
    its `top` most probable ids. rows: those behind the committed rows, or those behind all nodes of a verified tree,
    rejected ones included.
    """

    rows: Literal["committed", "nodes"]
    top: int


@dataclass(frozen=True)
class FeatureSpec:
    """taps: Hugging Face `hidden_states` indices (0 = the target's input embeddings, projected images included, k =
    state entering layer k, "last" = after the final norm), concatenated in this order. probe [h]: the head's own
    parameter that the target processes behind real rows as the embedding of one more token (`[SPEC]`), None for heads
    without one; sessions read it at every forward, so that it is never stale. trees: in training,
    `TrainingFeatures.score` is asked for.

    rows: which rows feed the drafter; "text" hides visual tokens, and tokens of `drop_ids` that the target did not
    write (markers around images). A head that drafts over some rows and attends to all takes all. columns: attention
    column means of the last layer (of prompts). middle: the chosen intermediate state (in training only).
    distribution: what the target draws its tokens from (in decoding only, behind trees).
    """

    taps: tuple[int | Literal["last"], ...]
    probe: torch.Tensor | None = field(default=None, compare=False, repr=False)
    trees: bool = False
    rows: Literal["all", "text"] = "all"
    drop_ids: tuple[int, ...] = ()
    columns: bool = False
    middle: Middle | None = None
    distribution: DistributionSpec | None = None


@dataclass(frozen=True)
class Shared:
    """What heads share with their target, frozen: its input embedding [V, h], and project(hidden [..., h] after the
    final norm) -> logits [..., V], its output head (None where no target is at hand). scale: what the target multiplies
    embeddings by on the way in.
    """

    embedding: torch.Tensor
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Distribution:
    """What a `DistributionSpec` asks for. ids [B, R, k] int64, the most probable first; probs [B, R, k] fp32, not
    renormalised, 0 where nothing more can be drawn. At temperature 0, where only the first id can follow, the
    probabilities are those of temperature 1: they rank the others.
    """

    ids: torch.Tensor
    probs: torch.Tensor


@dataclass(frozen=True)
class Features:
    """Rows of processed tokens, right-padded: tokens [B, S] int64; hidden [B, S, taps * h] detached; lengths [B] int64,
    the real rows.

    probes [B, S, h]: states after the final norm of the probe behind each row; of a prefill only those behind the last
    real row of each request are, the others are zero. None where no probes rode along: heads without one, trees with
    `probes` False.

    What targets add: positions [B, S] int64, the place of each row among all that the target processed (rows that are
    hidden leave gaps); visual [B, S] bool, rows whose input is a piece of an image; columns [B, S] fp32, if asked for
    and of a prompt only: the weight that a row receives in the last layer, mean over heads and over the prompt's rows.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    probes: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    distribution: Distribution | None = None

    def texts(self, root: torch.Tensor) -> list[list[int]]:
        """The tokens of each request's rows, and behind them its root [B]."""
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), root.tolist())
        return [[*tokens[:length], last] for tokens, length, last in rows]

    def of(self, row: int) -> "Features":
        """One request alone: its tokens, hidden states, length, probes and distributions."""
        part = slice(row, row + 1)
        told = self.distribution and Distribution(self.distribution.ids[part], self.distribution.probs[part])
        probes = None if self.probes is None else self.probes[part]
        return Features(self.tokens[part], self.hidden[part], self.lengths[part], probes, distribution=told)

    def joined(self, other: "Features") -> "Features":
        """The requests of `other` behind these: their tokens, hidden states and lengths, nothing else."""
        width = max(self.tokens.size(1), other.tokens.size(1))
        pad = lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, width - x.size(1)))  # noqa: E731
        return Features(
            torch.cat([pad(self.tokens), pad(other.tokens)]),
            torch.cat([pad(self.hidden), pad(other.hidden)]),
            torch.cat([self.lengths, other.lengths]),
        )

    def then(self, other: "Features") -> "Features":
        """The rows of `other` behind these, request by request: tokens, hidden states, lengths, and probes and
        distributions where both have them.
        """
        lengths = self.lengths + other.lengths
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        places = self.lengths[:, None] + torch.arange(other.tokens.size(1), device=lengths.device)
        width = self.tokens.size(1) + other.tokens.size(1)

        def behind(first, second):
            if first is None or second is None:
                return None
            whole = first.new_zeros(len(first), width, *first.shape[2:])
            whole[:, : first.size(1)] = first
            whole[rows, places] = second
            return whole[:, : int(lengths.max())]

        told = None
        if self.distribution is not None and other.distribution is not None:
            told = Distribution(
                *(behind(getattr(self.distribution, x), getattr(other.distribution, x)) for x in ("ids", "probs"))
            )
        tokens, hidden, probes = (behind(getattr(self, x), getattr(other, x)) for x in ("tokens", "hidden", "probes"))
        return Features(tokens, hidden, lengths, probes, distribution=told)

    def first(self, lengths: torch.Tensor) -> "Features":
        """The first lengths [B] rows of each request."""
        width = int(lengths.max())
        told = self.distribution and Distribution(self.distribution.ids[:, :width], self.distribution.probs[:, :width])
        probes = None if self.probes is None else self.probes[:, :width]
        return Features(self.tokens[:, :width], self.hidden[:, :width], lengths, probes, distribution=told)


@dataclass(frozen=True)
class Packing:
    """One packed row of T tokens. borders: (0, n1, n1 + n2, ..., T), where documents begin and the last one ends; mask
    [T] bool on the CPU, the token mask (True = written by the target).

    Row t of a document is the drafting round whose root is x_{t+1}; its step k predicts x_{t+2+k}. It takes part in
    step k while all of x_{t+1} .. x_{t+2+k} lie in the document and were written by the target: the rounds that
    decoding can reach.
    """

    borders: tuple[int, ...]
    mask: torch.Tensor

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] int64: the place of every token in its document."""
        starts = torch.tensor(self.borders[:-1])
        return torch.arange(len(self.mask)) - starts.repeat_interleave(torch.tensor(self.borders).diff())

    @cached_property
    def written(self) -> torch.Tensor:
        """[T] int64: how many tokens from here on, inside the document, were written by the target without a gap."""
        stop = ~self.mask
        ends = torch.arange(len(self.mask))
        # The next place at or behind t that was not written, or the end of the document.
        bound = torch.tensor(self.borders[1:]).repeat_interleave(torch.tensor(self.borders).diff())
        after = torch.where(stop, ends, torch.full_like(ends, len(self.mask)))
        following = after.flip(0).cummin(0).values.flip(0)
        return torch.minimum(following, bound) - ends

    @cached_property
    def reach(self) -> torch.Tensor:
        """[T] int64: in how many steps each row takes part."""
        none = torch.zeros(1, dtype=torch.int64)
        return torch.where(torch.cat([self.positions[1:], none]) > 0, torch.cat([self.written[1:] - 1, none]), 0)

    @cached_property
    def rows(self) -> torch.Tensor:
        """[P] int64, ascending: the rows of step 0. The row k places behind one that takes part in step k is the k-th
        next of them.
        """
        return (self.reach > 0).nonzero().flatten()

    def takes_part(self, step: int) -> torch.Tensor:
        """[P] bool: which of `rows` take part in a step."""
        return self.reach[self.rows] > step

    def parts(self, steps: int) -> torch.Tensor:
        """[K, P] bool: `takes_part` of every step."""
        return torch.stack([self.takes_part(k) for k in range(steps)])

    def rounds(self, outputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """outputs [K, P, ...] of `rows` at K steps -> for each step (rows [P_k], outputs [P_k, ...]) of those that take
        part in it.
        """
        parts = self.parts(len(outputs))
        return [
            (self.rows[part].to(output.device), output[part.to(output.device)]) for part, output in zip(parts, outputs)
        ]

    def counts(self, steps: int) -> list[int]:
        """How many rows take part in each of the first `steps` steps."""
        return [int((self.reach > k).sum()) for k in range(steps)]

    @cached_property
    def prompts(self) -> torch.Tensor:
        """[documents] int64: the tokens of each before the first one that the target wrote (at least one), which
        decoding prefills.
        """
        masks = [self.mask[start:stop] for start, stop in zip(self.borders, self.borders[1:])]
        return torch.tensor([max(1, int(m.int().argmax())) if m.any() else len(m) for m in masks])

    def select(self, kept: torch.Tensor) -> "Packing":
        """The packing of the tokens `kept` [T] bool."""
        ends = [0, *kept.cumsum(0).tolist()]
        return Packing(tuple(ends[border] for border in self.borders), self.mask[kept])


@dataclass(frozen=True)
class Teacher:
    """The target's own predictions at supervised rows: final [P, h], the states after the final norm at tokens
    `packing.rows + 1`.

    `project(hidden [P, h], ids | None) -> logits [P, V or len(ids)]` applies the target's frozen output head.
    """

    final: torch.Tensor
    project: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class TrainingFeatures:
    """One packed row: tokens [T] int64, hidden [T, taps * h] detached, what of it is trained on, and the teacher. With
    text rows only, all of it, the packing included, is of the rows that are kept.

    seed keys whatever an objective draws (noise, dropout), so that a run that is resumed draws what one that was never
    killed draws. positions, visual and columns [T] are those of `Features`; columns are over the rows before the first
    token that the target wrote, which decoding prefills, and 0 from there on. If asked for: middle [T, h], the chosen
    intermediate state; entropies [T, hi - lo] fp32, each token's attention entropy (nats, mean over heads) at the
    layers that compete.

    probe(embedding [h]) -> [P, h], for a spec with a probe: behind token t of each t in `packing.rows` stands the
    embedding, at the position of t + 1, seeing its document up to t and itself; its states after the final norm, with
    gradient to the embedding and to nothing else. A callable, since ZeRO-3 has the parameter only inside the training
    step's forward. score(trees, at [P]) -> (log-probabilities [P, N], most probable tokens [P, N]), for a spec with
    trees: `PackedPrefix.score`.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    packing: Packing
    teacher: Teacher
    seed: int = 0
    probe: Callable[[torch.Tensor], torch.Tensor] | None = None
    score: Callable | None = None
    positions: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    middle: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
