"""Bad input to the measuring commands: one `error:` line that names file, key or row, what was found and what was
expected; exit code 2; output that exists stays as it is.
"""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

from draftsmith.launch.cli import main
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.formats import save_drafter
from draftsmith.train.reference.pretrain import train_tokenizer
from tests.conftest import tiny_head, tiny_target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a target, a drafter for it, targets and an assistant that do not fit, and suites."""
    root = tmp_path_factory.mktemp("place")
    target = tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = 2
    tokenizer = train_tokenizer(["def add(a, b): return a + b"], 300)
    for name, model in (
        ("target", target),
        ("vocab", tiny_target(vocab=310)),
        ("narrow", tiny_target(vocab=300, hidden_size=16)),
        ("shallow", tiny_target(3, vocab=300)),
    ):
        model.model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    save_drafter(tiny_head(target, 40), root / "drafter", {"target": str(root / "target")})
    save_drafter(tiny_head(target), root / "other", {"target": str(root / "vocab")})
    (root / "suite.jsonl").write_text('{"prompt": "add 1"}\n{"prompt": "add 2"}\n')
    (root / "kept").mkdir()
    (root / "kept" / "result.json").write_text("kept")
    return root


@pytest.fixture
def changed(place, tmp_path):
    """changed(edit, name="drafter") -> a copy of a folder after edit(copy)."""

    def copy(edit, name="drafter"):
        folder = tmp_path / name
        shutil.copytree(place / name, folder)
        edit(folder)
        return folder

    return copy


def fails(arguments, capsys, monkeypatch) -> str:
    """Runs the command line in this process; its one error line."""
    monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert end.value.code == 2 and len(errors) == 1, (end.value.code, errors)
    return errors[0]


@pytest.fixture
def refused(place, capsys, monkeypatch):
    """refused(command, ...) -> the error line; the output folder holds a result, which must stay."""

    def run(*arguments):
        suite = [] if "--suite" in arguments or arguments[0] == "report" else ["--suite", place / "suite.jsonl"]
        output = [] if "--output" in arguments or arguments[0] == "report" else ["--output", place / "kept"]
        line = fails([*arguments, *suite, *output], capsys, monkeypatch)
        assert (place / "kept" / "result.json").read_text() == "kept" and sorted(
            p.name for p in (place / "kept").iterdir()
        ) == ["result.json"]
        return line

    return run


def edit_json(file, **changes):
    def edit(folder):
        stored = json.loads((folder / file).read_text())
        stored.update(changes)
        (folder / file).write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


DRAFTERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0"),
        "model.safetensors: cannot be read",
    ),
    "torn draftsmith.json": (
        lambda f: (f / "draftsmith.json").write_text("{"),
        "draftsmith.json: not valid JSON",
    ),
    "nameless target": (edit_json("draftsmith.json", target=None), "draftsmith.json: no target named"),
    "a flag we do not compute": (
        edit_json("config.json", norm_before_residual=True),
        "norm_before_residual: found True, expected false",
    ),
    "no width": (edit_json("config.json", hidden_size=None), "hidden_size: missing"),
    "taps behind the last layer": (
        edit_json("config.json", eagle_aux_hidden_state_layer_ids=[2, 3, 9]),
        "eagle_aux_hidden_state_layer_ids: found [2, 3, 9], and [1, 2, 3] in eagle_config",
    ),
    "a missing tensor": (edit_tensors(lambda t: t.pop("norm.weight")), "norm.weight: missing"),
    "an unknown tensor": (edit_tensors(lambda t: t.update(extra=t["norm.weight"].clone())), "extra: unknown key"),
    "a tensor of another shape": (
        edit_tensors(lambda t: t.update({"norm.weight": t["norm.weight"][:3].clone()})),
        "found (3,), expected (32,)",
    ),
    "ids for offsets": (edit_tensors(lambda t: t["d2t"].fill_(0).sub_(5)), "d2t: found target ids -5"),
    "vocabularies that disagree": (edit_tensors(lambda t: t["t2d"].logical_not_()), "t2d: its ids differ"),
}


@pytest.mark.parametrize(("edit", "message"), DRAFTERS.values(), ids=DRAFTERS)
def test_drafters(refused, changed, edit, message):
    line = refused("eval", changed(edit))
    assert message in line and "drafter" in line, line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vocab", "vocab_size: found 300, expected the target's 310"),
        ("narrow", "hidden_size: found 32, expected the target's 16"),
        ("shallow", "eagle_aux_hidden_state_layer_ids: found [2, 3, 4], expected ascending numbers from 1 to 2"),
        ("none", "target {place}/none: cannot be loaded"),
    ],
)
def test_targets_that_are_not_the_drafters(refused, place, name, message):
    assert message.format(place=place) in refused("eval", place / "drafter", "--target", place / name)


def test_targets_that_cannot_be_read(refused, place, changed):
    torn = changed(lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0"), "target")
    assert f"target {torn}: cannot be loaded" in refused("eval", place / "drafter", "--target", torn)


def test_a_target_without_a_tokenizer(refused, place, changed):
    bare = changed(lambda f: [p.unlink() for p in f.glob("*token*")], "target")
    assert f"tokenizer {bare}: cannot be loaded" in refused("eval", place / "drafter", "--target", bare)


METHODS = {
    "a folder that is none": (["{place}/none"], "{place}/none: no such directory; expected a drafter directory"),
    "a folder that is none, with a target": (
        ["{place}/none", "--target", "{place}/target"],
        "{place}/none: no such directory",
    ),
    "an unknown bundled drafter": (["bundled:drafters/none"], "bundled:drafters/none: no such bundled model"),
    "howl over a folder that is none": (
        ["howl:{place}/none"],
        "{place}/none: no such directory; expected a drafter directory",
    ),
    "howl over nothing": (["howl:"], "howl: found no drafter behind it, expected howl:DRAFTER"),
    "a method twice": (["{place}/drafter", "lookup", "lookup"], "methods: found lookup twice, expected each once"),
    "nothing that names a target": (
        ["lookup", "hf-lookup"],
        "methods: found no drafter among lookup, hf-lookup, expected one that names its target",
    ),
    "drafters of two targets": (["{place}/drafter", "{place}/other"], "drafters: found targets"),
    "no assistant": (
        ["{place}/drafter", "hf-assisted", "--assistant", "{place}/none"],
        "target {place}/none: cannot be loaded",
    ),
    "an assistant of another vocabulary": (
        ["{place}/drafter", "hf-assisted", "--assistant", "{place}/vocab"],
        "vocab_size: found 310, expected the target's 300",
    ),
    "a name that the result uses": (["cells={place}/drafter"], "found the name cells, which result.json uses"),
    "no method": ([], "Missing argument"),
}


@pytest.mark.parametrize(("arguments", "message"), METHODS.values(), ids=METHODS)
def test_methods(refused, place, arguments, message):
    assert message.format(place=place) in refused("eval", *(a.format(place=place) for a in arguments))


OPTIONS = {
    "a negative temperature": (["--temperature", "-1"], "temperature=-1.0"),
    "no number": (["--temperature", "warm"], "'--temperature'"),
    "not a number": (["--temperature", "nan"], "temperature: found nan, expected a finite number"),
    "a temperature twice": (
        ["--temperature", "0", "--temperature", "0"],
        "temperatures: found 0.0, 0.0, expected at least one and each once",
    ),
    "a negative timed temperature": (["--time-at", "-0.5"], "temperature=-0.5"),
    "an empty batch": (["--batch", "0"], "'--batch'"),
    "a batch twice": (["--batch", "2", "--batch", "2"], "batch sizes: found 2, 2"),
    "an unknown tree": (["--tree", "bush:3"], "tree: found 'bush:3', expected chain:DEPTH"),
    "a tree without levels": (["--tree", "chain:0"], "tree: found 'chain:0'"),
    "no new tokens": (["--max-new-tokens", "0"], "'--max-new-tokens'"),
    "more new tokens than the context": (
        ["--max-new-tokens", "250"],
        "tokens, expected at most -54 (context 256, 250 new tokens, trees of 60)",
    ),
    "a tree larger than the context": (["--tree", "chain:300"], "trees of 301"),
    "no prompts at all": (["--limit", "0"], "'--limit'"),
    "an unknown option": (["--speed", "9"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(refused, place, arguments, message):
    assert message in refused("eval", place / "drafter", *arguments)


SUITES = {
    "absent": (None, "no such file; expected a suite"),
    "empty": ("", "found no prompts, expected at least one"),
    "torn": ('{"prompt": "a"}\n{"prom', "row 2: not valid JSON"),
    "no row": ("[3]", "row 1: found int, expected messages, conversations, turns"),
    "unknown keys": ('{"text": "a"}', "row 1: found ['text'], expected messages, conversations, turns"),
    "turns that are no text": ('{"turns": [1]}', "row 1: turns: found [1], expected text"),
    "a prompt that is empty": ('{"prompt": ""}', "row 1: prompt: found '', expected text that is not empty"),
    "a message without content": (
        '{"messages": [{"role": "user"}]}',
        "row 1: messages[0].content: missing, expected text",
    ),
    "longer than the context": ('{"question_id": "q7", "turns": ["' + "long " * 300 + '"]}', "prompt q7: found 1"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), SUITES.values(), ids=SUITES)
def test_suites(refused, place, tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("eval", place / "drafter", "--suite", file)
    assert str(file) in line and message in line, line


def test_suites_of_one_name(refused, place, tmp_path):
    (tmp_path / "suite.json").write_text('[{"prompt": "a"}]')
    line = refused("eval", place / "drafter", "--suite", place / "suite.jsonl", "--suite", tmp_path / "suite.json")
    assert "suites: found suite twice, expected different names" in line


def test_an_unknown_bundled_suite(refused, place):
    assert "bundled:none: no such bundled" in refused("eval", place / "drafter", "--suite", "bundled:none/code.jsonl")


def test_places_that_cannot_be_written_and_partial_results_of_another_run(
    refused, place, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("a file")
    assert f"{tmp_path}/file: cannot be written" in refused("eval", place / "drafter", "--output", tmp_path / "file")
    partial = tmp_path / "runs.jsonl.partial"
    partial.write_text('{"target": "another"}\n{"key": "a"}\n')
    line = refused("eval", place / "drafter", "--output", tmp_path)
    assert f'{partial}: found another run ({{"target": "another"}}), expected' in line
    assert partial.read_text() == '{"target": "another"}\n{"key": "a"}\n'


COMMANDS = {
    "verify an unknown dtype": (
        ["verify", "{place}/drafter", "--dtype", "int3"],
        "dtype: found int3, expected fp32, bf16 or fp16",
    ),
    "verify a loop of the library": (
        ["verify", "{place}/drafter", "hf-lookup"],
        "methods: found {place}/drafter, hf-lookup, expected drafters, howl:DRAFTER, reader, stand, recycling, ",
    ),
    "verify a tree that is none": (["verify", "{place}/drafter", "--tree", "oak"], "tree: found 'oak'"),
    "sweep a baseline": (["sweep", "lookup"], "drafter: found lookup, expected a drafter directory"),
    "sweep a tree that is none": (["sweep", "{place}/drafter", "--tree", "dynamic:3x3"], "tree: found 'dynamic:3x3'"),
    "report of nothing": (
        ["report", "{place}/none"],
        "{place}/none/result.json: no such file; expected a finished measurement",
    ),
    "report of no JSON": (["report", "{place}/kept"], "{place}/kept/result.json: not valid JSON"),
}


@pytest.mark.parametrize(("arguments", "message"), COMMANDS.values(), ids=COMMANDS)
def test_other_commands(refused, place, arguments, message):
    if arguments[0] == "report":
        pytest.importorskip("matplotlib")
    assert message.format(place=place) in refused(*(a.format(place=place) for a in arguments))


def test_report_of_another_documents_json(refused, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "result.json").write_text("{}")
    assert f"{tmp_path}/result.json: cells: missing" in refused("report", tmp_path)


@pytest.mark.parametrize("prompt", ["<tool>go", "go <tool>", "a <tool> in the middle"])
def test_a_prompt_with_an_id_that_the_embedding_does_not_have_is_refused(prompt, changed, refused, tmp_path):
    """The tokenizer has a token more than the target has rows, which is told before."""

    def one_more(folder):
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens([f"<more{i}>" for i in range(300 - len(tokenizer))] + ["<tool>"])
        tokenizer.save_pretrained(folder)

    target = changed(one_more, "target")
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"prompt": "add 1"}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
    line = refused("eval", "lookup", "--target", target, "--suite", suite)
    assert "suite.jsonl row 2: found token id 300 ('<tool>'), expected 0..299" in line
