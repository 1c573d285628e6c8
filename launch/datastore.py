"""`draftsmith datastore`: what a target wrote, indexed on disk."""

import hashlib
import time
from collections.abc import Iterator, Mapping
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


def build(
    files: list[str],
    target: str,
    output: Path,
    shard_tokens: int,
    report=print,
    variables: Mapping = {},
    max_bad_rows: float = 0.0,
) -> dict:
    """Writes OUTPUT, a new directory: every answer of every row is a text of its own. Complete or not at all. Raises
    UserError naming file and row where a share of more than `max_bad_rows` of a file's rows cannot be used.
    """
    check_library()
    new_place(output)
    if not 1 <= shard_tokens <= 1 << 28:
        raise UserError(f"--shard-tokens: found {shard_tokens}, expected at most {1 << 28}")
    if absent := [file for file in files if not file.startswith("hub:") and not Path(file).is_file()]:
        raise UserError(f"{absent[0]}: no such file; expected JSONL, JSON or Parquet, or hub:USER/NAME")
    described = describe(target)
    renderer = load_renderer(target, described, variables)
    stops = stop_ids(described, renderer.reader)
    check_writable(output.parent)
    about = {
        "target": target,
        "vocabulary": renderer.fingerprint,
        "files": {file: digest(file) for file in files if not file.startswith("hub:")},
    }
    texts = (
        text for file in files for text in answers(file, renderer, stops, described.vocab_size, report, max_bad_rows)
    )
    document = write(texts, output, described.vocab_size, about, shard_tokens)
    tokens, shards = sum(document["shards"]) - document["texts"], len(document["shards"])
    report(
        f"{document['texts']:,} texts, {tokens:,} tokens in {shards} shard{'s' * (shards > 1)}; datastore in {output}"
    )
    return document


def answers(
    file: str, renderer: Renderer, stops: set[int], vocab_size: int, report, max_bad_rows: float = 0.0
) -> Iterator[np.ndarray]:
    """Every run of tokens that the target wrote."""
    shown, seen, bad, first = time.time(), 0, 0, ""
    for number, record in read_records(file):
        seen += 1
        try:
            rows = encode_record(record, renderer, stops, vocab_size).rows
        except (UserError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            bad, first, rows = bad + 1, first or f"{file} row {number}: {reason}", []
            if not max_bad_rows:
                break
        for tokens, mask in rows:
            edges = np.flatnonzero(np.diff(np.array([0, *mask, 0], dtype=np.int8)))
            for start, end in zip(edges[::2], edges[1::2]):
                yield np.array(tokens[start:end])
        if time.time() - shown > 10:
            shown = time.time()
            report(f"{file}: {seen:,} rows read")
    if not seen:
        raise UserError(f"{file}: found no rows, expected at least one")
    if bad and not max_bad_rows:
        raise UserError(f"{first} (--max-bad-rows SHARE leaves such rows out)")
    if bad > max_bad_rows * seen:
        raise UserError(
            f"{file}: found {bad} of {seen} rows that cannot be used, expected at most {max_bad_rows:.2%} "
            f"(--max-bad-rows); the first: {first}"
        )
    if bad:
        report(f"{file}: {bad} of {seen:,} rows cannot be used and are left out; the first: {first}")


def digest(file: str) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            found.update(piece)
    return found.hexdigest()[:16]
