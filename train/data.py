"""From files to training rows, once: records are read one by one, encoded, and stored as flat arrays that every process
maps.

Memory does not grow with the data. A record that cannot be used is counted, and the file refused when too many are.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Packing
from draftsmith.models.rendering import Renderer
from draftsmith.train.encoding import Encoder, encoded, usual_processes
from draftsmith.train.files import check_readable, identity, pinned, read_records

EARLY = 1000  # records after which a file that is mostly unusable is refused without reading on


@dataclass(frozen=True)
class Rows:
    """Documents behind one another: tokens [T] uint32 and mask [T] bool (1 = written by the target), mapped from
    `folder`; borders [N + 1] int64; counts [V] int64, how often each id was written by the target; and where the
    pictures of each lie. Several may be of one conversation.
    """

    folder: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=np.uint32, mode="r")

    @cached_property
    def mask(self) -> np.ndarray:
        return np.memmap(self.folder / "mask.bin", dtype=bool, mode="r")

    @cached_property
    def borders(self) -> np.ndarray:
        return np.load(self.folder / "borders.npy")

    @cached_property
    def counts(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / "counts.npy"))

    @cached_property
    def conversations(self) -> np.ndarray:
        """[N] int64, ascending from 0: the conversation that each row is of."""
        place = self.folder / "conversations.npy"
        return np.load(place) if place.is_file() else np.arange(len(self))

    @cached_property
    def temperatures(self) -> list[float | None] | None:
        """At which temperatures the answers were drawn, as the records say (None stands for records that do not), or
        None for rows that were prepared before this was kept.
        """
        place = self.folder / "temperatures.json"
        return json.loads(place.read_text("utf-8")) if place.is_file() else None

    @cached_property
    def laws(self) -> list[dict | None] | None:
        """By which laws beside the temperature the answers were drawn, as the records say (`sampling`, as `draftsmith
        regenerate` writes it), or None as for `temperatures`.
        """
        place = self.folder / "laws.json"
        return json.loads(place.read_text("utf-8")) if place.is_file() else None

    @cached_property
    def notes(self) -> list[str]:
        """What was told when they were prepared."""
        place = self.folder / "notes.json"
        return json.loads(place.read_text("utf-8")) if place.is_file() else []

    @property
    def key(self) -> str:
        return self.folder.name

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.borders)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        cut = slice(self.borders[number], self.borders[number + 1])
        return self.tokens[cut], self.mask[cut]

    def pack(self, numbers: list[int]) -> tuple[torch.Tensor, Packing]:
        """tokens [T] int64 of these rows behind one another, and their packing."""
        tokens, masks = zip(*(self.row(n) for n in numbers))
        borders = (0, *np.cumsum([len(t) for t in tokens]).tolist())
        return torch.from_numpy(np.concatenate(tokens).astype(np.int64)), Packing(
            borders, torch.from_numpy(np.concatenate(masks))
        )

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which names are a row's (borders [N + 1]), which bytes are a name's (borders [names + 1]), and the bytes of
        all names.
        """
        load = lambda name: np.load(self.folder / name, mmap_mode="r")  # noqa: E731
        return load("picture_borders.npy"), load("name_borders.npy"), load("names.npy")

    @property
    def seen(self) -> bool:
        """Whether any row has pictures."""
        return (self.folder / "names.npy").is_file() and len(self._places[2]) > 0

    def images(self, number: int) -> list[Path]:
        """The pictures of a row, in the order of its image tokens."""
        if not self.seen:
            return []
        of_row, of_name, names = self._places
        return [
            self.folder / names[of_name[k] : of_name[k + 1]].tobytes().decode()
            for k in range(of_row[number], of_row[number + 1])
        ]

    def prompt(self, number: int) -> list[int]:
        """What stands before the first token that the target wrote (at least one token)."""
        tokens, mask = self.row(number)
        return tokens[: max(1, int(mask.argmax()))].tolist()


def since(renderer: Renderer, folder: Path) -> Renderer:
    """The same with the time at which a run whose rows lie in `folder` began: templates that show it give a run that is
    resumed the same rows.
    """
    if renderer.clock is None or renderer.fixed:
        return renderer
    place = folder / "clock"
    if not place.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
        written.write_text(renderer.clock)
        with contextlib.suppress(FileExistsError):  # another process of this run was first
            os.link(written, place)
        written.unlink()
    return renderer.at(place.read_text())


def prepare(
    files: list[str],
    max_length: int,
    max_bad_rows: float,
    reader,
    stops: set[int],
    vocab_size: int,
    folder: Path,
    report=print,
    pictures=None,
    processes: int | None = None,
) -> Rows:
    """Encodes the files below `folder` unless that was done before with equal content, tokenizer and template (the
    folder's name is a hash of all).

    reader: as `Renderer.of` takes it; pictures: a `train.pictures.Pictures` for a target that sees; processes: that
    encode long files (None: one a core). Picture files are not part of the hash, only their names are. Raises UserError
    naming file and row when a share of more than `max_bad_rows` of a file's records cannot be used, and when nothing
    can be learned from any.
    """
    files, renderer = pinned(files), Renderer.of(reader)
    place = folder / key_of(files, max_length, renderer, stops, vocab_size, pictures)
    if not place.is_dir():
        for file in files:  # the last of them as well, before the first takes its minutes
            check_readable(file)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{place.name}-{socket.gethostname()}-{os.getpid()}"  # machines may share the folder
        try:
            partial.mkdir()
            encoder = Encoder(renderer, stops, vocab_size, max_length, pictures)
            _write(files, max_bad_rows, encoder, partial, report, processes or usual_processes())
            try:
                partial.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was first, with the same content
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Rows(place)


def await_rows(
    files: list[str], max_length: int, reader, stops: set[int], vocab_size: int, folder: Path, pictures=None
) -> Rows:
    """The rows that the first process of this machine prepares; waiting is no collective, so that no time-out of one
    can strike.
    """
    place = folder / key_of(pinned(files), max_length, Renderer.of(reader), stops, vocab_size, pictures)
    while not place.is_dir():
        time.sleep(0.1)
    return Rows(place)


def key_of(files: list[str], max_length: int, renderer, stops: set[int], vocab_size: int, pictures=None) -> str:
    """16 hex digits over everything that the rows depend on. Raises UserError for a file that does not exist."""
    digest = hashlib.sha256(
        json.dumps([3, max_length, sorted(stops), vocab_size, renderer.fingerprint, *renderer.key]).encode()
    )
    if pictures is not None:
        digest.update(json.dumps([1, *pictures.key, [str(Path(file).resolve().parent) for file in files]]).encode())
    for file in files:
        digest.update(identity(file))
    return digest.hexdigest()[:16]


def _write(files, max_bad_rows, encoder: Encoder, folder: Path, report, processes: int) -> None:
    names, of_row, conversations, temperatures, laws = [], [0], [], set(), set()
    borders, counts, notes, shown = [0], np.zeros(encoder.vocab_size, dtype=np.int64), Counter(), time.time()
    before, conversation, goes_on, pictures = None, -1, False, encoder.pictures
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "mask.bin").open("wb") as mask_file:
        for file in files:
            bad = seen = 0
            first = ""
            for number, found in encoded(read_records(file), file, encoder, processes):
                seen += 1
                notes.update(found.notes)
                if found.reason is not None:
                    bad, first = bad + 1, first or f"{file} row {number}: {found.reason}"
                origin = found.origin
                goes_on = goes_on and origin is not None and origin == before  # its turns, as regenerate writes them
                before = origin
                if found.rows:
                    conversation, goes_on = conversation + (not goes_on), True
                    conversations += [conversation] * len(found.rows)
                    temperatures.add(found.temperature)
                    laws.add(json.dumps(found.law, sort_keys=True))
                for ids, written, sources in found.rows:
                    tokens_file.write(ids.tobytes())
                    mask_file.write(written.tobytes())
                    np.add.at(counts, ids[written], 1)  # bincount would pass over the vocabulary for each row
                    borders.append(borders[-1] + len(ids))
                    if pictures is not None:
                        names += pictures.store(sources, folder)
                        of_row.append(len(names))
                if seen == EARLY and bad > seen * max(max_bad_rows, 0.5):
                    break
                if time.time() - shown > 10:
                    shown = time.time()
                    report(f"{file}: {seen:,} rows read, {bad} cannot be used")
            if seen == 0:
                raise UserError(f"{file}: found no rows, expected at least one")
            if bad > max_bad_rows * seen:
                raise UserError(
                    f"{file}: found {bad} of {seen} rows that cannot be used, expected at most {max_bad_rows:.2%} "
                    f"(data.max_bad_rows); "
                    f"the first: {first}"
                )
            if bad:
                report(f"{file}: {bad} of {seen:,} rows cannot be used and are left out; the first: {first}")
    lines = [f"{count:,} {note}" for note, count in notes.items()]
    if len(borders) == 1:
        raise UserError(
            f"{', '.join(files)}: found no row with two or more tokens written by the target within "
            f"{encoder.max_length} "
            f"tokens (data.max_length){''.join(f'; {line}' for line in lines)}"
        )
    for line in lines:
        report(line)
    np.save(folder / "conversations.npy", np.array(conversations, dtype=np.int64))
    (folder / "notes.json").write_text(json.dumps(lines), "utf-8")
    np.save(folder / "borders.npy", np.array(borders, dtype=np.int64))
    np.save(folder / "counts.npy", counts)
    (folder / "temperatures.json").write_text(
        json.dumps(sorted(temperatures, key=lambda t: (t is None, t or 0.0))), "utf-8"
    )
    (folder / "laws.json").write_text(f"[{', '.join(sorted(laws))}]", "utf-8")
    if pictures is not None:
        as_bytes = [name.encode() for name in names]
        np.save(folder / "names.npy", np.frombuffer(b"".join(as_bytes), dtype=np.uint8))
        np.save(folder / "name_borders.npy", np.cumsum([0, *map(len, as_bytes)]))
        np.save(folder / "picture_borders.npy", np.array(of_row, dtype=np.int64))
