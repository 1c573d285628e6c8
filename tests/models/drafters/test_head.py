"""A head that drafts: rows that it was told while another drafter was at work, and rows that are given up again."""

import pytest
import torch

from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.features import Features
from draftsmith.models.grow import chain
from draftsmith.models.noise import Draw
from tests.conftest import tiny_head, tiny_target
from tests.models.heads.test_dream import dream_head

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
LENGTHS = (5, 8, 11)  # rows known at first, after one pass, after another


@pytest.fixture(params=["eagle3", "dream"], scope="module")
def pair(request):
    target = tiny_target()
    return target, tiny_head(target) if request.param == "eagle3" else dream_head(target)


def part(features: Features, start: int, stop: int) -> Features:
    cut = slice(start, stop)
    return Features(features.tokens[:, cut], features.hidden[:, cut], torch.tensor([stop - start]))


def drafts(drafter) -> list[int]:
    return drafter.propose(Draw(0.0, 0, [0], [0])).tokens[0].tolist()


def started(head, features, count):
    drafter = HeadDrafter(head, chain(3))
    drafter.begin(part(features, 0, count), torch.tensor(TEXT[count : count + 1]))
    return drafter


def test_a_head_that_was_idle_for_several_passes_loses_no_row(pair):
    """As when HOWL took the suffix path for all requests, or another drafter was chosen."""
    target, head = pair
    features = target.open(head.feature_spec, 1, 32).prefill([TEXT]).features
    drafter, (first, second, last) = started(head, features, LENGTHS[0]), LENGTHS
    drafter.observe(part(features, first, second), torch.tensor([TEXT[second]]))
    drafter.observe(part(features, second, last), torch.tensor([TEXT[last]]))
    assert drafts(drafter) == drafts(started(head, features, last))


@pytest.mark.parametrize("drafted", [False, True])
def test_rows_behind_a_mark_are_given_up(pair, drafted):
    """What was drafted and observed since leaves no trace, and rows before the mark are computed once."""
    target, head = pair
    features = target.open(head.feature_spec, 1, 32).prefill([TEXT]).features
    other = target.open(head.feature_spec, 1, 32).prefill([[*TEXT[:6], 20, 21, 22]]).features
    drafter, (first, second, _) = started(head, features, LENGTHS[0]), LENGTHS
    state = drafter.mark()
    if drafted:
        drafts(drafter)
    drafter.observe(part(other, first, first + 3), torch.tensor([30]))
    if drafted:
        drafts(drafter)
    drafter.restore(state)
    drafter.observe(part(features, first, second), torch.tensor([TEXT[second]]))
    pending = drafter.context.pending.lengths.item()
    assert pending == (second - first if drafted else second - first + 1)
    assert drafts(drafter) == drafts(started(head, features, second))
