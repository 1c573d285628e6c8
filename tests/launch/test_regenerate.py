"""Answers of the target: whatever makes them, in whatever order and company, the texts are those of every prompt alone;
what is killed goes on.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.answers.decoding import Work, spread
from draftsmith.launch.answers.precision import INSTRUCTIONS, cpu_flags, slow_on
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import TextTarget
from tests import templates
from tests.conftest import ROOT, tiny_target, trained_head

TEMPERATURES, NEW, STOPS = [0.0, 0.9], 24, set(range(2, 300, 12))
QUESTIONS = ["def f(a):", "import os", "fox", "def add(a, b):\n    return a + b\n" * 4, "quick " * 20, "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """With a tiny target, of which every twelfth id ends an answer."""
    folder, target = tmp_path_factory.mktemp("run"), tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = sorted(STOPS)
    target.model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """27 prompts, few of one length."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [f"{QUESTIONS[i % 6]} {i} " * (1 + i % 3) for i in range(27)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def plain(folder, prompts, tmp_path_factory):
    """The file of one process."""
    return answers(folder, prompts, tmp_path_factory.mktemp("plain") / "answers.jsonl", 4)


def answers(folder, prompts, output, batch, **more) -> str:
    report = more.pop("report", lambda line: None)
    return regenerate(
        str(folder / "target"), str(prompts), str(output), TEMPERATURES, NEW, batch, None, 3, report, **more
    ).read_text()


def test_texts_are_those_of_every_prompt_alone(folder, prompts, plain):
    target, tokenizer = TextTarget.load(folder / "target"), load_tokenizer(folder / "target")
    rows = [json.loads(line) for line in plain.splitlines()]
    assert [row["row"] for row in rows] == list(range(27)) and len({row["prompt_length"] for row in rows}) > 7
    for i, (row, line) in enumerate(zip(rows, prompts.read_text().splitlines())):
        messages = [{"role": "user", "content": json.loads(line)["prompt"]}]
        prompt, temperature = encode_prompt(tokenizer, messages), TEMPERATURES[i % 2]
        (trace,) = generate(target, NoDrafter(), [prompt], Sampling(temperature, seed=3), NEW, STOPS, [i])
        finished = trace.tokens[-1] in STOPS
        text = tokenizer.decode(trace.tokens[:-1] if finished else trace.tokens)
        assert row == {
            "row": i,
            "messages": [*messages, {"role": "assistant", "content": text}],
            "tokens": prompt + trace.tokens,
            "prompt_length": len(prompt),
            "finished": finished,
            "temperature": temperature,
            "sampling": {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
            "target": str(folder / "target"),
            "tokenizer": Renderer(tokenizer).fingerprint,
        }
    assert {row["finished"] for row in rows} == {True, False}  # some end, some are cut at the limit


def test_every_turn_is_answered_behind_the_targets_own_answers(folder, tmp_path):
    """In one form, whatever the keys; a killed run goes on between turns; a tool's result keeps its role."""
    shutil.copytree(folder / "target", tmp_path / "target")
    tokenizer = load_tokenizer(tmp_path / "target")
    tokenizer.chat_template = templates.QWEN3 + templates.QWEN3_ASKED
    tokenizer.save_pretrained(tmp_path / "target")
    target, folder = TextTarget.load(tmp_path / "target"), tmp_path
    ask = lambda text: {"role": "user", "content": text}  # noqa: E731
    recorded = {"role": "assistant", "content": "recorded"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "calc", "arguments": {}}}]}
    result = {"role": "tool", "content": "42"}
    rows = [
        {"messages": [ask("def f(a):"), recorded, ask("fox"), recorded]},
        {"prompt": "import os"},
        {"turns": ["def f(a):", "fox"]},
        {"conversations": [{"from": f, "value": v} for f, v in (("human", "b"), ("gpt", "x"), ("human", "quick"))]},
        {"messages": [ask("b"), call, result, recorded, ask("fox")]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = answers(folder, file, tmp_path / "answers.jsonl", 2)
    found = {(row["row"], row.get("turn")): row for row in map(json.loads, text.splitlines())}
    assert list(found) == [(0, 0), (0, 1), (1, None), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    for (number, turn), row in found.items():
        prompt, request = encode_prompt(tokenizer, row["messages"][:-1]), number + (turn or 0) * len(rows)
        sampling = Sampling(TEMPERATURES[number % 2], seed=3)
        (trace,) = generate(target, NoDrafter(), [prompt], sampling, NEW, STOPS, [request])
        assert row["tokens"] == prompt + trace.tokens and row["prompt_length"] == len(prompt)
        assert row["temperature"] == sampling.temperature
        if turn:
            assert row["messages"][: len(found[number, turn - 1]["messages"])] == found[number, turn - 1]["messages"]
    assert "recorded" not in text
    assert "<tool_call>calc{}</tool_call><|end|>\n<|user|>tool\n42" in tokenizer.decode(found[4, 0]["tokens"])
    assert [m["role"] for m in found[4, 1]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    lines = text.splitlines()
    for kept in (3, 6):  # in the middle of a round, and of another
        again = tmp_path / f"again-{kept}.jsonl"
        partial = Path(f"{again}.partial")
        with pytest.raises(RuntimeError):
            answers(folder, file, again, 2, report=stop_before_the_end)
        assert partial.exists()
        partial.write_text("".join(line + "\n" for line in [partial.read_text().splitlines()[0], *lines[:kept]]))
        assert answers(folder, file, again, 2) == text
    file.write_text(json.dumps({"messages": [{"role": "system", "content": "You are terse."}]}) + "\n")
    with pytest.raises(
        UserError, match="prompts.jsonl row 1: messages: found the last one of the system, expected one"
    ):
        answers(folder, file, tmp_path / "none.jsonl", 2)


def stop_before_the_end(line: str) -> None:
    raise RuntimeError(line)


def test_neither_the_batch_nor_a_drafter_changes_the_file(folder, prompts, plain, tmp_path):
    target = TextTarget.load(folder / "target")
    save_drafter(trained_head(target), tmp_path / "drafter", {"target": str(folder / "target")}, torch.float32)
    assert answers(folder, prompts, tmp_path / "a", 1) == plain
    for batch, tree in ((16, "chain:3"), (3, "dynamic:3x3x8")):
        assert answers(folder, prompts, tmp_path / "b", batch, drafter=str(tmp_path / "drafter"), tree=tree) == plain
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.ordered"))


@pytest.mark.timeout(900)
def test_a_run_of_two_processes_that_is_killed_goes_on_to_the_same_file(folder, prompts, plain, tmp_path):
    """By SIGKILL; the processes that it leaves behind end by themselves. What goes on is one process."""
    output = tmp_path / "answers.jsonl"
    partial = Path(f"{output}.partial")
    given = [str(folder / "target"), str(prompts), str(output), "--max-new-tokens", str(NEW), "--seed", "3"]
    command = [sys.executable, "-m", "draftsmith.launch", "regenerate", *given, "--processes", "2", "--batch", "1"]
    for temperature in TEMPERATURES:
        command += ["--temperature", str(temperature)]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    while not partial.exists() or partial.read_text().count("\n") < 4:
        assert run.poll() is None
        time.sleep(0.005)
    left = [pid for pid in session_of(run.pid) if pid != run.pid]
    run.kill()
    run.wait()
    assert len(left) >= 2 and not output.exists()
    limit = time.time() + 120
    while any(alive(pid) for pid in left):
        assert time.time() < limit
        time.sleep(0.05)
    rows = partial.read_text().splitlines()[1:]
    assert 3 <= len(rows) < 27
    with partial.open("a") as file:
        file.write('{"row": 5, "tor')  # what a full stop in the middle of a line leaves
    assert answers(folder, prompts, output, 4) == plain and not partial.exists()


def session_of(leader: int) -> list[int]:
    """Processes of a session."""
    stats = [(p.name, p / "stat") for p in Path("/proc").iterdir() if p.name.isdigit()]
    found = []
    for pid, stat in stats:
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(pid))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(900)
def test_two_processes_share_the_prompts_and_a_lost_one_is_named(folder, prompts, plain, tmp_path):
    assert answers(folder, prompts, tmp_path / "answers.jsonl", 2, processes=2) == plain
    work = Work(str(folder / "target"), frozenset(STOPS), (0.0,), NEW, 3, 2)
    asked = []

    def take(number, count):
        asked.append(number)
        if len(asked) == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return [(len(asked), [3, 1, 4])]

    with pytest.raises(UserError, match="one of its processes was killed by SIGKILL; what it has written is kept"):
        list(spread(work, take, 2))
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match="target /none: cannot be loaded"):
        list(spread(Work("/none", frozenset(STOPS), (0.0,), NEW, 3, 2), take, 1))


def test_answers_of_two_precisions_are_not_mixed(folder, prompts, tmp_path, monkeypatch):
    from draftsmith.launch import regenerate as module

    output, written = tmp_path / "answers.jsonl", []

    def killed(*arguments):
        written.append(module_row(*arguments))
        if len(written) == 3:
            raise KeyboardInterrupt
        return written[-1]

    module_row = module.row_of
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "row_of", killed)
        answers(folder, prompts, output, 2, dtype="bf16")
    settings = json.loads(Path(f"{output}.partial").read_text().splitlines()[0])
    assert settings["dtype"] == "bf16"
    with pytest.raises(UserError, match=r'found another run .*"bf16".*expected .*"fp32"'):
        answers(folder, prompts, output, 2)
    said = []
    rows = [
        json.loads(line) for line in answers(folder, prompts, output, 2, dtype="bf16", report=said.append).splitlines()
    ]
    assert len(rows) == 27 and rows[written[0]["row"]] == written[0]
    slow = slow_on(cpu_flags(), "bf16")
    assert [line for line in said if "--dtype" in line] == ([slow] if slow else [])


def test_a_cpu_without_instructions_for_a_precision_is_told_of():
    assert slow_on({"avx2", "fma"}, "fp32") is None and slow_on(set(), "bf16") is None
    for dtype, flags in INSTRUCTIONS.items():
        assert all(slow_on({"avx2", flag}, dtype) is None for flag in flags)
        assert "slower than fp32" in slow_on({"avx2", "avx512f"}, dtype)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "int3"], "dtype: found int3, expected fp32, bf16 or fp16"),
        (["--tree", "chain:2"], "regenerate: found --tree without --drafter, expected both or neither"),
        (["--concurrency", "2"], "regenerate: found --concurrency without --server, expected both or neither"),
        (["--server", "http://x", "--drafter", "y"], "found --server beside --drafter, expected one of them"),
        (["--server", "http://x", "--processes", "2"], "found --server beside --processes, expected one of them"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--drafter", "/none"], "/none: no such directory"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_overwritten(
    folder, prompts, tmp_path, monkeypatch, capsys, more, message
):
    from draftsmith.launch import cli

    output = tmp_path / "answers.jsonl"
    output.write_text("kept\n")
    monkeypatch.setattr(
        sys, "argv", ["draftsmith", "regenerate", str(folder / "target"), str(prompts), str(output), *more]
    )
    with pytest.raises(SystemExit) as exit:
        cli.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: ") and message in error
    assert output.read_text() == "kept\n"
