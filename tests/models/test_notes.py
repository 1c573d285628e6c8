"""What is told of a target before any work, by every command alike."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from draftsmith.launch.cli import main
from draftsmith.models.errors import UserError
from draftsmith.models.heads import Eagle3Config, OwlConfig
from draftsmith.models.notes import decoding_rules, notes
from draftsmith.models.targets import TextTarget, describe
from tests.conftest import tiny_target
from tests.models.targets.test_form import DYNAMIC, LONG, OWN_ROPE, PARTIAL
from tests.models.targets.test_targets import FAMILIES, model_of

ASKED = {
    "suppress_tokens": [263],
    "no_repeat_ngram_size": 2,
    "min_p": 0.1,
    "repetition_penalty": 1.3,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "num_beams": 4,
    "stop_strings": ["return"],
}
NEUTRAL = [
    {"eos_token_id": 2, "max_length": 40, "cache_implementation": "static", "return_dict_in_generate": True},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "num_beams": 1, "do_sample": False},
    {"no_repeat_ngram_size": 0, "suppress_tokens": [], "min_p": 0.0, "min_length": 0, "bad_words_ids": None},
]


@pytest.mark.parametrize("rule", ASKED)
def test_every_rule_of_a_generation_config_is_found_by_its_name(rule):
    assert decoding_rules(GenerationConfig(**{rule: ASKED[rule]})) == {rule: ASKED[rule]}


@pytest.mark.parametrize("number", range(len(NEUTRAL)))
def test_what_changes_no_distribution_is_no_rule(number):
    assert decoding_rules(GenerationConfig(**NEUTRAL[number])) == {} == decoding_rules(None)


def test_rules_are_named_once_in_one_line(tokenizer):
    target = tiny_target(vocab=300, eos_token_id=2, bos_token_id=1)
    target.model.generation_config = GenerationConfig(eos_token_id=2, **ASKED, bad_words_ids=[[i] for i in range(99)])
    (line,) = notes(target, tokenizer, "here")
    assert line.startswith("target here: generation_config.json asks for bad_words_ids [[0], [1]") and "\n" not in line
    assert "no_repeat_ngram_size 2, num_beams 4, repetition_penalty 1.3, stop_strings ['return']" in line
    assert line.endswith("no method applies any of it: all decode by the command's options") and len(line) < 500


def test_a_tokenizer_of_more_ids_than_the_embedding_has_rows_is_told(tokenizer):
    described = SimpleNamespace(
        by_level=False,
        generation_config=GenerationConfig(eos_token_id=2),
        config=SimpleNamespace(eos_token_id=2, max_position_embeddings=64),
        vocab_size=len(tokenizer) - 5,
        context_length=64,
    )
    (line,) = notes(described, tokenizer, "here")
    assert f"5 of its tokenizer's {len(tokenizer)} tokens" in line and ", ...)" in line
    described.vocab_size += 4
    (line,) = notes(described, tokenizer, "here")
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    assert f"1 of its tokenizer's {len(tokenizer)} tokens ({last}) have ids" in line
    described.vocab_size += 1
    assert notes(described, tokenizer, "here") == []


def test_ropes_that_are_not_copied_and_contexts_that_are_cut_are_told(tokenizer):
    ropes = {"phi3, longrope": LONG, "llama, dynamic": DYNAMIC, "glm, half of a query": PARTIAL}
    for family in ropes:
        target = TextTarget(model_of(OWN_ROPE[family]()), family)
        told = "\n".join(notes(target, tokenizer, family, Eagle3Config.for_target(target.config)))
        assert "the head has a plain rope of its own, since none computes the target's (" in told
        assert ("used up to there, not to 256" in told) == (family == "phi3, longrope")
        assert "rope of its own" not in "\n".join(notes(target, tokenizer, family, OwlConfig.for_target(target.config)))
    target = TextTarget(model_of(FAMILIES["qwen2"]()), "yarn")
    assert "rope" not in "\n".join(notes(target, tokenizer, "yarn", Eagle3Config.for_target(target.config)))


@pytest.fixture
def odd(folder, tmp_path):
    """A target whose generation config names another end and rules."""
    target = Path(shutil.copytree(folder / "target", tmp_path / "target"))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "no_repeat_ngram_size": 3}))
    return target


COMMANDS = {
    "inspect": ["inspect"],
    "train": ["train"],
    "--dry-run": ["train", "--dry-run"],
    "regenerate": ["regenerate"],
    "eval": ["eval", "lookup"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_it_before_it_works(command, odd, folder, tmp_path, capsys, monkeypatch):
    """Once each, and before bad input ends the command."""
    none = tmp_path / "none.jsonl"
    none.write_text("[\n")
    name, *more = COMMANDS[command]
    arguments = [name, str(folder / "recipe.yaml"), f"target={odd}", f'data.files=["{none}"]', *more]
    if name == "regenerate":
        arguments = [name, str(odd), str(none), str(tmp_path / "answers.jsonl")]
    if name == "eval":
        arguments = [name, *more, "--target", str(odd), "--suite", str(none), "--output", str(tmp_path / "out")]
    if name == "train":
        arguments.append(f"output={tmp_path / 'out'}")
    monkeypatch.setattr(sys, "argv", ["draftsmith", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    found = capsys.readouterr()
    told = " ".join(found.out.split())
    assert end.value.code == 2 and found.err.count("error: ") == 1, found
    for line in (
        "stop ids differ: generation_config.json says 0",
        "generation_config.json asks for no_repeat_ngram_size 3",
    ):
        assert told.count(line) == 1, told


@pytest.mark.parametrize("content", ["{", "[]", '"a"', "\x00"])
def test_a_generation_config_that_cannot_be_read_is_refused(content, odd):
    (odd / "generation_config.json").write_text(content)
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError) as caught:
            look(odd)
        assert f"target {odd}: generation_config.json: " in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_whose_trees_go_level_by_level_is_told(tokenizer):
    described = SimpleNamespace(
        by_level=True,
        vocab_size=len(tokenizer),
        config=SimpleNamespace(eos_token_id=2, max_position_embeddings=64),
        generation_config=None,
        context_length=64,
    )
    assert notes(described, tokenizer, "here")[-1].startswith("target here: its Mamba-1 layers take a tree one level")
