"""Timing many trees of one drafter on the same prompts, interleaved, beside what `choose` expects of each."""

from draftsmith.eval.measurement.choose import expected_tau, measure_costs, ranking, record
from draftsmith.eval.measurement.measure import PHASES, Looped, Run, interleaved, median_pass, summary
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
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
) -> dict:
    """{"auto": tree, "best": tree, "auto_over_best", "trees": {tree: {"tau", "speedup", "wall_speedup",
    "tokens_per_second", "expected_tau", "expected_speedup", "ms_per_pass"}}}; auto is timed with the others.

    speedup = tau * plain / tree over median passes: tau is exact, and medians keep a loaded machine from choosing the
    best tree. auto_over_best = speed of auto / speed of the best tree. The best of many noisy figures flatters itself,
    so it is found on one half of the batches and compared on the other, both ways round, and the geometric mean is
    taken (`best` is that of all batches).
    """
    order = choose(target, head, prompts, stops, sampling, batch, max_new_tokens)
    auto, expected = order[0][0], {tree: (tau, speedup) for tree, tau, speedup in order}
    trees = list(dict.fromkeys([auto, *trees]))
    decoders = {"plain": Looped(target, NoDrafter())} | {
        str(tree): Looped(target, HeadDrafter(head, tree)) for tree in trees
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
            "speedup": speed(run, figures["tau"]) / speed(plain, 1.0),
            "wall_speedup": figures["speedup"],
            "tokens_per_second": figures["tokens_per_second"],
            "ms_per_pass": {phase: median_pass(run, phase) for phase in PHASES},
            "expected_tau": tau,
            "expected_speedup": speedup,
        }
    halves = (
        [{row for unit in plain.units[start::2] for row in unit} for start in (0, 1)]
        if len(plain.units) > 1
        else [None, None]
    )
    ratio = 1.0
    for seen, unseen in (halves, halves[::-1]):
        best = max(table, key=lambda tree: speed(runs[tree], table[tree]["tau"], seen))
        ratio *= speed(runs[str(auto)], table[str(auto)]["tau"], unseen) / speed(runs[best], table[best]["tau"], unseen)
    return {
        "auto": str(auto),
        "best": max(table, key=lambda tree: table[tree]["speedup"]),
        "auto_over_best": ratio**0.5,
        "trees": table,
    }


def speed(run: Run, tau: float, rows: set[int] | None = None) -> float:
    """Tokens of a row per millisecond."""
    return tau / median_pass(run, "total", rows)
