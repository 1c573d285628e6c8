"""Recipes, and training by DeepSpeed in one process: exact resume, checkpoints that are complete or invisible."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.launch.training import main
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget
from draftsmith.train import telemetry
from draftsmith.train.optimizers import orthogonalise
from draftsmith.train.reference.pretrain import grow
from tests.conftest import tiny_target, train_killed_at
from tests.one_launch import run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_matrices_have_singular_values_near_one(dtype):
    matrices = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, dtype=dtype))
    assert values.min() > 0.5 and values.max() < 1.4


def test_grown_target_computes_the_same():
    model = tiny_target(layers=2, tie_word_embeddings=True).model
    grown, tokens = grow(model, 6), torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="not a multiple"):
        grow(model, 3)


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_training_in_one_process_saves_a_loadable_drafter(folder):
    result = run([sys.executable, "-m", "draftsmith.train", folder / "recipe.yaml", f"output={folder}/one"], folder)
    assert result.returncode == 0, result.stderr[-2000:]
    target = TextTarget.load(folder / "target")
    head = load_drafter(folder / "one" / "drafter", target.shared, target.layers)
    assert head.config.draft_vocab_size == 200 and 2 in head.ids
    log = log_of(folder / "one")
    assert log[-1]["step"] == log[-1]["total"] == len(log) and log[-1]["loss"] < log[0]["loss"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "drafter" / "model.safetensors")


@pytest.mark.parametrize(
    "engine",
    [
        ["optimization.name=muon"],
        ["optimization.name=adamw", "engine.zero_stage=2"],
        ["optimization.name=adamw", "engine.zero_stage=1", "engine.dtype=bf16"],
    ],
    ids=["muon", "zero2", "bf16"],
)
def test_a_killed_run_resumes_to_the_same_weights(folder, tmp_path, engine):
    arguments = [str(folder / "recipe.yaml"), *engine, "engine.checkpoint_minutes=0"]
    assert main([*arguments, f"output={tmp_path}/whole"]) == 0
    whole = log_of(tmp_path / "whole")
    about = json.loads((tmp_path / "whole" / "drafter" / "draftsmith.json").read_text())
    assert about["trained"]["steps"] == 3 and about["measured"] is None  # the recipe measures no tau
    train_killed_at(8, [*arguments, f"output={tmp_path}/cut"])
    (tmp_path / "cut" / "checkpoints" / ".step-9").mkdir()  # a checkpoint that was never completed
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").glob("step-*")] == ["step-7"] and not (
        tmp_path / "cut" / "drafter"
    ).exists()
    assert main([*arguments, "seed=5", f"output={tmp_path}/cut"]) == 2  # the checkpoint of another recipe
    assert main([*arguments, f"output={tmp_path}/cut"]) == 0
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values())
    )
    assert [line["loss"] for line in log_of(tmp_path / "cut")] == [line["loss"] for line in whole]
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_checkpoint_of_another_world_size_is_a_warm_start_and_of_another_engine_is_refused(folder, tmp_path, capsys):
    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out"]
    train_killed_at(5, [*arguments, "engine.checkpoint_minutes=0"])
    first = log_of(tmp_path / "out")[0]["loss"]
    assert main([*arguments, "optimization.name=adamw", "engine.zero_stage=1"]) == 2
    assert "engine, optimization differ" in capsys.readouterr().err
    state = tmp_path / "out" / "checkpoints" / "step-4" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "world_size": 2}))
    assert main(arguments) == 0
    assert "warm start" in capsys.readouterr().out
    log = log_of(tmp_path / "out")
    assert [line["step"] for line in log] == list(range(1, log[0]["total"] + 1)) and log[0]["loss"] < first


def test_termination_saves_and_the_same_command_resumes(folder, tmp_path, monkeypatch):
    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out"]
    write = telemetry.Log.write

    def terminated_at_3(log, line):
        write(log, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(telemetry.Log, "write", terminated_at_3)
    assert main(arguments) == 143
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-3"]
    assert main(arguments) == 0 and [line["step"] for line in log_of(tmp_path / "out")] == list(
        range(1, log_of(tmp_path / "out")[0]["total"] + 1)
    )


def test_a_full_disk_is_one_line_and_loses_nothing(folder, tmp_path, capsys):
    """The output lies on a file system of its own that fills up during training; with room again, the same command goes
    on.
    """
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    try:
        arguments = [str(folder / "recipe.yaml"), f"output={place}/out", "engine.checkpoint_minutes=0"]
        write = telemetry.Log.write

        def filling(log, line):
            write(log, line)
            if line["step"] == 5:
                (place / "others").write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - 40_000))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(telemetry.Log, "write", filling)
            assert main(arguments) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(error) == 1 and "step-5: cannot be written" in error[0] and "step-4 is complete" in error[0], error
        assert [p.name for p in (place / "out" / "checkpoints").iterdir()] == ["step-4"]
        (place / "others").unlink()
        assert main(arguments) == 0 and "resumed at step 4" in capsys.readouterr().out
        assert main([str(folder / "recipe.yaml"), f"output={tmp_path}/whole"]) == 0
        assert all(
            torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(place / "out").values())
        )
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_step_whose_gradients_are_not_finite_is_skipped_and_counted(folder, tmp_path, monkeypatch):
    """One poisoned batch leaves weights and optimizer state as they were."""
    from draftsmith.train.features import Online

    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out", "head.regression=false"]
    compute, calls = Online.__call__, []  # a regression would read the first rows before the first step

    def poisoned(self, numbers):
        features = compute(self, numbers)
        calls.append(1)
        if len(calls) == 4:
            features.hidden.fill_(float("nan"))
        return features

    monkeypatch.setattr(Online, "__call__", poisoned)
    assert main(arguments) == 0
    log = log_of(tmp_path / "out")
    assert [line["skipped"] for line in log] == [0, 0, 0] + [1] * (len(log) - 3)
    assert log[-1]["loss"] < log[0]["loss"] and all(
        torch.isfinite(w.float()).all() for w in weights(tmp_path / "out").values()
    )
