"""Sampled trees and decoding with them: draws in order, q as it was drawn from, and texts with the target's law."""

from dataclasses import replace

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Noise, Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import parse_tree
from draftsmith.models.noise import Draw, uniform, with_replacement, without_replacement
from draftsmith.models.tree import Form, Kind
from tests.conftest import trained_head
from tests.laws import TableHead, continuations, g_test, random_rows, texts_up_to

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]


# Draws


def test_draws_are_intervals_of_the_cumulated_probabilities():
    q = torch.tensor([0.25, 0.0, 0.5, 0.25])
    at = lambda x: with_replacement(q, torch.tensor([x], dtype=torch.float64)).item()  # noqa: E731
    assert [at(x) for x in (0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)] == [0, 0, 2, 2, 3, 3]
    picks = without_replacement(q, torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)).tolist()
    assert picks[:3] == [2, 3, 0]  # what is left: halves of {0, 3}, then 0 alone; the fourth draw finds nothing


def test_ordered_draws_without_replacement_follow_the_law_of_gumbel_top_k():
    q, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 40_000
    generator = torch.Generator().manual_seed(0)
    ours = without_replacement(q.expand(count, -1), torch.rand(count, 2, generator=generator, dtype=torch.float64))
    gumbel = (q.log() - torch.empty(count, 4).exponential_(generator=generator).log()).topk(2).indices
    for draws in (ours, gumbel):
        for first in range(4):
            for second in range(4):
                want = 0.0 if first == second else float(q[first] * q[second] / (1 - q[first]))
                share = float(((draws[:, 0] == first) & (draws[:, 1] == second)).double().mean())
                assert abs(share - want) <= 5 * (want / count) ** 0.5, (first, second, share, want)


@pytest.mark.parametrize("text", ["sampled:chain:3", "sampled:binary:3", "sampled:eagle@0.7", "sampled:binary:2:iid"])
def test_sampled_trees_carry_what_their_children_were_drawn_from(target, head, text):
    features = target.open(head.feature_spec, 2, 16).prefill([[3, 1, 4, 1], [1, 5, 9, 2, 6, 5]]).features
    policy, draw = parse_tree(text), Draw(0.5, 3, [0, 7], [4, 6])
    with torch.no_grad():
        tree = policy.sample(head, head.roots(head.prefill(features)), torch.tensor([2, 7]), draw)
        again = policy.sample(
            head, head.roots(head.prefill(features)), torch.tensor([2, 7]), replace(draw, requests=[0, 8])
        )
    assert tree.size == policy.size and int(tree.depths.max()) == policy.depth
    assert torch.equal(tree.tokens[0], again.tokens[0]) and not torch.equal(tree.tokens[1], again.tokens[1])
    assert tree.form == Form(
        tuple(map(tuple, tree.parents[:1].tolist())), tuple(map(tuple, tree.kind[:1].tolist()))
    )  # as if read from the device
    inner, parents = tree.form.drawn(0), tree.parents[0].tolist()
    assert tree.q.shape == (2, len(inner), len(head.ids)) and torch.equal(tree.ids, head.ids)
    for row, node in enumerate(inner):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        beam, zero = head.roots(head.prefill(features)), torch.zeros(2, 1, dtype=torch.long)
        with torch.no_grad():
            for step in path:
                logp, beam = head.expand(beam, tree.tokens[:, step, None], zero)
        torch.testing.assert_close(
            tree.q[:, row], (logp[:, 0] / (policy.temperature or 0.5)).softmax(-1), atol=1e-5, rtol=1e-4
        )
        below = tree.tokens[0, [c for c, p in enumerate(parents) if p == node]].tolist()
        assert policy.kind == Kind.IID or len(set(below)) == len(below)


def test_adaptive_trees_decide_how_many_children_before_they_are_drawn(target, head):
    """Other random numbers for the draws of the last level change its tokens and nothing of the tree's form."""
    features = target.open(head.feature_spec, 1, 16).prefill([[3, 1, 4, 1]]).features
    policy = parse_tree("sampled:adaptive:3x3")

    class Changed(Draw):
        def uniform(self, count, device="cpu"):
            values = super().uniform(count, device)
            values[:, 3 * (1 + 3) :] = (
                1 - values[:, 3 * (1 + 3) :]
            )  # three for the root, three for each of three nodes, then the last level
            return values

    with torch.no_grad():
        trees = [
            policy.sample(head, head.roots(head.prefill(features)), torch.tensor([2]), draw(1.0, 3, [0], [4]))
            for draw in (Draw, Changed)
        ]
    one, two = trees
    assert (
        torch.equal(one.parents, two.parents)
        and torch.equal(one.tokens[:, :7], two.tokens[:, :7])
        and not torch.equal(one.tokens, two.tokens)
    )
    assert one.size == 10 and torch.equal(one.q, two.q) and int(one.depths.max()) == 3
    inner, parents = one.form.drawn(0), one.parents[0].tolist()
    assert one.q.shape[1] == len(inner)
    for row, node in enumerate(inner):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        beam, zero = head.roots(head.prefill(features)), torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            for step in path:
                logp, beam = head.expand(beam, one.tokens[:, step, None], zero)
        torch.testing.assert_close(one.q[0, row], logp[0, 0].softmax(-1), atol=1e-5, rtol=1e-4)
        below = one.tokens[0, [c for c, p in enumerate(parents) if p == node]].tolist()
        assert len(set(below)) == len(below)


def test_at_temperature_0_the_shape_holds_the_most_probable_tokens(target, head):
    features = target.open(head.feature_spec, 1, 16).prefill([[3, 1, 4, 1]]).features
    roots = lambda: (head, head.roots(head.prefill(features)), torch.tensor([2]))  # noqa: E731
    sampled = parse_tree("sampled:binary:2").sample(*roots(), Draw(0.0, 3, [0], [4]))
    assert torch.equal(sampled.tokens, parse_tree("binary:2").grow(*roots()).tokens) and not bool(sampled.kind.any())


def test_drafting_and_verification_noise_are_streams_of_their_own():
    draw, noise = Draw(1.0, 5, [2], [9]), Noise(Sampling(1.0, seed=5), [2], [9])
    streams = [
        draw.uniform(8)[0],
        noise.uniform(8, "cpu")[0],
        uniform(5, [2], torch.tensor([[10]]), 8, "choose")[0, 0],
    ]
    assert len({tuple(s.tolist()) for s in streams}) == 3
    assert torch.equal(draw.uniform(8), draw.uniform(8)) and not torch.equal(
        draw.uniform(8), Draw(1.0, 5, [2], [10]).uniform(8)
    )


# Decoding


@pytest.mark.parametrize("tree", ["sampled:chain:3", "sampled:binary:2", "sampled:binary:2:iid"])
@pytest.mark.parametrize(
    "sampling", [Sampling(0.8, seed=3), Sampling(0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=6)], ids=str
)
def test_matching_on_sampled_trees_emits_what_plain_decoding_emits(target, tree, sampling):
    """The tree knows nothing of the target's noise, however it was drawn."""
    head = trained_head(target, 50)
    plain = generate(target, NoDrafter(), PROMPTS, sampling, 20, {7})
    drafted = generate(target, HeadDrafter(head, parse_tree(tree)), PROMPTS, sampling, 20, {7})
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]


@pytest.mark.parametrize("name", ["rejection", "traversal", "spectr", "typical", "block"])
def test_a_root_alone_is_plain_sampling_under_every_rule(target, name):
    for sampling in (Sampling(0.9, seed=2), Sampling()):
        plain = generate(target, NoDrafter(), PROMPTS, sampling, 12, {7})
        assert [t.tokens for t in generate(target, NoDrafter(), PROMPTS, sampling, 12, {7}, verifier=RULES[name])] == [
            t.tokens for t in plain
        ]


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("rejection", "sampled:binary:3"),
        ("traversal", "sampled:binary:3"),
        ("traversal", "sampled:eagle"),
        ("block", "sampled:chain:4"),
        ("traversal", "dynamic:4x3x10"),
        ("traversal", "sampled:adaptive:3x3"),
    ],
)
def test_texts_do_not_depend_on_the_batch_and_end_at_eos(target, name, tree):
    head, sampling = trained_head(target, 50), Sampling(0.7, top_p=0.95, seed=1)
    drafter = HeadDrafter(head, parse_tree(tree))
    batched = generate(target, drafter, PROMPTS, sampling, 24, {7, 9}, verifier=RULES[name])
    alone = [
        generate(target, drafter, [p], sampling, 24, {7, 9}, [r], verifier=RULES[name])[0]
        for r, p in enumerate(PROMPTS)
    ]
    assert [t.tokens for t in batched] == [t.tokens for t in alone]
    assert all(len(t.tokens) == 1 + sum(t.emitted) <= 24 and not {7, 9} & set(t.tokens[:-1]) for t in batched)
    assert sum(sum(t.accepted) for t in batched) > 0


@pytest.mark.parametrize(
    ("name", "tree"),
    [("rejection", "sampled:binary:3"), ("traversal", "sampled:binary:3"), ("block", "sampled:chain:4")],
)
def test_an_end_token_inside_the_tree_cuts_the_text_and_changes_nothing_before_it(target, name, tree):
    drafter, sampling, rule = (
        HeadDrafter(trained_head(target, 50), parse_tree(tree)),
        Sampling(0.5, seed=2),
        RULES[name],
    )
    free = generate(target, drafter, PROMPTS, sampling, 24, verifier=rule)
    accepted = set()  # tokens that stood on an accepted path
    for trace in free:
        at = 1
        for emitted in trace.emitted:
            accepted |= set(trace.tokens[at : at + emitted - 1])
            at += emitted
    assert accepted
    for end in sorted(accepted)[:3]:
        for trace, whole in zip(generate(target, drafter, PROMPTS, sampling, 24, {end}, verifier=rule), free):
            assert trace.tokens == whole.tokens[: whole.tokens.index(end) + 1 if end in whole.tokens else None]


@pytest.mark.parametrize("name", ["rejection", "traversal", "block", "spectr"])
def test_at_temperature_0_every_rule_emits_the_greedy_text(target, name):
    head = trained_head(target, 50)
    plain = generate(target, NoDrafter(), PROMPTS, Sampling(), 20, {7})
    assert [
        t.tokens
        for t in generate(
            target,
            HeadDrafter(head, parse_tree("sampled:binary:3")),
            PROMPTS,
            Sampling(),
            20,
            {7},
            verifier=RULES[name],
        )
    ] == [t.tokens for t in plain]


def test_decoding_refuses_a_tree_that_the_rule_does_not_take(target, head):
    with pytest.raises(UserError, match="block: found a tree that branches"):
        generate(
            target,
            HeadDrafter(head, parse_tree("sampled:binary:2")),
            PROMPTS,
            Sampling(1.0),
            8,
            verifier=RULES["block"],
        )


# The law of texts, sampled end to end: drafting, verification, several cycles


PREFIXES, COUNT, LENGTH = (1, 3), 50_000, 3


def worst_g(name, tree, relabel=lambda tree: tree, count=COUNT):
    """G over its one-in-a-million bound, the worst of the prefixes, `count` texts behind each."""
    generator = torch.Generator().manual_seed(1)
    texts = texts_up_to(6, 4)
    p, q = random_rows(texts, 4, generator, 0.1), random_rows(texts, 4, generator)
    policy, head, worst = parse_tree(tree), TableHead((p + q) / 2, torch.tensor([0, 1, 3])), 0.0
    for prefix in PREFIXES:
        start = torch.full((count,), prefix)
        found = continuations(RULES[name], policy, head, p, start, LENGTH, generator, relabel)
        statistic, bound = g_test(prefix, found, p, LENGTH)
        worst = max(worst, statistic / bound)
    return worst


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("match", "sampled:binary:2"),
        ("match", "sampled:binary:2:iid"),
        ("rejection", "sampled:binary:2"),
        ("rejection", "sampled:binary:2:iid"),
        ("traversal", "sampled:chain:3"),
        ("traversal", "sampled:binary:2"),
        ("traversal", "sampled:binary:2:iid"),
        ("traversal", "sampled:binary:2@0.5"),
        ("block", "sampled:chain:3"),
        ("spectr", "sampled:binary:1:iid"),
    ],
)
def test_fifty_thousand_texts_follow_the_targets_joint_law(name, tree):
    assert worst_g(name, tree) < 1


@pytest.mark.parametrize("name", ["rejection", "traversal"])
def test_adaptive_trees_keep_the_targets_joint_law(name):
    assert worst_g(name, "sampled:adaptive:3x2", count=2_000) < 1


@pytest.mark.parametrize(
    ("name", "tree", "relabelled"),
    [
        ("typical", "sampled:binary:2", None),
        ("traversal", "sampled:binary:2:iid", Kind.WITHOUT_REPLACEMENT),
        ("rejection", "sampled:binary:2", Kind.IID),
    ],
)
def test_fifty_thousand_texts_betray_a_biased_rule(name, tree, relabelled):
    def relabel(tree):
        if relabelled is None:
            return tree
        return replace(
            tree,
            kind=torch.full_like(tree.kind, int(relabelled)),
            known=Form.shared(list(tree.form.parents[0]), relabelled),
        )

    assert worst_g(name, tree, relabel) > 1.5
