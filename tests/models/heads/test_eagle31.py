"""EAGLE-3.1 and the sliding window: training-time test is drafting, a window is what a mask of that width is, and no
cache grows with the text.
"""

import pytest
import torch

from draftsmith.models.features import Features
from draftsmith.models.grow import DynamicTree
from tests.conftest import pack, tiny_head, tiny_target
from tests.models.heads.documents import cut, documents, features_of, packed
from tests.models.heads.test_eagle3 import compare_ragged, compare_with_drafting

THREE_ONE = {"fc_norm": True, "norm_output": True}
SHAPES = [THREE_ONE, {"fc_norm": True}, {"norm_output": True}]
WINDOWS = [1, 2, 3, 6, 11, 64]  # of texts of 10 to 14 tokens and four steps


@pytest.fixture
def target():
    """In fp64, where sharp random weights leave rounding small."""
    target = tiny_target()
    target.model.double()
    return target


def head_of(target, **shape):
    return tiny_head(target, 40, **shape).double()


def name(shape):
    return "-".join(f"{key}={value}" for key, value in shape.items())


@pytest.mark.parametrize(
    "shape", [*SHAPES, *({"sliding_window": n} for n in WINDOWS), {**THREE_ONE, "sliding_window": 3}], ids=name
)
def test_training_step_k_row_t_equals_sequential_drafting(shape, target):
    assert compare_with_drafting(target, head_of(target, **shape)) > 0


@pytest.mark.parametrize(
    "shape", [THREE_ONE, {"sliding_window": 1}, {"sliding_window": 4}, {"sliding_window": 11}], ids=name
)
def test_drafting_in_a_ragged_batch_equals_one_by_one(shape, target):
    compare_ragged(target, head_of(target, **shape))


@pytest.mark.parametrize("window", WINDOWS)
def test_trees_rooted_in_a_packed_row_are_those_of_decoding(window, target):
    head = head_of(target, sliding_window=window, **THREE_ONE)
    training, decoding, policy = packed(target, head, first=1), features_of(target, head), DynamicTree(3, 4, 12)
    at = torch.tensor([3, 9, 12, 16, 24, 35])
    with torch.no_grad():
        found = policy.candidates(head, head.root_at(training, at), training.tokens[at])
        for i, p in enumerate(at.tolist()):
            b = max(b for b, start in enumerate(training.packing.borders[:-1]) if start <= p)
            context = head.prefill(cut(decoding, b, p - training.packing.borders[b]))
            want = policy.candidates(head, head.roots(context), training.tokens[p : p + 1])
            assert torch.equal(found.tokens[i], want.tokens[0])
            torch.testing.assert_close(found.scores[i], want.scores[0], atol=1e-5, rtol=1e-5)


def rounds(head, features, bounds):
    """A context after rounds that commit the rows start .. stop - 1 each, with speculative nodes between."""
    grown, zero = head.prefill(cut(features, 0, bounds[0])), torch.zeros(1, 1, dtype=torch.long)
    for start, stop in zip(bounds, bounds[1:]):
        _, beam = head.expand(head.roots(grown), features.tokens[:, start].view(1, 1), zero)
        head.expand(beam, torch.tensor([[3, 4]]), zero.expand(-1, 2))
        new = Features(features.tokens[:, start:stop], features.hidden[:, start:stop], torch.tensor([stop - start]))
        head.extend(grown, new)
    return grown


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_windowed_cache_forgets_what_is_not_seen_any_more(window, target):
    """After rounds over 40 tokens drafting goes on as behind a prompt of 40 tokens; the cache holds some windows."""
    head = head_of(target, sliding_window=window)
    features, zero = features_of(target, head, lengths=(40,)), torch.zeros(1, 1, dtype=torch.long)
    grown, fresh = rounds(head, features, [4, *range(6, 40, 2), 40]), head.prefill(cut(features, 0, 40))
    for context in (grown, fresh):
        assert int(context.cache.lengths) <= 2 * window + 2
    a, one = head.expand(head.roots(grown), torch.tensor([[2]]), zero)
    b, other = head.expand(head.roots(fresh), torch.tensor([[2]]), zero)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    tokens = torch.tensor([[5, 6]])
    torch.testing.assert_close(
        head.expand(one, tokens, zero.expand(-1, 2))[0], head.expand(other, tokens, zero.expand(-1, 2))[0]
    )


def test_requests_of_different_lengths_forget_each_on_their_own(target):
    """A batch whose requests have 14, 12 and 10 rows, grown by as many again, against single requests."""
    head = head_of(target, sliding_window=4)
    features, zero = features_of(target, head), torch.zeros(3, 1, dtype=torch.long)
    context = head.prefill(Features(features.tokens[:, :5], features.hidden[:, :5], torch.tensor([5, 4, 3])))
    starts = torch.tensor([5, 4, 3])
    for _ in range(7):
        root = features.tokens.gather(1, starts[:, None])
        head.expand(head.roots(context), root, zero)
        rows = torch.arange(3)[:, None]
        head.extend(context, Features(root, features.hidden[rows, starts[:, None]], torch.ones(3, dtype=torch.long)))
        starts = starts + 1
    got, _ = head.expand(head.roots(context), torch.full((3, 1), 7), zero)
    for b, n in enumerate(starts.tolist()):
        want, _ = head.expand(head.roots(head.prefill(cut(features, b, n))), torch.tensor([[7]]), zero[:1])
        torch.testing.assert_close(got[b], want[0], atol=1e-5, rtol=1e-5)
    assert int(context.cache.lengths.max()) <= 2 * 4 + 1


def test_a_window_of_one_row_sees_the_own_row_alone(target):
    """What it drafts does not depend on any earlier row; with a window as long as the text it is the full head's."""
    lone, wide, full = (head_of(target, sliding_window=w) for w in (1, 14, None))
    features, zero = features_of(target, lone, lengths=(14,)), torch.zeros(1, 1, dtype=torch.long)
    other = Features(features.tokens.clone(), features.hidden.clone(), features.lengths)
    other.tokens[:, :13], other.hidden[:, :13] = 5, 0.5
    first = lambda head, seen: head.expand(head.roots(head.prefill(seen)), torch.tensor([[2]]), zero)[0]  # noqa: E731
    assert torch.equal(first(lone, features), first(lone, other))
    torch.testing.assert_close(first(wide, features), first(full, features), atol=1e-6, rtol=1e-6)


def test_the_closed_form_start_predicts_with_norms_too(target):
    """`regress` of an EAGLE-3.1 head: over the rows that it was fitted to, its first step predicts the target's next
    token better than the start without it.
    """
    rows = documents(target, (60,) * 12)
    found = []
    for fitted in (False, True):
        head = tiny_head(target, None, **THREE_ONE).double()
        features = pack(target, head, rows, [1] * len(rows))
        head.start_from(target)
        if fitted:
            head.regress([features])
        with torch.no_grad():
            (_, output), *_ = head.unroll(features, 1)
            teacher = target.project(features.teacher.final).log_softmax(-1)
            found.append(float((teacher.exp() * (teacher - head.logits(output).log_softmax(-1))).sum(-1).mean()))
    assert found[1] < 0.9 * found[0], found
