"""`cascade:MIDDLE+METHOD` in `verify`, `eval` and `generate`, and copies of a target as middle models."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from draftsmith.launch.cli import app
from draftsmith.launch.drafters import Drafters, cascaded, places, samples
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.formats import save_drafter
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets.copies import quantised, shared_copy, skipping
from tests.conftest import tiny_head, tiny_target

PROMPTS = ["import os import os", "fox", "def f10(a):"]


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    place, target = tmp_path_factory.mktemp("cascade"), TextTarget.load(folder / "target")
    save_drafter(tiny_head(target), place / "drafter", {"target": str(folder / "target")})
    (place / "suite.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return place


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_verify(folder, place, tmp_path):
    """A layer-skipped copy below a head of the target, another model below a copy: all texts are the plain ones."""
    methods = [f"cascade:4:skip:3+{place}/drafter", f"cascade:3:skip:2+cascade:2:{folder}/target+plain"]
    found = run(
        "verify", *methods, "--suite", place / "suite.jsonl", "--output", tmp_path, "--tree", "chain:2", "--batch", 2,
        "--temperature", 0, "--temperature", 0.9, "--max-new-tokens", 10,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    document = json.loads((tmp_path / "lossless.json").read_text())
    assert document["lossless"] and {c["method"] for c in document["comparisons"]} >= set(methods)


def test_eval_beside_a_choice(place, tmp_path):
    """Both kinds through the whole measurement: their trees are their own, greedy texts are the plain ones."""
    methods = [f"head={place}/drafter", "stack=cascade:2:skip:3+suffix", f"choice=select:{place}/drafter,suffix,stand"]
    found = run(
        "eval", *methods, "--suite", place / "suite.jsonl", "--max-new-tokens", 8, "--tree", "chain:2",
        "--temperature", 0, "--temperature", 1, "--time-at", 0, "--limit", 2, "--output", tmp_path,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    document = json.loads((tmp_path / "result.json").read_text())
    cells = {(cell["method"], cell["temperature"]): cell for cell in document["cells"]}
    assert all(cells[name, 0.0]["lossless"] for name in ("stack", "choice")) and document["lossless"]


def test_verify_a_choice(place, tmp_path):
    """Rules by name; the drafter in it says which target it is for."""
    methods = [f"select:{place}/drafter,suffix,recycling:ucb1", f"select:{place}/drafter,lookup:hedge:lasting"]
    found = run(
        "verify", *methods, "--suite", place / "suite.jsonl", "--output", tmp_path, "--tree", "chain:2", "--batch", 2,
        "--temperature", 0, "--temperature", 0.9, "--max-new-tokens", 10,
    )  # fmt: skip
    assert found.exit_code == 0 and json.loads((tmp_path / "lossless.json").read_text())["lossless"], found.output


def test_generate(folder, place):
    found = run(
        "generate", f"cascade:{folder}/target+plain", "fox", "--target", folder / "target", "--max-new-tokens", 9
    )
    assert found.exit_code == 0 and "the text is identical" in found.output and "tau 8.00" in found.output, found.output


def test_names():
    assert cascaded("8:skip:3+suffix") == (8, "skip:3", "suffix")
    assert cascaded("bundled:targets/code-mini+cascade:4:skip:2+lookup") == (
        8,
        "bundled:targets/code-mini",
        "cascade:4:skip:2+lookup",
    )
    assert places("cascade:skip:3+bundled:drafters/x") == ["bundled:drafters/x"]
    assert places("cascade:USER/MODEL+bundled:drafters/x") == []  # for another target
    assert samples("cascade:skip:3+suffix")
    for wrong in ("", "skip:3", "+suffix", "0:skip:3+suffix"):
        with pytest.raises(UserError, match="cascade: found"):
            cascaded(wrong)


def test_another_tokenizer_is_refused_by_name(folder, place, tmp_path):
    shutil.copytree(folder / "target", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["added_tokens"].append(document["added_tokens"][-1] | {"id": document["added_tokens"][-1]["id"] + 1})
    document["added_tokens"][-1]["content"] = "<other>"
    file.write_text(json.dumps(document))
    drafters = Drafters(TextTarget.load(folder / "target"), "")
    with pytest.raises(UserError, match=r"other with another tokenizer \(\w{16}\) than .*target \(\w{16}\), expected"):
        drafters.drafter(f"cascade:{tmp_path}/other+plain")
    with pytest.raises(UserError, match="found skip:many, expected skip:K"):
        drafters.drafter("cascade:skip:many+plain")


def test_a_skipping_copy_is_the_model_without_these_layers():
    """It shares all weights, its taps keep their numbers, and the target stays as it is."""
    target = tiny_target(layers=7)
    copied, by_hand = skipping(target, 3), tiny_target(layers=7)
    layers = [layer for i, layer in enumerate(by_hand.body.layers) if i not in (2, 5)]
    by_hand.body.layers = torch.nn.ModuleList(layers)
    spec, prompt = FeatureSpec((0, 3, 6, "last")), [[3, 1, 4, 1, 5]]
    found, whole = (model.open(spec, 1, 9).prefill(prompt) for model in (copied, target))
    want = by_hand.model(input_ids=torch.tensor(prompt), use_cache=False).logits[:, -1]
    assert torch.allclose(found.logits, want, atol=1e-5) and not torch.allclose(found.logits, whole.logits, atol=1e-2)
    own = target.model(input_ids=torch.tensor(prompt), output_hidden_states=True, use_cache=False)
    assert torch.allclose(whole.features.hidden, torch.cat([own.hidden_states[k] for k in (0, 3, 6, 7)], -1), atol=1e-5)
    pointers = {p.data_ptr() for p in target.model.parameters()}
    assert all(p.data_ptr() in pointers for p in copied.model.parameters())
    for every in (1, 7):
        with pytest.raises(UserError, match=f"skip: found {every}, expected 2 to 6: tiny has 7 layers"):
            skipping(target, every)


def test_int8_is_offered_only_where_it_is_faster():
    """Either a copy whose passes take less time, or one line with both times."""
    target = tiny_target()
    try:
        copied = quantised(target)
        assert any("Quantized" in str(type(m)) or "quantized" in type(m).__module__ for m in copied.model.modules())
    except UserError as error:
        assert str(error).startswith("int8: found ") and "ms for a pass of 4 rows, expected less than" in str(error)
    with pytest.raises(UserError, match="expected a target of text alone"):
        target.sharded = [None]
        shared_copy(target, label="int8")
