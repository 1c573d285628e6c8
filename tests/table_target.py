"""A target without a network, for the real decode loop: the next token depends on the last two, by a table."""

from collections import Counter
from itertools import product
from math import log

import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.features import Features
from draftsmith.models.targets import Prefill, Verified
from tests.laws import g_bound, random_rows


class TableTarget:
    """p [V, V, V]: the row behind every pair of tokens."""

    device, context_length = torch.device("cpu"), 1000

    def __init__(self, vocab: int, seed: int, zeros: float = 0.1):
        self.vocab_size = vocab
        self.p = random_rows(vocab * vocab, vocab, torch.Generator().manual_seed(seed), zeros).view(vocab, vocab, vocab)

    def open(self, spec, batch, capacity):
        return TableSession(self)

    def law(self, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
        """The probability of every text of so many tokens behind a prompt of at least two."""
        found = {}
        for text in product(range(self.vocab_size), repeat=length):
            whole, mass = [*prompt[-2:], *text], 1.0
            for a, b, c in zip(whole, whole[1:], whole[2:]):
                mass *= float(self.p[a, b, c])
            found[text] = mass
        return found


class TableSession:
    """texts: the processed tokens of each request."""

    def __init__(self, target: TableTarget):
        self.target, self.logits, self.texts = target, target.p.log().float(), []

    @property
    def lengths(self):
        return torch.tensor([len(text) for text in self.texts])

    @property
    def known_lengths(self):
        return [len(text) for text in self.texts]

    @property
    def last(self):
        return torch.tensor([text[-1] for text in self.texts])

    def prefill(self, prompts):
        self.texts = []
        return self.admit(prompts)

    def admit(self, prompts):
        self.texts = self.texts + [list(prompt) for prompt in prompts]
        width, lengths = max(map(len, prompts)), torch.tensor([len(p) for p in prompts])
        tokens = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts])
        features = Features(tokens, torch.zeros(*tokens.shape, 0), lengths)
        before, last = (torch.tensor([p[-n] for p in prompts]) for n in (2, 1))
        return Prefill(self.logits[before, last], features)

    def verify(self, tree):
        self.tree = tree
        above = tree.tokens.gather(1, tree.parents.clamp(min=0))
        above[:, 0] = self.last
        return Verified(self.logits[above, tree.tokens], torch.zeros(*tree.tokens.shape, 0), self.lengths)

    def commit(self, path, counts, told=None):
        tokens = self.tree.tokens.gather(1, path).tolist()
        self.texts = [text + new[:count] for text, new, count in zip(self.texts, tokens, counts.tolist())]

    def copy(self):
        new = TableSession(self.target)
        new.texts = list(self.texts)
        return new

    def rewind(self, lengths):
        self.texts = [text[:length] for text, length in zip(self.texts, lengths.tolist())]

    def select(self, rows):
        self.texts = [self.texts[row] for row in rows.tolist()]


def g_over_bound(target, drafter, rule, prompt: list[int], count: int, length: int, batch: int = 2000) -> float:
    """G of `count` texts from the real loop against the exact joint law, as a share of what is exceeded once in a
    million times. Texts are decoded in batches, one after the other, by the same drafter.
    """
    seen, law = Counter(), target.law(prompt, length)
    for start in range(0, count, batch):
        requests = list(range(start, min(start + batch, count)))
        traces = generate(
            target, drafter, [prompt] * len(requests), Sampling(1.0, seed=1), length, requests=requests, verifier=rule
        )
        seen.update(tuple(trace.tokens) for trace in traces)
    assert all(law[text] > 0 for text in seen)
    statistic = 2 * sum(number * log(number / (count * law[text])) for text, number in seen.items())
    return statistic / g_bound(sum(mass > 0 for mass in law.values()) - 1)
