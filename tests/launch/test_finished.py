"""Results of one file are made once: the same command shows them, another one is refused before its work."""

import json

import pytest

from draftsmith.models.files import alone

VERIFY = ["verify", "{place}/drafter", "--tree", "chain:2", "--batch", "1", "--temperature", "0", "--output", "{out}"]
SWEEP = ["sweep", "{place}/drafter", "--tree", "chain:1", "--tree", "chain:2", "--threads", "1", "--output", "{out}"]
TUNE = [
    "tune-tree",
    "recycling",
    "--target",
    "{place}/target",
    "--candidates",
    "8",
    "--depth",
    "3",
    "--size",
    "4",
    "--temperature",
    "0",
]
COMMON = ["--suite", "{place}/prompts.jsonl", "--max-new-tokens", "6", "--limit", "2"]
COMMANDS = {
    "verify": (VERIFY + COMMON, "lossless.json"),
    "sweep": (SWEEP + COMMON, "sweep.json"),
    "tune-tree": (
        TUNE + COMMON + ["--max-new-tokens", "40", "--trajectories", "2", "--output", "{out}/tree.json"],
        "tree.json",
    ),
}
OTHERS = {
    "seed": (["--seed", "1"], "seed: found 0, expected 1"),
    "length": (["--max-new-tokens", "7"], "max_new_tokens: found "),
    "prompts": (["--limit", "1"], "prompts: found"),
    "suite": (["--suite", "{place}/others.jsonl", "--limit", "5"], "prompts: found"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in COMMANDS}


def said(words, place, out):
    return [word.format(place=place, out=out) for word in words]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_finished_result_is_shown_and_another_one_refused(name, place, made, run):
    words, file = COMMANDS[name]
    result, arguments = made[name] / file, said(words, place, made[name])
    assert run(*arguments)[0] == 0
    before, stamp = result.read_bytes(), result.stat().st_mtime_ns
    code, output, _ = run(*arguments)
    assert code == 0 and f"{result} is there already, of the same settings; remove it to make it again" in output
    for more, message in OTHERS.values():
        code, _, line = run(*arguments, *said(more, place, made[name]))
        assert code == 2 and line.startswith(f"error: {result}: is there already, of another run (") and message in line
    assert result.read_bytes() == before and result.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_nobody_knows_stays_and_one_process_writes_at_a_time(name, place, tmp_path, run):
    words, file = COMMANDS[name]
    arguments = said(words, place, tmp_path)
    with alone(tmp_path, file, file):
        code, _, line = run(*arguments)
        assert code == 2 and line.startswith(f"error: {tmp_path / file}: another process writes there")
    (tmp_path / file).write_text('{"mine": 1}')
    code, _, line = run(*arguments)
    assert code == 2 and f"{tmp_path / file}: exists, and nothing says what it was made with" in line
    assert json.loads((tmp_path / file).read_text()) == {"mine": 1}


def test_a_proof_that_failed_still_fails_when_it_is_shown(place, tmp_path, run):
    arguments = said(VERIFY + COMMON, place, tmp_path)
    assert run(*arguments)[0] == 0
    document = json.loads((tmp_path / "lossless.json").read_text())
    (tmp_path / "lossless.json").write_text(json.dumps(document | {"lossless": False}))
    code, output, _ = run(*arguments)
    assert code == 1 and "NOT lossless" in output


def test_settings_tell_what_names_hide(place, tmp_path, run):
    """A tree by what its file holds, a method by what its name stands for."""
    tree = tmp_path / "tree.json"
    tree.write_text('{"slots": [[0]]}')
    shared = ["--target", place / "target", *said(COMMON, place, tmp_path), "--temperature", "0", "--threads", "1"]
    arguments = ["eval", "mine=recycling", *shared, "--tree", tree, "--output", tmp_path / "out"]
    assert run(*arguments)[0] == 0 and run(*arguments)[0] == 0
    arguments[1] = "mine=stand"
    code, _, line = run(*arguments)
    assert code == 2 and 'renamed: found {"mine": "recycling"}, expected {"mine": "stand"}' in line
    arguments[1] = "mine=recycling"
    tree.write_text('{"slots": [[0], [1]]}')
    code, _, line = run(*arguments)
    assert code == 2 and "tree: found " in line and " of /" in line
