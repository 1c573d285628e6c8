"""Verification rules: (tree, what the target does at every node) -> accepted path and the next token."""

from dataclasses import dataclass

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.tree import DraftTree, Kind


@dataclass(frozen=True)
class Accepted:
    """path [B, M] int64: accepted nodes, root first, padded with 0 after counts [B]; next_token [B]."""

    path: torch.Tensor
    counts: torch.Tensor
    next_token: torch.Tensor


def match(tree: DraftTree, chosen: torch.Tensor) -> Accepted:
    """Greedy and sample-and-match verification: follow the tokens that the target itself chooses.

    chosen [B, N]: the target's token after each node (argmax, or sampled with position-keyed noise). Lossless for trees whose
    edges do not depend on that noise: every ONE_HOT tree, siblings repeated or not. Emits exactly what plain decoding with the same noise emits.
    """
    if bool((tree.kind != Kind.ONE_HOT).any()):
        kinds = sorted({Kind(k).name for k in tree.kind.unique().tolist()} - {"ONE_HOT"})
        raise UserError(f"sample-and-match: found {', '.join(kinds)} edges, expected ONE_HOT (draft with a tree that does not sample)")
    rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
    wrong = tree.tokens != chosen.gather(1, tree.parents.clamp(min=0))
    wrong[:, 0] = False
    wrong |= ~tree.real
    reached = ~(tree.ancestors & wrong[:, None]).any(-1)
    last = torch.where(reached, tree.depths, -1).argmax(1)
    on_path = tree.ancestors[rows, last]
    counts = on_path.sum(1)
    width = int(counts.max())
    path = torch.sort((~on_path).to(torch.int8), dim=1, stable=True).indices[:, :width]
    path = path.masked_fill(torch.arange(width, device=path.device) >= counts[:, None], 0)
    return Accepted(path, counts, chosen[rows, last])
