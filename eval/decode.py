"""The decode loop: one for every drafter, plain decoding included. Token ids only."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch

from draftsmith.eval.sampling import Noise, Sampling, most_probable, process, seen_tokens
from draftsmith.eval.verification.verifier import MATCH, Accepted, Verifier
from draftsmith.models.drafters import Drafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features
from draftsmith.models.noise import Draw
from draftsmith.models.targets import Prefill, TextSession, TextTarget
from draftsmith.models.transfer import on_host
from draftsmith.models.tree import DraftTree

# Called with a request's id and what one pass emitted (cut as in `Trace`), the token from the prefill first.
Emit = Callable[[int, list[int]], None]

REFILLS = 8  # a running batch takes new requests once an eighth of its places are free: one prefill for several


class Pass(NamedTuple):
    """One pass over a batch. rows: of the batch that were still decoded; nodes and levels of the largest draft tree;
    length: committed tokens of the longest row; then seconds.
    """

    rows: int
    nodes: int
    levels: int
    length: int
    draft: float
    verify: float
    overhead: float


@cache
def fine_thread_time() -> bool:
    """Whether the system counts a thread's own seconds finely enough to time a pass: some sandboxes do in 10 ms."""
    steps, before = [], time.thread_time()
    while len(steps) < 5:
        now = time.thread_time()
        if now > before:
            steps.append(now - before)
            before = now
    return min(steps) < 1e-4


def undisturbed(device: torch.device) -> bool:
    """Whether the decoding thread's own seconds are what a pass takes without others: on a CPU, where no other thread
    takes part. (A thread that waits for others runs for less than the pass takes.)
    """
    return device.type == "cpu" and torch.get_num_threads() == 1 and fine_thread_time()


class Clock:
    """Seconds by phase, devices synchronised at every border. `total` covers the loop and the drafter's own prefill,
    not the target's; `overhead` is choosing tokens, accepting, committing and bookkeeping. What the three phases leave
    of the total is the loop's own.

    On a CPU `busy` has the seconds that the decoding thread itself ran: on a quiet machine the same, on a loaded one
    without the waiting. `begin` (the drafter's own prefill) and `passes` are in these seconds where they are
    `undisturbed`, since a pass that another program interrupted then costs what it always does; otherwise in the
    wall's.
    """

    def __init__(self, device: torch.device):
        self.seconds = {"draft": 0.0, "verify": 0.0, "overhead": 0.0, "total": 0.0}
        self.busy = dict(self.seconds) if device.type == "cpu" else None
        self.sync = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
        self.begin, self.passes, self.lapped = 0.0, [], [0.0, 0.0, 0.0]
        self.own = self.busy if undisturbed(device) else self.seconds

    def lap(self) -> list[float]:
        """Seconds of draft, verify and overhead since the last lap."""
        before, self.lapped = self.lapped, [self.own[phase] for phase in ("draft", "verify", "overhead")]
        return [round(now - then, 7) for now, then in zip(self.lapped, before)]

    @contextmanager
    def phase(self, name: str):
        self.sync()
        start, ran = time.perf_counter(), time.thread_time()
        yield
        self.sync()
        ran = (
            time.thread_time() - ran
        )  # inside the wall's reading: a loaded machine likes to switch threads at this call
        self.seconds[name] += time.perf_counter() - start
        if self.busy is not None:
            self.busy[name] += ran


@dataclass
class Trace:
    """One request. tokens: everything emitted, the token from the prefill first, cut at EOS and at the limit.

    accepted: drafted tokens accepted in each verify pass, before any cut; drafted: drafted levels of its tree.
    emitted: tokens that count for each pass (after the cut). margins: how far each emitted token was from being another
    one (top-2 gap of the scores); filled only on request, since it costs time. The token from the prefill has none.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


@torch.inference_mode()
def generate(
    target: TextTarget,
    drafter: Drafter,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos: set[int] = frozenset(),
    requests: list[int] | None = None,
    clock: Clock | None = None,
    margins: bool = False,
    verifier: Verifier = MATCH,
    emit: Emit | None = None,
) -> list[Trace]:
    """Decodes a batch of ragged prompts (token ids, none empty); `requests` are the ids that key their noise. `emit` is
    called as soon as a pass has emitted; its time is the loop's own (in no phase).

    At temperature 0 every verifier is greedy matching. Margins are those of sample-and-match.
    Raises UserError for an empty prompt, one that leaves no room in the target's context, and trees that the verifier
    refuses.
    """
    session = opened(target, drafter, prompts, max_new_tokens)
    return decode(
        session,
        session.prefill(prompts),
        drafter,
        prompts,
        sampling,
        max_new_tokens,
        eos,
        requests,
        clock,
        margins,
        verifier,
        emit,
    )


def opened(target: TextTarget, drafter: Drafter, prompts: list[list[int]], max_new_tokens: int) -> TextSession:
    """A session with room for these prompts, their new tokens and the drafter's trees. Raises UserError as `generate`
    does for prompts.
    """
    check_prompts(target, prompts, max_new_tokens, drafter.size)
    room = max(map(len, prompts)) + max_new_tokens + 2 * drafter.size
    return target.open(drafter.feature_spec, len(prompts), room)


@torch.inference_mode()
def decode(
    session: TextSession,
    prefill: Prefill,
    drafter: Drafter,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos: set[int] = frozenset(),
    requests: list[int] | None = None,
    clock: Clock | None = None,
    margins: bool = False,
    verifier: Verifier = MATCH,
    emit: Emit | None = None,
) -> list[Trace]:
    """`generate` behind a session's own prefill of the prompts, which the caller has checked."""
    requests, clock = list(requests or range(len(prompts))), clock or Clock(session.target.device)
    waiting = [Begun.of(prefill, requests, prompts, sampling)]
    more = lambda going: waiting.pop() if waiting else None  # noqa: E731
    with clock.phase("total"):
        traces = dict(passes(session, drafter, more, sampling, max_new_tokens, eos, clock, margins, verifier, emit))
    return [traces[request] for request in requests]


@torch.inference_mode()
def stream(
    target: TextTarget,
    drafter: Drafter,
    take: Callable[[int], list[tuple[int, list[int]]]],
    batch: int,
    sampling: Sampling,
    max_new_tokens: int,
    eos: set[int] = frozenset(),
) -> Iterator[tuple[int, Trace]]:
    """Continuous batching: decodes any number of requests, at most `batch` at a time. Those that end give their places
    to others. Yields (request, trace) as they end, each trace being the one that `generate` gives.

    take(count) gives up to `count` more requests with their prompts, and none when none are left. Prompts that begin
    together are padded to the longest of them, so that the longest should come first and each near its like; then the
    cache never grows either. Raises UserError as `generate` does.
    """
    group, left = max(1, batch // REFILLS), True
    first = take(group)
    if not first:
        return
    longest = max(len(prompt) for _, prompt in first)
    session = target.open(drafter.feature_spec, batch, longest + max_new_tokens + 2 * drafter.size)

    def more(going: int) -> Begun | None:
        nonlocal first, left
        if not left or batch - going < group:
            return None
        taken, first = first or take(group), []
        if not taken:
            left = False
            return None
        if going == 0:
            session.select(torch.empty(0, dtype=torch.int64, device=target.device))
        requests, prompts = (list(part) for part in zip(*taken))
        check_prompts(target, prompts, max_new_tokens, drafter.size)
        return Begun.of(session.admit(prompts), requests, prompts, sampling)

    yield from passes(session, drafter, more, sampling, max_new_tokens, eos, Clock(target.device), False, MATCH)


@dataclass(frozen=True)
class Begun:
    """Requests behind their prefill. features: of their prompts; root [B]: their first emitted tokens."""

    requests: list[int]
    prompts: list[list[int]]
    features: Features
    root: torch.Tensor

    @classmethod
    def of(cls, prefill: Prefill, requests: list[int], prompts: list[list[int]], sampling: Sampling) -> "Begun":
        last = DraftTree.root_only(torch.tensor([p[-1] for p in prompts], device=prefill.logits.device))
        noise = Noise(sampling, requests, [len(p) - 1 for p in prompts])
        logits = processed(prefill.logits[:, None], last, sampling, requests, dict(zip(requests, prompts)))
        return cls(requests, prompts, prefill.features, noise.chosen(logits, last)[:, 0])


def passes(
    session: TextSession,
    drafter: Drafter,
    more: Callable[[int], Begun | None],
    sampling: Sampling,
    max_new_tokens: int,
    eos: set[int],
    clock: Clock,
    margins: bool,
    verifier: Verifier,
    emit: Emit | None = None,
) -> Iterator[tuple[int, Trace]]:
    """The loop: draft, verify, accept, commit, until nothing is left. more(requests that go on) gives those that begin
    beside them, already in the session, or None. Yields (request, trace) as they end.
    """
    device, verifier = session.target.device, MATCH if sampling.temperature == 0 else verifier
    active, traces, histories = [], {}, {}
    while True:
        going = [
            i
            for i, r in enumerate(active)
            if traces[r].tokens[-1] not in eos and len(traces[r].tokens) < max_new_tokens
        ]
        if len(going) < len(active):
            rows = fill_gaps(going)
            if rows:
                session.select(torch.tensor(rows, device=device))
                drafter.select(torch.tensor(rows, device=device))
            active, before = [active[i] for i in rows], active
            for request in set(before) - set(active):
                del histories[request]
                yield request, traces.pop(request)
        if begun := more(len(active)):
            with clock.phase("draft"):
                (drafter.join if active else drafter.begin)(begun.features, begun.root)
            clock.begin += sum(clock.lap())
            active = active + begun.requests
            for request, prompt, token in zip(begun.requests, begun.prompts, begun.root.tolist()):
                traces[request], histories[request] = Trace([token]), [*prompt, token]
                if emit:
                    emit(request, [token])
            continue
        if not active:
            return
        roots = session.known_lengths
        with clock.phase("draft"):
            left = [max_new_tokens - len(traces[request].tokens) for request in active]
            tree = drafter.propose(Draw(sampling.temperature, sampling.seed, active, roots, left, frozenset(eos)))
        with clock.phase("verify"):
            verified = session.verify(tree)
        with clock.phase("overhead"):
            logits, noise = (
                processed(verified.logits, tree, sampling, active, histories),
                Noise(sampling, active, roots),
            )
            accepted = verifier(tree, logits, noise)
            told = Told.of(tree, accepted)
            accepted = accepted.trimmed(max(told.counts))
            session.commit(accepted.path, accepted.counts, (told.path, told.counts))
            kept = record(traces, histories, active, tree, accepted, told, max_new_tokens, eos)
            features = observed(drafter.feature_spec, verified, tree, kept, logits)
        for request in active if emit else ():
            emit(request, traces[request].tokens[-traces[request].emitted[-1] :])
        if margins:
            note_margins(traces, active, noise.perturb(logits, tree), accepted)
        with clock.phase("draft"):
            drafter.observe(features, kept.next_token)
        levels = max(traces[request].drafted[-1] for request in active)
        clock.passes.append(Pass(len(active), tree.size, levels, max(roots), *clock.lap()))


def fill_gaps(going: list[int]) -> list[int]:
    """The rows that go on, ordered so that most stay in place: rows from the end take the places of finished ones."""
    tail = iter([i for i in going if i >= len(going)])
    return [i if i in going else next(tail) for i in range(len(going))]


def processed(logits, tree, sampling, active, histories):
    """[B, N, V] fp32: the logits of the target's distribution behind each node, after all that `sampling` asks for."""
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = seen_tokens([histories[r] for r in active], logits.size(-1), logits.device)
    return process(logits, sampling, seen, tree)


def observed(spec, verified, tree, accepted, logits):
    """The features of what was accepted, with the target's distributions (of processed logits) for a spec that asks."""
    features, asked = verified.features(tree, accepted.path, accepted.counts), spec.distribution
    if asked is None:
        return features
    if asked.rows == "committed":
        logits = logits[torch.arange(len(logits), device=logits.device)[:, None], accepted.path]
    return replace(features, distribution=most_probable(logits, asked.top))


@dataclass(frozen=True)
class Told:
    """What one pass accepted, as the host knows it after one transfer: path and tokens (of the path's nodes) of each
    row, counts, the next tokens, the depths of the trees.
    """

    path: list[list[int]]
    tokens: list[list[int]]
    counts: list[int]
    next_token: list[int]
    depths: list[int]

    @classmethod
    def of(cls, tree: DraftTree, accepted: Accepted) -> "Told":
        tokens = tree.tokens.gather(1, accepted.path)
        found = on_host(accepted.path, tokens, accepted.counts, accepted.next_token, tree.depths.amax(1))
        return cls(*(part.tolist() for part in found))


def record(traces, histories, active, tree, accepted, told, max_new_tokens, eos):
    """Appends what was emitted in this pass to the traces, cut at EOS and at the limit -> what of `accepted` is left
    by these cuts.
    """
    left = []
    for i, (request, count, token) in enumerate(zip(active, told.counts, told.next_token)):
        trace, emitted = traces[request], [*told.tokens[i][1:count], token]
        kept = cut(emitted, max_new_tokens - len(trace.tokens), eos)
        trace.tokens += kept
        histories[request] += kept
        trace.accepted.append(count - 1)
        trace.drafted.append(told.depths[i])
        trace.emitted.append(len(kept))
        left.append(len(kept))
    return accepted if left == told.counts else accepted.cut(tree, left)


def cut(tokens: list[int], room: int, eos: set[int]) -> list[int]:
    """At most `room` tokens, none behind the first of `eos`."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens[:room]) if token in eos), room)]


def note_margins(traces, active, logits, accepted):
    """Appends the top-2 gaps of the scores at the tokens emitted in this pass (after `record`)."""
    rows = torch.arange(len(active), device=logits.device)[:, None]
    top = logits[rows, accepted.path].topk(2).values
    for request, gaps in zip(active, (top[..., 0] - top[..., 1]).tolist()):
        traces[request].margins += gaps[: traces[request].emitted[-1]]


def check_prompts(target: TextTarget, prompts: list[list[int]], max_new_tokens: int, tree_size: int) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row}: found no tokens, expected at least one")
        room = target.context_length - max_new_tokens - tree_size
        if len(prompt) > room:
            raise UserError(
                f"prompt {row}: found {len(prompt)} tokens, expected at most {room} "
                f"(context {target.context_length}, {max_new_tokens} new tokens, tree of {tree_size})"
            )
