"""The prediction of a chain's acceptance length walks the rows that feed the head, which behind images are fewer than
the text's.
"""

import pytest

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.measure import decode_batches, tau
from draftsmith.eval.measurement.predict import predicted_chain_tau
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.grow import chain
from draftsmith.models.targets import ImagePrompt
from tests.tiny_vision import document, tiny_vision
from tests.train.test_gto_vision import HEADS


@pytest.mark.parametrize("name", HEADS)
def test_predicted_is_measured_behind_images(name):
    target = tiny_vision("llava")
    head = HEADS[name](target)
    prompts = [
        ImagePrompt(*document("llava", lengths, seed))
        for seed, lengths in enumerate([[3, 5], [4, 3, 6], [9], [2, 7]] * 3)
    ]
    plain = generate(target, NoDrafter(), prompts, Sampling(), 60)
    for depth in (1, 3):
        measured = tau(decode_batches(target, HeadDrafter(head, chain(depth)), prompts, Sampling(), 60, set(), 4))
        assert (
            1 < measured == pytest.approx(predicted_chain_tau(target, head, prompts, plain, depth))
        )  # something was accepted
