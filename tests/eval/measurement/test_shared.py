"""Several methods behind one prefill: the traces are those of each method on its own."""

from dataclasses import replace

import pytest
import torch

from draftsmith.eval.decode import decode, generate
from draftsmith.eval.measurement.shared_prefill import SharedSession, Tapped, shared_spec
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.features import FeatureSpec
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads.owl import OwlConfig, OwlHead
from draftsmith.models.targets import TextTarget
from tests.conftest import tiny_head, tiny_target
from tests.models.targets.test_recurrent import FAMILIES, model_of

START = [4, 8, 15, 16, 23, 42] * 4
PROMPTS = [
    START + [3, 1],
    START + [5, 9, 2, 6],
    [7, 7, 7],
    START + [3],
]  # the second and the last go on from what was there


def owl(target, mode, seed):
    torch.manual_seed(seed)
    head = OwlHead(OwlConfig.for_target(target.config, 16, 4, mode), target.shared)
    if mode == "replace":
        torch.nn.init.normal_(head.spec)
    return head.eval()


def test_every_method_decodes_as_on_its_own():
    target = tiny_target()
    probing = HeadDrafter(owl(target, "replace", 2), parse_tree("dynamic:4x3x8"))
    drafters = {
        "eagle3": HeadDrafter(tiny_head(target), parse_tree("dynamic:4x3x10")),
        "owl": HeadDrafter(owl(target, "off", 1), parse_tree("chain:3")),
        "owl-spec": probing,
        "suffix": SuffixDrafter(12),
        "howl": HowlDrafter(probing, SuffixDrafter(12, SuffixRule(factor=4)), 1.0),
    }
    spec = shared_spec(drafter.feature_spec for drafter in drafters.values())
    shared = SharedSession(target, spec, 128, least=6)
    sources = set()
    for prompt in PROMPTS:
        prefill = shared.prefill(prompt)
        for name, drafter in drafters.items():
            (alone,) = generate(target, drafter, [prompt], Sampling(), 30)
            shared.rewind()
            (together,) = decode(
                shared.session, prefill, Tapped(drafter, spec, target.config.hidden_size), [prompt], Sampling(), 30
            )
            assert together == alone, (prompt, name)
            sources |= {step.source for step in drafter.steps} if name == "howl" else set()
    assert sources == {"suffix", "head"}


@pytest.mark.parametrize("target", [tiny_target, lambda: TextTarget(model_of(FAMILIES["qwen3_next"]()), "")])
def test_copies_of_a_session_decode_as_it_would(target):
    """Also where requests of an earlier copy have ended and given up their rows."""
    target = target()
    session = target.open(SuffixDrafter(6).feature_spec, len(PROMPTS), 64)
    prefill = session.prefill(PROMPTS)
    for seed in (3, 4):
        sampling = Sampling(1.0, seed=seed)
        texts = generate(target, NoDrafter(), PROMPTS, sampling, 12)
        eos = {texts[0].tokens[3], texts[2].tokens[6]}
        usual = generate(target, SuffixDrafter(6), PROMPTS, sampling, 12, eos)
        copied = decode(session.copy(), prefill, SuffixDrafter(6), PROMPTS, sampling, 12, eos)
        assert copied == usual and len({len(trace.tokens) for trace in usual}) > 1
    assert session.lengths.tolist() == [len(prompt) for prompt in PROMPTS]


def test_features_of_a_prompt_that_goes_on_are_those_of_the_whole():
    target = tiny_target()
    spec = owl(target, "replace", 2).feature_spec
    shared, fresh = SharedSession(target, spec, 128, least=6), SharedSession(target, spec, 128, least=6)
    shared.prefill(PROMPTS[0])
    found, whole = shared.prefill(PROMPTS[1]), fresh.prefill(PROMPTS[1])
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features.hidden, whole.features.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features.probes[:, -1], whole.features.probes[:, -1], rtol=1e-4, atol=1e-4)
    assert (
        found.features.tokens.tolist() == whole.features.tokens.tolist()
        and found.features.lengths.tolist() == whole.features.lengths.tolist()
    )


def test_taps_are_united_and_two_probes_refused():
    spec = FeatureSpec((2, "last"), torch.zeros(4))
    both = shared_spec([FeatureSpec((1, 2)), spec, FeatureSpec(())])
    assert both.taps == (1, 2, "last") and both.probe is spec.probe
    with pytest.raises(ValueError, match="probes of several heads"):
        shared_spec([spec, replace(spec, probe=torch.zeros(4))])
