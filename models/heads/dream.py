"""The DREAM head (arXiv 2505.19201) for vision-language targets: three blocks over embeddings, the middle one attending
to the target's states.

    x1 = block 0 (self-attention, no norm before it) of the embeddings e;   x2 = gated cross-attention of x1 to the
        target's last states s;
    x3 = block 2 (self-attention) of x2;   s' = norm(x3), and the target's frozen output head on it.

No shift: row i consumes e_i and states strictly before i and predicts s_i, hence token i + 1. In a `Packing` row t is
the round whose root is x_{t+1}: DREAM's row t + 1. Each row brings one key of its own into the cross-attention, the
state of the row before it, so that a tree node brings its parent's, the head's own where the target's is not there yet.

Where the paper and the authors' code differ (and where both fail), this is:
    the middle state       per token, output of the layer, layers 1 .. 40 %, by default (`middle_*` choose otherwise);
                           supervises block 0
    weights                0.2 feature, 0.2 middle, 1.0 KL, each a mean over the supervised tokens; KL(target || draft)
                           summed over the vocabulary
    compression            on, 0.75: of the visual rows those with the most attention in the target's last layer, over
                           all images of a prompt
                           Chosen for every prompt, in training too: each answer of a conversation with images is a row
                               of its own there
    compressed are         embeddings and queries; keys and values of the cross-attention are all rows'
    tree mask              in the cross-attention too: siblings are not seen
    row 0, padding         a row without a state before it gets 0 from the cross-attention, not a mean of the future;
                           padding is never seen
    positions              places in the whole sequence ("original"), so that a head works at every ratio; "compact"
                           numbers the kept rows
    second pass            over the head's own states (one of the authors' scripts, KL only; not the paper): `steps`
                           above 1, as drafting has them
    depth                  of a tree policy counts drafted levels, as for all heads
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Middle, Shared, TrainingFeatures
from draftsmith.models.heads import decoding
from draftsmith.models.heads.attention import kernel_for, merged_attention, query_blocks
from draftsmith.models.heads.cross import CrossLayer, attend
from draftsmith.models.heads.distill import tally
from draftsmith.models.heads.dream_config import DreamConfig, DreamObjective, DreamShape
from draftsmith.models.heads.dream_rows import Rows, appended, kept_rows
from draftsmith.models.heads.eagle import noisy
from draftsmith.models.heads.frozen import Weights, teacher_losses
from draftsmith.models.heads.head import DraftHead
from draftsmith.models.heads.layer import Layer, angles, frequencies
from draftsmith.models.heads.rooted import RootedTrees, spans_of
from draftsmith.models.slots import SlotCache


class FirstLayer(Layer):
    """Block 0: nothing stands before its attention."""

    def __init__(self, config):
        super().__init__(config, config.hidden_size)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x


class LastLayer(Layer):
    """Block 2."""

    def __init__(self, config):
        super().__init__(config, config.hidden_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return self.input_layernorm(x)


@dataclass
class Context:
    """Committed rows of B requests: `own` caches keys and values of the kept rows in blocks 0 and 2; `cross` those of
    the states, one for each row but the first; `pending` states wait for the token behind them; skipped [B] is what
    positions are more than numbers of kept rows.
    """

    own: SlotCache
    cross: SlotCache
    skipped: torch.Tensor
    pending: Features | None

    def mark(self):
        return self.own.lengths, self.cross.lengths, self.pending

    def restore(self, state):
        own, cross, pending = state
        more, self.pending = (0, pending) if self.own.lengths is own else (pending.lengths, None)
        self.own.lengths, self.cross.lengths = own + more, cross + more

    def select(self, rows: torch.Tensor) -> None:
        self.own.select(rows)
        self.cross.select(rows)
        self.skipped, p = self.skipped[rows], self.pending
        self.pending = Features(p.tokens[rows], p.hidden[rows], p.lengths[rows])

    def join(self, other: "Context") -> None:
        self.own.join(other.own)
        self.cross.join(other.cross)
        self.skipped, self.pending = torch.cat([self.skipped, other.skipped]), self.pending.joined(other.pending)


@dataclass(frozen=True)
class Beam:
    """Trees of a context: hidden [B, k, h] the head's states at the last level, seen [B, k, nodes] which expanded nodes
    each of them sees (itself included), depth the levels drafted so far.
    """

    context: Context
    hidden: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    depth: int = 0


@dataclass(frozen=True)
class RootedBlocks:
    """Trees rooted in a packed row: one `RootedTrees` for each block. hidden [P, k, h]: states that the next nodes go
    on from.
    """

    blocks: tuple[RootedTrees, RootedTrees, RootedTrees]
    hidden: torch.Tensor


class DreamHead(DraftHead):
    """shared: the target's embedding and output head (neither trained nor saved); ids [V] int64 is all of its
    vocabulary.
    """

    name, Shape, Objective, Config = "dream", DreamShape, DreamObjective, DreamConfig

    def __init__(self, config: DreamConfig, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__()
        self.config, self.shared = config, Shared(shared.embedding.detach(), shared.project, shared.scale)
        device = shared.embedding.device
        self.register_buffer(
            "ids", torch.arange(config.vocab_size, device=device) if ids is None else ids.to(device), persistent=False
        )
        self.layers = nn.ModuleList([FirstLayer(config), CrossLayer(config), LastLayer(config)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope = frequencies(config, device)  # no buffer: fp32 frequencies must survive casts of the module
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def start_from(self, target) -> None:
        """Starts from noise, as the authors' heads do."""

    @property
    def feature_spec(self) -> FeatureSpec:
        c = self.config
        middle = Middle(c.middle_granularity, (c.middle_first, c.middle_last), c.middle_feature)
        return FeatureSpec(taps=(0, "last"), columns=c.columns, middle=middle)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """The head's states [..., h] -> the target's output head on them [..., V]."""
        return self.shared.project(output.to(self.shared.embedding.dtype))

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return angles(self._rope, positions, self.norm.weight.dtype)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [...] -> [..., h], as the target takes them in: block 0 has no norm that would hide a scale."""
        return (F.embedding(tokens, self.shared.embedding) * self.shared.scale).to(self.norm.weight.dtype)

    def _split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tapped states [..., 2h] -> embeddings and last states [..., h]."""
        return hidden.to(self.norm.weight.dtype).split(self.config.hidden_size, -1)

    def _rows(self, embedded: torch.Tensor, states: torch.Tensor, kept: torch.Tensor) -> Rows:
        """One document: embedded, states [N, h], kept [N] bool."""
        first, cross, last = self.layers
        places, numbers = kept.nonzero().flatten(), torch.arange(int(kept.sum()), device=kept.device)
        positions = places if self.config.positions == "original" else numbers
        turned = self.angles(positions)
        x1, pair0 = self._self_block(first, embedded[places], turned)
        pair1 = cross.cross_attn.key_value(states)
        before = torch.arange(len(kept), device=kept.device) < places[:, None]
        keys, values = (x.transpose(0, 1)[None] for x in pair1)
        x2 = cross.finish(x1, attend(cross.query(x1)[None], keys, values, before[None], cross.cross_attn.scale)[0])
        return Rows(kept, positions, x1, x2, (pair0, pair1, last.self_attn.key_value(last.enter(x2), *turned)))

    @staticmethod
    def _self_block(layer: Layer, x: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor]):
        """All kept rows x [n, h] of one document through block 0 or 2 -> (output [n, h], keys and values [n, H_kv,
        D]).
        """
        u = layer.enter(x)
        pair, attention = layer.self_attn.key_value(u, *turned), layer.self_attn
        query, keys, values = (y.transpose(0, 1)[None] for y in (attention.query(u, *turned), *pair))
        attended = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=attention.scale, enable_gqa=query.size(1) != keys.size(1)
        )
        return layer.finish(x, attended[0].transpose(0, 1)), pair

    # Training

    def _documents(self, features: TrainingFeatures) -> list[Rows]:
        """`_rows` of every document of the packed row."""
        (embedded, states), found = self._split(features.hidden), []
        for start, stop in zip(features.packing.borders, features.packing.borders[1:]):
            mine = slice(start, stop)
            visual, columns = (None if x is None else x[mine] for x in (features.visual, features.columns))
            kept = kept_rows(
                torch.ones(stop - start, dtype=torch.bool, device=states.device),
                visual,
                columns,
                self.config.keep_ratio,
            )
            found.append(self._rows(embedded[mine], states[mine], kept))
        return found

    def unroll(self, features: TrainingFeatures, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For every step k < steps: (rows [P_k] of `packing.rows` that take part, the head's states [P_k, h] that
        predict token row + 2 + k).
        """
        return features.packing.rounds(self._unroll(features, steps)[0])

    def _unroll(self, features: TrainingFeatures, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's states [K, P, h] of the rounds with roots at `packing.rows + 1` and block 0's outputs [P, h] at
        the roots.

        Step k is the k-th token behind the root. Block 0 reads embeddings alone: its outputs are those of the rows
        there. In the others a step sees what is there without it, the target's states before the root and block 2's
        rows up to it, and beside that what drafting adds: the states of the steps before it, detached, and block 2's
        rows of steps 1 .. k. Where a row takes no part in a step its output means nothing.
        """
        rows = Rows.joined(self._documents(features))
        _, cross, last = self.layers
        kept, device, kernel = rows.kept.cpu(), features.hidden.device, kernel_for(features.hidden.device)
        number = (
            kept.cumsum(0)[features.packing.rows + 1] - 1
        )  # of the roots among the kept rows; tokens that the target wrote are kept
        blocks = (
            query_blocks(features.packing, features.packing.rows, kernel.block),
            query_blocks(features.packing.select(kept), number, kernel.block),
        )
        number = number.to(device)
        states, inner = ([last.self_attn.repeat(x, 1) for x in pair] for pair in rows.pairs[1:])
        none = rows.pairs[0][0].new_zeros(0, len(number), *rows.pairs[0][0].shape[1:])
        drafted, own, outputs = (none, none), (none, none), []
        for k in range(steps):
            at, turned = (number + k).clamp(max=len(rows.x1) - 1), self.angles(rows.positions[number] + k)
            x = rows.x2[at]
            if k > 0:
                drafted = appended(drafted, cross.cross_attn.key_value(outputs[-1].detach()))
                x = cross.finish(
                    rows.x1[at],
                    merged_attention(
                        cross.query(rows.x1[at]), *states, *drafted, blocks[0], kernel, cross.cross_attn.scale
                    ),
                )
            u = last.enter(x)
            if k > 0:
                own = appended(own, last.self_attn.key_value(u, *turned))
            attended = merged_attention(
                last.self_attn.query(u, *turned).contiguous(), *inner, *own, blocks[1], kernel, last.self_attn.scale
            )
            outputs.append(self.norm(last.finish(x, attended)))
        return torch.stack(outputs), rows.x1[number]

    def loss(self, features: TrainingFeatures, objective: DreamObjective, counts: list[float] | None = None):
        """Mean over each step's supervised rows i (`packing.rows + 1 + k`), s' and x1 the head's, s and m the target's
        last and chosen middle state:

        loss = sum_k 1 / counts[k] sum_i ( kl_weight KL(p(s) || p(s')) + [k = 0] (feature_weight SmoothL1(s', s) +
        middle_weight SmoothL1(x1, m)) ),

        SmoothL1 (beta 1) a mean over the h numbers, KL summed over the vocabulary, p the target's frozen output head.
        counts: what to divide by where several packed rows make one batch. Features without a middle state (those that
        time a step) have no such term. Returns (loss, sums as `tally` has them, "feature" and "middle" [1], "kl" [K]:
        each loss alone).
        """
        packing, teacher, device, steps = features.packing, features.teacher, features.tokens.device, objective.steps
        rows = packing.rows.to(device)
        parts = torch.stack([packing.takes_part(k) for k in range(steps)]).to(device)
        if len(rows) == 0:
            none = torch.zeros(steps, device=device)
            sums = tally(packing, parts, parts, torch.zeros(steps, 0, device=device)) | {
                "feature": none[:1],
                "middle": none[:1],
                "kl": none,
            }
            return sum(p.sum() * 0.0 for p in self.parameters()), sums
        states, first = self._unroll(self._noisy(features, objective.noise), steps)
        wide = torch.promote_types(states.dtype, torch.float32)
        feature = F.smooth_l1_loss(states[0].to(wide), teacher.final.to(wide), reduction="none").mean(-1)
        middle = torch.zeros_like(feature)
        if features.middle is not None:
            middle = F.smooth_l1_loss(first.to(wide), features.middle[rows + 1].to(wide), reduction="none").mean(-1)
        weights = Weights(1.0, 0.0, 1, kl=True)
        kl, rank, reach = teacher_losses(
            states, teacher, self.shared.project, self.config.vocab_size, weights, objective
        )
        kl = kl * reach * parts
        losses = objective.kl_weight * kl
        losses[0] += objective.feature_weight * feature + objective.middle_weight * middle
        sums = {
            name: value.detach().sum(-1).reshape(-1)
            for name, value in (("feature", feature), ("middle", middle), ("kl", kl))
        }
        divisors = torch.tensor([max(n, 1) for n in counts or packing.counts(steps)], device=device)
        return (losses.sum(1) / divisors).sum(), tally(packing, parts, rank == 0, losses.detach()) | sums

    def _noisy(self, features: TrainingFeatures, width: float) -> TrainingFeatures:
        """Noise on the states that are attended to, not on the embeddings."""
        if width == 0:
            return features
        h = self.config.hidden_size
        states = noisy(replace(features, hidden=features.hidden[:, h:]), width).hidden
        return replace(features, hidden=torch.cat([features.hidden[:, :h], states], -1))

    # Decoding

    def prefill(self, features: Features) -> Context:
        """Keys and values of all rows of the prompts; the last state of each stays pending: the root brings its key."""
        (batch, width), device, c = features.tokens.shape, features.hidden.device, self.config
        embedded, states = self._split(features.hidden)
        shape = (batch, c.num_key_value_heads, width + 64, c.head_dim, states.dtype, device)
        own, cross = SlotCache(2, *shape), SlotCache(1, *shape)
        lengths = torch.zeros_like(features.lengths)
        for b, count in enumerate(features.lengths.tolist()):
            visual, columns = (None if x is None else x[b, :count] for x in (features.visual, features.columns))
            kept = kept_rows(torch.ones(count, dtype=torch.bool, device=device), visual, columns, c.keep_ratio)
            pairs = self._rows(embedded[b, :count], states[b, :count], kept).pairs
            n = lengths[b] = int(kept.sum())
            for layer, pair, stop in (
                (own.layers[0], pairs[0], n),
                (cross.layers[0], pairs[1], count - 1),
                (own.layers[1], pairs[2], n),
            ):
                layer.keys[b, :, :stop], layer.values[b, :, :stop] = (x[:stop].transpose(0, 1) for x in pair)
        own.lengths, cross.lengths = lengths, features.lengths - 1
        skipped = (features.lengths - lengths) * (c.positions == "original")
        rows, last = torch.arange(batch, device=device)[:, None], (features.lengths - 1)[:, None]
        pending = Features(features.tokens[rows, last], features.hidden[rows, last], torch.ones_like(features.lengths))
        return Context(own, cross, skipped, pending)

    def extend(self, context: Context, features: Features) -> None:
        """Adds newly committed tokens (the last root and the accepted nodes); computed with the next root."""
        context.pending = decoding.pending_rows(context.pending, features)

    def roots(self, context: Context) -> Beam:
        """A beam that waits for the root tokens."""
        return Beam(context)

    def root_at(self, features: TrainingFeatures, at: torch.Tensor) -> RootedBlocks:
        """A beam of P roots at the packed indices `at` [P] (each at least 1 inside its document, no piece of an image),
        with the states of its document's rows before.
        """
        device, rows = features.hidden.device, Rows.joined(self._documents(features))
        mine, at = rows.kept.cpu(), at.cpu()
        number = mine.cumsum(0)[at] - 1  # of the root among the kept rows
        if not bool(mine[at].all()):
            raise UserError("found a root that is a piece of an image, expected text")
        turns = rows.positions[number.to(device)]
        _, states = self._split(features.hidden)
        hidden = states[at.to(device) - 1][:, None]
        inner = [
            span._replace(stop=span.stop + 1) for span in spans_of(features.packing.select(mine), number)
        ]  # a root sees the kept rows right up to it
        own = [self._rooted(row, inner, number.to(device), hidden, turns) for row in (rows.pairs[0], rows.pairs[2])]
        cross = RootedTrees.at(
            features.packing, at, rows.pairs[1], states
        )  # the state right before a root is the key that the root itself brings
        return RootedBlocks((own[0], cross, own[1]), hidden)

    @staticmethod
    def _rooted(row, spans, limit, hidden, positions) -> RootedTrees:
        none = row[0].new_zeros(len(limit), 0, *row[0].shape[1:])
        return RootedTrees(
            row,
            spans,
            limit,
            hidden,
            (none, none),
            torch.zeros(len(limit), 1, 0, dtype=torch.bool, device=limit.device),
            positions,
        )

    def expand(self, beam: Beam | RootedBlocks, tokens: torch.Tensor, parents: torch.Tensor):
        """tokens [B, k], parents [B, k] (rows of the last expand) -> log-probs [B, k, V] fp32, beam. The first call
        consumes the roots [B, 1].
        """
        if isinstance(beam, RootedBlocks):
            output, beam = self._grow_rooted(beam, tokens, parents)
        else:
            output, beam = (
                self._commit_root(beam.context, tokens) if beam.depth == 0 else self._grow(beam, tokens, parents)
            )
        return torch.log_softmax(self.logits(output).float(), -1), beam

    def _through(self, tokens, hidden, positions, attentions):
        """New rows through the blocks: tokens and positions [B, T], hidden [B, T, h] the states right before them;
        attentions: for each block what attends(query [B, T, H, D], key, value [B, T, H_kv, D]) -> [B, T, H, D].
        """
        x, turned = self.embed(tokens), self.angles(positions)
        for layer, attends in zip(self.layers, attentions):
            if isinstance(layer, CrossLayer):
                attended = attends(layer.query(x), *layer.cross_attn.key_value(hidden))
            else:
                u = layer.enter(x)
                attended = attends(layer.self_attn.query(u, *turned), *layer.self_attn.key_value(u, *turned))
            x = layer.finish(x, attended)
        return self.norm(x)

    def _cached(self, context: Context, visible: tuple[torch.Tensor, torch.Tensor]):
        """The three blocks' attention over caches that are placed; visible: what new rows see [B, T, slots] of `own`
        and of `cross`.
        """

        def over(layer, seen):
            def attends(query, key, value):
                keys, values = layer.update(key.transpose(1, 2), value.transpose(1, 2))
                return attend(query, keys, values, seen, self.config.head_dim**-0.5)

            return attends

        own, cross = context.own.layers, context.cross.layers
        return [over(own[0], visible[0]), over(cross[0], visible[1]), over(own[1], visible[0])]

    def _commit_root(self, context: Context, root: torch.Tensor):
        pending, caches = context.pending, (context.own, context.cross)
        if pending is None:
            raise RuntimeError(
                "this context has no pending row: a root was already expanded and nothing was observed since"
            )
        batch, width = pending.tokens.shape
        last, steps = (pending.lengths - 1)[:, None], torch.arange(width, device=root.device)
        following = torch.cat([pending.tokens[:, 1:], root], 1).scatter(1, last, root)
        positions = context.skipped[:, None] + context.own.lengths[:, None] + steps
        visible = []
        for cache in caches:
            cache.place(width)
            visible.append(
                torch.arange(cache.visible, device=root.device) <= (cache.lengths[:, None] + steps)[..., None]
            )
        output = self._through(
            following, self._split(pending.hidden)[1], positions, self._cached(context, tuple(visible))
        )
        for cache in caches:
            cache.lengths = cache.lengths + pending.lengths
        context.pending = None
        output = output.gather(1, last[..., None].expand(-1, -1, output.size(-1)))
        return output, Beam(context, output, torch.zeros(batch, 1, 0, dtype=torch.bool, device=root.device), 1)

    def _grow(self, beam: Beam, tokens: torch.Tensor, parents: torch.Tensor):
        context, (batch, new), before = beam.context, tokens.shape, beam.seen.size(2)
        rows = torch.arange(batch, device=tokens.device)[:, None]
        itself = torch.eye(new, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        seen, visible = torch.cat([beam.seen[rows, parents], itself], -1), []
        for cache in (context.own, context.cross):
            cache.place(new, offset=before)
            committed = (torch.arange(cache.visible, device=tokens.device) < cache.lengths[:, None])[:, None].repeat(
                1, new, 1
            )
            slots = cache.lengths[:, None] + torch.arange(before + new, device=tokens.device)
            visible.append(committed.scatter_(2, slots[:, None].expand(-1, new, -1), seen))
        positions = (context.skipped + context.own.lengths + beam.depth - 1)[:, None].expand(-1, new)
        output = self._through(tokens, beam.hidden[rows, parents], positions, self._cached(context, tuple(visible)))
        return output, replace(beam, hidden=output, seen=seen, depth=beam.depth + 1)

    def _grow_rooted(self, beam: RootedBlocks, tokens: torch.Tensor, parents: torch.Tensor):
        grown, rows = [], torch.arange(len(tokens), device=tokens.device)[:, None]

        def over(block: RootedTrees):
            def attends(query, key, value):
                attended, new = block.attend(query, key, value, parents, self.config.head_dim**-0.5)
                grown.append(replace(block, **new, positions=block.positions + 1))
                return attended

            return attends

        positions = beam.blocks[0].positions[:, None].expand(-1, tokens.size(1))
        output = self._through(tokens, beam.hidden[rows, parents], positions, [over(block) for block in beam.blocks])
        return output, RootedBlocks(tuple(grown), output)
