"""Features of a step's rows: computed by the target, or read back from disk after the first epoch.

The cache holds one entry a row: the taps of all its tokens (the drafter attends to the prompt too) and the final states
at supervised rows only; logits are recomputed from them. Everything is stored in the target's own
precision, so that a run that is resumed computes what one that was never killed computes. Shards are safetensors files,
complete or invisible, with a SHA-256 beside them.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from draftsmith.models.errors import ProcessError, UserError
from draftsmith.models.features import FeatureSpec, Teacher, TrainingFeatures
from draftsmith.models.files import usual_modes
from draftsmith.train.data import Rows
from draftsmith.train.pictures import Pictures

SHARD = 256 * 2**20  # bytes of features after which a shard is written
CONVENTION = (
    "index into Hugging Face hidden_states: 0 = embeddings, k = the state entering layer k, last = after the final norm"
)


def bytes_needed(rows: Rows, spec: FeatureSpec, width: int, item: int) -> int:
    """Disk that the cache of all rows takes: width is the target's hidden size, item its bytes per number."""
    return (len(rows.tokens) * len(spec.taps) + int(rows.mask.sum())) * width * item


class Online:
    """Every step's features come from the target. pictures: reads those of the rows; None for rows of text.

    Raises UserError for rows with pictures and nothing that reads them: a drafter would learn from a blind target.
    """

    def __init__(self, target, rows: Rows, spec: FeatureSpec, pictures: Pictures | None = None):
        if pictures is None and rows.seen:
            raise UserError(f"{rows.folder}: found rows with pictures, expected text alone (no processor was given)")
        self.target, self.rows, self.spec, self.pictures = target, rows, spec, pictures

    def __call__(self, numbers: list[int]) -> TrainingFeatures:
        tokens, packing = self.rows.pack(numbers)
        images = [self.pictures.pixels(self.rows.images(n)) for n in numbers] if self.rows.seen else None
        return self.target.features(tokens.to(self.target.device), packing, self.spec, images)

    def flush(self) -> None:
        """Nothing waits to be written."""

    def refresh(self) -> None:
        """Nothing can have come."""


def check_cached(spec: FeatureSpec) -> None:
    """Raises UserError for a head whose features no cache holds."""
    if spec.probe is not None:
        raise UserError("data.features: found cached, expected online with a probe (its states change as it learns)")
    if spec.rows == "text" or spec.columns or spec.middle:
        raise UserError(
            "data.features: found cached, expected online for this head (the cache holds taps and final states "
            "of all rows only)"
        )


class Cached:
    """The same, kept on disk: rows whose entries were there at the last `refresh` are read, others computed and
    written.

    All processes share `folder`; a row that another machine holds is computed again. Raises UserError when the disk is
    too small or a file is not what was written.
    """

    def __init__(self, target, rows: Rows, spec: FeatureSpec, folder: Path, rank: int, report=print):
        check_cached(spec)
        if rows.seen:
            raise UserError("data.features: found cached, expected online for rows with pictures")
        self.online, self.folder, self.rank = Online(target, rows, spec), folder, rank
        self.header = {
            "version": 1,
            **target.identity,
            "taps": list(spec.taps),
            "convention": CONVENTION,
            "rows": rows.key,
            "dtype": str(target.dtype).removeprefix("torch."),
        }
        self.entries: dict[int, str] = {}
        self.open: dict[str, object] = {}
        self.waiting: dict[str, torch.Tensor] = {}
        self.size = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._check_header()
        self.refresh()
        if rank == 0 and not self.entries:
            needed, free = (
                bytes_needed(rows, spec, target.config.hidden_size, target.dtype.itemsize),
                shutil.disk_usage(folder).free,
            )
            report(f"cached features will take {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free at {folder}")
            if needed > free:
                raise UserError(
                    f"data.features: cached needs {needed / 1e9:.2f} GB, found {free / 1e9:.2f} GB free at {folder}; "
                    "expected more, or data.features online"
                )

    def _check_header(self) -> None:
        place = self.folder / "header.json"
        if not place.is_file():
            partial = self.folder / f".header-{self.rank}"
            partial.write_text(json.dumps(self.header, indent=1))
            partial.replace(place)
        found = json.loads(place.read_text("utf-8"))
        different = [k for k in self.header if found.get(k) != self.header[k]]
        if different:
            raise UserError(
                f"{place}: {different[0]}: found {found.get(different[0])!r}, expected {self.header[different[0]]!r}; "
                "remove the folder or choose another output"
            )

    def refresh(self) -> None:
        """Takes in all complete shards, of every process."""
        for note in sorted(self.folder.glob("shard-*.json")):
            if note.stem not in self.open:
                listed = json.loads(note.read_text("utf-8"))
                self.open[note.stem] = listed["sha256"]
                self.entries |= dict.fromkeys(listed["rows"], note.stem)

    def _shard(self, name: str):
        """The opened shard; checked against its hash when it is opened."""
        if isinstance(self.open[name], str):
            place = self.folder / f"{name}.safetensors"
            if not place.is_file() or _sha256(place) != self.open[name]:
                raise UserError(
                    f"{place}: missing or not what was written (SHA-256 differs); remove {self.folder} to compute "
                    f"the features anew"
                )
            self.open[name] = safe_open(place, "pt")
        return self.open[name]

    def holds(self, numbers: list[int]) -> bool:
        return all(n in self.entries for n in numbers)

    def __call__(self, numbers: list[int]) -> TrainingFeatures:
        if self.holds(numbers):
            return self._read(numbers)
        features = self.online(numbers)
        self._keep(numbers, features)
        return features

    def _read(self, numbers: list[int]) -> TrainingFeatures:
        target = self.online.target
        tokens, packing = self.online.rows.pack(numbers)
        get = lambda n, what: self._shard(self.entries[n]).get_tensor(f"{n}.{what}")  # noqa: E731
        hidden = torch.cat([get(n, "hidden") for n in numbers])
        final = torch.cat([get(n, "final") for n in numbers])
        return TrainingFeatures(
            tokens.to(target.device),
            hidden.to(target.device),
            packing,
            Teacher(final.to(target.device), target.project),
        )

    def _keep(self, numbers: list[int], features: TrainingFeatures) -> None:
        hidden, final, packing = features.hidden.cpu(), features.teacher.final.cpu(), features.packing
        supervised = packing.rows + 1
        for n, start, stop in zip(numbers, packing.borders, packing.borders[1:]):
            if n not in self.entries:
                self.waiting[f"{n}.hidden"] = hidden[start:stop].clone()
                self.waiting[f"{n}.final"] = final[(supervised >= start) & (supervised < stop)]
                self.size += sum(self.waiting[f"{n}.{what}"].nbytes for what in ("hidden", "final"))
        if self.size > SHARD:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one more shard."""
        if not self.waiting:
            return
        name = f"shard-{self.rank}-{sum(1 for _ in self.folder.glob(f'shard-{self.rank}-*.json'))}"
        place, note = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        partial = self.folder / f".{name}"
        try:
            save_file(self.waiting, partial)
        except SafetensorError as error:
            raise ProcessError(f"{place}: cannot be written ({' '.join(str(error).split())[:200]})") from None
        usual_modes(partial)
        numbers = sorted({int(key.split(".")[0]) for key in self.waiting})
        listed = json.dumps({"sha256": _sha256(partial), "rows": numbers})
        partial.replace(place)
        (self.folder / f".{name}.json").write_text(listed)
        (self.folder / f".{name}.json").replace(note)
        self.waiting, self.size = {}, 0


def _sha256(place: Path) -> str:
    digest = hashlib.sha256()
    with place.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
