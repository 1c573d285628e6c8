"""Targets that are broken, quantised or of another form: each is refused in one line, before any row is read."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.targets import TextTarget, describe
from draftsmith.models.targets.weights import Weights, checkpoint_bytes
from draftsmith.train.estimate import estimate
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import tiny_target
from tests.tiny_gguf import write_gguf

UP = "model.layers.5.mlp.up_proj.weight"
WIDE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4}


def config(**changes):
    """Values of config.json; those of None are taken out."""

    def change(folder: Path):
        found = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def tensors(edit):
    def change(folder: Path):
        found = load_file(folder / "model.safetensors")
        save_file(edit(found) or found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def quantised(method: str, **more):
    return config(quantization_config={"quant_method": method, **more})


def other(family):
    """A model of a family that has no place here."""

    def change(folder: Path):
        hf.AutoModelForCausalLM.from_config(family).save_pretrained(folder)

    return change


def shards(folder: Path):
    """An index that names a second file, which is not there."""
    keys = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {key: f"model-0000{1 + (key == UP)}-of-00002.safetensors" for key in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def torn(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickled(edit=lambda t: None):
    """The weights as `pytorch_model.bin` alone."""

    def change(folder: Path):
        found = load_file(folder / "model.safetensors")
        torch.save(edit(found) or found, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return change


def adapter(alone: bool):
    def change(folder: Path):
        if alone:
            (folder / "config.json").unlink()
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')

    return change


class Code:
    def __reduce__(self):
        return print, ("code of a pickle is run",)


BROKEN = {
    "an untied head that is not there": (
        tensors(lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}),
        "lm_head.weight: missing (tie_word_embeddings is false)",
    ),
    "a tensor that is not there": (tensors(lambda t: {k: v for k, v in t.items() if k != UP}), f"{UP}: missing"),
    "a tensor of another shape": (
        tensors(lambda t: {**t, UP: t[UP][:47].clone()}),
        f"{UP}: found (47, 32), expected (48, 32)",
    ),
    "a layer too many": (
        tensors(lambda t: {**t, UP.replace("5", "99"): t[UP].clone()}),
        f"{UP.replace('5', '99')}: unknown key",
    ),
    "keys below another name": (
        tensors(lambda t: {f"module.{k}": v for k, v in t.items()}),
        "found 132 differences from the 66 expected keys: lm_head.weight: missing",
    ),
    "fewer layers than the config says": (config(num_hidden_layers=9), "found 18 differences from the 84 expected"),
    "half a file": (torn, "cannot be loaded"),
    "a shard that is not there": (shards, "model-00002-of-00002.safetensors"),
    "an adapter without its base": (
        adapter(alone=True),
        "adapter_config.json, an adapter of some/base, expected a whole",
    ),
    "an adapter beside a model": (adapter(alone=False), "found adapter_config.json, an adapter of some/base"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "found no weights (config.json, generation_config.json), expected model.safetensors",
    ),
    "weights of another library": (
        lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
        "tf_model.h5), expected model.safetensors",
    ),
    "a pickle without a tensor": (pickled(lambda t: {k: v for k, v in t.items() if k != UP}), f"{UP}: missing"),
    "a pickle with another shape": (
        pickled(lambda t: {**t, UP: t[UP][:47].clone()}),
        f"{UP}: found (47, 32), expected (48, 32)",
    ),
    "a pickle of code": (pickled(lambda t: {**t, "code": Code()}), "cannot be loaded"),
    "no pickle": (
        lambda folder: (pickled()(folder), (folder / "pytorch_model.bin").write_bytes(b"torn")),
        "cannot be loaded",
    ),
    "code of its own": (
        config(model_type="oracle", auto_map={"AutoConfig": "configuration_oracle.OracleConfig"}),
        "cannot be loaded",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    "an unknown model": (config(model_type="oracle"), "cannot be loaded"),
    "GPTQ": (quantised("gptq", bits=4, group_size=128), "is quantised (gptq 4 bit): "),
    "AWQ": (quantised("awq", bits=4, group_size=128, zero_point=True), "is quantised (awq 4 bit): "),
    "compressed-tensors": (
        quantised("compressed-tensors", format="pack-quantized"),
        "is quantised (compressed-tensors",
    ),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "is quantised (bitsandbytes 4 bit): "),
    "torchao": (quantised("torchao"), "is quantised (torchao): "),
    "FP8 of FBGEMM": (quantised("fbgemm_fp8"), "is quantised (fbgemm_fp8): "),
    "an unknown way of quantising": (
        quantised("folded"),
        "quantization_config.quant_method: found 'folded', expected one of ",
    ),
    "a way of quantising without a name": (
        config(quantization_config={"bits": 4}),
        "quant_method: found None, expected",
    ),
    "GPT-2": (other(hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=8, n_head=4)), "gpt2 is not supported"),
    "BLOOM": (other(hf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=8, n_head=4)), "bloom is not supported"),
    "GPT-NeoX": (other(hf.GPTNeoXConfig(**WIDE, intermediate_size=48)), "gpt_neox is not supported"),
}
PACKAGES = {  # what the line names, where the package is not installed
    "GPTQ": "optimum",
    "AWQ": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "target"
    tiny_target().model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "target"))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_or_quantised_target_is_refused_by_name(kind, copied):
    change, message = BROKEN[kind]
    package = PACKAGES.get(kind, "")
    if package and find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    change(copied)
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError) as caught:
            look(copied)
        line = str(caught.value)
        assert line.startswith(f"target {copied}: ") and "\n" not in line
        assert message in line and package in line, line


def tied(folder: Path):
    tiny_target(tie_word_embeddings=True).model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


WHOLE = {
    "as it was saved": lambda folder: None,
    "a pickle alone": pickled(),
    "a tied head, stored once": tied,
    "a buffer of older checkpoints": tensors(
        lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
    "a tied head, without the name of the whole": lambda folder: (
        tied(folder),
        tensors(lambda t: {k.removeprefix("model."): v for k, v in t.items()})(folder),
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_checkpoint_that_lacks_nothing_is_loaded(kind, copied):
    WHOLE[kind](copied)
    assert describe(copied).weights is None
    file = copied / "model.safetensors"
    stored = load_file(file) if file.is_file() else torch.load(copied / "pytorch_model.bin", weights_only=True)
    loaded = TextTarget.load(copied).model.state_dict()
    for key, value in stored.items():
        if not key.endswith("inv_freq"):
            assert torch.equal(loaded[key if key in loaded else f"model.{key}"], value), key


def fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Packs the linear layers of a checkpoint in blocks of 8 x 8 with a scale each; what is stored then."""
    stored, scale, packed = load_file(folder / "model.safetensors"), torch.arange(1, 25) / 64, {}
    for key, value in stored.items():
        if "_proj" not in key:
            packed[key] = value
            continue
        blocks = value.size(0) // 8, value.size(1) // 8
        packed[key] = (8 * value).to(torch.float8_e4m3fn)
        packed[f"{key}_scale_inv"] = scale[: blocks[0] * blocks[1]].view(blocks).clone()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    quantised("fp8", activation_scheme="dynamic", weight_block_size=[8, 8])(folder)
    return packed


def test_fp8_weights_are_dequantised_where_no_accelerator_multiplies_them(copied):
    """Blocks of 8 x 8 with a scale each: what is loaded is number times scale, exactly."""
    packed = fp8(copied)
    described = describe(copied)
    assert described.weights == Weights(None, "fp8") and described.stored is None
    loaded = TextTarget.load(copied)
    assert loaded.weights == described.weights and loaded.dtype == torch.float32
    for key, value in loaded.model.state_dict().items():
        scales = packed.get(f"{key}_scale_inv")
        want = packed[key].float()
        if scales is not None:
            want = want * scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert torch.equal(value, want), key


SCALE = UP + "_scale_inv"
PACKED = {
    "a weight that is not there": (lambda t: {k: v for k, v in t.items() if k != UP}, f"{UP}: missing"),
    "a scale that is not there": (
        lambda t: {k: v for k, v in t.items() if k != SCALE},
        f"{UP}: found 8-bit floats without a scale",
    ),
    "no scale at all": (
        lambda t: {k: v for k, v in t.items() if not k.endswith("_scale_inv")},
        "found 49 differences from the 66 expected keys: model.layers.0.mlp.down_proj.weight: found 8-bit floats",
    ),
    "fewer scales than blocks": (
        lambda t: {**t, SCALE: t[SCALE][:5].clone()},
        f"{SCALE}: found (5, 4), expected (6, 4), a scale for each block of weight_block_size (8, 8) of (48, 32)",
    ),
    "scales of larger blocks": (
        lambda t: {**t, SCALE: t[SCALE][::2, ::2].clone()},
        f"{SCALE}: found (3, 2), expected (6, 4)",
    ),
    "scales of smaller blocks": (
        lambda t: {**t, SCALE: t[SCALE].repeat_interleave(2, 0)},
        f"{SCALE}: found (12, 4), expected (6, 4)",
    ),
    "scales the other way round": (
        lambda t: {**t, SCALE: t[SCALE].T.contiguous()},
        f"{SCALE}: found (4, 6), expected (6, 4)",
    ),
    "one scale for all": (
        lambda t: {**t, SCALE: t[SCALE][0, 0].clone()},
        f"{SCALE}: found (), expected (6, 4)",
    ),
    "a layer too many": (
        lambda t: {**t, **{key.replace("5", "99"): t[key].clone() for key in (UP, SCALE)}},
        f"{UP.replace('5', '99')}: unknown key",
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_checkpoint_that_lacks_something_is_refused_before_its_numbers_are_read(kind, copied):
    """transformers takes 8-bit floats that have no scale for the weights themselves, eight times as large here."""
    change, message = PACKED[kind]
    save_file(change(fp8(copied)), copied / "model.safetensors", metadata={"format": "pt"})
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError) as caught:
            look(copied)
        line = str(caught.value)
        assert line.startswith(f"target {copied}: ") and message in line and "\n" not in line, line


BLOCKS = {
    "larger": ([16, 8], "down_proj.weight_scale_inv: found (4, 6), expected (2, 6), a scale for each block of"),
    "smaller": ([4, 4], "down_proj.weight_scale_inv: found (4, 6), expected (8, 12)"),
    "no blocks": (None, "down_proj.weight_scale_inv: found (4, 6), expected one scale: weight_block_size is null"),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_config_of_other_blocks_than_the_scales_are_for_is_refused(kind, copied):
    """Any of them divides the weights, so that transformers would take the scales as they come."""
    size, message = BLOCKS[kind]
    fp8(copied)
    quantised("fp8", activation_scheme="dynamic", weight_block_size=size)(copied)
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError) as caught:
            look(copied)
        assert message in str(caught.value), caught.value


def test_blocks_that_do_not_fill_a_weight_are_refused_where_it_is_dequantised(copied):
    """48 rows in blocks of 32: the second block is half a one, and transformers would make two of 24."""
    packed = fp8(copied)
    packed = {
        key: value[: -(-value.size(0) // 4), : -(-value.size(1) // 4)].clone() if key.endswith("_scale_inv") else value
        for key, value in packed.items()
    }
    save_file(packed, copied / "model.safetensors", metadata={"format": "pt"})
    quantised("fp8", activation_scheme="dynamic", weight_block_size=[32, 32])(copied)
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError, match=r"down_proj.weight: found \(32, 48\), expected multiples of weight_block"):
            look(copied)


def test_a_weight_smaller_than_a_block_has_one_scale(copied):
    packed = fp8(copied)
    packed = {key: value[:1, :1].clone() if key.endswith("_scale_inv") else value for key, value in packed.items()}
    save_file(packed, copied / "model.safetensors", metadata={"format": "pt"})
    quantised("fp8", activation_scheme="dynamic", weight_block_size=[128, 128])(copied)
    assert describe(copied).weights == Weights(None, "fp8")
    assert torch.equal(TextTarget.load(copied).model.state_dict()[UP], packed[UP].float() * packed[SCALE].float())


def test_a_packing_that_stays_is_refused_without_its_scales(copied):
    """BitNet's numbers are unpacked as they are used, so that its scales are tensors of the model."""
    quantised("bitnet")(copied)
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError, match="model.layers.0.mlp.down_proj.weight_scale: missing"):
            look(copied)


COMMANDS = {"train": [], "--dry-run": ["--dry-run"]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["GPTQ", "an untied head that is not there", "GPT-2", "a GGUF file without its end"])
def test_training_is_refused_before_any_row_is_prepared(kind, command, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    target = Path(shutil.copytree(folder / "target", tmp_path / "target"))
    if kind.startswith("a GGUF"):
        target = write_gguf(tmp_path / "tiny.gguf", tiny_target(vocab=320, intermediate_size=64).model, None)
        target.write_bytes(target.read_bytes()[:9000])
        message = "cannot be read as GGUF"
    else:
        change, message = BROKEN[kind]
        change(target)
    out = tmp_path / "out"
    assert main([str(folder / "recipe.yaml"), f"target={target}", f"output={out}", *COMMANDS[command]]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"target {target}: " in lines[0] and message in lines[0], lines
    assert not out.exists()


def test_a_dry_run_counts_the_bytes_of_weights_that_stay_packed(folder, tmp_path):
    """As they lie on disk, whatever the shapes say."""
    target = Path(shutil.copytree(folder / "target", tmp_path / "target"))
    recipe = read_recipe(folder / "recipe.yaml", DrafterRecipe, [f"target={target}"])
    described = describe(target)
    memory = lambda described: estimate(recipe, described, 1, torch.device("cpu"), None, timed=False).memory  # noqa: E731
    size = checkpoint_bytes(str(target))
    assert size == (target / "model.safetensors").stat().st_size
    assert memory(described)["target"] < size + 100_000 and memory(replace(described, stored=size // 8)) == {
        **memory(described),
        "target": size // 8,
    }
