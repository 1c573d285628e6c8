"""The HiViS directory: the authors' keys, bit-equal reloading, and biases."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, save_drafter
from tests.models.heads.test_hivis import BIASES, hivis_head
from tests.tiny_vision import tiny_vision


def test_a_directory_has_the_authors_keys_and_reloads_bit_equal(tmp_path):
    target = tiny_vision("qwen2_5_vl")
    head = hivis_head(target, "qwen2_5_vl", positions="original")
    save_drafter(head, tmp_path / "own", {}, torch.float32)
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"embed_tokens", "fc", "residual", "layers"} and tensors[
        "residual"
    ].shape == (3, 32)
    again = load_drafter(tmp_path / "own", target.shared)
    assert again.config == head.config and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values(), strict=True)
    )
    tensors["adaptive_embedding"] = tensors.pop("residual")[:2].contiguous()
    save_file(tensors, tmp_path / "own" / "model.safetensors")
    config = (tmp_path / "own" / "config.json").read_text().replace("HivisLlama", "LlamaForCausalLM")
    (tmp_path / "own" / "config.json").write_text(config)
    older = load_drafter(tmp_path / "own", target.shared)
    assert older.config.residuals == 2 and torch.equal(older.residual, head.residual[:2])
    tensors["adaptive_embedding"] = torch.zeros(2, 31)
    save_file(tensors, tmp_path / "own" / "model.safetensors")
    with pytest.raises(UserError, match="residual"):
        load_drafter(tmp_path / "own", target.shared)


def test_a_directory_with_biases_needs_no_word_and_one_with_a_word_needs_them(tmp_path):
    """The authors' Qwen heads."""
    target = tiny_vision("qwen2_5_vl")
    head = hivis_head(target, "qwen2_5_vl")
    folder = save_drafter(head, tmp_path / "own", {}, torch.float32)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert {*BIASES} <= {*tensors} and config.pop("qkv_bias") is True
    (folder / "config.json").write_text(json.dumps(config))
    again = load_drafter(folder, target.shared)
    assert again.config.qkv_bias and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values(), strict=True)
    )
    for word, change, message in (
        (False, {}, "bias: unknown key"),
        (True, {BIASES[1]: None}, "k_proj.bias: missing"),
        (True, {BIASES[2]: torch.zeros(3)}, r"v_proj.bias: found \(3,\), expected \(16,\)"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"qkv_bias": word}))
        save_file(
            {name: value for name, value in (tensors | change).items() if value is not None},
            folder / "model.safetensors",
        )
        with pytest.raises(UserError, match=message):
            load_drafter(folder, target.shared)
