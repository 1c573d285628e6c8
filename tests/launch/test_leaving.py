"""How commands end before their end, and what they never overwrite: Ctrl-C, finished outputs, a second process on one
output.
"""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from draftsmith.eval.measurement import measure
from draftsmith.launch import regenerate as regeneration
from draftsmith.models import targets
from draftsmith.models.errors import UserError
from draftsmith.models.files import alone, write_new, write_whole
from draftsmith.models.formats import layout
from draftsmith.models.targets import TextTarget
from draftsmith.train.reference import pretrain, pretrain_vision
from tests.conftest import ROOT


def press(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)


def regenerate(place, output, *more):
    return "regenerate", place / "target", place / "prompts.jsonl", output, "--max-new-tokens", 8, "--batch", 1, *more


def evaluate(place, output, *more):
    suite = [] if "--suite" in more else ["--suite", place / "prompts.jsonl"]
    short = ["--temperature", 0, "--max-new-tokens", 6, "--limit", 2, "--tree", "chain:2", "--threads", 1]
    return "eval", place / "drafter", *suite, *short, "--output", output, *more


LOADING = {
    "eval": ["{place}/drafter", "--suite", "{place}/prompts.jsonl", "--output", "{tmp}/out"],
    "verify": ["{place}/drafter", "--suite", "{place}/prompts.jsonl", "--output", "{tmp}/out"],
    "sweep": ["{place}/drafter", "--suite", "{place}/prompts.jsonl", "--output", "{tmp}/out"],
    "tune-tree": [
        "stand",
        "--suite",
        "{place}/prompts.jsonl",
        "--target",
        "{place}/target",
        "--output",
        "{tmp}/t.json",
    ],
    "generate": ["suffix", "a prompt", "--target", "{place}/target"],
}


@pytest.mark.parametrize("command", LOADING)
def test_ctrl_c_is_a_line_and_an_exit_code_of_its_own(place, tmp_path, monkeypatch, run, command):
    monkeypatch.setattr(TextTarget, "load", press)
    code, _, line = run(command, *(word.format(place=place, tmp=tmp_path) for word in LOADING[command]))
    assert (code, line) == (130, "interrupted; nothing is kept: the same command begins anew")


def test_ctrl_c_in_the_middle_of_answers(place, tmp_path, monkeypatch, run):
    output, row_of, written = tmp_path / "answers.jsonl", regeneration.row_of, []

    def third(*arguments):
        written.append(row_of(*arguments))
        if len(written) == 3:
            press()
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(regeneration, "row_of", third)
        code, _, line = run(*regenerate(place, output))
    kept = f"interrupted; 2 answers are kept in {output}.partial: the same command goes on"
    assert (code, line) == (130, kept) and not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(TextTarget, "load", press)
        assert run(*regenerate(place, output))[::2] == (130, kept)
        assert run(*regenerate(place, tmp_path / "new.jsonl"))[::2] == (
            130,
            "interrupted; nothing is answered yet: the same command begins anew",
        )
    assert run(*regenerate(place, output))[0] == 0
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(6)) and rows[written[0]["row"]] == written[0]


def test_ctrl_c_in_the_middle_of_a_measurement(place, tmp_path, monkeypatch, run):
    real, calls = measure.generate, []

    def fourth(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            press()
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "generate", fourth)
        code, _, line = run(*evaluate(place, tmp_path))
    assert (code, line) == (
        130,
        f"interrupted; what is measured is kept in {tmp_path}/runs.jsonl.partial: the same command goes on",
    )
    assert run(*evaluate(place, tmp_path))[0] == 0 and (tmp_path / "result.json").is_file()


@pytest.mark.parametrize("recipe", ["code-mini", "shapes-vlm"])
def test_ctrl_c_in_the_middle_of_pretraining(tmp_path, monkeypatch, run, recipe):
    place = ROOT / "recipes" / "targets" / f"{recipe}.yaml"
    arguments = "pretrain", place, f"output={tmp_path}/target"
    module = pretrain if recipe == "code-mini" else pretrain_vision
    monkeypatch.setattr(module, "Documents" if recipe == "code-mini" else "make_processor", press)
    for snapshot in (False, True):
        if snapshot:
            (tmp_path / "target.partial" / "checkpoint").mkdir()
        code, _, line = run(*arguments)
        resumes = snapshot and recipe == "shapes-vlm"
        assert (code, line) == (
            130,
            f"interrupted; {tmp_path}/target.partial/checkpoint is complete: the same command resumes there"
            if resumes
            else "interrupted; there is nothing to go on from: the same command begins anew",
        )
    with alone(tmp_path, "target", "target"):
        code, _, line = run(*arguments)
        assert code == 2 and line.startswith(f"error: {tmp_path}/target: another process writes there")


def test_ctrl_c_while_something_is_fetched(monkeypatch, run):
    monkeypatch.setattr(targets, "locate", press)
    line = "interrupted; what was fetched whole is kept: the same command goes on"
    assert run("fetch", "bundled:targets/smollm2")[::2] == (130, line)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: os error 28")])
def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(place, tmp_path, monkeypatch, run, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(layout, "save_file", full)
    code, _, line = run("export", place / "drafter", tmp_path / "exported", "--to", "vllm")
    assert code == 2 and line.startswith(f"error: {tmp_path}/exported: cannot be written (") and str(error)[-8:] in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def answered(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("answered") / "answers.jsonl"
    regeneration.regenerate(str(place / "target"), str(place / "prompts.jsonl"), str(output), [0.0], 8, 1, None, 0)
    return output


def test_finished_answers_are_left_as_they_are(place, answered, run):
    before, stamp = answered.read_bytes(), answered.stat().st_mtime_ns
    code, said, _ = run(*regenerate(place, answered, "--batch", 2))
    assert code == 0 and f"{answered} is there already, of the same prompts and settings" in said
    assert answered.read_bytes() == before and answered.stat().st_mtime_ns == stamp


OTHERS = {
    "temperature": (["--temperature", 1], "temperatures: found [0.0], expected [1.0]"),
    "seed": (["--seed", 1], "seed: found 0, expected 1"),
    "length": (["--max-new-tokens", 9], "max_new_tokens: found 8, expected 9"),
    "dtype": (["--dtype", "bf16"], 'dtype: found "fp32", expected "bf16"'),
    "prompts": (["--limit", 3], "prompts: found"),
}


@pytest.mark.parametrize(("more", "message"), OTHERS.values(), ids=OTHERS)
def test_answers_of_other_settings_are_not_overwritten(place, answered, run, more, message):
    before = answered.read_bytes()
    code, _, line = run(*regenerate(place, answered, *more))
    assert code == 2 and line.startswith(f"error: {answered}: is there already, of another run (") and message in line
    assert line.endswith("; remove it or choose another output") and answered.read_bytes() == before


def test_a_file_that_nobody_knows_is_not_overwritten(place, tmp_path, run):
    (tmp_path / "notes.jsonl").write_text("mine\n")
    code, _, line = run(*regenerate(place, tmp_path / "notes.jsonl"))
    assert code == 2 and line.startswith(f"error: {tmp_path}/notes.jsonl: exists, and nothing says what it was made")
    assert (tmp_path / "notes.jsonl").read_text() == "mine\n"


def test_a_finished_measurement_is_shown_and_another_one_refused(place, tmp_path, run):
    assert run(*evaluate(place, tmp_path))[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.glob("*.json*")}
    code, said, _ = run(*evaluate(place, tmp_path))
    assert code == 0 and f"{tmp_path}/result.json is there already, of the same measurement" in said
    for more, message in (
        (["--seed", 1], "seed: found 0, expected 1"),
        (["--max-new-tokens", 7], "max_new_tokens: found 6, expected 7"),
        (["--suite", place / "others.jsonl"], "suites: found"),
    ):
        code, _, line = run(*evaluate(place, tmp_path, *more))
        assert code == 2 and line.startswith(f"error: {tmp_path}/result.json: is there already") and message in line
    (tmp_path / "runs.jsonl").unlink()
    code, _, line = run(*evaluate(place, tmp_path))
    assert code == 2 and f"{tmp_path}/result.json: exists, and nothing says what it was made with" in line
    assert all(p.read_bytes() == content for p, content in before.items() if p.name != "runs.jsonl")


def test_samples_of_trajectories_are_kept_the_same_way(place, tmp_path, run):
    arguments = evaluate(place, tmp_path, "--temperature", 1, "--trajectories", 2)
    assert run(*arguments)[0] == 0
    before = (tmp_path / "trajectories.json").read_bytes()
    code, said, _ = run(*arguments)
    assert code == 0 and f"{tmp_path}/trajectories.json is there already" in said
    code, _, line = run(*arguments, "--seed", 1)
    assert code == 2 and "seed: found 0, expected 1" in line
    assert (tmp_path / "trajectories.json").read_bytes() == before


def test_two_processes_on_one_output(place, tmp_path, run):
    message = "another process writes there, expected one at a time; wait for it or choose another output"
    output = tmp_path / "answers.jsonl"
    with alone(tmp_path, "answers.jsonl", output):
        assert run(*regenerate(place, output))[::2] == (2, f"error: {output}: {message}")
        assert run(*regenerate(place, tmp_path / "others.jsonl"))[0] == 0
    with alone(tmp_path / "out", "eval", "out"):
        assert run(*evaluate(place, tmp_path / "out"))[::2] == (2, f"error: {tmp_path}/out: {message}")
    assert run(*regenerate(place, output))[0] == 0 and len(output.read_text().splitlines()) == 6


SUITES = {
    "of one name": (
        ["{place}/prompts.jsonl", "{other}/prompts.jsonl"],
        "found prompts twice, expected different names",
    ),
    "of one given name": (["a={place}/prompts.jsonl", "a={other}/prompts.jsonl"], "found a twice, expected"),
    "of a given name that another file has": (["others={other}/prompts.jsonl", "{place}/others.jsonl"], "others twice"),
    "without a name": (["={place}/prompts.jsonl"], "found no name"),
}


@pytest.mark.parametrize(("suites", "message"), SUITES.values(), ids=SUITES)
def test_names_of_suites(place, tmp_path, run, suites, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    named = [word for s in suites for word in ("--suite", s.format(place=place, other=tmp_path))]
    code, _, line = run(*evaluate(place, tmp_path / "out", *named))
    assert code == 2 and message in line and "NAME=" in line


def test_two_suites_of_one_file_name(place, tmp_path, run):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def"}\n')
    suites = "--suite", place / "prompts.jsonl", "--suite", f"mine={tmp_path}/prompts.jsonl"
    assert run(*evaluate(place, tmp_path / "out", *suites))[0] == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["conditions"]["count"] == {"prompts": 2, "mine": 1}
    assert result["conditions"]["prompts"] == [str(place / "prompts.jsonl"), f"{tmp_path}/prompts.jsonl"]
    assert {cell["suite"] for cell in result["cells"]} == {"prompts", "mine"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_results_have_the_modes_that_the_user_asked_for(place, tmp_path, run, umask):
    before = os.umask(umask)
    try:
        assert run(*evaluate(place, tmp_path))[0] == 0
        write_whole(tmp_path / "new", "text")
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert set(modes.values()) == {0o666 & ~umask}, {str(p): oct(mode) for p, mode in modes.items()}


def test_a_file_is_replaced_whole_and_never_by_other_content(tmp_path):
    file = write_new(tmp_path / "below" / "prompts.jsonl", "one\n")
    assert write_new(file, "one\n").read_text() == "one\n"
    with pytest.raises(UserError, match=f"{file}: exists, with other content"):
        write_new(file, "two\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "one\n" and [p.name for p in Path(file.parent).iterdir()] == ["prompts.jsonl"]
