"""Export and import: what each engine is given, every trap of a real engine, and that public directories become
drafters that compute the same.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.launch.export import export_drafter, import_drafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, read_files, save_drafter
from draftsmith.models.formats.embedding import read_target
from draftsmith.models.formats.layout import Serving
from draftsmith.models.heads import OwlConfig, OwlHead
from tests.conftest import tiny_head, tiny_target
from tests.models.formats.test_formats import change_config, change_tensors, same_logits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, target):
    """A target on disk and a drafter for it that names it; all in bf16, so that storing loses nothing."""
    target.model.to(torch.bfloat16).save_pretrained(tmp_path / "target")
    target.model.float()
    head = tiny_head(target, 40)
    for parameter in head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    save_drafter(head, tmp_path / "drafter", {"target": str(tmp_path / "target"), "steps": 3})
    return tmp_path, target, head


def files(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
def test_exports_compute_the_same_and_keep_what_is_known(place, engine):
    folder, target, head = place
    said = []
    out = export_drafter(folder / "drafter", folder / "out", engine, report=said.append)
    same_logits(target, head, load_drafter(out, target.shared, target.layers))
    assert json.loads((out / "draftsmith.json").read_text()) == {
        "head": "eagle3",
        "target": str(folder / "target"),
        "steps": 3,
    }
    assert str(out) in said[0] and ("$" not in said[0])


def test_vllm_and_sglang_layout(place):
    """Traps A and B: `midlayer.*` (SGLang skips `layers.0.*` silently), no embedding, and the method named, not guessed
    from a folder's name.
    """
    folder, said = place[0], []
    for engine in ("vllm", "sglang"):
        config, tensors = files(export_drafter(folder / "drafter", folder / engine, engine, report=said.append))
        assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["norm_before_residual"] is False
        assert sum(name.startswith("midlayer.") for name in tensors) == 10 and len(tensors) == 15
        assert not any(name.startswith("layers.") or "embed" in name for name in tensors)
    shown = [line for line in said if "read back" in line]
    assert '"method": "eagle3"' in shown[0] and "--speculative-algorithm EAGLE3" in shown[1]


def test_speculators_layout(place):
    """Traps C and D: the verifier and the proposal named, no `model_type` at the top, `norm_before_residual`
    written.
    """
    folder, target, _ = place
    config, tensors = files(export_drafter(folder / "drafter", folder / "out", "speculators", depth=4))
    assert (
        "model_type" not in config
        and config["norm_before_residual"] is False
        and config["architectures"] == ["Eagle3Speculator"]
    )
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": str(folder / "target"),
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["transformer_layer_config"]["vocab_size"] == 61 and config["draft_vocab_size"] == 40
    assert len(tensors) == 16 and torch.equal(tensors["embed_tokens.weight"].float(), target.embedding)
    assert not any(name.startswith("midlayer") for name in tensors)


def told(folder, **about):
    """Adds to a directory's draftsmith.json."""
    place = folder / "draftsmith.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **about}))


@pytest.mark.parametrize(
    ("about", "depth", "lines"),
    [
        ({"trained": {"steps": 3, "context": 256}}, 3, []),
        (
            {"trained": {"steps": 3, "context": 64}},
            4,
            [
                "warning: 4 drafted tokens are asked for, 3 steps were trained",
                "warning: the target takes 256 tokens, rows of at most 64 were trained on",
            ],
        ),
        (
            {"recipe": {"objective": {"steps": 2, "decay": 0.8}, "data": {"max_length": 255}}},
            5,
            ["warning: 5 drafted tokens are asked for, 2 steps", "warning: the target takes 256 tokens"],
        ),
        ({}, 5, ["trained steps: not recorded", "trained context: not recorded"]),
    ],
    ids=["within", "beyond", "recipe alone", "before both"],
)
def test_what_exceeds_the_training_is_said_in_a_line_each(place, about, depth, lines):
    """`steps` at the top of draftsmith.json are those of the optimizer, and none of its business."""
    folder, said = place[0], []
    told(folder / "drafter", **about)
    for engine in ("vllm", "speculators"):
        said.clear()
        out = export_drafter(folder / "drafter", folder / engine, engine, depth=depth, report=said.append)
        assert len(said) == 1 + len(lines) and "\n" not in "".join(said[1:])
        assert all(line.startswith(start) for line, start in zip(said[1:], lines, strict=True))
        assert json.loads((out / "draftsmith.json").read_text()).get("trained") == about.get("trained")


def test_an_lstm_drafts_what_it_was_trained_for_whatever_depth_is_asked(tmp_path, target):
    target.model.save_pretrained(tmp_path / "target")
    head = OwlHead(OwlConfig.for_target(target.config, n_predict=3), target.shared)
    about = {"target": str(tmp_path / "target"), "trained": {"steps": 3, "context": 256}}
    save_drafter(head, tmp_path / "drafter", about)
    said = []
    export_drafter(tmp_path / "drafter", tmp_path / "out", "arctic", depth=5, report=said.append)
    assert len(said) == 1 and '"num_speculative_tokens": 3' in said[0]


def test_what_was_trained_must_be_numbers(place):
    folder = place[0]
    told(folder / "drafter", trained={"steps": "three"})
    with pytest.raises(UserError, match="draftsmith.json: trained.steps: found 'three', expected int or null"):
        export_drafter(folder / "drafter", folder / "out", "vllm")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(model_type="llama"), "model_type: found 'llama', expected none at the top level"),
        (change_config(norm_before_residual=None), "norm_before_residual: found None, expected false"),
        (change_config(norm_before_residual=True), "norm_before_residual: found True, expected false"),
        (
            change_config(transformer_layer_config={"model_type": "qwen3"}),
            "model_type: found 'qwen3', expected 'llama'",
        ),
        (
            change_config(speculators_model_type="dflash"),
            "found a speculators drafter of kind dflash, expected a head that draftsmith has: .*eagle3",
        ),
    ],
)
def test_speculators_directories_that_compute_something_else(place, change, message):
    folder, target, _ = place
    out = export_drafter(folder / "drafter", folder / "out", "speculators")
    change(out)
    with pytest.raises(UserError, match=message):
        import_drafter(str(out), folder / "in", str(folder / "target"))


def test_what_a_speculators_directory_tells_engines(place):
    out = export_drafter(place[0] / "drafter", place[0] / "out", "speculators", depth=4)
    assert (
        read_files(out).serving == Serving(str(place[0] / "target"), "LlamaForCausalLM", 4)
        and read_files(place[0] / "drafter").serving is None
    )
    change_config(speculators_config={"verifier": {}})(out)
    with pytest.raises(UserError, match="config.json: speculators_config: name_or_path: missing"):
        read_files(out).serving  # noqa: B018


def test_what_is_not_there_is_refused_in_one_line_and_nothing_is_written(place):
    folder = place[0]
    for arguments, message in [
        (
            (folder / "drafter", folder / "out", "arctic"),
            "arctic does not load heads of kind eagle3; expected one of vllm, sglang, speculators",
        ),
        ((folder / "drafter", folder / "out", "tgi"), "--to: found tgi, expected vllm, sglang, speculators, arctic"),
        ((folder / "drafter", folder / "target", "vllm"), "exists; expected a new place"),
        ((folder / "drafter", folder / "out", "speculators", "/none/x"), "target /none/x: cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=message):
            export_drafter(*arguments)
    (folder / "drafter" / "draftsmith.json").write_text("{}")
    with pytest.raises(UserError, match="names no target; expected --target"):
        export_drafter(folder / "drafter", folder / "out", "vllm")
    assert sorted(p.name for p in folder.iterdir()) == ["drafter", "target"]


def public(folder, rename=lambda name: name, pickle=False, **config):
    """Turns a drafter directory into one as others publish it."""
    tensors = {rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "draftsmith.json").unlink()
    change_config(**config)(folder)
    if pickle:
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "style",
    [
        dict(
            pickle=True,
            architectures=["LlamaForCausalLM"],
            eagle_aux_hidden_state_layer_ids=None,
            eagle_config=None,
            head_dim=None,
            rope_parameters=None,
            norm_before_residual=None,
        ),  # the authors' own
        dict(
            architectures=["LlamaForCausalLMEagle3"],
            rope_parameters=None,
            eagle_aux_hidden_state_layer_ids=None,
            max_position_embeddings=128,
        ),
        dict(architectures=["Eagle3LlamaForCausalLM"], rename=lambda name: name.replace("midlayer.", "layers.0.")),
    ],
    ids=["authors", "sglang", "layers.0"],
)
def test_public_eagle3_directories_become_drafters(place, style):
    folder, target, head = place
    public(folder / "drafter", **style)
    out = import_drafter(
        str(folder / "drafter"), folder / "out", str(folder / "target"), pickle=style.get("pickle", False)
    )
    same_logits(target, head, load_drafter(out, target.shared, target.layers))
    config, tensors = files(out)
    assert (
        config["max_position_embeddings"] == 256
        and config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
        and len(tensors) == 15
    )
    assert json.loads((out / "draftsmith.json").read_text())["target"] == str(folder / "target")


def test_speculators_import_and_round_trip_to_every_engine(place):
    folder, target, head = place
    export_drafter(folder / "drafter", folder / "spec", "speculators")
    (folder / "spec" / "draftsmith.json").unlink()
    for out in (
        import_drafter(str(folder / "spec"), folder / "in", str(folder / "target")),
        export_drafter(folder / "spec", folder / "raw", "sglang"),
    ):
        same_logits(target, head, load_drafter(out, target.shared, target.layers))


def test_leftovers_never_reach_an_export(place):
    """Trap G: vLLM fails on one unknown key."""
    folder = place[0]
    change_tensors(
        lambda t: t.update(
            {"midlayer.self_attn.rotary_emb.inv_freq": torch.zeros(4), "verifier_lm_head.weight": torch.zeros(40, 32)}
        )
    )(folder / "drafter")
    assert len(files(export_drafter(folder / "drafter", folder / "out", "vllm"))[1]) == 15


@pytest.mark.parametrize(
    ("config", "tensors", "kind"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            {"fc.weight": (8, 16), "fc.bias": (8,)},
            r"architectures: found \['Qwen2ForCausalLM'\]",
        ),
        ({"model_type": "mlp_speculator"}, {}, "found an LSTM or MLP speculator"),
        ({"model_type": "medusa"}, {}, "found a Medusa head"),
        ({"architectures": ["GPT2Model"]}, {}, r"architectures: found \['GPT2Model'\]"),
    ],
)
def test_heads_that_are_not_here_yet_are_named(place, config, tensors, kind):
    folder = place[0]
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, other / "model.safetensors")
    with pytest.raises(UserError, match=f"{kind}.*expected a head that draftsmith has: .*eagle3"):
        import_drafter(str(other), folder / "out", str(folder / "target"))
    assert not (folder / "out").exists()


def test_a_drafter_of_another_target_is_not_imported(place):
    folder = place[0]
    tiny_target(seed=7).model.save_pretrained(folder / "stranger")
    export_drafter(folder / "drafter", folder / "spec", "speculators")
    with pytest.raises(UserError, match="embed_tokens.weight: 61 of 61 rows differ from the target's"):
        import_drafter(str(folder / "spec"), folder / "out", str(folder / "stranger"))


def test_the_embedding_is_read_from_shards_without_opening_the_model(tmp_path, target):
    target.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config, architecture, embedding = read_target(str(tmp_path / "sharded"))
    assert (
        torch.equal(embedding, target.embedding)
        and architecture == "LlamaForCausalLM"
        and config.num_hidden_layers == 7
    )


def test_on_the_command_line(place, run):
    folder = place[0]
    code, said, error = run("export", folder / "drafter", folder / "out", "--to", "vllm")
    assert code == 0 and "15 tensors" in said and "vllm serve" in said, error
    code, said, error = run("import", folder / "out", folder / "in", "--target", folder / "target")
    assert code == 0 and "read back and equal" in said, error
    code, _, error = run("export", folder / "drafter", folder / "out", "--to", "vllm")
    assert code == 2 and error.startswith("error: ") and error.endswith("expected a new place")
