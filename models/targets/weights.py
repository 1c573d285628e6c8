"""The weights of a target: all of them, or it is refused by name; quantised ones by the package that reads them. And
which weights a target's name stood for, where that is known.

transformers starts at random what a checkpoint lacks, and leaves out what it does not know. A target is never such a
model: its own checks would all pass.
"""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import find_adapter_config_file, logging

from draftsmith.models.errors import UserError, differing_keys

MANIFEST = "weights.json"  # beside weights that were made from a GGUF file: what they were made from
FLOAT8 = ("F8_E4M3", "F8_E5M2")  # as safetensors names them; a scale may be one of F8_E8M0
UNPACKING = "conversion of the weights"  # transformers' words for it; it shows the keys in a table alone
STORED = ("*.safetensors", "pytorch_model*.bin")  # the second are read as tensors only


@dataclass(frozen=True)
class Weights:
    """sha256: of the GGUF file that they were dequantised from (None: from none); quantisation: its kind, `Q4_1` or
    `gptq 4 bit`.
    """

    sha256: str | None
    quantisation: str

    def __str__(self) -> str:
        return f"{self.quantisation}, sha256 {self.sha256[:16]}" if self.sha256 else self.quantisation


def identity_of(name: str, weights: Weights | None) -> dict:
    """What results depend on: a target's name, and the sha256 of its weights where it is known."""
    known = weights and weights.sha256
    return {"target": name} | ({"weights": known} if known else {})


def weights_of(place: str | Path, config) -> Weights | None:
    """What is known of the weights at a place (directory or Hub id); None where they are as they were trained."""
    if (manifest := Path(place) / MANIFEST).is_file():
        found = json.loads(manifest.read_text("utf-8"))
        return Weights(found["sha256"], found["quantisation"])
    found = quantisation(config)
    return None if found is None else Weights(None, kind(found))


def quantisation(config) -> dict | None:
    """The section `quantization_config` of a model's config, or of its text model's."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    return found if found is None or isinstance(found, dict) else found.to_dict()


def kind(found: dict) -> str:
    bits = found.get("bits") or (4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else None)
    return f"{found.get('quant_method', 'unknown')}{f' {bits} bit' if bits else ''}"


def quantizer_for(config, name: str, device: torch.device):
    """The quantizer of transformers for a quantised checkpoint, which found all that it needs; None for any other.
    Raises UserError that names the package that is missing, or what else it lacks.
    """
    found = quantisation(config)
    if found is None:
        return None
    from transformers.quantizers import AutoHfQuantizer  # with all model code, which takes seconds to import
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    method = found.get("quant_method")
    known = {key.removesuffix("_4bit").removesuffix("_8bit") for key in AUTO_QUANTIZER_MAPPING}
    if method not in known and not (found.get("load_in_4bit") or found.get("load_in_8bit")):
        raise UserError(
            f"target {name}: quantization_config.quant_method: found {method!r}, expected one of "
            f"{', '.join(sorted(known))}"
        )
    try:
        with quietly():
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(found), pre_quantized=True)
            quantizer.validate_environment(device_map={"": device}, weights_only=True)
    except ImportError as error:
        raise UserError(f"target {name}: is quantised ({kind(found)}): {one_line(error)}") from None
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"target {name}: cannot be run here ({kind(found)}): {one_line(error)}") from None
    return quantizer


def folder_of(place: str) -> Path | None:
    """Where the files of a place (directory or Hub id) lie on this machine; None where they do not."""
    if Path(place).is_dir():
        return Path(place)
    config = try_to_load_from_cache(place, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def checkpoint_bytes(place: str) -> int | None:
    """Of a checkpoint's weights on disk, or on the Hub; None where neither can be asked."""
    if not Path(place).is_dir():
        with suppress(HTTPError, OSError, ValueError):
            files = HfApi().model_info(place, files_metadata=True).siblings
            return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors")) or None
    folder = folder_of(place)
    return folder and (sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None)


def load_model(place: str, name: str, config, dtype: torch.dtype | None, device: torch.device):
    """The model at a place (directory or Hub id) on a device, whole. dtype: None is fp32 on a CPU and the checkpoint's
    own on an accelerator. Raises UserError for weights that are missing, of another shape, or that belong to nothing.
    """
    quantizer = quantizer_for(config, name, device)
    check_files(place, name)
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    if quantizer is not None:  # packed weights are not moved afterwards
        check_scales(place, name, quantizer)
        model = _loaded(place, name, config, dtype=dtype, device_map={"": device})
        check_scales(place, name, quantizer)  # of files that were fetched just now
        return model
    return _loaded(place, name, config, dtype=dtype).to(device)


def check_adapter(place: str, name: str) -> None:
    """Raises UserError for a place that is, or holds beside a model, a LoRA adapter: transformers would put it on the
    weights where peft is installed, and leave it out elsewhere.
    """
    adapter = base = None
    with suppress(AttributeError, OSError, ValueError):
        adapter = find_adapter_config_file(place)
        base = adapter and json.loads(Path(adapter).read_text("utf-8")).get("base_model_name_or_path")
    if adapter is not None:
        raise UserError(
            f"target {name}: found {Path(adapter).name}, an adapter of {base}, expected a whole model; merge it into "
            f"its base (peft: merge_and_unload) and save that"
        )


def check_files(place: str, name: str) -> None:
    """Raises UserError for an adapter, and for a directory without weights."""
    check_adapter(place, name)
    folder = Path(place)
    if folder.is_dir() and not any(file for pattern in STORED for file in folder.glob(pattern)):
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"target {name}: found no weights ({found}), expected model.safetensors")


def check_scales(place: str, name: str, quantizer) -> None:
    """Raises UserError for a weight of a quantised checkpoint that is stored as 8-bit floats with no scale beside it,
    or with scales of other blocks than the config's: transformers takes bare numbers for the weight, and spreads any
    scales evenly that divide it.
    """
    folder, kinds, shapes = folder_of(place), {}, {}
    try:
        for file in sorted(folder.glob("*.safetensors")) if folder else ():
            with safe_open(file, "pt") as stored:
                for key in stored.keys():
                    kinds[key], shapes[key] = (found := stored.get_slice(key)).get_dtype(), tuple(found.get_shape())
    except (OSError, SafetensorError):  # of files that cannot be read, loading says so
        return
    scaled = {key.rpartition(".")[0] for key in kinds if "scale" in key.rpartition(".")[2]}
    packed = sorted(key for key, kind in kinds.items() if kind in FLOAT8)
    differences = [
        f"{key}: found 8-bit floats without a scale" for key in packed if key.rpartition(".")[0] not in scaled
    ]
    rules = quantizer.quantization_config
    if hasattr(rules, "weight_block_size"):
        differences += [line for key in packed if (line := other_blocks(key, shapes, rules))]
    if differences:
        raise differing_keys(f"target {name}", differences, len(kinds))


def other_blocks(key: str, shapes: dict[str, tuple[int, ...]], rules) -> str | None:
    """What is wrong with the scales of a weight [..., rows, columns]: `weight_block_size` asks for one a block, the
    last blocks of a row or column may be smaller; without it one scale is for all. rules: the quantization config.
    """
    shape, grid, blocks = shapes[key], shapes.get(f"{key}_scale_inv"), rules.weight_block_size
    if grid is None:
        return None
    if blocks is None:
        what = "one scale: weight_block_size is null"
        return None if math.prod(grid) == 1 else f"{key}_scale_inv: found {grid}, expected {what}"
    sizes, blocks = shape[-2:], tuple(blocks)
    expected = *shape[:-2], *(-(-size // block) for size, block in zip(sizes, blocks))
    if grid != expected:
        what = f"a scale for each block of weight_block_size {blocks} of {shape}"
        return f"{key}_scale_inv: found {grid}, expected {expected}, {what}"
    uneven = any(size > block and size % block for size, block in zip(sizes, blocks))
    if uneven and getattr(rules, "dequantize", False):
        return (
            f"{key}: found {shape}, expected multiples of weight_block_size {blocks} (transformers would shift blocks)"
        )
    return None


def check_checkpoint(place: str, name: str, config, quantizer=None) -> None:
    """`load_model`'s checks by the names and shapes in the files alone, for a directory. What stays packed may not be
    followed without its numbers: then it is checked when it is loaded.
    """
    check_files(place, name)
    if not Path(place).is_dir():
        return
    config = copy.deepcopy(config)
    if quantizer is not None:
        check_scales(place, name, quantizer)
    if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False):
        with without_bars():
            _loaded(place, name, config, device_map="meta")
        return
    try:
        with without_bars():
            model, found = _read(place, config, device_map="meta")
    except Exception:  # as different as the packages that unpack
        return
    check_whole(model, found, name, quantised=True)


def _read(place: str, config, **options) -> tuple[torch.nn.Module, dict]:
    """The model, and what transformers says of the loading."""
    auto = AutoModelForCausalLM if getattr(config, "vision_config", None) is None else AutoModelForImageTextToText
    options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quietly():
        return auto.from_pretrained(place, trust_remote_code=False, **options)


def _loaded(place: str, name: str, config, **options) -> torch.nn.Module:
    quantised = quantisation(config) is not None  # loading may change the config
    try:
        model, found = _read(place, config, **options)
    except Exception as error:  # torn files, and pickles of other things, raise whatever their readers come across
        why = "its packed numbers and their scales do not fit together" if UNPACKING in str(error) else one_line(error)
        raise UserError(f"target {name}: cannot be loaded ({why})") from None
    check_whole(model, found, name, quantised)
    return model


def check_whole(model, found: dict, name: str, quantised: bool) -> None:
    """found: what transformers says of the loading. Keys that the class of the model ignores, tied ones and buffers
    that older checkpoints hold are not among it. A quantised checkpoint also has numbers of its own beside weights.
    """
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", True)
    why = "" if tied else " (tie_word_embeddings is false)"
    differences = [
        f"{key}: missing{why if key.startswith('lm_head.') else ''}" for key in sorted(found["missing_keys"])
    ]
    differences += [
        f"{key}: found {tuple(stored)}, expected {tuple(own)}" for key, stored, own in sorted(found["mismatched_keys"])
    ]
    modules = {part for part, _ in model.named_modules()} if quantised else set()
    differences += [
        f"{key}: unknown key" for key in sorted(found["unexpected_keys"]) if key.rpartition(".")[0] not in modules
    ]
    if differences:
        raise differing_keys(f"target {name}", differences, len(model.state_dict()))


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of transformers: what matters of them becomes one line of ours."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, for what takes no time."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
