"""One process of a launched job, watched: a small parent waits for the process that trains and records how it ended,
whatever ended it.

`python -m draftsmith.launch.rank FOLDER RECIPE [section.key=value ...]` is what `draftsmith launch` lets the DeepSpeed
launcher start. The record, FOLDER/rank-K.json, is there from the start of process K; a good end removes it. Nothing
here imports torch before the fork.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

LONGEST = 400  # characters of a reason
STOPPED = (
    130,
    143,
)  # exit codes of a run that was asked to stop; with a reason it saved its state, else a signal killed


@dataclass(frozen=True)
class Record:
    """Process `rank` of a job: pid (of the process that trains) on `host`, in the session of its DeepSpeed launcher;
    and how it ended: its exit code (128 + the signal that killed it), when (seconds since the epoch), and what it said
    last.
    """

    rank: int
    host: str
    session: int
    pid: int
    started: float
    code: int | None = None
    ended: float | None = None
    reason: str = ""

    @property
    def saved(self) -> bool:
        return self.code in STOPPED and bool(self.reason)

    @property
    def how(self) -> str:
        """In words, how it ended."""
        if self.code is None:
            return "ended without a word"
        if self.code > 128 and not self.reason:
            name = (
                signal.Signals(self.code - 128).name
                if self.code - 128 in iter(signal.Signals)
                else f"signal {self.code - 128}"
            )
            return f"was killed by {name}" + (" (often: no memory left)" if name == "SIGKILL" else "")
        return f"ended with exit code {self.code}" + (f": {self.reason}" if self.reason else "")

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        hidden = folder / f".rank-{self.rank}"
        hidden.write_text(json.dumps(asdict(self)), "utf-8")
        hidden.replace(folder / f"rank-{self.rank}.json")


def records(folder: Path) -> list[Record]:
    """Those that lie in the folder, by rank."""
    found = []
    for file in folder.glob("rank-*.json"):
        try:
            found.append(Record(**json.loads(file.read_text("utf-8"))))
        except FileNotFoundError:  # a good end just now
            continue
    return sorted(found, key=lambda record: record.rank)


def watch(folder: Path, rank: int, work: Callable[[Callable[[str], None]], int]) -> int:
    """Runs `work(tell)` in a child and returns its exit code, 128 + signal if one killed it. tell: keeps a reason for
    the record.

    SIGTERM and SIGINT are the child's to handle: the parent outlives it.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _end_with(parent)
        sys.exit(_told(work, partial(_write, writer)))
    record = Record(rank, socket.gethostname(), os.getsid(0), pid, time.time())
    record.write(folder)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = code if code >= 0 else 128 - code
    if code:
        with contextlib.suppress(OSError):  # a full disk, say: then the record stays without an end
            replace(record, code=code, ended=time.time(), reason=_read(reader)).write(folder)
    else:
        (folder / f"rank-{rank}.json").unlink(missing_ok=True)
    return code


def _told(work: Callable[[Callable[[str], None]], int], tell: Callable[[str], None]) -> int:
    try:
        return work(tell)
    except BaseException as error:
        tell(f"{type(error).__name__}: {error}")
        raise


def _end_with(parent: int) -> None:
    """Where the system can (Linux), this process is killed when its parent is: it must not hold a GPU for a job that is
    gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _write(writer: int, reason: str) -> None:
    os.write(writer, " ".join(reason.split())[:LONGEST].encode())


def _read(reader: int) -> str:
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 4 * LONGEST).decode(errors="replace")
    except BlockingIOError:  # nothing was told
        return ""


def train(arguments: list[str], tell: Callable[[str], None]) -> int:
    from draftsmith.launch.training import main

    return main(arguments, tell)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(watch(Path(words[0]), int(os.environ["RANK"]), lambda tell: train(words[1:], tell)))
