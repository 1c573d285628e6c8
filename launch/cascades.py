"""`draftsmith plan-cascade`: whether middle models pay between a target and a drafter, with which buffers, and whether
the clock agrees.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from draftsmith.eval.cascade import CascadeDrafter
from draftsmith.eval.measurement.cascades import (
    LARGEST_BUFFER,
    Bottom,
    Chain,
    Pair,
    accepted_share,
    all_chains,
    exact_inserts,
    paper_inserts,
    paper_time,
    predict,
    row_seconds,
)
from draftsmith.eval.measurement.measure import Looped, Run, interleaved, passes_by_depth, tau
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import ACCELERATOR_TREE, CPU_TREE, SAMPLED_RULE, Drafters, trained
from draftsmith.launch.methods import ASSISTANT, Methods, check_writable, write_json
from draftsmith.launch.tables import WIDTH
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.targets.copies import seconds_per_pass

WIDTHS = (1, 4, 8, 16)  # rows of timed passes
PROBED = (8, LARGEST_BUFFER)  # tokens of the buffers by which agreement and costs are measured
REPEATS = 3  # of what is timed
LEAST = 20  # passes by which the acceptance of a depth is measured; where there are fewer, that of all depths holds
PHASES = ("draft", "verify", "overhead")
PLAIN, NOTHING = "plain", "no middle model"


@dataclass(frozen=True)
class Asked:
    """What `draftsmith plan-cascade` was asked. candidates: middle models, the slowest first."""

    target: str
    candidates: tuple[str, ...]
    drafter: str
    suite: str
    output: Path
    temperature: float = 0.0
    max_new_tokens: int = 64
    limit: int | None = 8
    seed: int = 0
    variables: Mapping | None = None


def busy(run: Run, phases: tuple[str, ...] = PHASES) -> float:
    """Seconds of a batch's pass in some phases: the decoding thread's own, where it has them."""
    passes = [one for seconds in run.seconds for one in seconds["passes"]]
    return sum(getattr(one, phase) for one in passes for phase in phases) / max(1, len(passes))


def seconds_a_token(run: Run) -> float:
    passes = [one for seconds in run.seconds for one in seconds["passes"]]
    return sum(getattr(one, phase) for one in passes for phase in PHASES) / max(
        1, sum(sum(t.emitted) for t in run.traces)
    )


def best_of(runs: list[Run]) -> Run:
    """One run of several that did the same work: each pass takes what it took at its best, phase by phase. (Passes of
    a cascade are too unlike for quantiles over them.) Where a unit took other passes, it counts as it was at first.
    """
    seconds = []
    for units in zip(*(run.seconds for run in runs)):
        passes = units[0]["passes"]
        if all(len(unit["passes"]) == len(passes) for unit in units):
            passes = [
                one[0]._replace(**{phase: min(getattr(p, phase) for p in one) for phase in PHASES})
                for one in zip(*(unit["passes"] for unit in units))
            ]
        seconds.append({**units[0], "passes": passes})
    return replace(runs[0], seconds=seconds)


class Plan:
    """Measures models and pairs of them on the same prompts, each at its turn."""

    def __init__(self, asked: Asked, report=print):
        if len({asked.target, *asked.candidates}) <= len(asked.candidates):
            found = ", ".join(asked.candidates)
            raise UserError(f"plan-cascade: found {found}, expected each candidate once, and not the target")
        self.asked, self.report = asked, report
        methods = Methods.open([asked.drafter], asked.target, ASSISTANT, report=report, variables=asked.variables or {})
        self.methods, self.drafters = methods, {methods.target.name: methods.drafters}
        for name in asked.candidates:
            self.drafters[name] = methods.drafters.middle(name)
        self.names, self.target = list(self.drafters), methods.target.name
        prompts = methods.prompts(
            asked.suite, asked.limit, asked.max_new_tokens, 2 * LARGEST_BUFFER + methods.rows, False, report
        )
        self.prompts = [prompt.tokens for prompt in prompts]
        self.sampling = Sampling(asked.temperature, seed=asked.seed)
        models = [self.drafters[name].target for name in self.names]
        self.bare = {width: seconds_per_pass(models, width) for width in WIDTHS}

    def lowest(self, name: str):
        """(drafter, rule) below a model: the asked one, where it drafts for that model."""
        drafters: Drafters = self.drafters[name]
        own = (
            (CPU_TREE if drafters.target.device.type == "cpu" else ACCELERATOR_TREE)
            if trained(self.asked.drafter)
            else None
        )
        return drafters.drafter(self.asked.drafter, own), drafters.rule(self.asked.drafter)

    def stacked(self, chain: tuple[str, ...], buffers: tuple[int, ...]):
        """(drafter, rule) for the target."""
        if not chain:
            return self.lowest(self.target)
        drafter, rule = self.lowest(chain[-1])
        for name, buffer in zip(reversed(chain), reversed(buffers)):
            model = self.drafters[name].target
            drafter, rule = CascadeDrafter(model, drafter, rule, buffer, self.methods.target.vocab_size), SAMPLED_RULE
        return drafter, rule

    def run(self, decoders: dict[str, Looped], repeats: int = REPEATS) -> dict[str, Run]:
        """All in turn, several times over: what else the machine does only makes a pass longer."""
        tokens, stops = self.asked.max_new_tokens, self.methods.stops
        runs = [
            interleaved(decoders, self.prompts, self.sampling, tokens, stops, warm_up=repeats > 1 and not turn)
            for turn in range(repeats)
        ]
        return {name: best_of([run[name] for run in runs]) for name in decoders}

    def alone(self) -> dict[str, Looped]:
        """Every model decoding plainly (its name and a blank) and with the drafter."""
        found = {}
        for name in self.names:
            drafter, rule = self.lowest(name)
            model = self.drafters[name].target
            found |= {f"{name} ": Looped(model, NoDrafter()), name: Looped(model, drafter, verifier=rule)}
        return found

    def costs(self, runs: dict[str, Run]) -> tuple[dict, dict[str, Bottom]]:
        """({model: seconds of its passes by rows}, {model: the drafter under it}) of a run of `alone`."""
        passes, bottoms = {}, {}
        for place, name in enumerate(self.names):
            bare = [self.bare[width][place] for width in WIDTHS]
            loop = busy(runs[f"{name} "])  # a pass over one row, in the loop
            passes[name] = row_seconds(WIDTHS, [loop * seconds / bare[0] for seconds in bare])
            bottoms[name] = Bottom(busy(runs[name]), busy(runs[name], ("draft",)), tau(runs[name].traces))
        return passes, bottoms

    def pairs(self) -> dict[tuple[str, str], Pair]:
        """{(above, below)} of all pairs, by buffers of the sizes `PROBED`."""
        decoders = {}
        for place, above in enumerate(self.names):
            for below in self.names[place + 1 :]:
                for size in PROBED:
                    drafter, rule = self.lowest(below)
                    model, vocab = self.drafters[below].target, self.methods.target.vocab_size
                    cascade = CascadeDrafter(model, drafter, rule, size, vocab)
                    decoders[above, below, size] = Looped(self.drafters[above].target, cascade, verifier=SAMPLED_RULE)
        self.report(f"plan-cascade: {len(decoders)} pairs of models and buffers")
        runs = self.run(decoders, repeats=1)  # a cascade counts what it decodes
        return {
            pair: pair_of([(size, runs[(*pair, size)], decoders[(*pair, size)].drafter) for size in PROBED])
            for pair in dict.fromkeys(key[:2] for key in decoders)
        }


def pair_of(probes: list[tuple[int, Run, CascadeDrafter]]) -> Pair:
    """Of runs with buffers of rising sizes. The longest ones say how often each depth is accepted."""
    *_, (longest, run, _) = probes
    accepted, drafted = ([n for t in run.traces for n in getattr(t, key)] for key in ("accepted", "drafted"))
    depths = (kept / tried for tried, kept in passes_by_depth(run.traces)[:longest] if tried >= LEAST)
    seconds, more = [], []
    for size, run, cascade in probes:
        seconds.append(busy(run, ("draft",)) * run.cycles / cascade.tally.tokens)
        whole = [n for t in run.traces for n in t.drafted[:-1]]  # a text's end cuts its last buffer
        more.append(max(0.0, sum(whole) / max(1, len(whole)) - size))
    sizes = tuple(size for size, *_ in probes)
    return Pair((*depths, accepted_share(accepted, drafted)), sizes, tuple(seconds), tuple(more))


def plan_cascade(asked: Asked, report=print) -> dict:
    """Writes OUTPUT/cascade.json and prints one table: a row for each chain with at most one middle model, and for the
    chain of least predicted time; predicted and measured, from costs taken beside what they predict.
    Raises UserError for what `Methods.open` and `Drafters.middle` refuse.
    """
    check_writable(asked.output)
    plan = Plan(asked, report)
    report(f"plan-cascade: {len(plan.prompts)} prompts: {asked.drafter} under {', '.join(plan.names)}")
    alone = plan.alone()
    passes, before = plan.costs(plan.run(alone))
    pairs = plan.pairs()
    chains = [
        predict(chain, plan.target, passes, before[plan.target], pairs) for chain in all_chains(plan.names[1:], pairs)
    ]
    best = min(chains, key=lambda chain: chain.seconds)
    shown = [chain for chain in chains if len(chain.models) < 2 or chain is best]
    decoders = {"": Looped(plan.methods.target, NoDrafter())}
    for chain in shown:
        drafter, rule = plan.stacked(chain.models, chain.buffers)
        decoders[label(chain)] = Looped(plan.methods.target, drafter, verifier=rule)
    report(f"plan-cascade: {len(shown)} chains by the clock")
    # Costs once more beside the chains: a machine is not as fast now as it was when the chains were chosen.
    runs = plan.run({**{("alone", name): decoder for name, decoder in alone.items()}, **decoders})
    passes, bottoms = plan.costs({name: runs["alone", name] for name in alone})
    pairs = {
        (above, below): replace(
            pair, seconds=tuple(s * bottoms[below].seconds / before[below].seconds for s in pair.seconds)
        )
        for (above, below), pair in pairs.items()
    }
    shown = [predict(chain.models, plan.target, passes, bottoms[plan.target], pairs, chain.buffers) for chain in shown]
    best = next(chain for chain in shown if chain.models == best.models)
    two, rows = bottoms[plan.target], []
    for chain in shown:
        run = runs[label(chain)]
        row = {
            "chain": label(chain),
            "buffers": chain.buffers,
            "predicted_ms": 1e3 * chain.seconds,
            "measured_ms": 1e3 * seconds_a_token(run),
            "predicted_tau": chain.length,
            "tau": tau(run.traces),
        }
        if len(chain.models) == 1:
            (name,), new = chain.models, bottoms[chain.models[0]]
            times = new.seconds - new.drafting, two.seconds - two.drafting
            row |= {
                "agreement": pairs[plan.target, name].chances[-1],
                "cost": times[0] / times[1],
                "drafter_tau": new.length,
                "paper_ms": 1e3 * paper_time(times[::-1], (chain.length, new.length), new.drafting),
                "paper": paper_inserts(*times, new.length, two.length, chain.length),
                "exact": exact_inserts(*times, two.drafting, new.length, two.length, chain.length),
            }
        rows.append(row)
    document = {
        "target": asked.target,
        "drafter": asked.drafter,
        "recommended": label(best),
        "plain_ms": 1e3 * seconds_a_token(runs[""]),
        "rows": rows,
        "agreement": {f"{above} | {below}": pair.chances[-1] for (above, below), pair in pairs.items()},
        "bottoms": {name: asdict(bottom) for name, bottom in bottoms.items()},
        "prompts": len(plan.prompts),
        "temperature": asked.temperature,
    }
    write_json(asked.output / "cascade.json", document)
    Console(width=WIDTH).print(table_of(document))
    fastest = min(rows, key=lambda row: row["measured_ms"])
    report(
        f"recommended: {method_of(best, asked.drafter)}; by the clock the fastest is "
        f"{fastest['chain']} ({fastest['measured_ms']:.2f} ms a token, plain decoding {document['plain_ms']:.2f})"
    )
    return document


def label(chain: Chain) -> str:
    return " <- ".join(chain.models) or NOTHING


def method_of(chain: Chain, drafter: str) -> str:
    """As METHOD of other commands."""
    return "".join(f"cascade:{n}:{name}+" for name, n in zip(chain.models, chain.buffers)) + drafter


def table_of(document: dict) -> Table:
    table = Table(title=f"{document['target']}, drafts of {document['drafter']}; milliseconds a token, thread's own")
    for name in (
        "middle model",
        "buffer",
        "cost",
        "agreement",
        "drafter's tau",
        "paper",
        "exact",
        "tau predicted",
        "tau",
        "ms predicted",
        "ms",
        "predicted / measured",
    ):
        table.add_column(name, justify="left" if name == "middle model" else "right")
    words = {True: "insert", False: "refuse", None: ""}
    table.add_row(PLAIN, *[""] * 7, "1.00", "", f"{document['plain_ms']:.2f}", "")
    for row in document["rows"]:
        figure = lambda key: f"{row[key]:.2f}" if key in row else ""  # noqa: E731
        table.add_row(
            row["chain"],
            " ".join(map(str, row["buffers"])),
            *(figure(key) for key in ("cost", "agreement", "drafter_tau")),
            *(words[row.get(key)] for key in ("paper", "exact")),
            *(figure(key) for key in ("predicted_tau", "tau", "predicted_ms", "measured_ms")),
            f"{row['predicted_ms'] / row['measured_ms']:.2f}",
        )
    return table
