"""Launching: two nodes on loopback, a lost process, a job told to stop, a batch script under stand-ins for Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.launch import training
from draftsmith.launch.rank import records
from draftsmith.train.distributed import free_port
from tests.conftest import ROOT

ZERO2 = ["optimization.name=adamw", "engine.zero_stage=2", "optimization.epochs=12"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
LIMIT = 200  # seconds that a job may take


def start(cwd: Path, *arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "draftsmith.launch", "launch", *map(str, arguments)],
        cwd=cwd,
        text=True,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(process: subprocess.Popen, limit: float = LIMIT) -> tuple[int, str]:
    """(exit code, what it said); a job that hangs is ended."""
    try:
        said = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, said


def log_of(output: Path) -> list[dict]:
    file = output / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def await_step(output: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run has a complete checkpoint of that step or a later one."""
    limit = time.time() + LIMIT
    while not any(int(p.name[5:]) >= step for p in (output / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.time() < limit, end(process)[1][-3000:]
        time.sleep(0.02)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "drafter" / "model.safetensors")


def start_nodes(folder: Path, place: Path, *more) -> list[subprocess.Popen]:
    """The two machines of a hostfile, both of them this one."""
    (place / "hosts").write_text("# two names of one machine\n127.0.0.1 slots=1\nlocalhost slots=1  # loopback\n")
    port = free_port()
    return [
        start(
            place,
            folder / "recipe.yaml",
            *ZERO2,
            f"output={place}/out",
            *more,
            "--hosts",
            "hosts",
            "--node-rank",
            k,
            "--master-port",
            port,
        )
        for k in (0, 1)
    ]


@pytest.fixture(scope="module")
def two_nodes(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("nodes")
    for code, said in [end(node) for node in start_nodes(folder, place)]:
        assert code == 0, said[-3000:]
    return place / "out"


@pytest.mark.timeout(500)
def test_two_nodes_train_as_one_process_does(folder, two_nodes, tmp_path):
    """One process accumulates the two micro-batches that two nodes share. The rows were prepared once, and no record of
    a process is left.
    """
    assert (
        training.main([str(folder / "recipe.yaml"), *ZERO2, "optimization.accumulation=2", f"output={tmp_path}/single"])
        == 0
    )
    want = [line["loss"] for line in log_of(tmp_path / "single")]
    assert len(want) > 20 and want[-1] < want[0]
    assert [line["loss"] for line in log_of(two_nodes)] == pytest.approx(want, rel=1e-5)
    assert json.loads((two_nodes / "drafter" / "draftsmith.json").read_text())["world_size"] == 2
    assert len(list((two_nodes / "rows").iterdir())) == 1 and not records(two_nodes / "processes")


@pytest.mark.timeout(900)
def test_a_job_that_loses_a_process_says_so_and_resumes(folder, two_nodes, tmp_path):
    """The process of node 1 is killed while that of node 0 hangs, as in a collective without an end; started again, the
    job is told to stop; started once more, it ends with the weights of the run that nothing happened to.
    """
    output, often = tmp_path / "out", "engine.checkpoint_minutes=0"
    nodes = start_nodes(folder, tmp_path, often)
    await_step(output, 3, nodes[0])
    hanging, victim = records(output / "processes")
    os.kill(hanging.pid, signal.SIGSTOP)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.time()
    for code, said in [end(node) for node in nodes]:
        last = said.strip().splitlines()[-1]
        assert code == 137 and time.time() - killed < 60, said[-3000:]
        assert last.startswith(f"error: process 1 on {victim.host} (pid {victim.pid}) was killed by SIGKILL"), said[
            -3000:
        ]
        assert f"{output}/checkpoints/step-" in last and last.endswith("is complete: the same command resumes there")
    step = log_of(output)[-1]["step"]
    assert step < log_of(output)[-1]["total"]

    command = [folder / "recipe.yaml", *ZERO2, f"output={output}", often, "--gpus", "2"]
    job = start(tmp_path, *command)
    await_step(output, step + 3, job)
    job.terminate()
    code, said = end(job)
    assert (
        code == 143 and "resumed at step" in said and "the same command resumes there" in said and "error:" not in said
    ), said[-3000:]

    code, said = end(start(tmp_path, *command))
    assert code == 0 and "resumed at step" in said, said[-3000:]
    assert [line["loss"] for line in log_of(output)] == [line["loss"] for line in log_of(two_nodes)]
    for name, value in weights(two_nodes).items():
        assert torch.equal(value, weights(output)[name]), name


@pytest.mark.timeout(600)
def test_ctrl_c_on_a_job_saves_and_another_job_on_its_output_is_refused(folder, tmp_path):
    long = ["optimization.epochs=400", "engine.checkpoint_minutes=0"]
    command = folder / "recipe.yaml", *ZERO2, f"output={tmp_path}/out", *long, "--gpus", "2"
    job = start(tmp_path, *command)
    await_step(tmp_path / "out", 3, job)
    code, said = end(start(tmp_path, *command))
    assert code == 2 and f"error: {tmp_path}/out: another process writes there" in said, said[-3000:]
    job.send_signal(signal.SIGINT)
    code, said = end(job)
    assert code == 130 and "the same command resumes there" in said and "error:" not in said, said[-3000:]
    job = start(tmp_path, *command)
    time.sleep(1)
    job.send_signal(signal.SIGINT)  # before it has started anything
    code, said = end(job)
    assert code == 130, said[-3000:]


@pytest.mark.parametrize(
    ("work", "code", "how"),
    [
        ("0", 0, None),
        ("os.kill(os.getpid(), 11)", 139, "was killed by SIGSEGV"),
        ("os.kill(os.getpid(), 15)", 143, "was killed by SIGTERM"),
        ("tell('the disk\\nis full') or 2", 2, "ended with exit code 2: the disk is full"),
        ("1 / 0", 1, "ended with exit code 1: ZeroDivisionError: division by zero"),
        ("time.sleep(0.5) or os.kill(os.getppid(), 9)", -9, "ended without a word"),
    ],
)
def test_a_watched_process_is_recorded_however_it_ends(tmp_path, work, code, how):
    program = (
        "import os, sys, time; from pathlib import Path; from draftsmith.launch.rank import watch; "
        f"sys.exit(watch(Path('.'), 3, lambda tell: {work}))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=60
        ).returncode
        == code
    )
    found = records(tmp_path)
    assert [(r.rank, r.how) for r in found] == ([(3, how)] if how else []), found
    assert all(r.ended is None or r.ended >= r.started for r in found)


FAKES = {
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> requeued',
    "sbatch": 'echo "$@" >> submitted',
    "srun": 'echo "$1 $2 $3" >> steps; shift; export SLURM_NODEID=0; exec "$@"',
}


@pytest.mark.timeout(600)
def test_the_batch_script_saves_before_its_limit_queues_itself_and_resumes(folder, tmp_path):
    """Slurm's three commands are stand-ins of a line each; the launcher and the run below them are real."""
    (tmp_path / "bin").mkdir()
    for name, line in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    output, command = (
        tmp_path / "an out",
        [
            folder / "recipe.yaml",
            f"output={tmp_path}/an out",
            "optimization.epochs=30",
            "--slurm",
            "--partition",
            "gpu",
            "--time",
            "2-00:00:00",
        ],
    )
    code, said = end(start(tmp_path, *command, "--dry-run", PATH=path))
    assert code == 0 and "#SBATCH --requeue\n" in said and not output.exists() and not (tmp_path / "submitted").exists()
    code, said = end(start(tmp_path, *command, PATH=path))
    script = output / "launch.sbatch"
    assert code == 0 and (tmp_path / "submitted").read_text() == f"{script}\n", said
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for line in (
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--time=2-00:00:00",
        "--partition=gpu",
        "--requeue",
        "--signal=B:TERM@120",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in script.read_text()

    def batch() -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", script],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, "PATH": path, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1]"},
        )

    job = batch()
    limit = time.time() + LIMIT
    while not log_of(output) and time.time() < limit and job.poll() is None:
        time.sleep(0.02)
    job.terminate()
    code, said = end(job)
    assert code == 143 and (tmp_path / "requeued").read_text() == "requeue 77\n", said[-3000:]
    assert (output / "hosts-77").read_text() == "127.0.0.1 slots=1\n" and (
        tmp_path / "steps"
    ).read_text() == "--kill-on-bad-exit=1 bash -c\n"
    code, said = end(batch())
    assert code == 0 and "resumed at step" in said and (output / "drafter").is_dir(), said[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
