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

PIECE = 64  # rows of documents computed at a time


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


def heads(query, key, value, use_qk_l2norm_in_kernel: bool):
    """Queries and keys [b, H, N, D], values [b, H, N, E], fp32, as the recurrence has them."""
    shared = value.size(2) // key.size(2)
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    if use_qk_l2norm_in_kernel:
        q, k = normalised(q), normalised(k)
    return (q * q.size(-1) ** -0.5).repeat_interleave(shared, 1), k.repeat_interleave(shared, 1), v


def tree(state, rows: Branches, query, key, value, g, beta, use_qk_l2norm_in_kernel=False, **_):
    """query and key [b, N, H_k, D], value [b, N, H, E], g and beta [b, N, H] -> ([b, N, H, E], saved)."""
    q, k, v = heads(query, key, value, use_qk_l2norm_in_kernel)
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


def whole(_original, query, key, value, g, beta, **options):
    """Documents from their beginnings, in pieces of so many rows: what each row wrote is asked for as well."""
    state, outputs, written = None, [], []
    for parts in zip(*(x.split(PIECE, 1) for x in (query, key, value, g, beta))):
        size, every = parts[0].size(1), torch.arange(parts[0].size(1), device=g.device).expand(len(g), -1)
        causal = torch.ones(size, size, dtype=torch.bool, device=g.device).tril().expand(len(g), -1, -1)
        found, saved = tree(state, Branches(causal), *parts, **options)
        state = commit(state, saved, every, torch.full_like(every[:, 0], size))
        outputs.append(found)
        written.append(saved)
    joined = {name: torch.cat([saved[name] for saved in written], 1) for name in ("k", "u", "g")}
    return torch.cat(outputs, 1), {"k": joined["k"], "u": joined["u"], "sums": joined["g"].cumsum(1)}


def behind(written, rows, query, key, value, g, beta, use_qk_l2norm_in_kernel=False, **_):
    q, k, v = heads(query, key, value, use_qk_l2norm_in_kernel)
    sums = (written["sums"][:, rows.at] + rows.own.float() @ g.float()).transpose(1, 2)  # [1, H, Q]
    size, left = beta.float().transpose(1, 2)[..., None], decay(sums, rows.own[None])
    kept = (sums[..., :, None] - written["sums"].transpose(1, 2)[..., None, :]).masked_fill(~rows.before, -torch.inf)
    keys, u_kept, kept = written["k"].transpose(1, 2), written["u"].transpose(1, 2), kept.exp()
    wanted = size * (v - (k @ keys.mT * kept) @ u_kept)
    u = torch.linalg.solve_triangular(size * (k @ k.mT) * left, wanted, upper=False, unitriangular=True)
    outputs = (q @ keys.mT * kept) @ u_kept + (q @ k.mT * left) @ u
    return outputs.transpose(1, 2).contiguous().to(query.dtype)


DELTA = Scan("torch_chunk_gated_delta_rule", chain, tree, commit, whole=whole, behind=behind)
