"""Many samples of each prompt: which request each is, what is learned from one to the next, and the command."""

import json

import pytest

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.measure import tau
from draftsmith.eval.measurement.trajectories import Method, ahead, figures, trajectories
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.verifier import MATCH
from draftsmith.launch.cli import app
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.recycling import RecyclingDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.errors import UserError
from draftsmith.models.grow import binary, chain
from tests.table_target import TableTarget

PROMPTS, SAMPLED = [[0, 1], [2, 3, 1]], Sampling(1.0, seed=4)
METHODS = {
    "plain": Method(NoDrafter, MATCH),
    "matched": Method(lambda: StandDrafter(chain(4), lasting=True), MATCH),
    "stand": Method(lambda: StandDrafter(chain(4), lasting=True), RULES["rejection"]),
}


def measured(batch=1, count=5, target=None, methods=METHODS, **options):
    return trajectories(target or TableTarget(4, 3), methods, PROMPTS, count, batch, SAMPLED, 16, set(), **options)


def test_trajectories_are_requests_of_their_own_and_the_first_are_those_of_a_usual_measurement():
    target, plain, matched = TableTarget(4, 3), *(measured()[name] for name in ("plain", "matched"))
    usual = generate(target, NoDrafter(), PROMPTS, SAMPLED, 16)
    assert [traces[0].tokens for traces in plain.traces] == [trace.tokens for trace in usual]
    for row, traces in enumerate(plain.traces):
        texts = [trace.tokens for trace in traces]
        assert texts == [t.tokens for t in matched.traces[row]] and len(set(map(tuple, texts))) == 5


@pytest.mark.parametrize("batch", [1, 2])
def test_the_drafter_of_a_prompt_learns_from_its_trajectories_and_from_no_other_prompt(batch):
    found = measured(batch)["stand"]
    target, drafter = TableTarget(4, 3), METHODS["stand"].make()
    again = []
    for start in range(0, 5, batch):
        numbers = range(start, min(5, start + batch))
        requests, prompts = [1 + 2 * n for n in numbers], [PROMPTS[1]] * len(numbers)
        again += generate(target, drafter, prompts, SAMPLED, 16, requests=requests, verifier=RULES["rejection"])
    assert [t.tokens for t in again] == [t.tokens for t in found.traces[1]]
    assert [t.accepted for t in again] == [t.accepted for t in found.traces[1]]
    assert [len(seconds) for seconds in found.seconds] == [len(range(0, 5, batch))] * 2
    assert found.sizes[1] == drafter.memory.nbytes


def test_prompts_abreast_learn_what_they_learn_alone():
    methods = METHODS | {
        "recycling": Method(lambda: RecyclingDrafter(4, lasting=True), MATCH),
        "suffix": Method(lambda: SuffixDrafter(6, SuffixRule(), 100), MATCH),
        "gumbel tree": Method(lambda: StandDrafter(binary(2), lasting=True), RULES["traversal"]),
        "lookup": Method(lambda: LookupDrafter(5), MATCH, learns=False),
    }
    alone, abreast = measured(methods=methods), measured(methods=methods, abreast=2)
    for name in methods:
        assert abreast[name].traces == alone[name].traces, name
        assert len(abreast[name].seconds) == 1 and len(abreast[name].passes[0]) == 5
    rounds = [max(len(traces[n].emitted) for traces in alone["stand"].traces) for n in range(5)]
    assert abreast["stand"].passes == [rounds] and abreast["stand"].sizes == [max(alone["stand"].sizes)]


def test_figures_are_those_of_the_traces():
    found = measured(batch=2)
    whole = figures(found["stand"], found["plain"], 2, 0)
    rounds = [[t for traces in found["stand"].traces for t in traces[start : start + 2]] for start in (0, 2, 4)]
    assert [part["tau"] for part in whole["numbers"]] == [tau(traces) for traces in rounds]
    assert whole["tau"] == tau([t for traces in rounds for t in traces])
    assert whole["tokens"] == sum(part["tokens"] for part in whole["numbers"]) > 0
    assert whole["memory_bytes"] > 0 and figures(found["plain"], found["plain"], 2, 0)["memory_bytes"] == 0
    difference, low, high = ahead(found["stand"], found["plain"], 2, 2, 0)
    assert difference == pytest.approx(tau(rounds[2]) - 1) and low <= difference <= high


def test_the_command_measures_by_trajectory(folder, tmp_path, capsys):
    suite, output = tmp_path / "suite.jsonl", tmp_path / "out"
    suite.write_text("".join(json.dumps({"prompt": f"def f{i}(a):"}) + "\n" for i in range(2)))
    command = ["--target", str(folder / "target"), "--suite", str(suite), "--max-new-tokens", "10", "--output"]
    app(
        ["eval", "stand", "recycling", "suffix", *command, str(output), "--trajectories", "3", "--temperature", "0.3"],
        standalone_mode=False,
    )
    document = json.loads((output / "trajectories.json").read_text())
    assert [cell["method"] for cell in document["cells"]] == ["plain", "stand", "recycling", "suffix"]
    assert all(len(cell["numbers"]) == 3 and cell["tau"] >= 1 for cell in document["cells"])
    assert document["cells"][1]["behind_first"] is None and len(document["cells"][2]["behind_first"]) == 3
    assert "stand" in capsys.readouterr().out and (output / "trajectories.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stand", "--temperature", "0"], "found temperature 0 alone"),
        (
            ["stand", "hf-lookup", "--target", "bundled:targets/code-mini"],
            "found hf-lookup, expected methods of our own",
        ),
    ],
)
def test_what_has_no_trajectories_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        app(["eval", *arguments, "--trajectories", "4"], standalone_mode=False)
