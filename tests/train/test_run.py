"""What a run keeps and shows: cached features, the best drafter, progress, wandb, and what a dry run says of it."""

import json
import re

import pytest
import torch

from draftsmith.launch.training import main
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT
from tests.train.test_train import log_of, weights


def test_cached_features_give_the_same_run_and_a_damaged_shard_is_found(folder, tmp_path, capsys):
    arguments = [str(folder / "recipe.yaml"), "optimization.epochs=3"]
    assert (
        main([*arguments, f"output={tmp_path}/online"]) == 0
        and main([*arguments, "data.features=cached", f"output={tmp_path}/cached"]) == 0
    )
    a, b = log_of(tmp_path / "online"), log_of(tmp_path / "cached")
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)  # other paddings, other rounding
    features = tmp_path / "cached" / "features"
    header = json.loads((features / "header.json").read_text())
    assert (
        header["taps"] == [2, 3, 4]
        and header["convention"].startswith("index into Hugging Face hidden_states")
        and header["dtype"] == "float32"
    )
    shard, said = next(features.glob("*.safetensors")), capsys.readouterr().out
    needed = float(re.search(r"cached features will take ([\d.]+) GB", said).group(1))
    assert needed == pytest.approx(shard.stat().st_size / 1e9, abs=0.006)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (tmp_path / "cached" / "drafter").rename(tmp_path / "elsewhere")
    assert main([*arguments, "data.features=cached", f"output={tmp_path}/cached"]) == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    (features / "header.json").write_text(json.dumps({**header, "taps": [1, 2, 3]}))
    assert main([*arguments, "data.features=cached", f"output={tmp_path}/cached"]) == 2
    assert "header.json: taps: found [1, 2, 3], expected [2, 3, 4]" in capsys.readouterr().err


def test_on_a_cpu_the_target_has_the_precision_of_the_engine(folder, tmp_path):
    arguments = [str(folder / "recipe.yaml"), "optimization.epochs=1", "data.features=cached", "engine.dtype=bf16"]
    assert main([*arguments, f"output={tmp_path}/half"]) == 0
    assert json.loads((tmp_path / "half" / "features" / "header.json").read_text())["dtype"] == "bfloat16"
    full = main([str(folder / "recipe.yaml"), "optimization.epochs=1", f"output={tmp_path}/full"])
    assert full == 0 and len(log_of(tmp_path / "half")) == len(log_of(tmp_path / "full"))
    for half, whole in zip(log_of(tmp_path / "half"), log_of(tmp_path / "full")):
        assert half["loss"] == pytest.approx(whole["loss"], rel=0.05)


def test_the_best_measured_drafter_is_kept(folder, tmp_path, monkeypatch, capsys):
    """The evaluator sees the held-out prompts; its best drafter, not the last one, becomes the drafter directory."""
    from draftsmith.launch import training

    seen, taus = [], iter([1.5, 2.5, 2.0])

    def evaluator(recipe):
        def measure(target, head, prompts, stops):
            seen.append((head.lm_head.weight.clone(), prompts))
            return next(taus)

        return measure

    monkeypatch.setattr(training, "evaluator", evaluator)
    assert main([str(folder / "recipe.yaml"), f"output={tmp_path}/out", "evaluation.rows=5", "evaluation.times=3"]) == 0
    assert all(len(prompts) == 5 for _, prompts in seen)
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], seen[1][0].to(torch.bfloat16))
    log = log_of(tmp_path / "out")
    assert [line["tau"] for line in log if "tau" in line] == [1.5, 2.5, 2.0] and log[-1]["tau"] == 2.0
    assert "is kept: acceptance length 2.500" in capsys.readouterr().out and not (tmp_path / "out" / "best").exists()


def test_progress_shows_what_a_run_does(folder, tmp_path, capsys):
    assert (
        main(
            [
                str(folder / "recipe.yaml"),
                f"output={tmp_path}/out",
                "evaluation.rows=2",
                "evaluation.times=1",
                "evaluation.max_new_tokens=4",
            ]
        )
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/"))
    for part in (
        "loss",
        "right",
        "given right before",
        "chain tau",
        "tok/s",
        "data",
        "target",
        "drafter",
        "optimizer",
        "vocabulary",
        "left",
    ):
        assert part in line
    assert log_of(tmp_path / "out")[-1]["tau"] >= 1.0


def test_wandb_works_offline_without_a_login(folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main([str(folder / "recipe.yaml"), f"output={tmp_path}/out", "wandb=draftsmith-test"]) == 0
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))


def write_hole(weights, place):
    """A safetensors file in bf16 of these names and shapes, whose numbers take no disk and are never read."""
    header, end = {}, 0
    for name, value in weights.items():
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + 2 * value.numel()]}
        end += 2 * value.numel()
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(place, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_dry_run_estimates_a_large_target_on_the_meta_device(folder, tmp_path, capsys):
    """The shape of Llama-3.1-8B: 8,030,261,248 parameters, counted without allocating them; nothing is written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from draftsmith.models.targets import describe
    from draftsmith.train.estimate import estimate

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    config.save_pretrained(tmp_path / "8b")
    with torch.device("meta"):
        write_hole(LlamaForCausalLM(config).state_dict(), tmp_path / "8b" / "model.safetensors")
    recipe = read_recipe(ROOT / "recipes" / "eagle3-llama3.1-8b.yaml", DrafterRecipe, [f"target={tmp_path}/8b"])
    found = estimate(recipe, describe(recipe.target), 8, torch.device("cpu"), (1_000_000, 600_000), timed=False)
    assert found.target_parameters == 8_030_261_248 and found.head_parameters == 424_689_664
    assert found.memory["gradients"] == 424_689_664 * 2 // 8 and found.memory["optimizer"] == 424_689_664 * 12 // 8
    layers, spread = (
        32 * 218_112_000,
        recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"target": "sharded"})}),
    )
    held = estimate(spread, describe(recipe.target), 8, torch.device("cpu"), None, timed=False).memory["target"]
    assert found.memory["target"] == 8_030_261_248 * 2 and held == (8_030_261_248 - layers + layers // 8) * 2
    assert main([str(folder / "recipe.yaml"), "--dry-run", f"output={tmp_path}/never"]) == 0
    shown = capsys.readouterr().out
    assert (
        "memory of a process" in shown
        and "us per token" in shown
        and "hours" in shown
        and not (tmp_path / "never").exists()
    )
