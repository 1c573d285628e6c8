"""Exact laws of whole decoding steps of drafters that learn while they decode: memory, draw, verify, learn, and again.

A table model predicts from the whole text. All random choices of a drafter are enumerated by scripts (`Choices`), all
outcomes of verification by the rule's law, and after every step the drafter has learned what it would have learned.
"""

import copy
from dataclasses import replace

import torch

from draftsmith.eval.sampling import most_probable
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.features import Features
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree
from tests.laws import random_rows


class Table:
    """A target over `vocab` tokens whose row [V] fp64 depends on the whole text; some entries are 0."""

    def __init__(self, vocab: int, seed: int, zeros: float = 0.1):
        self.vocab, self.seed, self.zeros, self.rows = vocab, seed, zeros, {}

    def __call__(self, text: tuple[int, ...]) -> torch.Tensor:
        if text not in self.rows:
            number = self.seed
            for token in text:
                number = (number * 1_000_003 + token + 1) % (1 << 61)
            self.rows[text] = random_rows(1, self.vocab, torch.Generator().manual_seed(number), self.zeros)[0]
        return self.rows[text]


class Choices:
    """Every way to make a sequence of random choices, one after the other: `again` while there are more.

    chance: of all choices made since the last `again`.
    """

    def __init__(self):
        self.script, self.left = [], []

    def again(self) -> bool:
        """Begins the next sequence."""
        if not self.left and not self.script:
            self.at, self.chance = 0, 1.0
            self.script = [-1]  # begun
            return True
        while self.left and not self.left[-1]:
            self.left.pop()
        self.script = self.script[: 1 + len(self.left)]
        if not self.left:
            return False
        self.script[-1] = self.left[-1].pop(0)
        self.at, self.chance = 0, 1.0
        return True

    def pick(self, weights: list[float]) -> int:
        """weights of any sum -> an index of positive weight."""
        self.at += 1
        if self.at == len(self.script):
            first, *others = [i for i, w in enumerate(weights) if w > 0]
            self.script.append(first)
            self.left.append(others)
        self.chance *= weights[self.script[self.at]] / sum(weights)
        return self.script[self.at]


class Enumerated(StandDrafter):
    """STAND whose draws are choices; `prepare` begins the next way to make them."""

    def prepare(self, choices: Choices) -> None:
        self.choices = choices

    def order(self, q, uniform):
        orders = []
        for row in q.tolist():
            left, order = list(row), []
            while sum(left) > 0:
                order.append(self.choices.pick(left))
                left[order[-1]] = 0.0
            orders.append(order + [c for c in range(len(row)) if c not in order])
        return torch.tensor(orders).numpy()


class OneNoise(Enumerated):
    """A mistake: all nodes of a tree use the same noise. For entries of two ids: the first column is drawn first where
    one uniform number is below its q.
    """

    def prepare(self, choices):
        super().prepare(choices)
        self.low, self.high = 0.0, 1.0

    def order(self, q, uniform):
        orders = []
        for first, _ in q.tolist():
            cut = min(max(first, self.low), self.high)
            pick = self.choices.pick([cut - self.low, self.high - cut])
            self.low, self.high = (self.low, cut) if pick == 0 else (cut, self.high)
            orders.append([pick, 1 - pick])
        return torch.tensor(orders).numpy()


def node_texts(tree: DraftTree, text: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What stands up to and with each node of one tree; text ends with the root."""
    texts = [text]
    for token, parent in zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist()):
        texts.append((*texts[parent], token))
    return texts


def learned(drafter, tree: DraftTree, texts: list, path: list[int], token: int, p: Table):
    """A copy of the drafter that has observed an accepted path and the next token."""
    kept = [getattr(drafter, name, None) for name in ("tree", "datastore", "feature_spec")]
    drafter, asked = copy.deepcopy(drafter, {id(x): x for x in kept}), drafter.feature_spec.distribution
    features = Features(tree.tokens[:, path], torch.zeros(1, len(path), 0), torch.tensor([len(path)]))
    if asked is not None:
        nodes = path if asked.rows == "committed" else range(tree.size)
        told = most_probable(torch.stack([p(texts[node]) for node in nodes]).log()[None], asked.top)
        features = replace(features, distribution=told)
    drafter.proposed = tree
    drafter.observe(features, torch.tensor([token]))
    return drafter


def started(drafter, p: Table, texts: list[tuple[int, ...]], prompt: tuple[int, ...]):
    """A lasting drafter that has seen `texts` (each with its prompt of one token) being decoded, at the beginning of
    another: behind a prompt, whose last token is taken for the root.
    """
    for text in texts:
        begin(drafter, text[:1], text[1])
        for at in range(1, len(text) - 1):
            so_far = text[: at + 1]
            drafter = learned(drafter, DraftTree.root_only(torch.tensor([so_far[-1]])), [so_far], [0], text[at + 1], p)
    begin(drafter, prompt[:-1], prompt[-1])
    return drafter


def begin(drafter, prompt: tuple[int, ...], root: int) -> None:
    tokens = torch.tensor([prompt or (0,)])
    drafter.begin(
        Features(tokens, torch.zeros(1, tokens.size(1), 0), torch.tensor([len(prompt)])), torch.tensor([root])
    )


def learning(drafter) -> tuple[bytes, ...]:
    """What STAND's next trees depend on beside the text."""
    memory = drafter.memory
    return tuple(values[: len(memory)].tobytes() for values in (memory.ids, memory.probs, memory.counts))


def recycled(drafter) -> bytes:
    """What Token Recycling's next trees depend on beside the text."""
    return drafter.matrix.tobytes()


def law_of_steps(drafter, rule, p: Table, prompt: tuple[int, ...], length: int, state, change=lambda tree: tree):
    """(total variation between the target's law of the `length` tokens behind the prompt and what steps of drafting,
    verifying and learning emit, cut there; accepted drafted tokens of the first step in expectation).

    state(drafter): what its next trees depend on, beside the text. change: what becomes of each proposed tree.
    """
    going, ended, first = {(prompt, state(drafter)): (1.0, drafter)}, {}, None
    while going:
        key = min(going, key=lambda key: len(key[0]))  # all that leads there is known
        text, (mass, drafter) = key[0], going.pop(key)
        choices, accepted = Choices(), 0.0
        while choices.again():
            if hasattr(drafter, "prepare"):
                drafter.prepare(choices)
            tree = change(drafter.propose(Draw(1.0, 0, [0], [len(text)])))
            texts = node_texts(tree, text)
            rule.check(tree)
            law = rule.law(tree, torch.stack([p(t) for t in texts]).log()[None])
            accepted += choices.chance * float(law.expected)
            for node in range(tree.size):
                stop = float(law.stop[0, node])
                if stop <= 1e-15:
                    continue
                path = [node]
                while path[0] > 0:
                    path.insert(0, int(tree.parents[0, path[0]]))
                after = law.following(torch.tensor([node]))[0]
                for token, weight in enumerate((after / after.sum()).tolist()):
                    share = mass * choices.chance * stop * weight
                    if share == 0:
                        continue
                    new = (*texts[node], token)
                    if len(new) - len(prompt) >= length:
                        cut = new[: len(prompt) + length]
                        ended[cut] = ended.get(cut, 0.0) + share
                        continue
                    other = learned(drafter, tree, texts, path, token, p)
                    key = new, state(other)
                    going[key] = (going[key][0] + share if key in going else share, other)
        first = accepted if first is None else first
    want = {prompt: 1.0}
    for _ in range(length):
        want = {(*t, x): m * w for t, m in want.items() for x, w in enumerate(p(t).tolist()) if w > 0}
    assert abs(sum(ended.values()) - 1) < 1e-9, sum(ended.values())
    error = sum(abs(ended.get(t, 0.0) - want.get(t, 0.0)) for t in ended.keys() | want.keys()) / 2
    return error, first
