"""A datastore: texts that stay on disk, and where strings of tokens end in them (REST, He et al., 2024).

Texts are divided into shards. A shard is an array of tokens, with `vocab_size` behind every text, and its suffix array
read backwards: all places behind a token, in the order of what stands before them, the nearest token first. So the
places behind the longest known end of a context lie together, and one binary search finds them. Both arrays are mapped
into memory and never read as a whole.
"""

import json
import os
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from draftsmith.models.drafters.suffix_index import grouped
from draftsmith.models.errors import UserError

FILE, FORMAT = "datastore.json", 1
SHARD_TOKENS = 1 << 24
LONGEST = 16  # tokens of a context that are compared
OCCURRENCES = 1000  # places of one string that are counted


def check_library() -> None:
    """Raises UserError where suffix arrays cannot be made."""
    try:
        import pydivsufsort  # noqa: F401
    except ImportError:
        raise UserError(
            "datastore: building one needs the package pydivsufsort, found none; pip install 'draftsmith[datastore]'"
        ) from None


def backward_suffixes(tokens: np.ndarray) -> np.ndarray:
    """tokens [n] of an unsigned type -> int32 [n], the places 1 .. n behind tokens: of two the one comes first before
    which less stands, compared token by token backwards; the beginning of the array is less than every token.
    """
    from pydivsufsort import divsufsort

    return (len(tokens) - divsufsort(np.ascontiguousarray(tokens[::-1]))).astype(np.int32)


def write(
    texts: Iterable[np.ndarray], folder: Path, vocab_size: int, about: dict, shard_tokens: int = SHARD_TOKENS
) -> dict:
    """Writes a datastore as a new directory that appears once it is complete -> what its JSON file says.

    texts: token ids [n] int below `vocab_size`, one array a text; what does not fit into a shard goes on in the next
    one (a string that two shards share is not found). about: further keys of the JSON file. Of memory it takes some 50
    bytes a token of one shard.
    """
    check_library()
    partial = folder.parent / f".{folder.name}-{os.getpid()}"
    kind = np.uint16 if vocab_size < 1 << 16 else np.uint32  # vocab_size itself, which ends texts, is stored too
    count, sizes, shard, at = 0, [], np.empty(shard_tokens, kind), 0

    def close() -> None:
        for name, values in (("tokens", shard[:at]), ("places", backward_suffixes(shard[:at]))):
            np.save(partial / f"{name}-{len(sizes)}.npy", values)
        sizes.append(at)

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        for text in texts:
            count, left = count + 1, np.append(text, vocab_size)
            while len(left):
                some = left[: shard_tokens - at]
                shard[at : at + len(some)], left, at = some, left[len(some) :], at + len(some)
                if at == shard_tokens:
                    close()
                    at = 0
        if at:
            close()
        if not sizes:
            raise UserError("datastore: found no texts, expected at least one")
        document = {"format": FORMAT, "vocab_size": vocab_size, "texts": count, "shards": sizes, **about}
        (partial / FILE).write_text(json.dumps(document, indent=1), "utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return document


@dataclass(frozen=True)
class Shard:
    """tokens and places [n], mapped; first: the number of its first place among those of all shards."""

    tokens: np.ndarray
    places: np.ndarray
    first: int

    def before(self, place: int, count: int) -> list[int]:
        """The tokens before a place, the nearest first, at most `count`."""
        return self.tokens[max(0, place - count) : place][::-1].tolist()

    def longest(self, backwards: list[int]) -> int:
        """backwards: a context from its end -> how many of its last tokens stand together somewhere here."""
        count = len(backwards)
        at = bisect_left(self.places, backwards, key=lambda place: self.before(place, count))
        near = [self.before(int(self.places[i]), count) for i in (at - 1, at) if 0 <= i < len(self.places)]
        return max(common(backwards, some) for some in near)

    def range(self, backwards: list[int]) -> tuple[int, int]:
        """Where in `places` those behind this string lie: from, to."""
        key = lambda place: self.before(place, len(backwards))  # noqa: E731
        start = bisect_left(self.places, backwards, key=key)
        return start, bisect_right(self.places, backwards, start, key=key)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Datastore:
    """An opened datastore. vocab_size: of the tokenizer whose ids it holds; about: what its JSON file says."""

    def __init__(self, folder: Path):
        """Raises UserError for what is no complete datastore."""
        try:
            self.about = json.loads((folder / FILE).read_text("utf-8"))
        except OSError:
            raise UserError(f"datastore {folder}: no such directory with a {FILE}") from None
        except ValueError:
            raise UserError(f"datastore {folder}: {FILE} is not valid JSON") from None
        found = self.about.get("format") if isinstance(self.about, dict) else self.about
        if found != FORMAT:
            raise UserError(f"datastore {folder}: found format {found!r}, expected {FORMAT}")
        self.folder, self.vocab_size, sizes = folder, self.about.get("vocab_size"), self.about.get("shards")
        if (
            not isinstance(sizes, list)
            or not sizes
            or not all(type(n) is int and n > 0 for n in (self.vocab_size, *sizes))
        ):
            raise UserError(f"datastore {folder}: {FILE}: found no vocab_size and shards, expected what `build` wrote")
        self.shards, first = [], 0
        for number, size in enumerate(sizes):
            tokens, places = (self._array(f"{name}-{number}.npy", size) for name in ("tokens", "places"))
            self.shards.append(Shard(tokens, places, first))
            first += size
        self.size, self.borders = first, np.cumsum(sizes)

    def _array(self, name: str, size: int) -> np.ndarray:
        try:
            found = np.load(self.folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"datastore {self.folder}: {name} cannot be read ({error})") from None
        if found.shape != (size,):
            raise UserError(f"datastore {self.folder}: {name}: found shape {found.shape}, expected {(size,)}")
        return found.view(np.ndarray)  # indexing a memmap itself is slow

    def __len__(self) -> int:
        """Tokens, the ends of texts included."""
        return self.size

    def search(self, context: list[int]) -> tuple[int, np.ndarray]:
        """(how many of the context's last tokens stand together somewhere, at most `LONGEST`; the places behind them)
        or (0, none). Of more than `OCCURRENCES` places an even choice: they lie in the order of what stands before.
        """
        backwards = context[: -LONGEST - 1 : -1]
        lengths = [shard.longest(backwards) for shard in self.shards] if backwards else [0]
        length = max(lengths)
        if not length:
            return 0, np.empty(0, np.int64)
        ranges = [
            (shard, *shard.range(backwards[:length])) for shard, some in zip(self.shards, lengths) if some == length
        ]
        step = -(-sum(end - start for _, start, end in ranges) // OCCURRENCES)
        return length, np.concatenate(
            [shard.first + shard.places[start:end:step].astype(np.int64) for shard, start, end in ranges]
        )

    def following(self, places: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """What stands behind the places, grouped: (token, the places behind it), the most frequent first. Texts end."""
        tokens = np.full(len(places), self.vocab_size, np.int64)
        of = np.searchsorted(self.borders, places, side="right") if len(self.shards) > 1 else np.zeros(len(places), int)
        for number in np.unique(of):
            shard, some = self.shards[number], of == number
            tokens[some] = shard.tokens[places[some] - shard.first]
        inside = tokens < self.vocab_size
        return grouped(tokens[inside], places[inside] + 1)
