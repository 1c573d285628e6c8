"""A target that sees and is spread over processes: what is partitioned runs equally often in each of them."""

from collections import Counter
from itertools import accumulate

import pytest
import torch

from draftsmith.models.features import FeatureSpec, Packing
from tests.tiny_vision import document, tiny_vision


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_is_partitioned_runs_once_a_row_whatever_stands_in_it(family):
    """Each run of a partitioned weight waits for the other process, which has other rows: with more pictures, or more
    to be supervised.
    """
    target, ran, runs = tiny_vision(family), Counter(), []
    target.shard(
        lambda part: [
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
            for name, module in part.named_modules()
        ]
    )
    for documents in ([[9]], [[3, 5], [4, 2, 6], [7]]):
        texts = [document(family, lengths, seed) for seed, lengths in enumerate(documents)]
        mask = torch.cat([torch.arange(len(ids)) >= len(ids) - 4 for ids, _ in texts])
        packing = Packing((0, *accumulate(len(ids) for ids, _ in texts)), mask)
        features = target.features(
            torch.tensor([token for ids, _ in texts for token in ids]),
            packing,
            FeatureSpec(("last",)),
            [i for _, i in texts],
        )
        for part in features.teacher.final.split(2):
            features.teacher.project(part)
        runs.append(dict(ran))
        ran.clear()
    assert runs[0] == runs[1] and set(runs[0].values()) == {1} and len(runs[0]) > 8 * target.layers
