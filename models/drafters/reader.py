"""READER (Retrieval-Assisted Drafter for Efficient LLM Inference, 2025): the trees of another drafter, widened and
deepened by what followed the text's end where it stood before, in the text itself and in a datastore.

Retrieved branches share what nodes they can with the other drafter's tree; the rest stands behind the siblings that
were there, as ONE_HOT edges. So no drawn node is dropped, moved or judged by another distribution than the one it was
drawn from: every rule that is lossless for the other drafter's trees and for ONE_HOT edges is so for these. Without
another drafter the tree is what was retrieved.
"""

from dataclasses import replace

import torch

from draftsmith.models.drafters.datastore import LONGEST, Datastore
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.plain import NoDrafter
from draftsmith.models.drafters.retrieval import Estimates, Sketch, extend, matches
from draftsmith.models.drafters.suffix_index import SuffixIndex
from draftsmith.models.features import Features
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree, Form

MOST = 32  # retrieved nodes of a tree
DEEPENED = 4  # leaves


class ReaderDrafter:
    """base: the drafter whose trees are widened; datastore: texts to retrieve from beside the request's own. most:
    retrieved nodes of a tree; row_cost: what one more row costs, as a share of a pass over a single row.

    lasting: all that is decoded while this drafter lives shares its texts and what was learned of them; otherwise each
    request keeps to itself. max_tokens: of each index. How many nodes pay depends on how many requests are decoded
    together, so that trees (and, where they are sampled, texts) do so too; their law does not.
    """

    idle = None

    def __init__(
        self,
        base: Drafter | None = None,
        datastore: Datastore | None = None,
        most: int = MOST,
        row_cost: float = 0.05,
        lasting: bool = False,
        max_tokens: int = 1_000_000,
    ):
        self.base, self.datastore, self.most, self.row_cost = base or NoDrafter(), datastore, most, row_cost
        self.lasting, self.max_tokens, self.feature_spec = lasting, max_tokens, self.base.feature_spec
        self.size = self.base.size + most * (1 if self.feature_spec.probe is None else 2)
        self.shared, self.started = (SuffixIndex(max_tokens), Estimates()), 0

    @property
    def nbytes(self) -> int:
        """Bytes of what was learned, the base's included."""
        return self.shared[0].nbytes + self.base.nbytes

    def begin(self, features: Features, root: torch.Tensor) -> None:
        self.base.begin(features, root)
        self.learned: list[tuple[SuffixIndex, Estimates]] = []
        self.numbers: list[int] = []  # of each request's text in its index
        self.tails: list[list[int]] = []
        self._join(features, root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        self.base.join(features, root)
        self._join(features, root)

    def _join(self, features: Features, root: torch.Tensor) -> None:
        for text in features.texts(root):
            self.learned.append(self.shared if self.lasting else (SuffixIndex(self.max_tokens), Estimates()))
            self.numbers.append(self.started)
            self.tails.append([])
            self.started += 1
            self._append(-1, text)

    def observe(self, features: Features, root: torch.Tensor) -> None:
        """The old root is known already."""
        self.base.observe(features, root)
        for row, text in enumerate(features.texts(root)):
            self.sketches[row].learn(text[1:], self.learned[row][1])
            self._append(row, text[1:])

    def _append(self, row: int, tokens: list[int]) -> None:
        self.learned[row][0].append(self.numbers[row], tokens)
        self.tails[row] = (self.tails[row] + tokens)[-LONGEST:]

    def propose(self, draw: Draw) -> DraftTree:
        tree = self.base.propose(draw)
        form = tree.form
        self.sketches = [
            Sketch.of(tokens, *form.row(row), self.learned[row][1]) for row, tokens in enumerate(tree.tokens.tolist())
        ]
        for sketch, tail, (text, estimates) in zip(self.sketches, self.tails, self.learned):
            starts = {
                node: matches(tail + sketch.path(node), text, self.datastore) for node in (0, *sketch.leaves(DEEPENED))
            }
            extend(sketch, starts, estimates, self.most, (1 - self.row_cost) / len(self.tails), self.row_cost)
        return merged(tree, self.sketches)

    def select(self, rows: torch.Tensor) -> None:
        self.base.select(rows)
        self.learned, self.numbers, self.tails = (
            [values[row] for row in rows.tolist()] for values in (self.learned, self.numbers, self.tails)
        )

    def __str__(self):
        return f"reader:{self.base}:{self.most}" + (f":{self.datastore.folder}" if self.datastore else "")


def merged(tree: DraftTree, sketches: list[Sketch]) -> DraftTree:
    """A batch of trees with the nodes of `sketches`, which begin with its own in their order: its rows of q stay those
    of the same nodes.
    """
    width = max(map(len, sketches))
    padded = lambda name, fill: [  # noqa: E731
        tuple(getattr(sketch, name)) + (fill,) * (width - len(sketch)) for sketch in sketches
    ]
    parents, kinds = padded("parents", -1), padded("kinds", 0)
    on = lambda values, like: torch.tensor(values, dtype=like.dtype, device=like.device)  # noqa: E731
    return replace(
        tree,
        tokens=on(padded("tokens", 0), tree.tokens),
        parents=on(parents, tree.parents),
        kind=on(kinds, tree.kind),
        known=Form(tuple(parents), tuple(kinds)),
    )
