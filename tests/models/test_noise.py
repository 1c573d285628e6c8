"""Keyed noise: the published numbers of its generator, its law, and that it depends on its key alone."""

import pytest
import torch

from draftsmith.eval.sampling import Sampling, perturb
from draftsmith.models.noise import BELOW_ONE, gumbel, philox, random_words, uniform

# Known-answer vectors of Philox4x32-10 in the generator's published test suite: counter, key, words.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_its_published_numbers(counter, key, words):
    found = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in found) == words


def test_numbers_depend_on_their_key_alone():
    places = torch.tensor([[4, 5], [9, 2]])
    both = random_words(3, [7, 1 << 40], places, 10, "a")
    assert both.shape == (2, 2, 10) and both.min() >= 0 and both.max() <= ONES
    for row, request in enumerate([7, 1 << 40]):
        for column in range(2):
            alone = random_words(3, [request], places[row : row + 1, column : column + 1], 6, "a")
            assert torch.equal(alone[0, 0], both[row, column, :6])
    others = [
        random_words(*key)
        for key in [
            (4, [7], places[:1], 10, "a"),
            (3, [7], places[:1], 10, "b"),
            (3, [8], places[:1], 10, "a"),
            (3, [7 + (1 << 32)], places[:1], 10, "a"),
            (3, [7], places[:1] + 2, 10, "a"),
        ]
    ]
    assert not any(torch.equal(other[0], both[0]) for other in others)


def test_uniform_and_gumbel_have_their_laws():
    places = torch.arange(50)[None]
    values = uniform(0, [0], places, 2000, "a").flatten().sort().values
    even = torch.arange(len(values), dtype=torch.float64) / len(values)
    assert float((values - even).abs().max()) < 1.63 / len(values) ** 0.5  # Kolmogorov-Smirnov, 1 %
    noise = gumbel(0, [0], places, 2000, "a").flatten().double().sort().values
    assert float(((-(-noise).exp()).exp() - even).abs().max()) < 1.63 / len(values) ** 0.5
    assert not torch.equal(uniform(0, [0], places, 3, "a"), uniform(0, [0], places, 3, "b"))


def test_no_noise_is_infinite_even_where_all_bits_are_set(monkeypatch):
    """A token that is the only one left must be chosen whatever is drawn."""
    monkeypatch.setattr("draftsmith.models.noise.random_words", lambda *_: torch.tensor([[[0, 1, ONES - 1, ONES]]]))
    noise = gumbel(0, [0], torch.tensor([[0]]), 4, "a")
    assert bool(noise.isfinite().all()) and float(torch.tensor([float(BELOW_ONE)])) < 2.0**32


@pytest.mark.parametrize("piece", [1, 20, 30])
def test_noise_is_the_same_however_much_of_it_is_made_at_a_time(monkeypatch, piece):
    places = torch.tensor([[4, 5, 7], [9, 2, 0]])
    whole = gumbel(3, [7, 1 << 40], places, 10, "a")
    monkeypatch.setattr("draftsmith.models.noise.PIECE", piece)
    assert torch.equal(gumbel(3, [7, 1 << 40], places, 10, "a"), whole)


def test_nodes_of_one_position_share_their_noise():
    logits, positions = torch.zeros(2, 4, 5), torch.tensor([[3, 4, 4, 5], [8, 9, 10, 9]])
    scores = perturb(logits, Sampling(1.0, seed=2), [0, 6], positions)
    assert torch.equal(scores[0, 1], scores[0, 2]) and torch.equal(scores[1, 1], scores[1, 3])
    for row, request in enumerate([0, 6]):
        alone = gumbel(2, [request], positions[row : row + 1], 5, "choose")
        assert torch.equal(scores[row], alone[0])
