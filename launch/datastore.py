"""`draftsmith datastore`: what a target wrote, indexed on disk."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from draftsmith.launch.export import new_place
from draftsmith.launch.methods import check_writable
from draftsmith.models.chat import stop_ids
from draftsmith.models.drafters.datastore import check_library, write
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import load_renderer
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import describe
from draftsmith.train.files import read_records
from draftsmith.train.records import encode_record


def build(files: list[str], target: str, output: Path, shard_tokens: int, report=print) -> dict:
    """Writes OUTPUT, a new directory: every answer of every row is a text of its own. Complete or not at all. Raises
    UserError naming file and row for one that cannot be used.
    """
    check_library()
    new_place(output)
    if not 1 <= shard_tokens <= 1 << 28:
        raise UserError(f"--shard-tokens: found {shard_tokens}, expected at most {1 << 28}")
    if absent := [file for file in files if not file.startswith("hub:") and not Path(file).is_file()]:
        raise UserError(f"{absent[0]}: no such file; expected JSONL, JSON or Parquet, or hub:USER/NAME")
    described = describe(target)
    renderer = load_renderer(target, described)
    stops = stop_ids(described, renderer.reader)
    check_writable(output.parent)
    about = {
        "target": target,
        "vocabulary": renderer.fingerprint,
        "files": {file: digest(file) for file in files if not file.startswith("hub:")},
    }
    texts = (text for file in files for text in answers(file, renderer, stops, described.vocab_size, report))
    document = write(texts, output, described.vocab_size, about, shard_tokens)
    tokens, shards = sum(document["shards"]) - document["texts"], len(document["shards"])
    report(
        f"{document['texts']:,} texts, {tokens:,} tokens in {shards} shard{'s' * (shards > 1)}; datastore in {output}"
    )
    return document


def answers(file: str, renderer: Renderer, stops: set[int], vocab_size: int, report) -> Iterator[np.ndarray]:
    """Every run of tokens that the target wrote."""
    shown, number = time.time(), 0
    for number, record in read_records(file):
        try:
            rows = encode_record(record, renderer, stops, vocab_size).rows
        except UserError as error:
            raise UserError(f"{file} row {number}: {error}") from None
        for tokens, mask in rows:
            edges = np.flatnonzero(np.diff(np.array([0, *mask, 0], dtype=np.int8)))
            for start, end in zip(edges[::2], edges[1::2]):
                yield np.array(tokens[start:end])
        if time.time() - shown > 10:
            shown = time.time()
            report(f"{file}: {number:,} rows read")
    if not number:
        raise UserError(f"{file}: found no rows, expected at least one")


def digest(file: str) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            found.update(piece)
    return found.hexdigest()[:16]
