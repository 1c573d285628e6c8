"""Decoding with a target that has recurrent layers."""

import torch

from draftsmith.models.targets.recurrent.cache import RecurrentCache
from draftsmith.models.targets.recurrent.rows import Branches, Chain
from draftsmith.models.targets.session import Prefill, TextSession


class RecurrentSession(TextSession):
    """As `TextSession`. A row that was dropped comes back only with all of its prompt, whose states are remembered."""

    def _new_cache(self, batch: int, capacity: int) -> RecurrentCache:
        target, layout = self.target, self.target.layout
        return RecurrentCache(
            target.layers,
            layout.attending,
            target.mixers,
            batch,
            layout.heads,
            capacity,
            layout.width,
            target.dtype,
            target.device,
        )

    def prefill(self, prompts) -> Prefill:
        prefill = super().prefill(prompts)
        self.cache.remember()
        return prefill

    def reachable(self, length: int) -> int:
        return 0

    def _rewind(self, lengths: torch.Tensor) -> None:
        self.cache.rewind(lengths)

    def _announce(self, own: torch.Tensor | None, counts: torch.Tensor | None, size: int) -> None:
        self.cache.rows = Branches(own) if own is not None else Chain(counts, size)
