"""Random numbers that depend on nothing but their key: (seed, request, absolute position) and the name of a stream.

Streams of different names are independent. Drafters draw from "draft", verifiers from others: a sampled tree must not
know the random numbers that judge it.
"""

import hashlib
from dataclasses import dataclass

import torch


def seed_of(*key) -> int:
    """63 bits that depend on the key alone."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "big") >> 1


def keyed(seed: int, request: int, position: int, stream: str = "") -> torch.Generator:
    """A fresh CPU generator for this key."""
    return torch.Generator().manual_seed(seed_of(seed, request, position, *([stream] if stream else [])))


@dataclass(frozen=True)
class Draw:
    """What a drafter may use to sample trees in one cycle. temperature is that of the requests (0 = greedy, nothing is
    to be sampled); positions: where each root stands. No two cycles of a request have a root in the same place.
    """

    temperature: float
    seed: int
    requests: list[int]
    positions: list[int]

    def uniform(self, count: int) -> torch.Tensor:
        """[B, count] fp64 in [0, 1), the same at every call: to be called once a cycle."""
        return torch.stack(
            [
                torch.rand(count, generator=keyed(self.seed, request, position, "draft"), dtype=torch.float64)
                for request, position in zip(self.requests, self.positions)
            ]
        )
