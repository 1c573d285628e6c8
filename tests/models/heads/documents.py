"""Random documents, as training packs them and as decoding has them."""

import torch

from draftsmith.models.features import Features
from tests.conftest import pack

LENGTHS = (14, 12, 10)


def documents(target, lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, target.vocab_size, (n,), generator=g).tolist() for n in lengths]


def packed(target, head, first=4, lengths=LENGTHS):
    """Random documents in one packed row; tokens from `first` on were written by the target."""
    return pack(target, head, documents(target, lengths), [first] * len(lengths))


def features_of(target, head, lengths=LENGTHS):
    """The same documents as right-padded rows, as decoding has them."""
    rows, width = documents(target, lengths), max(lengths)
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    hidden = torch.zeros(len(rows), width, 96).type_as(target.embedding)
    for b, row in enumerate(rows):
        states = target.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        hidden[b, : len(row)] = torch.cat([states[k][0] for k in head.config.taps], -1)
    return Features(tokens, hidden, torch.tensor(lengths))


def cut(features, row, count):
    return Features(
        features.tokens[row : row + 1, :count], features.hidden[row : row + 1, :count], torch.tensor([count])
    )


def place(features, row):
    """Packed row number -> (document, position)."""
    starts = features.packing.borders
    b = max(i for i, start in enumerate(starts) if start <= row)
    return b, row - starts[b]
