"""Growing a draft tree from a learned head: the EAGLE-2 dynamic tree, static shapes (a chain is one of them), and
shapes whose nodes are sampled.

A policy sees the head only through `roots` and `expand`. All scores are fp32 log-probabilities at temperature 1. One
that draws has `sample(head, beam, root, draw)`, the others `grow(head, beam, root)`. branches: how many children the
root has at most; expanded: how many nodes a policy that does not draw expands, the root included.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.noise import Draw, with_replacement, without_replacement
from draftsmith.models.topology import EAGLE_PATHS, ordered, read_slots
from draftsmith.models.tree import DraftTree, Form, Kind


@dataclass(frozen=True)
class Candidates:
    """scores [B, C] cumulative log-probabilities; tokens [B, C] target ids; parents [B, C]: 0 for the root, else the
    parent's index + 1. The first top_k are the children of the root; every following top_k are the children of one
    node, the most probable first.
    """

    scores: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2 (Li et al., 2024, section 4): expand the `top_k` best nodes of each level, `depth` drafted levels, then
    keep the size - 1 best of all candidates by cumulative log-probability (ties: the earlier, hence the shallower).
    """

    top_k: int
    depth: int
    size: int
    draws = False

    def __str__(self) -> str:
        return f"dynamic:{self.top_k}x{self.depth}x{self.size}"

    @property
    def branches(self) -> int:
        return self.top_k

    @property
    def expanded(self) -> int:
        return 1 + (self.depth - 1) * self.top_k

    def candidates(self, head, beam, root: torch.Tensor) -> "Candidates":
        """root [B] -> every node that the beam search meets, level by level, before the best are kept."""
        batch = len(root)
        k = min(self.top_k, len(head.ids))
        logp, beam = head.expand(beam, root[:, None], torch.zeros_like(root)[:, None])
        scores, picks = logp[:, 0].topk(k)
        tokens = head.ids[picks]
        flat = torch.arange(1, k + 1, device=root.device).expand(batch, k)  # candidate number + 1; 0 is the root
        parents = torch.zeros_like(flat)
        all_scores, all_tokens, all_parents, count = [scores], [tokens], [torch.zeros_like(flat)], k
        for level in range(1, self.depth):
            logp, beam = head.expand(beam, tokens, parents)
            gains, picks = logp.topk(k)
            candidates = (scores[..., None] + gains).flatten(1)
            all_scores.append(candidates)
            all_tokens.append(head.ids[picks].flatten(1))
            all_parents.append(flat.repeat_interleave(k, 1))
            if level < self.depth - 1:
                scores, best = candidates.topk(k)
                parents, tokens = best // k, all_tokens[-1].gather(1, best)
                flat = count + 1 + best
            count += k * k
        return Candidates(*(torch.cat(x, 1) for x in (all_scores, all_tokens, all_parents)))

    def grow(self, head, beam, root: torch.Tensor) -> DraftTree:
        """root [B] -> trees of min(size, candidates + 1) nodes."""
        found = self.candidates(head, beam, root)
        kept = torch.sort(found.scores, dim=1, descending=True, stable=True).indices[:, : self.size - 1].sort(1).values
        place = torch.zeros(len(root), found.scores.size(1) + 1, dtype=torch.int64, device=root.device)
        place.scatter_(1, kept + 1, torch.arange(1, kept.size(1) + 1, device=root.device).expand(len(root), -1))
        parents = place.gather(1, found.parents.gather(1, kept))
        none = torch.full_like(root[:, None], -1)
        return DraftTree.of(torch.cat([root[:, None], found.tokens.gather(1, kept)], 1), torch.cat([none, parents], 1))


@dataclass(frozen=True)
class StaticTree:
    """A fixed shape: every drafted node is the path of child ranks that leads to it (rank 0 = most probable child)."""

    paths: tuple[tuple[int, ...], ...]
    label: str
    draws = False

    def __str__(self) -> str:
        return self.label

    @property
    def size(self) -> int:
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        return max(map(len, self.paths), default=0)

    @property
    def branches(self) -> int:
        return sum(len(path) == 1 for path in self.paths)

    @property
    def expanded(self) -> int:
        return sum(len(level["rows"]) for level in self.levels)

    @cached_property
    def children(self) -> tuple[np.ndarray, np.ndarray]:
        """(how many children each node has, the number of its first one) [size]. The ranks of siblings must be without
        gaps.
        """
        number = {(): 0} | {path: i + 1 for i, path in enumerate(ordered(self.paths))}
        widths, first = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        for path in self.paths:
            widths[number[path[:-1]]] += 1
            first[number[path[:-1]]] = number[(*path[:-1], 0)]
        return widths, first

    @cached_property
    def _indices(self) -> dict:
        return {}

    def indices(self, device: torch.device) -> list[dict]:
        """`levels` as tensors on a device, copied to it once: a captured pass must not wait for the host. source: for
        each expanded node the row of the expand before that its parent's state came from.
        """
        if device not in self._indices:
            found, of = [], [0]
            with torch.inference_mode(False):  # training on trees reads them too
                for level in self.levels:
                    numbers = {**level, "source": [of[r] for r in level["rows"]]}
                    found.append({name: torch.tensor(some, device=device) for name, some in numbers.items()})
                    of = level["of"]
            self._indices[device] = found
        return self._indices[device]

    @cached_property
    def levels(self) -> list[dict]:
        """Per level: for the expanded nodes, their row among the level before (`rows`); for the drafted nodes, the
        expanded row that is their parent (`of`), their child rank and their parent's number in the tree.
        """
        number = {(): 0} | {path: i + 1 for i, path in enumerate(ordered(self.paths))}
        levels, before = [], [()]
        for depth in range(1, self.depth + 1):
            nodes = sorted(p for p in self.paths if len(p) == depth)
            expanded = sorted({p[:-1] for p in nodes})
            levels.append(
                {
                    "rows": [before.index(p) for p in expanded],
                    "of": [expanded.index(p[:-1]) for p in nodes],
                    "rank": [p[-1] for p in nodes],
                    "parent": [number[p[:-1]] for p in nodes],
                }
            )
            before = nodes
        return levels

    def grow(self, head, beam, root: torch.Tensor) -> DraftTree:
        """root [B] -> trees of `size` nodes."""
        tokens, parents, level_tokens = [root[:, None]], [torch.full_like(root[:1], -1)], root[:, None]
        for level, at in zip(self.levels, self.indices(root.device)):
            logp, beam = head.expand(beam, level_tokens[:, at["rows"]], at["source"].expand(len(root), -1))
            picks = logp.topk(max(level["rank"]) + 1).indices[:, at["of"], at["rank"]]
            level_tokens = head.ids[picks]
            tokens.append(level_tokens)
            parents.append(at["parent"])
        return DraftTree.of(torch.cat(tokens, 1), torch.cat(parents).expand(len(root), -1).contiguous())


@dataclass(frozen=True)
class SampledTree:
    """A static shape whose children are draws from the head's distribution q, in draw order: one after the other
    WITHOUT_REPLACEMENT, or IID.

    temperature: that of q; None takes the request's. At a request's temperature 0 the shape is filled with the most
    probable tokens.
    """

    shape: StaticTree
    kind: Kind
    temperature: float | None = None
    draws = True

    def __str__(self) -> str:
        return (
            f"sampled:{self.shape}"
            + (":iid" if self.kind == Kind.IID else "")
            + (f"@{self.temperature:g}" if self.temperature else "")
        )

    @property
    def size(self) -> int:
        return self.shape.size

    @property
    def depth(self) -> int:
        return self.shape.depth

    @property
    def branches(self) -> int:
        return self.shape.branches

    @cached_property
    def form(self) -> Form:
        return Form.shared([-1, *(p for level in self.shape.levels for p in level["parent"])], self.kind)

    def sample(self, head, beam, root: torch.Tensor, draw: Draw) -> DraftTree:
        """root [B] -> trees of `size` nodes that carry q."""
        if draw.temperature == 0:
            return self.shape.grow(head, beam, root)
        temperature, pick = (
            self.temperature or draw.temperature,
            with_replacement if self.kind == Kind.IID else without_replacement,
        )
        uniform = draw.uniform(self.size, root.device)  # one for each node
        tokens, rows, level_tokens, first = [root[:, None]], [], root[:, None], 1
        for level, at in zip(self.shape.levels, self.shape.indices(root.device)):
            logp, beam = head.expand(beam, level_tokens[:, at["rows"]], at["source"].expand(len(root), -1))
            rows.append((logp / temperature).softmax(-1))
            of, rank = at["of"], at["rank"]
            chances = uniform.new_zeros(len(root), len(level["rows"]), max(level["rank"]) + 1)
            chances[:, of, rank] = uniform[:, first : first + len(of)]
            level_tokens, first = head.ids[pick(rows[-1], chances)[:, of, rank]], first + len(of)
            tokens.append(level_tokens)
        tokens = torch.cat(tokens, 1)
        parents = torch.tensor(self.form.parents[0], device=root.device).expand(len(root), -1).contiguous()
        return DraftTree(
            tokens,
            parents,
            torch.full_like(tokens, int(self.kind), dtype=torch.int8),
            torch.cat(rows, 1),
            head.ids,
            self.form,
        )


@dataclass(frozen=True)
class AdaptiveTree:
    """Sampled without replacement like `SampledTree`, `width` drafted nodes on each of `depth` levels; how many of them
    are children of which node of the level before is decided from q before any of them is drawn.

    A draw at a node is taken to be accepted with probability c = max q there, hence its j-th child to be reached with c
    (1 - c)^(j - 1) times the node's own chance; the `width` greatest chances of a level are drafted. Dropping nodes by
    what they turned out to be would be lossy.
    """

    width: int
    depth: int
    temperature: float | None = None
    draws = True

    def __str__(self) -> str:
        return f"sampled:adaptive:{self.width}x{self.depth}" + (f"@{self.temperature:g}" if self.temperature else "")

    @property
    def size(self) -> int:
        return 1 + self.width * self.depth

    @property
    def branches(self) -> int:
        return self.width

    def sample(self, head, beam, root: torch.Tensor, draw: Draw) -> DraftTree:
        """root [B] -> trees of `size` nodes that carry q. At temperature 0: the dynamic tree of the same width, depth
        and size.
        """
        width = min(self.width, len(head.ids))
        if draw.temperature == 0:
            return DynamicTree(width, self.depth, self.size).grow(head, beam, root)
        temperature, uniform = (
            self.temperature or draw.temperature,
            draw.uniform(self.size * width, root.device).unflatten(1, (-1, width)),
        )
        tokens, source = root[:, None], torch.zeros_like(root)[:, None]
        reach, first = torch.ones(len(root), 1, device=root.device), 0
        all_tokens, all_parents, rows = [tokens], [source - 1], []
        for _ in range(self.depth):
            logp, beam = head.expand(beam, tokens, source)
            rows.append((logp / temperature).softmax(-1))
            sure, nodes = rows[-1].amax(-1, keepdim=True), tokens.size(1)
            chances = (reach[..., None] * sure * (1 - sure) ** torch.arange(width, device=root.device)).flatten(1)
            # Equal chances: the earlier rank first, so that a node's children are its first draws; then all in draw
            # order
            chosen = torch.sort(chances, dim=1, descending=True, stable=True).indices[:, :width].sort(1).values
            source, reach = chosen // width, chances.gather(1, chosen)
            picks = without_replacement(rows[-1], uniform[:, first : first + nodes]).flatten(1)
            tokens = head.ids[picks.gather(1, chosen)]
            all_tokens.append(tokens)
            all_parents.append(first + source)
            first += nodes
        tokens, parents = torch.cat(all_tokens, 1), torch.cat(all_parents, 1)
        tree = DraftTree(tokens, parents, torch.full_like(tokens, int(Kind.WITHOUT_REPLACEMENT), dtype=torch.int8))
        drawn = [tree.form.drawn(row) for row in range(len(root))]
        longest = max(map(len, drawn))
        places = torch.tensor([some + [0] * (longest - len(some)) for some in drawn], device=root.device)
        return replace(
            tree,
            q=torch.cat(rows, 1)[torch.arange(len(root), device=root.device)[:, None], places],
            ids=head.ids,
            known=tree.form,
        )


@dataclass(frozen=True)
class TreeByRows:
    """The tree for so many requests as are decoded together, so that it changes while a batch shrinks. trees: (from how
    many requests on, dynamic or static tree), ascending from 1.
    """

    trees: tuple[tuple[int, DynamicTree | StaticTree], ...]
    draws = False

    def __str__(self) -> str:
        return "rows:" + ",".join(f"{rows}={tree}" for rows, tree in self.trees)

    @property
    def size(self) -> int:
        return max(tree.size for _, tree in self.trees)

    @property
    def depth(self) -> int:
        return max(tree.depth for _, tree in self.trees)

    @property
    def branches(self) -> int:
        return max(tree.branches for _, tree in self.trees)

    def of(self, requests: int) -> DynamicTree | StaticTree:
        return next(tree for rows, tree in reversed(self.trees) if rows <= requests)

    def grow(self, head, beam, root: torch.Tensor) -> DraftTree:
        """root [B] -> trees of the policy for B requests."""
        return self.of(len(root)).grow(head, beam, root)


TreePolicy = DynamicTree | StaticTree | SampledTree | AdaptiveTree | TreeByRows


NONE = StaticTree((), "none")  # no drafting: what is best where passes over more rows cost more than they emit


def chain(depth: int) -> StaticTree:
    return StaticTree(tuple((0,) * d for d in range(1, depth + 1)), f"chain:{depth}")


def binary(depth: int) -> StaticTree:
    """Two children a node: 2^(depth + 1) - 1 nodes."""
    return StaticTree(tuple(path for d in range(1, depth + 1) for path in product((0, 1), repeat=d)), f"binary:{depth}")


def parse_tree(text: str) -> TreePolicy:
    """`chain:DEPTH`, `binary:DEPTH`, `dynamic:TOP_KxDEPTHxSIZE` (size counts the root), `eagle` (25 drafted nodes of
    EAGLE-1), a static one of them sampled: `sampled:TREE[:iid][@TEMPERATURE]`,
    `sampled:adaptive:WIDTHxDEPTH[@TEMPERATURE]`, or `none`: no drafting. FILE.json is a static one that `tune-tree`
    wrote. `rows:1=TREE,4=TREE`: the first for up to 3 requests that are decoded together, the second for 4 and more.
    """
    if text.endswith(".json") and not text.startswith("sampled:"):
        return StaticTree(tuple(read_slots(text)), text)
    kind, _, rest = text.partition(":")
    try:
        if kind == "sampled":
            shape, _, temperature = rest.partition("@")
            heat = float(temperature) if "@" in rest else None
            if heat is not None and not 0 < heat < float("inf"):
                raise ValueError
            if shape.startswith("adaptive:"):
                width, depth = (int(n) for n in shape.removeprefix("adaptive:").split("x"))
                if width > 0 and depth > 0:
                    return AdaptiveTree(width, depth, heat)
            tree = parse_tree(shape.removesuffix(":iid"))
            if isinstance(tree, StaticTree):
                return SampledTree(tree, Kind.IID if shape.endswith(":iid") else Kind.WITHOUT_REPLACEMENT, heat)
        if kind == "rows":
            parts = [part.partition("=") for part in rest.split(",")]
            trees = tuple((int(rows), parse_tree(tree)) for rows, _, tree in parts)
            starts = [rows for rows, _ in trees]
            plain = all(isinstance(tree, DynamicTree | StaticTree) for _, tree in trees)
            if plain and starts[0] == 1 and starts == sorted(set(starts)):
                return TreeByRows(trees)
            raise ValueError
        numbers = [int(n) for n in rest.split("x")] if rest else []
        if text == str(NONE):
            return NONE
        if kind == "eagle" and not numbers:
            return StaticTree(tuple(EAGLE_PATHS), "eagle")
        if kind == "chain" and len(numbers) == 1 and numbers[0] > 0:
            return chain(numbers[0])
        if kind == "binary" and len(numbers) == 1 and 0 < numbers[0] <= 10:
            return binary(numbers[0])
        if kind == "dynamic" and len(numbers) == 3 and min(numbers) > 0 and numbers[2] > 1:
            return DynamicTree(*numbers)
    except (ValueError, UserError):
        pass
    raise UserError(
        f"tree: found {text!r}, expected chain:DEPTH, dynamic:TOP_KxDEPTHxSIZE, eagle, binary:DEPTH, "
        f"sampled:TREE[:iid][@TEMPERATURE], "
        "sampled:adaptive:WIDTHxDEPTH[@TEMPERATURE], rows:1=TREE,N=TREE, none or FILE.json"
    )
