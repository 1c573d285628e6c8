"""The largest of many numbers is torch's, whatever their precision and shape."""

import pytest
import torch

from draftsmith.models.argmax import argmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 50), (2, 3, 4), (0, 5)])
def test_it_is_where_the_largest_stands(dtype, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found = argmax(scores)
    assert found.dtype == torch.int64 and found.shape == shape[:-1]
    assert torch.equal(scores.gather(-1, found[..., None])[..., 0], scores.amax(-1))


def test_the_first_of_equal_ones_counts_and_infinite_ones_are_the_least():
    assert argmax(torch.tensor([[1.0, 3.0, 3.0], [-torch.inf, -torch.inf, -5.0]])).tolist() == [1, 2]
