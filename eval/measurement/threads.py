"""On a CPU: the number of threads that a target decodes with fastest. Small models are slower on two threads than on
one, and beside another program far slower, since every operation waits for the last of its threads.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from draftsmith.eval.decode import Clock, generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.targets import TextTarget

ROUNDS, PASSES, PROMPT = 12, 4, 32  # pieces at each number of threads, passes of a piece, tokens of its prompt
LIMIT = 10.0  # seconds after which no further round starts
WORTH = 0.95  # more threads must take at most this share of one thread's time


def trial(target: TextTarget, numbers: list[int]) -> dict[int, float]:
    """{number of threads: milliseconds of a plain pass}: the best of some short pieces, in turn. Leaves the last number
    set.
    """
    prompt = [[target.vocab_size // 2] * PROMPT]  # an ordinary token: markers stand at the ends of vocabularies
    best, started = {}, time.perf_counter()
    for turn in range(1 + ROUNDS):
        for number in numbers:
            torch.set_num_threads(number)
            clock = Clock(target.device)
            generate(target, NoDrafter(), prompt, Sampling(), 1 + PASSES, clock=clock)
            if turn:  # the first piece is the warm-up
                best[number] = min(best.get(number, float("inf")), 1e3 * clock.seconds["total"] / PASSES)
        if best and time.perf_counter() - started > LIMIT:
            break
    return best


@contextmanager
def chosen_threads(
    target: TextTarget, asked: int | None = None, before: int | None = None, report: Callable = print
) -> Iterator[dict[int, float]]:
    """Decodes with `asked` threads; without it with `before`, those of the run that goes on; without it with what
    OMP_NUM_THREADS says; without it with one or all, by a `trial`, whose figures are given (otherwise none). The number
    that was set is set again at the end.
    """
    found, usual = {}, torch.get_num_threads()
    number = asked or before or usual
    try:
        if asked is before is None and target.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            if usual > 1:
                found = trial(target, [1, usual])
                number = usual if found[usual] < WORTH * found[1] else 1
                shown = ", ".join(f"{ms:.1f} ms on {n}" for n, ms in found.items())
                report(f"threads: {number} (a plain pass takes {shown})")
        torch.set_num_threads(number)
        yield found
    finally:
        torch.set_num_threads(usual)
