"""Cheaper copies of a target, as middle models of a cascade: some of its layers skipped, or its matrices in 8 bits.

They share all weights that they do not change with the target, and its tokenizer. A drafter of the target can draft for
them: taps keep their numbers.
"""

import copy
import time
import warnings

import torch
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.prepacked import use_plain
from draftsmith.models.targets.text import TextTarget
from draftsmith.models.tree import DraftTree

REPEATS, TIMED_ROWS, CONTEXT = 15, 4, 64  # of a comparison


class Skipped(nn.Module):
    """In the place of a layer: hands its input on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name in ("attention_type", "layer_type"):  # which of several masks the body picks
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def shared_copy(target: TextTarget, layers=lambda layers: layers, label: str = "") -> TextTarget:
    """A second target over the same weights, with other `layers`. Raises UserError for targets that see, and for
    partitioned weights.
    """
    if target.vision is not None or target.sharded is not None:
        raise UserError(f"{label}: found {target.name}, expected a target of text alone whose weights are whole")
    same = {id(tensor): tensor for tensor in (*target.model.parameters(), *target.model.buffers())}
    model = copy.deepcopy(target.model, same)
    body = model.get_decoder()
    for layer in body.layers:
        layer._forward_pre_hooks.clear()  # they tell the target's own taps
    body.layers = nn.ModuleList(layers(list(body.layers)))
    return TextTarget(model, f"{target.name} {label}")


def skipping(target: TextTarget, every: int) -> TextTarget:
    """The target without its layers every, 2 every, ... (counted from 1), the last one excepted. Raises UserError where
    none or all but the last would be skipped.
    """
    count = target.layers
    if not 2 <= every < count:
        raise UserError(f"skip: found {every}, expected 2 to {count - 1}: {target.name} has {count} layers")
    gone = set(range(every - 1, count - 1, every))

    def chosen(layers):
        return [Skipped(layer) if i in gone else layer for i, layer in enumerate(layers)]

    return shared_copy(target, chosen, f"skip:{every}")


def quantised(target: TextTarget) -> TextTarget:
    """The matrices of the target's layers in int8, activations quantised as they come (torch's dynamic quantisation; on
    a CPU). Raises UserError where that is not faster here, with the times, and on other devices.
    """
    if target.device.type != "cpu":
        raise UserError(f"int8: found {target.device}, expected a CPU, which alone has the kernels")
    copied = shared_copy(target, label="int8")
    body = copied.body
    use_plain(body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of its quantised tensors
        body.layers = torch.ao.quantization.quantize_dynamic(body.layers, {nn.Linear}, torch.qint8)
    found = TextTarget(copied.model, copied.name)  # checked anew
    own, cheaper = seconds_per_pass([target, found], TIMED_ROWS)
    if cheaper >= own:
        raise UserError(
            f"int8: found {1e3 * cheaper:.2f} ms for a pass of {TIMED_ROWS} rows, expected less than the "
            f"{1e3 * own:.2f} ms of {target.name} itself: it does not pay on this machine"
        )
    return found


@torch.inference_mode()
def seconds_per_pass(targets: list[TextTarget], rows: int) -> list[float]:
    """Seconds of a verify pass of `rows` rows behind `CONTEXT` rows, of each target, interleaved. Lower quartiles, on a
    CPU with one thread of this thread's own seconds: other work on the machine only makes passes longer.
    """
    clock = time.thread_time if targets[0].device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = (lambda: torch.cuda.synchronize()) if targets[0].device.type == "cuda" else (lambda: None)
    sessions, found = [], [[] for _ in targets]
    for target in targets:
        session = target.open(FeatureSpec(taps=()), 1, CONTEXT + rows + 1)
        session.prefill([[i % target.vocab_size for i in range(1, CONTEXT + 1)]])
        sessions.append(session)
    for repeat in range(REPEATS + 2):
        for times, target, session in zip(found, targets, sessions):
            tokens = torch.arange(1, rows + 1, device=target.device)[None] % target.vocab_size
            tree = DraftTree.of(tokens, torch.arange(-1, rows - 1, device=target.device)[None])
            wait()
            start = clock()
            session.verify(tree)
            wait()
            if repeat > 1:
                times.append(clock() - start)
    return [sorted(times)[len(times) // 4] for times in found]
