"""Training rows: token ids and token mask, read through `datasets`, served in a deterministic order.

Order: one permutation per epoch from (seed, epoch); inside a window of batches rows are sorted by length, so that batches hold rows of
similar length; every process takes its own rows of each batch.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from draftsmith.models.chat import encode_row
from draftsmith.models.errors import UserError

WINDOW = 16  # batches whose rows are sorted together


@dataclass(frozen=True)
class Row:
    """tokens and mask (1 = written by the target) of one conversation."""

    tokens: list[int]
    mask: list[int]


def read_table(file: str | Path):
    """A JSONL or Parquet file as a `datasets.Dataset`. Raises UserError when it cannot be read or is empty."""
    try:
        import datasets
    except ImportError:
        raise UserError("reading training rows needs the package datasets, found none; pip install 'draftsmith[train]'") from None

    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected JSONL or Parquet")
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None:
        raise UserError(f"{path}: found suffix {path.suffix!r}, expected .jsonl, .json or .parquet")
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # datasets raises many types for bad files; the cause is its innermost message
        cause = error.__cause__ or error
        raise UserError(f"{path}: cannot be read as {kind} ({' '.join(str(cause).split())[:200]})") from None
    if len(table) == 0:
        raise UserError(f"{path}: found no rows, expected at least one")
    return table


def read_rows(files: list[str], tokenizer, stops: set[int], vocab_size: int, max_length: int) -> list[Row]:
    """All rows that have something to learn from, cut at max_length.

    Raises UserError with file and row for a row of the wrong form or ids outside the vocabulary, and when no row has supervised tokens.
    """
    rows = []
    for file in files:
        for number, record in enumerate(read_table(file)):
            place = f"{file} row {number + 1}"
            tokens, mask = encode_record(record, tokenizer, stops, place)
            wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
            if wrong is not None:
                raise UserError(f"{place}: found token id {wrong}, expected 0..{vocab_size - 1}")
            row = Row(tokens[:max_length], mask[:max_length])
            if sum(row.mask) >= 2:
                rows.append(row)
    if not rows:
        raise UserError(f"{', '.join(files)}: found no row with two or more tokens written by the target within {max_length} tokens")
    return rows


def encode_record(record: dict, tokenizer, stops: set[int], place: str) -> tuple[list[int], list[int]]:
    if record.get("tokens") is not None:
        start = record.get("prompt_length")
        if not isinstance(record["tokens"], list) or not all(isinstance(t, int) for t in record["tokens"]):
            raise UserError(f"{place}: tokens: expected a list of integers")
        if not isinstance(start, int) or not 0 < start <= len(record["tokens"]):
            raise UserError(f"{place}: prompt_length: found {start!r}, expected 1..{len(record['tokens'])}")
        return record["tokens"], [0] * start + [1] * (len(record["tokens"]) - start)
    if record.get("messages") is not None:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise UserError(f"{place}: messages: expected a list of objects with role and content")
        try:
            return encode_row(tokenizer, messages, stops)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if isinstance(record.get("text"), str):
        ids = tokenizer(record["text"])["input_ids"]
        return ids, [1] * len(ids)
    raise UserError(f"{place}: found keys {sorted(record)}, expected tokens, messages or text")


def token_counts(rows: list[Row], vocab_size: int) -> torch.Tensor:
    """How often each id was written by the target. [V] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        counts += torch.bincount(torch.tensor([t for t, m in zip(row.tokens, row.mask) if m]), minlength=vocab_size)
    return counts


def epoch_batches(rows: list[Row], batch_rows: int, world: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of every global batch (batch_rows * world each; the rest is left out) of an epoch."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    size, batches = batch_rows * world, []
    order = order[:len(order) // size * size]
    for start in range(0, len(order), size * WINDOW):
        window = sorted(order[start:start + size * WINDOW], key=lambda i: len(rows[i].tokens))
        batches += [window[i:i + size] for i in range(0, len(window), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def collate(rows: list[Row], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens [B, S] int64, lengths [B], mask [B, S] bool, right-padded."""
    width = max(len(r.tokens) for r in rows)
    tokens = torch.tensor([r.tokens + [0] * (width - len(r.tokens)) for r in rows], device=device)
    mask = torch.tensor([r.mask + [0] * (width - len(r.mask)) for r in rows], dtype=torch.bool, device=device)
    return tokens, torch.tensor([len(r.tokens) for r in rows], device=device), mask
