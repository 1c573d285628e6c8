"""What the numbers mean: tau, per-depth acceptance, prediction against measurement, divergences, and the demo's flow on
a tiny target.
"""

import json
from dataclasses import replace

import pytest
import torch

from draftsmith.eval.decode import Trace
from draftsmith.eval.measurement import measure
from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.journal import Journal
from draftsmith.eval.measurement.measure import (
    Looped,
    Run,
    acceptance_by_depth,
    decode_batches,
    divergences,
    macro_tau,
    repeated_4grams,
    summary,
    tau,
)
from draftsmith.eval.measurement.predict import predicted_chain_tau
from draftsmith.eval.measurement.suite import Plan, Suite
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import chain, parse_tree
from draftsmith.train.loop import train
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import tiny_head, tiny_target, trained_head

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2], [2, 7, 1, 8, 2, 8], [1, 4, 1, 4]]


def test_tau_counts_tokens_over_passes():
    traces = [
        Trace(tokens=[0] * 7, accepted=[2, 2], drafted=[3, 3], emitted=[3, 3]),
        Trace(tokens=[0] * 2, accepted=[0], drafted=[3], emitted=[1]),
    ]
    assert tau(traces) == 7 / 3 and macro_tau(traces) == 2.0
    assert acceptance_by_depth(traces) == [2 / 3, 1.0, 0.0]
    assert (
        repeated_4grams([[1, 2, 3, 4, 5]]) == 0
        and repeated_4grams([[1] * 7, [1, 2]]) == 0.75
        and repeated_4grams([]) == 0
    )


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
    other = Run([Trace(tokens=[1, 5], emitted=[1])])
    assert summary(other, plain.traces)["lossless"] is False
    assert summary(other, plain.traces, claimed=False)["lossless"] is None


PLAN = Plan(parse_tree("dynamic:4x3x10"), 3, None, 2, (0.0, 1.0), ((0.0, 1), (1.0, 4)), 12, 0)
DOCUMENTED = {
    "tree_tau",
    "chain_tau",
    "predicted_chain_tau",
    "robust_speedup",
    "disturbance",
    "speedup",
    "accounted_speedup",
    "ideal_speedup",
    "lossless",
    "identical",
    "tree",
    "sweep",
    "timed",
    "plain",
    "greedy",
    "sampled",
}


def measured(target, heads, journal=None, plan=PLAN):
    baselines = {"lookup": Looped(target, LookupDrafter()), "hf-lookup": Generate(target, prompt_lookup_num_tokens=4)}
    return Suite("some", target, heads, baselines, PROMPTS, {7}, plan, journal, lambda line: None).measure()


def test_evaluation_gives_all_documented_keys_and_finds_a_lossy_drafter(target, head, monkeypatch):
    results, cells, samples = measured(target, {"one": head, "two": tiny_head(target, 30)})
    one = results["one"]
    assert (
        one.keys() == DOCUMENTED
        and one["lossless"]
        and one["identical"] == "30/30"
        and list(one["sweep"])[0] == one["tree"]
    )
    assert set(one["timed"]["ms_per_pass"]) == {"draft", "verify", "overhead", "total"} and set(one["sampled"]) == {
        "1.0"
    }
    timed = [(c["temperature"], c["batch"], c["method"]) for c in cells if "speedup" in c]
    assert timed == [(0, 1, m) for m in ("plain", "lookup", "hf-lookup", "one", "two")] + [
        (1, 4, m) for m in ("plain", "lookup", "one", "two")
    ]
    for cell in cells:
        low, high = cell["tau_interval"]
        assert low <= cell["tau"] <= high and sum(
            cell[k]["prompts"] for k in ("looping", "not_looping") if cell[k]
        ) == len(PROMPTS)
        assert cell["speedup"] == cell["robust_speedup"] == 1.0 if cell["method"] == "plain" else True
        if "speedup" in cell:
            assert cell["robust_ms_per_pass"].keys() == {"draft", "verify", "overhead"} and cell["disturbance"] > 0
            low, high = cell["robust_speedup_interval"]
            assert 0 < low <= high and cell["robust_tokens_per_second"] > 0
    assert samples.keys() == {"plain", "lookup", "hf-lookup", "one", "two"}
    from draftsmith.eval.verification import verifier as verify

    monkeypatch.setattr(verify, "follow", match_wrongly)
    assert not measured(target, {"one": head})[0]["one"]["lossless"]


def test_a_killed_measurement_goes_on_and_gives_the_same_figures(target, head, tmp_path, monkeypatch):
    def untimed(cells):
        return [
            {k: c[k] for k in ("method", "tree", "temperature", "batch", "tau", "tau_interval", "identical", "prompts")}  # noqa: E731
            for c in cells
        ]

    plan = replace(PLAN, fixed=parse_tree("chain:2"))
    whole = measured(target, {"one": head}, Journal(tmp_path / "whole", {"seed": 0}), plan)[1]
    real, calls = measure.interleaved.__globals__["generate"], []

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure, "generate", killed)
        measured(target, {"one": head}, Journal(tmp_path / "torn", {"seed": 0}), plan)
    before = (tmp_path / "torn").read_text()
    (tmp_path / "torn").write_text(before + '{"key": "some/0.0')
    again = measured(target, {"one": head}, Journal(tmp_path / "torn", {"seed": 0}), plan)[1]
    assert (
        untimed(again) == untimed(whole)
        and (tmp_path / "torn").read_text().startswith(before)
        and before.count("\n") > 2
    )
    with pytest.raises(UserError, match="found another run"):
        Journal(tmp_path / "torn", {"seed": 1})


def match_wrongly(tree, chosen):
    """Accepts the first child whatever the target says: the losslessness check must see it."""
    from draftsmith.eval.verification.verifier import Accepted

    if tree.size == 1:
        return Accepted(
            torch.zeros(len(chosen), 1, dtype=torch.long), torch.ones(len(chosen), dtype=torch.long), chosen[:, 0]
        )
    path = torch.tensor([[0, 1]] * len(chosen))
    return Accepted(path, torch.full((len(chosen),), 2), chosen[:, 1])


def test_regenerate_resumes_and_feeds_training(tmp_path, monkeypatch):
    """The demo's flow on a tiny target: answers (killed once), training, a drafter directory."""
    from draftsmith.train.reference.pretrain import train_tokenizer

    target = tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(tmp_path / "target")
    train_tokenizer(["def add(a, b): return a + b"], 300).save_pretrained(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"add {i}"}) + "\n" for i in range(10)))
    arguments = (
        str(tmp_path / "target"),
        str(tmp_path / "prompts.jsonl"),
        str(tmp_path / "answers.jsonl"),
        [0.0, 0.8],
        16,
        3,
    )
    calls = []

    def killed(*call):
        calls.append(call)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return row_of(*call)

    from draftsmith.launch import regenerate as module

    row_of = module.row_of
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "row_of", killed)
        regenerate(*arguments, None, 0, lambda line: None)
    partial = tmp_path / "answers.jsonl.partial"
    partial.write_text(partial.read_text() + '{"row": 9, "tor')  # torn last line
    with pytest.raises(UserError, match="found another run"):
        regenerate(*arguments, None, 1)
    resumed = regenerate(*arguments, None, 0, lambda line: None).read_text()
    fresh = regenerate(
        *arguments[:2], str(tmp_path / "fresh.jsonl"), *arguments[3:], None, 0, lambda line: None
    ).read_text()
    assert resumed == fresh and len(resumed.splitlines()) == 10 and not partial.exists()
    rows = [json.loads(line) for line in resumed.splitlines()]
    assert all(len(r["tokens"]) > r["prompt_length"] for r in rows) and {r["temperature"] for r in rows} == {0.0, 0.8}
    recipe = read_recipe(
        "recipes/eagle3-code.yaml",
        DrafterRecipe,
        [
            f"target={tmp_path}/target",
            f"data.files=[{tmp_path}/answers.jsonl]",
            f"output={tmp_path}/out",
            "head.draft_vocab_size=null",
            "head.intermediate_size=null",
            "optimization.batch_tokens=128",
            "evaluation.rows=0",
            "objective.steps=2",
            "data.max_length=64",
        ],
    )
    assert (train(recipe, lambda line: None) / "model.safetensors").is_file()
