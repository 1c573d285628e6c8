"""Drafters on disk, as serving engines read them. Other conventions for layer taps exist only here."""

from draftsmith.models.formats.eagle import load_drafter, save_drafter
from draftsmith.models.formats.speculators import load_speculators, save_speculators

__all__ = ["load_drafter", "load_speculators", "save_drafter", "save_speculators"]
