"""What the layouts of drafter directories share: the description of one, reading files, the full check, writing all or
nothing.

Neither vLLM nor SGLang reports a missing key (the parameter stays uninitialised) and vLLM refuses an unknown one, so
every key, shape and dtype is checked here, before use and after writing. What only draftsmith reads stands in
draftsmith.json.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from draftsmith.models.errors import UserError, differing_keys
from draftsmith.models.features import Shared
from draftsmith.models.files import usual_modes
from draftsmith.models.targets import Weights

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Serving:
    """What an engine is told beside the weights: the verifier (Hub id or directory), its architecture, and how many
    tokens to draft.
    """

    verifier: str
    architecture: str
    depth: int


def as_stored(stored: "Stored", layers: int | None, taps: str | None) -> tuple[dict, Tensors, list[str]]:
    """`Layout.mend` where there is nothing to mend."""
    return stored.config, stored.tensors, []


@dataclass(frozen=True)
class Layout:
    """One way to store one kind of head.

    head: its class. engines: {name for `export --to`: command that serves it}, with `$drafter`, `$target` and `$depth`
    in it. recognises(config.json) -> whether a directory is of this layout. read(config, tensors, shared, taps_below,
    folder) -> head; raises UserError for whatever is missing, unknown or of another target. write(head, dtype, serving)
    -> (config.json, tensors). The first layout of a head is the one that drafters are kept in; it needs no serving.
    holds(tensors) -> whether they are those of its head, whatever the configuration says; of several layouts of one
    head the configuration decides. mend(stored, layers of the target or None, convention of `taps` or None) -> (config,
    tensors, lines): what `read` is given, with a line for each contradiction that was mended; raises UserError for what
    cannot be decided. unable(head, engine): what of this head an engine would not compute, None where it does.
    described: whether the engines want the verifier named in config.json, so that an export is given `Serving`.
    """

    head: type
    engines: dict[str, str]
    recognises: Callable[[dict], bool]
    read: Callable[[dict, Tensors, Shared, int | None, Path], torch.nn.Module]
    write: Callable[[torch.nn.Module, torch.dtype, Serving | None], tuple[dict, Tensors]]
    described: bool = False
    holds: Callable[[Tensors], bool] = lambda tensors: False
    mend: Callable[["Stored", int | None, str | None], tuple[dict, Tensors, list[str]]] = as_stored
    unable: Callable[[torch.nn.Module, str], str | None] = lambda head, engine: None


@dataclass(frozen=True)
class Stored:
    """A directory as it was read. about: draftsmith.json, {} without one."""

    folder: Path
    config: dict
    tensors: Tensors
    about: dict

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in self.tensors.values() if t.is_floating_point()), torch.bfloat16)

    @property
    def target(self) -> str | None:
        """The target that the directory names."""
        return self.about.get("target") or (self.serving.verifier if self.serving else None)

    @property
    def serving(self) -> Serving | None:
        """What the directory tells an engine; None where the layout says nothing of it. Raises UserError for a key that
        engines need.
        """
        if "base_model_name_or_path" in self.config:  # Arctic
            return Serving(
                self.config["base_model_name_or_path"],
                (self.config.get("base_model_archs") or [""])[0],
                self.config.get("n_predict", 1),
            )
        if "speculators_config" not in self.config:
            return None
        try:
            described = self.config["speculators_config"]
            verifier = described["verifier"]
            return Serving(
                verifier["name_or_path"],
                (verifier.get("architectures") or [""])[0],
                described["proposal_methods"][0]["speculative_tokens"],
            )
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.folder}/config.json: speculators_config: {error.args[0]}: missing") from None

    def shared(self) -> Shared:
        """Without a target: the embedding stored here, or zeros (without memory) of the target's shape, for work that
        does not look at it.
        """
        layer = self.config.get("transformer_layer_config")
        flat = (layer if isinstance(layer, dict) else {}) | self.config
        width = next((name for name in ("target_hidden_size", "input_hidden_dim") if flat.get(name)), "hidden_size")
        shape = tuple(figures(flat, ("vocab_size", width), f"{self.folder}/config.json").values())
        own = self.tensors.get("embed_tokens.weight")
        return Shared(torch.zeros(1).expand(shape) if own is None else own.float())


def read_files(folder: Path, pickle: bool = False) -> Stored:
    """config.json, draftsmith.json and all *.safetensors of a directory; with `pickle` also pytorch_model.bin, as
    tensors only.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: config.json is missing; expected a drafter directory")
    config = read_json(folder / "config.json")
    about = read_json(folder / "draftsmith.json") if (folder / "draftsmith.json").is_file() else {}
    files, tensors = sorted(folder.glob("*.safetensors")), {}
    if not files and (folder / "pytorch_model.bin").is_file():
        if not pickle:
            raise UserError(
                f"{folder}: found pytorch_model.bin (a pickle), expected model.safetensors; draftsmith import "
                f"--pickle converts it"
            )
        files = [folder / "pytorch_model.bin"]
    elif not files:
        raise UserError(f"{folder}: model.safetensors is missing; expected a drafter directory")
    for file in files:
        try:
            tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except (SafetensorError, OSError, UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{folder}: {key}: found {type(value).__name__}, expected a tensor")
    return Stored(folder, config, tensors, about)


def other_weights(about: dict, target) -> str | None:
    """A line that names both, where a drafter was trained for other weights of a target than these; None where they are
    the same, or where it is not known for which it was trained. about: its draftsmith.json; target: `TextTarget`.
    """
    if about.get("weights") is None or Weights(**about["weights"]) == target.weights:
        return None
    return (
        f"found weights {target.weights or 'of no known kind'} in target {target.name}, expected the ones that the "
        f"drafter was trained for ({Weights(**about['weights'])})"
    )


def architecture(config: dict) -> str | None:
    """The first name of `architectures`."""
    found = config.get("architectures")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else None


def read_json(file: Path) -> dict:
    try:
        document = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: found {type(document).__name__}, expected a JSON object")
    return document


def figures(stored: dict, names: Sequence[str], place: str) -> dict:
    """These entries of a config.json. Raises UserError for one that is missing, or no positive number (a whole one,
    where it is no eps and no theta).
    """
    found = {}
    for name in names:
        if name not in stored:
            raise UserError(f"{place}: {name}: missing")
        value, kinds = stored[name], (int, float) if name in ("rms_norm_eps", "rope_theta") else (int,)
        if type(value) not in kinds or not value > 0:
            raise UserError(f"{place}: {name}: found {value!r}, expected a positive number")
        found[name] = value
    return found


def check_tensors(
    tensors: Tensors, shapes: dict[str, tuple[int, ...]], place: str, kinds: dict[str, torch.dtype] = {}
) -> None:
    """Raises UserError with the differences between found and expected keys, shapes and dtypes; keys outside `kinds`
    must be floating.
    """
    differences = [f"{k}: missing" for k in sorted(shapes.keys() - tensors.keys())]
    differences += [f"{k}: unknown key" for k in sorted(tensors.keys() - shapes.keys())]
    differences += [
        f"{k}: found {tuple(tensors[k].shape)}, expected {shape}"
        for k, shape in shapes.items()
        if k in tensors and tuple(tensors[k].shape) != shape
    ]
    differences += [
        f"{k}: found {v.dtype}, expected {kinds.get(k, 'a floating type')}"
        for k, v in tensors.items()
        if (v.dtype != kinds[k] if k in kinds else not v.is_floating_point())
    ]
    if differences:
        raise differing_keys(place, differences, len(shapes))


@contextmanager
def written(folder: Path, config: dict, tensors: Tensors, about: dict) -> Iterator[Path]:
    """Yields the new directory, hidden beside its place; after the block it takes the place of `folder`. An exception
    leaves all as it was. Raises OSError naming the folder where the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        try:
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
            for name, document in (("config.json", config), ("draftsmith.json", about)):
                (new / name).write_text(json.dumps(document, indent=2) + "\n")
        except (OSError, SafetensorError) as error:  # neither names the place
            raise OSError(f"{folder}: cannot be written ({' '.join(str(error).split())[:200]})") from None
        usual_modes(new)
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
