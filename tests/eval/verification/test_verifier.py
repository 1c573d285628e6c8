"""Verification rules against exact enumeration: the law of the output, and mistakes that must be caught."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.eval.verification.rejection import Residuals
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.grow import binary, chain, parse_tree
from draftsmith.models.noise import without_replacement
from draftsmith.models.tree import DraftTree, Form, Kind
from tests.laws import (
    Bulk,
    all_trees,
    as_trees,
    distance,
    emitted,
    expected,
    law_error,
    numbers,
    random_rows,
    texts_up_to,
    traversal_by_hand,
)

HOT, WITHOUT, IID = Kind.ONE_HOT, Kind.WITHOUT_REPLACEMENT, Kind.IID
EXACT = 1e-12
P = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64).expand(121, 3)  # the paper's example: no context
Q = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).expand(121, 3)
CHAINS = {n: list(range(-1, n)) for n in (1, 2, 3, 4)}
PAPER, TWO, THREE, BINARY = [-1, 0, 0, 1, 1, 2], [-1, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 1, 1, 2, 2]


def rule_law(name, tokens, parents, kind, p=P, q=Q):
    tree = as_trees(torch.tensor([tokens]), parents, [kind] * len(parents), q)
    return tree, RULES[name].law(tree, p[numbers(tree.tokens, parents, p.size(1))].log())


def close(found, want):
    assert torch.allclose(
        torch.as_tensor(found, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=0, atol=EXACT
    ), (found, want)


# Every rule has the target's law on every tree that it accepts


@st.composite
def models(draw, vocab=3, depth=3, largest=6):
    """A form of at most `largest` nodes, kinds, one-hot tokens, p and q with zeros, a draft vocabulary."""
    size = draw(st.integers(1, largest))
    parents, depths = [-1], [0]
    for node in range(1, size):
        parents.append(draw(st.sampled_from([i for i in range(node) if depths[i] < depth])))
        depths.append(depths[parents[-1]] + 1)
    way = [draw(st.sampled_from([WITHOUT, IID])) for _ in range(size)]
    kinds = [HOT] + [draw(st.sampled_from([way[p], way[p], HOT])) for p in parents[1:]]
    fixed = draw(st.lists(st.integers(0, vocab - 1), min_size=size, max_size=size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    texts, zeros = texts_up_to(depth, vocab), draw(st.sampled_from([0.0, 0.3]))
    p, q = random_rows(texts, vocab, generator, zeros), random_rows(texts, vocab, generator, zeros)
    ids = torch.tensor(sorted(draw(st.sets(st.integers(0, vocab - 1), min_size=1))))
    small = torch.zeros_like(q).index_copy_(1, ids, q[:, ids] + 1e-3)
    return parents, kinds, p, small / small.sum(1, keepdim=True), fixed, ids


@settings(deadline=None, max_examples=150)
@given(models())
def test_traversal_rejection_and_matching_have_the_targets_law(model):
    parents, kinds, p, q, fixed, ids = model
    for name in ("traversal", "rejection", "match"):
        assert law_error(RULES[name], parents, kinds, p, q, fixed, ids) < EXACT, (name, model)


@settings(deadline=None, max_examples=40)
@given(models(), st.integers(1, 4))
def test_block_verification_has_the_targets_law_and_that_of_traversal_on_chains(model, depth):
    _, kinds, p, q, fixed, ids = model
    parents, kinds, fixed = (
        list(range(-1, min(depth, 3))),
        (kinds * 4)[: min(depth, 3) + 1],
        (fixed * 4)[: min(depth, 3) + 1],
    )
    assert law_error(RULES["block"], parents, kinds, p, q, fixed, ids) < EXACT, model
    tokens, _ = all_trees(parents, kinds, q, fixed)
    tree, logits = as_trees(tokens, parents, kinds, q, ids), p[numbers(tokens, parents, 3)].log()
    torch.testing.assert_close(
        RULES["block"].law(tree, logits).stop, RULES["traversal"].by_levels(tree, logits).stop, rtol=0, atol=EXACT
    )


@settings(deadline=None, max_examples=40)
@given(models(), st.integers(1, 4))
def test_k_sequential_selection_has_the_targets_law(model, drafts):
    _, _, p, q, _, ids = model
    parents = [-1] + [0] * drafts
    assert law_error(RULES["spectr"], parents, [IID] * len(parents), p, q, (), ids) < EXACT, model


@settings(deadline=None, max_examples=100)
@given(models())
def test_level_synchronous_form_is_the_recursive_one(model):
    """Thresholds and rows of one batch against deletion node by node; the kinds of siblings agree there, so the
    parent's way is taken.
    """
    parents, _, p, q, fixed, _ = model
    for kind in (WITHOUT, IID):
        tokens, _ = all_trees(parents, [kind] * len(parents), q, fixed)
        texts = numbers(tokens, parents, 3)
        law = RULES["traversal"].by_levels(as_trees(tokens, parents, [kind] * len(parents), q), p[texts].log())
        for row in range(0, len(tokens), max(1, len(tokens) // 5)):
            stops = traversal_by_hand(
                tokens[row].tolist(), parents, p[texts[row]].tolist(), q[texts[row]].tolist(), kind == WITHOUT
            )
            for node, (stop, after) in stops.items():
                assert abs(float(law.stop[row, node]) - stop) < EXACT, (model, row, node)
                if stop > 1e-9:
                    found = law.following(torch.full((len(tokens),), node))[row]
                    assert (found / found.sum() - torch.tensor(after, dtype=torch.float64)).abs().max() < 1e-10, (
                        model,
                        row,
                        node,
                    )


@settings(deadline=None, max_examples=60)
@given(models(), st.integers(0, 2**32))
def test_walking_down_is_the_law_of_rejection(model, seed):
    """With the same uniform numbers the walk takes, at every node, the first child whose chance exceeds its number."""
    parents, kinds, p, q, fixed, ids = model
    tokens, _ = all_trees(parents, kinds, q, fixed)
    tree, texts = as_trees(tokens, parents, kinds, q, ids), numbers(tokens, parents, 3)
    uniform = Bulk(len(tokens), torch.Generator().manual_seed(seed)).uniform(len(parents))
    walked = RULES["rejection"](tree, p[texts].log(), Bulk(len(tokens), torch.Generator().manual_seed(seed)))
    left = Residuals(tree, p[texts].log())
    chances = torch.ones(tokens.numel(), dtype=torch.float64)
    for wave in left.plan.waves:
        chances[wave.child] = left.reject(wave)
    hit = uniform < chances.view_as(uniform)
    for row in range(len(tokens)):
        at = [0]
        while taken := [c for c in range(1, len(parents)) if parents[c] == at[-1] and hit[row, c]]:
            at.append(taken[0])
        assert walked.path[row, : walked.counts[row]].tolist() == at
        after = left.following(torch.full((len(tokens),), at[-1]))[row]
        assert after[walked.next_token[row]] > 0


def gain_of_traversal(parents, kind, p, q) -> float:
    """Drafted tokens that Traversal accepts more than rejection does, on average."""
    found = [expected(RULES[name], parents, [kind] * len(parents), p, q) for name in ("traversal", "rejection")]
    return found[0] - found[1]


@settings(deadline=None, max_examples=60)
@given(models(), st.sampled_from([CHAINS[3], TWO, [-1, 0, 0, 1], [-1, 0, 1, 1], [-1, 0, 0, 1, 1], PAPER, BINARY]))
def test_traversal_never_accepts_fewer_than_rejection(model, parents):
    """A theorem for chains (3.4 of Traversal Verification); seen on trees of which no later branch is deeper."""
    _, _, p, q, _, _ = model
    for kind in (WITHOUT, IID):
        assert gain_of_traversal(parents, kind, p, q) > -EXACT, (parents, model)


@pytest.mark.parametrize(("kind", "seed", "zeros", "gain"), [(WITHOUT, 1786, 0.0, -0.1553), (IID, 17, 0.3, -0.0651)])
def test_traversal_may_accept_fewer_where_a_later_branch_is_deeper(kind, seed, zeros, gain):
    """It takes the short first branch more often. Node 3 has a child, its elder sibling 2 none."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (random_rows(texts_up_to(3, 3), 3, generator, zeros) for _ in range(2))
    small = torch.zeros_like(q).index_copy_(1, torch.tensor([1, 2]), q[:, [1, 2]] + 1e-3)
    q = small / small.sum(1, keepdim=True)
    assert gain_of_traversal([-1, 0, 1, 1, 0, 3], kind, p, q) == pytest.approx(gain, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(models(), st.integers(0, 2**32))
def test_a_one_hot_target_is_followed_by_every_rule(model, seed):
    """Temperature 0 as a limit: thresholds are 0 or 1 and the path is that of greedy matching. (Without repeated
    siblings, of which matching follows all.)
    """
    parents, _, p, q, fixed, ids = model
    parents, fixed = parents[: 1 + len(ids)], fixed[: 1 + len(ids)]
    kinds = [WITHOUT] * len(parents)
    hard = torch.nn.functional.one_hot(p.argmax(1), 3).double()
    tokens, _ = all_trees(parents, kinds, q, fixed)
    tree, texts = as_trees(tokens, parents, kinds, q, ids), numbers(tokens, parents, 3)
    noise = lambda: Bulk(len(tokens), torch.Generator().manual_seed(seed))  # noqa: E731
    want = RULES["match"](tree, hard[texts].log(), noise())
    for name in ("traversal", "rejection"):
        found = RULES[name](tree, hard[texts].log(), noise())
        assert torch.equal(found.counts, want.counts) and torch.equal(found.next_token, want.next_token), (name, model)


# Shapes that depend on what was drawn


SHAPES_BY_TOKENS = {  # tokens of a binary tree of depth 2 -> the nodes that are drafted
    "own ancestors": lambda t: {1, 2} | ({3, 4} if t[1] == 0 else {3}) | ({5, 6} if t[2] == 0 else set()),
    "other branches": lambda t: {1, 2} | ({3, 4} if t[2] == 0 else set()) | ({5, 6} if t[1] == 0 else {5}),
    "deeper in an earlier branch": lambda t: {1, 2, 3, 4} | ({5, 6} if t[3] == 0 else set()),
    "the first sibling": lambda t: {1} | ({2} if t[1] == 0 else set()) | {3, 4},
    "itself": lambda t: {1, 3, 4} | ({2, 5, 6} if t[2] != 0 else set()),
    "its child": lambda t: {1, 2, 4} | ({3} if t[3] != 0 else set()),
}


@pytest.mark.parametrize("name", ["traversal", "rejection", "match"])
@pytest.mark.parametrize("shape", SHAPES_BY_TOKENS)
def test_shapes_may_depend_on_what_was_drawn_before_and_on_nothing_else(name, shape):
    """Nodes chosen by their own value are no draws from q: only matching, which makes no use of q, stays lossless."""
    errors = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        p, q = random_rows(13, 3, generator), random_rows(13, 3, generator)
        tokens, chance = all_trees(BINARY, [WITHOUT] * 7, q, [0] * 7)
        kept = torch.tensor(
            [[node == 0 or node in SHAPES_BY_TOKENS[shape](t) for node in range(7)] for t in tokens.tolist()]
        )
        texts, parents = numbers(tokens, BINARY, 3), torch.where(kept, torch.tensor(BINARY), -1)
        whole = DraftTree(tokens, parents, torch.full_like(parents, int(WITHOUT), dtype=torch.int8))
        inner = [whole.form.drawn(row) for row in range(len(tokens))]
        rows = torch.stack([q[texts[b, (some + [0, 0, 0])[:3]]] for b, some in enumerate(inner)])
        tree = DraftTree(tokens, parents, whole.kind, rows, torch.arange(3))
        errors.append(distance(emitted(RULES[name], tree, texts, chance, p), p, 3))
    biased = shape in ("itself", "its child") and name != "match"
    assert max(errors) > 0.01 if biased else max(errors) < EXACT, errors


# Batches, precision, and the device


def test_ragged_batches_are_their_rows():
    """Rows of different forms, padded, against each row alone."""
    generator, forms = torch.Generator().manual_seed(0), [PAPER, CHAINS[2], [-1], BINARY]
    p, q = random_rows(40, 3, generator), random_rows(40, 3, generator)
    alone, size, texts = [], max(map(len, forms)), []
    for parents in forms:
        tokens = torch.randint(3, (1, len(parents)), generator=generator)
        alone.append((as_trees(tokens, parents, [WITHOUT] * len(parents), q), numbers(tokens, parents, 3)))
    pad = lambda x, to, value: torch.nn.functional.pad(x, (0, to - x.size(1)), value=value)  # noqa: E731
    rows = [torch.zeros(1, 0, 3, dtype=torch.float64) if t.q is None else t.q for t, _ in alone]
    batch = DraftTree(
        torch.cat([pad(t.tokens, size, 0) for t, _ in alone]),
        torch.cat([pad(t.parents, size, -1) for t, _ in alone]),
        torch.cat([pad(t.kind, size, 0) for t, _ in alone]),
        torch.cat([torch.nn.functional.pad(q, (0, 0, 0, 3 - q.size(1))) for q in rows]),
        torch.arange(3),
    )
    texts = torch.cat([pad(t, size, 0) for _, t in alone])
    for name in ("traversal", "rejection", "match"):
        law = RULES[name].law(batch, p[texts].log())
        for b, (tree, numbered) in enumerate(alone):
            own = RULES[name].law(tree, p[numbered].log())
            torch.testing.assert_close(law.stop[b, : tree.size], own.stop[0], rtol=0, atol=1e-14)
            assert float(law.stop[b, tree.size :].abs().sum()) == 0
            for node in range(tree.size):
                last = torch.zeros(len(forms), dtype=torch.long)
                last[b] = node
                found, want = law.following(last)[b], own.following(torch.tensor([node]))[0]
                torch.testing.assert_close(found / found.sum(), want / want.sum(), rtol=0, atol=1e-14)


def drafted(shape, vocab: int, batch: int, dtype=torch.float32):
    """Trees of a static shape and peaked p and q over a large vocabulary: (tree, logits)."""
    generator = torch.Generator().manual_seed(1)
    parents = [-1, *(p for level in shape.levels for p in level["parent"])]
    form = Form.shared(parents, WITHOUT)
    logits = 4 * torch.randn(batch, shape.size, vocab, generator=generator)
    inner = form.drawn(0)
    q = (logits[:, inner] + torch.randn(batch, len(inner), vocab, generator=generator)).softmax(-1)
    tokens = torch.zeros(batch, shape.size, dtype=torch.long)
    for row, node in enumerate(inner):
        below = [i for i, p in enumerate(parents) if p == node]
        tokens[:, below] = without_replacement(
            q[:, row], torch.rand(batch, len(below), generator=generator, dtype=torch.float64)
        )
    tree = DraftTree(
        tokens,
        torch.tensor([parents] * batch),
        torch.full((batch, shape.size), int(WITHOUT), dtype=torch.int8),
        q.to(dtype),
        torch.arange(vocab),
        form,
    )
    return tree, logits.to(dtype)


def test_single_precision_agrees_with_double_on_63_nodes_and_4096_tokens():
    """Up to a rounding for every node, whatever the processor's order of summation."""
    for name in ("traversal", "rejection"):
        half, full = (RULES[name].law(*drafted(binary(5), 4096, 2, dtype)) for dtype in (torch.float32, torch.float64))
        worst = float((half.stop - full.stop).abs().max())
        assert worst < 63 * torch.finfo(torch.float32).eps, (name, worst)


class NoWaiting(TorchDispatchMode):
    """Fails on operators whose result the host must wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(
            word in str(function)
            for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal.default", "unique")
        ), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [chain(5), binary(3), parse_tree("eagle")], ids=str)
def test_verification_does_not_wait_for_the_device(shape):
    """A tree whose form is known, its schedule made once: from then on a cycle is a fixed sequence of operators."""
    tree, logits = drafted(shape, 64, 3)
    rules = [
        RULES["typical"],
        *([RULES["block"]] if shape.depth == shape.size - 1 else []),
        RULES["rejection"],
        RULES["traversal"],
    ]
    for rule in rules:
        noise = Bulk(3, torch.Generator())
        rule(tree, logits, noise)
        with NoWaiting():
            rule(tree, logits, noise)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        rule(tree, logits, noise).trimmed()
