"""What the numbers mean: tau, per-depth acceptance, prediction against measurement, divergences, and the demo's flow on a tiny target."""

import json

import pytest
import torch

from draftsmith.eval.decode import Trace, generate
from draftsmith.eval.evaluate import Plan, evaluate
from draftsmith.eval.measure import Run, acceptance_by_depth, decode_batches, divergences, macro_tau, summary, tau
from draftsmith.eval.predict import predicted_chain_tau
from draftsmith.eval.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.drafter import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import chain, parse_tree
from draftsmith.train.loop import train
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import tiny_head, tiny_target, trained_head

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2], [2, 7, 1, 8, 2, 8], [1, 4, 1, 4]]


def test_tau_counts_tokens_over_passes():
    traces = [Trace(tokens=[0] * 7, accepted=[2, 2], drafted=[3, 3], emitted=[3, 3]), Trace(tokens=[0] * 2, accepted=[0], drafted=[3], emitted=[1])]
    assert tau(traces) == 7 / 3 and macro_tau(traces) == 2.0
    assert acceptance_by_depth(traces) == [2 / 3, 1.0, 0.0]


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_predicted_chain_tau_equals_the_measured_one(target, depth):
    head = trained_head(target)
    plain = decode_batches(target, NoDrafter(), PROMPTS, Sampling(), 40, {7}, 3)
    measured = decode_batches(target, HeadDrafter(head, chain(depth)), PROMPTS, Sampling(), 40, {7}, 4)
    assert tau(measured) > 1.05
    assert predicted_chain_tau(target, head, PROMPTS, plain, depth) == pytest.approx(tau(measured), rel=5e-3)


def test_divergences_name_token_and_margin():
    a, b = Trace(tokens=[1, 2, 3, 4], margins=[0.5, 2e-5, 0.1]), Trace(tokens=[1, 2, 9, 4])
    assert divergences([a], [b]) == [{"prompt": 0, "token": 2, "margin": 2e-5, "tolerated": True}]
    assert divergences([Trace(tokens=[1, 2, 3], margins=[0.5, 2e-4])], [b])[0]["tolerated"] is False
    plain = Run([Trace(tokens=[1, 2], margins=[0.3], emitted=[1])])
    assert summary(Run([Trace(tokens=[1, 5], emitted=[1])]), plain)["lossless"] is False


def test_evaluation_gives_all_documented_keys_and_finds_a_lossy_drafter(target, head, monkeypatch):
    plan = Plan(parse_tree("dynamic:4x3x10"), 3, (parse_tree("chain:2"), parse_tree("dynamic:3x2x5")), 2, (1.0,), 12, 3, 0)
    result = evaluate(target, {"one": head, "two": tiny_head(target, 30)}, PROMPTS, {7}, plan, report=lambda line: None)["one"]
    assert {"tree_tau", "chain_tau", "predicted_chain_tau", "speedup", "accounted_speedup", "ideal_speedup", "lossless", "tree"} <= result.keys()
    assert result["lossless"] and result["identical"] == "24/24" and result["tree"] in ("chain:2", "dynamic:3x2x5")
    assert set(result["timed"]["ms_per_pass"]) == {"draft", "verify", "overhead", "total"}
    from draftsmith.eval import verify

    monkeypatch.setattr(verify, "follow", match_wrongly)
    broken = evaluate(target, {"one": head}, PROMPTS, {7}, plan, report=lambda line: None)["one"]
    assert not broken["lossless"]


def match_wrongly(tree, chosen):
    """Accepts the first child whatever the target says: the losslessness check must see it."""
    from draftsmith.eval.verify import Accepted

    if tree.size == 1:
        return Accepted(torch.zeros(len(chosen), 1, dtype=torch.long), torch.ones(len(chosen), dtype=torch.long), chosen[:, 0])
    path = torch.tensor([[0, 1]] * len(chosen))
    return Accepted(path, torch.full((len(chosen),), 2), chosen[:, 1])


@pytest.mark.parametrize(("row", "want"), [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, [{"role": "user", "content": "a"}]),
    ({"turns": ["a", "b"], "question_id": 3}, [{"role": "user", "content": "a"}]), ({"prompt": "a"}, [{"role": "user", "content": "a"}])])
def test_prompt_forms(tmp_path, row, want):
    from draftsmith.train.pretrain import train_tokenizer

    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(row) + "\n")
    prompt = read_prompts(file, train_tokenizer(["a b"], 280))[0]
    assert prompt.messages == want and prompt.tokens


@pytest.mark.parametrize(("text", "message"), [("", "found no prompts"), ("{", "row 1: not valid JSON"), ("3", "row 1: found int"),
                                               ('{"x": 1}', r"row 1: found \['x'\], expected messages, turns or prompt")])
def test_bad_prompts_name_the_row(tmp_path, text, message):
    file = tmp_path / "p.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        read_prompts(file, None)


def test_regenerate_resumes_and_feeds_training(tmp_path, monkeypatch):
    """The demo's flow on a tiny target: answers (killed once), training, a drafter directory."""
    from draftsmith.train.pretrain import train_tokenizer

    target = tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(tmp_path / "target")
    train_tokenizer(["def add(a, b): return a + b"], 300).save_pretrained(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"add {i}"}) + "\n" for i in range(10)))
    arguments = (str(tmp_path / "target"), str(tmp_path / "prompts.jsonl"), str(tmp_path / "answers.jsonl"), [0.0, 0.8], 16, 3)
    calls = []

    def killed(*call, **settings):
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*call, **settings)

    from draftsmith.launch import regenerate as module

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "generate", killed)
        regenerate(*arguments, None, 0, lambda line: None)
    partial = tmp_path / "answers.jsonl.partial"
    partial.write_text(partial.read_text() + '{"row": 9, "tor')  # torn last line
    with pytest.raises(UserError, match="answers of another run"):
        regenerate(*arguments, None, 1)
    resumed = regenerate(*arguments, None, 0, lambda line: None).read_text()
    fresh = regenerate(*arguments[:2], str(tmp_path / "fresh.jsonl"), *arguments[3:], None, 0, lambda line: None).read_text()
    assert resumed == fresh and len(resumed.splitlines()) == 10 and not partial.exists()
    rows = [json.loads(line) for line in resumed.splitlines()]
    assert all(len(r["tokens"]) > r["prompt_length"] for r in rows) and {r["temperature"] for r in rows} == {0.0, 0.8}
    recipe = read_recipe("recipes/eagle3-code.yaml", DrafterRecipe, [
        f"target={tmp_path}/target", f"data.files=[{tmp_path}/answers.jsonl]", f"output={tmp_path}/out", "head.draft_vocab_size=null",
        "head.intermediate_size=null", "optimization.batch_tokens=128", "evaluation.rows=0", "objective.steps=2", "data.max_length=64"])
    assert (train(recipe, lambda line: None) / "model.safetensors").is_file()
