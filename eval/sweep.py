"""Timing many trees of one drafter on the same prompts, interleaved, beside what `choose` expects of each."""

from draftsmith.eval.choose import Costs, expected_tau, measure_costs, ranking, record
from draftsmith.eval.measure import Looped, interleaved, summary
from draftsmith.eval.progress import Progress
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafter import HeadDrafter, NoDrafter
from draftsmith.models.grow import DynamicTree, TreePolicy, chain
from draftsmith.models.targets import TextTarget

# Chains, and a map of depth by size for two widths.
GRID: tuple[TreePolicy, ...] = (chain(1), chain(2), chain(4), *(
    DynamicTree(k, depth, size) for k in (3, 8) for depth in (1, 2, 4, 6, 8) for size in (8, 12, 16, 24, 40, 60)
    if 2 * depth <= size <= 1 + k + (depth - 1) * k * k))


def chosen(target: TextTarget, head, prompts: list[list[int]], stops: set[int], sampling: Sampling, batch: int, max_new_tokens: int,
           ) -> tuple[list[tuple[TreePolicy, float, float]], Costs]:
    """The expected ranking (tree, tau, speedup), best first, and the measured costs."""
    recording = record(target, head, prompts, sampling, max_new_tokens, stops)
    costs = measure_costs(target, head, prompts[:max(batch, len(prompts) // 2)], stops, batch)
    return ranking(expected_tau(recording), costs), costs


def sweep(target: TextTarget, head, prompts: list[list[int]], stops: set[int], trees: list[TreePolicy], sampling: Sampling, batch: int,
          max_new_tokens: int, report=print) -> dict:
    """{"auto": tree, "best": tree, "auto_over_best": speed of auto / speed of the best, "trees": {tree: {"tau", "speedup", "speedup_interval",
    "tokens_per_second", "expected_tau", "expected_speedup", "ms_per_pass"}}}; auto is timed with the others."""
    order, _ = chosen(target, head, prompts, stops, sampling, batch, max_new_tokens)
    auto, expected = order[0][0], {tree: (tau, speedup) for tree, tau, speedup in order}
    trees = list(dict.fromkeys([auto, *trees]))
    decoders = {"plain": Looped(target, NoDrafter())} | {str(tree): Looped(target, HeadDrafter(head, tree)) for tree in trees}
    runs = interleaved(decoders, prompts, sampling, max_new_tokens, stops, batch, Progress(report, f"{len(trees)} trees", len(prompts)))
    plain, table = runs["plain"], {}
    for tree in trees:
        figures = summary(runs[str(tree)], plain.traces, plain)
        tau, speedup = expected.get(tree, (None, None))
        table[str(tree)] = {key: figures[key] for key in ("tau", "speedup", "speedup_interval", "tokens_per_second", "ms_per_pass")}
        table[str(tree)] |= {"expected_tau": tau, "expected_speedup": speedup}
    best = max(table, key=lambda tree: table[tree]["speedup"])
    return {"auto": str(auto), "best": best, "auto_over_best": table[str(auto)]["speedup"] / table[best]["speedup"], "trees": table}
