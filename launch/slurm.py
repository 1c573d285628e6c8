"""`draftsmith launch --slurm`: the batch script of a job that saves before its time is up, queues itself again and
resumes.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.train.recipe import DrafterRecipe, read_recipe

SCRIPT = """#!/bin/bash
# Written by `draftsmith launch --slurm`: one launcher per machine.
# Two minutes before the limit the run saves, and the job queues itself again.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}{partition}
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output={log}

cd {here} || exit 1
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
export MASTER_ADDR=$(head -n 1 <<< "$hosts")
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export HOSTFILE={output}/hosts-$SLURM_JOB_ID
sed 's/$/ slots={gpus}/' <<< "$hosts" > "$HOSTFILE" || exit 1

srun --kill-on-bad-exit=1 bash -c {command} &
job=$!
trap 'stopped=yes; kill -TERM $job' TERM
wait $job
code=$?
if [ -n "$stopped" ]; then  # the signal ended the first wait
    wait $job
    code=$?
fi
if [ -n "$stopped" ] && [ $code -eq 143 ]; then  # 143: the run has saved its state
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def in_a_queue(
    recipe: str,
    overrides: list[str],
    nodes: int,
    gpus: int,
    time: str,
    partition: str | None,
    dry_run: bool,
    say: Callable[[str], None],
) -> int:
    """Writes OUTPUT/launch.sbatch and submits it where there is an `sbatch`, whose exit code is returned."""
    if not re.fullmatch(r"[0-9]+(:[0-5]?[0-9]){0,2}|[0-9]+-[0-9]+(:[0-5]?[0-9]){0,2}", time):
        raise UserError(f"--time: found {time!r}, expected MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    if partition is not None and not re.fullmatch(r"[\w.,-]+", partition):
        raise UserError(f"--partition: found {partition!r}, expected a partition's name")
    output = Path(read_recipe(recipe, DrafterRecipe, overrides).output).resolve()
    text, place = batch_script(recipe, overrides, output, nodes, gpus, time, partition), output / "launch.sbatch"
    if dry_run:
        say(f"# {place}\n{text}")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    place.write_text(text, "utf-8")
    if shutil.which("sbatch") is None:
        say(f"{place} is written; there is no sbatch here, submit it with: sbatch {shlex.quote(str(place))}")
        return 0
    return subprocess.run(["sbatch", str(place)]).returncode


def batch_script(
    recipe: str, overrides: list[str], output: Path, nodes: int, gpus: int, time: str, partition: str | None
) -> str:
    """The script. Paths are those of this machine, as the nodes see them."""
    launcher = shlex.join([sys.executable, "-m", "draftsmith.launch", "launch", recipe, *overrides])
    command = (
        f'exec {launcher} --hosts "$HOSTFILE" --node-rank "$SLURM_NODEID" '
        f'--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"'
    )
    return SCRIPT.format(
        name=f"draftsmith-{re.sub(r'[^A-Za-z0-9_.-]', '-', Path(recipe).stem)}",
        nodes=nodes,
        gpus=gpus,
        time=time,
        partition=f"\n#SBATCH --partition={partition}" if partition else "",
        log=f"{output}/slurm-%j.log".replace(" ", "\\ "),
        here=shlex.quote(str(Path.cwd())),
        output=shlex.quote(str(output)),
        command=shlex.quote(command),
    )
