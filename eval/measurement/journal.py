"""What a long run has finished so far, so that a killed one goes on: JSONL, the first line names the settings."""

import json
from pathlib import Path

from draftsmith.models.errors import UserError


class Journal:
    """Entries {"key": KEY, ...} in the order they were added; every one is on disk before `add` returns."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.entries = path, {entry["key"]: entry for entry in read(path, settings)}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(json.dumps(settings) + "\n")

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> dict:
        return self.entries[key]

    def add(self, key: str, entry: dict) -> None:
        self.entries[key] = {"key": key, **entry}
        with self.path.open("a") as file:
            file.write(json.dumps(self.entries[key]) + "\n")


def settings_before(path: Path) -> dict:
    """Settings of the run that a journal is of; {} where there is none (or what `read` will refuse)."""
    line, complete, _ = path.read_text().partition("\n") if path.is_file() else ("", "", "")
    try:
        found = json.loads(line) if complete else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def read(path: Path, settings: dict) -> list[dict]:
    """Entries of an earlier run with these settings. A torn last line is cut off; a file of other settings is refused
    (UserError).
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    lines = text.splitlines()
    if not lines:
        return []
    if lines[0] != json.dumps(settings):
        raise UserError(
            f"{path}: found another run ({lines[0]}), expected {json.dumps(settings)}; remove it to start anew"
        )
    return [json.loads(line) for line in lines[1:]]


def check_finished(place: Path, found: dict, settings: dict) -> None:
    """Raises UserError where a finished output is not of these settings. found: those it was made with, {} where nobody
    knows.
    """
    settings = json.loads(json.dumps(settings))
    different = sorted(key for key in settings.keys() | found.keys() if found.get(key) != settings.get(key))
    if not found:
        raise UserError(f"{place}: exists, and nothing says what it was made with; remove it or choose another output")
    if different:
        shown = ", ".join(
            f"{key}: found {short(found.get(key))}, expected {short(settings.get(key))}" for key in different
        )
        raise UserError(f"{place}: is there already, of another run ({shown}); remove it or choose another output")


def short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
