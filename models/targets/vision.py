"""What a vision-language model adds to its decoder: the model's own vision tower and projector turn images into rows of
input embeddings.

From there on a session decodes as over text. Families differ in two points only: where the rope places the pieces of an
image (Qwen: in three dimensions), and what they see (Gemma 3: all of their own image, and no window cuts that short as
long as it is wider than an image). Each document is read by itself, as its processor gave it, so that no family's way
of batching images matters.
"""

import torch
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.targets.reading import Reading

FAMILIES = {  # what each takes of what its processor makes of images
    "gemma3": ("pixel_values",),
    "idefics3": ("pixel_values", "pixel_attention_mask"),
    "llava": ("pixel_values",),
    "llava_next": ("pixel_values", "image_sizes"),
    "qwen2_5_vl": ("pixel_values", "image_grid_thw"),
    "smolvlm": ("pixel_values", "pixel_attention_mask"),
}


class Vision:
    """The vision encoder of one model. token: the id of a visual token (one for each piece of an image)."""

    def __init__(self, model, name: str):
        self.family = model.config.model_type
        if self.family not in FAMILIES:
            raise UserError(
                f"target {name}: found vision-language model {self.family}, expected one of {', '.join(FAMILIES)}"
            )
        self.model, self.body, self.token = model.base_model, model.get_decoder(), model.config.image_token_id
        words = model.get_input_embeddings().num_embeddings
        if not 0 <= self.token < words:
            raise UserError(f"target {name}: found image_token_id {self.token}, expected 0..{words - 1}")

    @property
    def words(self) -> nn.Module:
        return self.body.get_input_embeddings()

    def read(self, tokens: torch.Tensor, lengths: torch.Tensor, images: list[dict[str, torch.Tensor]]) -> Reading:
        """tokens [B, S] right-padded, lengths [B], what the processor made of each document's images ({}: none).

        Raises UserError for a document whose images make another number of visual tokens than it holds, and for other
        inputs (videos).
        """
        plain, length = Reading.text(tokens, lengths), lengths.tolist()
        if not any(images) and not bool((tokens == self.token).any()):
            return plain
        embeddings = self.words(tokens)
        visual = (tokens == self.token) & (plain.rope < lengths[:, None])
        rope, shift = (
            plain.rope.expand(3, -1, -1).clone() if self.family == "qwen2_5_vl" else plain.rope,
            plain.shift.clone(),
        )
        for row, pixels in enumerate(images):
            if unknown := [name for name in pixels if name not in FAMILIES[self.family]]:
                raise UserError(
                    f"prompt {row}: found {', '.join(unknown)}, expected {' and '.join(FAMILIES[self.family])} "
                    f"({self.family})"
                )
            pixels = {name: self._moved(value, embeddings) for name, value in pixels.items()}
            pieces = self._pieces(pixels, embeddings)
            if len(pieces) != int(visual[row].sum()):
                raise UserError(
                    f"prompt {row}: found {int(visual[row].sum())} visual tokens (id {self.token}), expected "
                    f"{len(pieces)}, as many "
                    "as its images make"
                )
            embeddings[row, visual[row]] = pieces
            if pixels and rope.ndim == 3:
                document = tokens[row : row + 1, : length[row]]
                rope[:, row : row + 1, : length[row]], ahead = self.model.get_rope_index(
                    document, mm_token_type_ids=(document == self.token).int(), image_grid_thw=pixels["image_grid_thw"]
                )
                shift[row] = ahead[0, 0]
        blocks = None
        if self.family == "gemma3":
            first = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
            blocks = torch.where(visual, first.cumsum(1), -1)
        return Reading(tokens, lengths, visual, rope, shift, embeddings, blocks)

    def _moved(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    def _pieces(self, pixels: dict[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """[pieces, h]: the images of one document as input embeddings."""
        if not pixels:
            return like.new_empty(0, like.size(-1))
        pieces = self.model.get_image_features(**pixels).pooler_output
        return (pieces if isinstance(pieces, torch.Tensor) else torch.cat(list(pieces))).flatten(0, -2).to(like.dtype)
