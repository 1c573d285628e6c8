"""Drafters on disk, as serving engines read them. Other conventions for layer taps exist only here."""

from draftsmith.models.formats.eagle import load_drafter, save_drafter

__all__ = ["load_drafter", "save_drafter"]
