"""From records to rows: one at a time or by several processes of this machine, always in the order of the records, with
a bounded number of them in memory.
"""

import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer
from draftsmith.train.files import HUB
from draftsmith.train.pictures import Pictures
from draftsmith.train.records import encode_record

BEHIND = "rows are left out: their answers begin behind data.max_length {}"
TOO_SHORT = "rows are left out: the target wrote a single token of them"
ALONE = 1000  # records that one process encodes before others are started, which takes seconds
MEANWHILE = 100_000  # records that it encodes at most until the first of them has started
CHUNK = 64  # records that a process is given at a time
MOST = 8  # processes, where nobody says how many


@dataclass(frozen=True)
class Outcome:
    """What became of a record. rows: (token ids uint32, token mask bool, pictures) of each that can be learned from;
    notes: what is to be told; reason: why it cannot be used, None where it can; origin: (file, row) of one of several
    turns that `draftsmith regenerate` wrote, None of any other; temperature, law: as the record says.
    """

    rows: list[tuple[np.ndarray, np.ndarray, list]] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    reason: str | None = None
    origin: tuple | None = None
    temperature: float | None = None
    law: dict | None = None


@dataclass(frozen=True)
class Encoder:
    """What records are encoded with: `renderer` their template, `stops` and `vocab_size` of the target, `max_length`
    tokens of a row, `pictures` of a target that sees.
    """

    renderer: Renderer
    stops: set[int]
    vocab_size: int
    max_length: int
    pictures: Pictures | None = None

    def __call__(self, record, file: str) -> Outcome:
        try:
            rows, notes = self._encoded(record, file)
        except (UserError, RecursionError) as error:
            return Outcome(reason="nested too deeply" if isinstance(error, RecursionError) else str(error))
        kept, notes = [], Counter(notes)
        for ids, mask, sources in rows:
            if sum(mask[: self.max_length]) < 2:
                notes[BEHIND.format(self.max_length) if sum(mask) >= 2 else TOO_SHORT] += 1
                continue
            cut = slice(self.max_length)
            kept.append((np.array(ids[cut], dtype=np.uint32), np.array(mask[cut], dtype=bool), sources))
        origin = (file, record.get("row")) if "turn" in record else None
        return Outcome(kept, notes, None, origin, temperature_of(record), law_of(record))

    def _encoded(self, record, file: str) -> tuple[list, Counter]:
        if self.pictures is not None:
            base = Path("." if file.startswith(HUB) else file).parent
            return self.pictures.encode(record, base, self.renderer, self.stops, self.vocab_size, self.max_length)
        if isinstance(record, dict) and (record.get("image") or record.get("images")):
            raise UserError("found a picture, expected text alone: this target does not see")
        found = encode_record(record, self.renderer, self.stops, self.vocab_size)
        return [(*row, []) for row in found.rows], found.notes


def encoded(
    records: Iterable[tuple[int, object]], file: str, encoder: Encoder, processes: int
) -> Iterator[tuple[int, Outcome]]:
    """(row number, outcome) of each record of a file in order. Raises UserError where a process dies."""
    records = iter(records)
    if processes > 1:
        for number, record in islice(records, ALONE):
            yield number, encoder(record, file)
        first = next(records, None)
        if first is None:
            return
        yield from _spread(chain([first], records), file, encoder, processes)
        return
    for number, record in records:
        yield number, encoder(record, file)


def _spread(records: Iterator, file: str, encoder: Encoder, processes: int) -> Iterator[tuple[int, Outcome]]:
    """Spawned, not forked: this process may have threads, and hold an accelerator. It encodes until they have
    started.

    The encoder travels by a file. What a spawned process is given at its start goes through a pipe, in which this
    process would be stuck for ever if the other one died before it had read it all (as it does in a script without
    `if __name__ == "__main__"`).
    """
    with TemporaryDirectory(prefix="draftsmith-") as folder:
        place = Path(folder) / "encoder"
        place.write_bytes(pickle.dumps((encoder, file)))
        yield from _by(processes, place, records, file, encoder)


def _by(processes: int, place: Path, records: Iterator, file: str, encoder: Encoder) -> Iterator[tuple[int, Outcome]]:
    workers, waiting = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (place,)), deque()
    try:
        starting = [workers.submit(_started) for _ in range(processes)]
        for number, record in islice(records, MEANWHILE):
            yield number, encoder(record, file)
            if any(each.done() for each in starting):
                break
        chunk = list(islice(records, CHUNK))
        if not chunk:
            return
        while chunk or waiting:
            while chunk and len(waiting) < 2 * processes:
                numbers, values = zip(*chunk)
                waiting.append((numbers, workers.submit(_encode, values)))
                chunk = list(islice(records, CHUNK))
            numbers, future = waiting.popleft()
            yield from zip(numbers, future.result())
        workers.shutdown()
    except BrokenProcessPool:
        raise UserError(
            f"{file}: a process that prepared rows died (of memory? in a script without `if __name__ == '__main__'`?); "
            f"data.processes=1 prepares them in this one"
        ) from None
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


_work: tuple[Encoder, str] | None = None  # of a spawned process


def _begin(place: Path) -> None:
    global _work
    try:
        _work = pickle.loads(place.read_bytes())
    except FileNotFoundError:
        os._exit(0)  # all was done before this process had started
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _started() -> None:
    """Done as soon as a process can encode."""


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _encode(values: tuple) -> list[Outcome]:
    encoder, file = _work
    return [encoder(value, file) for value in values]


def usual_processes() -> int:
    """As many as this process has cores, up to `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores)


def temperature_of(record: dict) -> float | None:
    """At which temperature the target gave this answer, where the record says so (`draftsmith regenerate` does)."""
    found = record.get("temperature")
    return float(found) if type(found) in (int, float) and 0 <= found < 1e6 else None


def law_of(record: dict) -> dict | None:
    """By which law beside the temperature the target gave this answer, where the record says so."""
    found = record.get("sampling")
    return found if isinstance(found, dict) and all(isinstance(v, (int, float)) for v in found.values()) else None
