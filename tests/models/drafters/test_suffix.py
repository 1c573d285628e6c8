"""Suffix decoding in batches, and over requests."""

import torch

from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.features import Features
from draftsmith.models.noise import Draw


def begun(drafter, texts, roots):
    width = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    drafter.begin(
        Features(tokens, torch.zeros(*tokens.shape, 0), torch.tensor([len(text) for text in texts])),
        torch.tensor(roots),
    )
    return Draw(0.0, 0, list(range(len(texts))), [len(text) for text in texts])


def test_drafter_pads_a_batch_and_follows_its_rows():
    drafter = SuffixDrafter(6, SuffixRule(factor=2))
    draw = begun(drafter, [[1, 2, 3, 4, 1, 2], [7, 8]], [3, 9])
    tree = drafter.propose(draw)
    assert tree.tokens.tolist() == [[3, 4, 1, 2, 3], [9, 0, 0, 0, 0]] and tree.parents.tolist() == [
        [-1, 0, 1, 2, 3],
        [-1] * 5,
    ]
    drafter.select(torch.tensor([1]))
    committed = Features(torch.tensor([[9, 7]]), torch.zeros(1, 2, 0), torch.tensor([2]))
    drafter.observe(committed, torch.tensor([8]))  # 7 8 9 7 8
    assert drafter.propose(draw).tokens.tolist() == [[8, 9, 7, 8]]


def test_generated_tokens_serve_later_requests_until_they_are_evicted():
    drafter = SuffixDrafter(8, cached_requests=2)
    begun(drafter, [[5]], [1])
    drafter.observe(Features(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, 0), torch.tensor([3])), torch.tensor([4]))
    assert drafter.propose(begun(drafter, [[6, 1, 2]], [3])).tokens.tolist() == [[3, 4]]
    assert drafter.propose(begun(drafter, [[6, 1, 2]], [3])).tokens.tolist() == [
        [3]
    ]  # three requests: the first is gone
    alone = SuffixDrafter(8)
    begun(alone, [[5]], [1])
    alone.observe(Features(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, 0), torch.tensor([3])), torch.tensor([4]))
    assert alone.propose(begun(alone, [[6, 1, 2]], [3])).tokens.tolist() == [[3]]
