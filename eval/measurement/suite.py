"""The measurement of methods on one suite of prompts: acceptance length, prediction, tree choice, speed, losslessness,
temperatures, batches.

A cell is one method at one temperature and batch size: {"method", "drafter", "tree", "suite", "temperature", "batch",
figures of `summary`, "looping" and "not_looping": acceptance of the prompts whose plain greedy continuation does or
does not repeat itself; "categories": acceptance by the suite's own categories, where it has several}.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from draftsmith.eval.measurement.choose import (
    Costs,
    Recording,
    best_by_rows,
    expected_tau,
    measure_costs,
    ranking,
    record,
)
from draftsmith.eval.measurement.interval import difference_interval
from draftsmith.eval.measurement.journal import Journal
from draftsmith.eval.measurement.measure import (
    IDENTITY,
    Decoder,
    Looped,
    Run,
    acceptance,
    interleaved,
    repeated_4grams,
    summary,
    tau,
    tokens_and_passes,
)
from draftsmith.eval.measurement.predict import predicted_chain_tau
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import NoDrafter, drafting
from draftsmith.models.grow import TreePolicy, chain, parse_tree
from draftsmith.models.targets import TextTarget

LOOPS = 0.3  # a continuation loops when this share of its 4-grams occurred in it before
ACCEPTANCE_BATCH = 16
SHOWN = 8  # trees of the expected ranking that are kept in the result


@dataclass(frozen=True)
class Plan:
    """What is measured. tree: the large tree whose acceptance length is reported at every temperature; chain_depth: of
    the chain that is predicted and measured at T = 0; fixed: the tree that is timed, None = chosen by `choose` for
    every temperature and batch size on the first `choice_prompts`; timed: (temperature, batch size) of every timed
    comparison.
    """

    tree: TreePolicy
    chain_depth: int
    fixed: TreePolicy | None
    choice_prompts: int
    temperatures: tuple[float, ...]
    timed: tuple[tuple[float, int], ...]
    max_new_tokens: int
    seed: int


class Suite:
    """One suite being measured with one plan. heads {name: trained head}; baselines {name: decoder}, timed beside plain
    decoding; categories: one of each prompt, or none at all; costs: those that other suites have measured, which hold
    here where prompts are of like length (the same power of four), and which this one adds to.
    """

    def __init__(
        self,
        name: str,
        target: TextTarget,
        heads: dict,
        baselines: dict[str, Decoder],
        prompts: list[list[int]],
        stops: set[int],
        plan: Plan,
        journal: Journal | None = None,
        report=print,
        categories: list[str] = (),
        costs: dict | None = None,
    ):
        self.name, self.target, self.heads, self.baselines, self.prompts, self.stops = (
            name,
            target,
            heads,
            baselines,
            prompts,
            stops,
        )
        self.plan, self.journal, self.report = plan, journal, report
        self.categories = {
            c: [row for row, other in enumerate(categories) if other == c] for c in dict.fromkeys(categories)
        }
        self.costs: dict[tuple[str, bool, int, int], Costs] = {} if costs is None else costs
        self.recordings: dict[tuple[str, float], Recording] = {}

    def measure(self) -> tuple[dict[str, dict], list[dict], dict[str, list]]:
        """({drafter: documented figures}, cells, {method: its trace of the longest text that does not loop, at the
        coldest timed temperature}).
        """
        plan, results, cells = self.plan, {name: {} for name in self.heads}, []
        self.plain = {t: self.reference(t) for t in sorted({0.0, *plan.temperatures, *(t for t, _ in plan.timed)})}
        self.loops = [
            repeated_4grams([[t for t in trace.tokens if t not in self.stops]]) >= LOOPS for trace in self.plain[0.0]
        ]
        for name, head in self.heads.items():
            greedy = {
                policy: self.acceptance_cell(name, policy, 0.0) for policy in (plan.tree, chain(plan.chain_depth))
            }
            sampled = {t: self.acceptance_cell(name, plan.tree, t) for t in plan.temperatures if t > 0}
            cells += [*greedy.values(), *sampled.values()]
            results[name] = {
                "tree_tau": greedy[plan.tree]["tau"],
                "chain_tau": greedy[chain(plan.chain_depth)]["tau"],
                "predicted_chain_tau": predicted_chain_tau(
                    self.target, head, self.prompts, self.plain[0.0], plan.chain_depth
                ),
                "greedy": {str(policy): figures(cell) for policy, cell in greedy.items()},
                "sampled": {str(t): figures(cell) for t, cell in sampled.items()},
            }
        samples = {}
        for temperature, batch in plan.timed:
            more, trees, runs = self.timed(temperature, batch)
            cells += more
            for name in self.heads:
                results[name] = (
                    documented(name, more, trees[name]) | results[name]
                )  # the first timed comparison is the documented one
            if (temperature, batch) == min(plan.timed, key=lambda cell: cell[::-1]):
                row = max(
                    range(len(self.loops)), key=lambda r: (not self.loops[r], len(runs["plain"].traces[r].tokens))
                )
                samples = {name: run.traces[row] for name, run in runs.items()}
        for name, result in results.items():
            parts = [cell for cell in cells if cell["drafter"] == name]
            result["lossless"] = all(p["lossless"] for p in parts) if self.target.dtype in IDENTITY else None
            result["identical"] = f"{sum(part['identical'] for part in parts)}/{sum(part['prompts'] for part in parts)}"
        return results, cells, samples

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, seed=self.plan.seed)

    def runs(
        self, what: str, decoders: dict[str, Decoder], temperature: float, batch: int, warm_up: bool
    ) -> dict[str, Run]:
        progress = Progress(self.report, f"{self.name}, T={temperature:g}, {what}", len(self.prompts))
        return interleaved(
            decoders,
            self.prompts,
            self.sampling(temperature),
            self.plan.max_new_tokens,
            self.stops,
            batch,
            progress,
            warm_up,
            self.journal,
            f"{self.name}/{temperature}/{batch}/{what}",
        )

    def reference(self, temperature: float):
        """Plain decoding with margins: what every other text is compared with."""
        return self.runs(
            "plain", {"plain": Looped(self.target, NoDrafter(), margins=True)}, temperature, ACCEPTANCE_BATCH, False
        )["plain"].traces

    def cell(
        self,
        method: str,
        run: Run,
        temperature: float,
        batch: int,
        drafter: str | None = None,
        tree: TreePolicy | None = None,
        timed_plain: Run | None = None,
    ) -> dict:
        decoder = self.baselines.get(method)  # some sample by other random numbers than plain decoding
        ours = temperature == 0 or decoder is None or decoder.keyed
        split = {
            key: [t for t, loops in zip(run.traces, self.loops) if loops == which]
            for key, which in (("looping", True), ("not_looping", False))
        }
        return {
            "method": method,
            "drafter": drafter,
            "tree": tree and str(tree),
            "suite": self.name,
            "temperature": temperature,
            "batch": batch,
            **summary(
                run,
                self.plain[temperature] if ours else None,
                timed_plain,
                self.plan.seed,
                self.target.dtype in IDENTITY,
            ),
            **{key: acceptance(traces, self.plan.seed) if traces else None for key, traces in split.items()},
            "categories": {
                category: acceptance([run.traces[row] for row in rows], self.plan.seed)
                for category, rows in self.categories.items()
                if len(self.categories) > 1
            },
        }

    def acceptance_cell(self, name: str, policy: TreePolicy, temperature: float) -> dict:
        method = f"{name} {policy}"
        run = self.runs(
            method,
            {method: Looped(self.target, drafting(self.heads[name], policy))},
            temperature,
            ACCEPTANCE_BATCH,
            False,
        )[method]
        return self.cell(method, run, temperature, ACCEPTANCE_BATCH, name, policy)

    def timed(self, temperature: float, batch: int) -> tuple[list[dict], dict, dict[str, Run]]:
        """(cells, {drafter: (its tree, its expected ranking)}, runs) of one interleaved comparison."""
        trees = {name: self.choice(name, temperature, batch) for name in self.heads}
        methods = {
            name: (None, None) for name in self.baselines if batch == 1 or not self.baselines[name].one_at_a_time
        }
        decoders = {"plain": Looped(self.target, NoDrafter())} | {name: self.baselines[name] for name in methods}
        methods = {"plain": (None, None)} | methods
        for name, (tree, _) in trees.items():
            methods[name] = (name, tree)
            decoders[name] = Looped(self.target, drafting(self.heads[name], tree))
        runs = self.runs(f"timing {len(decoders)} methods, batch {batch}", decoders, temperature, batch, True)
        cells = [
            self.cell(method, runs[method], temperature, batch, drafter, tree, runs["plain"])
            for method, (drafter, tree) in methods.items()
        ]
        for cell in cells:  # on the same prompts: paired with the first drafter
            first = next(iter(self.heads), None)
            if first and cell["method"] != first:
                cell["tau_behind_first"] = self.behind(runs[first], runs[cell["method"]])
        return cells, trees, runs

    def behind(self, first: Run, other: Run) -> dict[str, list[float]]:
        """By how much the first drafter's tau is ahead: {"all", "not_looping": [difference, low, high]}, paired
        bootstrap over prompts.
        """
        found = {}
        for key, rows in (
            ("all", range(len(self.prompts))),
            ("not_looping", [r for r, loops in enumerate(self.loops) if not loops]),
        ):
            mine, others = ([run.traces[row] for row in rows] for run in (first, other))
            if mine:
                found[key] = [
                    tau(mine) - tau(others),
                    *difference_interval(tokens_and_passes(mine), tokens_and_passes(others), self.plan.seed),
                ]
        return found

    def choice(self, name: str, temperature: float, batch: int) -> tuple[TreePolicy, dict[str, dict]]:
        """The timed tree, which may change while a batch shrinks, and {tree: {"tau", "speedup"}} of the expected
        ranking in a full batch, best first.
        """
        if self.plan.fixed is not None:
            return self.plan.fixed, {}
        key = f"{self.name}/{temperature}/{batch}/{name} tree"
        if self.journal is not None and key in self.journal:
            kept = self.journal[key]
            return parse_tree(kept.get("tree") or next(iter(kept["expected"]))), kept["expected"]  # older: that alone
        self.report(f"{self.name}, T={temperature:g}, batch {batch}: choosing a tree for {name}")
        taus = self.expected(name, temperature)
        single, full = (self.cost(name, temperature, rows) for rows in (1, batch))
        tree = best_by_rows(taus, single, full, batch)
        expected = {str(t): {"tau": a, "speedup": s} for t, a, s in ranking(taus, full)[:SHOWN]}
        if self.journal is not None:
            self.journal.add(key, {"expected": expected, "tree": str(tree)})
        return tree, expected

    def expected(self, name: str, temperature: float) -> dict[TreePolicy, float]:
        if (name, temperature) not in self.recordings:
            self.recordings[name, temperature] = record(
                self.target,
                self.heads[name],
                self.prompts[: self.plan.choice_prompts],
                self.sampling(temperature),
                self.plan.max_new_tokens,
                self.stops,
            )
        return expected_tau(self.recordings[name, temperature])

    def cost(self, name: str, temperature: float, batch: int) -> Costs:
        length = int(median(map(len, self.prompts))).bit_length() // 2
        key = name, temperature > 0, batch, length  # no temperature above 0 costs more than another
        if key not in self.costs:
            some = self.prompts[: max(2 * batch, self.plan.choice_prompts // 2)]  # low quantiles of passes need few
            self.costs[key] = measure_costs(
                self.target, self.heads[name], some, self.sampling(temperature), self.stops, batch
            )
        return self.costs[key]


def figures(cell: dict) -> dict:
    """A cell without what identifies it."""
    return {
        key: value for key, value in cell.items() if key not in ("method", "drafter", "suite", "temperature", "batch")
    }


def documented(name: str, cells: Iterable[dict], choice: tuple[TreePolicy, dict]) -> dict:
    """The keys of `result.json` that one timed comparison gives for a drafter."""
    mine, plain = (figures(next(cell for cell in cells if cell["method"] == method)) for method in (name, "plain"))
    return {
        **{key: mine[key] for key in ("robust_speedup", "speedup", "accounted_speedup", "ideal_speedup")},
        "disturbance": plain["disturbance"],
        "tree": str(choice[0]),
        "sweep": choice[1],
        "timed": mine,
        "plain": plain,
    }
