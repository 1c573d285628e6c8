"""Training-time test (EAGLE-3) of one decoder layer as one differentiable function, its backward written out.

With x_0 = H at the rows that are trained on, step k of every row computes

    z = rms(x_k) W_h^T + e,  q, key_k, value_k = turned z,  a = attention(q),  y = x_k + a W_o^T,
    g, p = rms(y) W_gu^T,  x_{k+1} = y + (silu(g) p) W_d^T,

where e is the embedding's half of the projections, computed once per token. The query attends causally to the step-0
keys of its document and to its own row's keys of steps 1 .. k (mask `[causal | I | ... | I]`): the k diagonal scores
s_i are merged with the causal part by log-sum-exp, lse = log(exp(lse_0) + sum_i exp(s_i)), out = exp(lse_0 - lse) out_0
+ sum_i w_i v_i, w_i = exp(s_i - lse).

Backward: with the merged output and the merged lse the causal kernel yields exactly the gradients of its part; with D =
<d_out, out>, dv_i = w_i d_out and ds_i = w_i (<d_out, v_i> - D). The weights' gradients wait until the end: one product
over the rows of all steps each, which is why this is one function and not a graph of small ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from draftsmith.models.heads.attention import QueryBlock


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split layout. x [..., H, D]; cos and sin [..., 1, D], the first half of sin negated.
    With -sin it is the transposed map."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


@dataclass(frozen=True)
class Plan:
    """What does not depend on weights. rows [P] of T, ascending; tokens [K, P]: whose embedding each row consumes at
    each step; cos, sin [K, P, 1, D] of `turn`; blocks, kernel and scale of the causal part; heads (query, key/value);
    eps of the norms.

    All rows go through all steps: those that a step has no use for compute what nobody reads, and shapes stay the same.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    blocks: list[QueryBlock]
    kernel: type
    scale: float
    heads: tuple[int, int]
    eps: float


def _norm(x, weight, eps):
    """(normalised x times weight, the factor 1 / rms [P, 1])."""
    wide = x.float() if x.dtype != torch.float64 else x
    factor = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.size(-1)).add_(eps).rsqrt_()
    return (wide * factor).to(x.dtype).mul_(weight), factor


def _norm_backward(grad, x, factor, weight):
    """Gradient for x; the weight's is sum(grad * x * factor)."""
    scaled, pulled = x * factor.to(x.dtype), grad * weight
    share = torch.linalg.vecdot(pulled, scaled)[:, None] / x.size(-1)
    return pulled.addcmul_(scaled, share, value=-1).mul_(factor.to(x.dtype))


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, embedded, key0, value0, w_qkv, w_norm, w_out, w_after, w_gate_up, w_down, plan: Plan):
        (heads, shared), inner, (steps, count) = plan.heads, w_down.size(1), plan.tokens.shape
        group, dim, queries = (shared, heads // shared), key0.size(-1), heads * key0.size(-1)
        width = hidden.size(-1)
        u, attended, y, v, gate_up, s = (
            hidden.new_empty(steps, count, w) for w in (width, queries, width, width, 2 * inner, inner)
        )
        x = hidden.new_empty(steps + 1, count, hidden.size(-1))
        torch.index_select(hidden, 0, plan.rows, out=x[0])
        saved, keys, values = [], [], []
        for k in range(steps):
            u[k], first = _norm(x[k], w_norm, plan.eps)
            width = queries if k == 0 else w_qkv.size(0)  # keys and values of step 0 are in key0, value0
            z = torch.addmm(embedded[:, :width].index_select(0, plan.tokens[k]), u[k], w_qkv[:width].T).unflatten(
                1, (-1, dim)
            )
            turned = turn(z[:, : heads + shared], plan.cos[k], plan.sin[k])
            if k > 0:
                keys.append(turned[:, heads:])
                values.append(z[:, heads + shared :])
            query = turned[:, :heads].contiguous()
            out, lse = plan.kernel.forward(query, key0, value0, plan.blocks, plan.scale)
            grouped = query.unflatten(1, group)
            scores = [
                torch.linalg.vecdot(grouped, key[:, :, None]).flatten(1).mul_(plan.scale).to(lse.dtype) for key in keys
            ]
            scores = torch.stack([lse, *scores])
            lse = scores.logsumexp(0)
            weights = scores.sub_(lse).exp_().to(query.dtype)[..., None]
            out.mul_(weights[0])
            for weight, value in zip(weights[1:], values):
                out.unflatten(1, group).addcmul_(weight.unflatten(1, group), value[:, :, None])
            attended[k] = out.flatten(1)
            torch.addmm(x[k], attended[k], w_out.T, out=y[k])
            v[k], second = _norm(y[k], w_after, plan.eps)
            torch.mm(v[k], w_gate_up.T, out=gate_up[k])
            torch.mul(F.silu(gate_up[k, :, :inner]), gate_up[k, :, inner:], out=s[k])
            torch.addmm(y[k], s[k], w_down.T, out=x[k + 1])
            saved.append((query, lse, weights, first, second))
        ctx.plan, ctx.saved, ctx.diagonals, ctx.length = plan, saved, (keys, values), len(hidden)
        ctx.save_for_backward(
            embedded, key0, value0, w_qkv, w_norm, w_out, w_after, w_gate_up, w_down, x, u, attended, y, v, gate_up, s
        )
        return x[1:]

    @staticmethod
    def backward(ctx, grad):
        embedded, key0, value0, w_qkv, w_norm, w_out, w_after, w_gate_up, w_down, x, u, attended, y, v, gate_up, s = (
            ctx.saved_tensors
        )
        plan, (keys, values), (heads, shared), steps = ctx.plan, ctx.diagonals, ctx.plan.heads, len(grad)
        group, dim, inner = (shared, heads // shared), key0.size(-1), w_down.size(1)
        d_out, d_gate_up, d_y, d_v, d_u = grad.clone(), *map(torch.empty_like, (gate_up, y, v, u))
        d_z, d_embedded = u.new_zeros(*u.shape[:2], w_qkv.size(0)), torch.zeros_like(embedded)
        d_key0, d_value0 = torch.zeros_like(key0), torch.zeros_like(value0)
        d_keys, d_values = [torch.zeros_like(key) for key in keys], [torch.zeros_like(value) for value in values]
        for k in reversed(range(steps)):
            query, lse, weights, first, second = ctx.saved[k]
            gate, up = gate_up[k].split(inner, 1)
            d_s = d_out[k] @ w_down
            torch.mul(d_s, F.silu(gate), out=d_gate_up[k, :, inner:])
            d_gate_up[k, :, :inner] = torch.ops.aten.silu_backward(d_s.mul_(up), gate)
            torch.mm(d_gate_up[k], w_gate_up, out=d_v[k])
            torch.add(d_out[k], _norm_backward(d_v[k], y[k], second, w_after), out=d_y[k])
            d_attended, out = (d_y[k] @ w_out).unflatten(1, (heads, dim)), attended[k].unflatten(1, (heads, dim))
            d_query = plan.kernel.backward(
                d_attended, query, key0, value0, out, lse, plan.blocks, plan.scale, d_key0, d_value0
            )
            grouped, d_grouped, pulled = (t.unflatten(1, group) for t in (query, d_query, d_attended))
            delta = torch.linalg.vecdot(pulled, out.unflatten(1, group))
            for weight, key, value, d_key, d_value in zip(weights[1:], keys[:k], values[:k], d_keys, d_values):
                weight = weight.unflatten(1, group)
                slope = (
                    (torch.linalg.vecdot(pulled, value[:, :, None]) - delta).mul_(plan.scale)[..., None].mul_(weight)
                )
                d_grouped.addcmul_(slope, key[:, :, None])
                d_key += (slope * grouped).sum(2)
                d_value += (weight * pulled).sum(2)
            back, width = d_z[k].unflatten(1, (-1, dim)), heads * dim if k == 0 else w_qkv.size(0)
            back[:, :heads] = turn(d_query, plan.cos[k], -plan.sin[k])
            if k > 0:
                back[:, heads : heads + shared], back[:, heads + shared :] = (
                    turn(d_keys[k - 1], plan.cos[k], -plan.sin[k]),
                    d_values[k - 1],
                )
            d_embedded[:, :width].index_add_(0, plan.tokens[k], d_z[k, :, :width])
            torch.mm(d_z[k, :, :width], w_qkv[:width], out=d_u[k])
            d_x = _norm_backward(d_u[k], x[k], first, w_norm).add_(d_y[k])
            if k > 0:
                d_out[k - 1] += d_x
        d_hidden = u.new_zeros(ctx.length, u.size(-1)).index_copy_(0, plan.rows, d_x)
        product = lambda a, b: a.flatten(0, 1).T @ b.flatten(0, 1)  # noqa: E731  over the rows of all steps
        first, second = (torch.stack([step[i] for step in ctx.saved]).to(u.dtype) for i in (3, 4))
        return (
            d_hidden,
            d_embedded,
            d_key0,
            d_value0,
            product(d_z, u),
            (d_u * x[:-1]).mul_(first).sum((0, 1)),
            product(d_y, attended),
            (d_v * y).mul_(second).sum((0, 1)),
            product(d_gate_up, v),
            product(d_out, s),
            None,
        )


def unroll(hidden, embedded, key0, value0, weights: tuple[torch.Tensor, ...], plan: Plan) -> torch.Tensor:
    """hidden [T, h]; embedded [T, (H + 2 H_kv) D]; key0 (turned), value0 [T, H, D]; weights: (W_h [(H + 2 H_kv) D, h],
    norm [h], W_o [h, H D], norm [h], W_gu [2I, h], W_d [h, I]) -> the layer's outputs [K, P, h].
    """
    return _Unroll.apply(hidden, embedded, key0, value0, *weights, plan)
