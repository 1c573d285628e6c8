"""Cascades over tables for exact laws: models whose rows depend on the whole text, a drafter that draws chains from a
table, rules whose outcomes are choices.
"""

from dataclasses import replace

import torch

from draftsmith.eval.cascade import CascadeDrafter
from draftsmith.eval.verification.verifier import Accepted, Verifier
from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.targets import Prefill, Verified
from draftsmith.models.tree import DraftTree, Form, Kind
from tests.steps import Choices, node_texts
from tests.table_target import TableSession


class TextTarget:
    """A model that predicts from the whole text, by a table; fp64."""

    device, context_length, name = torch.device("cpu"), 1000, "table"

    def __init__(self, table):
        self.table, self.vocab_size = table, table.vocab

    def open(self, spec, batch, capacity):
        return TextSession(self)


class TextSession(TableSession):
    def __init__(self, target):
        self.target, self.texts = target, []

    def admit(self, prompts):
        self.texts = self.texts + [list(prompt) for prompt in prompts]
        width, lengths = max(map(len, prompts)), torch.tensor([len(p) for p in prompts])
        tokens = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts])
        return Prefill(None, Features(tokens, torch.zeros(*tokens.shape, 0), lengths))

    def verify(self, tree):
        self.tree, rows = tree, []
        for text, tokens, parents in zip(self.texts, tree.tokens, tree.parents):
            one = DraftTree.of(tokens[None], parents[None])
            texts = node_texts(one, (*text, int(tokens[0])))
            rows.append(torch.stack([self.target.table(t) for t in texts]).log())
        return Verified(torch.stack(rows), torch.zeros(*tree.tokens.shape, 0), self.lengths)


class Constant:
    """A table with one row for every text."""

    def __init__(self, row: list[float]):
        self.vocab, self.row = len(row), torch.tensor(row, dtype=torch.float64)

    def __call__(self, text):
        return self.row


class Chosen(Verifier):
    """Another rule, whose outcomes are choices: where the path ends, and the next token."""

    def __init__(self, rule: Verifier):
        self.rule, self.name = rule, rule.name

    def __call__(self, tree, logits, noise):
        self.rule.check(tree)
        law = self.rule.law(tree, logits)
        node = self.choices.pick([p if p > 1e-15 else 0.0 for p in law.stop[0].tolist()])
        weights = law.following(torch.tensor([node]))[0]
        token, path = self.choices.pick((weights / weights.sum()).tolist()), [node]
        while path[0] > 0:
            path.insert(0, int(tree.parents[0, path[0]]))
        return Accepted(torch.tensor([path]), torch.tensor([len(path)]), torch.tensor([token]))


class TableChain:
    """Draws chains of `depth` tokens from a table, one request at a time; the draws are choices."""

    feature_spec, idle, nbytes = FeatureSpec(taps=()), None, 0

    def __init__(self, table, depth: int, kind: Kind = Kind.IID):
        self.table, self.depth, self.kind, self.size = table, depth, kind, depth + 1

    def prepare(self, choices: Choices) -> None:
        self.choices = choices

    def begin(self, features, root):
        self.text, self.root = tuple(features.tokens[0, : features.lengths[0]].tolist()), root

    def observe(self, features, root):
        self.text, self.root = (*self.text, *features.tokens[0, : features.lengths[0]].tolist()), root

    def mark(self):
        return self.text, self.root

    def restore(self, state):
        self.text, self.root = state

    def select(self, rows):
        pass

    def join(self, features, root):
        raise NotImplementedError

    def propose(self, draw):
        tokens, rows = [int(self.root)], []
        for _ in range(self.depth):
            row = self.table((*self.text, *tokens))
            rows.append(row)
            tokens.append(self.choices.pick(row.tolist()) if self.kind else int(row.argmax()))
        tree = DraftTree.of(torch.tensor([tokens]), torch.tensor([range(-1, self.depth)]))
        if not self.kind:
            return tree
        kinds = torch.tensor([[0, *[int(self.kind)] * self.depth]], dtype=torch.int8)
        form = Form.shared(list(range(-1, self.depth)), self.kind)
        return replace(tree, kind=kinds, q=torch.stack(rows)[None], ids=torch.arange(self.table.vocab), known=form)


class Stepping(CascadeDrafter):
    """A cascade over tables whose random choices are made by `prepare`, which also gives up what was proposed."""

    def __init__(self, table, drafter, rule: Verifier, buffer: int):
        super().__init__(TextTarget(table), drafter, Chosen(rule), buffer)

    def prepare(self, choices: Choices) -> None:
        if self.cycle is not None:
            self.drafter.restore(self.cycle.state)
            self.session.rewind(self.cycle.start)
            self.cycle = None
        self.rule.choices = choices
        self.drafter.prepare(choices)


def buffers_of(cascade: Stepping, draw) -> dict[tuple[int, ...], tuple[float, DraftTree]]:
    """The law of what a cascade proposes: {tokens of the chain: (probability, tree)}."""
    choices, found = Choices(), {}
    while choices.again():
        cascade.prepare(choices)
        tree = cascade.propose(draw)
        key = tuple(tree.tokens[0, 1:].tolist())
        found[key] = (found.get(key, (0.0, None))[0] + choices.chance, tree)
    return found
