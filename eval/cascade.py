"""Cascades of models (polybasic speculative decoding, ICML 2025): a drafter that decodes with a model of its own.

    target <- middle model <- drafter of the middle model          (which may be a cascade again)

The middle model decodes, drafted for by its own drafter, until a buffer is full; the buffer is proposed as a chain with
the middle model's distributions as q. Every token of it, accepted, corrected or bonus, follows the middle model's law,
since the stage below is lossless for it, and whether the buffer goes on depends on what stands in it alone. So the
target may verify it by any rule that is lossless for chains drawn from q. The raw distribution behind each prefix is
kept, never a residual.

The loop of `decode` is the target's; here stands the middle model's, whose text may be given up again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from draftsmith.eval.decode import cut, observed
from draftsmith.eval.sampling import Noise, Sampling, process
from draftsmith.eval.verification.verifier import MATCH, Accepted, Verifier
from draftsmith.models.drafters import Rewindable
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.noise import Draw, seed_of
from draftsmith.models.targets import TextTarget
from draftsmith.models.tree import DraftTree, Form, Kind

BUFFER = 8  # tokens, where nothing is chosen


@dataclass
class Cycle:
    """What was decoded since the target's last pass. start [B]: rows of the middle model before it; state: the mark of
    its drafter; rows: what the middle model has processed since, None before its first pass; valid: how many of these
    each request had when its buffer was full.
    """

    start: torch.Tensor
    state: object
    rows: Features | None = None
    valid: list[int] | None = None


@dataclass
class Tally:
    """Passes of the middle model, the tokens that they gave, proposed tokens of the buffers and those that the target
    accepted, since the drafter was made; over all requests.
    """

    cycles: int = 0
    passes: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0


class CascadeDrafter:
    """middle: a model with the target's tokenizer; drafter: what drafts for it; rule: judges its drafts at temperatures
    above 0. buffer: how many tokens are decoded before the target verifies (the last pass may give more; an end token
    and the text's limit end a buffer early). vocab_size: the target's; ids beyond it are never drafted.

    At a request's temperature the middle model samples without top-k, top-p and penalty: that costs acceptance where
    the target has them, never the law. In a batch all rows go on until the last buffer is full; what a row then has too
    much is dropped, so that no request depends on others. Raises UserError for a rule that is not lossless, and for
    drafters that cannot go back.
    """

    idle, nbytes = None, 0

    def __init__(
        self,
        middle: TextTarget,
        drafter: Rewindable,
        rule: Verifier = MATCH,
        buffer: int = BUFFER,
        vocab_size: int | None = None,
    ):
        if not isinstance(drafter, Rewindable):
            raise UserError(
                f"cascade: found {drafter} as drafter of the middle model, expected one whose text can be given up "
                f"(such as a trained head, cascade, stand or suffix)"
            )
        if not rule.lossless:
            raise UserError(f"cascade: found {rule.name} between models, expected a lossless rule")
        self.middle, self.drafter, self.rule, self.buffer = middle, drafter, rule, buffer
        self.vocab_size = min(vocab_size or middle.vocab_size, middle.vocab_size)
        self.feature_spec, self.size, self.tally = FeatureSpec(taps=()), buffer + drafter.size, Tally()
        # What reads nothing but ids may draft behind tokens that the middle model has not processed yet.
        self.ids_only = drafter.feature_spec == FeatureSpec(taps=()) and drafter.feature_spec.probe is None

    def begin(self, features: Features, root: torch.Tensor) -> None:
        self.session = self.middle.open(
            self.drafter.feature_spec, len(root), features.tokens.size(1) + 2 * self.drafter.size + 64
        )
        self.root, self.cycle, self.unseen = root, None, [[] for _ in root]
        self.drafter.begin(self.session.prefill(self._prompts(features)).features, root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        self.drafter.join(self.session.admit(self._prompts(features)).features, root)
        self.root, self.unseen = torch.cat([self.root, root]), self.unseen + [[] for _ in root]

    def _prompts(self, features: Features) -> list[list[int]]:
        known = features.tokens.clamp(max=self.middle.vocab_size - 1)
        return [tokens[:length] for tokens, length in zip(known.tolist(), features.lengths.tolist())]

    def propose(self, draw: Draw) -> DraftTree:
        batch = len(self.root)
        limits = [self.buffer] * batch if draw.left is None else [min(self.buffer, n - 1) for n in draw.left]
        self.cycle = Cycle(self.session.lengths, self.drafter.mark(), valid=[len(tokens) + 1 for tokens in self.unseen])
        buffers, rows_of_q, full = [[] for _ in self.root], [], [limit <= 0 for limit in limits]
        seed = seed_of(draw.seed, "middle")
        # Noise is keyed by the buffer's place too: the rule that gives up a token has seen those behind it.
        requests = [seed_of("buffer", r, p) for r, p in zip(draw.requests, draw.positions)]
        roots, unseen, lengths = self.root, self.unseen, [0] * batch
        while not all(full):
            positions = [place + length for place, length in zip(draw.positions, lengths)]
            left = None if draw.left is None else [max(1, n - length) for n, length in zip(draw.left, lengths)]
            inner = Draw(draw.temperature, seed, requests, positions, left, draw.stops)
            tokens, counts, q = self._pass(inner, roots, unseen)
            processed = self.cycle.rows.lengths.tolist()
            for row, (emitted, count) in enumerate(zip(tokens.tolist(), counts.tolist())):
                lengths[row] += count
                if full[row]:
                    continue
                self.tally.passes += 1
                self.tally.tokens += count
                self.cycle.valid[row] = processed[row]
                kept = cut(emitted, count, draw.stops)
                buffers[row] += kept
                full[row] = len(buffers[row]) >= limits[row] or kept[-1] in draw.stops
            if q is not None:
                rows_of_q.append((q, counts))
            roots, unseen = tokens.gather(1, counts[:, None] - 1)[:, 0], [[] for _ in unseen]
        if draw.left is not None:
            buffers = [buffer[: max(0, left - 1)] for buffer, left in zip(buffers, draw.left)]
        self.tally.cycles += batch
        self.tally.proposed += sum(map(len, buffers))
        return self._chain(buffers, rows_of_q)

    def _pass(self, draw: Draw, roots: torch.Tensor, unseen: list[list[int]]):
        """One pass of the middle model -> tokens [B, M] that it emits, counts [B], the rows q [B, M, V] behind which
        they were drawn (None at temperature 0). unseen: tokens before each root that it has not processed yet: they are
        a chain above the tree.
        """
        sampling = Sampling(draw.temperature, seed=draw.seed)
        rows = torch.arange(len(roots), device=roots.device)[:, None]
        above = torch.tensor([len(tokens) for tokens in unseen], device=roots.device)
        tree = self._tree(draw, roots, unseen, above)
        whole = below(unseen, tree, above) if any(unseen) else tree
        verified = self.session.verify(replace(whole, tokens=whole.tokens.clamp(max=self.middle.vocab_size - 1)))
        logits = process(verified.logits[..., : self.vocab_size], sampling, None, whole)
        nodes = above[:, None] + torch.arange(tree.size, device=roots.device)
        judged = logits[rows, nodes]
        rule = MATCH if draw.temperature == 0 else self.rule
        accepted = rule(tree, judged, Noise(sampling, draw.requests, draw.positions)).trimmed()
        kept = with_prefix(accepted, above) if any(unseen) else accepted
        self.session.commit(kept.path, kept.counts)
        features, cycle = observed(self.drafter.feature_spec, verified, whole, kept, logits), self.cycle
        cycle.rows = features if cycle.rows is None else cycle.rows.then(features)
        if self.ids_only:
            features = Features(tree.tokens[rows, accepted.path], features.hidden, accepted.counts)
        self.drafter.observe(features, accepted.next_token)
        tokens = F.pad(tree.tokens[rows, accepted.path[:, 1:]], (0, 1))
        tokens = tokens.scatter(1, accepted.counts[:, None] - 1, accepted.next_token[:, None])
        return tokens, accepted.counts, None if draw.temperature == 0 else judged[rows, accepted.path].softmax(-1)

    def _tree(self, draw: Draw, roots: torch.Tensor, unseen: list[list[int]], above: torch.Tensor) -> DraftTree:
        """What the middle model is to verify below the roots. A drafter that reads its states drafts nothing where
        those of the row before the root are not there yet.
        """
        if self.ids_only or not any(unseen):
            return self.drafter.propose(draw)
        if all(unseen):
            return DraftTree.root_only(roots)
        tree, behind = self.drafter.propose(draw), (above > 0)[:, None]
        return replace(
            tree,
            tokens=torch.cat([roots[:, None], tree.tokens[:, 1:]], 1),
            parents=tree.parents.masked_fill(behind, -1),
            kind=tree.kind.masked_fill(behind, 0),
            known=None,
        )

    def _chain(self, buffers: list[list[int]], rows_of_q: list) -> DraftTree:
        """The buffers as chains below the roots, padded behind."""
        device, width = self.root.device, max(map(len, buffers))
        if width == 0:
            return DraftTree.root_only(self.root)
        tokens = torch.tensor([buffer + [0] * (width - len(buffer)) for buffer in buffers], device=device)
        tokens = torch.cat([self.root[:, None], tokens], 1)
        kind = int(Kind.IID) if rows_of_q else int(Kind.ONE_HOT)
        ends = [(len(buffer), width - len(buffer)) for buffer in buffers]
        form = Form(
            tuple((-1, *range(n), *[-1] * padding) for n, padding in ends),
            tuple((0, *[kind] * n, *[0] * padding) for n, padding in ends),
        )
        parents = torch.tensor(form.parents, device=device)
        kinds = torch.tensor(form.kinds, dtype=torch.int8, device=device)
        if not rows_of_q:
            return DraftTree(tokens, parents, kinds, known=form)
        (q, counts), *others = rows_of_q
        held = Features(tokens, q, counts)  # rows behind one another, request by request
        for more, n in others:
            held = held.then(Features(tokens[:, :1].expand(-1, more.size(1)), more, n))
        q = held.hidden[:, :width]
        return DraftTree(tokens, parents, kinds, q, torch.arange(self.vocab_size, device=device), form)

    def observe(self, features: Features, root: torch.Tensor) -> None:
        """What the target kept of the buffer stays in the caches; what it wrote itself is processed with the next pass,
        however much of it there is.
        """
        cycle, self.cycle = self.cycle, None
        kept = [tokens[:n] for tokens, n in zip(features.tokens.tolist(), features.lengths.tolist())]
        texts, counts = [before + tokens for before, tokens in zip(self.unseen, kept)], [0] * len(kept)
        self.tally.accepted += 0 if cycle is None else sum(len(tokens) - 1 for tokens in kept)
        if cycle is not None:
            self.drafter.restore(cycle.state)
        if cycle is not None and cycle.rows is not None:
            processed = [tokens[:n] for tokens, n in zip(cycle.rows.tokens.tolist(), cycle.valid)]
            counts = [common(text, mine) for text, mine in zip(texts, processed)]
            same = torch.tensor(counts, device=root.device)
            self.session.rewind(cycle.start + same)
            if not self.ids_only:
                following = [(*text, last)[n] for text, last, n in zip(texts, root.tolist(), counts)]
                self.drafter.observe(cycle.rows.first(same), torch.tensor(following, device=root.device))
        if self.ids_only:
            self.drafter.observe(features, root)
        self.unseen, self.root = [text[n:] for text, n in zip(texts, counts)], root

    def select(self, rows: torch.Tensor) -> None:
        self.session.select(rows)
        self.drafter.select(rows)
        self.root, self.unseen = self.root[rows], [self.unseen[row] for row in rows.tolist()]

    def mark(self):
        return self.session.lengths, self.root, self.unseen, self.cycle, self.drafter.mark()

    def restore(self, state) -> None:
        lengths, self.root, self.unseen, self.cycle, drafter = state
        self.session.rewind(lengths)
        self.drafter.restore(drafter)

    def __str__(self):
        return f"cascade:{self.buffer}:{self.middle.name}+{self.drafter}"


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def with_prefix(accepted: Accepted, above: torch.Tensor) -> Accepted:
    """The same path in the tree below `above` [B] further nodes, which are part of it."""
    path, counts = accepted.path, accepted.counts + above
    steps = torch.arange(path.size(1) + int(above.max()), device=path.device) - above[:, None]
    inner = path.gather(1, steps.clamp(0, path.size(1) - 1)) + above[:, None]
    return Accepted(torch.where(steps < 0, steps + above[:, None], inner), counts, accepted.next_token)


def below(chains: list[list[int]], tree: DraftTree, above: torch.Tensor) -> DraftTree:
    """Each tree below a chain of further tokens, above [B] of them; narrower ones are padded behind."""
    size = tree.size + max(map(len, chains))
    steps = torch.arange(size, device=above.device) - above[:, None]
    inside = (steps >= 0) & (steps < tree.size)
    nodes = steps.clamp(0, tree.size - 1)
    prefix = torch.tensor([chain + [0] * (size - len(chain)) for chain in chains], device=above.device)
    parents = tree.parents.gather(1, nodes)
    parents = torch.where(inside & (parents >= 0), parents + above[:, None], -1)
    parents = torch.where(steps == 0, above[:, None] - 1, parents)  # -1 for a root without a chain
    parents = torch.where(steps < 0, steps + above[:, None] - 1, parents)
    tokens = torch.where(steps < 0, prefix, torch.where(inside, tree.tokens.gather(1, nodes), 0))
    return replace(DraftTree.of(tokens, parents), probes=tree.probes)
