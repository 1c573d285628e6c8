"""`draftsmith inspect`: what a recipe's training rows look like, token by token, before any training."""

from rich.console import Console
from rich.text import Text
from transformers import AutoConfig

from draftsmith.models.chat import load_tokenizer
from draftsmith.models.targets import locate
from draftsmith.train.data import read_rows, token_counts
from draftsmith.train.recipe import DrafterRecipe


def inspect(recipe: DrafterRecipe, samples: int, console: Console) -> None:
    """Prints counts, the draft vocabulary's coverage by size, and the first rows with the tokens written by the target in green."""
    tokenizer, config = load_tokenizer(recipe.target), AutoConfig.from_pretrained(locate(recipe.target)).get_text_config()
    rows = read_rows(recipe.data.files, tokenizer, {tokenizer.eos_token_id}, config.vocab_size, recipe.data.max_length)
    written = sum(sum(r.mask) for r in rows)
    console.print(f"{len(rows)} rows, {sum(len(r.tokens) for r in rows):,} tokens, {written:,} written by the target (green)")
    counts = token_counts(rows, config.vocab_size).sort(descending=True).values
    for size in sorted({config.vocab_size // 4, config.vocab_size // 2, recipe.head.draft_vocab_size or config.vocab_size}):
        console.print(f"a draft vocabulary of {size} covers {float(counts[:size].sum() / counts.sum()):.2%} of them")
    for row in rows[:samples]:
        console.rule()
        for start, stop, mark in spans(row.mask):
            console.print(Text(tokenizer.decode(row.tokens[start:stop]), style="green" if mark else "dim"), end="")
        console.print()


def spans(mask: list[int]) -> list[tuple[int, int, int]]:
    """[1, 1, 0] -> [(0, 2, 1), (2, 3, 0)]."""
    borders = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return [(a, b, mask[a]) for a, b in zip(borders, borders[1:])]
