"""Kills a 2-process training at random moments with SIGKILL until it has been killed often enough, lets it finish, and
compares.

    python tests/benchmarks/kill.py [--quick]

A tiny target with random weights, ZeRO-2 (20 kills; `--quick`: 4) and ZeRO-3 (5; 1), a checkpoint after every step,
features cached, so that kills strike starts, steps, checkpoints, shards and the end. After every kill each visible
checkpoint and drafter must be whole. Ends with one JSON line: kills, how many left a checkpoint behind, and whether the
final weights and losses equal those of a run never killed, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from draftsmith.train.distributed import free_port  # noqa: E402
from draftsmith.train.reference.pretrain import train_tokenizer  # noqa: E402
from tests.conftest import tiny_target  # noqa: E402


def make_run(folder: Path) -> Path:
    """A target of 7 layers, 60 rows and a recipe of some 60 steps."""
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n", "import os\nimport sys\n"], 300)
    target = tiny_target(vocab=300)
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"def f{i}(a):"},
                {"role": "assistant", "content": f"    return a + {i}\n" * (1 + i % 3)},
            ]
        }
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((ROOT / "recipes" / "eagle3-code.yaml").read_text())
    recipe["target"] = str(folder / "target")
    recipe["data"] |= {"files": [str(folder / "rows.jsonl")], "max_length": 80, "features": "cached"}
    recipe["head"] |= {"intermediate_size": None, "draft_vocab_size": 200}
    recipe["objective"] |= {"steps": 3}
    recipe["optimization"] |= {"name": "adamw", "batch_tokens": 100, "epochs": 6}
    recipe["engine"] |= {"checkpoint_minutes": 0}
    recipe["evaluation"] |= {"rows": 4, "times": 3, "max_new_tokens": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def start(recipe: Path, output: Path, stage: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (output.parent / f"{output.name}.log").open("a") as log:
        return subprocess.Popen(
            [
                "deepspeed",
                "--num_gpus",
                "2",
                "--master_port",
                str(free_port()),
                "--module",
                "draftsmith.train",
                str(recipe),
                f"engine.zero_stage={stage}",
                f"output={output}",
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def check_visible(output: Path, stage: int) -> bool:
    """Raises AssertionError when a visible checkpoint or drafter is not whole. Whether there is a checkpoint."""
    places = [p for p in (output / "checkpoints").glob("step-*")]
    for place in places:
        state = json.loads((place / "state.json").read_text())
        assert state["state"]["step"] == int(place.name.removeprefix("step-")), place
        load_file(place / "drafter" / "model.safetensors")
        parts = sorted(place.glob("*optim_states.pt"))
        assert len(parts) == 2, (place, parts)
        for part in [*parts, *place.glob("*model_states.pt")]:
            torch.load(part, weights_only=False)  # this run's own files
    if (output / "drafter").exists():
        load_file(output / "drafter" / "model.safetensors")
    return bool(places)


def finish(recipe: Path, output: Path, stage: int) -> float:
    began = time.time()
    code = start(recipe, output, stage).wait(timeout=600)
    assert code == 0, (output.parent / f"{output.name}.log").read_text()[-3000:]
    return time.time() - began


def kill_all(process: subprocess.Popen) -> None:
    """The launcher and both processes at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)


def lines_of(output: Path) -> int:
    try:
        return len((output / "log.jsonl").read_text().splitlines())
    except OSError:
        return 0


def trial(folder: Path, recipe: Path, stage: int, kills: int, rng: random.Random) -> dict:
    """Every kill waits for a step drawn beforehand, then for up to two steps' time more: steps, checkpoints and shards
    are all hit; where the log already holds that step it strikes the start.
    """
    whole, cut = folder / f"whole-{stage}", folder / f"cut-{stage}"
    finish(recipe, whole, stage)
    total = lines_of(whole)
    seconds = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])["seconds"] / total
    print(f"ZeRO-{stage}: {total} steps of {seconds:.2f} s with their checkpoints", flush=True)
    left = 0
    for number, step in enumerate(sorted(rng.sample(range(total - 3), kills)), 1):
        process = start(recipe, cut, stage)
        while lines_of(cut) < step and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2 * seconds))
        assert process.poll() is None, (folder / f"cut-{stage}.log").read_text()[-3000:]
        kill_all(process)
        left += check_visible(cut, stage)
        shown = ", ".join(p.name for p in (cut / "checkpoints").glob("step-*"))
        print(f"ZeRO-{stage}: kill {number} at step {lines_of(cut)}; visible: {shown or 'no checkpoint'}", flush=True)
    finish(recipe, cut, stage)
    a, b = (load_file(p / "drafter" / "model.safetensors") for p in (whole, cut))
    losses = [[json.loads(line)["loss"] for line in (p / "log.jsonl").read_text().splitlines()] for p in (whole, cut)]
    return {
        "kills": kills,
        "with_checkpoint": left,
        "steps": total,
        "weights_equal": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
        "losses_equal": losses[0] == losses[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        recipe = make_run(Path(place))
        found = {
            f"zero{stage}": trial(Path(place), recipe, stage, kills, rng)
            for stage, kills in ((2, 4 if arguments.quick else 20), (3, 1 if arguments.quick else 5))
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
