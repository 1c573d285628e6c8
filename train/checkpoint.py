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


class Checkpoints:
    """The checkpoints below `folder`. settings: what must agree between the run that wrote one and the run that resumes
    it.
    """

    def __init__(self, folder: Path, settings: dict, rank: int, world: int):
        self.folder, self.settings, self.rank, self.world = folder, settings, rank, world

    def latest(self) -> Path | None:
        found = [p for p in self.folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
        return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)

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
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the system says
            shutil.rmtree(hidden, ignore_errors=True)
            last = self.latest()
            raise ProcessError(
                f"{shown}: cannot be written ({' '.join(str(error).split())[:200]}); "
                + (
                    f"{last} is complete: the same command resumes there"
                    if last
                    else "there is no checkpoint before it"
                )
            ) from None
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
    """Yields a function that tells whether SIGTERM arrived; the signal then no longer kills."""
    received = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread: nothing is caught
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
