"""Checkpoints of a run: complete or invisible, exact to resume at equal world size.

DeepSpeed writes its files under a hidden name; rank 0 adds `state.json` and the consolidated drafter, then one rename
makes the directory `step-N` appear. Data order, schedule and batches follow from the step alone, so the step is all
that a resumed run needs beside the engine.
"""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from draftsmith.models.errors import ProcessError, UserError
from draftsmith.train.distributed import barrier

UNWRITABLE = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap what the system says


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below a folder."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def resumes(output: Path) -> str:
    """What a run with this output goes on from, in words."""
    if (output / "drafter").exists():
        return f"the drafter is saved in {output / 'drafter'}: nothing is left to do"
    if last := latest(output / "checkpoints"):
        return f"{last} is complete: the same command resumes there"
    return "there is no checkpoint yet: the same command begins anew"


def unwritable(place: str | Path, error: Exception, output: Path) -> ProcessError:
    return ProcessError(f"{place}: cannot be written ({' '.join(str(error).split())[:200]}); {resumes(output)}")


class Terminated(Exception):
    """The run was asked to stop by a signal, SIGTERM or SIGINT, and saved its state."""

    def __init__(self, line: str, number: int):
        super().__init__(line)
        self.code = 128 + number  # exit code


def finished(folder: Path, settings: dict) -> bool:
    """Whether a run of these settings left its drafter. Raises UserError when it is another run's."""
    if not folder.exists():
        return False
    found = json.loads((folder / "draftsmith.json").read_text("utf-8")).get("settings", {})
    different = sorted(k for k in settings if found.get(k) != settings[k])
    if different:
        raise UserError(
            f"output: {folder} was trained by another recipe or on other rows ({', '.join(different)} differ); "
            "remove it or choose another output"
        )
    return True


class Checkpoints:
    """The checkpoints below `folder`. settings: what must agree between the run that wrote one and the run that resumes
    it.
    """

    def __init__(self, folder: Path, settings: dict, rank: int, world: int):
        self.folder, self.settings, self.rank, self.world = folder, settings, rank, world

    def read(self, place: Path) -> dict:
        """state.json of a checkpoint. Raises UserError when it belongs to another recipe."""
        found = json.loads((place / "state.json").read_text("utf-8"))
        different = sorted(k for k in self.settings if found["settings"].get(k) != self.settings[k])
        if different:
            raise UserError(
                f"{place}: found a checkpoint of another recipe or other rows ({', '.join(different)} differ); "
                "remove it or choose another output"
            )
        return found

    def save(self, engine, state: dict, write_drafter) -> None:
        """All ranks call this. `write_drafter(folder)` writes the consolidated drafter there (rank 0 only). The newest
        checkpoint alone is kept.

        Raises UserError when a file cannot be written; the checkpoint before is still there.
        """
        hidden, shown = self.folder / f".step-{state['step']}", self.folder / f"step-{state['step']}"
        try:
            if self.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob(".step-*"):
                    shutil.rmtree(stale)
            barrier(self.world)
            engine.save_checkpoint(str(self.folder), tag=hidden.name, save_latest=False)
            barrier(self.world)
            if self.rank == 0:
                write_drafter(hidden)
                (hidden / "state.json").write_text(
                    json.dumps({"settings": self.settings, "world_size": self.world, "state": state})
                )
                for file in hidden.rglob("*"):
                    _to_disk(file)
                older = [p for p in self.folder.glob("step-*") if p != shown]
                hidden.rename(shown)
                _to_disk(self.folder)
                for place in older:  # invisible first: a kill in the middle of a removal must not leave half of one
                    shutil.rmtree(place.rename(self.folder / f".{place.name}"))
        except UNWRITABLE as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise unwritable(shown, error, self.folder.parent) from None
        barrier(self.world)

    def load(self, engine, place: Path) -> None:
        """Restores weights and optimizer of all ranks."""
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=place.name)
        if loaded is None:
            raise UserError(f"{place}: the engine's files cannot be read; remove it to start anew")


def _to_disk(place: Path) -> None:
    """What was written survives a power cut."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def termination():
    """Yields a list of the signals that arrived, SIGTERM or SIGINT (Ctrl-C), which then no longer kill; a second SIGINT
    is a KeyboardInterrupt again.
    """
    received: list[int] = []

    def receive(number: int, frame) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: nothing is caught
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
