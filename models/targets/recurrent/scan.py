"""What a kind of recurrent layer brings: how its rows see each other, in prompts and in trees."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scan:
    """function: the name of the model's own function, with whose arguments `chain` and `tree` are called, and of which
    they return what it returns without a final state.

    In decoding: chain(state, rows: Chain, original, *arguments) -> (outputs, state behind the real rows). tree(state,
    rows: Branches, *arguments) -> (outputs, what `commit` needs); it writes nothing. commit(state, saved, path [B, M],
    counts [B]) -> the state behind the first counts nodes of a path. state: None before the first row, else fp32 [B,
    ...]. by_level: whether a tree takes one step a level instead of one for all.

    In training, None where it takes neither probes nor trees: whole(original, *arguments) -> (outputs, what each row of
    documents wrote [D, S, ...]); behind(written [1, T, ...] of a packed row, rows: Anchored, *arguments) -> outputs.
    """

    function: str
    chain: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    tree: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
    commit: Callable[..., torch.Tensor]
    by_level: bool = False
    whole: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] | None = None
    behind: Callable[..., torch.Tensor] | None = None


def short_chunk(chunk_size: int, rows: int) -> int:
    """The model's chunk, or the power of two that holds all rows: its form in PyTorch pads rows to whole chunks."""
    return min(chunk_size, max(16, 1 << (rows - 1).bit_length()))
