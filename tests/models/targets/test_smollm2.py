"""The real target, where it lies on this machine: what it answers, and that trees are verified on it as one token at a
time.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.cli import app
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.features import FeatureSpec
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.targets import describe, locate
from draftsmith.models.tree import DraftTree

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def read(smollm2):
    return load_tokenizer(smollm2)


def test_it_is_what_its_table_says(smollm2_target, smollm2):
    target = smollm2_target
    assert (target.layers, target.config.hidden_size, target.vocab_size, target.context_length) == (
        30,
        576,
        49152,
        8192,
    )
    assert target.model.config.num_attention_heads == 9 and target.model.config.num_key_value_heads == 3
    assert target.head.weight is target.embedding and target.name == smollm2
    assert sum(p.numel() for p in target.model.parameters()) == 134_515_008
    assert target.weights.quantisation == "Q4_1" and describe(smollm2).weights == target.weights


def test_prompts_are_those_of_transformers_own_template(smollm2, read):
    own = AutoTokenizer.from_pretrained(locate(smollm2))
    talk = [*QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Say  12 more, it's ½."}]
    ids = own.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert encode_prompt(read, talk) == ids
    text = own.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert own(text, add_special_tokens=False)["input_ids"] == ids and own.decode(ids) == text
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM") and text.endswith(
        "Say  12 more, it's ½.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert read.convert_ids_to_tokens(read("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]  # digits are split off first


def test_the_greedy_answer_is_sensible_and_ends(smollm2_target, read):
    prompt, stops = encode_prompt(read, QUESTION), stop_ids(smollm2_target, read)
    (trace,) = generate(smollm2_target, NoDrafter(), [prompt], Sampling(), 40, stops)
    assert "Paris" in read.decode(trace.tokens) and trace.tokens[-1] in stops and stops == {2}


@torch.no_grad()
def test_a_tree_is_verified_as_its_paths_one_token_at_a_time(smollm2_target, read):
    """A root with two children, three grandchildren and one more level; logits and tapped states of every node against
    the model's own cache, fed one token after another, and the commit of a path against the same.
    """
    target, prompt = smollm2_target, encode_prompt(read, QUESTION)
    spec = FeatureSpec((2, 15, 27))
    session = target.open(spec, 1, len(prompt) + 16)
    session.prefill([prompt])
    words = read(" The capital city Paris is a big old", add_special_tokens=False)["input_ids"][:7]
    tree = DraftTree.of(torch.tensor([words]), torch.tensor([[-1, 0, 0, 1, 1, 2, 4]]))
    verified = session.verify(tree)

    def one_by_one(tokens):
        out = target.model(torch.tensor([prompt]), use_cache=True)
        for at, token in enumerate(tokens):
            out = target.model(
                torch.tensor([[token]]),
                past_key_values=out.past_key_values,
                position_ids=torch.tensor([[len(prompt) + at]]),
                use_cache=True,
                output_hidden_states=True,
            )
        return out.logits[0, -1], torch.cat([out.hidden_states[k][0, -1] for k in spec.taps])

    for node in range(len(words)):
        path = tree.ancestors[0, node].nonzero().flatten().tolist()
        logits, hidden = one_by_one([words[i] for i in path])
        torch.testing.assert_close(verified.logits[0, node], logits, atol=2e-3, rtol=1e-4)
        torch.testing.assert_close(verified.hidden[0, node], hidden, atol=2e-3, rtol=1e-4)
        assert verified.logits[0, node].argmax() == logits.argmax()
    session.commit(torch.tensor([[0, 1, 4]]), torch.tensor([3]))
    after = session.verify(DraftTree.root_only(torch.tensor([words[6]]))).logits[0, 0]
    torch.testing.assert_close(after, one_by_one([words[0], words[1], words[4], words[6]])[0], atol=2e-3, rtol=1e-4)


def test_regenerated_answers_name_it(smollm2, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": QUESTION}) + "\n")
    out = regenerate(
        smollm2, str(tmp_path / "prompts.jsonl"), str(tmp_path / "out.jsonl"), [0.0], 12, 4, None, 0, lambda line: None
    )
    row = json.loads(Path(out).read_text())
    assert row["messages"][-1]["content"].startswith("The capital of France is Paris") and row["prompt_length"] == 37


def test_eval_measures_on_it(smollm2, tmp_path, monkeypatch):
    """Prompt lookup beside plain decoding: the same texts, and the target by its name in the result."""
    (tmp_path / "suite.jsonl").write_text(json.dumps({"messages": QUESTION}) + "\n")
    monkeypatch.chdir(tmp_path)
    arguments = f"eval lookup --target {smollm2} --suite suite.jsonl --max-new-tokens 8 --temperature 0 --output out"
    app(arguments.split(), standalone_mode=False)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    cells = {cell["method"]: cell for cell in result["cells"]}
    assert result["conditions"]["target"] == smollm2 and cells["lookup"]["identical"] == cells["lookup"]["prompts"] == 1
    assert cells["lookup"]["tau"] >= 1
