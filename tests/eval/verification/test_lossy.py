"""What is not lossless: mistakes and biased rules that the law must catch, trees that rules must refuse, and what top-k
trees cannot gain.
"""

import pytest
import torch

from draftsmith.eval.verification.rules import RULES, parse_rule
from draftsmith.models.errors import UserError
from draftsmith.models.tree import DraftTree
from tests.eval.verification.test_verifier import BINARY, CHAINS, EXACT, HOT, IID, PAPER, TWO, WITHOUT, P, Q, close
from tests.laws import Bulk, all_trees, as_trees, distance, emitted, law_error, law_error_by_hand, numbers

# Deterministic trees


def test_top_k_trees_gain_nothing_from_traversal_and_are_lossy_with_q():
    """Two levels of the two most probable tokens: sum over nodes of the target's probability of their paths, whatever
    the rule.
    """
    fixed = [0, 0, 1, 0, 1, 0, 1]
    for name in ("traversal", "rejection", "match"):
        tokens = torch.tensor([fixed])
        law = RULES[name].law(as_trees(tokens, BINARY, [HOT] * 7, Q), P[:7].log()[None])
        close(law.expected[0], 119 / 100)
        assert law_error(RULES[name], BINARY, [HOT] * 7, P, Q, fixed) < EXACT
    # The same trees verified as if they had been drawn from q
    for name, error in (("traversal", 0.49), ("rejection", 0.209)):
        tokens = torch.tensor([fixed])
        tree = as_trees(tokens, BINARY, [WITHOUT] * 7, Q)
        out = emitted(RULES[name], tree, numbers(tokens, BINARY, 3), torch.ones(1, dtype=torch.float64), P)
        assert abs(distance(out, P, 3) - error) < 0.005, (name, distance(out, P, 3))


# Mistakes


def sort_siblings(tokens, parents):
    """Siblings by draft probability in place of draw order; subtrees move along."""
    new_tokens, new_parents, queue = [0], [-1], [(0, 0)]
    while queue:
        old, new = queue.pop(0)
        for child in sorted((c for c, p in enumerate(parents) if p == old), key=lambda c: -float(Q[0, tokens[c]])):
            queue.append((child, len(new_tokens)))
            new_tokens.append(tokens[child])
            new_parents.append(new)
    return new_tokens, new_parents


def drop_repeated(tokens, parents):
    place, new_tokens, new_parents, seen = {0: 0}, [0], [-1], set()
    for node in range(1, len(tokens)):
        if parents[node] in place and (parents[node], tokens[node]) not in seen:
            seen.add((parents[node], tokens[node]))
            place[node] = len(new_tokens)
            new_tokens.append(tokens[node])
            new_parents.append(place[parents[node]])
    return new_tokens, new_parents


@pytest.mark.parametrize(
    ("drawn", "without", "options", "error"),
    [
        (WITHOUT, True, {}, 0),
        (IID, False, {}, 0),
        (IID, True, {}, 0.0748),
        (WITHOUT, False, {}, 0.1436),
        (WITHOUT, True, {"change": sort_siblings}, 0.181),
        (IID, False, {"change": drop_repeated}, 0.0606),
        (IID, True, {"change": drop_repeated}, 0),
        (WITHOUT, True, {"weight": lambda rest, w, left: 1.0}, 0.3),  # equation 3 without `1 - w`: S / S
        (WITHOUT, True, {"weight": lambda rest, w, left: min(1.0, rest / left) if left else 0.0}, 0.0172),
    ],
)  # over the rest of q
def test_mistakes_are_caught_by_the_law(drawn, without, options, error):
    found = law_error_by_hand(PAPER, drawn, without, P, Q, **options)
    assert found < EXACT if error == 0 else abs(found - error) < 1e-3, found


@pytest.mark.parametrize(
    ("name", "drawn", "said", "error"),
    [
        ("traversal", IID, WITHOUT, 0.0748),
        ("traversal", WITHOUT, IID, 0.1436),
        ("rejection", IID, WITHOUT, None),
        ("rejection", WITHOUT, IID, None),
    ],
)
def test_a_wrong_kind_is_caught_by_the_law(name, drawn, said, error):
    tokens, chance = all_trees(PAPER, [drawn] * 6, Q, [0] * 6)
    out = emitted(RULES[name], as_trees(tokens, PAPER, [said] * 6, Q), numbers(tokens, PAPER, 3), chance, P)
    found = distance(out, P, 3)
    assert found > 0.03 if error is None else abs(found - error) < 1e-3, found


def test_typical_acceptance_is_lossy_and_says_so():
    assert law_error(RULES["typical"], CHAINS[2], [WITHOUT] * 3, P, Q) > 0.1
    assert [name for name, rule in RULES.items() if not rule.lossless] == ["typical"]
    with pytest.raises(UserError, match="typical \\(lossy\\)"):
        parse_rule("best")


# Refusals


@pytest.mark.parametrize(
    ("name", "parents", "kinds", "rows", "message"),
    [
        (
            "block",
            TWO,
            [IID] * 3,
            1,
            "block: found a tree that branches, expected chains .* \\(verify trees with traversal\\)",
        ),
        (
            "spectr",
            TWO,
            [WITHOUT] * 3,
            1,
            "spectr: found WITHOUT_REPLACEMENT edges, expected IID \\(draw the tree with replacement",
        ),
        ("spectr", TWO, [HOT] * 3, 1, "spectr: found ONE_HOT edges, expected IID"),
        ("spectr", CHAINS[2], [IID] * 3, 2, "spectr: found a tree of several levels, expected one"),
        ("traversal", TWO, [IID] * 3, 0, "traversal: found sampled edges under 1 nodes and q rows for 0"),
        ("rejection", BINARY, [IID] * 7, 2, "rejection: found sampled edges under 3 nodes and q rows for 2"),
        ("traversal", TWO, [HOT, IID, WITHOUT], 1, "WITHOUT_REPLACEMENT beside IID edges under one node"),
    ],
)
def test_rules_refuse_trees_for_which_they_are_not_lossless(name, parents, kinds, rows, message):
    q = torch.full((1, rows, 3), 1 / 3) if rows else None
    tree = DraftTree(
        torch.zeros(1, len(parents), dtype=torch.long),
        torch.tensor([parents]),
        torch.tensor([kinds], dtype=torch.int8),
        q,
        torch.arange(3),
    )
    with pytest.raises(UserError, match=message):
        RULES[name](tree, torch.zeros(1, len(parents), 3), Bulk(1, torch.Generator()))
