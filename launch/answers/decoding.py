"""Answers by our own decode loop: in this process, or in several that ask this one for prompts.

Noise is keyed by seed, row and position, so that neither the order of the prompts, nor what shares a batch with them,
nor the number of processes, nor a drafter changes a text (in fp32; in lower precision near-ties may fall otherwise).
"""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait

import torch

from draftsmith.eval.decode import stream
from draftsmith.eval.lossless import dtype_of
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import Drafter, HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, load_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.prepacked import use_prepacked
from draftsmith.models.targets import TextTarget

# take(number of the temperature, count) -> up to `count` more (row, prompt), none when none are left
Take = Callable[[int, int], list[tuple[int, list[int]]]]


@dataclass(frozen=True)
class Work:
    """All that a process must know but the prompts. dtype: fp32, bf16, fp16, or None for the default of
    `TextTarget.load`; drafter: a directory, Hub id or bundled:NAME, or None.
    """

    target: str
    stops: frozenset[int]
    temperatures: tuple[float, ...]
    max_new_tokens: int
    seed: int
    batch: int
    dtype: str | None = None
    drafter: str | None = None
    tree: str = ""


def decoded(work: Work, take: Take) -> Iterator[tuple[int, list[int]]]:
    """(row, tokens) of every prompt that `take` gives, as they end."""
    yield from repeatedly(work)(take)


def repeatedly(work: Work) -> Callable[[Take], Iterator[tuple[int, list[int]]]]:
    """`decoded` of one taker after another, by a target that is loaded once."""
    loaded = []

    def run(take: Take) -> Iterator[tuple[int, list[int]]]:
        if not loaded:
            target = TextTarget.load(work.target, dtype_of(work.dtype) if work.dtype else None)
            loaded.append((target, open_drafter(work, target)))
        yield from decoded_by(*loaded[0], work, take)

    return run


def decoded_by(target: TextTarget, drafter: Drafter, work: Work, take: Take) -> Iterator[tuple[int, list[int]]]:
    """`decoded` where both are loaded already."""
    for number, temperature in enumerate(work.temperatures):
        traces = stream(
            target,
            drafter,
            partial(take, number),
            work.batch,
            Sampling(temperature, seed=work.seed),
            work.max_new_tokens,
            set(work.stops),
        )
        for row, trace in traces:
            yield row, trace.tokens


def open_drafter(work: Work, target: TextTarget) -> Drafter:
    if work.drafter is None:
        return NoDrafter()
    head = load_drafter(fetch(work.drafter), target.shared, target.layers)
    use_prepacked(head)
    return HeadDrafter(head, parse_tree(work.tree))


def spread(work: Work, take: Take, processes: int) -> Iterator[tuple[int, list[int]]]:
    """`decoded` by several processes, each with its share of the threads, on a GPU of its own where there are several.

    Only this process knows the prompts and writes: one that dies takes nothing with it but what it was working on, and
    when this one dies the others end at their next word to it. Raises UserError when one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    threads, workers = max(1, torch.get_num_threads() // processes), {}
    try:
        for number in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, number, threads), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        going = dict(workers)
        while going:
            for connection in wait(list(going)):
                try:
                    said, *rest = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    going[connection].join()
                    raise UserError(_lost(going[connection].exitcode)) from None
                if said == "take":
                    connection.send_bytes(pickle.dumps(take(*rest)))
                elif said == "answer":
                    yield tuple(rest)
                elif said == "error":
                    raise UserError(*rest)
                else:
                    del going[connection]
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
            process.join()


def _lost(code: int | None) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    return f"regenerate: one of its processes {how}; what it has written is kept, the same command goes on"


def _serve(connection: Connection, work: Work, number: int, threads: int) -> None:
    """A process of `spread`. Messages are pickled here: what torch registers with multiprocessing would send tensors of
    pictures through shared files.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; the first one ends the others
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    say = lambda *words: connection.send_bytes(pickle.dumps(words))  # noqa: E731

    def take(temperature: int, count: int):
        say("take", temperature, count)
        return pickle.loads(connection.recv_bytes())

    try:
        for row, tokens in decoded(work, take):
            say("answer", row, tokens)
        say("end")
    except UserError as error:
        say("error", str(error))
    except (EOFError, ConnectionError):
        pass  # nobody is there any more
