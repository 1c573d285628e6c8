"""`draftsmith launch`: bad hostfiles, options and places are named before anything is started."""

import sys
from pathlib import Path

import pytest

from draftsmith.launch import cli

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
