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

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from draftsmith.models.features import Features, FeatureSpec, Middle, Shared, TrainingFeatures
from draftsmith.models.heads import decoding, dream_decoding
from draftsmith.models.heads.attention import kernel_for, merged_attention, query_blocks
from draftsmith.models.heads.cross import CrossLayer, attend
from draftsmith.models.heads.decoding import Beam
from draftsmith.models.heads.distill import tally
from draftsmith.models.heads.dream_config import DreamConfig, DreamObjective, DreamShape
from draftsmith.models.heads.dream_decoding import Context, RootedBlocks
from draftsmith.models.heads.dream_rows import Rows, appended, kept_rows
from draftsmith.models.heads.eagle import noisy
from draftsmith.models.heads.frozen import Weights, teacher_losses
from draftsmith.models.heads.head import DraftHead
from draftsmith.models.heads.layer import Layer, angles, frequencies


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

    def split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tapped states [..., 2h] -> embeddings and last states [..., h]."""
        return hidden.to(self.norm.weight.dtype).split(self.config.hidden_size, -1)

    def rows(self, embedded: torch.Tensor, states: torch.Tensor, kept: torch.Tensor) -> Rows:
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

    def documents(self, features: TrainingFeatures) -> list[Rows]:
        """`rows` of every document of the packed row."""
        (embedded, states), found = self.split(features.hidden), []
        for start, stop in zip(features.packing.borders, features.packing.borders[1:]):
            mine = slice(start, stop)
            visual, columns = (None if x is None else x[mine] for x in (features.visual, features.columns))
            kept = kept_rows(
                torch.ones(stop - start, dtype=torch.bool, device=states.device),
                visual,
                columns,
                self.config.keep_ratio,
            )
            found.append(self.rows(embedded[mine], states[mine], kept))
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
        rows = Rows.joined(self.documents(features))
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
        parts = packing.parts(steps).to(device)
        if len(rows) == 0:
            none = torch.zeros(steps, device=device)
            sums = tally(packing, parts, parts, torch.zeros(steps, 0, device=device)) | {
                "feature": none[:1],
                "middle": none[:1],
                "kl": none,
            }
            return self.nothing(), sums
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
        return dream_decoding.prefill(self, features)

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
        return dream_decoding.root_at(self, features, at)

    def expand(self, beam: Beam | RootedBlocks, tokens: torch.Tensor, parents: torch.Tensor):
        """tokens [B, k], parents [B, k] (rows of the last expand) -> log-probs [B, k, V] fp32, beam. The first call
        consumes the roots [B, 1].
        """
        output, beam = dream_decoding.expand(self, beam, tokens, parents)
        return torch.log_softmax(self.logits(output).float(), -1), beam
