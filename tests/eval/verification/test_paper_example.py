"""The numbers of the paper's example (traversal verification)."""

import pytest
import torch

from draftsmith.eval.verification.rejection import Residuals
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.spectr import k_seq
from tests.eval.verification.test_verifier import (
    BINARY,
    CHAINS,
    EXACT,
    HOT,
    IID,
    PAPER,
    THREE,
    TWO,
    WITHOUT,
    P,
    Q,
    close,
    rule_law,
)
from tests.laws import (
    as_trees,
    expected,
    law_error,
)


@pytest.mark.parametrize(
    ("name", "stops", "root_row", "a_row"),
    [
        ("traversal", [10 / 33, 1 / 33, 2 / 3], [0, 1 / 3, 2 / 3], [0, 0, 1]),
        ("block", [10 / 33, 1 / 33, 2 / 3], [0, 1 / 3, 2 / 3], [0, 0, 1]),
        ("rejection", [1 / 2, 0, 1 / 2], [0, 1 / 3, 2 / 3], None),
    ],
)
def test_chain_of_the_paper(name, stops, root_row, a_row):
    _, law = rule_law(name, [0, 0, 1], CHAINS[2], WITHOUT)
    close(law.stop[0], stops)
    for node, row in enumerate((root_row, a_row, [0.3, 0.4, 0.3])):
        if row is not None:
            after = law.following(torch.tensor([node]))[0]
            close(after / after.sum(), row)


@pytest.mark.parametrize(
    ("name", "kind", "stops"),
    [
        ("traversal", WITHOUT, [0, 0, 2 / 33, 2 / 3, 7 / 33, 2 / 33]),
        ("rejection", WITHOUT, [0, 0, 1 / 4, 1 / 2, 0, 1 / 4]),
        ("traversal", IID, [0, 0, 1 / 66, 2 / 3, 10 / 33, 1 / 66]),
    ],
)
def test_tree_of_the_paper(name, kind, stops):
    tree, law = rule_law(name, [0, 0, 2, 1, 2, 0], PAPER, kind)
    close(law.stop[0], stops)
    close(law.expected[0], {"traversal": 64 / 33, "rejection": 7 / 4}[name] if kind == WITHOUT else 2 - 1 / 66)
    after = law.following(torch.tensor([2]))[0]
    close(after / after.sum(), [0, 1 / 3, 2 / 3])
    if kind == WITHOUT:  # after X3 is rejected: w(X1) = 1/11, p = [0, 0, 1], q = [6/7, 0, 1/7]
        left = Residuals(tree, P[:6].log()[None])
        first, second, third = left.plan.waves[:3]
        for wave in (first, second):  # the children of the root
            left.w.index_copy_(0, wave.child, left.reject(wave))
        close(left.w[1:3], [1 / 2, 1])
        close(left.reject(third)[0], 2 / 3)
        close(left.w[1], 1 / 11)
        close(left.p[1], [0, 0, 1])
        close(left.q[1], [6 / 7, 0, 1 / 7])


def test_rejection_of_the_paper_without_replacement():
    tree = as_trees(torch.tensor([[0, 0, 1, 2]]), THREE, [WITHOUT] * 4, Q)
    left, chances = Residuals(tree, P[:4].log()[None]), []
    for wave in left.plan.waves:
        chances.append(float(left.reject(wave)[0]))
        if len(chances) == 1:
            close(left.p[0], [0, 1 / 3, 2 / 3])
            close(left.q[0], [0, 3 / 4, 1 / 4])
    close(chances, [1 / 2, 4 / 9, 1])


@pytest.mark.parametrize(
    ("parents", "kind", "traversal", "rejection", "naive"),
    [
        (CHAINS[1], WITHOUT, 7 / 10, 7 / 10, 33 / 100),
        (CHAINS[2], WITHOUT, 5 / 4, 119 / 100, 4389 / 10000),
        (CHAINS[3], WITHOUT, 213 / 125, 1533 / 1000, 474837 / 10**6),
        (CHAINS[4], WITHOUT, 20887 / 10000, 17731 / 10000, 0.48669621),
        (CHAINS[3], IID, 213 / 125, 1533 / 1000, 474837 / 10**6),
        (TWO, IID, 41 / 50, 41 / 50, 513 / 1000),
        (TWO, WITHOUT, 7 / 8, 7 / 8, 407 / 600),
        (THREE, IID, 106 / 125, 106 / 125, 6249 / 10000),
        (THREE, WITHOUT, 1, 1, 1),
        (PAPER, WITHOUT, 167 / 100, 161 / 100, 15257 / 15000),
        (PAPER, IID, 383 / 250, 739 / 500, 18567 / 25000),
        (BINARY, WITHOUT, 541 / 320, 105 / 64, 409849 / 360000),
        (BINARY, IID, 1933 / 1250, 3731 / 2500, 776169 / 10**6),
    ],
)
def test_expected_accepted_tokens_of_the_paper(parents, kind, traversal, rejection, naive):
    """naive: the target is sampled and the first sibling that agrees is entered, as every rule does with ONE_HOT edges.
    Matching follows all siblings that agree, which gains where i.i.d. ones are repeated.
    """
    kinds, hot = [kind] * len(parents), [HOT] * len(parents)
    for name, said, want in (
        ("traversal", kinds, traversal),
        ("rejection", kinds, rejection),
        ("traversal", hot, naive),
        ("rejection", hot, naive),
    ):
        close(expected(RULES[name], parents, kinds, P, Q, said), want)
        assert law_error(RULES[name], parents, kinds, P, Q) < EXACT, name
    matched = expected(RULES["match"], parents, kinds, P, Q)
    assert matched > naive + 0.01 if kind == IID and parents in (PAPER, BINARY) else abs(matched - naive) < EXACT, (
        matched
    )
    assert law_error(RULES["match"], parents, kinds, P, Q) < EXACT
    if parents in CHAINS.values():
        close(expected(RULES["block"], parents, [kind] * len(parents), P, Q), traversal)


@pytest.mark.parametrize(("drafts", "rho", "beta", "accepted"), [(2, 1.4, 0.6, 0.84), (3, 1.75, 0.5, 0.875)])
def test_k_sequential_selection_of_the_example(drafts, rho, beta, accepted):
    close(torch.stack(k_seq(P[:1], Q[:1], torch.tensor([drafts])))[:, 0], [rho, beta])
    parents = [-1] + [0] * drafts
    close(expected(RULES["spectr"], parents, [IID] * len(parents), P, Q), accepted)
    assert law_error(RULES["spectr"], parents, [IID] * len(parents), P, Q) < EXACT
