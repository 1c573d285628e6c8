"""The optimal-transport ceiling of one level against brute force over all token sets, and rules against the ceiling."""

import itertools

import pytest
import torch

from draftsmith.eval.verification.ceiling import ceiling
from draftsmith.eval.verification.expected import Recorder
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.errors import UserError
from draftsmith.models.grow import parse_tree
from draftsmith.models.tree import Kind
from tests.laws import Bulk, TableHead, expected, numbers, random_rows, texts_up_to

P, Q = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64), torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)


def over_all_sets(p: list[float], q: list[float], drafts: int, kind: Kind) -> float:
    """min over H of 1 + p(H) - Pr(all drafts in H), draft by draft."""

    def chance(order):
        mass, left = 1.0, 1.0
        for place, token in enumerate(order):
            if kind == Kind.WITHOUT_REPLACEMENT:
                if token in order[:place]:
                    return 0.0
                mass, left = mass * q[token] / left, left - q[token]
            else:
                mass *= q[token]
        return mass

    sets = (some for size in range(len(p) + 1) for some in itertools.combinations(range(len(p)), size))
    return min(1 + sum(p[x] for x in some) - sum(map(chance, itertools.product(some, repeat=drafts))) for some in sets)


@pytest.mark.parametrize(
    ("drafts", "kind", "want"),
    [
        (1, Kind.IID, 0.7),
        (2, Kind.IID, 0.89),
        (2, Kind.WITHOUT_REPLACEMENT, 1 - 1 / 140),
        (3, Kind.WITHOUT_REPLACEMENT, 1),
    ],
)
def test_ceiling_of_the_papers_example(drafts, kind, want):
    assert abs(float(ceiling(P, Q, drafts, kind)) - want) < 1e-12


@pytest.mark.parametrize("kind", [Kind.IID, Kind.WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_ceiling_is_the_minimum_over_all_token_sets(drafts, kind):
    generator = torch.Generator().manual_seed(drafts)
    for _ in range(10):
        p, q = random_rows(1, 5, generator, 0.2), random_rows(1, 5, generator)
        found, want = float(ceiling(p, q, drafts, kind)), over_all_sets(p[0].tolist(), q[0].tolist(), drafts, kind)
        assert abs(found - want) < (1e-12 if drafts <= 2 or kind == Kind.IID else 1e-9), (found, want)


def test_no_rule_beats_the_ceiling_and_traversal_is_rejection_on_one_level():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        p, q = random_rows(4, 3, generator), random_rows(4, 3, generator)
        for drafts, kind in itertools.product((1, 2, 3), (Kind.IID, Kind.WITHOUT_REPLACEMENT)):
            parents, kinds, best = (
                [-1] + [0] * drafts,
                [kind] * (drafts + 1),
                float(ceiling(p[:1], q[:1], drafts, kind)),
            )
            found = {
                name: expected(RULES[name], parents, kinds, p, q)
                for name in ("rejection", "traversal", *(["spectr"] if kind == Kind.IID else []))
            }
            assert max(found.values()) < best + 1e-12 and abs(found["rejection"] - found["traversal"]) < 1e-12, (
                found,
                best,
            )


def test_deterministic_children_have_no_ceiling_of_this_kind():
    with pytest.raises(UserError, match="ceiling: found ONE_HOT"):
        ceiling(P, Q, 2, Kind.ONE_HOT)


def test_closed_form_has_the_mean_of_the_sampled_length_and_less_variance():
    """20,000 trees of a table: Rao-Blackwell. Every rule is noted on the trees that the first one decodes."""
    generator = torch.Generator().manual_seed(0)
    p, q = random_rows(texts_up_to(3, 4), 4, generator), random_rows(texts_up_to(3, 4), 4, generator)
    policy, head, count = parse_tree("sampled:binary:2"), TableHead((p + q) / 2, torch.arange(4)), 20_000
    noise = Bulk(count, generator)
    noise.requests = range(count)
    tree = policy.sample(
        head, head.roots(torch.zeros(count, dtype=torch.long)), torch.zeros(count, dtype=torch.long), noise
    )
    texts = numbers(tree.tokens, list(tree.form.parents[0]), 4)
    recorder = Recorder([RULES["traversal"], RULES["rejection"], RULES["match"]], ceilings=True)
    recorder(tree, p[texts].log(), noise)
    for name in recorder.expected:
        exact, sampled = (
            torch.tensor([notes[name][request][0] for request in range(count)])
            for notes in (recorder.expected, recorder.sampled)
        )
        assert abs(float((exact - sampled.double()).mean())) < 4 * float(sampled.double().std()) / count**0.5, name
        assert exact.var() < 0.8 * sampled.double().var(), name
    first = {name: sum(notes[r][0] for r in range(count)) / count for name, notes in recorder.first.items()}
    best = sum(recorder.best[r][0] for r in range(count)) / count
    assert first["match"] < first["rejection"] <= best, (first, best)
