"""Passes of static shapes, captured once as CUDA graphs and replayed, so that no Python stands between their kernels.

A graph holds on to addresses: of the model's weights, of its inputs (buffers of its own, which every replay fills) and
of the cache it writes to. Graphs are therefore kept on the cache, and caches outlive their requests (`Spare`).

The first call of each shape runs eagerly too and compares: where a graph cannot be captured or gives other figures, one
line says so and everything is eager from then on. Without CUDA nothing is captured and a replay is a call, which is how
tests see the static shapes; there they are off unless switched on.
"""

import logging
import weakref
from collections.abc import Callable

import torch

from draftsmith.models.slots import SlotCache

KEPT = 2  # spare caches: they hold memory
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest figure; 16-bit dtypes: 0.05
STEP = 256  # of how many slots a pass reads
Run = Callable[..., tuple[torch.Tensor, ...]]


class Spare:
    """Caches whose requests have ended, for the next ones."""

    def __init__(self):
        self.caches: list[SlotCache] = []

    def take(self, owner, layers: int, batch: int, heads: int, capacity: int, width: int, dtype, device) -> SlotCache:
        """A cache as `SlotCache` makes it, with at least this room, until `owner` is gone."""
        for cache in self.caches:
            (double, rows, *shape, slots, _), inference = cache.whole.shape, torch.is_inference_mode_enabled()
            fits = (double, *shape, cache.whole.size(-1)) == (2 * layers, heads, width)
            if fits and rows >= batch and slots >= capacity and cache.whole.is_inference() == inference:
                self.caches.remove(cache)
                cache.reset(batch)
                break
        else:
            cache = SlotCache(layers, batch, heads, bucket(capacity, STEP), width, dtype, device)
        weakref.finalize(owner, self.give, cache).atexit = False
        return cache

    def give(self, cache: SlotCache) -> None:
        self.caches = [*self.caches, cache][-KEPT:]


class Graphs:
    """The graphs of one model on a device. on: whether passes are captured."""

    def __init__(self, device: torch.device):
        self.on, self.spare = device.type == "cuda", Spare()

    def __call__(self, cache: SlotCache, key: tuple, run: Run, eager: Run, inputs: dict[str, torch.Tensor]):
        """What run(**inputs) gives for static shapes that `key` names, behind `cache`; None where it cannot be had so.
        eager(): the same from the usual pass, for the first time of a shape; what it leaves in the cache is overwritten
        with the same.
        """
        if (captured := cache.graphs.get(key)) is None:
            expected = eager()
            try:
                captured = Captured(run, inputs)
                found = captured(inputs)
                why = None if agree(found, expected) else "its figures differ from those of the usual pass"
            except RuntimeError as error:
                why = str(error).splitlines()[0][:200]
            if why is not None:
                self.on = False
                logging.getLogger("draftsmith").warning("no CUDA graphs, all passes are eager: %s", why)
                return None
            cache.graphs[key] = captured
            return found
        return captured(inputs)


class Captured:
    """run(**inputs) for inputs of these shapes. What a call returns is the caller's own."""

    def __init__(self, run: Run, inputs: dict[str, torch.Tensor]):
        self.run, self.inputs, self.graph = run, {name: x.clone() for name, x in inputs.items()}, None
        if next(iter(inputs.values())).device.type == "cuda":
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run(**self.inputs)  # libraries make their workspaces, which a capture must not
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = run(**self.inputs)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for name, buffer in self.inputs.items():
            buffer.copy_(inputs[name])
        if self.graph is None:
            return self.run(**self.inputs)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


def agree(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether real figures agree as far as their dtype lets kernels differ; `expected` may be the beginning of what was
    `found`, in any dimension. Whole numbers are not compared: ties between drafts break either way.
    """
    for one, other in zip(found, expected, strict=True):
        if other.is_floating_point() and other.numel():
            one = one[tuple(slice(size) for size in other.shape)]
            most = TOLERANCE.get(other.dtype, 0.05) * other.float().abs().max()
            if not bool((one.float() - other.float()).abs().max() <= most):
                return False
    return True


def bucket(count: int, step: int) -> int:
    """`count` rounded up, by at most a quarter or to a multiple of `step`, so that few shapes serve all counts."""
    coarse = max(step, 1 << max(0, count.bit_length() - 3))
    return -(-count // coarse) * coarse
