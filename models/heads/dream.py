"""The DREAM head (arXiv 2505.19201) for vision-language targets: three blocks over embeddings, the middle one attending to the target's states.

    x1 = block 0 (self-attention, no norm before it) of the embeddings e;   x2 = gated cross-attention of x1 to the target's last states s;
    x3 = block 2 (self-attention) of x2;   s' = norm(x3), and the target's frozen output head on it.

No shift: row i consumes e_i and states strictly before i and predicts s_i, hence token i + 1. In a `Packing` row t is the round whose root is
x_{t+1}: DREAM's row t + 1. Each row brings one key of its own into the cross-attention, the state of the row before it, so that a tree node
brings its parent's, the head's own where the target's is not there yet.

Where the paper and the authors' code differ (and where both fail), this is:
    the middle state       per token, output of the layer, layers 1 .. 40 %, by default (`middle_*` choose otherwise); supervises block 0
    weights                0.2 feature, 0.2 middle, 1.0 KL, each a mean over the taught tokens; KL(target || draft) summed over the vocabulary
    compression            on, 0.75: of the visual rows those with the most attention in the target's last layer, over all images of a prompt
                           Chosen for every prompt, in training too: each answer of a conversation with images is a row of its own there
    compressed are         embeddings and queries; keys and values of the cross-attention are all rows'
    tree mask              in the cross-attention too: siblings are not seen
    row 0, padding         a row without a state before it gets 0 from the cross-attention, not a mean of the future; padding is never seen
    positions              places in the whole sequence ("original"), so that a head works at every ratio; "compact" numbers the kept rows
    second pass            over the head's own states (one script, not the paper): left out
    depth                  of a tree policy counts drafted levels, as for all heads
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Middle, Shared, Teacher, TrainingFeatures
from draftsmith.models.heads.cross import CrossLayer, attend
from draftsmith.models.heads.distill import CHUNK, tally
from draftsmith.models.heads.dream_config import DreamConfig, DreamObjective, DreamShape
from draftsmith.models.heads.eagle import noisy
from draftsmith.models.heads.frozen import Weights, taught_by
from draftsmith.models.heads.hung import Hung, spans_of
from draftsmith.models.heads.layer import Layer, angles, frequencies
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


def kept_rows(real: torch.Tensor, visual: torch.Tensor | None, columns: torch.Tensor | None, ratio: float) -> torch.Tensor:
    """Which rows of one document feed the head [S] bool: real [S] bool without padding; of its n visual ones the max(1, int(n ratio)) with the
    most attention (ties: the first), over all images together; all of its text. At ratio 1, or without images, `real` itself."""
    if ratio == 1 or visual is None or not bool((visual & real).any()):
        return real
    places = (visual & real).nonzero().flatten()
    best = columns[places].sort(descending=True, stable=True).indices[:max(1, int(len(places) * ratio))]
    return (real & ~visual).index_fill(0, places[best], True)


@dataclass
class Context:
    """Committed rows of B requests: `own` caches keys and values of the kept rows in blocks 0 and 2; `cross` those of the states, one for each
    row but the first; `pending` states wait for the token behind them; skipped [B] is what positions are more than numbers of kept rows."""

    own: SlotCache
    cross: SlotCache
    skipped: torch.Tensor
    pending: Features | None

    def select(self, rows: torch.Tensor) -> None:
        self.own.select(rows)
        self.cross.select(rows)
        self.skipped, p = self.skipped[rows], self.pending
        self.pending = Features(p.tokens[rows], p.hidden[rows], p.lengths[rows])


@dataclass(frozen=True)
class Beam:
    """Trees of a context: hidden [B, k, h] the head's states at the last level, seen [B, k, nodes] which expanded nodes each of them sees
    (itself included), depth the levels drafted so far."""

    context: Context
    hidden: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    depth: int = 0


@dataclass(frozen=True)
class Grove:
    """Trees hung in a packed row: one `Hung` for each block. hidden [P, k, h]: states that the next nodes go on from."""

    blocks: tuple[Hung, Hung, Hung]
    hidden: torch.Tensor


class DreamHead(nn.Module):
    """shared: the target's embedding and output head (neither trained nor saved); ids [V] int64 is all of its vocabulary."""

    name, Shape, Objective, Config = "dream", DreamShape, DreamObjective, DreamConfig
    tables = ()

    def __init__(self, config: DreamConfig, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__()
        # A tensor of its own: a target's that is spread over processes is emptied in place
        self.config, self.shared = config, Shared(shared.embedding.detach(), shared.project, shared.scale)
        device = shared.embedding.device
        self.register_buffer("ids", torch.arange(config.vocab_size, device=device) if ids is None else ids.to(device), persistent=False)
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

    def _rows(self, embedded: torch.Tensor, states: torch.Tensor, kept: torch.Tensor):
        """One document: embedded, states [N, h], kept [N] bool -> (the head's states [n, h] of the kept rows, block 0's outputs [n, h], their
        positions [n], keys and values [., H_kv, D] of the three blocks: of the kept rows, of all states, of the kept rows)."""
        first, cross, last = self.layers
        places, count = kept.nonzero().flatten(), int(kept.sum())
        numbers = torch.arange(count, device=kept.device)
        positions = places if self.config.positions == "original" else numbers
        turned, causal = self.angles(positions), numbers <= numbers[:, None]
        x1, pair0 = self._self_block(first, embedded[places], turned, causal)
        pair1 = cross.cross_attn.key_value(states)
        before = torch.arange(len(kept), device=kept.device) < places[:, None]
        x2 = cross.finish(x1, self._attend(cross.query(x1), pair1, before, cross.cross_attn.scale))
        x3, pair2 = self._self_block(last, x2, turned, causal)
        return self.norm(x3), x1, positions, (pair0, pair1, pair2)

    def _self_block(self, layer, x, turned, seen):
        u = layer.enter(x)
        pair = layer.self_attn.key_value(u, *turned)
        return layer.finish(x, self._attend(layer.self_attn.query(u, *turned), pair, seen, layer.self_attn.scale)), pair

    @staticmethod
    def _attend(query, pair, seen, scale):
        keys, values = (x.transpose(0, 1)[None] for x in pair)
        return attend(query[None], keys, values, seen[None], scale)[0]

    # Training

    def _documents(self, features: TrainingFeatures):
        """Per document of the packed row: (start, kept [N] bool, `_rows` of it)."""
        embedded, states = self._split(features.hidden)
        for start, stop in zip(features.packing.borders, features.packing.borders[1:]):
            mine = slice(start, stop)
            visual, columns = (None if x is None else x[mine] for x in (features.visual, features.columns))
            kept = kept_rows(torch.ones(stop - start, dtype=torch.bool, device=states.device), visual, columns, self.config.keep_ratio)
            yield start, kept, self._rows(embedded[mine], states[mine], kept)

    def states(self, features: TrainingFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's states and block 0's outputs [P, h] at `packing.rows + 1`, over the target's states."""
        found = list(self._documents(features))
        at = torch.cat([start + kept.nonzero().flatten() for start, kept, _ in found])
        wanted = torch.searchsorted(at, features.packing.rows.to(at.device) + 1)  # tokens that the target wrote are kept
        return torch.cat([rows[0] for *_, rows in found])[wanted], torch.cat([rows[1] for *_, rows in found])[wanted]

    def loss(self, features: TrainingFeatures, objective: DreamObjective, counts: list[float] | None = None):
        """Mean over the P taught rows i (`packing.rows + 1`), s' and x1 the head's, s and m the target's last and chosen middle state:

        loss = 1 / counts[0] sum_i ( feature_weight SmoothL1(s', s) + middle_weight SmoothL1(x1, m) + kl_weight KL(p(s) || p(s')) ),

        SmoothL1 (beta 1) a mean over the h numbers, KL summed over the vocabulary, p the target's frozen output head. counts: what to divide by
        where several packed rows make one batch. Features without a middle state (those that time a step) have no such term.
        Returns (loss, sums as `tally` has them, and "feature", "middle", "kl" [1]: each loss alone).
        """
        packing, teacher, device = features.packing, features.teacher, features.tokens.device
        rows = packing.rows.to(device)
        parts = torch.ones(1, len(rows), dtype=torch.bool, device=device)
        if len(rows) == 0:
            none = torch.zeros(1, device=device)
            sums = tally(packing, parts, parts, torch.zeros(1, 0, device=device)) | {"feature": none, "middle": none, "kl": none}
            return sum(p.sum() * 0.0 for p in self.parameters()), sums
        states, first = self.states(self._noisy(features, objective.noise))
        wide = torch.promote_types(states.dtype, torch.float32)
        feature = F.smooth_l1_loss(states.to(wide), teacher.final.to(wide), reduction="none").mean(-1)
        middle = torch.zeros_like(feature)
        if features.middle is not None:
            middle = F.smooth_l1_loss(first.to(wide), features.middle[rows + 1].to(wide), reduction="none").mean(-1)
        crossed, rank = taught_by(states[None], teacher, self.shared.project, self.config.vocab_size, Weights(1.0, 0.0, 1))
        kl = crossed[0] - entropy(teacher, self.config.vocab_size)
        losses = objective.feature_weight * feature + objective.middle_weight * middle + objective.kl_weight * kl
        sums = {name: value.detach().sum()[None] for name, value in (("feature", feature), ("middle", middle), ("kl", kl))}
        return losses.sum() / max((counts or packing.counts(1))[0], 1), tally(packing, parts, rank == 0, losses.detach()[None]) | sums

    def _noisy(self, features: TrainingFeatures, width: float) -> TrainingFeatures:
        """Noise on the states that are attended to, not on the embeddings."""
        if width == 0:
            return features
        h = self.config.hidden_size
        states = noisy(replace(features, hidden=features.hidden[:, h:]), width).hidden
        return replace(features, hidden=torch.cat([features.hidden[:, :h], states], -1))

    # Decoding

    def prefill(self, features: Features) -> Context:
        """Keys and values of all rows of the prompts; the last state of each stays pending, as the key that the root brings."""
        (batch, width), device, c = features.tokens.shape, features.hidden.device, self.config
        embedded, states = self._split(features.hidden)
        shape = (batch, c.num_key_value_heads, width + 64, c.head_dim, states.dtype, device)
        own, cross = SlotCache(2, *shape), SlotCache(1, *shape)
        skipped = torch.zeros_like(features.lengths)
        own.lengths, cross.lengths = skipped.clone(), features.lengths - 1
        for b, count in enumerate(features.lengths.tolist()):
            real = torch.ones(count, dtype=torch.bool, device=device)
            visual, columns = (None if x is None else x[b, :count] for x in (features.visual, features.columns))
            kept = kept_rows(real, visual, columns, c.keep_ratio)
            *_, pairs = self._rows(embedded[b, :count], states[b, :count], kept)
            n = own.lengths[b] = int(kept.sum())
            skipped[b] = count - n if c.positions == "original" else 0
            for layer, pair, stop in ((own.layers[0], pairs[0], n), (cross.layers[0], pairs[1], count - 1), (own.layers[1], pairs[2], n)):
                layer.keys[b, :, :stop], layer.values[b, :, :stop] = (x[:stop].transpose(0, 1) for x in pair)
        rows, last = torch.arange(batch, device=device)[:, None], (features.lengths - 1)[:, None]
        pending = Features(features.tokens[rows, last], features.hidden[rows, last], torch.ones_like(features.lengths))
        return Context(own, cross, skipped, pending)

    def extend(self, context: Context, features: Features) -> None:
        """Adds newly committed tokens (the last root and the accepted nodes); computed with the next root, with the target's states."""
        context.pending = features

    def roots(self, context: Context) -> Beam:
        """A beam that waits for the root tokens."""
        return Beam(context)

    def hang(self, features: TrainingFeatures, at: torch.Tensor) -> Grove:
        """A beam of P roots at the packed indices `at` [P] (each at least 1 inside its document, no piece of an image), with the states of its
        document's rows before."""
        device, kept, pairs, positions = features.hidden.device, [], ([], [], []), []
        for _, mine, (_, _, places, found) in self._documents(features):
            kept.append(mine)
            positions.append(places)
            for block, pair in zip(pairs, found):
                block.append(pair)
        rows = [tuple(torch.cat(part) for part in zip(*block)) for block in pairs]
        mine, at = torch.cat(kept).cpu(), at.cpu()
        number = mine.cumsum(0)[at] - 1  # of the root among the kept rows
        if not bool(mine[at].all()):
            raise UserError("found a root that is a piece of an image, expected text")
        chosen = features.packing.select(mine)
        turns = torch.cat(positions)[number.to(device)]
        _, states = self._split(features.hidden)
        hidden = states[at.to(device) - 1][:, None]
        inner = [span._replace(stop=span.stop + 1) for span in spans_of(chosen, number)]  # a root sees the kept rows right up to it
        own = [self._hung(row, inner, number.to(device), hidden, turns) for row in (rows[0], rows[2])]
        cross = Hung.at(features.packing, at, rows[1], states)  # the state right before a root is the key that the root itself brings
        return Grove((own[0], cross, own[1]), hidden)

    @staticmethod
    def _hung(row, spans, limit, hidden, positions) -> Hung:
        none = row[0].new_zeros(len(limit), 0, *row[0].shape[1:])
        return Hung(row, spans, limit, hidden, (none, none), torch.zeros(len(limit), 1, 0, dtype=torch.bool, device=limit.device), positions)

    def unroll(self, features: TrainingFeatures, steps: int):
        """For every step k < steps: (rows [P_k] of `packing.rows` that take part, the head's states [P_k, h] that predict token row + 2 + k), the text's
        own tokens behind each root, over the head's own states: what drafting computes."""
        rows = features.packing.rows
        beam = self.hang(features, rows + 1) if len(rows) else None
        for k in range(steps if len(rows) else 0):
            part, tokens = features.packing.takes_part(k), features.tokens[(rows + 1 + k).clamp(max=len(features.tokens) - 1).to(features.tokens.device)]
            output, beam = self._grow_hung(beam, tokens[:, None], torch.zeros_like(tokens)[:, None])
            yield rows[part], output[:, 0][part.to(output.device)]

    def expand(self, beam: Beam | Grove, tokens: torch.Tensor, parents: torch.Tensor):
        """tokens [B, k], parents [B, k] (rows of the last expand) -> log-probs [B, k, V] fp32, beam. The first call consumes the roots [B, 1]."""
        if isinstance(beam, Grove):
            output, beam = self._grow_hung(beam, tokens, parents)
        else:
            output, beam = self._commit_root(beam.context, tokens) if beam.depth == 0 else self._grow(beam, tokens, parents)
        return torch.log_softmax(self.logits(output).float(), -1), beam

    def _through(self, tokens, hidden, positions, attentions):
        """New rows through the blocks: tokens and positions [B, T], hidden [B, T, h] the states right before them; attentions: for each block
        what attends(query [B, T, H, D], key, value [B, T, H_kv, D]) -> [B, T, H, D]."""
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
        """The three blocks' attention over caches that are placed; visible: what new rows see [B, T, slots] of `own` and of `cross`."""
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
            raise RuntimeError("this context has no pending row: a root was already expanded and nothing was observed since")
        batch, width = pending.tokens.shape
        last, steps = (pending.lengths - 1)[:, None], torch.arange(width, device=root.device)
        following = torch.cat([pending.tokens[:, 1:], root], 1).scatter(1, last, root)
        positions = context.skipped[:, None] + context.own.lengths[:, None] + steps
        visible = []
        for cache in caches:
            cache.place(width)
            visible.append(torch.arange(cache.visible, device=root.device) <= (cache.lengths[:, None] + steps)[..., None])
        output = self._through(following, self._split(pending.hidden)[1], positions, self._cached(context, tuple(visible)))
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
            committed = (torch.arange(cache.visible, device=tokens.device) < cache.lengths[:, None])[:, None].repeat(1, new, 1)
            slots = cache.lengths[:, None] + torch.arange(before + new, device=tokens.device)
            visible.append(committed.scatter_(2, slots[:, None].expand(-1, new, -1), seen))
        positions = (context.skipped + context.own.lengths + beam.depth - 1)[:, None].expand(-1, new)
        output = self._through(tokens, beam.hidden[rows, parents], positions, self._cached(context, tuple(visible)))
        return output, replace(beam, hidden=output, seen=seen, depth=beam.depth + 1)

    def _grow_hung(self, beam: Grove, tokens: torch.Tensor, parents: torch.Tensor):
        grown, rows = [], torch.arange(len(tokens), device=tokens.device)[:, None]

        def over(block: Hung):
            def attends(query, key, value):
                attended, own, seen = block.attend(query, key, value, parents, self.config.head_dim**-0.5)
                grown.append(replace(block, own=own, seen=seen, positions=block.positions + 1))
                return attended
            return attends
        positions = beam.blocks[0].positions[:, None].expand(-1, tokens.size(1))
        output = self._through(tokens, beam.hidden[rows, parents], positions, [over(block) for block in beam.blocks])
        return output, Grove(tuple(grown), output)


@torch.no_grad()
def entropy(teacher: Teacher, vocab: int) -> torch.Tensor:
    """Of the target's law at each taught token [P] fp32 (nats); the [P, V] logits are never held whole."""
    found = []
    for part in teacher.final.split(max(64, CHUNK // vocab)):
        logits = teacher.project(part, None)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(-(logits.exp() * logits).nan_to_num(0.0).sum(-1))
    return torch.cat(found)
