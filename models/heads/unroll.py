"""Training-time test (EAGLE-3) of one decoder layer as one differentiable function, its backward written out.

With x_0 = H at the rows that are trained on, step k of every row computes

    z = rms(x_k) W_h^T + e,  q, key_k, value_k = turned z,  a = attention(q),  y = x_k + a W_o^T,
    g, p = rms(y) W_gu^T,  o_k = y + (silu(g) p) W_d^T,  x_{k+1} = o_k, or rms(o_k) (EAGLE-3.1),

where e is the embedding's half of the projections, computed once per token. The query attends causally to the step-0
keys of its document and to its own row's keys of steps 1 .. k (mask `[causal | I | ... | I]`): the k diagonal scores
s_i are merged with the causal part by log-sum-exp, lse = log(exp(lse_0) + sum_i exp(s_i)), out = exp(lse_0 - lse) out_0
+ sum_i w_i v_i, w_i = exp(s_i - lse). With a sliding window of W rows, step k sees W - k rows of the causal part and
the last W - 1 of the row's own earlier steps. Between two steps rows may be left behind: only the others go on.

Backward: with the merged output and the merged lse the causal kernel yields exactly the gradients of its part; with D =
<d_out, out>, dv_i = w_i d_out and ds_i = w_i (<d_out, v_i> - D). The weights' gradients wait until the end: one product
over the rows of all steps each, which is why this is one function and not a graph of small ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from draftsmith.models.features import Packing
from draftsmith.models.heads.attention import query_blocks


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split layout. x [..., H, D]; cos and sin [..., 1, D], the first half of sin negated.
    With -sin it is the transposed map."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


Chooser = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What does not depend on weights. angles(positions) -> cos, sin of `turn`; kernel and scale of the causal part;
    heads (query, key/value); eps of the norms; window: how many rows a row sees, its own included (None: all);
    choose(step, here [n], outputs [n, h]) -> which rows go on after a step, as ascending places [m] among its n (None:
    all do, also those that a step has no use for: what they compute nobody reads).

    here: for each step the places in `packing.rows` of the rows that took part; the forward pass fills it.
    """

    packing: Packing
    steps: int
    angles: Callable
    kernel: type
    scale: float
    heads: tuple[int, int]
    eps: float
    window: int | None = None
    choose: Chooser | None = None
    here: list[torch.Tensor] = field(default_factory=list)

    def blocks(self, step: int, here: torch.Tensor) -> list:
        """The causal part of the rows here [n] at a step."""
        window = None if self.window is None else max(0, self.window - step)
        rows = self.packing.rows if self.choose is None else self.packing.rows[here.cpu()]
        return query_blocks(self.packing, rows, self.kernel.block, window)


class Kept(NamedTuple):
    """What a step keeps for its backward. cut: its rows in the tensors of all steps; at: the packed index of the token
    that each consumes; came: their places among the rows of the step before (None: these very rows); own: the earlier
    steps whose keys they see, with their places there; x: what they began with.
    """

    cut: slice
    at: torch.Tensor
    came: torch.Tensor | None
    turning: tuple[torch.Tensor, torch.Tensor]
    blocks: list
    own: list[tuple[int, torch.Tensor | None]]
    x: torch.Tensor
    query: torch.Tensor
    lse: torch.Tensor
    weights: torch.Tensor
    factors: tuple[torch.Tensor, ...]


def _norm(x, weight, eps):
    """(normalised x times weight, the factor 1 / rms [P, 1])."""
    wide = x.float() if x.dtype != torch.float64 else x
    factor = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.size(-1)).add_(eps).rsqrt_()
    return (wide * factor).to(x.dtype).mul_(weight), factor


def _norm_backward(grad, x, factor, weight):
    """(gradient for x, gradient for the weight)."""
    scaled = x * factor.to(x.dtype)
    pulled, own = grad * weight, (grad * scaled).sum(0)
    share = torch.linalg.vecdot(pulled, scaled)[:, None] / x.size(-1)
    return pulled.addcmul_(scaled, share, value=-1).mul_(factor.to(x.dtype)), own


def _of(x: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return x if places is None else x[places]


def _add(total: torch.Tensor, places: torch.Tensor | None, part: torch.Tensor) -> None:
    total.add_(part) if places is None else total.index_add_(0, places, part)


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, embedded, key0, value0, w_qkv, w_norm, w_out, w_after, w_gate_up, w_down, w_last, plan):
        (heads, shared), inner, dim, width = plan.heads, w_down.size(1), key0.size(-1), hidden.size(-1)
        group, queries, rows = (shared, heads // shared), heads * dim, plan.packing.rows.to(hidden.device)
        positions, x = plan.packing.positions.to(hidden.device)[rows], hidden.index_select(0, rows)
        u, attended, y, v, gate_up, s, output = (
            hidden.new_empty(plan.steps * len(rows), w) for w in (width, queries, width, width, 2 * inner, inner, width)
        )
        here, came, places, last = torch.arange(len(rows), device=hidden.device), None, [], ()
        steps, keys, values, start = [], [], [], 0
        plan.here.clear()
        for k in range(plan.steps):
            cut, oldest = slice(start, start + len(here)), 1 if plan.window is None else max(1, k - plan.window + 1)
            at = (rows[here] + 1 + k).clamp(max=len(embedded) - 1)
            turning, blocks = plan.angles(positions[here] + k), plan.blocks(k, here)
            own = [(i, places[i]) for i in range(oldest, k)] + [(k, None)] * (k > 0)
            u[cut], first = _norm(x, w_norm, plan.eps)
            columns = queries if k == 0 else w_qkv.size(0)  # keys and values of step 0 are in key0, value0
            z = torch.addmm(embedded[:, :columns].index_select(0, at), u[cut], w_qkv[:columns].T)
            z = z.unflatten(1, (-1, dim))
            turned = turn(z[:, : heads + shared], *turning)
            keys.append(turned[:, heads:])
            values.append(z[:, heads + shared :])
            query = turned[:, :heads].contiguous()
            if blocks:
                out, lse = plan.kernel.forward(query, key0, value0, blocks, plan.scale)
            else:  # no rows, or a window with nothing but the row's own steps
                wide = torch.promote_types(query.dtype, torch.float32)
                out, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=wide)
            grouped = query.unflatten(1, group)
            scores = [
                torch.linalg.vecdot(grouped, _of(keys[i], there)[:, :, None]).flatten(1).mul_(plan.scale).to(lse.dtype)
                for i, there in own
            ]
            scores = torch.stack([lse, *scores])
            lse = scores.logsumexp(0)
            weights = scores.sub_(lse).exp_().to(query.dtype)[..., None]
            out.mul_(weights[0])
            for weight, (i, there) in zip(weights[1:], own):
                out.unflatten(1, group).addcmul_(weight.unflatten(1, group), _of(values[i], there)[:, :, None])
            attended[cut] = out.flatten(1)
            torch.addmm(x, attended[cut], w_out.T, out=y[cut])
            v[cut], second = _norm(y[cut], w_after, plan.eps)
            torch.mm(v[cut], w_gate_up.T, out=gate_up[cut])
            torch.mul(F.silu(gate_up[cut, :inner]), gate_up[cut, inner:], out=s[cut])
            torch.addmm(y[cut], s[cut], w_down.T, out=output[cut])
            steps.append(Kept(cut, at, came, turning, blocks, own, x, query, lse, weights, (first, second, *last)))
            plan.here.append(here)
            start = cut.stop
            if k == plan.steps - 1:
                break
            came = None if plan.choose is None else plan.choose(k, here, output[cut])
            places = [came if p is None else _of(p, came) for p in (*places, None)]
            here, x = _of(here, came), _of(output[cut], came)
            if w_last is not None:
                x, third = _norm(x, w_last, plan.eps)
                last = (third,)
        kept = (x_[:start] for x_ in (u, attended, y, v, gate_up, s))
        output = output[:start]
        ctx.plan, ctx.steps, ctx.diagonals, ctx.length = plan, steps, (keys, values), len(hidden)
        ctx.save_for_backward(
            embedded, key0, value0, w_qkv, w_norm, w_out, w_after, w_gate_up, w_down, w_last, *kept, output
        )
        return output

    @staticmethod
    def backward(ctx, grad):
        embedded, key0, value0, w_qkv, w_norm, w_out, w_after, w_gate_up, w_down, w_last, *kept = ctx.saved_tensors
        u, attended, y, v, gate_up, s, output = kept
        plan, (keys, values), (heads, shared) = ctx.plan, ctx.diagonals, ctx.plan.heads
        group, dim, inner = (shared, heads // shared), key0.size(-1), w_down.size(1)
        d_out, d_gate_up, d_y, d_v, d_u = grad.clone(), *map(torch.empty_like, (gate_up, y, v, u))
        d_z, d_embedded = u.new_zeros(len(u), w_qkv.size(0)), torch.zeros_like(embedded)
        d_key0, d_value0 = torch.zeros_like(key0), torch.zeros_like(value0)
        d_keys, d_values = [torch.zeros_like(key) for key in keys], [torch.zeros_like(value) for value in values]
        d_norm, d_after, d_last = (None if w is None else torch.zeros_like(w) for w in (w_norm, w_after, w_last))
        for k in reversed(range(len(ctx.steps))):
            step = ctx.steps[k]
            cut, (gate, up) = step.cut, gate_up[step.cut].split(inner, 1)
            d_s = d_out[cut] @ w_down
            torch.mul(d_s, F.silu(gate), out=d_gate_up[cut, inner:])
            d_gate_up[cut, :inner] = torch.ops.aten.silu_backward(d_s.mul_(up), gate)
            torch.mm(d_gate_up[cut], w_gate_up, out=d_v[cut])
            pulled, own = _norm_backward(d_v[cut], y[cut], step.factors[1], w_after)
            d_after += own
            torch.add(d_out[cut], pulled, out=d_y[cut])
            d_attended, out = ((x).unflatten(1, (heads, dim)) for x in (d_y[cut] @ w_out, attended[cut]))
            d_query = plan.kernel.backward(
                d_attended, step.query, key0, value0, out, step.lse, step.blocks, plan.scale, d_key0, d_value0
            )
            grouped, d_grouped, pulled = (t.unflatten(1, group) for t in (step.query, d_query, d_attended))
            delta = torch.linalg.vecdot(pulled, out.unflatten(1, group))
            for weight, (i, there) in zip(step.weights[1:], step.own):
                weight, key, value = weight.unflatten(1, group), _of(keys[i], there), _of(values[i], there)
                slope = torch.linalg.vecdot(pulled, value[:, :, None]) - delta
                slope = slope.mul_(plan.scale)[..., None].mul_(weight)
                d_grouped.addcmul_(slope, key[:, :, None])
                _add(d_keys[i], there, (slope * grouped).sum(2))
                _add(d_values[i], there, (weight * pulled).sum(2))
            back, columns = d_z[cut].unflatten(1, (-1, dim)), heads * dim if k == 0 else w_qkv.size(0)
            cos, sin = step.turning
            back[:, :heads] = turn(d_query, cos, -sin)
            if k > 0:
                back[:, heads : heads + shared] = turn(d_keys[k], cos, -sin)
                back[:, heads + shared :] = d_values[k]
            d_embedded[:, :columns].index_add_(0, step.at, d_z[cut, :columns])
            torch.mm(d_z[cut, :columns], w_qkv[:columns], out=d_u[cut])
            d_x, own = _norm_backward(d_u[cut], step.x, step.factors[0], w_norm)
            d_norm += own
            d_x += d_y[cut]
            if k > 0:
                before = ctx.steps[k - 1].cut
                if w_last is not None:
                    d_x, own = _norm_backward(d_x, _of(output[before], step.came), step.factors[2], w_last)
                    d_last += own
                _add(d_out[before], step.came, d_x)
        rows = plan.packing.rows.to(u.device)
        d_hidden = u.new_zeros(ctx.length, u.size(-1)).index_copy_(0, rows, d_x)
        products = (d_z.T @ u, d_norm, d_y.T @ attended, d_after, d_gate_up.T @ v, d_out.T @ s, d_last)
        return d_hidden, d_embedded, d_key0, d_value0, *products, None


def unroll(hidden, embedded, key0, value0, weights: tuple[torch.Tensor, ...], plan: Plan) -> torch.Tensor:
    """hidden [T, h]; embedded [T, (H + 2 H_kv) D]; key0 (turned), value0 [T, H, D]; weights: (W_h [(H + 2 H_kv) D, h],
    norm [h], W_o [h, H D], norm [h], W_gu [2I, h], W_d [h, I], norm of an output before the next step [h] or None) ->
    the layer's outputs [N, h], those of step 0 first; `plan.here` says of which rows.
    """
    return _Unroll.apply(hidden, embedded, key0, value0, *weights, plan)
