"""The scan of `ssd` over a tree as one Triton kernel: what the PyTorch form writes to memory between its steps, the N x
N decays and weights of every head, stays on the chip.

One program computes the outputs of one head of one request, for BP of its channels. Imported only where Triton is
there; `ssd` chooses by device.
"""

import torch
import triton
import triton.language as tl

LARGEST = 128  # nodes of a tree
CHANNELS, NUMBERS = 32, 32  # of a tile


@triton.jit
def kernel(
    x, dt, a, own, B, C, state, out, N, H, P, G, S,
    BEHIND: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0) // H, tl.program_id(0) % H
    group = head // (H // G)
    nodes, channels = tl.arange(0, BN), tl.program_id(1) * BP + tl.arange(0, BP)
    real, wide = nodes < N, channels < P
    row = request * N + nodes
    above = tl.load(own + row[:, None] * N + nodes[None, :], mask=real[:, None] & real[None, :], other=0) > 0
    step = tl.load(dt + row * H + head, mask=real, other=0.0)
    decay = tl.load(a + row * H + head, mask=real, other=0.0)
    sums = tl.sum(tl.where(above, decay[None, :], 0.0), 1)
    weights = tl.zeros((BN, BN), tl.float32)
    found = tl.zeros((BN, BP), tl.float32)
    for first in range(0, S, BS):
        numbers = first + tl.arange(0, BS)
        inside = real[:, None] & (numbers < S)[None, :]
        place = (row * G + group)[:, None] * S + numbers[None, :]
        outof = tl.load(C + place, mask=inside, other=0.0)
        into = tl.load(B + place, mask=inside, other=0.0)
        weights += tl.dot(outof, tl.trans(into), input_precision="ieee")
        if BEHIND:
            at = ((request * H + head) * P + channels)[None, :] * S + numbers[:, None]
            kept = tl.load(state + at, mask=(numbers < S)[:, None] & wide[None, :], other=0.0)
            found += tl.dot(outof, kept, input_precision="ieee")
    found *= tl.exp(sums)[:, None]
    left = tl.exp(tl.where(above, sums[:, None] - sums[None, :], float("-inf")))  # masked before exp
    held = real[:, None] & wide[None, :]
    place = (row * H + head)[:, None] * P + channels[None, :]
    values = tl.load(x + place, mask=held, other=0.0)
    found += tl.dot(weights * left * step[None, :], values, input_precision="ieee")
    tl.store(out + place, found, mask=held)


def scan(state, own, x, dt, A, B, C) -> torch.Tensor:
    """As `ssd.scan`, for trees of at most `LARGEST` nodes."""
    (batch, size, heads, width), (groups, numbers) = x.shape, B.shape[2:]
    x, dt, B, C = (y.float().contiguous() for y in (x, dt, B, C))
    a, out = dt * A.float(), torch.empty_like(x)
    kept = x if state is None else state.float().contiguous()
    grid = (batch * heads, triton.cdiv(width, CHANNELS))
    nodes = max(16, triton.next_power_of_2(size))
    kernel[grid](
        x, dt, a, own.to(torch.int8).contiguous(), B, C, kept, out, size, heads, width, groups, numbers,
        BEHIND=state is not None, BN=nodes, BP=CHANNELS, BS=NUMBERS,
    )  # fmt: skip
    return out
