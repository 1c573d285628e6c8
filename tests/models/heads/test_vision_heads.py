"""Every head drafts for every family that sees: it is stored and loaded again as it is, and decoding with it changes
nothing.
"""

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.formats import load_drafter, save_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads.layer import rope_of
from draftsmith.models.targets import ImagePrompt
from tests.tiny_vision import CONFIGS, document, tiny_vision
from tests.train.test_gto_vision import HEADS


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stored_head_decodes_as_the_target_alone(family, tmp_path):
    target = tiny_vision(family)
    prompts = [ImagePrompt(*document(family, [2, 4], 1)), ImagePrompt(*document(family, [3, 5, 4], 2, wide=True))]
    plain = [t.tokens for t in generate(target, NoDrafter(), prompts, Sampling(), 10)]
    for name, make in HEADS.items():
        head = make(target)
        again = load_drafter(save_drafter(head, tmp_path / name, {}, torch.float32), target.shared, target.layers)
        assert again.config == head.config and all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values(), strict=True)
        )
        assert [
            t.tokens for t in generate(target, HeadDrafter(again, parse_tree("dynamic:3x3x8")), prompts, Sampling(), 10)
        ] == plain, name


def test_heads_turn_by_one_position_where_the_target_turns_by_three():
    target = tiny_vision("qwen2_5_vl")
    target.config.rope_parameters["type"] = "mrope"  # as published files have it
    assert rope_of(target.config, "dream") == {"rope_type": "default", "rope_theta": 100.0}
