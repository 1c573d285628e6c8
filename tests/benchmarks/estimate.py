"""What `--dry-run` says of a run beside what the run took: memory, disk and time on the bundled target.

    python tests/benchmarks/estimate.py [--quick]

Answers of the target to held-out prompts are trained on with recipes/eagle3-code.yaml in batches of 4,096 tokens,
features cached. Memory is the growth of the process's peak resident size from after its imports on; time is that of all
steps but the first tenth. Ends with one JSON line: estimate / measured for each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import json, sys
from pathlib import Path
import deepspeed, datasets
from draftsmith.launch.training import main
from draftsmith.train import loop
status = lambda: Path("/proc/self/status").read_text().splitlines()
peak = lambda: int(next(line for line in status() if line.startswith("VmHWM")).split()[1]) * 1024
before, save, sizes = peak(), loop.Checkpoints.save, []
def sized(self, *arguments):
    save(self, *arguments)
    sizes.append(sum(f.stat().st_size for f in latest(self.folder).rglob("*") if f.is_file()))
loop.Checkpoints.save = sized
code = main(sys.argv[1:])
print(json.dumps({"memory": peak() - before, "checkpoint": sizes[0] if sizes else 0}), file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    from draftsmith.launch.regenerate import regenerate
    from draftsmith.models.chat import load_tokenizer, stop_ids
    from draftsmith.models.targets import describe
    from draftsmith.train.data import prepare
    from draftsmith.train.estimate import estimate
    from draftsmith.train.recipe import DrafterRecipe, read_recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one epoch instead of four")
    epochs = 1 if parser.parse_args().quick else 4
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        regenerate(
            "bundled:targets/code",
            str(ROOT / "recipes" / "prompts" / "code.jsonl"),
            f"{folder}/answers.jsonl",
            [0.0, 0.8],
            128,
            78,
            None,
            0,
        )
        overrides = [
            f"data.files=[{folder}/answers.jsonl]",
            f"output={folder}/out",
            f"optimization.epochs={epochs}",
            "data.features=cached",
            "evaluation.rows=0",
            "engine.checkpoint_minutes=0",
            "optimization.batch_tokens=4096",
        ]
        recipe = read_recipe(ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, overrides)
        tokenizer, described = load_tokenizer(recipe.target), describe(recipe.target)
        rows = prepare(
            recipe.data.files,
            recipe.data.max_length,
            0.0,
            tokenizer,
            stop_ids(described, tokenizer),
            described.vocab_size,
            folder / "rows",
        )
        said = estimate(recipe, described, 1, torch.device("cpu"), (len(rows.tokens), int(rows.mask.sum())))
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(ROOT / "recipes" / "eagle3-code.yaml"), *overrides],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        took = json.loads(done.stderr.strip().splitlines()[-1])
        log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
        size = lambda path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())  # noqa: E731
        disk = {
            "drafter": size(folder / "out" / "drafter"),
            "rows": size(folder / "out" / "rows"),
            "features": size(folder / "out" / "features"),
            "checkpoint": took["checkpoint"],
        }
        later = log[len(log) // 10 :]
        spent = {part: sum(line["split"][part] for line in later) for part in ("target", "drafter", "optimizer")}
        tokens = said.tokens * len(later) / len(log)
    print(f"{'':22}{'estimate':>12}{'measured':>12}")
    ratio = {"memory": sum(said.memory.values()) / took["memory"]}
    print(f"{'memory, MB':22}{sum(said.memory.values()) / 1e6:12.1f}{took['memory'] / 1e6:12.1f}")
    for part, measured in disk.items():
        ratio[part] = said.disk[part] / measured
        print(f"{'disk, ' + part + ', MB':22}{said.disk[part] / 1e6:12.2f}{measured / 1e6:12.2f}")
    for part, measured in spent.items():
        guess = said.seconds_per_token[part] * tokens
        print(f"{'seconds, ' + part:22}{guess:12.2f}{measured:12.2f}")
    ratio["seconds"] = sum(said.seconds_per_token.values()) * tokens / sum(spent.values())
    print(json.dumps({name: round(value, 2) for name, value in ratio.items()}))


if __name__ == "__main__":
    main()
