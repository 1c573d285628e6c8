"""Arctic directories: OWL heads key by key as ArcticInference reads them, and what ArcticTraining writes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.launch.export import export_drafter, import_drafter
from draftsmith.launch.hub import stage
from draftsmith.models.errors import UserError
from draftsmith.models.formats import arctic, load_drafter, read_files, save_drafter
from draftsmith.models.heads import OwlConfig
from tests.models.formats.test_formats import change_config, change_tensors
from tests.models.heads.test_owl import ORDER, tiny_owl


@pytest.fixture
def saved(tmp_path, target):
    """A target on disk, and a head (bf16 values) with its directory."""
    target.model.to(torch.bfloat16).save_pretrained(tmp_path / "target")
    target.model.float()
    head = tiny_owl(target)
    for parameter in head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return save_drafter(head, tmp_path / "drafter", {"target": str(tmp_path / "target")}), head


def same_weights(a, b):
    return a.config == b.config and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_arctic_directory_key_by_key(saved, target):
    folder, head = saved
    assert same_weights(load_drafter(folder, target.shared), head)
    out = export_drafter(folder, folder.parent / "out", "arctic", report=(said := []).append)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (shape, torch.bfloat16) for name, shape in arctic.expected_shapes(head.config).items()
    } and sorted(tensors) == sorted(ORDER)
    assert config == {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "method": "sum_lstm",
        "base_model_name_or_path": str(folder.parent / "target"),
        "base_model_archs": ["LlamaForCausalLM"],
        "input_hidden_dim": 32,
        "inner_dim": "24",
        "proj_dim": "24",
        "emb_dim": "24",
        "vocab_size": 61,
        "n_predict": 4,
        "n_candidates": 4,
        "top_k_tokens_per_head": [1] * 4,
        "scale_input": True,
        "tie_weights": True,
        "tie_lstm_embs": True,
        "torch_dtype": "bfloat16",
    }
    # The engine joins the gates as forget, input, output, cell: those are the rows of the head's own matrix
    joined = torch.cat([tensors[f"{gate}_proj.1.weight"] for gate in ("forget", "input", "output", "cell")])
    assert torch.equal(joined.float(), head.gates.weight)
    assert '"method": "arctic"' in said[0] and '"num_speculative_tokens": 4' in said[0] and "$" not in said[0]
    assert read_files(out).serving.architecture == "LlamaForCausalLM" and same_weights(
        load_drafter(out, target.shared), head
    )


@pytest.mark.parametrize(
    "variant",
    [
        change_tensors(
            lambda t: t.update(
                {f"{gate}_emb.0.weight": t["forget_emb.0.weight"].clone() for gate in ("input", "cell", "output")}
                | {f"head.{i}.weight": t["head.0.weight"].clone() for i in (1, 2, 3)}
            )
        ),
        change_tensors(lambda t: [t.update({f"speculator.{name}": t.pop(name)}) for name in list(t)]),
        change_config(inner_dim=24, proj_dim=[24], emb_dim="24"),
        change_config(
            architectures=["MLPVariantSpeculatorPreTrainedModel"], n_candidates=None, top_k_tokens_per_head=None
        ),
    ],
    ids=["tied copies", "prefix", "numbers", "alias"],
)
def test_arctictraining_checkpoints_become_drafters(saved, target, variant):
    folder, head = saved
    variant(folder)
    (folder / "draftsmith.json").unlink()
    out = import_drafter(str(folder), folder.parent / "in", str(folder.parent / "target"))
    assert same_weights(load_drafter(out, target.shared), head) and len(load_file(out / "model.safetensors")) == len(
        ORDER
    )
    assert json.loads((out / "draftsmith.json").read_text())["target"] == str(folder.parent / "target")


def test_alpha_comes_from_the_stored_number_of_steps(saved, target):
    folder, head = saved
    change_config(n_predict=7)(folder)
    assert load_drafter(folder, target.shared).config.alpha == OwlConfig(32, 24, 61, 7).alpha < head.config.alpha


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            change_config(vocab_size=64),
            "vocab_size: found 64, expected the target's 61",
        ),  # a padded output head of another target
        (change_config(input_hidden_dim=48), "input_hidden_dim: found 48, expected the target's 32"),
        (change_config(scale_input=False), "scale_input: found False, expected true"),
        (change_config(scale_input=None), "scale_input: found None, expected true"),
        (change_config(n_predict="4"), "n_predict: found '4', expected a positive number"),
        (change_config(n_predict=None), "n_predict: missing"),
        (
            lambda folder: [
                change_config(method="sum_rnn")(folder),
                change_tensors(lambda t: [t.pop(f"{gate}_proj.0.weight") for gate in ("forget", "cell")])(folder),
            ],
            r"found an LSTM or MLP speculator \(Arctic\)",
        ),
        (change_tensors(lambda t: t.pop("cell_ln.0.bias")), "cell_ln.0.bias: missing"),
        (change_tensors(lambda t: t.update({"emb.0.weight": torch.zeros(61, 24)})), "emb.0.weight: unknown key"),
        (
            change_tensors(lambda t: t.update({"head.1.weight": torch.zeros(61, 24)})),
            "head.1.weight: differs from head.0.weight",
        ),
    ],
)
def test_directories_that_hold_another_head_are_refused(saved, target, variant, message):
    variant(saved[0])
    with pytest.raises(UserError, match=message):
        load_drafter(saved[0], target.shared)


def test_a_pickle_of_arctictraining_is_imported_when_asked(saved, target):
    folder, head = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    out = import_drafter(str(folder), folder.parent / "in", str(folder.parent / "target"), pickle=True)
    assert same_weights(load_drafter(out, target.shared), head)


def test_the_card_serves_what_names_its_target_and_tells_how_to_export_the_rest(saved, target):
    folder, _ = saved
    kept = stage(str(folder), "me/owl", folder.parent / "kept", None, "org/target", None)
    out = export_drafter(folder, folder.parent / "out", "arctic", report=lambda line: None)
    exported = stage(str(out), "me/owl-arctic", folder.parent / "exported", None, "org/target", None)
    ours, engines = (place / "README.md" for place in (kept, exported))
    assert (
        "draftsmith export me/owl owl-arctic --to arctic" in ours.read_text() and "vllm serve" not in ours.read_text()
    )
    assert (
        "vllm serve org/target" in engines.read_text()
        and '"model": "me/owl-arctic", "num_speculative_tokens": 4' in engines.read_text()
    )
    assert json.loads((exported / "config.json").read_text())["base_model_name_or_path"] == "org/target"
