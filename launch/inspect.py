"""`draftsmith inspect`: what a recipe's training rows look like, token by token, before any training, and what of it
looks wrong.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import describe
from draftsmith.train.data import Rows
from draftsmith.train.preparation import prepared
from draftsmith.train.recipe import DrafterRecipe

READ = 2000  # rows that are looked through for what seems wrong
KINDS = "text|image|image_url|input_text|output_text|input_image|audio|input_audio|video"
ROLES = "system|developer|user|assistant|tool|function"
# Of parts or messages, Python's or JSON: what tells them from the functions and calls that templates show as JSON
SOURCE = re.compile(rf"""[{{,]\s*['"](?:type['"]\s*:\s*['"](?:{KINDS})|role['"]\s*:\s*['"](?:{ROLES}))['"]\s*[,}}]""")


def inspect(recipe: DrafterRecipe, samples: int, console: Console) -> None:
    """Prints counts, the draft vocabulary's coverage by size, what looks wrong, and the first rows with the tokens
    written by the target in green.
    """
    target = describe(recipe.target)
    with tempfile.TemporaryDirectory() as folder:
        made = prepared(recipe, target, Path(folder), lambda line: console.print(Text(line)))
        rows, tokenizer = made.rows, made.renderer.tokenizer
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
        for line in suspicions(rows, made.renderer, made.stops):
            console.print(Text(f"warning: {line}", style="yellow"))
        for number in range(min(samples, len(rows))):
            tokens, mask = rows.row(number)
            console.rule()
            for start, stop, mark in spans(mask.tolist()):
                console.print(
                    Text(tokenizer.decode(tokens[start:stop].tolist()), style="green" if mark else "dim"), end=""
                )
            console.print()


def suspicions(rows: Rows, renderer: Renderer, stops: set[int]) -> list[str]:
    """One line for everything in the first rows that data should not have: it is supervised all the same."""
    tokenizer, special = renderer.tokenizer, np.array(sorted(renderer.encoder.markers - stops), dtype=np.uint32)
    found, markers = Counter(), Counter()
    for number in range(min(READ, len(rows))):
        tokens, mask = rows.row(number)
        among = np.unique(tokens[mask & np.isin(tokens, special)]).tolist()
        markers.update(tokenizer.convert_ids_to_tokens(among))
        ends = [token for token in tokens[mask].tolist() if token not in stops]
        found["markers"] += bool(among)
        found["None"] += tokenizer.decode(ends).strip() in ("None", "null", "nan")
        found["source"] += bool(SOURCE.search(tokenizer.decode(tokens.tolist())))
        found["whole"] += bool(mask.all())
    names = ", ".join(name for name, _ in markers.most_common(3))
    lines = {
        "markers": f"markers ({names}) among what is supervised: right only where the target writes them itself",
        "None": "None or null as the answer",
        "source": "the source of messages or parts in their text, in Python or JSON",
        "whole": "no prompt: they are supervised from the first token to the last",
    }
    read = min(READ, len(rows))
    return [f"{found[key]:,} of {read:,} rows have {line}" for key, line in lines.items() if found[key]]


def spans(mask: list[bool]) -> list[tuple[int, int, bool]]:
    """[1, 1, 0] -> [(0, 2, 1), (2, 3, 0)]."""
    borders = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return [(a, b, mask[a]) for a, b in zip(borders, borders[1:])]
