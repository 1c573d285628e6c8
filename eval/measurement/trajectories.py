"""Test-time scaling: many samples (trajectories) of each prompt, and what a drafter learns from one to the next.

Every method decodes the trajectories of a prompt one after the other, or a few at a time, with one drafter, so that
what it learns from them stays until the next prompt. Several prompts may be decoded abreast, each with a drafter of its
own. Trajectory n of prompt r is request r + n * prompts: the first ones are the texts of a usual measurement.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from draftsmith.eval.decode import Clock, Trace, decode, generate, opened
from draftsmith.eval.measurement.interval import difference_interval, ratio_interval
from draftsmith.eval.measurement.journal import Journal
from draftsmith.eval.measurement.measure import PHASES, tau, tokens_and_passes
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.verifier import Verifier
from draftsmith.models.drafters import Drafter
from draftsmith.models.drafters.abreast import Abreast
from draftsmith.models.targets import Prefill, TextSession, TextTarget


@dataclass(frozen=True)
class Method:
    """make(): a drafter for one prompt, which learns for as long as it lives; rule: the one that judges its trees;
    learns: whether it does, so that prompts must not share one.
    """

    make: Callable[[], Drafter]
    rule: Verifier
    learns: bool = True

    def of(self, prompts: int) -> Drafter:
        """The drafter of so many prompts."""
        return Abreast([self.make() for _ in range(prompts)]) if self.learns and prompts > 1 else self.make()


@dataclass
class Scaled:
    """One method. traces[prompt][n]; seconds[group][round] {phase: ...} and passes[group][round], a group being prompts
    that are decoded abreast and a round those of their trajectories that are decoded together; sizes[group]: bytes of
    the drafter's memory (of the largest one) behind the last one, where it says so.
    """

    traces: list[list[Trace]] = field(default_factory=list)
    seconds: list[list[dict]] = field(default_factory=list)
    passes: list[list[int]] = field(default_factory=list)
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
    abreast: int = 1,
) -> dict[str, Scaled]:
    """All methods in turn on each prompt, or on each `abreast` of them. With a journal, finished ones are kept under
    KEY/FIRST PROMPT.
    """
    found = {name: Scaled() for name in methods}
    groups = [range(start, min(start + abreast, len(prompts))) for start in range(0, len(prompts), abreast)]
    cold = True
    for rows in groups:
        place = f"{key}/{rows[0]}"
        if journal is None or place not in journal:
            for method in methods.values() if cold else ():  # a warm-up that is forgotten
                texts = [prompts[rows[0]]]
                generate(target, method.make(), texts, sampling, min(16, max_new_tokens), stops, verifier=method.rule)
            cold, entry = False, {}
            for name, method in methods.items():
                drafter, traces, seconds, passes = method.of(len(rows)), [[] for _ in rows], [], []
                begun = Prompted(target, drafter, [prompts[row] for row in rows], max_new_tokens)
                for start in range(0, count, batch):
                    numbers = range(start, min(start + batch, count))
                    clock = Clock(target.device)
                    texts = decode(
                        *begun.times(len(numbers)),
                        sampling,
                        max_new_tokens,
                        stops,
                        [row + number * len(prompts) for row in rows for number in numbers],
                        clock,
                        verifier=method.rule,
                    )
                    for at in range(len(rows)):
                        traces[at] += map(asdict, texts[at * len(numbers) : (at + 1) * len(numbers)])
                    passes.append(max(len(text.emitted) for text in texts))
                    seconds.append(clock.seconds | ({"busy": clock.busy} if clock.busy else {}))
                entry[name] = {"traces": traces, "seconds": seconds, "passes": passes, "size": drafter.nbytes}
            if journal is not None:
                journal.add(place, entry)
        else:
            entry = journal[place]
        for name, scaled in found.items():
            scaled.traces += [[Trace(**trace) for trace in traces] for traces in entry[name]["traces"]]
            scaled.seconds.append(entry[name]["seconds"])
            scaled.passes.append(entry[name]["passes"])
            scaled.sizes.append(entry[name]["size"])
        progress(rows[-1] + 1)
    return found


class Prompted:
    """Prompts in front of a target, processed once for all rounds of trajectories."""

    def __init__(self, target: TextTarget, drafter: Drafter, prompts: list[list[int]], max_new_tokens: int):
        self.target, self.drafter, self.prompts, self.max_new_tokens = target, drafter, prompts, max_new_tokens
        self.begun: dict[int, tuple[TextSession, Prefill, list[list[int]]]] = {}

    @torch.inference_mode()
    def times(self, count: int) -> tuple[TextSession, Prefill, Drafter, list[list[int]]]:
        """A session of its own with each prompt `count` times in a row, its prefill, the drafter, these prompts."""
        if count not in self.begun:
            prompts = [prompt for prompt in self.prompts for _ in range(count)]
            session = opened(self.target, self.drafter, prompts, self.max_new_tokens)
            self.begun[count] = session, session.prefill(prompts), prompts
        session, prefill, prompts = self.begun[count]
        return session.copy(), prefill, self.drafter, prompts


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
    cycles = sum(passes[number] for passes in scaled.passes for number in rounds)
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
