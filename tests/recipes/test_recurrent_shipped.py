"""The shipped drafters of targets with recurrent layers: they change no text, greedy or sampled, and are accepted."""

import pytest

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.measure import tau
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.methods import bundled
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.formats import load_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import TextTarget


@pytest.mark.parametrize(("kind", "least", "least_sampled"), [("hybrid", 2.2, 1.3), ("mamba2", 2.8, 1.3)])
def test_the_shipped_drafter_is_accepted_and_changes_no_text(kind, least, least_sampled):
    place = f"bundled:targets/code-{kind}"
    target, tokenizer = TextTarget.load(place), load_tokenizer(place)
    assert target.stateful and not target.by_level
    head, stops = (
        load_drafter(f"bundled:drafters/eagle3-code-{kind}", target.shared, target.layers),
        stop_ids(target, tokenizer),
    )
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer, 6)]
    for temperature, floor in ((0.0, least), (1.0, least_sampled)):
        sampling, drafter = Sampling(temperature, seed=1), HeadDrafter(head, parse_tree("dynamic:6x4x16"))
        plain = generate(target, NoDrafter(), prompts, sampling, 32, stops)
        drafted = generate(target, drafter, prompts, sampling, 32, stops)
        assert [trace.tokens for trace in drafted] == [trace.tokens for trace in plain]
        assert tau(drafted) > floor
