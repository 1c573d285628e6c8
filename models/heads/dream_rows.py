"""Which rows of a document feed a DREAM head, and what it computes of them; see heads/dream.py."""

from dataclasses import dataclass

import torch


def kept_rows(
    real: torch.Tensor, visual: torch.Tensor | None, columns: torch.Tensor | None, ratio: float
) -> torch.Tensor:
    """Which rows of one document feed the head [S] bool: real [S] bool without padding; of its n visual ones the max(1,
    int(n ratio)) with the most attention (ties: the first), over all images together; all of its text. At ratio 1, or
    without images, `real` itself.
    """
    if ratio == 1 or visual is None or not bool((visual & real).any()):
        return real
    places = (visual & real).nonzero().flatten()
    best = columns[places].sort(descending=True, stable=True).indices[: max(1, int(len(places) * ratio))]
    return (real & ~visual).index_fill(0, places[best], True)


@dataclass(frozen=True)
class Rows:
    """What a head computes of the rows of a document, or of a packed row: kept [N] bool, which of them feed it; of
    those their positions [n], outputs x1, x2 [n, h] of blocks 0 and 1; keys and values [., H_kv, D] of the three
    blocks: of the kept rows, of all states, of the kept.
    """

    kept: torch.Tensor
    positions: torch.Tensor
    x1: torch.Tensor
    x2: torch.Tensor
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def joined(cls, documents: list["Rows"]) -> "Rows":
        """The documents of a packed row, one behind the other."""
        kept, positions, x1, x2 = (
            torch.cat([getattr(d, name) for d in documents]) for name in ("kept", "positions", "x1", "x2")
        )
        return cls(
            kept,
            positions,
            x1,
            x2,
            tuple(tuple(map(torch.cat, zip(*block))) for block in zip(*(d.pairs for d in documents))),
        )


def appended(pairs, new):
    """keys and values [k, P, H_kv, D] with those of one more step [P, H_kv, D]."""
    return tuple(torch.cat([x, y[None]]) for x, y in zip(pairs, new))
