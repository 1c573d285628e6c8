"""EAGLE-3: training-time test equals drafting, attention equals its dense form, features equal hidden states."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Packing
from draftsmith.models.heads import Eagle3Objective, attention, vocabulary
from draftsmith.models.heads.distill import chain_walk
from tests.conftest import pack, tiny_head, tiny_target
from tests.models.heads.ragged import RaggedInPlain

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


KERNELS = [attention.FlashOnCPU, attention.BlockwiseAttention, RaggedInPlain]


def test_a_kernel_that_says_something_else_is_found_out():
    class Wrong(RaggedInPlain):
        @classmethod
        def forward(cls, query, key, value, blocks, scale):
            out, lse = super().forward(query, key, value, blocks, scale)
            return out, lse + 0.1

    device = torch.device("cpu")
    assert attention.disagreement(RaggedInPlain, device) < 1e-5 and attention.disagreement(Wrong, device) > 1e-2
    assert attention.kernel_for(device) is attention.FlashOnCPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ragged_kernel_of_cuda(dtype):
    limit = 1e-2 if dtype == torch.float32 else 3e-2
    assert attention.disagreement(attention.RaggedOnCUDA, torch.device("cuda"), dtype) < limit


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_dense_attention_alone_and_merged_with_other_scores(kernel):
    """The merged attention has one more key per query; with the merged output and log-sum-exp the kernel's backward
    gives its own share.
    """
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True)  # noqa: E731
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    packing, heads, dim, scale = Packing((0, 10, 13, 22), mask), 2, 4, 0.3
    rows, count = packing.rows, len(packing.rows)
    query, key, value, other, more, weight = (
        make(count, heads, dim),
        make(22, heads, dim),
        make(22, heads, dim),
        make(count, heads),
        make(count, heads, dim),
        make(count, heads, dim).detach(),
    )
    out, lse = [], []
    for p, row in enumerate(rows.tolist()):
        first = max(b for b in packing.borders if b <= row)
        scores = torch.cat([torch.einsum("hd,khd->hk", query[p], key[first : row + 1]) * scale, other[p][:, None]], 1)
        out.append(torch.einsum("hk,khd->hd", scores.softmax(1), torch.cat([value[first : row + 1], more[p][None]])))
        lse.append(scores.logsumexp(1))
    want = torch.autograd.grad((torch.stack(out) * weight).sum(), (query, key, value))
    blocks = attention.query_blocks(packing, packing.rows, 3)
    with torch.no_grad():
        alone, total = kernel.forward(query, key, value, blocks, scale)
        merged = torch.logaddexp(total, other)
        both = alone * (total - merged).exp()[..., None] + more * (other - merged).exp()[..., None]
        torch.testing.assert_close(merged, torch.stack(lse), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(both, torch.stack(out), atol=1e-12, rtol=1e-12)
        sums = torch.ones_like(key), torch.ones_like(value)  # gradients are added
        d_query = kernel.backward(weight, query, key, value, both, merged, blocks, scale, *sums)
        for got, w in zip((d_query, sums[0] - 1, sums[1] - 1), want):
            torch.testing.assert_close(got, w, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape",
    [{}, {"fc_norm": True, "norm_output": True}, {"sliding_window": 2}, {"norm_output": True, "sliding_window": 5}],
    ids=["EAGLE-3", "EAGLE-3.1", "window 2", "normed output, window 5"],
)
def test_unrolled_layer_has_the_gradients_of_the_plain_computation(kernel, shape, monkeypatch):
    """fp64: every parameter's gradient through 4 steps against autograd of the same layer written plainly, row by
    row.
    """
    target = tiny_target()
    target.model.double()
    head = tiny_head(target, 40, **shape).double()
    features = pack(target, head, documents(target, (9, 7)), [3, 0])
    monkeypatch.setattr("draftsmith.models.heads.eagle3.kernel_for", lambda device: kernel)
    weights = [
        torch.randn(len(rows), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        for k, (rows, _) in enumerate(head.unroll(features, 4))
    ]
    unused = ("lm_head",) if head.config.norm_output else ("norm", "lm_head")
    names, parameters = zip(*[(n, p) for n, p in head.named_parameters() if not n.startswith(unused)])
    got = torch.autograd.grad(sum((o * w).sum() for (_, o), w in zip(head.unroll(features, 4), weights)), parameters)
    plain = plain_unroll(head, features, 4)
    for (rows, output), (same, want) in zip(head.unroll(features, 4), plain):
        assert torch.equal(rows, same)
        torch.testing.assert_close(output, want, atol=1e-11, rtol=1e-11)
    want = torch.autograd.grad(sum((o * w).sum() for (_, o), w in zip(plain, weights)), parameters)
    for name, a, b in zip(names, got, want):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def plain_unroll(head, features, steps):
    """The same by the definition: rows one at a time, attention over the list of visible keys."""
    layer, packing, fused = head.midlayer, features.packing, head.first(features.hidden)
    window = head.window or 10**6
    attention_, states, outputs = layer.self_attn, {}, []
    repeat = lambda x: attention_.repeat(x, 0)  # noqa: E731

    def consume(token, hidden, position):
        u = layer.widen(head._embed(token), hidden)
        cos, sin = head.angles(torch.tensor(position))
        return attention_.query(u, cos, sin), *attention_.key_value(u, cos, sin)

    first = {}
    for start, stop in zip(packing.borders, packing.borders[1:]):
        for t in range(start, stop - 1):
            first[t] = consume(features.tokens[t + 1], fused[t], t - start)
    for k in range(steps):
        rows = packing.rows[packing.takes_part(k)]
        level = []
        for t in rows.tolist():
            start = max(b for b in packing.borders if b <= t)
            hidden, diagonal = states.get(t, (fused[t], []))
            if k > 0 and head.config.norm_output:
                hidden = head.norm(hidden)
            query, key, value = first[t] if k == 0 else consume(features.tokens[t + 1 + k], hidden, t - start + k)
            diagonal = diagonal if k == 0 else [*diagonal, (key, value)]
            seen = [first[c][1:] for c in range(start, t + 1)] + diagonal  # at positions 0 .. t - start + k
            keys, values = (torch.stack([repeat(x) for x in kind]) for kind in zip(*seen[-window:]))
            share = (torch.einsum("hd,khd->hk", query, keys) * attention_.scale).softmax(-1)
            states[t] = layer.finish(hidden, torch.einsum("hk,khd->hd", share, values)), diagonal
            level.append(states[t][0])
        outputs.append((rows, torch.stack(level)))
    return outputs


def test_gradient_flows_through_all_steps():
    """The gradient of the last step's output agrees with a finite difference in fp64, so nothing is detached between
    steps.
    """
    target = tiny_target()
    target.model.double()
    head = tiny_head(target).double()
    features = packed(target, head)

    def last(weight_shift):
        with torch.no_grad():
            head.fc.weight += weight_shift
        value = list(head.unroll(features, 3))[-1][1].square().sum()
        with torch.no_grad():
            head.fc.weight -= weight_shift
        return value

    direction = (
        torch.randn(head.fc.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    )
    gradient = torch.autograd.grad(last(torch.zeros_like(direction)), head.fc.weight)[0]
    difference = (last(direction) - last(-direction)).item() / 2
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-5)


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


def test_draft_vocabulary_round_trip_and_ties():
    counts = torch.tensor([5, 0, 7, 7, 1, 0, 5])
    ids = vocabulary.most_frequent(counts, 4, required=[5])
    assert ids.tolist() == [0, 2, 3, 5]
    stored = vocabulary.to_offsets(ids, 7)
    assert stored["d2t"].tolist() == [0, 1, 1, 2] and stored["t2d"].tolist() == [
        True,
        False,
        True,
        True,
        False,
        True,
        False,
    ]
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
