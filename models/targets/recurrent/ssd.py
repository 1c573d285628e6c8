"""Mamba-2 (state space duality) over trees: S_i = exp(a_i) S_parent(i) + dt_i x_i B_i^T with a_i = dt_i A, y_i = S_i
C_i + D x_i.

With c_i the sum of a along the path to i, all nodes are computed at once (STree, arXiv 2505.14969, section 4):

    y_i = exp(c_i) S_0 C_i + sum over ancestors j of exp(c_i - c_j) (C_i . B_j) dt_j x_j + D x_i

and the state behind a path is exp(c_end) S_0 + sum of exp(c_end - c_l) dt_l x_l B_l^T. For a chain this is the diagonal
block of the usual chunked form. Shapes: b batch, N rows, H heads of width P, G groups of S state numbers.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from draftsmith.models.targets.recurrent.rows import Branches, Chain, along, decay, path_mask
from draftsmith.models.targets.recurrent.scan import Scan, short_chunk


def step_sizes(dt, dt_bias, dt_softplus: bool, dt_limit) -> torch.Tensor:
    """[b, N, H] fp32, rounded where the model rounds: bias and softplus in its own dtype."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit).float()


def chain(state, rows: Chain, original, hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, **options):
    """The model's own scan. A padding row has a step of 0, which leaves the state as it is."""
    dt = step_sizes(dt, dt_bias, options.get("dt_softplus", False), options.get("dt_limit", (0.0, float("inf"))))
    return original(
        hidden_states,
        dt * rows.real[..., None],
        A,
        B,
        C,
        chunk_size=short_chunk(chunk_size, rows.size),
        D=D,
        initial_states=state,
        return_final_states=True,
    )


def tree(
    state,
    rows: Branches,
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size=None,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    **_,
):
    """hidden_states [b, N, H, P], dt [b, N, H], A [H], B and C [b, N, G, S] -> ([b, N, H, P] fp32, saved)."""
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    outputs = scan_on(hidden_states.device, rows.size)(state, rows.own, hidden_states, dt, A, B, C)
    if D is not None:
        outputs = outputs + D[:, None] * hidden_states.float()
    return outputs, {"x": hidden_states, "dt": dt, "a": dt * A.float(), "B": B}


def scan_on(device: torch.device, size: int):
    """`scan`, or its fused form where a GPU and Triton are at hand and a tree of so many nodes fits."""
    if device.type != "cuda" or find_spec("triton") is None:
        return scan
    from draftsmith.models.targets.recurrent import fused

    return fused.scan if size <= fused.LARGEST else scan


def scan(state, own, x, dt, A, B, C) -> torch.Tensor:
    """The sum over ancestors and what the kept rows left: [b, N, H, P] fp32; own [b, N, N] bool, dt [b, N, H] fp32."""
    (batch, size, heads, width), groups = x.shape, B.size(2)
    sums = (own.float() @ (dt * A.float())).transpose(1, 2)  # [b, H, N]
    into, outof = (y.float().transpose(1, 2) for y in (B, C))  # [b, G, N, S]
    weights = (outof @ into.mT)[:, :, None] * decay(sums, own).unflatten(1, (groups, -1))
    found = weights.flatten(1, 2) @ (x.float() * dt[..., None]).transpose(1, 2)  # [b, H, N, P]
    if state is not None:
        kept = state.unflatten(1, (groups, -1)).flatten(2, 3)  # [b, G, H / G * P, S]
        read = (outof @ kept.mT).unflatten(3, (-1, width)).permute(0, 1, 3, 2, 4).reshape(batch, heads, size, width)
        found = found + sums.exp()[..., None] * read
    return found.transpose(1, 2).contiguous()


def commit(state, saved, path, counts):
    real = path_mask(path, counts)
    x, dt, a, into = (along(path, saved[name]).float() for name in ("x", "dt", "a", "B"))
    sums = (a * real[..., None]).cumsum(1)
    left = (sums[:, -1:] - sums).exp() * dt * real[..., None]  # [b, M, H]
    into = into.repeat_interleave(x.size(2) // into.size(2), 2)
    new = torch.einsum("bmh,bmhp,bmhs->bhps", left, x, into)
    return new if state is None else sums[:, -1].exp()[..., None, None] * state + new


def whole(original, hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, **options):
    """Documents from their beginnings, by the model's own scan."""
    dt = step_sizes(dt, dt_bias, options.get("dt_softplus", False), options.get("dt_limit", (0.0, float("inf"))))
    outputs = original(hidden_states, dt, A, B, C, chunk_size=chunk_size, D=D)
    return outputs, {"x": hidden_states, "dt": dt, "sums": (dt * A.float()).cumsum(1), "B": B}


def behind(
    written,
    rows,
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size=None,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    **_,
):
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    sums = written["sums"][:, rows.at] + rows.own.float() @ (dt * A.float())
    before, after = torch.cat([written["sums"], sums], 1).transpose(1, 2), sums.transpose(1, 2)
    left = (after[..., :, None] - before[..., None, :]).masked_fill(~rows.seen[:, None], -torch.inf).exp()
    sources = torch.cat([written["x"].float() * written["dt"][..., None], hidden_states.float() * dt[..., None]], 1)
    into = torch.cat([written["B"], B], 1).float().transpose(1, 2)  # [1, G, T + Q, S]
    weights = (C.float().transpose(1, 2) @ into.mT)[:, :, None] * left.unflatten(1, (into.size(1), -1))
    outputs = (weights.flatten(1, 2) @ sources.transpose(1, 2)).transpose(1, 2)
    return outputs.contiguous() if D is None else outputs + D[:, None] * hidden_states.float()


SSD = Scan("mamba2_chunk_scan", chain, tree, commit, whole=whole, behind=behind)
