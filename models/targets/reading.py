"""Documents as a decoder takes them in: right-padded rows of tokens, and where there are images also input embeddings,
positions and blocks.

Two counts of rows: a token's place is its index among all tokens of its document, pieces of images included; it decides
what a token sees. Its rope position is what the rope turns it by; for models whose images count in three dimensions
(M-RoPE) the two differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec

NOT_IMAGES = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
)  # what targets know from the ids themselves


@dataclass(frozen=True)
class ImagePrompt(Sequence):
    """A prompt with images: a sequence of token ids, placeholders expanded, and what the model's own processor makes of
    its images (pixel values, grids, pixel masks: whatever the model's `get_image_features` takes, as for a batch of
    this prompt alone).
    """

    tokens: list[int]
    images: dict[str, torch.Tensor]

    @classmethod
    def of(cls, encoding) -> "ImagePrompt":
        """From the output of a processor for one prompt, `return_tensors="pt"`."""
        return cls(encoding["input_ids"][0].tolist(), {k: v for k, v in encoding.items() if k not in NOT_IMAGES})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def __add__(self, tokens: list[int]) -> "ImagePrompt":
        """The same images, with more text behind them."""
        return ImagePrompt(self.tokens + list(tokens), self.images)


@dataclass(frozen=True)
class Reading:
    """B documents. tokens [B, S] int64, lengths [B]; visual [B, S] bool, the pieces of images.

    embeddings [B, S, h] where there are images; rope [B, S] or [3, B, S] int64; shift [B] int64, what the rope position
    of a token behind the document is more than its place. blocks [B, S] int64: tokens of one block see each other both
    ways, -1 = only what stands before (None: no such blocks).
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    visual: torch.Tensor
    rope: torch.Tensor
    shift: torch.Tensor
    embeddings: torch.Tensor | None = None
    blocks: torch.Tensor | None = None

    @classmethod
    def text(cls, tokens: torch.Tensor, lengths: torch.Tensor) -> "Reading":
        rope = torch.arange(tokens.size(1), device=tokens.device).expand(len(tokens), -1)
        return cls(tokens, lengths, torch.zeros_like(tokens, dtype=torch.bool), rope, torch.zeros_like(lengths))

    @property
    def ahead(self) -> torch.Tensor:
        """[B, S] int64: what the rope position of each token of text is more than its place."""
        places = torch.arange(self.tokens.size(1), device=self.tokens.device)
        return self.rope.view(-1, *self.tokens.shape)[0] - places

    def inputs(self, rows: slice) -> dict[str, torch.Tensor]:
        """What the decoder's forward takes of these rows, masks aside."""
        words = (
            {"input_ids": self.tokens[:, rows]}
            if self.embeddings is None
            else {"inputs_embeds": self.embeddings[:, rows]}
        )
        return words | {"position_ids": self.rope[..., rows]}

    def seen(self, rows: slice) -> torch.Tensor:
        """[1 or B, rows, rows.stop] bool: which tokens each of these rows sees, windows aside."""
        places = torch.arange(rows.stop, device=self.tokens.device)
        seen = (places <= places[rows, None])[None]
        if self.blocks is not None:
            own = self.blocks[:, rows, None]
            seen = seen | (own == self.blocks[:, None, : rows.stop]) & (own >= 0)
        return seen

    def chunks(self, size: int) -> list[slice]:
        """Slices of at least `size` rows that cut no block of any document."""
        width = self.tokens.size(1)
        cut = torch.ones(width + 1, dtype=torch.bool)
        if self.blocks is not None:
            cut[1:-1] = ~((self.blocks[:, 1:] == self.blocks[:, :-1]) & (self.blocks[:, 1:] >= 0)).any(0).cpu()
        places, borders = cut.nonzero().flatten(), [0]
        while borders[-1] < width:
            borders.append(int(places[places >= min(borders[-1] + size, width)][0]))
        return [slice(start, stop) for start, stop in zip(borders, borders[1:])]


def kept_rows(
    spec: FeatureSpec, tokens: torch.Tensor, visual: torch.Tensor, written: torch.Tensor | None = None
) -> torch.Tensor:
    """[...] bool: which rows feed the drafter. Tokens that the target wrote are never dropped for their ids."""
    if spec.rows == "all":
        return torch.ones_like(visual)
    dropped = torch.isin(tokens, torch.tensor(spec.drop_ids, dtype=tokens.dtype, device=tokens.device))
    return ~visual & (~dropped if written is None else ~dropped | written)


def keep(features: Features, kept: torch.Tensor) -> Features:
    """The rows `kept` [B, S] of a prompt's features, moved to the front. Raises UserError where a prompt's last row is
    not among them: the root would have no row before it.
    """
    places = torch.arange(kept.size(1), device=kept.device)
    kept = kept & (places < features.lengths[:, None])
    for number, last in enumerate(kept.gather(1, features.lengths[:, None] - 1)[:, 0].tolist()):
        if not last:
            raise UserError(
                f"prompt {number}: found an image or a marker of one at its end, expected text (this drafter sees "
                f"text only)"
            )
    lengths = kept.sum(1)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    return Features(
        features.tokens[rows, order],
        features.hidden[rows, order],
        lengths,
        None if features.probes is None else features.probes[rows, order],
        features.positions[rows, order],
        (features.visual & kept)[rows, order],
        None if features.columns is None else (features.columns * kept)[rows, order],
    )
