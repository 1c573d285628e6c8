"""Measuring drafters against plain decoding on the same prompts, interleaved, and what each number means.

tau = tokens emitted / verify passes, bonus token included (plain = 1), micro-averaged; the token sampled from the prefill counts in
neither. Speedup = plain seconds / speculative seconds of the loops. Accounted speedup = tau * t_plain / (t_verify + t_draft + t_overhead) per pass;
ideal speedup leaves the overhead out.
"""

from dataclasses import dataclass, field

from draftsmith.eval.decode import Clock, Trace, generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafter import Drafter, NoDrafter
from draftsmith.models.targets import TextTarget

NEAR_TIE = 1e-4  # a divergence is tolerated only where the top-2 gap of the plain scores (logits and keyed noise) is below this


@dataclass
class Run:
    """Traces of one method, one per prompt, and where it was timed the seconds of each: {"draft", "verify", "overhead", "total"}."""

    traces: list[Trace] = field(default_factory=list)
    seconds: list[dict] = field(default_factory=list)

    def total(self, phase: str) -> float:
        """Seconds over all prompts."""
        return sum(seconds[phase] for seconds in self.seconds)


def tau(traces: list[Trace]) -> float:
    """Micro-averaged acceptance length."""
    return sum(sum(t.emitted) for t in traces) / max(1, sum(len(t.emitted) for t in traces))


def macro_tau(traces: list[Trace]) -> float:
    """Mean over prompts of each prompt's acceptance length."""
    per_prompt = [sum(t.emitted) / len(t.emitted) for t in traces if t.emitted]
    return sum(per_prompt) / max(1, len(per_prompt))


def acceptance_by_depth(traces: list[Trace]) -> list[float]:
    """Conditional acceptance: of the passes that drafted level d and accepted level d - 1, the share that accepted level d."""
    rates = []
    for depth in range(1, max((max(t.drafted, default=0) for t in traces), default=0) + 1):
        reached = [a for t in traces for a, d in zip(t.accepted, t.drafted) if d >= depth and a >= depth - 1]
        if not reached:
            break
        rates.append(sum(a >= depth for a in reached) / len(reached))
    return rates


def divergences(plain: list[Trace], other: list[Trace]) -> list[dict]:
    """Prompts whose texts differ: first differing token and the margin of the plain choice there (NaN where it was not recorded)."""
    found = []
    for row, (a, b) in enumerate(zip(plain, other)):
        if a.tokens != b.tokens:
            at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), min(len(a.tokens), len(b.tokens)))
            margin = a.margins[at - 1] if 0 < at <= len(a.margins) else float("nan")
            found.append({"prompt": row, "token": at, "margin": margin, "tolerated": margin < NEAR_TIE})
    return found


def decode_batches(target: TextTarget, drafter: Drafter, prompts: list[list[int]], sampling: Sampling, max_new_tokens: int, stops: set[int],
                   batch: int, progress=lambda done: None, margins: bool = False) -> list[Trace]:
    """Traces of all prompts in batches of ragged rows of similar length, without timing. `progress(done)` is called after each batch."""
    order, traces = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for start in range(0, len(order), batch):
        group = order[start:start + batch]
        batched = generate(target, drafter, [prompts[i] for i in group], sampling, max_new_tokens, stops, group, margins=margins)
        traces |= dict(zip(group, batched))
        progress(len(traces))
    return [traces[i] for i in range(len(prompts))]


def interleaved(target: TextTarget, drafters: dict[str, Drafter], prompts: list[list[int]], sampling: Sampling, max_new_tokens: int,
                stops: set[int], progress=lambda done: None) -> dict[str, Run]:
    """Plain decoding ("plain") and every drafter in turn on each prompt, one prompt at a time, after a warm-up on the first."""
    methods = {"plain": NoDrafter(), **drafters}
    runs = {name: Run() for name in methods}
    for drafter in methods.values():
        generate(target, drafter, prompts[:1], sampling, min(16, max_new_tokens), stops, [0])
    for row, prompt in enumerate(prompts):
        for name, drafter in methods.items():
            clock = Clock(target.device)
            runs[name].traces += generate(target, drafter, [prompt], sampling, max_new_tokens, stops, [row], clock)
            runs[name].seconds.append(clock.seconds)
        progress(row + 1)
    return runs


def summary(run: Run, plain: Run, timed_plain: Run | None = None) -> dict:
    """All figures of one method against plain decoding (with margins); timing keys only beside a timed plain run."""
    passes = sum(len(t.emitted) for t in run.traces)
    different = divergences(plain.traces, run.traces)
    figures = {
        "tau": tau(run.traces), "macro_tau": macro_tau(run.traces),
        "accepted_per_pass": tau(run.traces) - 1,
        "acceptance_by_depth": acceptance_by_depth(run.traces), "prompts": len(run.traces), "tokens": sum(sum(t.emitted) for t in run.traces),
        "passes": passes, "identical": len(run.traces) - len(different), "divergences": different,
        "lossless": all(d["tolerated"] for d in different),
    }
    if timed_plain is not None and passes:
        split = {phase: run.total(phase) for phase in ("draft", "verify", "overhead", "total")}
        accounted = split["draft"] + split["verify"] + split["overhead"]
        plain_pass = timed_plain.total("total") / max(1, sum(len(t.emitted) for t in timed_plain.traces))
        figures |= {
            "tokens_per_second": figures["tokens"] / split["total"], "speedup": timed_plain.total("total") / split["total"],
            "accounted_speedup": figures["tau"] * plain_pass / (accounted / passes),
            "ideal_speedup": figures["tau"] * plain_pass / ((split["verify"] + split["draft"]) / passes),
            "ms_per_pass": {phase: 1e3 * seconds / passes for phase, seconds in split.items()},
        }
    return figures
