"""`draftsmith inspect`: what a recipe's training rows look like, token by token, before any training."""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.notes import notes
from draftsmith.models.targets import describe
from draftsmith.train.data import prepare
from draftsmith.train.pictures import cut_for, load_pictures
from draftsmith.train.recipe import DrafterRecipe


def inspect(recipe: DrafterRecipe, samples: int, console: Console) -> None:
    """Prints counts, the draft vocabulary's coverage by size, and the first rows with the tokens written by the target
    in green.
    """
    target, spec = describe(recipe.target), recipe.data
    tokenizer = load_tokenizer(recipe.target)
    config = recipe.kind.Config.for_target(target.config, **recipe.head.shape)
    for line in notes(target, tokenizer, recipe.target, config):
        console.print(line, markup=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(
            spec.files,
            spec.max_length,
            spec.max_bad_rows,
            tokenizer,
            stop_ids(target, tokenizer),
            target.vocab_size,
            Path(folder),
            console.print,
            load_pictures(recipe.target, target, spec.max_image_pixels, cut_for(config)),
        )
        console.print(
            f"{len(rows)} rows, {len(rows.tokens):,} tokens, {int(rows.mask.sum()):,} written by the target (green)"
        )
        counts = rows.counts.sort(descending=True).values
        for size in sorted(
            {
                target.vocab_size // 4,
                target.vocab_size // 2,
                recipe.head.shape.get("draft_vocab_size") or target.vocab_size,
            }
        ):
            console.print(
                f"a draft vocabulary of {size} covers {float(counts[:size].sum() / counts.sum()):.2%} of them"
            )
        for number in range(min(samples, len(rows))):
            tokens, mask = rows.row(number)
            console.rule()
            for start, stop, mark in spans(mask.tolist()):
                console.print(
                    Text(tokenizer.decode(tokens[start:stop].tolist()), style="green" if mark else "dim"), end=""
                )
            console.print()


def spans(mask: list[bool]) -> list[tuple[int, int, bool]]:
    """[1, 1, 0] -> [(0, 2, 1), (2, 3, 0)]."""
    borders = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return [(a, b, mask[a]) for a, b in zip(borders, borders[1:])]
