"""Answers by a completions server over HTTP: the texts, the checks of model, tokenizer and law, failures, resuming."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.answers import check, server
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.noise import seed_of
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import TextTarget
from tests.completions_server import Completions, serving
from tests.conftest import ROOT

TARGET, NEW, TEMPERATURES = "bundled:targets/code-mini", 20, [0.0, 1.0]


@pytest.fixture(scope="module")
def served():
    """What serves the target itself."""
    target, tokenizer = TextTarget.load(TARGET), load_tokenizer(TARGET)
    return Completions(target, tokenizer, stop_ids(target, tokenizer))


@pytest.fixture
def completions(served):
    return replace(served, requests=[])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The shortest of the bundled ones."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = sorted((ROOT / "recipes" / "prompts" / "code.jsonl").read_text().splitlines(), key=len)
    file.write_text("".join(line + "\n" for line in lines[:10]))
    return file


def questions(prompts) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in prompts.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(served, prompts):
    """For every row its prompt and what the target draws by the noise of the server's seed."""
    found = []
    for i, messages in enumerate(questions(prompts)):
        prompt, seed = encode_prompt(served.tokenizer, messages), seed_of(5, i) % 2**31
        sampling = Sampling(TEMPERATURES[i % 2], seed=seed)
        (trace,) = generate(served.target, NoDrafter(), [prompt], sampling, NEW, served.stops, [0])
        found.append((prompt, trace.tokens))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of milliseconds, and checks of fewer prompts."""
    monkeypatch.setattr(server, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(check, "PROMPTS", 4)
    monkeypatch.setattr(check, "TOKENS", 24)


def answers(address, prompts, output, target=TARGET, temperatures=TEMPERATURES, report=lambda line: None) -> list[dict]:
    regenerate(target, str(prompts), str(output), temperatures, NEW, 1, None, 5, report, server=address, concurrency=3)
    return [json.loads(line) for line in Path(output).read_text().splitlines()]


def text_of(tokens, served) -> str:
    return served.tokenizer.decode([t for t in tokens if t not in served.stops])


def check_rows(rows, expected, prompts, served):
    assert [row["row"] for row in rows] == list(range(len(expected)))
    for i, (row, (prompt, tokens), messages) in enumerate(zip(rows, expected, questions(prompts))):
        assert row == {
            "row": i,
            "messages": [*messages, {"role": "assistant", "content": text_of(tokens, served)}],
            "tokens": prompt + tokens,
            "prompt_length": len(prompt),
            "finished": tokens[-1] in served.stops,
            "temperature": TEMPERATURES[i % 2],
            "sampling": {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
            "target": TARGET,
            "tokenizer": Renderer(load_tokenizer(TARGET)).fingerprint,
            "server": "served",
        }


@pytest.mark.parametrize("defaults", [{}, {"top_k": 1, "top_p": 0.5, "temperature": 0.3, "repetition_penalty": 1.5}])
def test_rows_are_what_the_server_draws_whatever_its_defaults(completions, prompts, expected, tmp_path, defaults):
    completions.defaults, said = defaults, []
    with serving(completions) as address:
        rows = answers(f"{address}/v1/", prompts, tmp_path / "answers.jsonl", report=said.append)
    check_rows(rows, expected, prompts, completions)
    said_of_greedy = re.fullmatch(
        r"served at (.*): (\d+) of (\d+) tokens of greedy answers are the target's own", said[0]
    )
    assert said_of_greedy[1] == address and said_of_greedy[2] == said_of_greedy[3] and int(said_of_greedy[2]) > 40
    assert said[-1].startswith("answers: 10/10, ") and "tok/s" in said[-1]


@pytest.mark.parametrize("takes_ids", [True, False])
def test_a_server_of_texts_gives_tokens_only_where_they_are_certain(
    completions, prompts, expected, tmp_path, takes_ids
):
    completions.gives_ids, completions.takes_ids = False, takes_ids
    with serving(completions) as address:
        rows = answers(address, prompts, tmp_path / "answers.jsonl")
    sent = {type(asked["prompt"]) for asked in completions.requests[-10:]}
    assert sent == ({list} if takes_ids else {str})
    certain = 0
    for row, (prompt, tokens) in zip(rows, expected):
        assert row["messages"][-1]["content"] == text_of(tokens, completions)
        assert row["finished"] == (tokens[-1] in completions.stops) and row["server"] == "served"
        if "tokens" in row:
            assert row["tokens"][: row["prompt_length"]] == prompt and len(row["tokens"]) == len(prompt) + len(tokens)
            assert text_of(row["tokens"][len(prompt) :], completions) == text_of(tokens, completions)
            certain += 1
        else:
            again = completions.tokenizer(text_of(tokens, completions), add_special_tokens=False)["input_ids"]
            assert len(again) != len([t for t in tokens if t not in completions.stops])
    assert certain >= 5


def test_a_server_of_another_model_is_refused(completions, prompts, tmp_path):
    other = TextTarget.load(TARGET)
    with torch.no_grad():
        for layer in other.body.layers:
            layer.mlp.down_proj.weight.mul_(-1)
    completions.target = other
    with serving(completions) as address, pytest.raises(UserError) as refused:
        answers(address, prompts, tmp_path / "answers.jsonl")
    message = str(refused.value)
    assert f"server {address}: served is not the target: token " in message and "nats behind the target's" in message
    assert "\n" not in message and not (tmp_path / "answers.jsonl").exists()


def test_a_server_of_another_tokenizer_is_refused(completions, prompts, tmp_path, tokenizer):
    completions.tokenizer = tokenizer
    with serving(completions) as address, pytest.raises(UserError, match="another tokenizer than the target's"):
        answers(address, prompts, tmp_path / "answers.jsonl")
    completions.gives_ids = False
    with serving(completions) as address, pytest.raises(UserError, match=r"reads a text as \d+ tokens, expected"):
        answers(address, prompts, tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ({"top_k": 20}, "found 0 tokens that top_k=20 would exclude, expected some"),
        ({"top_p": 0.8}, "found 0 tokens that top_p=0.8 would exclude, expected some"),
        ({"temperature": 0.5}, "would exclude, expected some|surprise the target less than its own"),
        ({"temperature": 1.5}, "surprise the target more than its own"),
    ],
    ids=str,
)
def test_a_server_of_another_law_is_refused(completions, prompts, tmp_path, monkeypatch, forced, message):
    """It does not heed what the request says of its law; greedy answers alone would not tell."""
    monkeypatch.setattr(check, "PROMPTS", 8)
    monkeypatch.setattr(check, "TOKENS", 96)
    sampling = completions.sampling

    def stubborn(asked):
        return replace(sampling(asked), **forced) if asked["temperature"] > 0 else sampling(asked)

    completions.sampling = stubborn
    with serving(completions) as address, pytest.raises(UserError, match=message):
        answers(address, prompts, tmp_path / "answers.jsonl")


def test_the_expected_counts_of_the_check_are_those_of_the_target(served, prompts):
    """Of the target's own samples, no cut and no surprise is out of the ordinary; the counts agree with a draw."""
    asked = [encode_prompt(served.tokenizer, messages) for messages in questions(prompts)]
    traces = generate(served.target, NoDrafter(), asked, Sampling(1.0, seed=1), 96)
    scored = [check.Scored.of(served.target, p, t.tokens, 1.0) for p, t in zip(asked, traces)]
    for name in scored[0].cuts:
        came, due = (sum(s.cuts[name][i] for s in scored) for i in (0, 1))
        assert due > 5 and abs(came - due) < 5 * due**0.5, name
    spread = sum(s.variance.sum() for s in scored) ** 0.5
    assert abs(sum(s.surprise.sum() for s in scored) / spread) < 5
    assert check.chance(0, 3.0) == pytest.approx(0.0497871, rel=1e-5) and check.chance(2, 3.0) == pytest.approx(0.42319)


def test_failures_now_and_then_are_asked_again(completions, prompts, expected, tmp_path):
    # Half of them: of two thirds one request in a hundred and thirty would fail all of its twelve times.
    completions.fail = lambda number: {0: "error", 1: "drop"}.get(number % 4)
    with serving(completions) as address:
        rows = answers(address, prompts, tmp_path / "answers.jsonl")
    check_rows(rows, expected, prompts, completions)
    assert len(completions.requests) > 1.5 * len(rows)


def test_a_server_that_goes_away_leaves_what_was_written_and_another_goes_on(completions, prompts, expected, tmp_path):
    output = tmp_path / "answers.jsonl"
    with serving(completions) as address:
        check_requests = len_of_check(completions, address, prompts, tmp_path)
        completions.fail = lambda number: "refuse" if number > 2 * check_requests + 14 else None
        with pytest.raises(UserError, match="v1/completions: HTTP 404: .*no such model"):
            answers(address, prompts, output)
    partial = Path(f"{output}.partial")
    kept = partial.read_text().splitlines()[1:]
    assert 0 < len(kept) < 10 and not output.exists()
    again = replace(completions, fail=lambda number: None, requests=[])
    with serving(again) as address:
        rows = answers(address, prompts, output)
    check_rows(rows, expected, prompts, completions)
    assert len(again.requests) == check_requests + 10 - len(kept)
    output.unlink()
    with pytest.raises(UserError, match="found another run"):
        partial.write_text(partial_of(settings="fp32"))
        with serving(again) as address:
            answers(address, prompts, output)


def partial_of(settings: str) -> str:
    return json.dumps({"dtype": settings}) + "\n"


def len_of_check(completions, address, prompts, place) -> int:
    """Requests of one whole run, less those of its rows."""
    answers(address, prompts, place / "first.jsonl")
    return len(completions.requests) - 10


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_goes_on(completions, prompts, expected, tmp_path):
    output = tmp_path / "answers.jsonl"
    partial = Path(f"{output}.partial")
    command = [sys.executable, "-m", "draftsmith.launch", "regenerate", TARGET, str(prompts), str(output)]
    command += ["--max-new-tokens", str(NEW), "--seed", "5", "--concurrency", "1"]
    for temperature in TEMPERATURES:
        command += ["--temperature", str(temperature)]
    with serving(completions) as address:
        run = subprocess.Popen([*command, "--server", address], env={**os.environ, "PYTHONPATH": str(ROOT)})
        while not partial.exists() or partial.read_text().count("\n") < 3:
            assert run.poll() is None
            time.sleep(0.002)
        run.kill()
        run.wait()
        kept = partial.read_text().count("\n") - 1
        assert 2 <= kept < 10 and not output.exists()
        rows = answers(address, prompts, output)
    check_rows(rows, expected, prompts, completions)


def test_what_cannot_be_is_said_in_one_line(completions, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match=r"server http://127.0.0.1:9/v1/models: .*refused.* \(3 times\)"):
        answers("http://127.0.0.1:9", prompts, output)
    with pytest.raises(UserError, match="server nonsense: .*expected http://HOST:PORT"):
        answers("nonsense", prompts, output)
    completions.models = ("one", "two")
    with serving(completions) as address, pytest.raises(UserError, match="found the models one, two, expected one, or"):
        answers(address, prompts, output)
    completions.models = ("one", TARGET)
    with serving(completions) as address:
        assert {row["server"] for row in answers(address, prompts, output)} == {TARGET}


def test_prompts_that_do_not_fit_the_servers_context_are_left_out(completions, prompts, expected, tmp_path):
    lengths = sorted(len(prompt) for prompt, _ in expected)
    completions.context, said = lengths[5] + NEW + 1, []
    with serving(completions) as address:
        rows = answers(address, prompts, tmp_path / "answers.jsonl", report=said.append)
    assert max(row["prompt_length"] for row in rows) == lengths[5] and len(rows) < 10
    assert said[0] == f"{10 - len(rows)} prompts of more than {lengths[5]} tokens are left out"
