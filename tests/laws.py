"""Exact laws for the tests: table models with context-dependent rows, every tree that can be drawn from them, what a
rule makes of it.

A text over V tokens has a number: the empty text is 0, text c followed by token t is c V + 1 + t. Rows of p and q are
tables [texts, V].
"""

import torch

from draftsmith.models.tree import DraftTree, Kind


def random_rows(texts: int, vocab: int, generator: torch.Generator, zeros: float = 0.0) -> torch.Tensor:
    """[texts, V] fp64, uneven; about a share `zeros` of the entries are exactly 0 (never all of a row)."""
    x = torch.rand(texts, vocab, generator=generator, dtype=torch.float64)
    rows = (-x.log()) ** 2 + 1e-3
    cut = torch.rand(texts, vocab, generator=generator, dtype=torch.float64) < zeros
    cut.scatter_(1, rows.argmax(1, keepdim=True), False)
    rows = rows.masked_fill(cut, 0.0)
    return rows / rows.sum(1, keepdim=True)


def texts_up_to(length: int, vocab: int) -> int:
    return sum(vocab**n for n in range(length + 1))


def numbers(tokens: torch.Tensor, parents: list[int], vocab: int) -> torch.Tensor:
    """tokens [M, N] of trees of one form -> the texts' numbers [M, N]; the root's is 0."""
    found = torch.zeros_like(tokens)
    for node, parent in enumerate(parents):
        if parent >= 0:
            found[:, node] = found[:, parent] * vocab + 1 + tokens[:, node]
    return found


def all_trees(
    parents: list[int], kinds: list[Kind], q: torch.Tensor, fixed: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every tree of this form that can be drawn from q: (tokens [M, N], probability [M]). ONE_HOT nodes hold the tokens
    `fixed`.
    """
    drawn, vocab = [([0], [0], 1.0)], q.size(1)
    for node in range(1, len(parents)):
        grown = []
        for tokens, texts, chance in drawn:
            above = texts[parents[node]]
            row = q[above].tolist()
            if kinds[node] == Kind.WITHOUT_REPLACEMENT:
                for other in range(1, node):
                    if parents[other] == parents[node] and kinds[other] == Kind.WITHOUT_REPLACEMENT:
                        row[tokens[other]] = 0.0
                row = [x / sum(row) for x in row] if sum(row) else [1.0] + [0.0] * (vocab - 1)
            if kinds[node] == Kind.ONE_HOT:
                row = [float(t == fixed[node]) for t in range(vocab)]
            grown += [
                ([*tokens, t], [*texts, above * vocab + 1 + t], chance * row[t]) for t in range(vocab) if row[t] > 0
            ]
        drawn = grown
    return torch.tensor([t for t, _, _ in drawn]), torch.tensor([c for _, _, c in drawn], dtype=torch.float64)


def as_trees(
    tokens: torch.Tensor, parents: list[int], kinds: list[Kind], q: torch.Tensor, ids: torch.Tensor | None = None
) -> DraftTree:
    """The same trees with the rows of q [texts, V] that their children were drawn from, on the draft vocabulary ids."""
    ids, vocab = torch.arange(q.size(1)) if ids is None else ids, q.size(1)
    inner = sorted({p for p, kind in zip(parents, kinds) if p >= 0 and kind != Kind.ONE_HOT})
    rows = q[numbers(tokens, parents, vocab)[:, inner]][..., ids] if inner else None
    return DraftTree(
        tokens,
        torch.tensor([parents]).repeat(len(tokens), 1),
        torch.tensor([kinds], dtype=torch.int8).repeat(len(tokens), 1),
        rows,
        ids,
    )


def emitted(rule, tree: DraftTree, texts: torch.Tensor, chance: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What a rule emits in one cycle over trees drawn with `chance` [M]: the probability of every text, by its number.
    texts [M, N].
    """
    rule.check(tree)
    law, vocab = rule.law(tree, p[texts].log()), p.size(1)
    out = torch.zeros(int(texts.max() + 1) * vocab + 1, dtype=torch.float64)
    for node in range(tree.size):
        after = law.following(torch.full((len(texts),), node))
        after = (
            torch.where(law.stop[:, node, None] > 1e-15, after / after.sum(1, keepdim=True), 0.0)
            * (chance * law.stop[:, node])[:, None]
        )
        out.index_add_(0, (texts[:, node, None] * vocab + 1 + torch.arange(vocab)).flatten(), after.flatten())
    return out


def distance(out: torch.Tensor, p: torch.Tensor, length: int) -> float:
    """Total variation between the target's law of texts of `length` tokens and that of emitted texts `out`, continued
    by the target.
    """
    vocab = p.size(1)
    count, law, want = 0, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    out = torch.cat([out, out.new_zeros(max(0, texts_up_to(length, vocab) - len(out)))])
    for _ in range(length):
        rows, start = p[count : count + len(law)], count * vocab + 1
        law = (law[:, None] * rows).flatten() + out[start : start + len(law) * vocab]
        want, count = (want[:, None] * rows).flatten(), start
    assert abs(float(out.sum()) - 1) < 1e-9, float(out.sum())
    return float((law - want).abs().sum() / 2)


def law_error(
    rule, parents: list[int], kinds: list[Kind], p: torch.Tensor, q: torch.Tensor, fixed: list[int] = (), ids=None
) -> float:
    """Total variation over all trees of one form. p and q reach far enough: rows for all texts up to the tree's
    depth.
    """
    tokens, chance = all_trees(parents, kinds, q, list(fixed) or [0] * len(parents))
    tree = as_trees(tokens, parents, kinds, q, ids)
    out = emitted(rule, tree, numbers(tokens, parents, p.size(1)), chance, p)
    return distance(out, p, int(tree.depths.max()) + 1)


def expected(
    rule, parents: list[int], kinds: list[Kind], p: torch.Tensor, q: torch.Tensor, said: list[Kind] = ()
) -> float:
    """Accepted drafted tokens in expectation over trees (drawn as `kinds`, handed over as `said` or the same) and
    verification.
    """
    tokens, chance = all_trees(parents, kinds, q, [0] * len(parents))
    law = rule.law(as_trees(tokens, parents, said or kinds, q), p[numbers(tokens, parents, p.size(1))].log())
    return float((law.expected * chance).sum())


def paper_weight(rest, w, left_of_q):
    """Traversal Verification, equation 3."""
    return rest / (rest + (1 - w))


def traversal_by_hand(
    tokens: list[int],
    parents: list[int],
    p: list[list[float]],
    q: list[list[float]],
    without: bool,
    weight=paper_weight,
):
    """The paper's recursive form, node by node with deletion: {node: (P(stop), row of the next token)}, in visiting
    order.

    p, q: a row for every node. `weight` replaces equation 3 for the negative controls.
    """
    p, q, alive, w = [list(r) for r in p], [list(r) for r in q], set(range(len(tokens))), {0: 1.0}
    children = lambda u: [v for v in sorted(alive) if parents[v] == u]  # noqa: E731

    def spread(u):
        for v in children(u):
            drawn = q[u][tokens[v]]
            w[v] = min(1.0, w[u] * p[u][tokens[v]] / drawn) if drawn > 0 else 0.0
            spread(v)

    spread(0)
    stops, going = {}, 1.0
    while True:
        v = 0
        while children(v):
            v = children(v)[0]
        accepted = 1.0 if v == 0 else w[v]
        stops[v] = going * accepted, p[v]
        if v == 0:
            return stops
        going *= 1 - accepted
        u = parents[v]
        alive.remove(v)
        residual = [max(0.0, w[u] * a - b) for a, b in zip(p[u], q[u])]
        rest = sum(residual)
        if without:
            q[u][tokens[v]] = 0.0
            left = sum(q[u])
            q[u] = [x / left if left > 0 else 0.0 for x in q[u]]
        else:
            left = 1.0
        if rest > 1e-15:
            w[u], p[u] = weight(rest, w[u], left), [x / rest for x in residual]
        else:
            w[u] = 0.0
        w[0] = 1.0
        spread(u)


def law_error_by_hand(
    parents: list[int], drawn: Kind, without: bool, p: torch.Tensor, q: torch.Tensor, weight=paper_weight, change=None
) -> float:
    """As `law_error`, for the recursive form: trees are drawn as `drawn`, changed by `change(tokens, parents)`, and
    verified.
    """
    tokens, chance = all_trees(parents, [drawn] * len(parents), q, [0] * len(parents))
    vocab, length, out = p.size(1), 0, torch.zeros(texts_up_to(len(parents), p.size(1)), dtype=torch.float64)
    for drafted, mass in zip(tokens.tolist(), chance.tolist()):
        drafted, form = change(drafted, parents) if change else (drafted, parents)
        texts = numbers(torch.tensor([drafted]), form, vocab)[0]
        for node, (stop, row) in traversal_by_hand(
            drafted, form, p[texts].tolist(), q[texts].tolist(), without, weight
        ).items():
            row = torch.tensor(row, dtype=torch.float64)
            out[int(texts[node]) * vocab + 1 : int(texts[node] + 1) * vocab + 1] += mass * stop * row / row.sum()
    for node in range(len(parents)):
        depth, at = 0, node
        while at > 0:
            depth, at = depth + 1, parents[at]
        length = max(length, depth + 1)
    return distance(out, p, length)


class Bulk:
    """Noise of many requests at once from one generator, fresh at every call; the keyed noise of the decode loop has
    the same law.
    """

    def __init__(self, batch: int, generator: torch.Generator, temperature: float = 1.0):
        self.batch, self.generator, self.temperature = batch, generator, temperature

    def uniform(self, count: int, device=None) -> torch.Tensor:
        return torch.rand(self.batch, count, generator=self.generator, dtype=torch.float64)

    def gumbel(self, vocab_size: int, device=None) -> torch.Tensor:
        return -torch.empty(self.batch, vocab_size).exponential_(generator=self.generator).log()

    def perturb(self, logits: torch.Tensor, tree: DraftTree) -> torch.Tensor:
        """Nodes of one depth stand in one position and share their noise."""
        levels = (
            -torch.empty(self.batch, int(tree.depths.max()) + 1, logits.size(2))
            .exponential_(generator=self.generator)
            .log()
        )
        return logits + levels[torch.arange(self.batch)[:, None], tree.depths]

    def chosen(self, logits: torch.Tensor, tree: DraftTree) -> torch.Tensor:
        return self.perturb(logits, tree).argmax(-1)


class TableHead:
    """A learned head's interface over a table: a beam is the texts it stands behind, ids are the draft vocabulary."""

    def __init__(self, q: torch.Tensor, ids: torch.Tensor):
        self.vocab, self.ids, self.logp = q.size(1), ids, q[:, ids].log()

    def roots(self, texts: torch.Tensor):
        """texts [B]: numbers of the texts so far, root included."""
        return texts, None

    def expand(self, beam, tokens: torch.Tensor, parents: torch.Tensor):
        texts, before = beam
        now = texts[:, None] if before is None else before.gather(1, parents) * self.vocab + 1 + tokens
        return self.logp[now], (texts, now)


def continuations(
    rule,
    policy,
    head: TableHead,
    p: torch.Tensor,
    texts: torch.Tensor,
    length: int,
    generator: torch.Generator,
    relabel=lambda tree: tree,
):
    """Speculative decoding over a table: texts [B] (numbers), each continued by at least `length` tokens, cut there ->
    numbers [B].
    """
    vocab, left = p.size(1), torch.full_like(texts, length)
    done = texts.clone()
    while len(going := (left > 0).nonzero()[:, 0]):
        noise = Bulk(len(going), generator)
        tree = relabel(policy.sample(head, head.roots(done[going]), torch.zeros_like(going), noise))
        at = done[going, None].repeat(1, tree.size)
        for node in range(1, tree.size):
            at[:, node] = at.gather(1, tree.parents[:, node, None])[:, 0] * vocab + 1 + tree.tokens[:, node]
        accepted = rule(tree, p[at].float().log(), noise)
        rows = torch.arange(len(going))
        emitted = torch.cat([tree.tokens[rows[:, None], accepted.path[:, 1:]], accepted.next_token[:, None]], 1)
        emitted = emitted.scatter(
            1, (accepted.counts - 1)[:, None], accepted.next_token[:, None]
        )  # behind the accepted nodes
        for step in range(emitted.size(1)):
            grows = (step < accepted.counts) & (left[going] > 0)
            done[going] = torch.where(grows, done[going] * vocab + 1 + emitted[:, step], done[going])
            left[going] -= grows.long()
    return done


def g_test(prefix: int, texts: torch.Tensor, p: torch.Tensor, length: int) -> tuple[float, float]:
    """(G = 2 sum O ln(O / E), the value that a right sampler exceeds once in a million times) against the exact joint
    law behind `prefix`.
    """
    vocab, law, first = p.size(1), torch.ones(1, dtype=torch.float64), prefix
    for _ in range(length):
        law, first = (law[:, None] * p[first : first + len(law)]).flatten(), first * vocab + 1
    seen = torch.bincount(texts - first, minlength=len(law)).double()
    assert not bool(((law == 0) & (seen > 0)).any())
    statistic = 2 * float(torch.where(seen > 0, seen * (seen / (law * len(texts)).clamp(min=1e-300)).log(), 0.0).sum())
    return statistic, g_bound(int((law > 0).sum()) - 1)


def g_bound(freedom: int) -> float:
    """What G exceeds once in a million times under the right law (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.753 * spread**0.5) ** 3
