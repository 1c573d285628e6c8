"""Group Tree Optimization: rewards are expectations, rooted trees are decoding's trees, one start has no gradient, and
clipping blocks the right side.
"""

from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.verifier import MATCH
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.features import Features, Packing
from draftsmith.models.grow import DynamicTree
from draftsmith.models.tree import DraftTree
from draftsmith.train import gto
from tests.conftest import pack, tiny_target, trained_head
from tests.laws import Bulk
from tests.models.heads.documents import cut, documents, features_of, packed, place

SPEC = SimpleNamespace(
    groups=3,
    group_size=2,
    tree="dynamic:3x3x9",
    reward_agg="lse",
    reward_mode="prob",
    debias=True,
    clip=0.2,
    delta=1e-4,
    min_spread=1e-6,
    omega=0.5,
    baseline="group",
)


def spec(**changes):
    return SimpleNamespace(**{**vars(SPEC), **changes})


def one_by_one(target, features):
    """`TrainingFeatures.score` of a target asked for every node by itself: the text of its document up to the root,
    then its ancestors.
    """

    @torch.no_grad()
    def score(tree, at):
        edges, best = torch.zeros(tree.tokens.shape), torch.zeros_like(tree.tokens)
        for p, root in enumerate(at.tolist()):
            start = root - int(features.packing.positions[root])
            for node in tree.real[p].nonzero().flatten().tolist():
                path = tree.ancestors[p, node].nonzero().flatten().tolist()
                text = features.tokens[start:root].tolist() + tree.tokens[p, path].tolist()
                logits = target.model(torch.tensor([text])).logits[0].float()
                best[p, node] = logits[-1].argmax()
                if node:
                    edges[p, node] = logits[-2].log_softmax(-1)[text[-1]]
        return edges, best

    return score


def scored(target, head, rows, starts):
    """`pack` with trees to be scored."""
    return pack(target, SimpleNamespace(feature_spec=replace(head.feature_spec, trees=True)), rows, starts)


def other_head(head, seed=5):
    """A head of the same shapes and vocabulary, a little different."""
    other = type(head)(head.config, head.shared, head.ids)
    other.load_state_dict(head.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return other


def random_trees(count, size, vocab, generator):
    """Trees of random shape; siblings are distinct tokens."""
    tokens, parents = torch.zeros(count, size, dtype=torch.int64), torch.full((count, size), -1)
    for p in range(count):
        for node in range(1, size):
            room = [o for o in range(node) if (parents[p] == o).sum() < vocab]
            parents[p, node] = room[int(torch.randint(len(room), (1,), generator=generator))]
            left = sorted(
                set(range(vocab)) - {int(tokens[p, o]) for o in range(1, node) if parents[p, o] == parents[p, node]}
            )
            tokens[p, node] = left[int(torch.randint(len(left), (1,), generator=generator))]
    return DraftTree.of(tokens, parents)


def test_hung_trees_are_those_of_decoding_on_the_text_up_to_there(target, head):
    """Same nodes, scores and order at every position of three packed documents, first and last ones included (methods:
    test 5).
    """
    training, decoding, policy = packed(target, head, first=1), features_of(target, head), DynamicTree(3, 4, 12)
    at = torch.tensor([p for p in range(len(training.tokens)) if training.packing.positions[p] > 0])
    with torch.no_grad():
        found = policy.candidates(head, head.root_at(training, at), training.tokens[at])
        trees = policy.grow(head, head.root_at(training, at), training.tokens[at])
        for i, p in enumerate(at.tolist()):
            b, t = place(training, p)
            context = head.prefill(cut(decoding, b, t))
            want = policy.grow(head, head.roots(context), training.tokens[p : p + 1])
            scores = policy.candidates(
                head, head.roots(head.prefill(cut(decoding, b, t))), training.tokens[p : p + 1]
            ).scores
            assert torch.equal(trees.tokens[i], want.tokens[0]) and torch.equal(trees.parents[i], want.parents[0]), (
                b,
                t,
            )
            torch.testing.assert_close(found.scores[i], scores[0], atol=1e-5, rtol=1e-5)


def test_chain_log_probs_are_those_of_decoding_and_of_a_finite_difference(target, head):
    """log M(S) from `root_at` against a decode loop (methods: test 4); its gradient in fp64 against a finite
    difference.
    """
    training, decoding = packed(target, head), features_of(target, head)
    at, lengths = torch.tensor([5, 6, 17, 33]), torch.tensor([3, 1, 2, 0])
    path = head.ids[torch.randint(len(head.ids), (4, 3), generator=torch.Generator().manual_seed(0))]
    got, zero = gto.chain_log_prob(head, training, at, path, lengths), torch.zeros(1, 1, dtype=torch.long)
    for i, p in enumerate(at.tolist()):
        (b, t), total = place(training, p), 0.0
        beam, tokens = head.roots(head.prefill(cut(decoding, b, t))), [int(training.tokens[p]), *path[i].tolist()]
        for step in range(int(lengths[i])):
            logp, beam = head.expand(beam, torch.tensor([[tokens[step]]]), zero)
            total += logp[0, 0, head.ids.tolist().index(tokens[step + 1])].item()
        assert got[i].item() == pytest.approx(total, abs=1e-5)
    target.model.double()
    head.double()
    exact = packed(target, head)
    for name in ("fc.weight", "midlayer.self_attn.k_proj.weight", "lm_head.weight"):
        weight = head.get_parameter(name)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradient = torch.autograd.grad(gto.chain_log_prob(head, exact, at, path, lengths).sum(), weight)[0]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-3 * direction
                values.append(gto.chain_log_prob(head, exact, at, path, lengths).double().sum().item())
                weight -= sign * 1e-3 * direction
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-2), name


def test_node_sum_is_what_lossless_sampling_accepts_on_average(target, head):
    """In closed form and simulated (methods: test 2); the leaves' aggregates bound each other."""
    generator = torch.Generator().manual_seed(0)
    tree = random_trees(40, 7, 4, generator)
    logits = torch.randn(40, 7, 4, generator=generator)
    edges = logits.log_softmax(-1)[torch.arange(40)[:, None], tree.parents.clamp(min=0), tree.tokens]
    exact = gto.reward(tree, edges, "node_sum")
    torch.testing.assert_close(exact.double(), MATCH.law(tree, logits).expected, atol=1e-5, rtol=1e-5)
    many = DraftTree.of(tree.tokens[:1].expand(20000, -1), tree.parents[:1].expand(20000, -1))
    drawn = (MATCH(many, logits[:1].expand(20000, -1, -1), Bulk(20000, generator)).counts - 1).double()
    assert drawn.mean().item() == pytest.approx(exact[0].item(), abs=4 * float(drawn.std()) / 20000**0.5)
    r = {name: gto.reward(tree, edges, name) for name in gto.AGGREGATES}
    leaves = torch.tensor([sum(node not in tree.parents[p].tolist() for node in range(7)) for p in range(40)])
    close = 1e-5
    assert (
        (r["mean"] <= r["lme"] + close).all()
        and (r["lme"] <= r["max"] + close).all()
        and (r["max"] <= r["lse"] + close).all()
    )
    assert (r["lse"] <= r["max"] + leaves.log() + close).all() and (r["max"] <= r["node_sum"] + close).all()


def test_rewards_by_hand():
    """Root with children a (0.5) and b (0.25); under a, c (0.8): L = 0.5 + 0.4 and 0.25. Greedy: the target takes a,
    then something else.
    """
    tree = DraftTree.of(torch.tensor([[9, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]]))
    edges = torch.tensor([[0.0, 0.5, 0.25, 0.8]]).log().masked_fill(torch.tensor([[True, False, False, False]]), 0.0)
    want = {
        "lse": (torch.tensor(0.9).exp() + torch.tensor(0.25).exp()).log(),
        "max": 0.9,
        "mean": 0.575,
        "node_sum": 1.15,
    }
    for name, value in {**want, "lme": want["lse"] - torch.tensor(2.0).log()}.items():
        assert gto.reward(tree, edges, name).item() == pytest.approx(float(value), abs=1e-6), name
    best = torch.tensor([[1, 7, 0, 0]])
    greedy = gto.greedy_edges(tree, best)
    assert [gto.reward(tree, greedy, name).item() for name in ("max", "mean", "node_sum")] == [1.0, 0.5, 1.0]
    nodes, counts = tree.follow(best)
    assert nodes[0, : counts[0]].tolist() == [0, 1]


def test_union_holds_both_trees_once():
    """Random pairs: the union's texts are the set union of both trees' texts, and every node of the second is found
    where it is said to be.
    """
    generator = torch.Generator().manual_seed(1)
    first, second = random_trees(30, 8, 3, generator), random_trees(30, 8, 3, generator)
    both, places = gto.union(first, second)
    text = lambda tree, p, node: tuple(tree.tokens[p, tree.ancestors[p, node].nonzero()[1:, 0]].tolist())  # noqa: E731
    for p in range(30):
        mine, theirs = ([text(tree, p, node) for node in range(8)] for tree in (first, second))
        found = [text(both, p, node) for node in both.real[p].nonzero()[:, 0].tolist()]
        assert len(found) == len(set(found)) and set(found) == set(mine) | set(theirs)
        assert [text(both, p, node) for node in range(8)] == mine and [
            text(both, p, int(node)) for node in places[p]
        ] == theirs
    same, places = gto.union(first, first)
    assert same.size == first.size and torch.equal(places, torch.arange(8).expand(30, -1))  # M = M0 costs one tree


def test_groups_lie_where_decoding_drafts_and_do_not_overlap():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        lengths = torch.randint(1, 12, (4,), generator=generator).tolist()
        packing = Packing((0, *accumulate(lengths)), torch.rand(sum(lengths), generator=generator) < 0.8)
        tokens = torch.randint(6, (sum(lengths),), generator=generator)
        starts = gto.windows(packing, tokens, 3, {0})
        want = [
            p
            for a, b in zip(packing.borders, packing.borders[1:])
            for p in range(a + 1, b - 2)
            if packing.mask[p : p + 3].all() and 0 not in tokens[p : p + 3].tolist()
        ]
        assert starts.tolist() == want
        groups = gto.draw_groups(starts, 2, 3, generator)
        assert (
            set(groups[:, 0].tolist()) <= set(want)
            and len(groups) == min(2, len(groups))
            and (len(groups) > 0) == (len(want) > 0)
        )
        assert len(set(groups.flatten().tolist())) == groups.numel() and groups.flatten().tolist() == sorted(
            groups.flatten().tolist()
        )


def test_advantages_are_standardised_and_flat_groups_left_out():
    gains = torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.001, 0.0, 0.001]])
    advantage, spread = gto.advantages(gains, 0.0, 0.01)
    assert spread[0].item() == pytest.approx(3.5**0.5) and spread[2].item() == pytest.approx(0.0005)
    torch.testing.assert_close(advantage[0], (gains[0] - 3) / 3.5**0.5)
    assert advantage[1:].abs().max() == 0


def test_a_baseline_by_position_compares_a_root_with_its_own_start_alone():
    """Where the gains of a group add up to nothing both baselines are one; else every root of a group that gained
    everywhere is pushed up, which the group's mean forbids.
    """
    gains = torch.tensor([[1.0, -2.0, 3.0, -2.0], [1.0, 2.0, 3.0, 6.0], [0.001, 0.0, 0.001, 0.0]])
    (group, _), (position, spread) = (gto.advantages(gains, 0.0, 0.01, kind) for kind in ("group", "position"))
    torch.testing.assert_close(group[0], position[0])
    assert spread[1].item() == pytest.approx(12.5**0.5) and (group[1] < 0).any() and (position[1] > 0).all()
    torch.testing.assert_close(position[1], gains[1] / 12.5**0.5)
    assert position[2].abs().max() == 0


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [
        (1.0, 1.1, 1.0),
        (1.0, 1.3, 0.0),
        (1.0, 0.5, 1.0),
        (-1.0, 0.9, -1.0),
        (-1.0, 0.7, 0.0),
        (-1.0, 1.5, -1.0),
    ],
)
def test_clipping_stops_the_gradient_on_the_right_side(advantage, ratio, slope):
    """Zero iff A > 0 and s > 1 + eps, or A < 0 and s < 1 - eps (methods: test 6)."""
    s = torch.tensor(ratio, requires_grad=True)
    gto.surrogate(s, torch.tensor(advantage), 0.2).backward()
    assert s.grad.item() == slope


def test_a_drafter_equal_to_its_start_has_no_gradient(target, head):
    """M = M0: R = 0, every group is skipped, every gradient exactly zero; without debiasing s = 1 (methods: test 3)."""
    features = scored(target, head, documents(target), [2, 2, 2])
    loss, sums = gto.Gto(SPEC, head, set())(head, features)
    told = gto.figures(sums["gto"])
    assert (
        told["groups"] == told["skipped"] == 3 and told["reward"] == told["frozen_reward"] > 0 and told["spread"] == 0
    )
    assert loss.item() == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, list(head.parameters())))
    loss, sums = gto.Gto(spec(debias=False), head, set())(head, features)
    told = gto.figures(sums["gto"])
    assert told["skipped"] == 0 and told["clipped"] == 0 and (told["ratio"] == 1 or sums["gto"][6] == 0)


@pytest.mark.parametrize("mode", ["prob", "greedy"])
def test_the_loss_is_the_papers_formula(mode):
    """Rewards, S and ratios of every root by decoding and one-by-one forwards of the target, equations 9 to 13 by hand
    (methods: test 1).
    """
    target = tiny_target()
    head = trained_head(target)
    frozen = other_head(head)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]
    rows = [p + t.tokens for p, t in zip(prompts, generate(target, NoDrafter(), prompts, Sampling(), 12))]
    features = scored(target, head, rows, [3, 8])
    settings = spec(reward_mode=mode, groups=4, group_size=3)
    loss, sums = gto.Gto(settings, frozen, set())(head, features)
    groups = gto.draw_groups(
        gto.windows(features.packing, features.tokens, 3, set()), 4, 3, torch.Generator().manual_seed(0)
    )
    policy, zero, total, kept = DynamicTree(3, 3, 9), torch.zeros(1, 1, dtype=torch.long), 0.0, 0
    states = [target.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]

    def context(drafter, b, t):
        hidden = torch.cat([states[b][k][0, :t] for k in drafter.config.taps], -1)
        return drafter.roots(drafter.prefill(cut_of(rows[b][:t], hidden)))

    for group in groups:
        gains, ratios = [], []
        for p in group.tolist():
            b, t = place(features, p)
            values = []
            for drafter in (head, frozen):
                tree = policy.grow(drafter, context(drafter, b, t), features.tokens[p : p + 1])
                edges, best = one_by_one(target, features)(tree, torch.tensor([p]))
                values.append(gto.reward(tree, edges if mode == "prob" else gto.greedy_edges(tree, best), "lse").item())
                if drafter is head:
                    nodes, counts = tree.follow(best)
                    path = tree.tokens[0, nodes[0, : counts[0]]].tolist()
            logs = []
            for drafter in (head, frozen):
                beam, log = context(drafter, b, t), 0.0
                for token, following in zip(path, path[1:]):
                    logp, beam = drafter.expand(beam, torch.tensor([[token]]), zero)
                    log += logp[0, 0, following].item()
                logs.append(log)
            gains.append(values[0] - values[1])
            ratios.append((logs[0] - logs[1]) / max(len(path) - 1, 1))
        gains = torch.tensor(gains)
        if gains.std(correction=0) >= settings.min_spread:
            advantage = (gains - gains.mean()) / (gains.std(correction=0) + settings.delta)
            s = torch.tensor(ratios).exp()
            total += torch.minimum(s * advantage, s.clamp(0.8, 1.2) * advantage).mean().item() / len(groups)
            kept += 1
    assert kept > 0 and gto.figures(sums["gto"])["skipped"] == len(groups) - kept and sums["gto"][7] > 0
    assert loss.item() == pytest.approx(-0.5 * total, abs=1e-4)
    loss.backward()
    assert head.fc.weight.grad.abs().max() > 0


def cut_of(tokens, hidden):
    return Features(torch.tensor([tokens]), hidden[None], torch.tensor([len(tokens)]))
