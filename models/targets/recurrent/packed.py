"""Rows behind a packed training row on layers with a state: probes and draft trees, each at one of its tokens.

What a row reads of its document needs no state at its token: it is a sum over the tokens before, of what each of them
wrote and what the decay between leaves of it. What the tokens wrote is kept from the forward over the documents.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from draftsmith.models.targets.packed import KeptCache
from draftsmith.models.targets.recurrent.cache import Window
from draftsmith.models.targets.recurrent.mixers import Led, Mixer


@dataclass(frozen=True)
class Anchored:
    """Q rows behind a packed row of T tokens: at [Q], the token that each stands behind; own [Q, Q] bool, what it sees
    of the other rows, itself included; before [Q, T] bool, what it sees of the tokens; places [T], those of the tokens
    in their documents.
    """

    at: torch.Tensor
    own: torch.Tensor
    before: torch.Tensor
    places: torch.Tensor

    @property
    def seen(self) -> torch.Tensor:
        """[1, Q, T + Q] bool."""
        return torch.cat([self.before, self.own], 1)[None]

    def windows(self, width: int) -> torch.Tensor:
        """[Q, width] int64: the last `width` rows on the way to each, itself the last, as indices into a row of zeros,
        the T tokens and the Q rows.
        """
        (count, tokens), device = self.before.shape, self.own.device
        back, depth = torch.arange(width, device=device), self.own.sum(-1, keepdim=True)
        nearest = torch.where(self.own, torch.arange(count, device=device), -1).topk(min(width, count), -1).values
        nearest = F.pad(nearest, (0, width - nearest.size(-1)), value=-1)
        behind = back - depth  # tokens before the one that the row stands behind
        token = torch.where(self.places[self.at, None] >= behind, 1 + self.at[:, None] - behind, 0)
        return torch.where(back < depth, 1 + tokens + nearest, token).flip(-1)


@dataclass
class PackedKept:
    """One recurrent layer: inputs [D, C, S] of its convolution and what the documents' tokens wrote, later [1, C, T]
    and [1, T, ...] of the packed row.
    """

    cache: "PackedCache" = field(repr=False)
    inputs: torch.Tensor | None = None
    written: dict[str, torch.Tensor] = field(default_factory=dict)

    def window(self, new: torch.Tensor, width: int) -> Window:
        rows = self.cache.rows
        if rows is None:
            self.inputs = new
            return Window(F.pad(new, (width - 1, 0)), 1)
        whole = torch.cat([new.new_zeros(1, new.size(1), 1), self.inputs, new], -1)
        return Window(whole[:, :, rows.windows(width).flatten()], width)

    def mix(self, scan, original, *arguments, **options) -> torch.Tensor:
        if self.cache.rows is not None:
            return scan.behind(self.written, self.cache.rows, *arguments, **options)
        outputs, self.written = scan.whole(original, *arguments, **options)
        return outputs


class PackedCache(Led, KeptCache):
    """Keeps what the tokens of one forward wrote. rows: of a later forward, None for the first."""

    def __init__(self, layers: int, mixers: dict[int, Mixer]):
        super().__init__(layers)
        self.mixers, self.kept = mixers, {index: PackedKept(self) for index in mixers}
        self.rows: Anchored | None = None

    def packed(self, numbers: torch.Tensor, places: torch.Tensor) -> "PackedCache":
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[numbers, :, places].transpose(0, 1)[None]
                layer.values = layer.values[numbers, :, places].transpose(0, 1)[None]
        for kept in self.kept.values():
            kept.inputs = kept.inputs[numbers, :, places].T[None]
            kept.written = {name: value[numbers, places][None] for name, value in kept.written.items()}
        return self

    def follow(self, at, own, before, places) -> None:
        self.rows = Anchored(at, own, before, places)
