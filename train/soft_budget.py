"""The soft-budget tree loss: a drafter learns to rank the nodes that the target would accept into its tree.

At some roots of a packed row the tree policy's candidates v (all nodes that the beam search meets) have draft scores
s_v, cumulative log-probabilities, with gradient; the target gives P_v, the product of its probabilities along the path
to v, without. A tree of B drafted nodes holds the B largest s. With the threshold tau between the B-th and the next
(half way; no gradient) and u_v = sigmoid((s_v - tau) / theta),

    loss = - 1/B sum over the 2 B best candidates of (P_v - b) u_v,   b = sum u (1 - u) P / sum u (1 - u).

The baseline b (no gradient) takes out what all scores have in common, so that only their order is learned: the
gradients of a root's scores add up to 0, and there is none where all P are equal. For theta to 0 and b = 0 it is minus
1/B times the expected accepted length of the tree that decoding would verify, since lossless sampling accepts each node
with its P. Any head takes part through `root_at` and `expand` alone.
"""

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import TrainingFeatures
from draftsmith.models.grow import Candidates, DynamicTree, parse_tree
from draftsmith.models.tree import DraftTree
from draftsmith.train.gto import draw_groups, nothing, windows

SUMS = ("roots", "loss", "accepted")


def best_candidates(found: Candidates, root: torch.Tensor, count: int) -> tuple[torch.Tensor, DraftTree]:
    """The `count` best candidates of P trees: scores [P, n] with gradient, best first, and the tree of those (root [P]
    in front), whose node 1 + i is the i-th. Parents are never behind their children: scores fall along a path, and ties
    go to the earlier.
    """
    order = torch.sort(found.scores, dim=1, descending=True, stable=True).indices[:, :count]
    place = torch.zeros(len(root), found.scores.size(1) + 1, dtype=torch.int64, device=root.device)
    place.scatter_(1, order + 1, torch.arange(1, order.size(1) + 1, device=root.device).expand(len(root), -1))
    parents = place.gather(1, found.parents.gather(1, order))
    tokens = torch.cat([root[:, None], found.tokens.gather(1, order)], 1)
    none = torch.full_like(root[:, None], -1)
    return found.scores.gather(1, order), DraftTree.of(tokens, torch.cat([none, parents], 1))


def reach(tree: DraftTree, edges: torch.Tensor) -> torch.Tensor:
    """edges [P, N], the target's log-probabilities of the nodes behind their parents -> P [P, N - 1] of all but the
    root: the products along the paths.
    """
    return torch.where(tree.ancestors, edges[:, None], 0.0).sum(-1).exp()[:, 1:]


def soft_budget_loss(scores: torch.Tensor, probs: torch.Tensor, budget: int, theta: float, baseline: bool = True):
    """scores [P, n] of candidates, best first, with gradient; probs [P, n]: their P -> loss [P]. Of at most `budget`
    candidates all are in the tree, and there is nothing to learn.
    """
    if scores.size(1) <= budget:
        return (scores * 0.0).sum(1) - probs.sum(1) / budget * (not baseline)
    threshold = scores[:, budget - 1 : budget + 1].detach().mean(1, keepdim=True)
    inside = ((scores - threshold) / theta).sigmoid()
    if baseline:
        weight = (inside * (1 - inside)).detach()
        probs = probs - (weight * probs).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    return -(probs * inside).sum(1) / budget


class SoftBudget:
    """spec: a recipe's `soft_budget` section (`train.recipe.SoftBudget`); stops: the target's stop ids. Features must
    come with `score` (`FeatureSpec.trees`). Raises UserError for a tree that is not dynamic.
    """

    name = "soft_budget"

    def __init__(self, spec, stops: set[int]):
        self.spec, self.stops, self.policy = spec, stops, parse_tree(spec.tree)
        if not isinstance(self.policy, DynamicTree):
            raise UserError(f"soft_budget.tree: found {spec.tree}, expected dynamic:TOP_KxDEPTHxSIZE")

    def __call__(self, head, features: TrainingFeatures) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One packed row -> (omega times the mean over its roots, {"soft_budget": sums over them, in the order of
        `SUMS`}). accepted: the expected length of the tree of decoding.
        """
        spec, device, budget = self.spec, features.tokens.device, self.policy.size - 1
        starts = windows(features.packing, features.tokens, 1, self.stops)
        at = draw_groups(starts, spec.roots, 1, torch.Generator().manual_seed(features.seed)).flatten()
        if len(at) == 0:
            return nothing(head), {self.name: torch.zeros(len(SUMS), device=device)}
        root = features.tokens[at.to(device)]
        found = self.policy.candidates(head, head.root_at(features, at), root)
        scores, tree = best_candidates(found, root, 2 * budget)
        probs = reach(tree, features.score(tree, at.to(device))[0]).to(scores.dtype)
        loss = soft_budget_loss(scores, probs, budget, spec.theta)
        sums = len(at), loss.sum().detach(), probs[:, :budget].sum()
        return spec.omega * loss.mean(), {
            self.name: torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in sums])
        }


def figures(sums: torch.Tensor) -> dict[str, float]:
    """What a run tells of it, from summed `SUMS`: means over roots."""
    roots, loss, accepted = sums.tolist()
    return {"roots": roots, "loss": loss / max(roots, 1.0), "accepted": accepted / max(roots, 1.0)}
