"""A drafter is for the weights that it was trained on: it records them, and a target with others is refused or told."""

import json

import pytest

from draftsmith.launch.card import training
from draftsmith.launch.methods import Methods
from draftsmith.launch.regenerate import regenerate
from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.formats import from_pretrained
from draftsmith.models.targets import locate
from draftsmith.models.targets.cache import content_hash
from tests.conftest import tiny_target
from tests.tiny_gguf import write_gguf


@pytest.fixture
def file(tmp_path, monkeypatch, tokenizer):
    """file(seed) writes a GGUF target of these weights, always under the same name."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))

    def write(seed: int = 0):
        return write_gguf(
            tmp_path / "tiny.gguf", tiny_target(vocab=320, intermediate_size=64, seed=seed).model, tokenizer
        )

    return write


def test_a_drafter_records_its_targets_weights_and_others_are_refused_or_told(folder, file, tmp_path, capsys):
    place = file()
    first = content_hash(place)
    arguments = [str(folder / "recipe.yaml"), f"target={place}", f"output={tmp_path / 'out'}", "optimization.epochs=1"]
    assert main(arguments) == 0
    drafter = tmp_path / "out" / "drafter"
    about = json.loads((drafter / "draftsmith.json").read_text())
    assert about["weights"] == {"sha256": first, "quantisation": "Q4_1"}
    assert about["settings"]["weights"] == first and about["target"] == str(place)
    assert f"- weights of the target: Q4_1, sha256 {first[:16]}" in training(about)[0]
    lines = []
    assert Methods.open([str(drafter)], None, "", report=lines.append).identity()["weights"] == first and not lines
    assert main(arguments) == 0 and "is there already" in capsys.readouterr().out

    second = content_hash(file(seed=1))
    said = f"found weights Q4_1, sha256 {second[:16]} in target {place}, expected the ones that the drafter was "
    said += f"trained for (Q4_1, sha256 {first[:16]})"
    with pytest.raises(UserError) as caught:
        Methods.open([str(drafter)], None, "")
    assert f"drafter out: {said}; --target measures it" in str(caught.value)
    with pytest.raises(UserError, match=f"sha256 {second[:16]} in target"):
        from_pretrained(drafter)
    methods = Methods.open([str(drafter)], str(place), "", report=lines.append)
    assert lines == [f"drafter out: {said}; its acceptance length may be lower than there"]
    assert methods.identity()["weights"] == second
    capsys.readouterr()
    assert main(arguments) == 2 and "(weights differ)" in capsys.readouterr().err


def test_the_same_weights_under_another_name_are_the_same(folder, file, tmp_path):
    """A target that is named by the directory that its GGUF file became has the weights of the file."""
    place = file()
    drafter = tmp_path / "drafter"
    arguments = [str(folder / "recipe.yaml"), f"target={locate(place)}", f"output={tmp_path}", "optimization.epochs=1"]
    assert main(arguments) == 0
    stored = json.loads((drafter / "draftsmith.json").read_text())
    assert stored["weights"] == {"sha256": content_hash(place), "quantisation": "Q4_1"}
    lines = []
    Methods.open([str(drafter)], str(place), "", report=lines.append)
    assert not lines


def test_answers_of_other_weights_are_not_continued(file, tmp_path):
    """A run that died after its last answer goes on with the same weights only."""
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "def f(a):"}]}\n')
    place, out = str(file()), str(tmp_path / "answers.jsonl")

    def answers(report):
        return regenerate(place, str(tmp_path / "prompts.jsonl"), out, [0.0], 4, 1, None, 0, report)

    def dying(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers(dying)
    file(seed=1)
    with pytest.raises(UserError, match="found another run"):
        answers(print)
    file(seed=0)
    assert json.loads(answers(dying).read_text())["row"] == 0  # there was nothing left to answer
