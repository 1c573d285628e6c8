"""The drafter directory: exact keys, shapes and dtypes, bit-identical reload, and one clear line for everything else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, load_speculators, save_drafter, save_speculators
from tests.conftest import tiny_head, tiny_target
from tests.test_heads import packed


@pytest.fixture
def saved(tmp_path, target, head):
    return save_drafter(head, tmp_path / "drafter", {"target": "tiny"})


@pytest.mark.parametrize("draft_vocab", [40, None])
def test_reload_gives_identical_logits(tmp_path, target, draft_vocab):
    head = tiny_head(target, draft_vocab)
    for parameter in head.parameters():  # what is stored is bf16
        parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = save_drafter(head, tmp_path / "drafter", {"target": "tiny"})
    again, features = load_drafter(folder, target.embedding, target.layers), packed(target, head)
    for (rows, a), (same, b) in zip(head.unroll(features, 3), again.unroll(features, 3)):
        assert torch.equal(rows, same) and torch.equal(head.logits(a), again.logits(b))
    assert ("d2t" in load_file(folder / "model.safetensors")) == (draft_vocab is not None)


@pytest.mark.parametrize("draft_vocab", [40, None])
def test_speculators_directory_gives_identical_logits(tmp_path, target, draft_vocab):
    head = tiny_head(target, draft_vocab)
    for parameter in head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = save_speculators(head, tmp_path / "spec", "some/target", "LlamaForCausalLM", 3)
    again, features = load_speculators(folder, target.embedding), packed(target, head)
    for (_, a), (_, b) in zip(head.unroll(features, 3), again.unroll(features, 3)):
        assert torch.equal(head.logits(a), again.logits(b))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert "model_type" not in config and config["norm_before_residual"] is False and config["architectures"] == ["Eagle3Speculator"]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert "layers.0.self_attn.q_proj.weight" in tensors and not any(k.startswith("midlayer") for k in tensors)
    with pytest.raises(UserError, match="exists"):
        save_speculators(head, folder, "some/target", "LlamaForCausalLM", 3)
    (folder / "config.json").write_text(json.dumps({**config, "norm_before_residual": None}))
    with pytest.raises(UserError, match="norm_before_residual: found None, expected false"):
        load_speculators(folder, target.embedding)


def test_directory_is_what_the_engines_read(saved, head, target):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "draftsmith.json", "model.safetensors"]
    config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / "model.safetensors")
    n = target.layers
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert config["vocab_size"] == 61 and config["draft_vocab_size"] == 40 and config["tie_word_embeddings"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, n // 2, n - 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, n // 2 - 1, n - 4]
    assert config["max_position_embeddings"] == target.context_length and config["rope_theta"] == 10000.0
    assert {k for k in tensors if not k.startswith("midlayer.")} == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool and tensors["fc.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["d2t"] + torch.arange(40), head.ids) and torch.equal(tensors["t2d"].nonzero().flatten(), head.ids)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)


def change_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return apply


def change_config(**changes):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key) if value is None else config.update({key: value})
        (folder / "config.json").write_text(json.dumps(config))
    return apply


@pytest.mark.parametrize(("damage", "message"), [
    (change_tensors(lambda t: t.pop("fc.weight")), "fc.weight: missing"),
    (change_tensors(lambda t: t.update(extra=torch.zeros(2))), "extra: unknown key"),
    (change_tensors(lambda t: t.update({"norm.weight": torch.zeros(3)})), r"norm.weight: found \(3,\), expected \(32,\)"),
    (change_tensors(lambda t: t.update(d2t=t["d2t"] + torch.arange(40))), "d2t"),
    (change_tensors(lambda t: t.update(t2d=~t["t2d"])), "t2d"),
    (change_config(architectures=["LlamaForCausalLM"]), "architectures: found"),
    (change_config(head_dim=None), "head_dim: missing"),
    (change_config(vocab_size=99), "vocab_size: found 99, expected the target's 61"),
    (change_config(hidden_size=64), "hidden_size: found 64, expected the target's 32"),
    (change_config(eagle_aux_hidden_state_layer_ids=[2, 3, 9]), r"found \[2, 3, 9\], expected ascending numbers from 1 to 6"),
    (change_config(eagle_aux_hidden_state_layer_ids=[3, 3, 4]), "expected ascending"),
    (change_config(norm_before_residual=True), "norm_before_residual: found True, expected false"),
    (change_tensors(lambda t: t.update(t2d=t["t2d"].long())), "t2d: found torch.int64, expected torch.bool"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "model.safetensors").write_bytes(b"xx"), "cannot be read"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
])
def test_damaged_directories_are_refused(saved, target, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message):
        load_drafter(saved, target.embedding, target.layers)


def test_failed_save_leaves_the_old_drafter(saved, target):
    before = (saved / "model.safetensors").read_bytes()
    broken = tiny_head(target, 40)
    broken.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError):
        save_drafter(broken, saved, {})
    assert (saved / "model.safetensors").read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def test_saving_again_replaces(saved, target):
    other = tiny_head(tiny_target(), 40, seed=9)
    save_drafter(other, saved, {})
    assert torch.equal(load_drafter(saved, target.embedding).fc.weight, other.fc.weight.to(torch.bfloat16).float())
