"""GGUF files as targets: dequantised once into an ordinary directory (bf16 safetensors, config, generation config,
tokenizer, chat template), which is kept by the content of the file.

transformers reads the file. What it would read wrongly, or leave out without a word, is found here: a file becomes a
target with every tensor and figure that it holds, or it is refused in one line.
"""

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from draftsmith.models.errors import UserError
from draftsmith.models.files import usual_modes
from draftsmith.models.targets.cache import cache_root, known_hash, made_once
from draftsmith.models.targets.gguf_header import Header
from draftsmith.models.targets.weights import MANIFEST, check_whole, one_line, quietly

CONVERSION = 1  # counts up when a conversion comes to another result, which then has another place in the cache
MAGIC = b"GGUF"
NEEDED = ("gguf", "accelerate")  # by transformers
BROKEN = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError)
BROKEN = (*BROKEN, ValueError, struct.error)  # what reading a damaged or unknown file raises


def target_place(digest: str) -> Path:
    """Where the target lies that a file of this sha256 becomes."""
    return cache_root() / "targets" / f"{digest[:16]}-{CONVERSION}"


def dequantised(file: Path, name: str, say: Callable[[str], None]) -> Path:
    """The directory of the target that a GGUF file becomes, which is made where it is not there yet. name: of the
    target, for messages. Raises UserError in one line, and then leaves nothing.
    """
    with file.open("rb") as stream:
        if (found := stream.read(len(MAGIC))) != MAGIC:
            raise UserError(f"target {name}: found {found!r} at the beginning of {file}, expected {MAGIC!r} (GGUF)")
    digest = known_hash(file)
    with made_once(target_place(digest)) as new:
        if new is not None:
            convert(file, digest, new, name, say)
    return target_place(digest)


def convert(file: Path, digest: str, folder: Path, name: str, say: Callable[[str], None]) -> None:
    """Fills a folder with the target that a GGUF file of this sha256 holds."""
    say(f"{name}: dequantising {file.name} ({file.stat().st_size / 1e6:,.0f} MB) once, into {target_place(digest)}")
    check_packages(name)
    try:
        header = Header.read(file)
    except BROKEN as error:
        raise UserError(f"target {name}: {file} cannot be read as GGUF ({one_line(error)})") from None
    if (parts := header.metadata.get("split.count", 1)) > 1:
        raise UserError(
            f"target {name}: found one of {parts} parts in {file}, expected a whole file (llama-gguf-split --merge)"
        )
    free, needed = shutil.disk_usage(folder).free, 2 * sum(header.sizes.values())
    if free < needed:
        raise UserError(f"target {name}: found {free / 1e9:.1f} GB free in {folder}, expected {needed / 1e9:.1f} GB")
    where, source = f"target {name}: {file}", {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        with quietly():
            config = AutoConfig.from_pretrained(**source)
            model, found = AutoModelForCausalLM.from_pretrained(
                **source, config=config, dtype=torch.bfloat16, output_loading_info=True, **unpacked()
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except BROKEN as error:
        raise UserError(f"{where}: transformers cannot read it ({one_line(error)})") from None
    vars(model.config).pop("quantization_config", None)  # it is quantised no longer
    check_whole(model, found, f"{name}: {file}", False)
    header.check_tensors(model, where)
    if header.factors is not None:
        model.config.rope_parameters = header.llama3_rope(model.config, where)
    header.check_figures(model.config, where)
    header.fit_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, where, say)
    save(model, folder, header.end_ids)
    tokenizer.save_pretrained(folder)
    header.drop_unknown(folder / "tokenizer.json")
    made = {"sha256": digest, "quantisation": header.quantisation, "file": file.name, "conversion": CONVERSION}
    (folder / MANIFEST).write_text(json.dumps(made | {"transformers": transformers.__version__}, indent=1) + "\n")
    usual_modes(folder)


def check_packages(name: str) -> None:
    """Raises UserError where what reads GGUF files is not installed."""
    if lacking := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise UserError(
            f"target {name}: GGUF files need the package {' and '.join(lacking)}, found none "
            f"(pip install 'draftsmith[gguf]')"
        )


def unpacked() -> dict:
    """What tells newer versions of transformers to dequantise; older ones do nothing else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def save(model, folder: Path, end_ids: list[int]) -> None:
    """Writes a model that was read from GGUF as any other, in bf16. Raises RuntimeError where a tensor is not read back
    as it was.
    """
    weights = model.state_dict()
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig.from_model_config(model.config)
    if end_ids:
        plain.generation_config.eos_token_id = end_ids if len(end_ids) > 1 else end_ids[0]
    plain.save_pretrained(folder)
    stored = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                stored.add(weights[key].data_ptr())
                if not torch.equal(tensors.get_tensor(key), weights[key]):
                    raise RuntimeError(f"{key} differs after it was written")
    if lost := [key for key, value in weights.items() if value.data_ptr() not in stored]:
        raise RuntimeError(f"{', '.join(lost)} were not written")
