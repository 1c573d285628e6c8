"""Random numbers that depend on nothing but their key: (seed, request, absolute position) and the name of a stream.

Streams of different names are independent. Drafters draw from "draft", verifiers from others: a sampled tree must not know the
random numbers that judge it.
"""

import hashlib
from dataclasses import dataclass

import torch


def keyed(seed: int, request: int, position: int, stream: str = "") -> torch.Generator:
    """A fresh CPU generator for this key."""
    key = f"{seed}/{request}/{position}" + (f"/{stream}" if stream else "")
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Draw:
    """What a drafter may use to sample trees in one cycle. temperature is that of the requests (0 = greedy, nothing is to be sampled);
    positions: where each root stands. No two cycles of a request have a root in the same place."""

    temperature: float
    seed: int
    requests: list[int]
    positions: list[int]

    def uniform(self, count: int) -> torch.Tensor:
        """[B, count] fp64 in [0, 1), the same at every call: to be called once a cycle."""
        return torch.stack([torch.rand(count, generator=keyed(self.seed, request, position, "draft"), dtype=torch.float64)
                            for request, position in zip(self.requests, self.positions)])
