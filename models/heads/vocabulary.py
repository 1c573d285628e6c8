"""The draft vocabulary: the target ids that a head may propose.

On disk it is `d2t` (int64 [Vd], offset: target id = i + d2t[i]) and `t2d` (bool [V]); in memory it is the ascending
list of ids.
"""

import torch

from draftsmith.models.errors import UserError


def most_frequent(counts: torch.Tensor, size: int, required: list[int] = ()) -> torch.Tensor:
    """The `size` most frequent ids, ascending. counts [V] int64; ties go to the lower id; `required` ids are always
    in.
    """
    if size > len(counts):
        raise UserError(f"head.draft_vocab_size: found {size}, expected at most the target's {len(counts)}")
    counts = counts.clone()
    counts[list(required)] = counts.max() + 1
    return torch.sort(counts, descending=True, stable=True).indices[:size].sort().values


def to_offsets(ids: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """ids [Vd] ascending -> {"d2t": int64 [Vd], "t2d": bool [V]}."""
    kept = torch.zeros(vocab_size, dtype=torch.bool)
    kept[ids.cpu()] = True
    return {"d2t": ids.cpu() - torch.arange(len(ids)), "t2d": kept}


def from_offsets(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """The inverse; raises UserError when the two disagree or an id is out of range or repeated."""
    ids = d2t + torch.arange(len(d2t))
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise UserError(f"d2t: found target ids {int(ids.min())}..{int(ids.max())}, expected 0..{vocab_size - 1}")
    if len(ids.unique()) != len(ids):
        raise UserError(
            f"d2t: found {len(ids) - len(ids.unique())} repeated target ids, expected none (offsets, not ids, are "
            f"stored)"
        )
    if t2d is not None and not torch.equal(t2d.nonzero().flatten(), ids.sort().values):
        raise UserError("t2d: its ids differ from those of d2t")
    return ids
