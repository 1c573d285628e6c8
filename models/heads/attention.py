"""Training-time-test attention in memory linear in the sequence length.

At step k the query of row t attends causally to the step-0 keys of rows <= t and to its own row's keys of steps 1..k
(methods: EAGLE-3 appendix; mask `[causal | I | ... | I]`). Block 0 goes through a flash kernel that also returns the
log-sum-exp; the k diagonal scores are elementwise dot products; both are merged by log-sum-exp:

    lse = log(exp(lse_0) + sum_i exp(s_i)),   out = exp(lse_0 - lse) out_0 + sum_i exp(s_i - lse) v_i.

Backward: with the merged output and the merged log-sum-exp the flash backward yields exactly the block-0 gradients; with
w_i = exp(s_i - lse) and D = <d_out, out>:  dv_i = w_i d_out,  ds_i = w_i (<d_out, v_i> - D).

Queries and diagonals are given only for the supervised rows (compact, [P, H, D]); block 0 keeps all rows ([B, H, S, D]).
"""

import torch
import torch.utils.checkpoint

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _scatter(compact: torch.Tensor, rows: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """compact [P, H, D] at flat rows [P] of [B, S] -> [B, H, S, D], zero elsewhere."""
    full = compact.new_zeros(batch * length, *compact.shape[1:])
    full[rows] = compact
    return full.view(batch, length, *compact.shape[1:]).transpose(1, 2)


def _gather(full: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, H, S, ...] -> [P, H, ...] at flat rows of [B, S]."""
    return full.transpose(1, 2).flatten(0, 1)[rows]


class _FlashStep(torch.autograd.Function):
    """The CPU kernel with its merged backward. Arguments after `scale`: k keys, then k values, each [P, H, D]."""

    @staticmethod
    def forward(ctx, query, key0, value0, rows, scale, *diagonals):
        batch, _, length, _ = key0.shape
        keys, values = diagonals[:len(diagonals) // 2], diagonals[len(diagonals) // 2:]
        out0, lse0 = _flash(_scatter(query, rows, batch, length), key0, value0, 0.0, True, scale=scale)
        scores = [(query * k).sum(-1) * scale for k in keys]
        own = _gather(lse0, rows)
        lse = torch.logsumexp(torch.stack([own, *(s.to(own.dtype) for s in scores)]), 0)
        out = _gather(out0, rows).to(own.dtype) * (own - lse).exp()[..., None]
        for score, value in zip(scores, values):
            out.addcmul_((score - lse).exp()[..., None], value.to(own.dtype))
        out = out.to(query.dtype)
        ctx.scale, ctx.count = scale, len(keys)
        ctx.save_for_backward(query, key0, value0, rows, out, lse, lse0, *scores, *diagonals)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key0, value0, rows, out, lse, lse0, *rest = ctx.saved_tensors
        scores, keys, values = rest[:ctx.count], rest[ctx.count:2 * ctx.count], rest[2 * ctx.count:]
        batch, _, length, _ = key0.shape
        merged = lse0.transpose(1, 2).flatten(0, 1).clone()
        merged[rows] = lse
        merged = merged.view(batch, length, -1).transpose(1, 2).contiguous()
        full = [_scatter(x, rows, batch, length) for x in (grad, query, out)]
        grad_query, grad_key0, grad_value0 = _flash_backward(
            full[0], full[1], key0, value0, full[2], merged, 0.0, True, scale=ctx.scale)
        grad_query = _gather(grad_query, rows)
        delta = (grad * out).sum(-1)
        grad_keys, grad_values = [], []
        for score, key, value in zip(scores, keys, values):
            weight = (score - lse).exp().to(query.dtype)
            slope = weight * ((grad * value).sum(-1) - delta) * ctx.scale
            grad_query = grad_query + slope[..., None] * key
            grad_keys.append(slope[..., None] * query)
            grad_values.append(weight[..., None] * grad)
        return grad_query, grad_key0, grad_value0, None, None, *grad_keys, *grad_values


def _block_step(query, key0, value0, rows, scale, keys, values, block: int = 128):
    """The same for any device: blocks of supervised rows against all keys, recomputed in backward."""
    length = key0.size(2)
    if len(rows) == 0:
        return query + 0 * (key0.sum() + value0.sum())  # stays connected to what it depends on

    def part(q, where, *diagonals):
        ks, vs = diagonals[:len(diagonals) // 2], diagonals[len(diagonals) // 2:]
        b, t = where // length, where % length
        outs = []
        for index in b.unique().tolist():
            own = b == index
            scores = torch.einsum("phd,hsd->phs", q[own], key0[index]) * scale
            hidden = torch.arange(length, device=q.device)[None, None] > t[own][:, None, None]
            scores = scores.masked_fill(hidden, float("-inf"))
            extra = [(q[own] * k[own]).sum(-1, keepdim=True) * scale for k in ks]
            weights = torch.cat([scores, *extra], -1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
            out = torch.einsum("phs,hsd->phd", weights[..., :length], value0[index])
            for i, v in enumerate(vs):
                out = out + weights[..., length + i, None] * v[own]
            outs.append(out)
        return torch.cat(outs)

    parts = []
    for start in range(0, len(rows), block):
        cut = slice(start, start + block)
        parts.append(torch.utils.checkpoint.checkpoint(
            part, query[cut], rows[cut], *[k[cut] for k in keys], *[v[cut] for v in values], use_reentrant=False))
    return torch.cat(parts)


def step_attention(query, key0, value0, rows, keys, values, scale: float) -> torch.Tensor:
    """One training-time-test step at the supervised rows.

    query [P, H, D]; key0, value0 [B, H, S, D] of step 0, all rows; rows [P] int64 ascending, flat indices into [B, S];
    keys, values: lists of [P, H, D], one per later step -> [P, H, D].
    """
    if query.device.type == "cpu":
        return _FlashStep.apply(query, key0, value0, rows, scale, *keys, *values)
    return _block_step(query, key0, value0, rows, scale, keys, values)
