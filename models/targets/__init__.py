"""Targets: frozen models as drafters see them, behind sessions that own caches, masks and positions."""

from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.targets.text import Prefill, TextSession, TextTarget, Verified

__all__ = ["FeatureSpec", "Prefill", "TextSession", "TextTarget", "Verified", "locate"]


def locate(name: str | Path) -> str:
    """The directory or Hub id behind a name; `bundled:NAME` is a reference model that lies in the package."""
    text = str(name)
    if not text.startswith("bundled:"):
        return text
    import draftsmith.recipes

    place = Path(draftsmith.recipes.__file__).parent / text.removeprefix("bundled:")
    if not place.is_dir():
        known = sorted(f"{p.parent.name}/{p.name}" for p in place.parent.parent.glob("*/*") if (p / "config.json").is_file())
        raise UserError(f"{text}: no such bundled model; found {', '.join(known) or 'none'}")
    return str(place)
