"""The decode loop on targets with recurrent layers: whatever drafts, the text is that of plain decoding, greedy and
with position-keyed noise, one request at a time and eight together; and plain decoding is that of transformers.
"""

import json
import sys

import pytest
import torch

from draftsmith.eval.decode import generate, stream
from draftsmith.eval.lossless import prove
from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.cli import main
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.models.grow import StaticTree, parse_tree
from draftsmith.models.targets import TextTarget
from tests.conftest import tiny_head
from tests.models.targets.test_recurrent import FAMILIES, every_family
from tests.models.targets.test_targets import generates_as_transformers, model_of, prompts_of

DECODED = ["mamba2", "qwen3_next"]
RAGGED = prompts_of(5, 3, 9, 1, 7, 2, 4, 6)
FEW = StaticTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)), "few")


def target_of(family, **changes):
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    return TextTarget(model_of(config), family)


@every_family
def test_greedy_decoding_equals_generate_of_transformers(family):
    """Families whose step of one token leaves out a limit of the step size (Zamba2, Nemotron-H) have none here."""
    generates_as_transformers(target_of(family), prompts_of(5, 9), 12)


@pytest.mark.parametrize("family", DECODED)
def test_every_drafter_writes_what_plain_decoding_writes(family):
    target = target_of(family)
    drafters = {
        "eagle3": HeadDrafter(tiny_head(target, 40), parse_tree("dynamic:4x3x10")),
        "lookup": LookupDrafter(6),
        "suffix": SuffixDrafter(8),
        "stand": StandDrafter(FEW),
    }
    samplings = [Sampling(), Sampling(1.0, seed=3)]
    alone = prove(target, drafters, RAGGED[:3], {7}, samplings, [1], 8, report=lambda line: None)
    found = alone + prove(target, drafters, RAGGED, {7}, samplings, [8], 8, report=lambda line: None)
    assert {c.batch for c in found} == {1, 8} and {c.sampling.temperature for c in found} == {0.0, 1.0}
    assert all(not c.differences for c in found), [c for c in found if c.differences]


@pytest.mark.parametrize("family", DECODED)
def test_a_text_ends_inside_a_tree_and_others_go_on(family):
    """Continuous batching: requests end at a stop id that a tree held, and new ones take their places."""
    target, drafter = target_of(family), LookupDrafter(6)
    want = [t.tokens for t in generate(target, NoDrafter(), RAGGED, Sampling(), 10, {7, 11, 30})]
    waiting = sorted(enumerate(RAGGED), key=lambda request: -len(request[1]))

    def take(count):
        taken = waiting[:count]
        del waiting[:count]
        return taken

    found = dict(stream(target, drafter, take, 3, Sampling(), 10, {7, 11, 30}))
    assert [found[i].tokens for i in range(len(RAGGED))] == want
    assert len({len(tokens) for tokens in want}) > 1


def test_the_loops_of_transformers_that_draft_are_refused():
    """They would have to take rows back, which states do not give."""
    target = target_of("mamba2")
    with pytest.raises(UserError, match="found layers with a state, which the loops of transformers cannot take back"):
        Generate(target, prompt_lookup_num_tokens=4)
    assert Generate(target).target is target


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_the_command_verifies_such_a_target(family, tokenizer, tmp_path, monkeypatch):
    target = target_of(family, vocab_size=300)
    target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    head = tiny_head(target, 200)
    save_drafter(head, tmp_path / "drafter", {"target": str(tmp_path / "target")}, torch.float32)
    rows = [{"messages": [{"role": "user", "content": f"def f{i}(a):"}]} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["draftsmith", "verify", str(tmp_path / "drafter"), "lookup", "--target", str(tmp_path / "target")]
    arguments += ["--suite", str(tmp_path / "prompts.jsonl"), "--tree", "chain:3", "--tree", "dynamic:3x2x6"]
    arguments += [
        "--dtype",
        "fp32",
        "--batch",
        "1",
        "--batch",
        "8",
        "--max-new-tokens",
        "10",
        "--output",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    document = json.loads((tmp_path / "out" / "lossless.json").read_text())
    assert document["lossless"] and len(document["comparisons"]) >= 12
