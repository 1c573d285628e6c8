"""EAGLE-1 and HASS: training equals drafting and the published form of it, losses equal their formulas, decoding is
lossless.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.predict import predicted_chain_tau
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, Shared
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import EagleConfig, EagleHead, EagleObjective
from draftsmith.models.heads.distill import chain_walk
from draftsmith.models.heads.eagle import noisy
from draftsmith.models.heads.frozen import Weights, teacher_losses
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT, pack
from tests.models.heads.documents import LENGTHS, cut, documents, packed, place

EAGLE = EagleObjective(steps=1, ce_weight=0.1, topk_weight=0.0, topk=10, noise=0.0)
HASS = EagleObjective(steps=3, ce_weight=0.1, topk_weight=1.0, topk=10, noise=0.0)
ZERO = torch.zeros(1, 1, dtype=torch.long)


def eagle_head(target, seed=1, **shape) -> EagleHead:
    torch.manual_seed(seed)
    head = EagleHead(EagleConfig.for_target(target.config, **shape), target.shared)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return head.eval()


@pytest.fixture
def head(target):
    return eagle_head(target)


@pytest.fixture
def exact(target):
    """Both in fp64: the random head's features are large, and rounding with them."""
    target.model.double()
    return target, eagle_head(target).double()


def features_of(target, lengths=LENGTHS) -> Features:
    """The documents as right-padded rows, as decoding has them; the feature is the state after the final norm."""
    rows, width = documents(target, lengths), max(lengths)
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    hidden = torch.zeros(len(rows), width, target.config.hidden_size).type_as(target.embedding)
    for b, row in enumerate(rows):
        hidden[b, : len(row)] = target.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0]
    return Features(tokens, hidden, torch.tensor(lengths))


def test_training_step_k_row_t_equals_sequential_drafting(exact):
    target, head = exact
    training, decoding, compared = packed(target, head), features_of(target), 0
    for k, (rows, output) in enumerate(head.unroll(training, 3)):
        for row, got in zip(rows.tolist(), output):
            b, t = place(training, row)
            beam = head.roots(head.prefill(cut(decoding, b, t + 1)))
            for step in range(k + 1):
                want, beam = head.expand(beam, decoding.tokens[b, t + 1 + step].view(1, 1), ZERO)
            torch.testing.assert_close(beam.hidden[0, 0], got, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(target.project(got).float().log_softmax(-1), want[0, 0])
            compared += 1
    assert compared == sum(range(7, 10)) + sum(range(5, 8)) + sum(range(3, 6))  # answers of 10, 8 and 6 tokens


def hass_as_published(head, tokens, feature, forwards):
    """One document in the paper's alignment: rows stay, predicted features move right; forward F attends over F sets of
    keys with the published mask: set 0 at columns c <= r - (F - 1), set i at c = r - (F - 1 - i). [-> outputs a_F [L -
    1, h], graphs of their own, features detached.]
    """
    length, attention = len(tokens) - 1, head.layer.self_attn
    sets, outputs, r, cos_sin = [feature[:length]], [], torch.arange(length), head.angles(torch.arange(length))
    for forward in range(1, forwards + 1):
        entered = [head.fc(torch.cat([F.embedding(tokens[1:], head.shared.embedding), q], -1)) for q in sets]
        pairs = [attention.key_value(x, *cos_sin) for x in entered]
        keys, values = (torch.cat([attention.repeat(pair[j], 1) for pair in pairs]) for j in range(2))
        seen = [r[None] <= r[:, None] - (forward - 1)] + [
            r[None] == r[:, None] - (forward - 1 - i) for i in range(1, forward)
        ]
        scores = torch.einsum("qhd,khd->hqk", attention.query(entered[-1], *cos_sin), keys) * attention.scale
        share = scores.masked_fill(~torch.cat(seen, 1), float("-inf")).softmax(-1)
        outputs.append(head.layer.finish(entered[-1], torch.einsum("hqk,khd->qhd", share, values)))
        sets.append(torch.cat([sets[-1][:1], outputs[-1][:-1]]).detach())
    return outputs


def test_harmonised_context_is_the_published_one_in_values_and_gradients(exact):
    """Step k of row t is forward k + 1 at row t + k, and gradients are those of one backward a forward, features
    detached between.
    """
    (target, head), tokens = exact, documents(exact[0], (12,))[0]
    features = pack(target, head, [tokens], [3])
    names = [n for n, _ in head.named_parameters()]
    ours, theirs = head.unroll(features, 3), hass_as_published(head, torch.tensor(tokens), features.hidden, 3)
    total, want = 0.0, [0.0] * len(names)
    for k in range(3):
        rows, output = ours[k]
        torch.testing.assert_close(output, theirs[k][rows + k], atol=1e-12, rtol=1e-12)
        weight = torch.randn(len(rows), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        total = total + (output * weight).sum()
        alone = torch.autograd.grad((theirs[k][rows + k] * weight).sum(), list(head.parameters()), retain_graph=True)
        want = [a + b for a, b in zip(want, alone)]
    for name, got, expected in zip(names, torch.autograd.grad(total, list(head.parameters())), want):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_documents_equal_documents_alone(target, head):
    rows, starts = documents(target), [4, 0, 7]
    together = pack(target, head, rows, starts)
    loss, sums = head.loss(together, HASS)
    want = torch.autograd.grad(loss, list(head.parameters()))
    parts = [
        head.loss(pack(target, head, [row], [start]), HASS, together.packing.counts(3))
        for row, start in zip(rows, starts)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    for name, value in sums.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), value, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(torch.autograd.grad(sum(p[0] for p in parts), list(head.parameters())), want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def plain_loss(target, head, features, objective):
    """The formulas of both papers row by row -> (loss, per-step sums, right steps by row)."""
    total, sums, right = 0.0, [], {}
    texts = documents(target)
    final = [target.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0] for row in texts]
    for k, (rows, output) in enumerate(head.unroll(features, objective.steps)):
        losses = []
        for row, a in zip(rows.tolist(), output):
            b, t = place(features, row)
            feature = final[b][t + 1 + k]
            q, logp = target.project(feature).softmax(-1), target.project(a).log_softmax(-1)
            difference = (a - feature).abs()
            smooth = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
            top = q.topk(min(objective.topk, len(q))).indices
            losses.append(
                smooth - objective.ce_weight * (q * logp).sum() - objective.topk_weight * (q[top] * logp[top]).sum()
            )
            right.setdefault(row, []).append(bool(logp.argmax() == q.argmax()))
        total = total + torch.stack(losses).mean()
        sums.append(sum(losses).item())
    return total, sums, right


@pytest.mark.parametrize(
    "objective", [EAGLE, HASS, replace(HASS, topk=99)], ids=["eagle", "hass", "topk beyond the vocabulary"]
)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradients_equal_the_plain_formulas(exact, objective, softcap):
    target, head = exact
    target.softcap, features = softcap, packed(target, head)
    for parameter in head.parameters():  # smaller outputs, which the cap does not saturate
        parameter.data *= 0.4
    (loss, sums), (want, steps, right) = head.loss(features, objective), plain_loss(target, head, features, objective)
    torch.testing.assert_close(loss, want)
    assert sums["loss"].tolist() == pytest.approx(steps, rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, list(head.parameters())), torch.autograd.grad(want, list(head.parameters()))
    ):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    leading = [0] * len(features.tokens)
    for k in range(objective.steps):
        reached = [r for r in right.values() if len(r) > k]
        before = [r for r in reached if all(r[:k])]
        want = [len(reached), sum(r[k] for r in reached), len(before), sum(r[k] for r in before)]
        assert [sums[name][k].item() for name in ("rows", "right", "tried", "kept")] == want
    for row, r in right.items():
        leading[row] = next((i for i, hit in enumerate(r) if not hit), len(r))
    assert tuple(sums["walk"].tolist()) == chain_walk(features.packing, leading)


def test_a_head_that_knows_the_features_has_the_targets_entropy_and_nothing_to_learn(target, head):
    """Chunks are cut so that borders fall between rows of different steps: 200 tokens, 64 a chunk."""
    features = pack(target, head, documents(target, (201,)), [0])
    final, count = features.teacher.final, len(features.teacher.final)
    states = torch.stack([final.roll(-k, 0) for k in range(3)]).requires_grad_()
    q = target.project(final).softmax(-1)
    for weights in (Weights(1.0, 0.0, 10), Weights(0.1, 1.0, 10)):
        losses, rank, _ = teacher_losses(states, features.teacher, target.project, 2**20, weights)
        right = rank == 0
        top = q.topk(10).values
        entropy = -weights.ce * (q * q.log()).sum(-1) - weights.top * (top * top.log()).sum(-1)
        for k in range(3):
            torch.testing.assert_close(losses[k, : count - k], entropy[k:], atol=1e-5, rtol=1e-5)
            assert right[k, : count - k].all() and not right[k, count - k :].any() and not losses[k, count - k :].any()
    assert (
        teacher_losses(states, features.teacher, target.project, 2**20, Weights(1.0, 0.0, 10, kl=True))[0].abs().max()
        < 1e-5
    )  # KL of equal laws
    # Only the full cross-entropy is proper: the part over the top k, not renormalised, still pulls the head towards
    # those tokens.
    for weights, still in ((Weights(1.0, 0.0, 10), True), (Weights(0.0, 1.0, 10), False)):
        gradient = torch.autograd.grad(
            teacher_losses(states, features.teacher, target.project, 61, weights)[0].sum(), states
        )[0]
        assert (gradient.abs().max() < 1e-5) == still


def test_eagle_is_hass_with_one_forward_and_no_top_tokens(target, head):
    features = packed(target, head)
    one, more = head.loss(features, EAGLE), head.loss(features, replace(HASS, topk_weight=0.0))
    torch.testing.assert_close(one[1]["loss"], more[1]["loss"][:1])
    assert one[0].item() == head.loss(features, replace(EAGLE, topk=3))[0].item()
    torch.testing.assert_close(more[0], (more[1]["loss"] / more[1]["rows"]).sum())  # forwards weigh the same


def test_noise_is_keyed_as_wide_as_the_document_is_short_and_not_in_the_targets(target, head):
    features = replace(pack(target, head, documents(target, (16, 64)), [2, 2]), seed=5)
    noise = noisy(features, 0.2).hidden - features.hidden
    for part, bound in ((noise[:16], 0.1 * 512 / 16), (noise[16:], 0.1 * 512 / 64)):
        assert part.abs().max() <= bound * 1.0001 and part.abs().max() > 0.9 * bound and abs(part.mean()) < 0.2 * bound
    assert torch.equal(noisy(features, 0.2).hidden, noisy(features, 0.2).hidden) and noisy(features, 0.0) is features
    assert not torch.equal(noisy(features, 0.2).hidden, noisy(replace(features, seed=6), 0.2).hidden)
    assert torch.equal(noisy(features, 0.2).teacher.final, features.teacher.final)


def test_loss_without_supervised_rows_is_zero_with_gradients(target, head):
    loss, sums = head.loss(packed(target, head, first=14), HASS)
    loss.backward()
    assert (
        loss.item() == 0 and all(p.grad is not None for p in head.parameters()) and sums["rows"].tolist() == [0, 0, 0]
    )


def test_decoding_with_it_is_plain_greedy_decoding_as_long_as_predicted(target, head):
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
    plain = generate(target, NoDrafter(), prompts, Sampling(), 40)
    features = pack(target, head, [p + t.tokens for p, t in zip(prompts, plain)], [0] * 4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(45):
        optimizer.zero_grad()
        head.loss(features, HASS)[0].backward()
        optimizer.step()
    drafted = generate(target, HeadDrafter(head, parse_tree("dynamic:4x3x10")), prompts, Sampling(), 40)
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]
    assert (
        sum(sum(t.accepted) for t in drafted) > 20
    )  # it was right now and then, so that walks of several lengths occurred
    chain = generate(target, HeadDrafter(head, parse_tree("chain:3")), prompts, Sampling(), 40)
    measured = sum(sum(t.emitted) for t in chain) / sum(len(t.emitted) for t in chain)
    assert predicted_chain_tau(target, head, prompts, plain, 3) == pytest.approx(measured)


def test_recipes_hold_the_papers_values():
    read = lambda name: read_recipe(ROOT / "recipes" / f"{name}.yaml", DrafterRecipe)  # noqa: E731
    for name in ("eagle-code", "eagle-llama3.1-8b"):
        assert read(name).goal == replace(EAGLE, noise=0.2) and read(name).kind is EagleHead
    for name in ("hass-code", "hass-llama3.1-8b"):
        assert read(name).goal == replace(HASS, noise=0.2)
    paper = read("hass-llama3.1-8b").optimization
    assert (paper.name, paper.lr, paper.schedule, paper.clip) == ("adamw", 0.00003, "linear", 0.5)
    for override, message in (
        ("objective.decay=0.8", "objective.decay: unknown key"),
        ("objective.steps=0", "objective.steps: found 0"),
        ("head.draft_vocab_size=9", "head.draft_vocab_size: unknown key"),
        ("head.bias=1", "head.bias: found 1"),
    ):
        with pytest.raises(UserError, match=message):
            read_recipe(ROOT / "recipes" / "hass-code.yaml", DrafterRecipe, [override])


def test_the_head_of_an_8b_target_has_the_papers_size():
    """0.25 B parameters for Llama-3 8B: fc, attention with 8 key/value heads, MLP, one norm."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        head = EagleHead(EagleConfig.for_target(config, bias=False), Shared(torch.empty(128256, 4096)))
    assert (
        sum(p.numel() for p in head.parameters())
        == 2 * 4096**2 + 2 * (4096 + 1024) * 4096 + 3 * 14336 * 4096 + 4096
        == 251_662_336
    )
