"""Training-time test as one function has the gradients of the plain computation."""

import pytest
import torch

from tests.conftest import pack, tiny_head, tiny_target
from tests.models.heads.documents import documents, packed
from tests.models.heads.test_attention import KERNELS


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
