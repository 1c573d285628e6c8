"""The recurrent layers of a model, and how their forward is led to the states of a session.

Every such layer of transformers hands its inputs to the cache, calls one function for the causal convolution and one
for the scan, and does everything else itself. Each layer gets its own forward again with these two names standing for
functions of ours. Without a session, in front of any other cache, they call what stood there before.
"""

import inspect
from types import FunctionType, MethodType

import torch.nn.functional as F

from draftsmith.models.errors import UserError
from draftsmith.models.targets.recurrent.delta import DELTA
from draftsmith.models.targets.recurrent.levels import SELECTIVE
from draftsmith.models.targets.recurrent.scan import Scan
from draftsmith.models.targets.recurrent.ssd import SSD

CONVOLUTION = "causal_conv1d_fn"
SCANS = {scan.function: scan for scan in (SSD, DELTA, SELECTIVE)}
STATES = ("update_conv_state", "update_recurrent_state", "get_linear_cache")  # what layers ask caches of theirs


class Mixer:
    """One recurrent layer. name: of its class. scan: None where it has a convolution alone. kept: what a session, or a
    packed row, has of this layer while the layer runs in front of it, else None.
    """

    def __init__(self, module, scan: Scan | None):
        from transformers.activations import ACT2FN  # there is a model: the library's code for models is loaded

        self.name, self.scan, self.kept, self.activations = type(module).__name__, scan, None, ACT2FN
        own = inspect.unwrap(type(module).forward)
        self.originals = {name: own.__globals__[name] for name in (CONVOLUTION, scan and scan.function) if name}
        names = {CONVOLUTION: self.convolve} | ({scan.function: self.mix} if scan else {})
        led = FunctionType(own.__code__, own.__globals__ | names, own.__name__, own.__defaults__, own.__closure__)
        led.__kwdefaults__ = own.__kwdefaults__

        def forward(module, *arguments, **options):
            try:
                return led(module, *arguments, **options)
            finally:
                self.kept = None

        module.forward = MethodType(forward, module)

    def convolve(self, hidden_states, weight, bias=None, activation=None, **options):
        """hidden_states [B, C, T], weight [C, W] -> [B, C, T]."""
        if self.kept is None:
            return self.originals[CONVOLUTION](hidden_states, weight, bias, activation=activation, **options)
        window = self.kept.window(hidden_states, weight.size(1))
        found = F.conv1d(
            window.values.to(weight.dtype), weight[:, None], bias, stride=window.stride, groups=len(weight)
        )
        return (found if activation is None else self.activations[activation](found)).to(hidden_states.dtype)

    def mix(self, *arguments, **options):
        if self.kept is None:
            return self.originals[self.scan.function](*arguments, **options)
        # What follows the rows is the session's: the layer hands None on to the cache.
        return self.kept.mix(self.scan, self.originals[self.scan.function], *arguments, **options), None


class Led:
    """What recurrent layers ask of a cache with `mixers` and what is `kept` of each, by their index. They never see a
    state: their convolutions and scans read and write it themselves.
    """

    def update_conv_state(self, conv_states, layer_idx, state_idx=0, **options):
        self.mixers[layer_idx].kept = self.kept[layer_idx]
        return conv_states

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **options):
        return recurrent_states

    def get_conv_state(self, layer_idx, state_idx=0):
        return None

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return None

    def is_recording_past(self, layer_idx) -> bool:
        return True


def mixers_of(model, name: str, family: str) -> dict[int, Mixer]:
    """The recurrent layers of a model, by the index of their layer; {} for a model of attention alone. Raises
    UserError, which names the target and its family, for layers of another make.
    """
    found = {}
    for module in model.modules():
        own = inspect.unwrap(type(module).forward)
        called = getattr(getattr(own, "__code__", None), "co_names", ())
        if not any(state in called for state in STATES):
            continue
        scans = [SCANS[function] for function in SCANS if function in called]
        if CONVOLUTION not in called or ("update_recurrent_state" in called) != (len(scans) == 1):
            raise UserError(
                f"target {name}: {family} is not supported: found {type(module).__name__}, a layer with a state, "
                f"expected one that calls {CONVOLUTION} and one of {', '.join(SCANS)}"
            )
        found[module.layer_idx] = Mixer(module, scans[0] if scans else None)
    return found
