"""Baselines: prompt lookup in our loop, and Hugging Face generate counted the way our loop counts."""

import pytest
import torch
from transformers import GenerationConfig

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.baselines import Emissions, Generate, Stopwatch, plain_trace
from draftsmith.eval.measurement.measure import Looped
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features
from draftsmith.models.noise import Draw
from tests.conftest import tiny_target
from tests.eval.test_decode import PROMPTS

NO_DRAW = Draw(0.0, 0, [], [])  # lookup does not sample


def begun(drafter, texts, roots):
    width = max(map(len, texts))
    tokens = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    drafter.begin(
        Features(tokens, tokens[..., None][..., :0].float(), torch.tensor([len(t) for t in texts])), torch.tensor(roots)
    )
    return drafter


def test_lookup_drafts_what_followed_the_longest_and_latest_match():
    drafter = begun(LookupDrafter(3), [[1, 2, 3, 4, 9, 2, 3, 5, 1, 2], [7, 8, 6, 7], [5]], [3, 8, 5])
    tree = drafter.propose(NO_DRAW)
    # row 0: 1 2 3 stood at the start (3-gram) though 2 3 stood later; row 1: 7 8 (2-gram); row 2: no match
    assert tree.tokens.tolist() == [[3, 4, 9, 2], [8, 6, 7, 8], [5, 0, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2], [-1, 0, 1, 2], [-1, -1, -1, -1]] and tree.depths.amax(
        1
    ).tolist() == [3, 3, 0]
    drafter.select(torch.tensor([1, 0]))
    drafter.observe(
        Features(torch.tensor([[8, 6], [3, 0]]), torch.zeros(2, 2, 0), torch.tensor([2, 1])), torch.tensor([1, 5])
    )
    assert drafter.texts == [[7, 8, 6, 7, 8, 6, 1], [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3, 5]]
    assert drafter.propose(NO_DRAW).tokens.tolist() == [
        [1, 0, 0, 0],
        [5, 1, 2, 3],
    ]  # 2 3 5 stood before, followed by 1 2 3


def test_lookup_without_any_match_is_plain_decoding_and_changes_no_text(target):
    assert begun(LookupDrafter(), [[1, 2]], [3]).propose(NO_DRAW).size == 1
    for sampling in (Sampling(), Sampling(0.8, seed=2)):
        plain = generate(target, NoDrafter(), PROMPTS, sampling, 40, {7})
        assert [t.tokens for t in generate(target, LookupDrafter(4), PROMPTS, sampling, 40, {7})] == [
            t.tokens for t in plain
        ]


def methods(target):
    return {
        "plain": Generate(target),
        "lookup": Generate(target, prompt_lookup_num_tokens=4, max_matching_ngram_size=3),
        "assisted": Generate(target, assistant=tiny_target(2, seed=0)),
    }


@pytest.mark.parametrize("name", ["plain", "lookup", "assisted"])
def test_generate_emits_our_greedy_text_and_its_passes_are_the_forwards_of_the_target(target, name):
    decode = methods(target)[name]
    for row, prompt in enumerate(PROMPTS):
        ours = generate(target, NoDrafter(), [prompt], Sampling(), 24, {7})[0]
        with Stopwatch(target.model) as forwards:
            (trace,), seconds = decode([prompt], [row], Sampling(), 24, {7})
        assert trace.tokens == ours.tokens
        first = len(trace.tokens) - sum(trace.emitted)  # from the pass over the prompt; assisted loops draft before it
        assert first >= 1 and (first == 1 or name != "plain")
        assert len(trace.emitted) == len(forwards.forwards) - 1 and all(
            e <= a + 1 for e, a in zip(trace.emitted, trace.accepted)
        )
        assert seconds["total"] == pytest.approx(sum(seconds[k] for k in ("draft", "verify", "overhead")))
        assert (seconds["draft"] > 0) == (name == "assisted" and len(trace.emitted) > 0)


RULES = {
    "suppressed ids": {"suppress_tokens": [5]},
    "suppressed at the beginning": {"begin_suppress_tokens": [5]},
    "bad words": {"bad_words_ids": [[5]]},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 4},
    "a static cache": {"cache_implementation": "static"},
    "a dictionary": {"return_dict_in_generate": True},
    "stop strings": {"stop_strings": ["return"]},
    "ends as text": {"eos_token_id": "2"},
    "a minimal length": {"min_new_tokens": 20},
    "a forced end": {"forced_eos_token_id": 9},
    "a bias": {"sequence_bias": [[[5], 40.0]]},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 3, "min_p": 0.2},
    "a penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("rule", RULES)
def test_generate_decodes_by_our_law_whatever_the_checkpoint_asks_for(rule):
    """The config is the model's own again behind it; a temperature above 0 draws the same as without the rule."""
    target = tiny_target()
    sampled = Generate(target)([PROMPTS[0]], [0], Sampling(0.9, seed=2), 16, {7})[0][0].tokens
    plain = generate(target, NoDrafter(), PROMPTS[:2], Sampling(), 16, {7})
    target.model.generation_config = own = GenerationConfig(**RULES[rule])
    for decode in (Generate(target), Generate(target, prompt_lookup_num_tokens=4, max_matching_ngram_size=3)):
        for row, trace in enumerate(plain):
            assert decode([PROMPTS[row]], [row], Sampling(), 16, {7})[0][0].tokens == trace.tokens
    assert Generate(target)([PROMPTS[0]], [0], Sampling(0.9, seed=2), 16, {7})[0][0].tokens == sampled
    assert target.model.generation_config is own
    assistant = tiny_target(2)
    assistant.model.generation_config = GenerationConfig(**RULES[rule])
    assert Generate(target, assistant)([PROMPTS[0]], [0], Sampling(), 16, {7})[0][0].tokens == plain[0].tokens


def test_a_perfect_assistant_emits_its_drafts_and_the_bonus_token(target):
    assistant, text = tiny_target(), generate(target, NoDrafter(), [PROMPTS[0]], Sampling(), 25)[0].tokens
    settings = assistant.model.generation_config  # the library reads them there; an unsure assistant would stop early
    settings.num_assistant_tokens, settings.assistant_confidence_threshold, settings.num_assistant_tokens_schedule = (
        3,
        0.0,
        "constant",
    )
    (trace,), _ = Generate(target, assistant=assistant)([PROMPTS[0]], [0], Sampling(), 25, set())
    assert trace.tokens == text and trace.emitted[:3] == [4] * 3 and trace.drafted[:3] == [3] * 3, trace
    assert all(emitted <= drafted + 1 for emitted, drafted in zip(trace.emitted, trace.drafted)), trace


def test_sampled_generate_is_seeded_by_request_and_batches_only_plain(target):
    plain = Generate(target)
    one, two, other = (plain([PROMPTS[0]], [r], Sampling(1.0, seed=5), 12, set())[0][0].tokens for r in (0, 0, 1))
    assert one == two != other
    ragged, _ = plain(PROMPTS, [0, 1, 2, 3], Sampling(), 12, {7})
    assert [t.tokens for t in ragged] == [
        t.tokens for t in Looped(target, NoDrafter())(PROMPTS, [0, 1, 2, 3], Sampling(), 12, {7})[0]
    ]
    assert not plain.one_at_a_time and Generate(target, prompt_lookup_num_tokens=2).one_at_a_time


def test_tokens_behind_the_end_and_the_limit_do_not_count():
    assert plain_trace([3, 4, 7, 0, 0], {7}).tokens == [3, 4, 7] and plain_trace([3], {7}).emitted == []
    heard = []
    streamed = Emissions(4, 100, {7}, lambda request, tokens: heard.append((request, tokens)))
    for tokens in ([9, 9, 9], [1, 2], [3, 4, 5], [6, 7, 8]):  # the prompt, what the pass over it emitted, two passes
        streamed.put(torch.tensor(tokens))
    assert streamed.trace.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert streamed.trace.emitted == [3, 2] and streamed.trace.accepted == [2, 2]
    assert heard == [(4, [1, 2]), (4, [3, 4, 5]), (4, [6, 7])]
    limited = Emissions(0, 3, set())
    for tokens in ([9], [1], [2, 3, 4]):
        limited.put(torch.tensor(tokens))
    assert limited.trace.emitted == [2]


def test_an_assistant_of_another_vocabulary_is_refused(target):
    with pytest.raises(UserError, match="vocab_size: found 50, expected the target's 61"):
        Generate(target, assistant=tiny_target(2, vocab=50))
