"""Group Tree Optimization (Hu et al., 2025, arXiv 2509.22134): a drafter is rewarded for the trees it drafts, not for
single chains.

For some windows of neighbouring positions ("groups") of a packed row, the drafter M and its frozen start M0 draft one
tree at every position with the tree policy of decoding; the target scores both in one pass over their union, and

    r = the expected accepted length of a tree under the target (`reward`),  R = r(M) - r(M0)             (equations 5,
        9)
    A = (R - mean R) / (std R + delta)     over the group                                                 (10)
    s = (M(S) / M0(S)) ^ (1 / length of S),  S the longest path of M's tree that the target's greedy choices take   (11)
    loss = - mean over the group of min(s A, clip(s, 1 - eps, 1 + eps) A), mean over the groups, times omega   (12, 13)

is added to the head's own loss. Only log M(S) carries gradient. M0 is never refreshed. Any head takes part through
`root_at` and `expand` alone. Choices of ours: groups are drawn per packed row, not per document; groups whose R hardly
differ (std below `min_spread`) are left out, since dividing by their std would turn rounding into unit advantages (all
of them are, at the start, where M = M0); they count in the mean with 0. The std is that of the population.
"""

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Packing, TrainingFeatures
from draftsmith.models.grow import DynamicTree, StaticTree, parse_tree
from draftsmith.models.tree import DraftTree

SUMS = ("groups", "kept", "roots", "reward", "frozen", "spread", "chains", "length", "ratio", "clipped", "loss")


def windows(packing: Packing, tokens: torch.Tensor, size: int, stops: set[int]) -> torch.Tensor:
    """[W] packed indices p where a group of `size` roots p .. p + size - 1 may begin: all written by the target in one
    document, none its first token (no features before it) and none a stop token (nothing is drafted behind it).
    """
    bad = torch.isin(tokens.cpu(), torch.tensor(sorted(stops), dtype=torch.int64)) | (packing.positions == 0)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), bad.cumsum(0)])
    at = (packing.written >= size).nonzero().flatten()
    return at[before[at + size] == before[at]]


def draw_groups(starts: torch.Tensor, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Up to `count` windows of `starts` [W] that do not overlap, each drawn uniformly from those that are left -> roots
    [G, size], ascending.
    """
    chosen = []
    while len(starts) and len(chosen) < count:
        chosen.append(starts[torch.randint(len(starts), (1,), generator=generator)])
        starts = starts[(starts - chosen[-1]).abs() >= size]
    first = torch.cat(chosen).sort().values if chosen else starts
    return first[:, None] + torch.arange(size)


def union(first: DraftTree, second: DraftTree) -> tuple[DraftTree, torch.Tensor]:
    """Both trees of each of P roots as one trie, padded to the largest, and the places [P, N] of the second's nodes in
    it (the first's keep theirs).
    """
    size, rows = first.size, torch.arange(len(first.tokens), device=first.tokens.device)
    tokens = torch.cat([first.tokens, torch.zeros_like(second.tokens)], 1)
    parents = torch.cat([first.parents, torch.full_like(second.parents, -1)], 1)
    places, free = torch.zeros_like(second.tokens), torch.full_like(rows, size)
    for node in range(1, second.size):
        above, token = places[rows, second.parents[:, node]], second.tokens[:, node]
        same = (parents == above[:, None]) & (tokens == token[:, None])
        known = same.any(1)
        place = torch.where(known, same.to(torch.int8).argmax(1), free)
        tokens[rows, place], parents[rows, place], places[:, node] = token, above, place
        free = free + ~known
    width = int(free.max())
    return DraftTree.of(tokens[:, :width].contiguous(), parents[:, :width].contiguous()), places


def greedy_edges(tree: DraftTree, best: torch.Tensor) -> torch.Tensor:
    """The log-probs of a target of temperature 0: 0 where a node is its most probable token, else -inf. [P, N]."""
    hit = tree.tokens == best.gather(1, tree.parents.clamp(min=0))
    return torch.zeros_like(tree.tokens, dtype=torch.float32).masked_fill_(~hit, float("-inf"))


AGGREGATES = {
    # reach [P, N]: probability of each node's path; accepted [P, N]: expected accepted length along it; leaf [P, N]
    # bool
    "lse": lambda reach, accepted, leaf: accepted.masked_fill(~leaf, float("-inf")).logsumexp(
        1
    ),  # the paper's, eta = 1
    "lme": lambda reach, accepted, leaf: accepted.masked_fill(~leaf, float("-inf")).logsumexp(1) - leaf.sum(1).log(),
    "max": lambda reach, accepted, leaf: accepted.masked_fill(~leaf, float("-inf")).amax(1),
    "mean": lambda reach, accepted, leaf: (accepted * leaf).sum(1) / leaf.sum(1),
    "node_sum": lambda reach, accepted, leaf: reach.sum(1),  # exactly the expected accepted tokens of lossless sampling
}


def reward(tree: DraftTree, edges: torch.Tensor, aggregate: str) -> torch.Tensor:
    """edges [P, N] fp32 log-probs of the nodes given their ancestors under the target -> [P]: an aggregate (equations 3
    to 5) over leaves of L = sum over the nodes of a path of the product of probabilities up to there.
    """
    reach = (
        torch.where(tree.ancestors, edges.index_fill(1, edges.new_zeros(1, dtype=torch.int64), 0.0)[:, None], 0.0)
        .sum(-1)
        .exp()
    )
    reach = (reach * tree.real).index_fill(
        1, edges.new_zeros(1, dtype=torch.int64), 0.0
    )  # the root is no drafted token
    inner = torch.zeros_like(tree.real).scatter(1, tree.parents.clamp(min=0)[:, 1:], tree.real[:, 1:])
    return AGGREGATES[aggregate](reach, torch.where(tree.ancestors, reach[:, None], 0.0).sum(-1), tree.real & ~inner)


def chain_log_prob(
    head, features: TrainingFeatures, at: torch.Tensor, path: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """log M(path | text up to the root) [P] fp32: path [P, L] target ids of the draft vocabulary, of which the first
    lengths [P] count; at [P] roots.
    """
    device, total = path.device, torch.zeros(len(path), device=path.device)
    number = torch.zeros(int(head.ids.max()) + 1, dtype=torch.int64, device=device)
    number[head.ids] = torch.arange(len(head.ids), device=device)
    beam, tokens, parents = (
        head.root_at(features, at),
        features.tokens[at.to(device)],
        torch.zeros(len(path), 1, dtype=torch.int64, device=device),
    )
    for step, following in enumerate(path.T):
        logp, beam = head.expand(beam, tokens[:, None], parents)
        total = total + torch.where(step < lengths, logp[:, 0].gather(1, number[following][:, None])[:, 0], 0.0)
        tokens = following
    return total


def advantages(
    gains: torch.Tensor, delta: float, min_spread: float, baseline: str = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """gains [G, m] -> (advantages [G, m], 0 where a group is left out; spread [G]). baseline: group, what a gain is
    compared with is the mean of its group (equation 10), the spread is the population's standard deviation; position:
    each position's own start alone, which a debiased gain already has taken off, the spread is the root mean square.
    """
    standard = gains - gains.mean(1, keepdim=True) if baseline == "group" else gains
    spread = standard.square().mean(1).sqrt()
    standard = standard / (spread[:, None] + delta)
    return standard.masked_fill((spread < min_spread)[:, None], 0.0), spread


def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """min(s A, clip(s, 1 - eps, 1 + eps) A), elementwise."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class Gto:
    """spec: a recipe's `gto` section (`train.recipe.Gto`); frozen: M0, whole and outside the engine; stops: the
    target's stop ids. Features must come with `score` (`FeatureSpec.trees`).

    Raises UserError for a tree whose shape is drawn: the reward of M and M0 would differ by their draws.
    """

    def __init__(self, spec, frozen, stops: set[int]):
        self.spec, self.frozen, self.stops, self.policy = spec, frozen, stops, parse_tree(spec.tree)
        if not isinstance(self.policy, DynamicTree | StaticTree):
            raise UserError(f"gto.tree: found {spec.tree}, expected one that is not sampled")

    def __call__(self, head, features: TrainingFeatures) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One packed row -> (omega times the mean over its groups of equation 12, {"gto": sums over its groups, in the
        order of `SUMS`}).
        """
        spec, packing, device = self.spec, features.packing, features.tokens.device
        starts = windows(packing, features.tokens, spec.group_size, self.stops)
        groups = draw_groups(starts, spec.groups, spec.group_size, torch.Generator().manual_seed(features.seed))
        if len(groups) == 0:
            return nothing(head), {"gto": torch.zeros(len(SUMS), device=device)}
        at = groups.flatten()
        now, before, path, lengths = self._trees(head, features, at)
        gains = (now - before if spec.debias else now).unflatten(0, groups.shape)
        advantage, spread = advantages(gains, spec.delta, spec.min_spread, spec.baseline)
        kept = spread >= spec.min_spread
        drawn = kept.repeat_interleave(spec.group_size) & (lengths > 0)  # an empty path has ratio 1 and no gradient
        ratio, total = torch.ones(len(at), device=device), torch.zeros((), device=device)
        if drawn.any():
            arguments = features, at[drawn.cpu()], path[drawn], lengths[drawn]
            with torch.no_grad():
                frozen = chain_log_prob(self.frozen, *arguments)
            ratio = ratio.index_put(
                (drawn.nonzero()[:, 0],), ((chain_log_prob(head, *arguments) - frozen) / lengths[drawn]).exp()
            )
        else:
            total = nothing(head)
        ratio = ratio.unflatten(0, groups.shape)
        value = surrogate(ratio, advantage, spec.clip).mean(1).sum() / len(groups)
        ratio, drawn = ratio.detach(), drawn.unflatten(0, groups.shape)
        clipped = (torch.where(advantage > 0, ratio > 1 + spec.clip, ratio < 1 - spec.clip) & drawn).sum()
        sums = (
            len(groups),
            kept.sum(),
            len(at),
            now.sum(),
            before.sum(),
            spread.sum(),
            drawn.sum(),
            lengths.sum(),
            (ratio * drawn).sum(),
            clipped,
        )
        sums = torch.stack(
            [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (*sums, -value.detach() * len(groups))]
        )
        return total - spec.omega * value, {"gto": sums}

    @torch.no_grad()
    def _trees(self, head, features: TrainingFeatures, at: torch.Tensor):
        """at [P] -> rewards of M's and of M0's trees [P], and the longest accepted path of M's: tokens [P, L], lengths
        [P].
        """
        spec, roots = self.spec, features.tokens[at.to(features.tokens.device)]
        mine, theirs = (self.policy.grow(some, some.root_at(features, at), roots) for some in (head, self.frozen))
        trie, places = union(mine, theirs)
        edges, best = features.score(trie, at.to(trie.tokens.device))
        own, theirs_best = best[:, : mine.size], best.gather(1, places)
        mode = {
            "prob": (edges[:, : mine.size], edges.gather(1, places)),
            "greedy": (greedy_edges(mine, own), greedy_edges(theirs, theirs_best)),
        }
        now, before = (reward(tree, e, spec.reward_agg) for tree, e in zip((mine, theirs), mode[spec.reward_mode]))
        nodes, counts = mine.follow(own)
        return now, before, mine.tokens.gather(1, nodes[:, 1 : int(counts.max())]), counts - 1


def nothing(head) -> torch.Tensor:
    """A zero that every trained parameter has a gradient of: processes whose rows hold no group take part in every
    exchange.
    """
    return sum(p.sum() * 0.0 for p in head.parameters() if p.requires_grad)


def figures(sums: torch.Tensor) -> dict[str, float]:
    """What a run tells of GTO, from summed `SUMS`: mean over groups, roots or chains."""
    s = dict(zip(SUMS, sums.tolist()))
    groups, roots, chains = (max(s[name], 1.0) for name in ("groups", "roots", "chains"))
    return {
        "groups": s["groups"],
        "skipped": s["groups"] - s["kept"],
        "reward": s["reward"] / roots,
        "frozen_reward": s["frozen"] / roots,
        "spread": s["spread"] / groups,
        "accepted": s["length"] / roots,
        "ratio": s["ratio"] / chains,
        "clipped": s["clipped"] / chains,
        "loss": s["loss"] / groups,
    }
