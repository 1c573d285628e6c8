"""Group Tree Optimization of drafters for targets that see: the head's rows are fewer than the target's, and rewards
are of the text with its images.
"""

from dataclasses import replace

import pytest
import torch

from draftsmith.models.grow import DynamicTree
from draftsmith.models.heads import Eagle3Config, Eagle3Head, EagleConfig, EagleHead
from draftsmith.train import gto
from tests.models.heads.test_dream import dream_head
from tests.models.heads.test_hivis import hivis_head
from tests.models.targets.test_vision import own, packed
from tests.tiny_vision import tiny_vision
from tests.train.test_gto import other_head, spec

TREE = DynamicTree(3, 3, 9)
SETTINGS = spec(groups=2, group_size=3, reward_agg="node_sum", tree=str(TREE))


def plain_head(kind, config, target):
    torch.manual_seed(1)
    head = kind(config.for_target(target.config), target.shared)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return head.eval()


HEADS = {
    "eagle": lambda target: plain_head(EagleHead, EagleConfig, target),
    "eagle3": lambda target: plain_head(Eagle3Head, Eagle3Config, target),
    "hivis": lambda target: hivis_head(target),
    "dream": lambda target: dream_head(target, 0.5),
}


def scored(family, target, head):
    return packed(family, target, replace(head.feature_spec, trees=True))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_rewarded_for_its_trees_behind_images(name):
    """The mean reward is that of trees scored by plain forwards of the target on each whole document, images
    included.
    """
    family, target = "llava", tiny_vision("llava")
    head = HEADS[name](target)
    frozen = other_head(head)
    features, documents, _ = scored(family, target, head)
    _, sums = gto.Gto(SETTINGS, frozen, set())(head, features)
    groups = gto.draw_groups(
        gto.windows(features.packing, features.tokens, 3, set()), 2, 3, torch.Generator().manual_seed(features.seed)
    )
    rewards = []
    for p in groups.flatten().tolist():
        at = torch.tensor([p])
        tree = TREE.grow(head, head.root_at(features, at), features.tokens[at])
        number = sum(p >= border for border in features.packing.borders[1:])
        ids, images = documents[number]
        edges, before = torch.zeros(tree.tokens.shape), ids[: int(features.positions[p])]
        for node in range(1, tree.size):
            path = tree.tokens[0, tree.ancestors[0, node].nonzero().flatten()].tolist()
            edges[0, node] = own(target, before + path, images)[0][-2].log_softmax(-1)[path[-1]]
        rewards.append(gto.reward(tree, edges, "node_sum").item())
    assert gto.figures(sums["gto"])["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_from_paths_behind_images(name):
    """Trees of nearly the whole vocabulary hold what a random target chooses."""
    target = tiny_vision("llava")
    head = HEADS[name](target)
    loss, sums = gto.Gto(spec(groups=4, group_size=3, tree="dynamic:50x2x60"), other_head(head), set())(
        head, scored("llava", target, head)[0]
    )
    told, gradients = gto.figures(sums["gto"]), torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
    assert told["accepted"] > 0 and torch.isfinite(loss) and any(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_equal_to_its_start_has_no_gradient(name):
    target = tiny_vision("llava")
    head = HEADS[name](target)
    loss, sums = gto.Gto(SETTINGS, head, set())(head, scored("llava", target, head)[0])
    told = gto.figures(sums["gto"])
    assert told["groups"] == told["skipped"] == 2 and told["reward"] == told["frozen_reward"] > 0 and loss.item() == 0
