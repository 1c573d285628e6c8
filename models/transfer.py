"""Small results that the device hands to the host in one transfer."""

import numpy as np
import torch


def on_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Tensors of ids and counts (below 2^31) or of real values -> int32 or float32 arrays of the same shapes. They
    travel as one tensor, so that the host waits once.
    """
    real = [x.is_floating_point() for x in tensors]
    words = [x.to(torch.float32 if r else torch.int32).flatten().view(torch.int32) for x, r in zip(tensors, real)]
    flat, found, start = torch.cat(words).cpu().numpy(), [], 0
    for tensor, is_real in zip(tensors, real):
        part = flat[start : start + tensor.numel()].reshape(tuple(tensor.shape))
        found.append(part.view(np.float32) if is_real else part)
        start += tensor.numel()
    return found
