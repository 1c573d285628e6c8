"""Draft vocabularies: the most frequent tokens, as they are stored and read back."""

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.heads import vocabulary


def test_draft_vocabulary_round_trip_and_ties():
    counts = torch.tensor([5, 0, 7, 7, 1, 0, 5])
    ids = vocabulary.most_frequent(counts, 4, required=[5])
    assert ids.tolist() == [0, 2, 3, 5]
    stored = vocabulary.to_offsets(ids, 7)
    assert stored["d2t"].tolist() == [0, 1, 1, 2] and stored["t2d"].tolist() == [
        True,
        False,
        True,
        True,
        False,
        True,
        False,
    ]
    assert torch.equal(vocabulary.from_offsets(**stored, vocab_size=7), ids)
    whole = vocabulary.to_offsets(torch.arange(7), 7)
    assert whole["d2t"].eq(0).all() and whole["t2d"].all()
    with pytest.raises(UserError, match="repeated"):
        vocabulary.from_offsets(torch.tensor([1, 0]), None, 7)
    with pytest.raises(UserError, match="expected 0..6"):
        vocabulary.from_offsets(torch.arange(5), None, 7)
    with pytest.raises(UserError, match="t2d"):
        vocabulary.from_offsets(stored["d2t"], ~stored["t2d"], 7)
