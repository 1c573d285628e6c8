"""EAGLE-3: training-time test equals drafting, features equal hidden states, the loss is its formula."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from draftsmith.models.features import Features, FeatureSpec, Packing
from draftsmith.models.heads import Eagle3Objective
from draftsmith.models.heads.distill import chain_walk
from tests.conftest import pack, tiny_head, tiny_target
from tests.models.heads.documents import cut, documents, features_of, packed, place


def test_training_step_k_row_t_equals_sequential_drafting(target, head):
    assert compare_with_drafting(target, head) == sum(range(6, 10)) + sum(range(4, 8)) + sum(range(2, 6))


def compare_with_drafting(target, head) -> int:
    """Every row of four steps of training against a decode loop that drafts the text's own tokens; how many there were
    (answers of 10, 8 and 6 tokens).
    """
    training, decoding, compared = packed(target, head), features_of(target, head), 0
    for k, (rows, output) in enumerate(head.unroll(training, 4)):
        for row, got in zip(rows.tolist(), head.logits(output)):
            b, t = place(training, row)
            beam = head.roots(head.prefill(cut(decoding, b, t + 1)))
            for step in range(k + 1):
                token = decoding.tokens[b, t + 1 + step].view(1, 1)
                want, beam = head.expand(beam, token, torch.zeros(1, 1, dtype=torch.long))
            torch.testing.assert_close(got.float().log_softmax(-1), want[0, 0], atol=1e-5, rtol=1e-5)
            compared += 1
    return compared


def test_packing_counts_the_rounds_that_decoding_can_reach():
    """Brute force over random masks and documents: row t takes part in step k iff x_{t+1} .. x_{t+2+k} are its
    document's and written.
    """
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 9, (3,), generator=g).tolist()
        borders = (0, *accumulate(lengths))
        mask = torch.rand(borders[-1], generator=g) < 0.7
        packing = Packing(borders, mask)
        for k in range(4):
            want = [
                t
                for a, b in zip(borders, borders[1:])
                for t in range(a, b)
                if t + 2 + k < b and mask[t + 1 : t + 3 + k].all()
            ]
            assert packing.rows[packing.takes_part(k)].tolist() == want and packing.counts(4)[k] == len(want)
        assert packing.positions.tolist() == [i for n in lengths for i in range(n)]


def test_packed_documents_equal_documents_alone(target, head):
    """Loss sums and gradients of one packed row are those of its documents one by one."""
    rows = documents(target)
    together = pack(target, head, rows, [4, 0, 7])
    counts = together.packing.counts(3)
    loss, sums = head.loss(together, Eagle3Objective(3, 0.8))
    want = torch.autograd.grad(loss, list(head.parameters()))
    parts = [
        head.loss(pack(target, head, [row], [start]), Eagle3Objective(3, 0.8), counts)
        for row, start in zip(rows, [4, 0, 7])
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    for name, value in sums.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), value)
    for a, b in zip(torch.autograd.grad(sum(p[0] for p in parts), list(head.parameters())), want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_drafting_in_a_ragged_batch_equals_one_by_one(target, head):
    compare_ragged(target, head)


def compare_ragged(target, head) -> None:
    """Three levels of branching trees over requests of 14, 12 and 10 rows, together and one by one."""
    features = features_of(target, head)
    context = head.prefill(features)
    root = torch.tensor([[5], [6], [7]])
    zero = torch.zeros(3, 1, dtype=torch.long)
    first, beam = head.expand(head.roots(context), root, zero)
    second, beam = head.expand(beam, torch.tensor([[1, 2], [3, 4], [8, 9]]), zero.expand(-1, 2))
    third, _ = head.expand(beam, torch.tensor([[11, 12], [13, 14], [15, 16]]), torch.tensor([[1, 0], [0, 0], [1, 1]]))
    for b, n in enumerate(features.lengths.tolist()):
        alone = head.roots(head.prefill(cut(features, b, n)))
        a, alone = head.expand(alone, root[b : b + 1], zero[:1])
        c, alone = head.expand(alone, torch.tensor([[1, 2], [3, 4], [8, 9]])[b : b + 1], zero[:1].expand(-1, 2))
        d, _ = head.expand(
            alone,
            torch.tensor([[11, 12], [13, 14], [15, 16]])[b : b + 1],
            torch.tensor([[1, 0], [0, 0], [1, 1]])[b : b + 1],
        )
        for batched, single in ((first, a), (second, c), (third, d)):
            torch.testing.assert_close(batched[b], single[0], atol=1e-5, rtol=1e-5)


def test_context_after_a_round_equals_prefill_on_the_committed_tokens(target, head):
    features = features_of(target, head, lengths=(12,))
    grown = head.prefill(cut(features, 0, 5))
    zero = torch.zeros(1, 1, dtype=torch.long)
    for start, stop in ((5, 8), (8, 9), (9, 12)):
        _, beam = head.expand(head.roots(grown), features.tokens[:, start].view(1, 1), zero)
        head.expand(beam, torch.tensor([[3, 4]]), zero.expand(-1, 2))  # speculative rows that must leave no trace
        head.extend(
            grown,
            Features(features.tokens[:, start:stop], features.hidden[:, start:stop], torch.tensor([stop - start])),
        )
    fresh = head.prefill(cut(features, 0, 12))
    root = torch.tensor([[2]])
    torch.testing.assert_close(
        head.expand(head.roots(grown), root, zero)[0],
        head.expand(head.roots(fresh), root, zero)[0],
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(grown.cache.store[..., :12, :], fresh.cache.store[..., :12, :], atol=1e-5, rtol=1e-5)


def test_taps_equal_hidden_states_and_their_hooks(target, head):
    target.model.double()  # packed documents run as one padded batch: other sums, other rounding
    rows, n = documents(target), target.layers
    spec = FeatureSpec(taps=(2, n // 2, n - 3, 0, "last"))
    packing = pack(target, head, rows, [0, 0, 0]).packing
    got = target.features(torch.tensor([t for row in rows for t in row]), packing, spec).hidden
    outputs = {}
    handles = [
        target.body.layers[i].register_forward_hook(lambda m, a, o, i=i: outputs.update({i: o}))
        for i in (1, n // 2 - 1, n - 4)
    ]
    for row, start, stop in zip(rows, packing.borders, packing.borders[1:]):
        hidden = target.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(
            got[start:stop], torch.cat([hidden[2], hidden[n // 2], hidden[n - 3], hidden[0], hidden[-1]], -1)[0]
        )
        torch.testing.assert_close(
            got[start:stop, :96], torch.cat([outputs[1], outputs[n // 2 - 1], outputs[n - 4]], -1)[0]
        )
    for handle in handles:
        handle.remove()


def test_loss_equals_the_plain_formula(target, head):
    features = packed(target, head)
    loss, sums = head.loss(features, Eagle3Objective(steps=3, decay=0.8))
    teachers = [target.model(torch.tensor([row])).logits[0].float() for row in documents(target)]
    want, right, leading = 0.0, {}, [0] * len(features.tokens)
    for k, (rows, output) in enumerate(head.unroll(features, 3)):
        losses = []
        for row, z in zip(rows.tolist(), head.logits(output)):
            b, t = place(features, row)
            full = teachers[b][t + 1 + k]
            losses.append(
                -(full[head.ids].softmax(-1) * z.log_softmax(-1)).sum()
                if full.argmax() in head.ids
                else torch.zeros(())
            )
            right.setdefault(row, []).append(bool(head.ids[z.argmax()] == full.argmax()))
        want = want + 0.8**k * torch.stack(losses).mean()
        assert sums["loss"][k].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for k in range(3):
        reached = [r for r in right.values() if len(r) > k]
        before = [r for r in reached if all(r[:k])]
        want = [len(reached), sum(r[k] for r in reached), len(before), sum(r[k] for r in before)]
        assert [sums[name][k].item() for name in ("rows", "right", "tried", "kept")] == want
    for row, r in right.items():
        leading[row] = next((i for i, hit in enumerate(r) if not hit), len(r))
    assert tuple(sums["walk"].tolist()) == chain_walk(features.packing, leading)


def test_chain_walk_visits_roots_only():
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]).bool()
    packing = Packing((0, 8, 12), mask)
    leading = [0, 2, 9, 9, 1, 9, 0, 0, 1, 0, 0, 0]
    # Document 1: roots 2 -> 5 (2 right) -> 6 (1 right, the text ends); document 2: its first token has no row before
    # it: roots 9 -> 11.
    assert chain_walk(packing, leading) == (4 + 2, 2 + 1)


def test_loss_without_supervised_rows_is_zero_with_gradients(target, head):
    loss, sums = head.loss(packed(target, head, first=14), Eagle3Objective(steps=2, decay=0.8))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in head.parameters()) and sums["rows"].tolist() == [0, 0]


def test_full_draft_vocabulary_needs_no_map(target):
    head = tiny_head(target)
    assert torch.equal(head.ids, torch.arange(target.vocab_size))
    loss, _ = head.loss(packed(target, head), Eagle3Objective(steps=2, decay=0.8))
    assert torch.isfinite(loss)


def test_rope_and_head_dim_come_from_the_target():
    target = tiny_target(head_dim=16, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    head = tiny_head(target)
    assert head.config.head_dim == 16 and head.config.rope_parameters == target.config.rope_parameters
    assert torch.equal(head._rope[0], target.body.rotary_emb.inv_freq)
    cos, sin = target.body.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    mine = head.angles(torch.arange(9))
    torch.testing.assert_close(mine[0][:, 0], cos[0])
    torch.testing.assert_close(mine[1][:, 0, 8:], sin[0, :, 8:])
    torch.testing.assert_close(mine[1][:, 0, :8], -sin[0, :, :8])
    loss = F.softplus(head.loss(packed(target, head), Eagle3Objective(steps=2, decay=0.8))[0])
    assert torch.isfinite(loss)


def test_a_fresh_head_is_the_targets_last_layer_over_its_high_tap():
    """`start_from`: without the embedding's half of the attention, step 0 computes what the target's last layer makes
    of the states that enter layer n - 3, and its logits are the target's output head on that.
    """
    target = tiny_target()
    head = tiny_head(target, draft_vocab=40)
    head.start_from(target)
    attention, hidden = head.midlayer.self_attn, target.config.hidden_size
    assert all(
        bool((getattr(attention, name).weight[:, :hidden] != 0).all()) for name in ("q_proj", "k_proj", "v_proj")
    )
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).weight[:, :hidden] = 0
    row = torch.randint(3, 61, (9,), generator=torch.Generator().manual_seed(5)).tolist()
    features = pack(target, head, [row], [0])
    (rows, found), *_ = head.unroll(features, 1)
    tap = features.hidden[None, :, -hidden:]
    positions = torch.arange(len(row))[None]
    with torch.no_grad():
        rope = target.body.rotary_emb(tap, positions)
        mask = torch.full((1, 1, len(row), len(row)), torch.finfo(torch.float32).min).triu(1)
        want = target.body.layers[-1](tap, attention_mask=mask, position_ids=positions, position_embeddings=rope)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(found, want[0, rows], atol=1e-5, rtol=1e-5)
    logits = target.project(target.body.norm(want[0, rows]))[:, head.ids]
    torch.testing.assert_close(head.logits(found), logits, atol=1e-5, rtol=1e-5)
