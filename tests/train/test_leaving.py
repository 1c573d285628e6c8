"""How a training run ends before its end: Ctrl-C, a full disk, another process on the same output; what stays, and that
the same command goes on from it.
"""

import errno
import json
import os
import signal
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from draftsmith.launch.training import main
from draftsmith.models.files import alone
from draftsmith.models.formats import layout
from draftsmith.train import data, telemetry
from draftsmith.train.checkpoint import resumes


def arguments(folder, output, *more):
    return [str(folder / "recipe.yaml"), f"output={output}", *more]


def total(output) -> int:
    return json.loads((output / "log.jsonl").read_text().splitlines()[0])["total"]


@pytest.fixture(scope="module")
def unharmed(folder, tmp_path_factory):
    """The weights of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("unharmed")
    assert main(arguments(folder, output)) == 0
    return load_file(output / "drafter" / "model.safetensors")


def same(output, weights) -> bool:
    found = load_file(output / "drafter" / "model.safetensors")
    return all(torch.equal(found[name], value) for name, value in weights.items())


def said(capsys) -> str:
    """The last line on the standard error (libraries draw their progress there)."""
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("step", [3, "last"])
def test_a_signal_saves_and_the_same_command_resumes(
    folder, tmp_path, capsys, monkeypatch, unharmed, number, code, step
):
    write = telemetry.Log.write

    def signalled(log, line):
        write(log, line)
        if line["step"] == (line["total"] if step == "last" else step):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(telemetry.Log, "write", signalled)
        assert main(arguments(folder, tmp_path / "out")) == code
    shown = total(tmp_path / "out") if step == "last" else step
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{shown}"]
    assert said(capsys) == (
        f"terminated; step {shown} is saved in {tmp_path}/out/checkpoints, the same command resumes there"
    )
    assert main(arguments(folder, tmp_path / "out")) == 0 and same(tmp_path / "out", unharmed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_run_goes_on_from(tmp_path):
    assert resumes(tmp_path) == "there is no checkpoint yet: the same command begins anew"
    for name in ("step-9", "step-10", ".step-11"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert resumes(tmp_path) == f"{tmp_path}/checkpoints/step-10 is complete: the same command resumes there"
    (tmp_path / "drafter").mkdir()
    assert resumes(tmp_path) == f"the drafter is saved in {tmp_path}/drafter: nothing is left to do"


def test_ctrl_c_before_the_first_step_says_that_nothing_is_saved_yet(folder, tmp_path, capsys, monkeypatch):
    def pressed(file):
        os.kill(os.getpid(), signal.SIGINT)
        yield 1, {}

    monkeypatch.setattr(data, "read_records", pressed)
    assert main(arguments(folder, tmp_path / "out")) == 130
    line = "interrupted; there is no checkpoint yet: the same command begins anew"
    assert said(capsys) == line and not list((tmp_path / "out" / "rows").iterdir())


def test_a_second_ctrl_c_does_not_wait_for_the_step(folder, tmp_path, capsys, monkeypatch):
    write = telemetry.Log.write

    def twice(log, line):
        write(log, line)
        for _ in range(2 if line["step"] == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(telemetry.Log, "write", twice)
    assert main(arguments(folder, tmp_path / "out", "engine.checkpoint_minutes=0")) == 130
    line = f"interrupted; {tmp_path}/out/checkpoints/step-2 is complete: the same command resumes there"
    assert said(capsys) == line


FULL = {
    "as the system says it": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "as safetensors says it": SafetensorError("I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_disk_that_is_full_at_the_end_costs_one_line_and_the_run_resumes(
    folder, tmp_path, capsys, monkeypatch, unharmed, error
):
    def full(tensors, file, **options):
        if "checkpoints" not in file.parts:
            raise error
        save_file(tensors, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(layout, "save_file", full)
        assert main(arguments(folder, tmp_path / "out")) == 2
    line = said(capsys)
    last = f"{tmp_path}/out/checkpoints/step-{total(tmp_path / 'out')}"
    assert line.startswith(f"error: {tmp_path}/out/drafter: cannot be written (") and "No space left on device" in line
    assert line.endswith(f"; {last} is complete: the same command resumes there")
    assert not (tmp_path / "out" / "drafter").exists()
    assert main(arguments(folder, tmp_path / "out")) == 0 and same(tmp_path / "out", unharmed)
    assert f"resumed at step {total(tmp_path / 'out')}" in capsys.readouterr().out


def test_a_disk_that_is_full_at_the_last_checkpoint_leaves_the_one_before(
    folder, tmp_path, capsys, monkeypatch, unharmed
):
    def full(tensors, file, **options):
        if any(part == f".step-{total(tmp_path / 'out')}" for part in file.parts):
            raise FULL["as safetensors says it"]
        save_file(tensors, file, **options)

    often = arguments(folder, tmp_path / "out", "engine.checkpoint_minutes=0")
    with monkeypatch.context() as patch:
        patch.setattr(layout, "save_file", full)
        assert main(often) == 2
    last = total(tmp_path / "out") - 1
    assert f"step-{last} is complete: the same command resumes there" in said(capsys)
    assert main(often) == 0 and same(tmp_path / "out", unharmed)


def test_a_disk_that_is_full_in_the_middle(folder, tmp_path, capsys, monkeypatch, unharmed):
    write = telemetry.Log.write

    def full(log, line):
        if line["step"] == 3:
            raise FULL["as the system says it"]
        write(log, line)

    often = arguments(folder, tmp_path / "out", "engine.checkpoint_minutes=0")
    with monkeypatch.context() as patch:
        patch.setattr(telemetry.Log, "write", full)
        assert main(often) == 2
    line = said(capsys)
    assert line.startswith(f"error: {tmp_path}/out: cannot be written ([Errno 28] No space left on device)")
    assert line.endswith(f"; {tmp_path}/out/checkpoints/step-2 is complete: the same command resumes there")
    assert main(often) == 0 and same(tmp_path / "out", unharmed)


def test_of_two_runs_on_one_output_the_second_is_refused(folder, tmp_path, capsys):
    with alone(tmp_path / "out", "train", "out"):
        assert main(arguments(folder, tmp_path / "out")) == 2
    assert said(capsys).startswith(f"error: {tmp_path}/out: another process writes there, expected one")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".train.lock"]
    assert main(arguments(folder, tmp_path / "out")) == 0


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_that_the_user_asked_for(folder, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert main(arguments(folder, tmp_path / "out", "data.features=cached")) == 0
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {oct(mode) for path, mode in modes.items() if path.name != ".train.lock"} == {oct(0o666 & ~umask)}, modes
    assert any(path.suffix == ".safetensors" and "features" in path.parts for path in modes)
