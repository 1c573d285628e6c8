"""Recipes, and training by DeepSpeed in one and two real processes: equal losses, exact resume, checkpoints that are
complete or invisible.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from draftsmith.launch.inspect import inspect, spans
from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter
from draftsmith.models.heads import Eagle3Head
from draftsmith.models.targets import TextTarget
from draftsmith.train import distributed, telemetry
from draftsmith.train.optimizers import orthogonalise
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from draftsmith.train.reference.pretrain import TargetRecipe, grow, pretrain
from tests.conftest import ROOT, tiny_target, train_killed_at


def test_inspect_shows_the_mask(folder):
    console = Console(record=True, width=200, file=io.StringIO())
    inspect(read_recipe(folder / "recipe.yaml", DrafterRecipe), 1, console)
    text, html = console.export_text(clear=False), console.export_html()
    assert text.startswith("24 rows") and "a draft vocabulary of 200 covers 100.00%" in text
    assert "return" in re.search(r"<span class=\"r\d\">(\s*return[^<]*)</span>", html).group(1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.nme=eagle3", "head.nme: unknown key"),
        ("head.name=medusa", "head.name: found .medusa.; .*expected one of eagle3"),
        ("seed=abc", "seed: found 'abc'"),
        ("optimization.lr=-1", "optimization.lr: found -1"),
        ("engine.zero_stage=7", "engine.zero_stage: found 7"),
        ("nonsense", "expected section.key=value"),
        ("data=3", "data"),
    ],
)
def test_bad_recipe_values_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        read_recipe(ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, [override])


def test_recipe_files(tmp_path):
    recipe = read_recipe(
        ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, ["optimization.epochs=2.5", "data.files=[a.jsonl]"]
    )
    assert recipe.data.files == ["a.jsonl"] and recipe.optimization.epochs == 2.5
    bad = tmp_path / "bad.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "expected a mapping"), ("seed: 0", "missing")):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            read_recipe(bad, DrafterRecipe)
    with pytest.raises(UserError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml", DrafterRecipe)


def test_target_recipe_is_checked_before_anything_runs(tmp_path):
    recipe = ROOT / "recipes" / "targets" / "code.yaml"
    assert read_recipe(recipe, TargetRecipe).stages[-1].layers >= 20
    with pytest.raises(UserError, match="found 4 layers before 6, expected a multiple"):
        one = "length: 8, batch: 1, tokens: 8"
        read_recipe(recipe, TargetRecipe, [f"stages=[{{layers: 4, {one}}}, {{layers: 6, {one}}}]"])
    with pytest.raises(UserError, match="exists; expected a new place"):
        pretrain(read_recipe(recipe, TargetRecipe, [f"output={tmp_path}"]))


def test_spans_cut_where_the_mask_changes():
    assert spans([1, 1, 0, 1]) == [(0, 2, 1), (2, 3, 0), (3, 4, 1)] and spans([0]) == [(0, 1, 0)]


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.4


def test_grown_target_computes_the_same():
    model = tiny_target(layers=2, tie_word_embeddings=True).model
    grown, tokens = grow(model, 6), torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="not a multiple"):
        grow(model, 3)


def run(command, folder, timeout=240):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": path,
    }
    return subprocess.run(
        [str(c) for c in command], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )


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


@pytest.mark.timeout(900)
def test_zero_stages_in_two_processes_equal_one_process(folder):
    """The same steps: one process accumulates the two bins that two processes share. Rows are of different lengths, so
    that a mean of the processes' means would differ; ZeRO-3 runs with its target sharded and its features cached too.
    """
    common = [folder / "recipe.yaml", "optimization.name=adamw", "head.draft_vocab_size=null"]
    one = run(
        [sys.executable, "-m", "draftsmith.train", *common, "optimization.accumulation=2", f"output={folder}/single"],
        folder,
    )
    assert one.returncode == 0, one.stderr[-2000:]
    want = [line["loss"] for line in log_of(folder / "single")]
    assert want[-1] < want[0] and len(want) > 5
    for name, more in {
        "0": [],
        "1": ["engine.zero_stage=1"],
        "2": ["engine.zero_stage=2"],
        "3": ["engine.zero_stage=3", "engine.target=sharded", "data.features=cached"],
    }.items():
        two = run(
            [
                "deepspeed",
                "--num_gpus",
                "2",
                "--master_port",
                distributed.free_port(),
                "--module",
                "draftsmith.train",
                *common,
                *more,
                f"output={folder}/{name}",
            ],
            folder,
        )
        assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
        assert json.loads((folder / name / "drafter" / "draftsmith.json").read_text())["world_size"] == 2
        assert [line["loss"] for line in log_of(folder / name)] == pytest.approx(want, rel=1e-5), name
    for name in ("0", "1", "2", "3"):
        for a, b in zip(weights(folder / name).values(), weights(folder / "single").values()):
            torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=1e-2)  # stored in bf16


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


def test_torchrun_restarts_a_run_whose_process_died_and_it_ends_with_the_same_weights(folder, tmp_path):
    """Process 1 of the first attempt dies in step 4 without a word; torchrun starts both again, which go on from the
    checkpoint.
    """
    (tmp_path / "dying.py").write_text(
        "import os, sys\nfrom draftsmith.launch.training import main\nfrom draftsmith.train.loop import Run\nstep = "
        "Run._step\n"
        "def dying(self, *a):\n    if self.state.step == 3 and os.environ['RANK'] == '1' and "
        "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os._exit(9)\n    return step(self, *a)\nRun._step = dying\nsys.exit(main(sys.argv[1:]))\n"
    )
    common = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "2",
        "--master_addr",
        "127.0.0.1",
    ]
    arguments = [
        folder / "recipe.yaml",
        "optimization.name=adamw",
        "engine.zero_stage=2",
        "engine.checkpoint_minutes=0",
    ]
    for name, script in {"whole": ["-m", "draftsmith.train"], "cut": [tmp_path / "dying.py"]}.items():
        result = run(
            [
                sys.executable,
                *common,
                "--master_port",
                distributed.free_port(),
                *script,
                *arguments,
                f"output={tmp_path}/{name}",
            ],
            tmp_path,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "resumed at step 3" in result.stdout
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values())
    )
    assert [line["loss"] for line in log_of(tmp_path / "cut")] == [line["loss"] for line in log_of(tmp_path / "whole")]


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

    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out"]
    compute, calls = Online.__call__, []

    def poisoned(self, numbers):
        features = compute(self, numbers)
        calls.append(1)
        if len(calls) == 4:
            features.hidden.fill_(float("nan"))
        return features

    monkeypatch.setattr(Online, "__call__", poisoned)
    monkeypatch.setattr(Eagle3Head, "regress", None)  # it would read the first rows before the first step
    assert main(arguments) == 0
    log = log_of(tmp_path / "out")
    assert [line["skipped"] for line in log] == [0, 0, 0] + [1] * (len(log) - 3)
    assert log[-1]["loss"] < log[0]["loss"] and all(
        torch.isfinite(w.float()).all() for w in weights(tmp_path / "out").values()
    )


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
    assert found.memory["target"] == 8_030_261_248 * 4 and held == (8_030_261_248 - layers + layers // 8) * 4
    assert main([str(folder / "recipe.yaml"), "--dry-run", f"output={tmp_path}/never"]) == 0
    shown = capsys.readouterr().out
    assert (
        "memory of a process" in shown
        and "us per token" in shown
        and "hours" in shown
        and not (tmp_path / "never").exists()
    )
