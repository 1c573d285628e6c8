"""Mamba-1 (Mamba, Falcon-Mamba, Jamba) over trees, one level after the other: S_i = exp(A dt_i) S_parent(i) + dt_i x_i
B_i^T, y_i = S_i C_i + D x_i, gated.

It decays by channel and state number, so that the decay between two nodes is no single number and no N x N form of
useful size exists. Shapes: b batch, T rows, I channels, S state numbers.
"""

import torch
import torch.nn.functional as F

from draftsmith.models.targets.recurrent.rows import Branches, Chain, along, path_mask
from draftsmith.models.targets.recurrent.scan import Scan

Rows = dict[str, torch.Tensor]  # x and dt [..., I], B and C [..., S] of rows


def inputs(hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **_) -> Rows:
    """The model's arguments, hidden_states and dt [b, I, T], B and C [b, S, T], by rows."""
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    return {name: y.transpose(1, 2) for name, y in (("x", hidden_states), ("dt", dt), ("B", B), ("C", C))}


def leaving(outputs, hidden_states, dt, A, B, C, D=None, z=None, **_) -> torch.Tensor:
    """outputs [b, T, I] -> what the model's own function returns, [b, I, T]."""
    outputs = outputs.transpose(1, 2)
    if D is not None:
        outputs = outputs + hidden_states * D[None, :, None]
    return outputs if z is None else outputs * F.silu(z)


def start(state, new: Rows, A) -> torch.Tensor:
    return A.new_zeros(len(new["x"]), *A.shape) if state is None else state


def step(state, new: Rows, A) -> torch.Tensor:
    """state [R, I, S] behind the parents of R rows -> behind the rows."""
    size = new["dt"][..., None]
    return (A * size).exp() * state + size * new["B"][:, None].float() * new["x"][..., None].float()


def read(state, new: Rows) -> torch.Tensor:
    return (state.to(new["C"].dtype) @ new["C"][..., None])[..., 0]


def chain(state, rows: Chain, _original, hidden_states, dt, A, *arguments, **options):
    """Row by row: the model's own scan takes no state to start from."""
    whole, outputs = inputs(hidden_states, dt, A, *arguments, **options), []
    state = start(state, whole, A)
    for place in range(rows.size):
        new = {name: value[:, place] for name, value in whole.items()}
        behind = step(state, new, A)
        outputs.append(read(behind, new))
        state = torch.where(rows.real[:, place, None, None], behind, state)
    return leaving(torch.stack(outputs, 1), hidden_states, dt, A, *arguments, **options), state


def tree(state, rows: Branches, hidden_states, dt, A, *arguments, **options):
    whole = inputs(hidden_states, dt, A, *arguments, **options)
    before = start(state, whole, A)
    states, outputs = before.new_empty(len(before), rows.size, *A.shape), torch.empty_like(whole["x"])
    for depth, (request, row, parent) in enumerate(rows.levels):
        new = {name: value[request, row] for name, value in whole.items()}
        behind = step(states[request, parent] if depth else before[request], new, A)
        states[request, row], outputs[request, row] = behind, read(behind, new).to(outputs.dtype)
    saved = {name: whole[name] for name in ("x", "dt", "B")} | {"A": A.expand(len(before), -1, -1)}
    return leaving(outputs, hidden_states, dt, A, *arguments, **options), saved


def commit(state, saved, path, counts):
    A, real = saved["A"][0], path_mask(path, counts)
    kept = {name: along(path, saved[name]) for name in ("x", "dt", "B")}
    state = start(state, kept, A)
    for place in range(path.size(1)):
        behind = step(state, {name: value[:, place] for name, value in kept.items()}, A)
        state = torch.where(real[:, place, None, None], behind, state)
    return state


SELECTIVE = Scan("mamba_selective_scan", chain, tree, commit, by_level=True)
