"""Causal attention of some rows within packed documents, in memory linear in the length, with the log-sum-exp that
merging needs.

Three kernels, each a pair `forward(query, key, value, blocks, scale) -> out, lse` and
`backward(grad, query, key, value, out, lse, blocks, scale, d_key, d_value) -> d_query`, which adds to d_key and
d_value. query, out [P, H, D] and lse [P, H] are the rows that are trained on, ascending; key, value [T, H, D] (repeated
to the query heads) all rows. A caller that merges the result with other scores passes its merged `out` and `lse` to
`backward` and gets the gradients of this part of the merged attention exactly.
"""

import warnings
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from draftsmith.models.features import Packing

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class QueryBlock(NamedTuple):
    """Queries first .. last - 1 of P, which stand at rows at .. at + last - first - 1 of T; they see their document's
    rows from `start` up to their own. seen [last - first, keys] bool: which of the rows from `start` on each of them
    sees, where that is something else (a sliding window, or rows that are no unbroken run).
    """

    first: int
    last: int
    start: int
    at: int
    seen: torch.Tensor | None = None

    @property
    def stop(self) -> int:
        """Behind the last key."""
        return self.at + self.last - self.first if self.seen is None else self.start + self.seen.size(1)

    def visible(self, device: torch.device) -> torch.Tensor:
        """[last - first, keys] bool: which keys each query sees."""
        if self.seen is not None:
            return self.seen.to(device)
        keys = torch.arange(self.start, self.stop, device=device)
        return keys <= torch.arange(self.at, self.stop, device=device)[:, None]


MASKED = 256  # rows of a block whose keys are chosen by a mask, at most: it has a number for each pair
SHORT = 16  # rows of an unbroken run, on average, below which runs share a block


def query_blocks(packing: Packing, rows: torch.Tensor, block: int, window: int | None = None) -> list[QueryBlock]:
    """The rows that are trained on (`rows` [P] of the packed row, ascending, on the CPU) in blocks of at most `block`:
    unbroken runs, and where these are short (rows that were picked out) all rows of a document behind one another.
    window: how many rows up to its own a query sees; 0 = none, and no blocks.
    """
    if window == 0 or len(rows) == 0:
        return []
    starts = rows - packing.positions[rows]
    other, broken = starts.diff() != 0, rows.diff() != 1
    scattered = len(rows) < SHORT * int((other | broken).sum())
    breaks = (other if scattered else other | broken).nonzero().flatten() + 1
    borders, blocks = sorted({0, *breaks.tolist(), len(rows)}), []
    block = min(block, MASKED) if scattered or window is not None else block
    for first, last in zip(borders, borders[1:]):
        for i in range(first, last, block):
            own, start = rows[i : min(i + block, last)], int(starts[first])
            low, stop = (start, own + 1) if window is None else (max(start, int(own[0]) - window + 1), own + 1)
            cut = window is not None and int(own[-1]) - window + 1 > low
            seen = None
            if cut or int(own[-1]) - int(own[0]) + 1 != len(own):
                keys = torch.arange(low, int(own[-1]) + 1)
                seen = keys < stop[:, None]
                seen &= keys >= (stop - window)[:, None] if cut else True
            blocks.append(QueryBlock(i, i + len(own), low, int(own[0]), seen))
    return blocks


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, H, ...] -> [1, H, T, ...]."""
    return x.transpose(0, 1)[None]


class FlashOnCPU:
    """torch's flash kernel for CPUs. It computes whole blocks of 512 keys, so that a block's keys are given in two
    pieces: those before the block, seen by all its rows, and the block's own, seen causally.
    """

    block = 128

    @staticmethod
    def _pieces(block: QueryBlock):
        """(first key, last key, causal)."""
        return [(block.at, block.stop, True)] + [(block.start, block.at, False)] * (block.at > block.start)

    @staticmethod
    def _mask(block: QueryBlock, like: torch.Tensor) -> torch.Tensor:
        """[queries, keys]: what is added to the scores of a block that is not plainly causal."""
        return torch.zeros_like(block.seen, dtype=like.dtype).masked_fill_(~block.seen, float("-inf"))

    @classmethod
    def forward(cls, query, key, value, blocks, scale):
        out, lse = (
            torch.empty_like(query),
            query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32)),
        )
        query, key, value, whole, total = (_heads_first(x) for x in (query, key, value, out, lse))
        for block in blocks:
            mine = slice(block.first, block.last)
            if block.seen is not None:
                keys = slice(block.start, block.stop)
                whole[:, :, mine], total[:, :, mine] = _flash(
                    query[:, :, mine],
                    key[:, :, keys],
                    value[:, :, keys],
                    0.0,
                    False,
                    attn_mask=cls._mask(block, query),
                    scale=scale,
                )
                continue
            found = [
                _flash(query[:, :, mine], key[:, :, a:b], value[:, :, a:b], 0.0, causal, scale=scale)
                for a, b, causal in cls._pieces(block)
            ]
            o, s = found[0]
            if len(found) == 2:
                both = torch.logaddexp(s, found[1][1])
                o = o.mul_((s - both).exp_()[..., None]).addcmul_(
                    found[1][0], (found[1][1] - both).exp_()[..., None].to(o.dtype)
                )
                s = both
            whole[:, :, mine], total[:, :, mine] = o, s
        return out, lse

    @classmethod
    def backward(cls, grad, query, key, value, out, lse, blocks, scale, d_key, d_value):
        d_query = torch.zeros_like(query)
        sums = [_heads_first(x) for x in (d_query, d_key, d_value)]
        grad, query, key, value, out, lse = (_heads_first(x) for x in (grad, query, key, value, out, lse))
        for block in blocks:
            mine = slice(block.first, block.last)
            d, q, o, s = grad[:, :, mine], query[:, :, mine], out[:, :, mine], lse[:, :, mine].contiguous()
            plain = block.seen is None
            mask = None if plain else cls._mask(block, query)
            for a, b, causal in cls._pieces(block) if plain else [(block.start, block.stop, False)]:
                parts = _flash_backward(
                    d, q, key[:, :, a:b], value[:, :, a:b], o, s, 0.0, causal, attn_mask=mask, scale=scale
                )
                for total, part, place in zip(sums, parts, (mine, slice(a, b), slice(a, b))):
                    total[:, :, place].add_(part)
        return d_query


class BlockwiseAttention:
    """The same in plain operations, for any device: the scores of one block at a time."""

    block = 256

    @staticmethod
    def _scores(query, key, block, scale):
        """[H, rows, keys] fp32 or better, -inf where a row must not see a key."""
        scores = torch.einsum("qhd,khd->hqk", query[block.first : block.last], key[block.start : block.stop])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        return scores.masked_fill_(~block.visible(query.device), float("-inf"))

    @classmethod
    def forward(cls, query, key, value, blocks, scale):
        out, lse = (
            torch.empty_like(query),
            query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32)),
        )
        for block in blocks:
            scores, mine = cls._scores(query, key, block, scale), slice(block.first, block.last)
            total = scores.logsumexp(-1)
            lse[mine] = total.T
            out[mine] = torch.einsum(
                "hqk,khd->qhd", (scores - total[..., None]).exp().to(value.dtype), value[block.start : block.stop]
            )
        return out, lse

    @classmethod
    def backward(cls, grad, query, key, value, out, lse, blocks, scale, d_key, d_value):
        d_query = torch.zeros_like(query)
        for block in blocks:
            mine, seen = slice(block.first, block.last), slice(block.start, block.stop)
            weights = (cls._scores(query, key, block, scale) - lse[mine].T[..., None]).exp()
            pull = torch.einsum("qhd,khd->hqk", grad[mine], value[seen])
            delta = torch.linalg.vecdot(grad[mine], out[mine]).T[..., None]
            slope = (weights * (pull - delta) * scale).to(query.dtype)
            d_query[mine] = torch.einsum("hqk,khd->qhd", slope, key[seen])
            d_key[seen] += torch.einsum("hqk,qhd->khd", slope, query[mine])
            d_value[seen] += torch.einsum("hqk,qhd->khd", weights.to(grad.dtype), grad[mine])
        return d_query


class Ragged(NamedTuple):
    """Blocks as sequences of a ragged batch, one behind the other. queries, keys [n + 1] int32: their borders; longest:
    (queries, keys) of any; sources [N]: which rows of T the keys are; number, place [P]: whose query each one is, and
    the how manieth.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest: tuple[int, int]
    sources: torch.Tensor
    number: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, blocks: tuple[QueryBlock, ...], device: torch.device) -> "Ragged":
        counts = torch.tensor([(b.last - b.first, b.stop - b.start) for b in blocks])
        borders = torch.nn.functional.pad(counts.cumsum(0), (0, 0, 1, 0)).int()
        sources = torch.cat([torch.arange(b.start, b.stop) for b in blocks])
        number = torch.arange(len(blocks)).repeat_interleave(counts[:, 0])
        place = torch.cat([torch.arange(b.last - b.first) for b in blocks])
        queries, keys = borders.T.contiguous().to(device)
        longest = tuple(counts.amax(0).tolist())
        return cls(queries, keys, longest, *(x.to(device) for x in (sources, number, place)))


class RaggedOnCUDA:
    """torch's memory-efficient kernel for ragged batches: all documents in one call, in fp32, bf16 or fp16. Queries
    stand at the end of their keys, which is what its causal mask from the bottom right means; blocks that are not
    plainly causal are left to plain operations.
    """

    block = 2**31  # one block for each run
    aligned = 32  # the kernel pads log-sum-exps to a multiple of this
    bottom_right = 2
    run = staticmethod(lambda *inputs, **options: torch.ops.aten._efficient_attention_forward(*inputs, **options))
    run_back = staticmethod(lambda *inputs, **options: torch.ops.aten._efficient_attention_backward(*inputs, **options))
    ragged = staticmethod(lru_cache(4)(Ragged.of))

    @classmethod
    def forward(cls, query, key, value, blocks, scale):
        if not blocks:
            return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        if any(block.seen is not None for block in blocks):
            return BlockwiseAttention.forward(query, key, value, blocks, scale)
        batch = cls.ragged(tuple(blocks), query.device)
        inputs = (query[None], key[batch.sources][None], value[batch.sources][None], None, batch.queries, batch.keys)
        out, lse, *_ = cls.run(*inputs, *batch.longest, 0.0, cls.bottom_right, True, scale=scale)
        return out[0], lse[batch.number, :, batch.place]

    @classmethod
    def backward(cls, grad, query, key, value, out, lse, blocks, scale, d_key, d_value):
        if not blocks:
            return torch.zeros_like(query)
        if any(block.seen is not None for block in blocks):
            return BlockwiseAttention.backward(grad, query, key, value, out, lse, blocks, scale, d_key, d_value)
        batch, none = cls.ragged(tuple(blocks), query.device), torch.zeros((), dtype=torch.int64, device=query.device)
        padded = -(-batch.longest[0] // cls.aligned) * cls.aligned
        sums = lse.new_full((len(blocks), lse.size(1), padded), float("inf"))  # nothing is seen from a padded row
        sums[batch.number, :, batch.place] = lse
        states = (x[None] for x in (grad, query, key[batch.sources], value[batch.sources]))
        inputs = (*states, None, out[None], batch.queries, batch.keys, *batch.longest, sums, 0.0, none, none)
        d_query, *parts, _ = cls.run_back(*inputs, cls.bottom_right, False, scale=scale)
        for total, part in zip((d_key, d_value), parts):
            total.index_add_(0, batch.sources, part[0])
        return d_query[0]


@torch.no_grad()
def disagreement(kernel, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference, relative to the largest number, between a kernel in this dtype and `BlockwiseAttention`
    in fp32: outputs, log-sum-exps and gradients of two documents, one with two runs of queries.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(count, 2, 64, generator=generator).to(device, dtype)  # noqa: E731
    states, results = (draw(75), draw(75), draw(90), draw(90)), []
    blocks = [QueryBlock(0, 5, 0, 3), QueryBlock(5, 35, 0, 10), QueryBlock(35, 75, 44, 50)]
    for each in (kernel, BlockwiseAttention):
        query, grad, key, value = states if each is kernel else (x.float() for x in states)
        out, lse = each.forward(query, key, value, blocks, 0.125)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        d_query = each.backward(grad, query, key, value, out, lse, blocks, 0.125, d_key, d_value)
        results.append((out, lse, d_query, d_key, d_value))
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(*results))


@cache
def kernel_for(device: torch.device):
    """The attention kernel of a device. The ragged one is tried once: where it cannot run, or says something else, one
    warning is given and plain operations take its place.
    """
    if device.type != "cuda":
        return FlashOnCPU if device.type == "cpu" else BlockwiseAttention
    try:
        found = disagreement(RaggedOnCUDA, device)
        reason = None if found < 1e-2 else f"it differs by {found:.2g} from plain operations"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        warnings.warn(f"training attends in plain operations, which are slow: {reason}", stacklevel=2)
    return BlockwiseAttention if reason else RaggedOnCUDA


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, keys, values, blocks, kernel, scale):
        group = (keys.size(2), query.size(1) // keys.size(2))
        out, lse = kernel.forward(query, key, value, blocks, scale)
        scores = (
            torch.linalg.vecdot(query.unflatten(1, group), keys[:, :, :, None]).flatten(2).mul_(scale).to(lse.dtype)
        )
        scores = torch.cat([lse[None], scores])
        lse = scores.logsumexp(0)
        weights = scores.sub_(lse).exp_().to(query.dtype)[..., None]
        out = out.mul_(weights[0])
        for weight, v in zip(weights[1:], values):
            out.unflatten(1, group).addcmul_(weight.unflatten(1, group), v[:, :, None])
        ctx.save_for_backward(query, key, value, keys, values, weights, out, lse)
        ctx.arguments = blocks, kernel, scale, group
        return out

    @staticmethod
    def backward(ctx, grad):
        (query, key, value, keys, values, weights, out, lse), (blocks, kernel, scale, group) = (
            ctx.saved_tensors,
            ctx.arguments,
        )
        grad, d_key, d_value = grad.contiguous(), torch.zeros_like(key), torch.zeros_like(value)
        d_query = kernel.backward(grad, query, key, value, out, lse, blocks, scale, d_key, d_value)
        grouped, pulled, shares = query.unflatten(1, group), grad.unflatten(1, group), weights[1:].unflatten(2, group)
        delta = torch.linalg.vecdot(pulled, out.unflatten(1, group))
        slopes = (torch.linalg.vecdot(pulled, values[:, :, :, None]) - delta).mul_(scale)[..., None] * shares
        d_query.unflatten(1, group).add_((slopes * keys[:, :, :, None]).sum(0))
        return d_query, d_key, d_value, (slopes * grouped).sum(3), (shares * pulled).sum(3), None, None, None


def merged_attention(query, key, value, keys, values, blocks: list[QueryBlock], kernel, scale: float) -> torch.Tensor:
    """Attention [P, H, D] of the rows that are trained on over their documents' rows (query [P, H, D]; key, value [T,
    H, D]) and over n more keys that each row alone sees (keys, values [n, P, H_kv, D]); one softmax over both,
    differentiable in all five.
    """
    return _Merged.apply(query, key, value, keys, values, blocks, kernel, scale)
