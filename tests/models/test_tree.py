"""DraftTree laws, tree growth, and a target's tree pass against sequential forwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.grow import DynamicTree, StaticTree, chain, parse_tree
from draftsmith.models.tree import DraftTree


@st.composite
def trees(draw):
    size = draw(st.integers(1, 12))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
    padding = draw(st.integers(0, 3))
    tokens = draw(st.lists(st.integers(0, 60), min_size=size + padding, max_size=size + padding))
    return DraftTree.of(torch.tensor([tokens]), torch.tensor([parents + [-1] * padding]))


def walk(parents, node):
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


@settings(deadline=None, max_examples=60)
@given(trees())
def test_ancestors_and_depths_are_those_of_walking_up(tree):
    parents = tree.parents[0].tolist()
    for node in range(tree.size):
        path = walk(parents, node)
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == path
        assert tree.depths[0, node] == len(path) - 1


@settings(deadline=None, max_examples=15)
@given(trees(), trees())
def test_tree_pass_of_a_ragged_batch_equals_sequential_forwards(one, two):
    from tests.conftest import tiny_target

    target = tiny_target(layers=4)
    size = max(one.size, two.size)
    pad = lambda x, value: torch.nn.functional.pad(x, (0, size - x.size(1)), value=value)  # noqa: E731
    tree = DraftTree.of(
        torch.cat([pad(one.tokens, 0), pad(two.tokens, 0)]), torch.cat([pad(one.parents, -1), pad(two.parents, -1)])
    )
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9]]
    session = target.open(FeatureSpec(taps=(2, "last")), 2, 16)
    session.prefill(prompts)
    verified = session.verify(tree)
    for b, prompt in enumerate(prompts):
        for node in range(size):
            if tree.real[b, node]:
                path = walk(tree.parents[b].tolist(), node)
                out = target.model(torch.tensor([prompt + tree.tokens[b, path].tolist()]), output_hidden_states=True)
                torch.testing.assert_close(verified.logits[b, node], out.logits[0, -1], atol=2e-5, rtol=1e-4)
                want = torch.cat([out.hidden_states[2][0, -1], out.hidden_states[-1][0, -1]])
                torch.testing.assert_close(verified.hidden[b, node], want, atol=2e-5, rtol=1e-4)


def test_cache_after_commit_equals_a_fresh_forward(target):
    spec = FeatureSpec(taps=(2,))
    tree = DraftTree.of(torch.tensor([[7, 8, 9, 10, 11]] * 2), torch.tensor([[-1, 0, 0, 2, 2]] * 2))
    session = target.open(spec, 2, 8)
    session.prefill([[3, 1, 4], [1, 5, 9, 2, 6]])
    session.verify(tree)
    session.commit(torch.tensor([[0, 2, 4], [0, 1, 0]]), torch.tensor([3, 2]))
    assert session.lengths.tolist() == [6, 7]
    for b, tokens in enumerate(([3, 1, 4, 7, 9, 11], [1, 5, 9, 2, 6, 7, 8])):
        fresh = target.open(spec, 1, 8)
        fresh.prefill([tokens])
        torch.testing.assert_close(
            session.cache.store[:, b, :, : len(tokens)], fresh.cache.store[:, 0, :, : len(tokens)], atol=1e-5, rtol=1e-4
        )


def test_chunked_prefill_equals_one_pass(target, monkeypatch):
    from draftsmith.models.targets import session as sessions

    prompts = [list(range(1, 24)), list(range(5, 12))]
    spec = FeatureSpec(taps=(1, 3))
    whole = target.open(spec, 2, 32).prefill(prompts)
    monkeypatch.setattr(sessions, "PREFILL_ROWS", 5)
    parts = target.open(spec, 2, 32).prefill(prompts)
    torch.testing.assert_close(whole.logits, parts.logits, atol=1e-5, rtol=1e-4)
    for b, n in enumerate(whole.features.lengths.tolist()):
        torch.testing.assert_close(whole.features.hidden[b, :n], parts.features.hidden[b, :n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [DynamicTree(3, 4, 12), DynamicTree(4, 3, 8), chain(4), StaticTree(((0,), (2,), (0, 1), (2, 0), (0, 1, 1)), "own")],
)
def test_grown_trees_are_closed_ordered_and_scored_by_their_paths(target, head, policy):
    hidden = target.open(head.feature_spec, 2, 16).prefill([[3, 1, 4, 1], [1, 5, 9, 2, 6, 5]])
    root = torch.tensor([2, 7])
    tree = policy.grow(head, head.roots(head.prefill(hidden.features)), root)
    parents = tree.parents
    assert tree.size == policy.size and torch.equal(tree.tokens[:, 0], root)
    assert bool((parents[:, 1:] < torch.arange(1, tree.size)).all() and (parents[:, 1:] >= 0).all())
    assert int(tree.depths.max()) <= policy.depth
    for b in range(2):
        one = Features(
            hidden.features.tokens[b : b + 1, : hidden.features.lengths[b]],
            hidden.features.hidden[b : b + 1, : hidden.features.lengths[b]],
            hidden.features.lengths[b : b + 1],
        )
        best = best_scores(head, one, root[b], policy) if isinstance(policy, DynamicTree) else None
        scores = [
            path_score(head, one, tree.tokens[b, walk(parents[b].tolist(), node)].tolist())
            for node in range(1, tree.size)
        ]
        pairs = [(p, t) for p, t in zip(parents[b].tolist(), tree.tokens[b].tolist())][1:]
        assert len(set(pairs)) == len(pairs)  # no repeated sibling
        if best is not None:
            torch.testing.assert_close(torch.tensor(sorted(scores)), torch.tensor(sorted(best)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def path_score(head, features, tokens):
    """Cumulative draft log-probability of root -> ... -> node, one sequential draft step a token."""
    beam, score, zero = head.roots(head.prefill(features)), 0.0, torch.zeros(1, 1, dtype=torch.long)
    for token, following in zip(tokens, tokens[1:]):
        logp, beam = head.expand(beam, torch.tensor([[token]]), zero)
        score += float(logp[0, 0, (head.ids == following).nonzero()])
    return score


@torch.no_grad()
def best_scores(head, features, root, policy):
    """EAGLE-2 by brute force: lists and sorting, one sequential path at a time."""

    def children(tokens):
        beam, zero = head.roots(head.prefill(features)), torch.zeros(1, 1, dtype=torch.long)
        for token in tokens:
            logp, beam = head.expand(beam, torch.tensor([[token]]), zero)
        top = logp[0, 0].topk(policy.top_k)
        return [(head.ids[i].item(), s.item()) for i, s in zip(top.indices, top.values)]

    frontier, candidates = [([root.item()], 0.0)], []
    for _ in range(policy.depth):
        level = [(path + [t], score + s) for path, score in frontier for t, s in children(path)]
        candidates += level
        frontier = sorted(level, key=lambda c: -c[1])[: policy.top_k]
    return sorted((s for _, s in candidates), reverse=True)[: policy.size - 1]


def test_static_ranks_are_the_draft_order(target, head):
    features = target.open(head.feature_spec, 1, 16).prefill([[3, 1, 4, 1]]).features
    policy = StaticTree(((0,), (2,), (0, 1), (2, 0), (0, 1, 1)), "own")
    tree = policy.grow(head, head.roots(head.prefill(features)), torch.tensor([2]))
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 2, 3]
    for node, rank in ((1, 0), (2, 2), (3, 1), (4, 0), (5, 1)):
        path = tree.tokens[0, walk(tree.parents[0].tolist(), node)].tolist()
        beam, zero = head.roots(head.prefill(features)), torch.zeros(1, 1, dtype=torch.long)
        for token in path[:-1]:
            logp, beam = head.expand(beam, torch.tensor([[token]]), zero)
        assert head.ids[logp[0, 0].topk(rank + 1).indices[rank]] == path[-1]


@pytest.mark.parametrize(
    "text",
    [
        "chain:5",
        "dynamic:10x7x60",
        "eagle",
        "binary:3",
        "sampled:chain:5",
        "sampled:binary:4:iid",
        "sampled:eagle@0.8",
        "sampled:adaptive:4x3",
        "sampled:adaptive:4x3@0.5",
    ],
)
def test_tree_text_round_trip(text):
    assert str(parse_tree(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chain",
        "chain:0",
        "chain:x",
        "dynamic:3x4",
        "dynamic:3x4x1",
        "eagle:3",
        "star:3",
        "binary:11",
        "sampled:",
        "sampled:dynamic:3x2x4",
        "sampled:chain:2@0",
        "sampled:chain:2@",
        "sampled:adaptive:3",
        "sampled:sampled:chain:2",
    ],
)
def test_bad_tree_text_is_refused(text):
    with pytest.raises(UserError, match="tree: found"):
        parse_tree(text)


def test_eagle_tree_has_25_drafted_nodes_on_five_levels():
    policy = parse_tree("eagle")
    assert policy.size == 26 and policy.depth == 5
