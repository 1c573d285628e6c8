"""Choosing the draft tree: the one with the best expected tokens a second, from recorded drafts and measured costs.

Recording: plain decoding of some prompts, while at every position the head drafts a wide, deep beam search that is kept
and not used. Since decoding is lossless, the text that follows each root is then known, so that for every smaller tree
the accepted levels m_t at every root t can be read off, and its tau by walking t <- t + m_t + 1, without decoding with
it. (A narrower search is cut out of the wide one; where it would have met a node that the wide one dropped, the node
counts as not drafted.)

Costs: a few trees are timed in the decode loop; lines are laid through the robust costs (`speed`) of verify and
overhead over the tree's size and of drafting over its depth and width. Expected speedup = tau * plain / (draft + verify
+ overhead). No drafting is among the choices: its tau and its speedup are 1.
"""

from dataclasses import astuple, dataclass, replace

import torch

from draftsmith.eval.decode import Trace
from draftsmith.eval.measurement.measure import Looped, Run, interleaved
from draftsmith.eval.measurement.speed import robust_ms
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.grow import NONE, Candidates, DynamicTree, TreeByRows, TreePolicy, chain
from draftsmith.models.targets import TextTarget
from draftsmith.models.tree import DraftTree

TIMED_TOKENS = 32
WIDEST = DynamicTree(10, 8, 712)  # the recorded search
WIDTHS, DEPTHS, SIZES = (2, 3, 4, 6, 8, 10), range(1, 9), (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60)
TIMED: tuple[TreePolicy, ...] = (
    chain(2),
    chain(6),
    DynamicTree(3, 2, 5),
    DynamicTree(4, 3, 12),
    DynamicTree(4, 7, 24),
    DynamicTree(10, 3, 40),
    DynamicTree(10, 7, 60),
)


class Recorder(HeadDrafter):
    """Proposes nothing; keeps what the head would have drafted: per pass the requests and their candidates."""

    def __init__(self, head, search: DynamicTree):
        super().__init__(head, search)
        self.size, self.drafts = 1 + self.probes, []

    def begin(self, features, root):
        super().begin(features, root)
        self.requests = torch.arange(len(root))

    def propose(self, draw):
        self.drafts.append(
            (self.requests.tolist(), self.policy.candidates(self.head, self.head.roots(self.context), self.root))
        )
        return replace(DraftTree.root_only(self.root), probes=self.probes)

    def select(self, rows):
        super().select(rows)
        self.requests = self.requests[rows.cpu()]


@dataclass(frozen=True)
class Recording:
    """P drafts of one search. candidates as in `grow.Candidates`, [P, C]; path [P, depth]: the index of the candidate
    that the target's own text takes at each level, -1 behind the first miss. texts: for every request its drafts'
    numbers, one for each root in order.
    """

    search: DynamicTree
    candidates: Candidates
    path: torch.Tensor
    texts: list[list[int]]


def record(
    target: TextTarget,
    head,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stops: set[int],
    search: DynamicTree = WIDEST,
) -> Recording:
    recorder = Recorder(head, search)
    run = interleaved(
        {"": Looped(target, recorder)}, prompts, sampling, max_new_tokens, stops, len(prompts), warm_up=False
    )[""]
    traces = [run.traces[row] for row in run.units[0]]  # in the recorder's order
    return recording(search, recorder.drafts, traces)


def recording(search: DynamicTree, drafts: list[tuple[list[int], Candidates]], traces: list[Trace]) -> Recording:
    """drafts: per pass the requests (places in `traces`) and their candidates."""
    texts, following, count = [[] for _ in traces], [], 0
    for requests, _ in drafts:
        for request in requests:
            at = len(texts[request]) + 1
            ahead = traces[request].tokens[at : at + search.depth]
            following.append(ahead + [-1] * (search.depth - len(ahead)))
            texts[request].append(count)
            count += 1
    found = Candidates(
        *(torch.cat([getattr(c, name) for _, c in drafts]).cpu() for name in ("scores", "tokens", "parents"))
    )
    return Recording(search, found, follow(found, torch.tensor(following)), texts)


def follow(found: Candidates, following: torch.Tensor) -> torch.Tensor:
    """following [P, depth] token ids -> [P, depth] indices of the candidates they are, -1 behind the first that is
    none.
    """
    at, path = torch.zeros(len(following), dtype=torch.int64), []
    for tokens in following.T:
        hit = (found.parents == at[:, None]) & (found.tokens == tokens[:, None])
        index = torch.where((at >= 0) & hit.any(1), hit.to(torch.int8).argmax(1), -1)
        path.append(index)
        at = torch.where(index >= 0, index + 1, -1)
    return torch.stack(path, 1)


def narrowed(recording: Recording, top_k: int) -> torch.Tensor:
    """[P, C] scores of the candidates that a search of width top_k meets; -inf for the others."""
    found, k, levels = recording.candidates, recording.search.top_k, recording.search.depth
    met = torch.full_like(found.scores, float("-inf"))
    met[:, :top_k] = found.scores[:, :top_k]
    beam = torch.zeros(
        len(met), found.scores.size(1) + 1, dtype=torch.bool
    )  # by parent number; the root's column stays false
    beam[:, 1 : top_k + 1] = True
    for start in range(k, k + (levels - 1) * k * k, k * k):
        scores, parents = found.scores[:, start : start + k * k], found.parents[:, start : start + k * k]
        near = (torch.arange(k * k) % k < top_k) & beam.gather(1, parents)
        met[:, start : start + k * k] = scores.masked_fill(~near, float("-inf"))
        best = met[:, start : start + k * k].topk(top_k, dim=1)
        beam = torch.zeros_like(beam).scatter_(1, start + 1 + best.indices, best.values.isfinite())
    return met


def accepted_levels(recording: Recording, met: torch.Tensor, depth: int) -> torch.Tensor:
    """[P, depth]: how many candidates of the first `depth` levels come before the text's own at each level when the
    best are kept (a tree of `size` nodes holds it when that is under size - 1); very many where it was not met.
    """
    k = recording.search.top_k
    met, path = met[:, : k + (depth - 1) * k * k], recording.path[:, :depth]
    own = met.gather(1, path.clamp(min=0))
    earlier = torch.arange(met.size(1)) < path[..., None]
    before = ((met[:, None] > own[..., None]) | ((met[:, None] == own[..., None]) & earlier)).sum(-1)
    return torch.where((path >= 0) & own.isfinite(), before, met.size(1))


def walk(texts: list[list[int]], levels: list[int]) -> float:
    """levels: accepted levels at every draft -> tokens per pass over the recorded texts."""
    tokens = passes = 0
    for drafts in texts:
        at = 0
        while at < len(drafts):
            at += levels[drafts[at]] + 1
            passes += 1
        tokens += len(drafts)
    return tokens / max(1, passes)


def expected_tau(recording: Recording) -> dict[TreePolicy, float]:
    """tau of every tree of the grid on the recorded texts."""
    found, table = recording.candidates, {}
    head = narrowed(recording, 1)
    right = (recording.path >= 0) & head.gather(1, recording.path.clamp(min=0)).isfinite()
    for depth in range(1, recording.search.depth + 1):
        table[chain(depth)] = walk(recording.texts, right[:, :depth].cumprod(1).sum(1).tolist())
    for top_k in (k for k in WIDTHS if k <= recording.search.top_k):
        met = narrowed(recording, top_k)
        for depth in (d for d in DEPTHS if d <= recording.search.depth):
            before = accepted_levels(recording, met, depth)
            for size in SIZES:
                if size - 1 <= min(top_k + (depth - 1) * top_k**2, found.scores.size(1)) and size > depth:
                    held = before < size - 1
                    table[DynamicTree(top_k, depth, size)] = walk(recording.texts, held.cumprod(1).sum(1).tolist())
    return table


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a pass. plain: of plain decoding; flat (a, b): a + b * size for verify and overhead together;
    chain (a, b): a + b * (depth - 1) for drafting a chain; dynamic (a, b, c): a + (depth - 1) * (b + c * top_k) for a
    dynamic tree.
    """

    plain: float
    flat: tuple[float, float]
    chain: tuple[float, float]
    dynamic: tuple[float, float, float]

    def towards(self, other: "Costs", share: float) -> "Costs":
        """These costs, `share` of the way to others: what lies between two batch sizes."""
        mix = lambda a, b: a + share * (b - a)  # noqa: E731
        lines = (tuple(map(mix, *pair)) for pair in zip(astuple(self)[1:], astuple(other)[1:]))
        return Costs(mix(self.plain, other.plain), *lines)

    def of(self, tree: TreePolicy) -> float:
        flat, levels = self.flat[0] + self.flat[1] * tree.size, tree.depth - 1
        if isinstance(tree, DynamicTree):
            a, b, c = self.dynamic
            return flat + a + levels * (b + c * tree.top_k)
        return flat + self.chain[0] + levels * self.chain[1]


def fit(runs: dict[TreePolicy | None, Run]) -> Costs:
    """Costs from timed runs, least squares through the robust passes; None is plain decoding."""
    passes = {tree: robust_ms(run.seconds) for tree, run in runs.items()}
    draft = {tree: ms["draft"] for tree, ms in passes.items()}
    flat = {tree: ms["verify"] + ms["overhead"] for tree, ms in passes.items()}
    trees = [tree for tree in runs if tree is not None]
    dynamic = [tree for tree in trees if isinstance(tree, DynamicTree)]
    static = [tree for tree in trees if tree not in dynamic]

    def line(chosen: list, row, cost: dict) -> tuple[float, ...]:
        rows, costs = [row(tree) for tree in chosen], [[cost[tree]] for tree in chosen]
        # gelsd: some grids leave a coefficient open
        return tuple(
            torch.linalg.lstsq(
                torch.tensor(rows, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64), driver="gelsd"
            )
            .solution.flatten()
            .tolist()
        )

    return Costs(
        draft[None] + flat[None],
        line(trees, lambda t: [1.0, t.size], flat),
        line(static, lambda t: [1.0, t.depth - 1], draft),
        line(dynamic, lambda t: [1.0, t.depth - 1, (t.depth - 1) * t.top_k], draft),
    )


def measure_costs(
    target: TextTarget,
    head,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: set[int],
    batch: int,
) -> Costs:
    """Times `TIMED` and plain decoding interleaved over `TIMED_TOKENS` new tokens, in batches of `batch` prompts.
    (Sampling costs noise for every row of a tree.)
    """
    decoders = {None: Looped(target, NoDrafter())} | {tree: Looped(target, HeadDrafter(head, tree)) for tree in TIMED}
    return fit(interleaved(decoders, prompts, sampling, TIMED_TOKENS, stops, batch))


def ranking(taus: dict[TreePolicy, float], costs: Costs) -> list[tuple[TreePolicy, float, float]]:
    """(tree, tau, expected speedup) of every tree and of no drafting, the best first."""
    table = [(NONE, 1.0, 1.0)] + [(tree, tau, tau * costs.plain / costs.of(tree)) for tree, tau in taus.items()]
    return sorted(table, key=lambda entry: -entry[2])


def best_by_rows(taus: dict[TreePolicy, float], single: Costs, full: Costs, batch: int) -> TreePolicy:
    """The best tree for every number of requests up to `batch`, by costs between those of one request and those of a
    full batch: one tree where it is the same for all.
    """
    trees = []
    for rows in range(1, batch + 1):
        costs = single.towards(full, (rows - 1) / (batch - 1)) if batch > 1 else full
        best = ranking(taus, costs)[0][0]
        if not trees or trees[-1][1] != best:
            trees.append((rows, best))
    return TreeByRows(tuple(trees)) if len(trees) > 1 else trees[0][1]
