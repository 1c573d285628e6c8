"""Launching: two nodes on loopback, a lost process, a job told to stop, a batch script under stand-ins for Slurm, bad
input.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.launch import cli, nodes, training
from draftsmith.launch.nodes import read_hostfile
from draftsmith.launch.rank import records
from draftsmith.models.errors import UserError
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


HOSTS = [
    ("", "hosts: found no machine, expected lines NAME slots=N"),
    ("# nobody\n\n", "hosts: found no machine"),
    ("a slots=1\nb\n", "hosts line 2: found 'b', expected NAME slots=N"),
    ("a slots=1 b slots=2", "hosts line 1: found 'a slots=1 b slots=2'"),
    ("a slots=two", "hosts line 1: found slots=two, expected a positive number"),
    ("a slots=0", "hosts line 1: found slots=0"),
    ("a slots=-1", "hosts line 1: found slots=-1"),
    ("a slots=1\n# b\na slots=2", "hosts line 3: found a again, expected every machine once"),
    (b"\xff\xfe", "hosts: found no readable text file"),
]
OPTIONS = [
    ([], "found no place to run, expected --gpus N, --hosts FILE or --slurm"),
    (["--gpus", "2", "--hosts", "HOSTS"], "found --gpus --hosts, expected"),
    (["--slurm", "--hosts", "HOSTS"], "found --hosts --slurm, expected"),
    (["--gpus", "0"], "--gpus"),
    (["--gpus", "two"], "--gpus"),
    (["--hosts", "/none"], "/none: found no readable text file, expected a hostfile"),
    (["--hosts", "HOSTS", "--node-rank", "2"], "--node-rank: found 2, expected 0..1 (HOSTS has 2 machines)"),
    (["--hosts", "HOSTS", "--node-rank", "-1"], "--node-rank: found -1, expected 0..1"),
    (["--hosts", "HOSTS", "--node-rank", "0", "--master-port", "70000"], "--master-port"),
    (["--gpus", "2", "--node-rank", "0"], "found --node-rank without --hosts"),
    (["--gpus", "2", "--partition", "x"], "found --partition without --slurm"),
    (["--slurm", "--time", "soon"], "--time: found 'soon', expected MINUTES"),
    (["--slurm", "--partition", "a b"], "--partition: found 'a b'"),
    (["seed=abc", "--gpus", "2"], "seed: found 'abc'"),
    (["nonsense", "--slurm"], "override 'nonsense'"),
    (["--gpus", "2", "--quickly"], "--quickly"),
]


def refused(monkeypatch, capsys, arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["draftsmith", "launch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize(("text", "message"), HOSTS, ids=[message for _, message in HOSTS])
def test_bad_hostfiles(folder, tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(
        monkeypatch, capsys, [str(folder / "recipe.yaml"), "--hosts", "hosts", "--node-rank", "0"]
    )


@pytest.mark.parametrize(
    ("options", "message"), OPTIONS, ids=[" ".join(options) or "nothing" for options, _ in OPTIONS]
)
def test_bad_options(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("HOSTS").write_text("a slots=1\nb slots=1\n")
    assert message in refused(monkeypatch, capsys, [str(folder / "recipe.yaml"), f"output={tmp_path}/never", *options])
    assert not (tmp_path / "never").exists()


def test_a_recipe_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert "none.yaml: no such recipe" in refused(monkeypatch, capsys, ["none.yaml", "--gpus", "2"])


def test_an_output_that_cannot_be_written(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in refused(
        monkeypatch, capsys, [str(folder / "recipe.yaml"), f"output={tmp_path}/file/out", "--gpus", "2"]
    )


@pytest.fixture
def machine(monkeypatch):
    """machine(names) -> as torch sees GPUs of these names."""

    def see(names: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])

    return see


VISIBLE = [
    (None, 2, ["H0", "H1", "H2"], ["0", "1"], "2 processes on 0 (H0), 1 (H1)"),
    ("2,3", 2, ["H2", "H3"], ["2", "3"], "2 processes on 2 (H2), 3 (H3)"),
    (" 5, 2 ,7", 2, ["H5", "H2", "H7"], ["5", "2"], "2 processes on 5 (H5), 2 (H2)"),
    ("GPU-1a,GPU-2b", 2, ["H1", "H2"], ["GPU-1a", "GPU-2b"], "2 processes on GPU-1a (H1), GPU-2b (H2)"),
    ("MIG-1a,MIG-2b", 1, ["H1 1g.10gb"], ["MIG-1a"], "1 process on MIG-1a (H1 1g.10gb)"),
    ("2,3", 2, [], ["2", "3"], "2 processes on the CPU: torch finds no GPU here (CUDA_VISIBLE_DEVICES=2,3)"),
    ("", 2, [], ["-1", "-1"], "2 processes on the CPU: torch finds no GPU here"),
    ("2", 2, [], ["-1", "-1"], "2 processes on the CPU: torch finds no GPU here (CUDA_VISIBLE_DEVICES=2)"),
]


@pytest.mark.parametrize(("told", "processes", "seen", "devices", "line"), VISIBLE)
def test_the_devices_that_the_user_names_are_taken(monkeypatch, machine, told, processes, seen, devices, line):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    machine(seen)
    assert nodes.devices_for(processes, "--gpus") == devices and nodes.in_words(devices) == line


TOO_MANY = [
    (None, 4, ["H0", "H1"], "--gpus: found 4, expected at most the 2 of this machine"),
    ("2,3", 3, ["H2", "H3"], "--gpus: found 3, expected at most the 2 of CUDA_VISIBLE_DEVICES=2,3"),
    (
        "MIG-1a,MIG-2b",
        2,
        ["H1"],
        "expected at most the 1 of CUDA_VISIBLE_DEVICES=MIG-1a,MIG-2b; CUDA shows a process one",
    ),
    ("2,3,2", 2, [], "CUDA_VISIBLE_DEVICES: found 2 twice in 2,3,2, expected every device once"),
]


@pytest.mark.parametrize(("told", "processes", "seen", "message"), TOO_MANY)
def test_devices_that_are_not_there(monkeypatch, machine, told, processes, seen, message):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    machine(seen)
    with pytest.raises(UserError) as error:
        nodes.devices_for(processes, "--gpus")
    assert message in str(error.value)


@pytest.mark.parametrize("devices", [["2", "3"], ["GPU-5c6f", "GPU-91ab"]])
def test_the_processes_see_these_devices_whatever_hostfile_lies_there(tmp_path, devices):
    command = nodes.launcher({"localhost": devices}, 0, "127.0.0.1", free_port())
    said = subprocess.run(
        [*command, "--log_level", "error", "--no_python", "--no_local_rank", shutil.which("env")],
        env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    ).stdout.splitlines()
    assert said.count(f"CUDA_VISIBLE_DEVICES={','.join(devices)}") == 2
    assert sorted(line for line in said if line.startswith("RANK=")) == ["RANK=0", "RANK=1"]


def test_one_machine_of_a_hostfile_keeps_its_devices(folder, tmp_path, capsys, monkeypatch):
    """Those of the others are theirs to choose."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    arguments = str(folder / "recipe.yaml"), [f"output={tmp_path}/never"], tmp_path / "hosts", 1, None, None, True
    said = []
    assert nodes.on_hosts(*arguments, said.append) == 0
    world = re.search(r"--world_info=(\S+)", said[0])[1]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"a": ["0", "1"], "b": ["5", "6", "7"]}


def test_dry_runs_show_the_command_and_write_nothing(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    assert read_hostfile(tmp_path / "hosts") == {"a": 8, "b": 4}
    for options, shown in (
        (["--gpus", "2"], "--node_rank=0 --master_addr=127.0.0.1 --master_port="),
        (["--hosts", f"{tmp_path}/hosts"], f"--hostfile {tmp_path}/hosts --master_addr a --master_port 29500"),
        (["--hosts", f"{tmp_path}/hosts", "--node-rank", "1"], "--node_rank=1 --master_addr=a --master_port=29500"),
    ):
        monkeypatch.setattr(
            sys,
            "argv",
            ["draftsmith", "launch", str(folder / "recipe.yaml"), f"output={tmp_path}/never", *options, "--dry-run"],
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().out
        assert (
            ended.value.code == 0
            and shown in said
            and ("deepspeed.launcher.launch " in said or "/deepspeed --hostfile" in said)
            and "--module draftsmith.launch.rank" in said
        )
    assert not (tmp_path / "never").exists()
