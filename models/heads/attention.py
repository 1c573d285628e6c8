"""Training-time-test attention in memory linear in the sequence length, over packed documents.

At step k the query of row t attends causally to the step-0 keys of its document's rows <= t and to its own row's keys of steps 1..k
(methods: EAGLE-3 appendix; mask `[causal | I | ... | I]`). Block 0 goes through a flash kernel that also returns the
log-sum-exp, document by document; the k diagonal scores are elementwise dot products; both are merged by log-sum-exp:

    lse = log(exp(lse_0) + sum_i exp(s_i)),   out = exp(lse_0 - lse) out_0 + sum_i exp(s_i - lse) v_i.

Backward: with the merged output and the merged log-sum-exp the flash backward yields exactly the block-0 gradients; with
w_i = exp(s_i - lse) and D = <d_out, out>:  dv_i = w_i d_out,  ds_i = w_i (<d_out, v_i> - D).

Queries and diagonals are given only for the supervised rows (compact, [P, H, D]); block 0 keeps all rows of the packed row.
"""

import torch
import torch.utils.checkpoint

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _spread(compact: torch.Tensor, rows: torch.Tensor, length: int) -> torch.Tensor:
    """compact [P, ...] at rows [P] -> [T, ...], zero elsewhere."""
    return compact.new_zeros(length, *compact.shape[1:]).index_copy_(0, rows, compact)


def _document(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """[T, H, ...] -> [1, H, stop - start, ...]."""
    return x[start:stop].transpose(0, 1)[None]


class _FlashStep(torch.autograd.Function):
    """The CPU kernel with its merged backward. Arguments after `scale`: k keys, then k values, each [P, H_kv, D]."""

    @staticmethod
    def forward(ctx, query, key0, value0, rows, borders, scale, *diagonals):
        keys, values = diagonals[:len(diagonals) // 2], diagonals[len(diagonals) // 2:]
        spread = _spread(query, rows, len(key0))
        out0, lse0 = torch.empty_like(spread), spread.new_empty(spread.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for start, stop in zip(borders, borders[1:]):
            out, lse = _flash(*(_document(x, start, stop) for x in (spread, key0, value0)), 0.0, True, scale=scale)
            _document(out0, start, stop).copy_(out)
            _document(lse0, start, stop).copy_(lse)
        own = lse0.index_select(0, rows)
        grouped = query.unflatten(1, (-1, query.size(1) // keys[0].size(1))) if keys else query
        scores = [torch.linalg.vecdot(grouped, key[:, :, None]).flatten(1).to(own.dtype) * scale for key in keys]
        lse = torch.logsumexp(torch.stack([own, *scores]), 0) if keys else own
        out = out0.index_select(0, rows)
        if keys:
            out.mul_((own - lse).exp()[..., None])
            for score, value in zip(scores, values):
                weight = (score - lse).exp().to(out.dtype).unflatten(1, grouped.shape[1:3])
                out.unflatten(1, grouped.shape[1:3]).addcmul_(weight[..., None], value[:, :, None])
        ctx.scale, ctx.borders, ctx.count = scale, borders, len(keys)
        ctx.save_for_backward(spread, key0, value0, rows, out, lse, *scores, *diagonals)
        return out

    @staticmethod
    def backward(ctx, grad):
        spread, key0, value0, rows, out, lse, *rest = ctx.saved_tensors
        scores, keys, values = rest[:ctx.count], rest[ctx.count:2 * ctx.count], rest[2 * ctx.count:]
        query, length = spread.index_select(0, rows), len(key0)
        # Rows without a query have no gradient: any finite log-sum-exp will do.
        full = (_spread(grad, rows, length), spread, _spread(out, rows, length), _spread(lse, rows, length))
        grads = torch.empty_like(spread), torch.empty_like(key0), torch.empty_like(value0)
        for start, stop in zip(ctx.borders, ctx.borders[1:]):
            d_out, q, o, s, k, v = (_document(x, start, stop) for x in (*full, key0, value0))
            parts = _flash_backward(d_out, q, k, v, o, s.contiguous(), 0.0, True, scale=ctx.scale)
            for whole, part in zip(grads, parts):
                _document(whole, start, stop).copy_(part)
        grad_query = grads[0].index_select(0, rows)
        grad_keys, grad_values = [], []
        if ctx.count:
            shape = (keys[0].size(1), -1)  # query heads by the key/value head that they share
            grouped, d_out, d_query = (x.unflatten(1, shape) for x in (query, grad, grad_query))
            delta = torch.linalg.vecdot(grad, out)
            for score, key, value in zip(scores, keys, values):
                weight = (score - lse).exp().to(query.dtype)
                pull = torch.linalg.vecdot(d_out, value[:, :, None]).flatten(1) - delta
                slope = (weight * pull).mul_(ctx.scale).unflatten(1, shape)[..., None]
                d_query.addcmul_(slope, key[:, :, None])
                grad_keys.append((slope * grouped).sum(2))
                grad_values.append((weight.unflatten(1, shape)[..., None] * d_out).sum(2))
        return grad_query, grads[1], grads[2], None, None, None, *grad_keys, *grad_values


def _block_step(query, key0, value0, rows, borders, scale, keys, values, block: int = 128):
    """The same for any device: blocks of supervised rows against their document's keys, recomputed in backward."""
    keys, values = ([x.repeat_interleave(query.size(1) // x.size(1), 1) for x in xs] for xs in (keys, values))

    def part(q, where, start, stop, *diagonals):
        ks, vs = diagonals[:len(diagonals) // 2], diagonals[len(diagonals) // 2:]
        scores = torch.einsum("phd,shd->phs", q, key0[start:stop]) * scale
        hidden = torch.arange(start, stop, device=q.device) > where[:, None, None]
        scores = scores.masked_fill(hidden, float("-inf"))
        extra = [(q * k).sum(-1, keepdim=True) * scale for k in ks]
        weights = torch.cat([scores, *extra], -1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        out = torch.einsum("phs,shd->phd", weights[..., :stop - start], value0[start:stop])
        for i, v in enumerate(vs):
            out = out + weights[..., stop - start + i, None] * v
        return out

    outs, order = [], []
    for start, stop in zip(borders, borders[1:]):
        for own in ((rows >= start) & (rows < stop)).nonzero().flatten().split(block):
            order.append(own)
            outs.append(torch.utils.checkpoint.checkpoint(
                part, query[own], rows[own], start, stop, *[k[own] for k in keys], *[v[own] for v in values], use_reentrant=False))
    return torch.cat(outs)[torch.cat(order).argsort()]


def step_attention(query, key0, value0, rows, borders: tuple[int, ...], keys, values, scale: float) -> torch.Tensor:
    """One training-time-test step at the supervised rows of a packed row of documents.

    query [P, H, D]; key0, value0 [T, H, D] of step 0, all rows; rows [P] int64, distinct, in any order; borders of the documents (0, ..., T);
    keys, values: lists of [P, H_kv, D], one per later step -> [P, H, D].
    """
    if query.device.type == "cpu":
        return _FlashStep.apply(query, key0, value0, rows, borders, scale, *keys, *values)
    return _block_step(query, key0, value0, rows, borders, scale, keys, values)
