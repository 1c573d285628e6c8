"""What a target with recurrent layers keeps of each request: slots of keys and values for its attention layers, states
for the others, and the states behind the prompt, so that one prefill serves several methods.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from draftsmith.models.slots import SlotCache
from draftsmith.models.targets.recurrent.mixers import Led, Mixer
from draftsmith.models.targets.recurrent.rows import Branches, Chain, along, path_mask

States = list[tuple[torch.Tensor | None, ...]]  # (inputs, state) of each recurrent layer, in the order of layers


class Window(NamedTuple):
    """Inputs of a convolution: values [B, C, L], of which every `stride` th place begins a window."""

    values: torch.Tensor
    stride: int


@dataclass
class Kept:
    """One recurrent layer of a batch. inputs [B, C, W - 1]: the last ones of its convolution; state: as in `Scan`; both
    None before the first row. new, saved: the inputs of the last forward, and what committing its nodes needs; mixed:
    its rows.
    """

    cache: "RecurrentCache" = field(repr=False)
    inputs: torch.Tensor | None = None
    state: torch.Tensor | None = None
    new: torch.Tensor | None = None
    saved: dict[str, torch.Tensor] | None = None
    mixed: Chain | Branches | None = field(default=None, repr=False)

    def window(self, new: torch.Tensor, width: int) -> Window:
        """new [B, C, T] of the rows of this forward, for a convolution over `width` rows."""
        rows = self.cache.rows
        before = new.new_zeros(*new.shape[:2], width - 1) if self.inputs is None else self.inputs
        whole = torch.cat([before, new], -1)
        if isinstance(rows, Chain):
            self.inputs = last(whole, rows.counts, width - 1)
            return Window(whole, 1)
        self.inputs, self.new = before, new
        at = rows.windows(width).flatten(1)[:, None].expand(-1, new.size(1), -1)
        return Window(whole.gather(2, at), width)

    def mix(self, scan, original, *arguments, **options) -> torch.Tensor:
        rows = self.cache.rows
        if self.mixed is rows:
            raise RuntimeError("several scans in one layer")  # which would need a state each (Zamba's first version)
        self.mixed = rows
        if isinstance(rows, Chain):
            outputs, self.state = scan.chain(self.state, rows, original, *arguments, **options)
        else:
            outputs, self.saved = scan.tree(self.state, rows, *arguments, **options)
        return outputs

    def commit(self, scan, path: torch.Tensor, counts: torch.Tensor) -> None:
        new = along(path, self.new.transpose(1, 2)).transpose(1, 2)
        self.inputs = last(torch.cat([self.inputs, new], -1), counts, self.inputs.size(-1))
        if scan is not None:
            self.state = scan.commit(self.state, self.saved, path, counts)


def last(whole: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """whole [B, C, width + T] -> the last `width` places once the first counts [B] of the T are there."""
    at = counts[:, None] + torch.arange(width, device=counts.device)
    return whole.gather(2, at[:, None].expand(-1, whole.size(1), -1))


class Layer:
    """One decoder layer's part of the cache: the slots of its attention, if it has one."""

    is_sliding = False

    def __init__(self, slots):
        self.slots = slots

    def update(self, key_states, value_states, *arguments, **options):
        return self.slots.update(key_states, value_states)

    def get_seq_length(self):
        return 0  # positions and masks are always passed explicitly


class RecurrentCache(Led, Cache):
    """attending: the indices of layers with attention; mixers: the recurrent layers by their index. `rows` is set
    before every forward: what the new rows are.
    """

    def __init__(
        self, layers: int, attending: list[int], mixers: dict[int, Mixer], batch: int, heads: int, capacity: int,
        width: int, dtype, device,
    ):  # fmt: skip
        self.slots = SlotCache(len(attending), batch, heads, capacity, width, dtype, device)
        self.mixers, self.kept = mixers, {index: Kept(self) for index in mixers}
        self.rows: Chain | Branches | None = None
        self.prompt: tuple[torch.Tensor, States] | None = None
        own = dict(zip(attending, self.slots.layers))
        super().__init__(layers=[Layer(own.get(index)) for index in range(layers)])

    @property
    def lengths(self) -> torch.Tensor:
        return self.slots.lengths

    @lengths.setter
    def lengths(self, lengths: torch.Tensor) -> None:
        self.slots.lengths = lengths

    @property
    def known_lengths(self) -> list[int]:
        return self.slots.known_lengths

    def place(self, new: int) -> None:
        self.slots.place(new)

    @property
    def states(self) -> States:
        return [(kept.inputs, kept.state) for kept in self.kept.values()]

    @states.setter
    def states(self, states: States) -> None:
        for kept, (inputs, state) in zip(self.kept.values(), states):
            kept.inputs, kept.state = inputs, state

    def remember(self) -> None:
        """The kept rows are a prompt: `rewind` comes back to here."""
        self.prompt = self.lengths, self.states

    def commit(self, path: torch.Tensor, counts: torch.Tensor, told: tuple[list, list] | None = None) -> None:
        """Keeps the rows path [B, M] of the last tree, as `SlotCache.commit`."""
        path = torch.where(path_mask(path, counts), path, 0)
        for index, mixer in self.mixers.items():
            self.kept[index].commit(mixer.scan, path, counts)
        self.slots.commit(path, counts, told)

    def select(self, rows: torch.Tensor) -> None:
        self.slots.select(rows)
        self.states = picked(self.states, rows)
        if self.prompt is not None:
            lengths, states = self.prompt
            self.prompt = lengths[rows], picked(states, rows)

    def join(self, other: "RecurrentCache") -> None:
        """The requests of a cache of the same target behind its own; both have processed their prompts."""
        if not len(self.lengths):
            self.slots.join(other.slots)
            self.states, self.prompt = other.states, other.prompt
            return
        (lengths, states), (behind, more) = self.prompt, other.prompt
        self.slots.join(other.slots)
        self.states = joined(self.states, other.states)
        self.prompt = torch.cat([lengths, behind]), joined(states, more)

    def rewind(self, lengths: torch.Tensor) -> None:
        """Back to `lengths` [B], each of which is that of the kept rows, of the prompt, or 0. Raises ValueError."""
        now, (prompt, states) = self.lengths, self.prompt or (torch.zeros_like(self.lengths), None)
        if not bool(((lengths == now) | (lengths == prompt) | (lengths == 0)).all()):
            raise ValueError(
                f"rewind: found {lengths.tolist()}, expected the kept rows {now.tolist()}, those of the prompts "
                f"{prompt.tolist()}, or 0: states of other rows are gone"
            )
        if states is not None:
            self.states = chosen(lengths == now, self.states, states)
        if bool((lengths == 0).any()):
            zeros = [tuple(None if part is None else part * 0 for part in layer) for layer in self.states]
            self.states = chosen(lengths > 0, self.states, zeros)
        self.lengths = lengths


def picked(states: States, rows: torch.Tensor) -> States:
    return [tuple(None if part is None else part[rows] for part in layer) for layer in states]


def joined(first: States, second: States) -> States:
    return [tuple(None if a is None else torch.cat([a, b]) for a, b in zip(*pair)) for pair in zip(first, second)]


def chosen(first: torch.Tensor, ours: States, theirs: States) -> States:
    """Of each request [B] ours or theirs."""
    pick = lambda a, b: None if a is None else torch.where(first.view(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return [tuple(pick(a, b) for a, b in zip(*pair)) for pair in zip(ours, theirs)]
