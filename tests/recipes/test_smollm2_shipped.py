"""The shipped drafter of a real chat model: it is of the weights that are fetched, changes no text, and is accepted."""

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

NAME = "bundled:drafters/eagle3-smollm2"


def test_the_shipped_drafter_is_accepted_and_changes_no_text(smollm2_target):
    target, tokenizer = smollm2_target, load_tokenizer("bundled:targets/smollm2")
    assert not other_weights(about(fetch(NAME)), target)
    head, stops = load_drafter(fetch(NAME), target.shared, target.layers), stop_ids(target, tokenizer)
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/chat.jsonl"), tokenizer, 4)]
    plain = generate(target, NoDrafter(), prompts, Sampling(), 24, stops)
    drafted = generate(target, HeadDrafter(head, parse_tree("dynamic:10x7x60")), prompts, Sampling(), 24, stops)
    assert [trace.tokens for trace in drafted] == [trace.tokens for trace in plain]
    assert tau(drafted) > 1.6
