"""Several trainings behind one another in the two processes of one `deepspeed` launch, which takes longer to start than
any of them to run.

`deepspeed --module tests.one_launch FILE` trains each entry of the JSON file: a port where its two processes meet, and
the arguments of `draftsmith train`. The first one that fails ends the launch with its exit code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from draftsmith.launch.training import main
from draftsmith.train.distributed import free_port

ROOT = Path(__file__).parents[1]


def run(command, folder: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    """A command in a folder, with this environment's programs and our packages."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(
        [str(c) for c in command], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )


def train_in_two_processes(folder: Path, *trainings: list, timeout: float = 600) -> subprocess.CompletedProcess:
    """trainings: the arguments of `draftsmith train` for each."""
    plan = folder / "trainings.json"
    plan.write_text(json.dumps([[free_port(), *map(str, arguments)] for arguments in trainings]))
    launcher = ["deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    return run([*launcher, "--module", "tests.one_launch", plan], folder, timeout=timeout)


def train_each(plan: Path) -> int:
    linear = torch.nn.functional.linear
    for port, *arguments in json.loads(plan.read_text()):
        os.environ["MASTER_PORT"] = str(port)
        if code := main(arguments):
            print(f"{code}: {' '.join(arguments)}", file=sys.stderr)
            return code
        torch.nn.functional.linear = linear  # ZeRO-3 leaves one of its own there
    return 0


if __name__ == "__main__":
    sys.exit(train_each(Path(sys.argv[-1])))
