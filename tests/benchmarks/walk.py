"""A newcomer's walk: from an empty environment to a drafter of their own on a Hub, every command counted and timed.

    python tests/benchmarks/walk.py [--quick]

The target is a copy of the bundled one in a directory of its own, as anyone's model would be; the Hub is the server of
tests/hub_server.py on 127.0.0.1. Nothing of this checkout is on the path: commands run in an empty folder with what
`pip install` put into a fresh virtual environment. Ends with one JSON line: commands, minutes, and the acceptance
length of the drafter that the last command reads back from the Hub.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.hub_server import TOKEN  # noqa: E402


def commands(prompts: int, tree: str) -> list[str]:
    """What is typed. torch first: without a GPU its CPU build is wanted."""
    index = f" --index-url {os.environ['TORCH_INDEX_URL']}" if "TORCH_INDEX_URL" in os.environ else ""
    return [
        f"pip install -q torch==2.13.0{index}",
        f"pip install -q '{ROOT}[train]'",
        "draftsmith doctor",
        f"draftsmith prompts prompts.jsonl --count {prompts} --target my-target",
        "draftsmith regenerate my-target prompts.jsonl answers.jsonl --temperature 0 --temperature 0.8 "
        "--max-new-tokens 96 --batch 128",
        "draftsmith train recipe.yaml target=my-target data.files=[answers.jsonl] output=run wandb=null",
        f"draftsmith eval run/drafter --tree {tree} --limit 16 --max-new-tokens 48 --temperature 0 --output run/eval",
        "draftsmith push run/drafter me/my-drafter --results run/eval/result.json --target me/my-target",
        f"draftsmith eval mine=me/my-drafter --target my-target --tree {tree} --limit 8 --max-new-tokens 48 "
        f"--temperature 0 --output again",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a third of the prompts")
    arguments = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-m", "tests.hub_server"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(ROOT / "recipes" / "targets" / "code", folder / "my-target")
        shutil.copy(ROOT / "recipes" / "eagle3-code.yaml", folder / "recipe.yaml")
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON", "VIRTUAL_ENV"))} | {
            "PATH": f"{folder}/env/bin:{os.environ['PATH']}",
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HOME": f"{folder}/home",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        typed, began = commands(300 if arguments.quick else 900, "dynamic:6x4x16"), time.time()
        for number, command in enumerate(typed, 1):
            start = time.time()
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
            print(
                f"[{number}/{len(typed)}] {time.time() - start:6.1f} s  {command.replace(str(ROOT), 'draftsmith')}",
                flush=True,
            )
            if done.returncode:
                sys.exit(f"exit code {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        tau = json.loads((folder / "again" / "result.json").read_text())["tree_tau"]
    server.terminate()
    print(
        json.dumps(
            {
                "commands": len(typed),
                "minutes": round((time.time() - began) / 60, 1),
                "tau_of_the_pushed_drafter": round(tau, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
