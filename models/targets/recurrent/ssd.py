"""Mamba-2 (state space duality) over trees: S_i = exp(a_i) S_parent(i) + dt_i x_i B_i^T with a_i = dt_i A, y_i = S_i
C_i + D x_i.

With c_i the sum of a along the path to i, all nodes are computed at once (STree, arXiv 2505.14969, section 4):

    y_i = exp(c_i) S_0 C_i + sum over ancestors j of exp(c_i - c_j) (C_i . B_j) dt_j x_j + D x_i

and the state behind a path is exp(c_end) S_0 + sum of exp(c_end - c_l) dt_l x_l B_l^T. For a chain this is the diagonal
block of the usual chunked form. Shapes: b batch, N rows, H heads of width P, G groups of S state numbers.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

from draftsmith.models.targets.recurrent.rows import Branches, Chain, along, decay, path_mask
from draftsmith.models.targets.recurrent.scan import Scan, short_chunk


class Inputs(NamedTuple):
    """What a layer hands to its scan: x [b, N, H, P]; dt [b, N, H] fp32, the step sizes; A [H]; B and C [b, N, G, S]; D
    [H] or None.
    """

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    chunk_size: int | None

    @classmethod
    def of(
        cls,
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
    ) -> "Inputs":
        """From the arguments of the model's own function. Step sizes are rounded where the model rounds: bias and
        softplus in its own dtype.
        """
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        return cls(hidden_states, dt.clamp(*dt_limit).float(), A, B, C, D, chunk_size)

    @property
    def a(self) -> torch.Tensor:
        """[b, N, H] fp32: logarithms of the decays."""
        return self.dt * self.A.float()

    def leaving(self, outputs: torch.Tensor) -> torch.Tensor:
        """outputs [b, N, H, P] of the states, and D x beside them."""
        return outputs if self.D is None else outputs + self.D[:, None] * self.x.float()


def chain(state, rows: Chain, original, *arguments, **options):
    """The model's own scan. A padding row has a step of 0, which leaves the state as it is."""
    x, dt, A, B, C, D, chunk_size = Inputs.of(*arguments, **options)
    return original(
        x,
        dt * rows.real[..., None],
        A,
        B,
        C,
        chunk_size=short_chunk(chunk_size, rows.size),
        D=D,
        initial_states=state,
        return_final_states=True,
    )


def tree(state, rows: Branches, *arguments, **options):
    """-> ([b, N, H, P] fp32, saved)."""
    new = Inputs.of(*arguments, **options)
    outputs = scan_on(new.x.device, rows.size)(state, rows.own, new.x, new.dt, new.A, new.B, new.C)
    return new.leaving(outputs), {"x": new.x, "dt": new.dt, "a": new.a, "B": new.B}


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


def whole(original, *arguments, **options):
    """Documents from their beginnings, by the model's own scan."""
    new = Inputs.of(*arguments, **options)
    outputs = original(new.x, new.dt, new.A, new.B, new.C, chunk_size=new.chunk_size, D=new.D)
    return outputs, {"x": new.x, "dt": new.dt, "sums": new.a.cumsum(1), "B": new.B}


def behind(written, rows, *arguments, **options):
    new = Inputs.of(*arguments, **options)
    sums = written["sums"][:, rows.at] + rows.own.float() @ new.a
    before, after = torch.cat([written["sums"], sums], 1).transpose(1, 2), sums.transpose(1, 2)
    left = (after[..., :, None] - before[..., None, :]).masked_fill(~rows.seen[:, None], -torch.inf).exp()
    sources = torch.cat([written["x"].float() * written["dt"][..., None], new.x.float() * new.dt[..., None]], 1)
    into = torch.cat([written["B"], new.B], 1).float().transpose(1, 2)  # [1, G, T + Q, S]
    weights = (new.C.float().transpose(1, 2) @ into.mT)[:, :, None] * left.unflatten(1, (into.size(1), -1))
    outputs = (weights.flatten(1, 2) @ sources.transpose(1, 2)).transpose(1, 2)
    return new.leaving(outputs.contiguous())


SSD = Scan("mamba2_chunk_scan", chain, tree, commit, whole=whole, behind=behind)
