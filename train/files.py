"""Where rows come from: JSONL, JSON (either gzipped) and Parquet files, and data sets of the Hub. Records are read one
by one, so that memory does not grow with a file; nothing here knows what a record should hold.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from draftsmith.models.errors import UserError
from draftsmith.models.hub import hub_reason

HUB = "hub:"
FORM = "hub:NAME[@REVISION][:[CONFIG:]SPLIT]"
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how it begins
BLANK = b"\xef\xbb\xbf \t\r\n"  # the mark with which UTF-8 may begin, and white space
COMMIT = re.compile("[0-9a-f]{40}")
UNREADABLE = (OSError, EOFError, zlib.error)  # of a file, gzipped or not


@dataclass(frozen=True)
class HubSet:
    """A data set: USER/NAME of the Hub, or a folder in its form. config: of those that have several; None = the only
    one, or the one that the set itself calls its default.
    """

    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> "HubSet":
        """Raises UserError for what is not of the form hub:NAME[@REVISION][:[CONFIG:]SPLIT]."""
        place, *more = text.removeprefix(HUB).split(":")
        name, _, revision = place.partition("@")
        if not name or len(more) > 2 or any("[" in part for part in more):
            raise UserError(f"data.files: found {text}, expected {FORM} (a split as a whole)")
        *config, split = more or ["train"]
        return cls(os.path.expanduser(name), revision or None, *[c or None for c in config or [None]], split or "train")

    @property
    def local(self) -> bool:
        return Path(self.name).is_dir()

    def pinned(self) -> "HubSet":
        """With the commit that its revision is now. Raises UserError where the Hub does not say."""
        if self.local or COMMIT.fullmatch(self.revision or ""):
            return self
        try:
            return replace(self, revision=HfApi().dataset_info(self.name, revision=self.revision).sha)
        except (HTTPError, OSError, ValueError) as error:
            raise UserError(
                f"data set {self.name}: the Hub: {hub_reason(error)}; rows that were prepared are found without it "
                f"where the commit is named (hub:{self.name}@COMMIT)"
            ) from None

    def __str__(self) -> str:
        place = HUB + self.name + (f"@{self.revision}" if self.revision else "")
        return ":".join([place, *([self.config] if self.config else []), self.split])


def pinned(files: list[str]) -> list[str]:
    """`data.files` with the commit of every Hub set: what is read is then what the rows' key says."""
    return [str(HubSet.parse(file).pinned()) if file.startswith(HUB) else file for file in files]


def identity(file: str) -> bytes:
    """What tells the content of a file, or of a pinned Hub set, from any other. Raises UserError for a file that does
    not exist.
    """
    if file.startswith(HUB):
        found = HubSet.parse(file)
        below = sorted(p for p in Path(found.name).rglob("*") if p.is_file()) if found.local else []
        return file.encode() + b"".join(str(p.relative_to(found.name)).encode() + content(p) for p in below)
    return content(Path(file))


def content(path: Path) -> bytes:
    """sha256 of a file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected JSONL, JSON or Parquet, or {FORM}")
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").digest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).digest()
        )


def kind_of(file: str) -> str:
    """The suffix that says how a file is read. Raises UserError for one of no known kind."""
    path = Path(file)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".json") and path.suffix != ".parquet":
        raise UserError(f"{path}: found suffix {path.suffix!r}, expected .jsonl, .json (either with .gz) or .parquet")
    return kind


def check_readable(file: str) -> None:
    """Raises UserError for a file of no known kind, and where the package that reads it is missing."""
    if file.startswith(HUB) or kind_of(file) == ".parquet":
        load_datasets(file)


def read_records(file: str) -> Iterator[tuple[int, object]]:
    """(row number from 1, record) of a file or Hub data set, one at a time; a line that is no JSON comes as a
    `UserError` in the record's place. In JSONL the number is that of the line.
    """
    if file.startswith(HUB):
        found = HubSet.parse(file)
        options = {} if found.local else {"revision": found.revision}
        yield from enumerate(_stream(file, found.name, found.config, split=found.split, **options), 1)
        return
    path, kind = Path(file), kind_of(file)
    if kind == ".parquet":
        yield from enumerate(_stream(file, "parquet", data_files=str(path), split="train"), 1)
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from _lines(path, stream, kind)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _lines(path: Path, stream, kind: str) -> Iterator[tuple[int, object]]:
    """The records of JSONL, or of one JSON array behind the suffix .json."""
    numbered = enumerate(stream, 1)
    first, start = next(((n, line) for n, line in numbered if line.strip(BLANK)), (1, b""))
    if start.startswith(UTF16):
        raise UserError(f"{path}: found UTF-16, expected UTF-8")
    if kind == ".json" and start.strip(BLANK).startswith(b"["):
        try:
            yield from enumerate(json.loads(start + stream.read()), 1)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return
    for number, line in chain([(first, start)], numbered):
        if line := line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield number, UserError(f"not valid JSON ({error})")


def load_datasets(file: str):
    """The package. Raises UserError where it is missing, or lacks what it needs itself."""
    try:
        import datasets
    except ImportError as error:
        found = "none" if error.name == "datasets" else f"one that cannot be imported ({error})"
        raise UserError(
            f"{file}: reading it needs the package datasets, found {found}; pip install 'draftsmith[train]'"
        ) from None
    return datasets


def _stream(file: str, *name, **options) -> Iterator[dict]:
    datasets = load_datasets(file)
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(*name, streaming=True, **options)
        yield from (
            stream if stream.features is None else stream.decode(False)
        )  # pictures as they are stored: a bad one is an error of its row
    except Exception as error:  # datasets raises many types for bad files; the cause is its innermost message
        said = " ".join(str(error.__cause__ or error).split())
        if several := re.search(r"(?:available configs|not found\. Available): \[(.*?)\]", said):
            raise UserError(
                f"{file}: found the configurations {several[1]}, expected one of them: hub:NAME:CONFIG:SPLIT"
            ) from None
        raise UserError(f"{file}: cannot be read ({said[:200]})") from None
