"""Results of one file (`verify`, `sweep`, `tune-tree`): each says what it was made with, one process at a time makes
it, and a finished one is shown, never overwritten.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from draftsmith.eval.measurement.journal import check_finished
from draftsmith.launch.methods import check_writable, write_json
from draftsmith.models.files import alone
from draftsmith.models.formats.layout import read_json

SETTINGS = "settings"  # the key of such a file under which they stand


def made_once(place: Path, settings: dict, make: Callable[[], dict], report=print) -> dict:
    """The document at `place`: the one that is there already, where it is that of these settings, else `make()`, which
    is written. Raises UserError where another's lies there, or another process writes it.
    """
    if (document := finished(place, settings, report)) is not None:
        return document
    check_writable(place.parent)
    with alone(place.parent, place.name, place):
        document = make() | {SETTINGS: settings}
        write_json(place, document)
    return document


def finished(place: Path, settings: dict, report) -> dict | None:
    if not place.is_file():
        return None
    document = read_json(place)
    found = document.get(SETTINGS)
    check_finished(place, found if isinstance(found, dict) else {}, settings)
    report(f"{place} is there already, of the same settings; remove it to make it again")
    return document


def clock_of(place: Path) -> str | None:
    """The clock of the templates that a finished result was made with."""
    settings = read_json(place).get(SETTINGS) if place.is_file() else None
    return settings.get("clock") if isinstance(settings, dict) else None


def tree_names(trees: list) -> list[str]:
    """Trees by name; one that is read from a file by its content."""
    named = lambda tree: Path(str(tree)).suffix == ".json" and Path(str(tree)).is_file()  # noqa: E731
    return [
        f"{hashlib.sha256(Path(str(tree)).read_bytes()).hexdigest()[:16]} of {tree}" if named(tree) else str(tree)
        for tree in trees
    ]
