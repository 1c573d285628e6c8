"""EAGLE-1/2 and HASS directories: exact keys, bit-identical reload, what each engine needs, the authors' own, and one
clear line for everything else.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.launch.export import export_drafter, import_drafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, save_drafter
from tests.models.formats.test_formats import change_config, change_tensors
from tests.models.heads.test_eagle import eagle_head


def stored_in_bf16(head):
    return head.to(torch.bfloat16).float()


def same(a, b) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture
def drafter(tmp_path, target):
    target.model.to(torch.bfloat16).save_pretrained(tmp_path / "target")
    target.model.float()
    return save_drafter(stored_in_bf16(eagle_head(target)), tmp_path / "drafter", {"target": str(tmp_path / "target")})


PARTS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj post_attention_layernorm"
)
LAYER = {f"layers.0.{name}.weight" for name in PARTS.split()}


@pytest.mark.parametrize("bias", [True, False])
def test_directory_is_what_the_engines_read(tmp_path, target, bias):
    """formats.md 3.2: no input norm, no final norm, no output head; SGLang always has a bias, vLLM never."""
    head = stored_in_bf16(eagle_head(target, bias=bias))
    target.model.save_pretrained(tmp_path / "target")
    folder = save_drafter(head, tmp_path / "drafter", {"target": str(tmp_path / "target")})
    same(head, load_drafter(folder, target.shared))
    said, config, tensors = (
        [],
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    assert (
        set(tensors) == LAYER | {"fc.weight", "fc.bias"}
        and tensors["fc.weight"].shape == (32, 64)
        and bool(tensors["fc.bias"].any()) == bias
    )
    assert (
        config["architectures"] == ["LlamaForCausalLMEagle"]
        and config["model_type"] == "llama"
        and config["num_hidden_layers"] == 1
    )
    assert (
        config["vocab_size"] == 61
        and "draft_vocab_size" not in config
        and config["bias"] == bias
        and config["tie_word_embeddings"] is False
    )
    same(head, load_drafter(export_drafter(folder, tmp_path / "sglang", "sglang", report=said.append), target.shared))
    assert "--speculative-algorithm EAGLE " in said[0]
    if bias:
        with pytest.raises(UserError, match="head.bias: found true, expected false .vLLM"):
            export_drafter(folder, tmp_path / "vllm", "vllm")
        assert not (tmp_path / "vllm").exists()
        return
    out = export_drafter(folder, tmp_path / "vllm", "vllm", report=said.append)
    same(head, load_drafter(out, target.shared))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert set(load_file(out / "model.safetensors")) == LAYER | {"fc.weight"} and any(
        '"method": "eagle"' in line for line in said
    )


def test_every_missing_tensor_is_refused(drafter, target):
    whole = load_file(drafter / "model.safetensors")
    for name in whole:
        save_file({k: v for k, v in whole.items() if k != name}, drafter / "model.safetensors")
        with pytest.raises(UserError, match=f"{name}: missing"):
            load_drafter(drafter, target.shared)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(61, 32)})), "lm_head.weight: unknown key"),
        (
            change_tensors(lambda t: t.update({"layers.0.input_layernorm.weight": torch.zeros(32)})),
            "input_layernorm.weight: unknown key",
        ),
        (
            change_tensors(lambda t: t.update({"embed_tokens.weight": torch.zeros(61, 32)})),
            "embed_tokens.weight: 61 of 61 rows differ from the target's",
        ),
        (
            change_tensors(lambda t: t.update({"fc.weight": torch.zeros(32, 96)})),
            r"fc.weight: found \(32, 96\), expected \(32, 64\)",
        ),
        (change_config(bias=False), "fc.bias: unknown key"),
        (change_config(qkv_bias=True), "qkv_bias: found True, expected false"),
        (change_config(add_para_norm=True), "add_para_norm: found True, expected false"),
        (change_config(vocab_size=99), "vocab_size: found 99, expected the target's 61"),
        (change_config(hidden_size=64), "hidden_size: found 64, expected the target's 32"),
        (change_config(intermediate_size=None), "intermediate_size: missing"),
    ],
)
def test_damaged_directories_are_refused(drafter, target, damage, message):
    damage(drafter)
    with pytest.raises(UserError, match=message) as caught:
        load_drafter(drafter, target.shared)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("says_bias", [True, False])
def test_the_authors_directories_become_drafters(drafter, target, tmp_path, says_bias):
    """A pickle with the embedding, LlamaForCausalLM, legacy rope fields, a shorter context; older ones do not mention
    the bias that they have.
    """
    head, embedding = load_drafter(drafter, target.shared), target.embedding.detach().to(torch.bfloat16)
    torch.save(
        load_file(drafter / "model.safetensors") | {"embed_tokens.weight": embedding}, drafter / "pytorch_model.bin"
    )
    (drafter / "model.safetensors").unlink()
    (drafter / "draftsmith.json").unlink()
    change_config(
        architectures=["LlamaForCausalLM"],
        head_dim=None,
        rope_parameters=None,
        max_position_embeddings=128,
        **({} if says_bias else {"bias": None}),
    )(drafter)
    out = import_drafter(str(drafter), tmp_path / "in", str(tmp_path / "target"), pickle=True)
    same(head, load_drafter(out, target.shared))
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 256
