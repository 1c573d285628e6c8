"""A little of what `tests/benchmarks/fuzz.py` does at length, and that its second opinion is one."""

import json

import pytest
import torch

from tests.benchmarks import fuzz, fuzz_loads
from tests.conftest import tiny_head, tiny_target
from tests.oracle import TEMPLATES, Bad, Taught, expected


def test_mutated_rows_are_what_the_oracle_says():
    found = fuzz.rows(600, 7, lambda line: None)
    assert not found["wrong_rows"], found["wrong_rows"][:3]
    assert found["rows"]["used"] > 150 and found["rows"]["refused"] > 150 and found["rows"]["empty"] > 0


def test_mutated_targets_tokenizers_and_drafters_are_refused_or_what_their_files_say():
    found = fuzz_loads.loads(45, 7, lambda line: None)
    assert not found["wrong_loads"], found["wrong_loads"][:3]
    assert sum(count for name, count in found["loads"].items() if name.endswith("used")) > 8


def test_the_oracle_knows_what_is_to_be_learned():
    line = json.dumps(
        {"messages": [*fuzz.TALK, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}
    )
    first = "<|bos|><|user|>add<|end|><|assistant|>"
    assert expected(line, "plain", 300, "", set()) == [
        Taught(first, "return os<|end|>"),
        Taught(f"{first}return os<|end|><|user|>b<|end|><|assistant|>", "c<|end|>"),
    ]
    for bad in ('{"text": "\\ud800"}', "{", '{"messages": []}', '{"tokens": [1, 300], "prompt_length": 1}'):
        with pytest.raises(Bad):
            expected(bad, "plain", 300, "", set())


def test_the_comparison_sees_what_is_wrong():
    """A renderer whose template is not the one that the oracle is told of."""
    renderer = fuzz.Renderer(fuzz.tokenizer_of(TEMPLATES["plain"].replace("m.content", "m.content.upper()")))
    kind, reason = fuzz.compared(json.dumps(fuzz.GOOD[0]), "plain", renderer)
    assert kind == "wrong" and "RETURN OS" in reason


def test_the_checks_of_loaded_things_see_what_is_wrong(tmp_path):
    places = fuzz_loads.made(tmp_path)
    own = tiny_target()
    assert fuzz_loads.wrong_drafter(places["eagle3"], tiny_head(own, 40), own) is None
    assert "other numbers" in fuzz_loads.wrong_drafter(places["eagle3"], tiny_head(own, 40, seed=2), own)
    loaded = fuzz_loads.TextTarget.load(str(places["target"]))
    assert fuzz_loads.wrong_target(places["target"], loaded) is None
    with torch.no_grad():
        loaded.model.lm_head.weight[0] += 1
    assert "lm_head.weight has other numbers" in fuzz_loads.wrong_target(places["target"], loaded)
