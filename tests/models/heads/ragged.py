"""`RaggedOnCUDA` with its two operations as their documentation has them, in plain ones: what surrounds them is tested
on every machine.
"""

import torch

from draftsmith.models.heads.attention import RaggedOnCUDA


def scores_of(query, key, queries, keys, scale):
    """For each sequence: (its queries, its keys, scores [H, q, k] causal from the bottom right)."""
    for (a, b), (c, d) in zip(zip(queries, queries[1:]), zip(keys, keys[1:])):
        scores = torch.einsum("qhd,khd->hqk", query[0, a:b], key[0, c:d]) * scale
        ahead = torch.arange(d - c) > torch.arange(b - a)[:, None] + (d - c) - (b - a)
        yield slice(a, b), slice(c, d), scores.masked_fill(ahead, float("-inf"))


def forward(query, key, value, bias, queries, keys, longest, longest_key, dropout, mask, lse_too, *, scale):
    assert bias is None and not dropout and mask == RaggedOnCUDA.bottom_right and lse_too
    out, count = torch.empty_like(query), len(queries) - 1
    padded = -(-longest // RaggedOnCUDA.aligned) * RaggedOnCUDA.aligned
    lse = query.new_full((count, query.size(2), padded), float("inf"))
    for i, (q, k, scores) in enumerate(scores_of(query, key, queries.tolist(), keys.tolist(), scale)):
        assert q.stop - q.start <= longest and k.stop - k.start <= longest_key
        lse[i, :, : q.stop - q.start] = scores.logsumexp(-1)
        out[0, q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[0, k])
    return out, lse, None, None, longest, longest_key


def backward(
    grad, query, key, value, bias, out, queries, keys, longest, _longest, lse, _dropout, _s, _o, mask, _b, *, scale
):
    assert bias is None and mask == RaggedOnCUDA.bottom_right and lse.size(2) % RaggedOnCUDA.aligned == 0
    results = [torch.zeros_like(x) for x in (query, key, value)]
    delta = (grad * out).sum(-1)[0]
    for i, (q, k, scores) in enumerate(scores_of(query, key, queries.tolist(), keys.tolist(), scale)):
        weights = (scores - lse[i, :, : q.stop - q.start, None]).exp()
        slope = weights * (torch.einsum("qhd,khd->hqk", grad[0, q], value[0, k]) - delta[q].T[..., None]) * scale
        results[0][0, q] += torch.einsum("hqk,khd->qhd", slope, key[0, k])
        results[1][0, k] += torch.einsum("hqk,qhd->khd", slope, query[0, q])
        results[2][0, k] += torch.einsum("hqk,qhd->khd", weights, grad[0, q])
    return *results, None


class RaggedInPlain(RaggedOnCUDA):
    run, run_back = staticmethod(forward), staticmethod(backward)
