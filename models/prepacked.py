"""Products of a few rows with frozen matrices on a CPU.

torch rearranges a matrix for the processor at every product; for the few rows of a draft tree that costs more than the
product itself. oneDNN can rearrange it once ("prepacking"), which takes as much memory again as the matrix.
"""

import os

import torch
from torch import nn
from torch.nn.functional import linear

MOST_ROWS = 64  # of a product; with more of them rearranging hardly counts
FEWEST_ROWS = {torch.float32: 4, torch.bfloat16: 1}  # with fewer, torch's product does not rearrange
# Numbers in a matrix; in fp32 smaller ones stay in the processor's cache, and calling oneDNN costs more than it saves.
SMALLEST = {torch.float32: 2**17, torch.bfloat16: 1}
SHARE = 0.25  # of the machine's memory that the second copies may take together


class PrepackedLinear(nn.Linear):
    """A linear layer whose matrix is prepacked when it first meets a few rows, and again whenever it has changed (also
    by an optimizer, but not by what hides from torch's counts of changes, as `weight.data.copy_` and all that happens
    to tensors made in inference mode).
    """

    packed = None  # (what of the matrix it was made from, the prepacked matrix)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.numel() // self.in_features
        if torch.is_grad_enabled() or not FEWEST_ROWS[self.weight.dtype] <= count <= MOST_ROWS:
            return linear(rows, self.weight, self.bias)
        state = self.weight.data_ptr(), None if self.weight.is_inference() else self.weight._version
        if self.packed is None or self.packed[0] != state:
            self.packed = state, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), MOST_ROWS)
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed[1], self.bias, "none", [], "")

    def __getstate__(self):
        """Without the prepacked matrix, which torch cannot copy."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


def gains(matrix: torch.Tensor) -> bool:
    """Whether this processor's oneDNN multiplies with the matrix, this torch offers prepacking, and it is worth it."""
    if matrix.device.type != "cpu" or matrix.dtype not in SMALLEST or not torch.backends.mkldnn.is_available():
        return False
    if matrix.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and matrix.numel() >= SMALLEST[matrix.dtype]


def use_prepacked(model: nn.Module) -> None:
    """Lets the linear layers of a model that is not trained prepack their matrices, where the processor can, they are
    large enough to gain and memory is ample.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and gains(layer.weight)]
    known = hasattr(os, "sysconf")  # not on Windows: nothing is prepacked
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
    if sum(layer.weight.nbytes for layer in layers) <= SHARE * memory:
        for layer in layers:
            layer.__class__ = PrepackedLinear


def use_plain(model: nn.Module) -> None:
    """Undoes `use_prepacked`, for those who look for torch's own layers."""
    for layer in model.modules():
        if type(layer) is PrepackedLinear:
            layer.__class__, layer.packed = nn.Linear, None
