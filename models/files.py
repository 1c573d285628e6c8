"""Our own files on disk: whole or not there, with the modes that the user's umask says, and written by one process at
a time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from draftsmith.models.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Replaces a file; what was there stays where this fails."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_text(text, "utf-8")
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def write_new(path: Path, text: str) -> Path:
    """Writes a file, whole. Raises UserError where there is one already of other content."""
    if path.exists() and path.read_bytes() != text.encode():
        raise UserError(f"{path}: exists, with other content; remove it or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def usual_modes(place: Path) -> None:
    """Gives a file, or all files below a folder, the mode of files that were just opened to be written: libraries that
    write a temporary file first (safetensors) leave them to their owner alone.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for file in (place, *place.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~umask)


@contextmanager
def alone(folder: Path, name: str, place: str | Path) -> Iterator[None]:
    """A block that one process at a time enters, on all machines that share the folder: a hidden file of that name is
    locked there. place: what is written, as the user named it. Raises UserError in any other process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{name}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{place}: another process writes there, expected one at a time; wait for it or choose another output"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()
