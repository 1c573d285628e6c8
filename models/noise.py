"""Random numbers that depend on nothing but their key: (seed, request, absolute position) and the name of a stream.

They come from a counter, by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), so that
they are made where they are needed: the same bits on every device, in any order, for any batch. Streams of different
names are independent. Drafters draw from "draft", verifiers from others: a sampled tree must not know the
random numbers that judge it. What is drawn from them, with and without replacement, stands here too.
"""

import hashlib
from dataclasses import dataclass, replace

import torch

WORD = 0xFFFFFFFF  # words of 32 bits stand in int64: torch has no products of unsigned numbers
BELOW_ONE = 0xFFFFFF00  # the largest fp32 number that stands for a word: 2**32 would be a uniform number of 1
PIECE = 2**16  # numbers that a CPU makes at a time: what they are made of then stays in a core's cache
ROUNDS, MULTIPLIERS, WEYL = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def seed_of(*key) -> int:
    """63 bits that depend on the key alone."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "big") >> 1


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four words for each counter of four words (int64 tensors that broadcast to one shape)."""
    a, b, c, d = (word.clone(memory_format=torch.contiguous_format) for word in torch.broadcast_tensors(*counter))
    low, high = torch.empty_like(a), torch.empty_like(a)
    first, second = key
    for _ in range(ROUNDS):  # in place: ten rounds of new tensors take half as long again
        torch.mul(a, MULTIPLIERS[0], out=low)
        torch.mul(c, MULTIPLIERS[1], out=high)
        torch.bitwise_right_shift(high, 32, out=a).bitwise_xor_(b).bitwise_xor_(first).bitwise_and_(WORD)
        torch.bitwise_right_shift(low, 32, out=c).bitwise_xor_(d).bitwise_xor_(second).bitwise_and_(WORD)
        b, d, low, high = high, low, d, b  # of these only the lower 32 bits count
        first, second = first + WEYL[0] & WORD, second + WEYL[1] & WORD
    return a, b.bitwise_and_(WORD), c, d.bitwise_and_(WORD)


def random_words(seed: int, requests: list[int], positions: torch.Tensor, count: int, stream: str) -> torch.Tensor:
    """[B, N, count] int64, 32 random bits each, for requests [B] at positions [B, N], on the positions' device."""
    key, device = seed_of(seed, stream), positions.device
    number = torch.tensor(requests, device=device)[:, None, None]
    block = torch.arange(-(-count // 4), device=device)
    counter = (block, positions[..., None], number & WORD, number >> 32 & WORD)
    words = torch.stack(philox(counter, (key & WORD, key >> 32)), -1)
    return words.flatten(-2)[..., :count]


def uniform(seed: int, requests: list[int], positions: torch.Tensor, count: int, stream: str) -> torch.Tensor:
    """[B, N, count] fp64 in [0, 1), multiples of 2**-53; arguments as of `random_words`."""
    high, low = random_words(seed, requests, positions, 2 * count, stream).unflatten(-1, (count, 2)).unbind(-1)
    return ((high >> 5 << 26) + (low >> 6)).double() * 2.0**-53


def gumbel(seed: int, requests: list[int], positions: torch.Tensor, count: int, stream: str) -> torch.Tensor:
    """[B, N, count] fp32 standard Gumbel noise; arguments as of `random_words`.

    The largest values, which decide an argmax, come from uniform numbers near 0, where fp32 is finest. None is
    infinite.
    """
    piece = max(1, PIECE // max(1, count))
    if positions.device.type == "cpu" and positions.numel() > piece:
        each = [request for request in requests for _ in range(positions.size(1))]
        cells = zip(range(0, len(each), piece), positions.reshape(-1, 1).split(piece))
        parts = [gumbel(seed, each[i : i + piece], some, count, stream) for i, some in cells]
        return torch.cat(parts).view(*positions.shape, count)
    words = random_words(seed, requests, positions, count, stream)
    return words.float().clamp_(max=BELOW_ONE).add_(0.5).mul_(-(2.0**-32)).log1p_().neg_().log_().neg_()


def column(positions: list[int], device="cpu") -> torch.Tensor:
    """[B, 1]: one position for each request."""
    return torch.tensor(positions, device=device)[:, None]


@dataclass(frozen=True)
class Draw:
    """What a drafter may use to sample trees in one cycle. temperature is that of the requests (0 = greedy, nothing is
    to be sampled); positions: where each root stands. No two cycles of a request have a root in the same place. left:
    how many tokens each request may still emit, where that is known; stops: ids that end a text.
    """

    temperature: float
    seed: int
    requests: list[int]
    positions: list[int]
    left: list[int] | None = None
    stops: frozenset[int] = frozenset()

    def of(self, row: int) -> "Draw":
        """That of one request alone."""
        part = slice(row, row + 1)
        left = self.left and self.left[part]
        return replace(self, requests=self.requests[part], positions=self.positions[part], left=left)

    def uniform(self, count: int, device="cpu") -> torch.Tensor:
        """[B, count] fp64 in [0, 1), the same at every call: to be called once a cycle."""
        return uniform(self.seed, self.requests, column(self.positions, device), count, "draft")[:, 0]


def with_replacement(q: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """q [..., V], uniform [..., k] fp64 -> [..., k] independent draws, by inverse CDF in fp64. Tokens of probability 0
    are never drawn.
    """
    below = q.double().cumsum(-1)
    return torch.searchsorted(below, uniform * below[..., -1:], right=True).clamp(max=q.size(-1) - 1)


def without_replacement(q: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """As `with_replacement`, each draw from what the earlier ones left. The ordered law is that of Gumbel-top-k (Kool
    et al., 2019), for which every node would need a row of V noise values in place of k. Once nothing is left, tokens
    of probability 0 stand in.
    """
    left, picks = q.clone(), []
    for chance in uniform.split(1, -1):
        picks.append(with_replacement(left, chance))
        left = left.scatter(-1, picks[-1], 0.0)
    return torch.cat(picks, -1)
