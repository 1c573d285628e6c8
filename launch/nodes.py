"""`draftsmith launch`: one DeepSpeed job on one machine, on the machines of a hostfile, or (launch/slurm.py) in a
queue.

This file knows processes and machines, not training: it starts the DeepSpeed launcher, passes signals on to the
processes that train, and reads from their records (launch/rank.py) which one was lost. `OUTPUT/processes` must be a
folder that all machines share, as OUTPUT itself.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from draftsmith.launch.rank import Record, records
from draftsmith.models.errors import UserError
from draftsmith.train.recipe import DrafterRecipe, read_recipe

PORT = 29500
GRACE = 10.0  # seconds that the other processes have to end by themselves when one is lost
SETTLE = 40.0  # seconds to wait for other machines that were asked to stop: DeepSpeed gives them 30

Say = Callable[[str], None]


def read_hostfile(file: Path) -> dict[str, int]:
    """Machine -> number of processes, in the file's order: DeepSpeed's form, `NAME slots=N` a line, with comments.

    Raises UserError naming file and line.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file}: found no readable text file, expected a hostfile with lines NAME slots=N") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\S+)", line)
        if match is None:
            raise UserError(f"{file} line {number}: found {line!r}, expected NAME slots=N")
        name, slots = match.groups()
        if not re.fullmatch(r"[0-9]+", slots) or int(slots) < 1:
            raise UserError(f"{file} line {number}: found slots={slots}, expected a positive number")
        if name in hosts:
            raise UserError(f"{file} line {number}: found {name} again, expected every machine once")
        hosts[name] = int(slots)
    if not hosts:
        raise UserError(f"{file}: found no machine, expected lines NAME slots=N")
    return hosts


def on_this_machine(recipe: str, overrides: list[str], processes: int, dry_run: bool, say: Say) -> int:
    """`processes` processes here, one a GPU where there are GPUs. Returns the exit code, as all functions below do."""
    import torch

    from draftsmith.train.distributed import free_port

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(f"--gpus: found {processes}, expected at most the {torch.cuda.device_count()} of this machine")
    return _run(["--num_gpus", str(processes), "--master_port", str(free_port())], recipe, overrides, dry_run, say)


def on_hosts(
    recipe: str,
    overrides: list[str],
    hostfile: Path,
    node: int | None,
    address: str | None,
    port: int | None,
    dry_run: bool,
    say: Say,
) -> int:
    """All machines of a hostfile through ssh; with `node`, only the part of this machine (the node-th of the file, from
    0): then the same command runs on every machine, and no ssh is needed.
    """
    hosts = read_hostfile(hostfile)
    place = [
        "--hostfile",
        str(hostfile.resolve()),
        "--master_addr",
        address or next(iter(hosts)),
        "--master_port",
        str(port or PORT),
    ]
    if node is None:
        for tool in ("ssh", "pdsh")[: min(2, len(hosts))]:
            if shutil.which(tool) is None and not dry_run:
                raise UserError(f"--hosts: found no {tool} here, expected it; or give --node-rank K on every machine")
        return _run(place, recipe, overrides, dry_run, say)
    if not 0 <= node < len(hosts):
        raise UserError(
            f"--node-rank: found {node}, expected 0..{len(hosts) - 1} ({hostfile} has {len(hosts)} "
            f"machine{'s' * (len(hosts) > 1)})"
        )
    return _run([*place, "--no_ssh", "--node_rank", str(node)], recipe, overrides, dry_run, say)


def deepspeed_program() -> str:
    """The `deepspeed` command of this environment."""
    found = shutil.which(
        "deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if found is None:
        raise UserError("launching needs the package deepspeed, found none; pip install 'draftsmith[train]'")
    return found


def _run(place: list[str], recipe: str, overrides: list[str], dry_run: bool, say: Say) -> int:
    """The DeepSpeed launcher with the machines that `place` says."""
    output = Path(read_recipe(recipe, DrafterRecipe, overrides).output)
    folder = output.resolve() / "processes"
    command = [
        deepspeed_program(),
        *place,
        "--log_level",
        "error",
        "--module",
        "draftsmith.launch.rank",
        str(folder),
        recipe,
        *overrides,
    ]
    say(shlex.join(command))
    if dry_run:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(command, folder)
    code = job.wait()
    lost = job.lost()
    if lost is None:
        return code
    if lost.saved or (
        lost.code == 2 and lost.rank == 0 and lost in job.own()
    ):  # process 0 has said here what was wrong
        return lost.code
    print(
        f"error: process {lost.rank} on {lost.host} (pid {lost.pid}) {lost.how}; {_resumes(output)}",
        file=sys.stderr,
        flush=True,
    )
    return lost.code or code


def _resumes(output: Path) -> str:
    from draftsmith.train.checkpoint import Checkpoints

    last = Checkpoints(output / "checkpoints", {}, 0, 1).latest()
    return (
        f"{last} is complete: the same command resumes there"
        if last
        else "there is no checkpoint yet: the same command begins anew"
    )


class Job:
    """A running DeepSpeed launcher in a session of its own, so that a signal reaches the processes that train first:
    they save and end, and the launcher ends with their exit code. (By itself it would give them 30 seconds.)
    """

    def __init__(self, command: list[str], folder: Path):
        import torch

        self.folder, self.since, self.asked = folder, time.time(), False
        environment = {**os.environ, **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})}
        before = {
            number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)
        }  # the launcher inherits this
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        self.before = before
        for number in before:
            signal.signal(number, lambda *_: self._ask())

    def wait(self) -> int:
        """The launcher's exit code. When a process was lost, on whatever machine, the ones of this launcher do not wait
        for it.
        """
        waiting = True
        try:
            while self.process.poll() is None:
                time.sleep(0.2)
                lost = self.lost()
                if waiting and lost and not lost.saved and time.time() - lost.ended > GRACE:
                    self._signal(signal.SIGKILL)
                    waiting = False
            limit = time.time() + SETTLE
            while (
                self.asked
                and time.time() < limit
                and any(r.code is None and r.started > self.since for r in records(self.folder))
            ):
                time.sleep(0.2)  # through ssh the launcher ends before its machines do
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)
        code = self.process.returncode
        return code if 0 <= code <= 192 else 128 + (-code if code < 0 else 256 - code)  # killed, or a process of it was

    def lost(self) -> Record | None:
        """The process that ended first, since this job began, without having finished."""
        found = [r for r in records(self.folder) if r.ended is not None and r.ended > self.since]
        if self.process.returncode is not None:  # what the launcher started cannot be running any more
            found += [r for r in self.own() if r.code is None]
        return min(found, key=lambda r: r.ended or r.started, default=None)

    def own(self) -> list[Record]:
        """The processes that this launcher started on this machine."""
        return [r for r in records(self.folder) if (r.host, r.session) == (socket.gethostname(), self.process.pid)]

    def _ask(self) -> None:
        """The processes save and end; a second signal ends them at once."""
        self._signal(signal.SIGKILL if self.asked else signal.SIGTERM)
        self.asked = True

    def _signal(self, number: int) -> None:
        running = [r.pid for r in self.own() if r.code is None]
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not running:  # none has started here yet, or all are on other machines
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
