"""The weights of a target: whole, or refused by name; quantised ones with the package that reads them. And which
weights a target's name stood for, where that is known.

transformers starts what a checkpoint lacks at random, and leaves out what it does not know; a target is never either.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

MANIFEST = "weights.json"  # beside the weights that were made from a GGUF file: what they were made from


@dataclass(frozen=True)
class Weights:
    """sha256: of the GGUF file that they were dequantised from (None: from none); quantisation: in the words of its
    kind, `Q4_1` or `gptq`.
    """

    sha256: str | None
    quantisation: str

    def __str__(self) -> str:
        return f"{self.quantisation}, sha256 {self.sha256[:16]}" if self.sha256 else self.quantisation


def weights_of(place: str | Path) -> Weights | None:
    """What is known of the weights in a directory; None where they are just what lies there."""
    try:
        found = json.loads((Path(place) / MANIFEST).read_text("utf-8"))
        return Weights(found["sha256"], found["quantisation"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of transformers: what matters of them becomes one line of ours."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
