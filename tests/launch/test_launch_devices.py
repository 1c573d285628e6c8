"""`draftsmith launch`: which devices the processes of a job see, and the commands that start them."""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from draftsmith.launch import cli, nodes
from draftsmith.launch.nodes import read_hostfile
from draftsmith.models.errors import UserError
from draftsmith.train.distributed import free_port
from tests.launch.test_launch import ENVIRONMENT, LIMIT


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
