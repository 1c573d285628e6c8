"""The gated delta rule over trees (Qwen3-Next, Qwen3.5, OLMo-Hybrid): S_i = exp(g_i) S_parent(i) + k_i u_i^T with u_i =
beta_i (v_i - (exp(g_i) S_parent(i))^T k_i), o_i = S_i^T q_i.

It is linear in S, so that a tree has a closed form as a chain has. With c_i the sum of g along the path to i and
L[i, j] = exp(c_i - c_j) where j is i or above it:

    (I + diag(beta) (K K^T * L without its diagonal)) U = diag(beta) (V - diag(exp(c)) K S_0)
    O = diag(exp(c)) Q S_0 + (Q K^T * L) U

The system is unit lower-triangular, since ancestors stand before descendants. A u depends on its own path alone: those
of an accepted path make the new state, exp(c_end) S_0 + sum of exp(c_end - c_l) k_l u_l^T. Shapes: b batch, N rows, H
value heads, H_k key heads of width D, values of width E.
"""

import torch

from draftsmith.models.targets.recurrent.rows import Branches, Chain, along, decay, path_mask
from draftsmith.models.targets.recurrent.scan import Scan, short_chunk


def chain(state, rows: Chain, original, query, key, value, g, beta, chunk_size=64, **options):
    """The model's own scan. A padding row decays nothing and writes nothing."""
    real = rows.real[..., None]
    return original(
        query,
        key,
        value,
        g=g * real,
        beta=beta * real,
        chunk_size=short_chunk(chunk_size, rows.size),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=options.get("use_qk_l2norm_in_kernel", False),
    )


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def tree(state, rows: Branches, query, key, value, g, beta, use_qk_l2norm_in_kernel=False, **_):
    """query and key [b, N, H_k, D], value [b, N, H, E], g and beta [b, N, H] -> ([b, N, H, E], saved)."""
    shared = value.size(2) // key.size(2)
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    if use_qk_l2norm_in_kernel:
        q, k = normalised(q), normalised(k)
    q, k = (x.repeat_interleave(shared, 1) for x in (q * q.size(-1) ** -0.5, k))
    sums = (rows.reach @ g.float()).transpose(1, 2)  # [b, H, N]
    left, size = decay(sums, rows.own), beta.float().transpose(1, 2)[..., None]
    wanted = v if state is None else v - sums.exp()[..., None] * (k @ state)
    # The solver reads below the diagonal alone.
    u = torch.linalg.solve_triangular(size * (k @ k.mT) * left, size * wanted, upper=False, unitriangular=True)
    outputs = (q @ k.mT * left) @ u
    if state is not None:
        outputs = outputs + sums.exp()[..., None] * (q @ state)
    saved = {"k": k.transpose(1, 2), "u": u.transpose(1, 2), "g": g.float()}
    return outputs.transpose(1, 2).contiguous().to(query.dtype), saved


def commit(state, saved, path, counts):
    real = path_mask(path, counts)[..., None]
    k, u, g = (along(path, saved[name]) for name in ("k", "u", "g"))
    sums = (g * real).cumsum(1)
    new = torch.einsum("bmh,bmhd,bmhe->bhde", (sums[:, -1:] - sums).exp() * real, k, u)
    return new if state is None else sums[:, -1].exp()[..., None, None] * state + new


DELTA = Scan("torch_chunk_gated_delta_rule", chain, tree, commit)
