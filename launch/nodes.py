"""`draftsmith launch`: one DeepSpeed job on one machine, on the machines of a hostfile, or (launch/slurm.py) in a
queue.

This file knows processes and machines, not training: it starts the DeepSpeed launcher, passes signals on to the
processes that train, and reads from their records (launch/rank.py) which one was lost. `OUTPUT/processes` must be a
folder that all machines share, as OUTPUT itself.
"""

import base64
import contextlib
import importlib.util
import json
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

from draftsmith.launch.program import INTERRUPTED
from draftsmith.launch.rank import Record, records
from draftsmith.models.errors import UserError
from draftsmith.models.files import alone
from draftsmith.train.checkpoint import resumes
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
    from draftsmith.train.distributed import free_port

    devices = devices_for(processes, "--gpus")
    command = launcher({"localhost": devices}, 0, "127.0.0.1", free_port())
    return _run(command, recipe, overrides, dry_run, say, devices)


def devices_for(processes: int, asked_by: str) -> list[str]:
    """The first devices of CUDA_VISIBLE_DEVICES (numbers, or the names of GPUs or MIG instances), or of this machine;
    where no GPU is to be seen, as many names of none. Raises UserError naming what asked for so many.
    """
    import torch

    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in (told or "").split(",") if name.strip()]
    if repeated := next((name for name in named if named.count(name) > 1), None):
        raise UserError(f"CUDA_VISIBLE_DEVICES: found {repeated} twice in {told}, expected every device once")
    if not torch.cuda.is_available():
        return named[:processes] if len(named) >= processes else ["-1"] * processes
    count = torch.cuda.device_count()  # those that CUDA_VISIBLE_DEVICES leaves
    if processes > count:
        where = "of this machine" if told is None else f"of CUDA_VISIBLE_DEVICES={told}"
        mig = "; CUDA shows a process one MIG instance only" if any(name.startswith("MIG-") for name in named) else ""
        raise UserError(f"{asked_by}: found {processes}, expected at most the {count} {where}{mig}")
    return named[:processes] if named else [str(k) for k in range(processes)]


def in_words(devices: list[str]) -> str:
    """`2 processes on 2 (NVIDIA A100), 3 (NVIDIA A100)`."""
    import torch

    count = f"{len(devices)} process{'es' * (len(devices) > 1)}"
    if not torch.cuda.is_available():
        told = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"{count} on the CPU: torch finds no GPU here" + (f" (CUDA_VISIBLE_DEVICES={told})" if told else "")
    return f"{count} on " + ", ".join(
        f"{name} ({torch.cuda.get_device_name(index)})" for index, name in enumerate(devices)
    )


def launcher(world: dict[str, list[str]], node: int, address: str, port: int) -> list[str]:
    """DeepSpeed's launcher of one machine, number `node` of `world` (machine -> its devices). The `deepspeed` command
    would start the same, but looks for a hostfile where none was named, and takes numbers of devices alone.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("launching needs the package deepspeed, found none; pip install 'draftsmith[train]'")
    told = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    place = [f"--world_info={told}", f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}"]
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *place]


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
    address, port = address or next(iter(hosts)), port or PORT
    if node is None:
        for tool in ("ssh", "pdsh")[: min(2, len(hosts))]:
            if shutil.which(tool) is None and not dry_run:
                raise UserError(f"--hosts: found no {tool} here, expected it; or give --node-rank K on every machine")
        place = ["--hostfile", str(hostfile.resolve()), "--master_addr", address, "--master_port", str(port)]
        return _run([deepspeed_program(), *place], recipe, overrides, dry_run, say)
    if not 0 <= node < len(hosts):
        raise UserError(
            f"--node-rank: found {node}, expected 0..{len(hosts) - 1} ({hostfile} has {len(hosts)} "
            f"machine{'s' * (len(hosts) > 1)})"
        )
    own = list(hosts)[node]
    devices = devices_for(hosts[own], f"{hostfile}: {own}: slots")
    world = {host: devices if host == own else [str(k) for k in range(slots)] for host, slots in hosts.items()}
    return _run(launcher(world, node, address, port), recipe, overrides, dry_run, say, devices, node)


def deepspeed_program() -> str:
    """The `deepspeed` command of this environment."""
    found = shutil.which(
        "deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if found is None:
        raise UserError("launching needs the package deepspeed, found none; pip install 'draftsmith[train]'")
    return found


def _run(
    launching: list[str],
    recipe: str,
    overrides: list[str],
    dry_run: bool,
    say: Say,
    devices: list[str] | None = None,
    node: int = 0,
) -> int:
    """A launcher that was told its machines. devices: of this machine, where they are known; node: its number."""
    output = Path(read_recipe(recipe, DrafterRecipe, overrides).output)
    folder = output.resolve() / "processes"
    module = ["--log_level", "error", "--module", "draftsmith.launch.rank", str(folder), recipe, *overrides]
    command = [*launching, *module]
    say(shlex.join(command))
    if devices is not None:
        say(in_words(devices))
    if dry_run:
        return 0
    with alone(folder, f"launch-{node}", output):  # each machine of a hostfile has its own part
        job = Job(command, folder)
        code = job.wait()
    lost = job.lost()
    interrupted = job.asked == signal.SIGINT
    if lost is not None and lost.saved:  # process 0 has said so
        return INTERRUPTED if interrupted else lost.code
    if interrupted and code:
        print(f"interrupted; {resumes(output)}", file=sys.stderr, flush=True)
        return INTERRUPTED
    if lost is None:
        return code
    if lost.code == 2 and lost.rank == 0 and lost in job.own():  # process 0 has said here what was wrong
        return lost.code
    print(
        f"error: process {lost.rank} on {lost.host} (pid {lost.pid}) {lost.how}; {resumes(output)}",
        file=sys.stderr,
        flush=True,
    )
    return lost.code or code


class Job:
    """A running DeepSpeed launcher in a session of its own, so that a signal reaches the processes that train first:
    they save and end, and the launcher ends with their exit code. (By itself it would give them 30 seconds.)

    asked: the signal that told the job to end, None before.
    """

    def __init__(self, command: list[str], folder: Path):
        import torch

        self.folder, self.since, self.asked, self.process = folder, time.time(), None, None
        environment = {**os.environ, **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})}
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.asked:
            self._signal(signal.SIGTERM)

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

    def _ask(self, number: int, frame) -> None:
        """The processes save and end; a second signal ends them at once."""
        again, self.asked = self.asked is not None, self.asked or number
        self._signal(signal.SIGKILL if again else signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        running = [r.pid for r in self.own() if r.code is None]
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not running:  # none has started here yet, or all are on other machines
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
