"""What drafters say that they have learned into: what is reported as the memory of a method."""

import torch

from draftsmith.models.drafters.reader import ReaderDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.features import Features


def test_a_wrapping_drafter_counts_what_the_one_below_it_has_learned():
    below = StandDrafter(lasting=True)
    wrapping = ReaderDrafter(below, lasting=True)
    assert wrapping.nbytes == wrapping.shared[0].nbytes + below.memory.nbytes and below.memory.nbytes > 0


def test_texts_that_outlive_their_requests_are_learned_and_others_are_not():
    features = Features(torch.tensor([[1, 2, 3, 1, 2]]), torch.zeros(1, 5, 0), torch.tensor([5]))
    kept, forgotten = SuffixDrafter(8, cached_requests=4), SuffixDrafter(8)
    for drafter in (kept, forgotten):
        drafter.begin(features, torch.tensor([3]))
    assert kept.nbytes == kept.shared.nbytes > 0 and forgotten.nbytes == 0
