"""Test-time scaling: many samples (trajectories) of each prompt, and what a drafter learns from one to the next.

Every method decodes the trajectories of a prompt one after the other, or a few at a time, with one drafter, so that
what it learns from them stays until the next prompt. Trajectory n of prompt r is request r + n * prompts: the first
ones are the texts of a usual measurement.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from draftsmith.eval.decode import Clock, Trace, generate
from draftsmith.eval.measurement.interval import difference_interval, ratio_interval
from draftsmith.eval.measurement.journal import Journal
from draftsmith.eval.measurement.measure import PHASES, tau, tokens_and_passes
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.verifier import Verifier
from draftsmith.models.drafters import Drafter
from draftsmith.models.targets import TextTarget


@dataclass(frozen=True)
class Method:
    """make(): a drafter for one prompt, which learns for as long as it lives; rule: the one that judges its trees."""

    make: Callable[[], Drafter]
    rule: Verifier


@dataclass
class Scaled:
    """One method. traces[prompt][n] and seconds[prompt][round] {phase: ...}, a round being the trajectories that are
    decoded together; sizes[prompt]: bytes of the drafter's memory behind the last one, where it says so.
    """

    traces: list[list[Trace]] = field(default_factory=list)
    seconds: list[list[dict]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def trajectories(
    target: TextTarget,
    methods: dict[str, Method],
    prompts: list[list[int]],
    count: int,
    batch: int,
    sampling: Sampling,
    max_new_tokens: int,
    stops: set[int],
    progress=lambda done: None,
    journal: Journal | None = None,
    key: str = "",
) -> dict[str, Scaled]:
    """All methods in turn on each prompt. With a journal, finished prompts are kept under KEY/PROMPT."""
    found, cold = {name: Scaled() for name in methods}, True
    for row, prompt in enumerate(prompts):
        place = f"{key}/{row}"
        if journal is None or place not in journal:
            for method in methods.values() if cold else ():  # a warm-up that is forgotten
                generate(
                    target, method.make(), [prompt], sampling, min(16, max_new_tokens), stops, verifier=method.rule
                )
            cold, entry = False, {}
            for name, method in methods.items():
                drafter, traces, seconds = method.make(), [], []
                for start in range(0, count, batch):
                    numbers = range(start, min(start + batch, count))
                    clock = Clock(target.device)
                    traces += generate(
                        target,
                        drafter,
                        [prompt] * len(numbers),
                        sampling,
                        max_new_tokens,
                        stops,
                        [row + number * len(prompts) for number in numbers],
                        clock,
                        verifier=method.rule,
                    )
                    seconds.append(clock.seconds | ({"busy": clock.busy} if clock.busy else {}))
                entry[name] = {
                    "traces": [asdict(trace) for trace in traces],
                    "seconds": seconds,
                    "size": drafter.nbytes,
                }
            if journal is not None:
                journal.add(place, entry)
        else:
            entry = journal[place]
        for name, scaled in found.items():
            scaled.traces.append([Trace(**trace) for trace in entry[name]["traces"]])
            scaled.seconds.append(entry[name]["seconds"])
            scaled.sizes.append(entry[name]["size"])
        progress(row + 1)
    return found


def figures(scaled: Scaled, plain: Scaled, batch: int, seed: int) -> dict:
    """One method: all trajectories together, {"numbers": the same by trajectory (by round, where several are decoded
    together)}. Speedups are those of the decoding thread's own seconds, where there are any.
    """
    rounds = range(len(scaled.seconds[0]))
    parts = [_part(scaled, plain, batch, [number], seed) for number in rounds]
    return _part(scaled, plain, batch, list(rounds), seed) | {"numbers": parts, "memory_bytes": max(scaled.sizes)}


def _part(scaled: Scaled, plain: Scaled, batch: int, rounds: list[int], seed: int) -> dict:
    some = [_of(traces, batch, rounds) for traces in scaled.traces]
    tokens, passes = _by_prompt(some)
    split = {phase: _seconds(scaled, rounds, phase) for phase in PHASES}
    cycles = sum(max(len(t.emitted) for t in _of(traces, batch, [n])) for traces in scaled.traces for n in rounds)
    plain_tokens = sum(_by_prompt([_of(traces, batch, rounds) for traces in plain.traces])[0])
    rate, plain_rate = sum(tokens) / split["total"], plain_tokens / _seconds(plain, rounds, "total")
    return {
        "tau": tau([trace for traces in some for trace in traces]),
        "tau_interval": ratio_interval(tokens, passes, seed),
        "tokens": sum(tokens),
        "passes": sum(passes),
        "tokens_per_second": rate,
        "speedup": rate / plain_rate,
        "ms_per_pass": {phase: 1e3 * seconds / max(1, cycles) for phase, seconds in split.items()},
        "draft_share": split["draft"] / split["verify"],
    }


def ahead(first: Scaled, other: Scaled, batch: int, number: int, seed: int) -> list[float]:
    """By how much the first's tau of one round is above another's: [difference, low, high], paired by prompt."""
    mine, others = ([_of(traces, batch, [number]) for traces in one.traces] for one in (first, other))
    flat = lambda some: [trace for traces in some for trace in traces]  # noqa: E731
    return [tau(flat(mine)) - tau(flat(others)), *difference_interval(_by_prompt(mine), _by_prompt(others), seed)]


def _of(traces: list[Trace], batch: int, rounds: list[int]) -> list[Trace]:
    return [trace for number in rounds for trace in traces[number * batch : (number + 1) * batch]]


def _by_prompt(some: list[list[Trace]]) -> tuple[list[int], list[int]]:
    """Tokens and passes of each prompt."""
    counts = [tokens_and_passes(traces) for traces in some]
    return [sum(tokens) for tokens, _ in counts], [sum(passes) for _, passes in counts]


def _seconds(scaled: Scaled, rounds: list[int], phase: str) -> float:
    parts = [seconds[number] for seconds in scaled.seconds for number in rounds]
    return sum(part.get("busy", part)[phase] for part in parts)
