"""Timing many trees of one drafter on the same prompts, interleaved, beside what `choose` expects of each."""

from collections.abc import Callable

from draftsmith.eval.measurement.choose import expected_tau, measure_costs, ranking, record
from draftsmith.eval.measurement.measure import Looped, Run, interleaved, summary
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.measurement.speed import robust_ms
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import Drafter, NoDrafter, drafting
from draftsmith.models.grow import DynamicTree, TreePolicy, chain
from draftsmith.models.targets import TextTarget

# Chains, and a map of depth by size for two widths.
GRID: tuple[TreePolicy, ...] = (
    chain(1),
    chain(2),
    chain(4),
    *(
        DynamicTree(k, depth, size)
        for k in (3, 8)
        for depth in (1, 2, 4, 6, 8)
        for size in (8, 12, 16, 24, 40, 60)
        if 2 * depth <= size <= 1 + k + (depth - 1) * k * k
    ),
)


def choose(
    target: TextTarget,
    head,
    prompts: list[list[int]],
    stops: set[int],
    sampling: Sampling,
    batch: int,
    max_new_tokens: int,
) -> list[tuple[TreePolicy, float, float]]:
    """The expected ranking (tree, tau, speedup), best first."""
    recording = record(target, head, prompts, sampling, max_new_tokens, stops)
    return ranking(expected_tau(recording), measure_costs(target, head, prompts, sampling, stops, batch))


def sweep(
    target: TextTarget,
    head,
    prompts: list[list[int]],
    stops: set[int],
    trees: list[TreePolicy],
    sampling: Sampling,
    batch: int,
    max_new_tokens: int,
    report=print,
    make: Callable[[TreePolicy], Drafter] | None = None,
) -> dict:
    """{"auto": tree, "best": tree, "auto_over_best", "disturbance", "trees": {tree: {"tau", "speedup", "wall_speedup",
    "tokens_per_second", "expected_tau", "expected_speedup", "ms_per_pass"}}}; auto is timed with the others.

    speedup, tokens_per_second and ms_per_pass are robust (`speed`), so that a loaded machine does not choose the best
    tree; disturbance is that of the plain passes. auto_over_best = speed of auto / speed of the best tree. The best of
    many noisy figures flatters itself, so it is found on one half of the batches and compared on the other, both ways
    round, and the geometric mean is taken (`best` is that of all batches). make: a drafter in which the head grows a
    tree, None = the head alone; auto and what is expected are those of the head alone.
    """
    order = choose(target, head, prompts, stops, sampling, batch, max_new_tokens)
    auto, expected = order[0][0], {tree: (tau, speedup) for tree, tau, speedup in order}
    trees = list(dict.fromkeys([auto, *trees]))
    decoders = {"plain": Looped(target, NoDrafter())} | {
        str(tree): Looped(target, make(tree) if make else drafting(head, tree)) for tree in trees
    }
    runs = interleaved(
        decoders, prompts, sampling, max_new_tokens, stops, batch, Progress(report, f"{len(trees)} trees", len(prompts))
    )
    plain, table = runs["plain"], {}
    for tree in trees:
        run = runs[str(tree)]
        figures, (tau, speedup) = summary(run, plain.traces, plain), expected.get(tree, (None, None))
        table[str(tree)] = {
            "tau": figures["tau"],
            "speedup": figures["robust_speedup"],
            "wall_speedup": figures["speedup"],
            "tokens_per_second": figures["robust_tokens_per_second"],
            "ms_per_pass": figures["robust_ms_per_pass"],
            "expected_tau": tau,
            "expected_speedup": speedup,
        }
    halves = [slice(0, None, 2), slice(1, None, 2)] if len(plain.units) > 1 else [slice(None)] * 2  # of the batches
    ratio = 1.0
    for seen, unseen in (halves, halves[::-1]):
        best = max(table, key=lambda tree: speed(runs[tree], table[tree]["tau"], seen))
        ratio *= speed(runs[str(auto)], table[str(auto)]["tau"], unseen) / speed(runs[best], table[best]["tau"], unseen)
    return {
        "auto": str(auto),
        "best": max(table, key=lambda tree: table[tree]["speedup"]),
        "auto_over_best": ratio**0.5,
        "disturbance": summary(plain, plain.traces, plain)["disturbance"],
        "trees": table,
    }


def speed(run: Run, tau: float, units: slice) -> float:
    """Tokens of a row per millisecond."""
    return tau / sum(robust_ms(run.seconds[units]).values())
