"""Drafters: whatever proposes trees. `Drafter` is the contract; each file holds one of them."""

from draftsmith.models.drafters.drafter import Drafter, Rewindable
from draftsmith.models.drafters.head import HeadDrafter, drafting
from draftsmith.models.drafters.plain import NoDrafter

__all__ = ["Drafter", "HeadDrafter", "NoDrafter", "Rewindable", "drafting"]
