"""LoRA of a drafter: training and drafting apply the same adapted matrices; what leaves a run is merged; peft reads the
adapter back.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.launch.export import export_drafter
from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter
from draftsmith.models.heads import Eagle3Objective
from draftsmith.models.heads.adapted import matrix, merged
from draftsmith.models.targets import TextTarget, describe
from draftsmith.train.estimate import estimate
from draftsmith.train.lora import Adapter
from draftsmith.train.recipe import DrafterRecipe, Lora, read_recipe
from tests.conftest import ROOT, tiny_head, train_killed_at
from tests.models.heads.documents import cut, features_of, packed, place
from tests.train.test_train import log_of, weights
from tests.train.test_train_errors import refused
from tests.train.test_zero import MODULES

peft = pytest.importorskip("peft")
LORA = Lora(rank=3, alpha=6, modules=MODULES)


def adapted(head, spec=LORA):
    """The head with an adapter that changes something."""
    adapter = Adapter(head, spec, "tiny", seed=0)
    g = torch.Generator().manual_seed(4)
    for name, p in head.named_parameters():
        if ".lora_B." in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2
    return adapter


def test_training_step_k_row_t_equals_sequential_drafting_with_an_adapter(target, head):
    """The training path takes matrices, the decoding path calls the layers; without the adapter the logits are
    others.
    """
    training, decoding = packed(target, head), features_of(target, head)
    plain = [head.logits(output) for _, output in head.unroll(training, 4)]
    adapted(head)
    compared = 0
    for k, ((rows, output), before) in enumerate(zip(head.unroll(training, 4), plain)):
        assert (head.logits(output) - before).abs().max() > 0.1
        for row, got in zip(rows.tolist(), head.logits(output)):
            b, t = place(training, row)
            beam = head.roots(head.prefill(cut(decoding, b, t + 1)))
            for step in range(k + 1):
                want, beam = head.expand(
                    beam, decoding.tokens[b, t + 1 + step].view(1, 1), torch.zeros(1, 1, dtype=torch.long)
                )
            torch.testing.assert_close(got.log_softmax(-1), want[0, 0], atol=2e-5, rtol=1e-5)
            compared += 1
    assert compared == sum(range(6, 10)) + sum(range(4, 8)) + sum(range(2, 6))


def test_the_loss_and_its_gradient_are_those_of_the_merged_head(target, head):
    """d loss / d B = (alpha / r) G A^T and d loss / d A = (alpha / r) B^T G with G the merged matrix's gradient;
    nothing else has a gradient.
    """
    features, scaling = packed(target, head), LORA.alpha / LORA.rank
    adapted(head)
    whole = tiny_head(target, draft_vocab=40)
    whole.load_state_dict(merged(head))
    assert type(whole)(whole.config, whole.shared, whole.ids).state_dict().keys() == merged(head).keys()
    losses = [h.loss(features, Eagle3Objective(4, 0.8))[0] for h in (head, whole)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    layers = {name: layer for name, layer in head.named_modules() if hasattr(layer, "base_layer")}
    assert sorted({name.split(".")[-1] for name in layers}) == sorted(MODULES)
    for name, layer in layers.items():
        a, b, g = layer.lora_A["default"].weight, layer.lora_B["default"].weight, whole.get_submodule(name).weight.grad
        torch.testing.assert_close(matrix(layer), layer.base_layer.weight + scaling * b @ a)
        torch.testing.assert_close(b.grad, scaling * g @ a.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.grad, scaling * b.T @ g, atol=1e-5, rtol=1e-4)
    assert all((p.grad is not None) == (".lora_" in name) for name, p in head.named_parameters())


@pytest.fixture(scope="module")
def start(folder):
    """A drafter to adapt, and the arguments of a run that adapts it."""
    assert main([str(folder / "recipe.yaml"), f"output={folder}/start"]) == 0
    return [
        str(folder / "recipe.yaml"),
        f"head.start_from={folder}/start/drafter",
        "optimization.name=adamw",
        "optimization.lr=0.01",
        f"lora={{rank: 4, alpha: 8, modules: [{', '.join(MODULES)}]}}",
    ]


@pytest.fixture(scope="module")
def finished(folder, start):
    """A run that evaluates nothing and is never killed."""
    assert main([*start, f"output={folder}/adapted"]) == 0
    return folder / "adapted"


def test_a_run_changes_the_drafter_by_a_matrix_of_low_rank_and_learns(folder, finished):
    before, after = weights(folder / "start"), weights(finished)
    assert before.keys() == after.keys()  # merged: an ordinary drafter
    for name, value in before.items():
        if value.ndim != 2:
            assert torch.equal(value, after[name]), name  # norms and the draft vocabulary stay
    log = log_of(finished)
    losses, half = [line["loss"] for line in log], len(log) // 2
    assert sum(losses[half:]) < sum(losses[:half]) and losses[0] < log_of(folder / "start")[0]["loss"]
    with pytest.raises(UserError, match="head.start_from: found null, expected a drafter to adapt"):
        read_recipe(
            folder / "recipe.yaml",
            DrafterRecipe,
            ["optimization.name=adamw", "lora={rank: 4, alpha: 8, modules: [fc]}"],
        )


def test_peft_reads_the_adapter_onto_the_first_drafter_and_gets_the_merged_one(folder, finished, tmp_path):
    assert sorted(p.name for p in (finished / "adapter").iterdir() if p.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, sorted(MODULES))
    assert config["base_model_name_or_path"] == f"{folder}/start/drafter"
    target = TextTarget.load(folder / "target")
    model = peft.PeftModel.from_pretrained(
        load_drafter(folder / "start" / "drafter", target.shared, target.layers), finished / "adapter"
    )
    whole = load_drafter(finished / "drafter", target.shared, target.layers)
    for name, value in model.merge_and_unload().state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), whole.state_dict()[name].to(torch.bfloat16)), name
    states = torch.randn(5, whole.config.hidden_size)
    model = peft.PeftModel.from_pretrained(
        load_drafter(folder / "start" / "drafter", target.shared, target.layers), finished / "adapter"
    )
    torch.testing.assert_close(
        model.base_model.model.logits(states), whole.logits(states), atol=0.05, rtol=0.01
    )  # one of them stored in bf16
    export_drafter(str(finished / "drafter"), str(tmp_path / "served"), "vllm", str(folder / "target"), 5, print)
    assert load_file(tmp_path / "served" / "model.safetensors").keys() == weights(finished).keys()


@pytest.mark.parametrize("engine", [[], ["engine.zero_stage=2"]], ids=["zero0", "zero2"])
def test_a_killed_run_resumes_to_the_same_weights_and_adapter(start, tmp_path, capsys, engine):
    arguments = [*start, *engine, "engine.checkpoint_minutes=0"]
    assert main([*arguments, f"output={tmp_path}/whole"]) == 0
    train_killed_at(5, [*arguments, f"output={tmp_path}/cut"])
    assert main([*arguments, f"output={tmp_path}/cut"]) == 0 and "resumed at step 4" in capsys.readouterr().out
    for file in ("drafter/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, cut_off = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert all(torch.equal(value, cut_off[name]) for name, value in whole.items())


def test_a_checkpoint_of_another_world_size_warms_the_adapter_up(start, tmp_path, capsys):
    arguments = [*start, f"output={tmp_path}/out", "engine.checkpoint_minutes=0"]
    train_killed_at(5, arguments)
    first = log_of(tmp_path / "out")[0]["loss"]
    state = tmp_path / "out" / "checkpoints" / "step-4" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "world_size": 2}))
    assert main(arguments) == 0 and "warm start" in capsys.readouterr().out
    assert log_of(tmp_path / "out")[0]["loss"] < first


def test_the_adapter_is_that_of_the_best_measured_drafter(folder, start, tmp_path, monkeypatch):
    from draftsmith.launch import training

    taus = iter([2.5, 2.0])
    monkeypatch.setattr(training, "evaluator", lambda recipe: lambda *_: next(taus))
    assert main([*start, f"output={tmp_path}/out", "evaluation.rows=5", "evaluation.times=2"]) == 0
    target = TextTarget.load(folder / "target")
    model = peft.PeftModel.from_pretrained(
        load_drafter(folder / "start" / "drafter", target.shared, target.layers), tmp_path / "out" / "adapter"
    )
    kept = weights(tmp_path / "out")
    assert all(
        torch.equal(value.to(torch.bfloat16), kept[name])
        for name, value in model.merge_and_unload().state_dict().items()
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=0"], "lora.rank: found 0"),
        (["lora.modules=[]"], "lora.modules: found []"),
        (["lora.depth=1"], "lora.depth: unknown key"),
        (
            ["optimization.name=muon", "optimization.muon_lr=0.02"],
            "optimization.name: found muon, expected adamw with lora",
        ),
        (["lora.modules=[fc,w1]"], "lora.modules: found w1, expected some of fc, q_proj, k_proj"),
        (["head.start_from=bundled:drafters/none"], "bundled:drafters/none: no such bundled model"),
    ],
)
def test_bad_values_are_one_line(start, tmp_path, capsys, overrides, message):
    assert main([*start, *overrides, f"output={tmp_path}/never"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "never" / "drafter").exists()


def test_without_the_package_it_is_one_line(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "lora needs the package peft, found none" in refused(capsys, [*start, f"output={tmp_path}/never"])


def test_the_recipe_that_comes_along_adapts_the_bundled_drafter():
    recipe = read_recipe(Path(ROOT) / "recipes" / "eagle3-code-lora.yaml", DrafterRecipe)
    assert recipe.lora.modules == MODULES and recipe.head.start_from == "bundled:drafters/eagle3-code"
    target = TextTarget.load(recipe.target)
    head = load_drafter(recipe.head.start_from, target.shared, target.layers)
    plain = sum(p.numel() for p in head.parameters())
    Adapter(head, recipe.lora, recipe.head.start_from, recipe.seed)
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert (
        trained
        == sum(recipe.lora.rank * (p.size(0) + p.size(1)) for n, p in head.named_parameters() if ".base_layer." in n)
        < plain / 4
    )
    found = estimate(recipe, describe(recipe.target), 1, torch.device("cpu"), None, timed=False)
    assert (found.memory["gradients"], found.memory["optimizer"], found.memory["head"]) == (
        4 * trained,
        8 * trained,
        4 * (plain + trained),
    )
