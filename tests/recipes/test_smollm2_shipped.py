"""The shipped drafters of a real chat model: they are of the weights that are fetched, change no text, are accepted."""

import pytest

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.measure import tau
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.methods import about, bundled
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.formats import fetch, load_drafter
from draftsmith.models.formats.layout import other_weights
from draftsmith.models.grow import parse_tree


@pytest.mark.parametrize(("name", "least"), [("eagle3-smollm2", 1.8), ("hass-smollm2", 1.5)])
def test_the_shipped_drafter_is_accepted_and_changes_no_text(smollm2_target, name, least):
    target, tokenizer = smollm2_target, load_tokenizer("bundled:targets/smollm2")
    place = fetch(f"bundled:drafters/{name}")
    assert not other_weights(about(place), target)
    head, stops = load_drafter(place, target.shared, target.layers), stop_ids(target, tokenizer)
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/chat.jsonl"), tokenizer, 4)]
    plain = generate(target, NoDrafter(), prompts, Sampling(), 24, stops)
    drafted = generate(target, HeadDrafter(head, parse_tree("dynamic:10x7x60")), prompts, Sampling(), 24, stops)
    assert [trace.tokens for trace in drafted] == [trace.tokens for trace in plain]
    assert tau(drafted) > least
