"""EAGLE-3: training-time test equals drafting, attention equals its dense form, features equal hidden states."""

import pytest
import torch
import torch.nn.functional as F

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features
from draftsmith.models.heads import attention as ttt
from draftsmith.models.heads import vocabulary
from tests.conftest import tiny_head, tiny_target


def features_of(target, head, length=14, batch=3, seed=0, first=4):
    """Random rows; tokens from `first` on were written by the target."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, target.vocab_size, (batch, length), generator=g)
    lengths = torch.tensor([length - 2 * b for b in range(batch)])
    mask = torch.arange(length).expand(batch, -1) >= first
    return target.features(tokens, lengths, mask, head.feature_spec)


def cut(features, row, count):
    return Features(features.tokens[row:row + 1, :count], features.hidden[row:row + 1, :count], torch.tensor([count]))


def test_training_step_k_row_t_equals_sequential_drafting(target, head):
    features, length = features_of(target, head), 14
    compared = 0
    for k, (rows, logits) in enumerate(head.unroll(features, 4)):
        for row, got in zip(rows.tolist(), logits):
            b, t = divmod(row, length)
            beam = head.roots(head.prefill(cut(features, b, t + 1)))
            for step in range(k + 1):
                token = features.tokens[b, t + 1 + step].view(1, 1)
                want, beam = head.expand(beam, token, torch.zeros(1, 1, dtype=torch.long))
            torch.testing.assert_close(got.log_softmax(-1), want[0, 0], atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared == sum(range(6, 10)) + sum(range(4, 8)) + sum(range(2, 6))  # answers of 10, 8 and 6 tokens


def test_drafting_in_a_ragged_batch_equals_one_by_one(target, head):
    features = features_of(target, head)
    context = head.prefill(Features(features.tokens, features.hidden, features.lengths))
    root = torch.tensor([[5], [6], [7]])
    zero = torch.zeros(3, 1, dtype=torch.long)
    first, beam = head.expand(head.roots(context), root, zero)
    second, beam = head.expand(beam, torch.tensor([[1, 2], [3, 4], [8, 9]]), zero.expand(-1, 2))
    third, _ = head.expand(beam, torch.tensor([[11, 12], [13, 14], [15, 16]]), torch.tensor([[1, 0], [0, 0], [1, 1]]))
    for b, n in enumerate(features.lengths.tolist()):
        alone = head.roots(head.prefill(cut(features, b, n)))
        a, alone = head.expand(alone, root[b:b + 1], zero[:1])
        c, alone = head.expand(alone, torch.tensor([[1, 2], [3, 4], [8, 9]])[b:b + 1], zero[:1].expand(-1, 2))
        d, _ = head.expand(alone, torch.tensor([[11, 12], [13, 14], [15, 16]])[b:b + 1], torch.tensor([[1, 0], [0, 0], [1, 1]])[b:b + 1])
        for batched, single in ((first, a), (second, c), (third, d)):
            torch.testing.assert_close(batched[b], single[0], atol=1e-5, rtol=1e-5)


def test_context_after_a_round_equals_prefill_on_the_committed_tokens(target, head):
    features = features_of(target, head, length=12, batch=1)
    grown = head.prefill(cut(features, 0, 5))
    zero = torch.zeros(1, 1, dtype=torch.long)
    for start, stop in ((5, 8), (8, 9), (9, 12)):
        _, beam = head.expand(head.roots(grown), features.tokens[:, start].view(1, 1), zero)
        head.expand(beam, torch.tensor([[3, 4]]), zero.expand(-1, 2))  # speculative rows that must leave no trace
        head.extend(grown, Features(features.tokens[:, start:stop], features.hidden[:, start:stop], torch.tensor([stop - start])))
    fresh = head.prefill(cut(features, 0, 12))
    root = torch.tensor([[2]])
    torch.testing.assert_close(head.expand(head.roots(grown), root, zero)[0], head.expand(head.roots(fresh), root, zero)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown.cache.store[..., :12, :], fresh.cache.store[..., :12, :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["flash", "blocks"])
def test_step_attention_equals_dense_masked_attention_with_its_gradients(kernel):
    torch.manual_seed(0)
    batch, heads, length, dim, steps, scale = 2, 2, 11, 8, 3, 0.3
    rows = torch.tensor([1, 2, 5, 8, 11, 14, 21])
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, key0, value0 = make(len(rows), heads, dim), make(batch, heads, length, dim), make(batch, heads, length, dim)
    keys, values = [make(len(rows), heads, dim) for _ in range(steps)], [make(len(rows), heads, dim) for _ in range(steps)]
    leaves = [query, key0, value0, *keys, *values]

    def dense():
        out = []
        for p, row in enumerate(rows.tolist()):
            b, t = divmod(row, length)
            k = torch.cat([key0[b, :, :t + 1], *[x[p][:, None] for x in keys]], 1)
            v = torch.cat([value0[b, :, :t + 1], *[x[p][:, None] for x in values]], 1)
            out.append(((query[p][:, None] * k).sum(-1) * scale).softmax(-1)[..., None].mul(v).sum(1))
        return torch.stack(out)

    run = {"flash": ttt._FlashStep.apply, "blocks": lambda q, k0, v0, r, s, *d: ttt._block_step(q, k0, v0, r, s, d[:steps], d[steps:], block=3)}
    got, want, weight = run[kernel](query, key0, value0, rows, scale, *keys, *values), dense(), torch.randn(len(rows), heads, dim).double()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_gradient_flows_through_all_steps():
    """The gradient of the last step's output agrees with a finite difference in fp64, so nothing is detached between steps."""
    target = tiny_target()
    target.model.double()
    head = tiny_head(target).double()
    features = features_of(target, head)

    def last(weight_shift):
        with torch.no_grad():
            head.fc.weight += weight_shift
        value = list(head.unroll(features, 3))[-1][1].square().sum()
        with torch.no_grad():
            head.fc.weight -= weight_shift
        return value

    direction = torch.randn(head.fc.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    gradient = torch.autograd.grad(last(torch.zeros_like(direction)), head.fc.weight)[0]
    difference = (last(direction) - last(-direction)).item() / 2
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-5)


def test_taps_equal_hidden_states_and_their_hooks(target):
    tokens = torch.randint(0, target.vocab_size, (2, 9))
    from draftsmith.models.features import FeatureSpec

    n = target.layers
    spec = FeatureSpec(taps=(2, n // 2, n - 3, 0, "last"))
    outputs = {}
    handles = [target.body.layers[i].register_forward_hook(lambda m, a, o, i=i: outputs.update({i: o})) for i in (1, n // 2 - 1, n - 4)]
    got = target.features(tokens, torch.tensor([9, 9]), torch.ones(2, 9, dtype=torch.bool), spec).hidden
    for handle in handles:
        handle.remove()
    hidden = target.model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, torch.cat([hidden[2], hidden[n // 2], hidden[n - 3], hidden[0], hidden[-1]], -1))
    torch.testing.assert_close(got[..., :96], torch.cat([outputs[1], outputs[n // 2 - 1], outputs[n - 4]], -1))


def test_loss_equals_the_plain_formula(target, head):
    features = features_of(target, head)
    loss, metrics = head.loss(features, steps=3, decay=0.8)
    teacher = target.model(features.tokens).logits.float()
    want = 0.0
    for k, (rows, logits) in enumerate(head.unroll(features, 3)):
        losses = []
        for row, z in zip(rows.tolist(), logits):
            b, t = divmod(row, features.tokens.size(1))
            full = teacher[b, t + 1 + k]
            if full.argmax() in head.ids:
                losses.append(-(full[head.ids].softmax(-1) * z.log_softmax(-1)).sum())
        want = want + 0.8**k * torch.stack(losses).mean()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    right = {}
    for k, (rows, logits) in enumerate(head.unroll(features, 3)):
        for row, z in zip(rows.tolist(), logits):
            b, t = divmod(row, features.tokens.size(1))
            right.setdefault(row, []).append(bool(head.ids[z.argmax()] == teacher[b, t + 1 + k].argmax()))
    for k in range(3):
        before = [r for r in right.values() if len(r) > k and all(r[:k])]
        hits = sum(r[k] for r in before)
        assert metrics["accuracy"][k].item() == pytest.approx(hits / len(right))
        assert metrics["conditional"][k].item() == pytest.approx(hits / max(1, len(before)))


@pytest.mark.parametrize("kernel", ["flash", "blocks"])
def test_loss_without_supervised_rows_is_zero_with_gradients(target, head, kernel, monkeypatch):
    if kernel == "blocks":
        monkeypatch.setattr("draftsmith.models.heads.eagle3.step_attention", lambda q, k0, v0, r, k, v, s: ttt._block_step(q, k0, v0, r, s, k, v))
    features = features_of(target, head, first=14)
    loss, _ = head.loss(features, steps=2)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in head.parameters())


def test_draft_vocabulary_round_trip_and_ties():
    counts = torch.tensor([5, 0, 7, 7, 1, 0, 5])
    ids = vocabulary.most_frequent(counts, 4, required=[5])
    assert ids.tolist() == [0, 2, 3, 5]
    stored = vocabulary.to_offsets(ids, 7)
    assert stored["d2t"].tolist() == [0, 1, 1, 2] and stored["t2d"].tolist() == [True, False, True, True, False, True, False]
    assert torch.equal(vocabulary.from_offsets(**stored, vocab_size=7), ids)
    whole = vocabulary.to_offsets(torch.arange(7), 7)
    assert whole["d2t"].eq(0).all() and whole["t2d"].all()
    with pytest.raises(UserError, match="repeated"):
        vocabulary.from_offsets(torch.tensor([1, 0]), None, 7)
    with pytest.raises(UserError, match="expected 0..6"):
        vocabulary.from_offsets(torch.arange(5), None, 7)
    with pytest.raises(UserError, match="t2d"):
        vocabulary.from_offsets(stored["d2t"], ~stored["t2d"], 7)


def test_full_draft_vocabulary_needs_no_map(target):
    head = tiny_head(target)
    assert torch.equal(head.ids, torch.arange(target.vocab_size))
    loss, _ = head.loss(features_of(target, head), steps=2)
    assert torch.isfinite(loss)


def test_rope_and_head_dim_come_from_the_target():
    target = tiny_target(head_dim=16, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    head = tiny_head(target)
    assert head.config.head_dim == 16 and head.config.rope_parameters == target.config.rope_parameters
    assert torch.equal(head._rope[0], target.body.rotary_emb.inv_freq)
    cos, sin = target.body.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    mine = head._angles(torch.arange(9))
    torch.testing.assert_close(mine[0][:, 0], cos[0, :, :8])
    torch.testing.assert_close(mine[1][:, 0], sin[0, :, :8])
    with pytest.raises(UserError, match="rope_type: found 'dynamic'"):
        tiny_head(tiny_target(rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}))
    loss = F.softplus(head.loss(features_of(target, head), steps=2)[0])
    assert torch.isfinite(loss)
