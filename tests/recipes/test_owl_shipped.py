"""The shipped OWL drafters of `code-long`: lossless, small, of use, and behind the target's own state the nearest step
is the easiest.
"""

from itertools import accumulate
from pathlib import Path

import pytest
import torch

from draftsmith.eval.measurement.measure import decode_batches, tau
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.export import export_drafter
from draftsmith.launch.methods import bundled
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.features import Packing
from draftsmith.models.formats import load_drafter, read_files
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import OwlObjective
from draftsmith.models.targets import TextTarget, locate

NAMES = ("owl-code-long", "owl-code-long-spec")


@pytest.fixture(scope="module")
def code_long():
    target, tokenizer = TextTarget.load("bundled:targets/code-long"), load_tokenizer("bundled:targets/code-long")
    prompts, stops = (
        [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer, 12)],
        stop_ids(target, tokenizer),
    )
    return target, prompts, stops, decode_batches(target, NoDrafter(), prompts, Sampling(), 48, stops, 6)


@pytest.mark.parametrize(
    ("name", "tree"), [("owl-code-long", "dynamic:8x8x32"), ("owl-code-long-spec", "dynamic:8x8x16")]
)
def test_shipped_drafters_change_no_text_and_are_of_use(code_long, name, tree):
    target, prompts, stops, plain = code_long
    place = Path(locate(f"bundled:drafters/{name}"))
    assert (place / "model.safetensors").stat().st_size <= 6e6 and read_files(
        place
    ).target == "bundled:targets/code-long"
    drafter = HeadDrafter(load_drafter(place, target.shared), parse_tree(tree))
    assert drafter.size == 32  # rows to verify, the same for both
    drafted = decode_batches(target, drafter, prompts, Sampling(), 48, stops, 5)
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]
    assert tau(drafted) > 1.8, tau(drafted)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_nearest_step_is_the_easiest(code_long, name):
    """On texts of held-out prompts, teacher-forced: the state that drafting starts from grows stale."""
    target, prompts, _, plain = code_long
    head = load_drafter(locate(f"bundled:drafters/{name}"), target.shared)
    texts = [p + t.tokens for p, t in zip(prompts, plain)]
    mask = torch.cat([torch.arange(len(text)) >= len(p) for text, p in zip(texts, prompts)])
    features = target.features(
        torch.tensor([t for text in texts for t in text]),
        Packing((0, *accumulate(map(len, texts))), mask),
        head.feature_spec,
    )
    sums = head.loss(features, OwlObjective(head.config.n_predict, 0.0))[1]
    losses = (sums["loss"] / sums["rows"]).tolist()
    assert losses[0] == min(losses), losses


def test_shipped_drafters_become_arctic_directories(tmp_path):
    for name in NAMES:
        out = export_drafter(f"bundled:drafters/{name}", tmp_path / name, "arctic", report=lambda line: None)
        assert read_files(out).config["base_model_archs"] == ["LlamaForCausalLM"]
