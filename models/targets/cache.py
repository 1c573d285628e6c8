"""Where what was fetched or converted is kept: `$DRAFTSMITH_CACHE`, by default `~/.cache/draftsmith`. What has its name
there is complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from draftsmith.models.files import write_whole

BLOCK = 2**22  # bytes


def cache_root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DRAFTSMITH_CACHE") or Path(home) / "draftsmith").expanduser()


@contextmanager
def made_once(place: Path) -> Iterator[Path | None]:
    """Yields a hidden directory beside `place` to be filled, which then becomes `place`; None where `place` is there.

    Of several processes one makes it and the others wait. An exception, or a process that dies, leaves no `place`; what
    it had written is removed by the next one.
    """
    if place.exists():
        yield None
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if place.exists():
            yield None
            return
        for left in place.parent.glob(f".{place.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            new.rename(place)


def content_hash(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def known_hash(file: Path) -> str:
    """`content_hash`, computed once for as long as size and time of change of the file stay."""
    file = file.resolve()
    state = file.stat()
    seen = {"file": str(file), "bytes": state.st_size, "changed": state.st_mtime_ns, "inode": state.st_ino}
    record = cache_root() / "hashes" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(record.read_text("utf-8"))
        if {key: known.get(key) for key in seen} == seen:
            return known["sha256"]
    except (OSError, ValueError, AttributeError, KeyError):
        pass
    digest = content_hash(file)
    with suppress(OSError):  # a cache that cannot be written costs time only
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(seen | {"sha256": digest}))
    return digest
