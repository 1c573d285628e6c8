"""Measuring methods on the same prompts, interleaved, and what each number means.

tau = tokens emitted / verify passes, bonus token included (plain = 1), micro-averaged; the token sampled from the
prefill counts in neither. Speedup = plain seconds / speculative seconds of the loops (per token, which only matters
where a baseline samples other texts). Accounted speedup = tau * t_plain / (t_verify + t_draft + t_overhead) per pass,
the same as tokens / accounted seconds / plain rate; ideal speedup leaves the overhead out. Busy speedup is that of the
decoding thread's own seconds. Robust speedup (`speed`) is the one to quote: these four are ratios of totals, which
whatever else runs on the machine goes into.
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from draftsmith.eval.decode import Clock, Emit, Trace, generate
from draftsmith.eval.measurement.interval import quotient_interval, ratio_interval
from draftsmith.eval.measurement.journal import Journal
from draftsmith.eval.measurement.speed import robust_figures
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.verifier import MATCH, Verifier
from draftsmith.models.drafters import Drafter
from draftsmith.models.targets import TextTarget

# a divergence is tolerated only where the top-2 gap of the plain scores (logits and keyed noise) is below this
NEAR_TIE = 1e-4
# in which identity is claimed: in lower precision a tree and a single row round differently
IDENTITY = (torch.float32, torch.float64)
PHASES = ("draft", "verify", "overhead", "total")


class Decoder(Protocol):
    """A method: decodes a batch. Returns one trace a prompt, and what `Run.seconds` holds of a unit. `emit` hears of
    every pass as it ends (Hugging Face's loops: of single prompts only).
    """

    one_at_a_time: bool  # refuses batches
    keyed: bool  # sampled texts are those of plain decoding: their noise is keyed by seed, request and position

    def __call__(
        self,
        prompts: list[list[int]],
        requests: list[int],
        sampling: Sampling,
        max_new_tokens: int,
        stops: set[int],
        emit: Emit | None = None,
    ) -> tuple[list[Trace], dict]: ...


@dataclass(frozen=True)
class Looped:
    """A drafter in the decode loop. margins: record how near each plain choice was to another one (not for timing).
    verifier: the rule that judges its trees at temperatures above 0.
    """

    target: TextTarget
    drafter: Drafter
    margins: bool = False
    verifier: Verifier = MATCH
    one_at_a_time = False

    @property
    def keyed(self) -> bool:
        return self.verifier is MATCH

    def __call__(self, prompts, requests, sampling, max_new_tokens, stops, emit=None):
        clock = Clock(self.target.device)
        traces = generate(
            self.target,
            self.drafter,
            prompts,
            sampling,
            max_new_tokens,
            stops,
            requests,
            clock,
            self.margins,
            self.verifier,
            emit,
        )
        seconds = clock.seconds | ({"busy": clock.busy} if clock.busy else {})
        return traces, seconds | {"begin": clock.begin, "passes": clock.passes}


@dataclass
class Run:
    """Traces of one method, one per prompt; units: the prompts decoded together; seconds {phase: ...} of each unit,
    with "begin" and "passes", and on a CPU "busy": {phase: ...}, as in `Clock`.
    """

    traces: list[Trace] = field(default_factory=list)
    units: list[list[int]] = field(default_factory=list)
    seconds: list[dict] = field(default_factory=list)

    def total(self, phase: str) -> float:
        """Seconds over all prompts."""
        return sum(seconds[phase] for seconds in self.seconds)

    @property
    def cycles(self) -> int:
        """Passes over a batch: a unit goes on until its last row ends."""
        return sum(max(len(self.traces[row].emitted) for row in unit) for unit in self.units)


def tau(traces: list[Trace]) -> float:
    """Micro-averaged acceptance length."""
    return sum(sum(t.emitted) for t in traces) / max(1, sum(len(t.emitted) for t in traces))


def macro_tau(traces: list[Trace]) -> float:
    """Mean over prompts of each prompt's acceptance length."""
    per_prompt = [sum(t.emitted) / len(t.emitted) for t in traces if t.emitted]
    return sum(per_prompt) / max(1, len(per_prompt))


def tokens_and_passes(traces: list[Trace]) -> tuple[list[int], list[int]]:
    """Per prompt, for the bootstrap."""
    return [sum(t.emitted) for t in traces], [len(t.emitted) for t in traces]


def passes_by_depth(traces: list[Trace]) -> list[tuple[int, int]]:
    """Per depth: passes that drafted level d and accepted level d - 1, and those of them that accepted level d."""
    counts = []
    for depth in range(1, max((max(t.drafted, default=0) for t in traces), default=0) + 1):
        reached = [a for t in traces for a, d in zip(t.accepted, t.drafted) if d >= depth and a >= depth - 1]
        if not reached:
            break
        counts.append((len(reached), sum(a >= depth for a in reached)))
    return counts


def acceptance_by_depth(traces: list[Trace]) -> list[float]:
    """Conditional acceptance: of the passes that drafted level d and accepted level d - 1, the share that accepted
    level d.
    """
    return [accepted / reached for reached, accepted in passes_by_depth(traces)]


def divergences(plain: list[Trace], other: list[Trace]) -> list[dict]:
    """Prompts whose texts differ: first differing token and the margin of the plain choice there (None where it was not
    recorded).
    """
    found = []
    for row, (a, b) in enumerate(zip(plain, other)):
        if a.tokens != b.tokens:
            at = next(
                (i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), min(len(a.tokens), len(b.tokens))
            )
            margin = a.margins[at - 1] if 0 < at <= len(a.margins) else None
            found.append(
                {"prompt": row, "token": at, "margin": margin, "tolerated": margin is not None and margin < NEAR_TIE}
            )
    return found


def repeated_4grams(texts: list[list[int]]) -> float:
    """Share of the 4-grams of texts (ids without the stop token) that occurred in the same text before: how much they
    loop. Micro-averaged.
    """
    repeated = total = 0
    for text in texts:
        grams = list(zip(text, text[1:], text[2:], text[3:]))
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / max(1, total)


def interleaved(
    decoders: dict[str, Decoder],
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stops: set[int],
    batch: int = 1,
    progress=lambda done: None,
    warm_up: bool = True,
    journal: Journal | None = None,
    key: str = "",
) -> dict[str, Run]:
    """Every decoder in turn on each batch of ragged prompts of similar length. Request ids are the prompts' places.

    Batches come in an order without a plan, so that a busy time of the machine meets all lengths, and decoders in the
    other order on every second one, so that a machine that slows down or gets faster favours none.

    The warm-up decodes a little of the first batch and is forgotten. With a journal, finished batches are kept under
    KEY/BATCH.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    units = [order[start : start + batch] for start in range(0, len(order), batch)]
    random.Random(0).shuffle(units)
    runs, traces, cold = {name: Run(units=units) for name in decoders}, {name: {} for name in decoders}, warm_up
    for number, unit in enumerate(units):
        place, texts = f"{key}/{number}", [prompts[row] for row in unit]
        if journal is None or place not in journal:
            for decode in decoders.values() if cold else ():
                decode(texts, unit, sampling, min(16, max_new_tokens), stops)
            cold, entry = False, {}
            for name, decode in list(decoders.items())[:: -1 if number % 2 else 1]:
                found, seconds = decode(texts, unit, sampling, max_new_tokens, stops)
                entry[name] = {"traces": [asdict(trace) for trace in found], "seconds": seconds}
            if journal is not None:
                journal.add(place, entry)
        else:
            entry = journal[place]
        for name in decoders:
            traces[name] |= {row: Trace(**trace) for row, trace in zip(unit, entry[name]["traces"])}
            runs[name].seconds.append(entry[name]["seconds"])
        progress(sum(map(len, units[: number + 1])))
    for name, run in runs.items():
        run.traces = [traces[name][row] for row in range(len(prompts))]
    return runs


def decode_batches(
    target: TextTarget,
    drafter: Drafter,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stops: set[int],
    batch: int,
    progress=lambda done: None,
    margins: bool = False,
) -> list[Trace]:
    """Traces of one drafter, without timing."""
    return interleaved(
        {"": Looped(target, drafter, margins)}, prompts, sampling, max_new_tokens, stops, batch, progress, warm_up=False
    )[""].traces


def acceptance(traces: list[Trace], seed: int = 0) -> dict:
    """Acceptance figures of some prompts, with the interval of tau."""
    tokens, passes = tokens_and_passes(traces)
    return {
        "tau": tau(traces),
        "tau_interval": ratio_interval(tokens, passes, seed),
        "macro_tau": macro_tau(traces),
        "accepted_per_pass": tau(traces) - 1,
        "prompts": len(traces),
        "tokens": sum(tokens),
        "passes": sum(passes),
    }


def summary(
    run: Run, plain: list[Trace] | None, timed_plain: Run | None = None, seed: int = 0, claimed: bool = True
) -> dict:
    """All figures of one method. plain: reference texts with margins (None where the texts are drawn from other random
    numbers); timing keys only beside a timed plain run over the same batches; claimed: whether identity is, else
    `lossless` is None (`IDENTITY`).
    """
    figures = acceptance(run.traces, seed) | {
        "acceptance_by_depth": acceptance_by_depth(run.traces),
        "passes_by_depth": [reached for reached, _ in passes_by_depth(run.traces)],
    }
    if plain is not None:
        different = divergences(plain, run.traces)
        figures |= {
            "identical": len(run.traces) - len(different),
            "divergences": different,
            "lossless": all(d["tolerated"] for d in different) if claimed else None,
        }
    if timed_plain is not None and figures["passes"]:
        split = {phase: run.total(phase) for phase in PHASES}
        plain_rate = rate(timed_plain)
        # tokens a second against tokens a second: seconds against seconds wherever both emit the same texts
        speedup = lambda seconds: figures["tokens"] / seconds / plain_rate  # noqa: E731
        figures |= {
            "tokens_per_second": rate(run),
            "speedup": speedup(split["total"]),
            "speedup_interval": quotient_interval(tokens_and_seconds(run), tokens_and_seconds(timed_plain), seed),
            "accounted_speedup": speedup(split["draft"] + split["verify"] + split["overhead"]),
            "ideal_speedup": speedup(split["draft"] + split["verify"]),
            "ms_per_pass": {phase: 1e3 * seconds / run.cycles for phase, seconds in split.items()},
            **robust_figures(
                tokens_and_seconds(run)[0],
                run.seconds,
                (tokens_and_seconds(timed_plain)[0], timed_plain.seconds),
                seed,
            ),
        }
        if all("busy" in seconds for seconds in (*run.seconds, *timed_plain.seconds)):
            mine, plains = (tokens_and_seconds(one, busy=True) for one in (run, timed_plain))
            figures |= {
                "busy_tokens_per_second": sum(mine[0]) / sum(mine[1]),
                "busy_speedup": sum(mine[0]) / sum(mine[1]) / (sum(plains[0]) / sum(plains[1])),
                "busy_speedup_interval": quotient_interval(mine, plains, seed),
            }
    return figures


def rate(run: Run) -> float:
    """Tokens a second."""
    return sum(tokens_and_seconds(run)[0]) / run.total("total")


def tokens_and_seconds(run: Run, busy: bool = False) -> tuple[list[int], list[float]]:
    """Per unit, for the bootstrap; busy: the decoding thread's own seconds."""
    return (
        [sum(sum(run.traces[row].emitted) for row in unit) for unit in run.units],
        [(seconds["busy"] if busy else seconds)["total"] for seconds in run.seconds],
    )
