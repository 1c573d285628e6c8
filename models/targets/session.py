"""Decoding with a target: a session owns the cache, masks and positions of one batch of prompts."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.graphs import STEP, bucket
from draftsmith.models.slots import SlotCache
from draftsmith.models.targets.attention import Watch
from draftsmith.models.targets.reading import ImagePrompt, keep, kept_rows
from draftsmith.models.tree import DraftTree

NODES = 8  # captured passes have one node or a multiple of this
PREFILL_ROWS = 512  # rows of one prefill chunk: the mask is [chunk, prefix], never [length, length]


@dataclass(frozen=True)
class Prefill:
    """logits [B, V] after each prompt's last token; features of all prompt rows."""

    logits: torch.Tensor
    features: Features


@dataclass(frozen=True)
class Verified:
    """logits [B, N, V] and hidden [B, N, taps * h] of every tree node; lengths [B], the rows before the root; probes
    [B, N, h] behind every node, None for a tree without them.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    probes: torch.Tensor | None = None

    def features(self, tree: DraftTree, path: torch.Tensor, counts: torch.Tensor) -> Features:
        """Features of the committed nodes path [B, M], the first counts [B] of each row being real."""
        rows = torch.arange(len(path), device=path.device)[:, None]
        probes = None if self.probes is None else self.probes[rows, path]
        positions = self.lengths[:, None] + torch.arange(path.size(1), device=path.device)
        return Features(
            tree.tokens[rows, path],
            self.hidden[rows, path],
            counts,
            probes,
            positions,
            torch.zeros_like(path, dtype=torch.bool),
        )


class TextSession:
    """One batch of prompts being decoded. lengths [B] are the rows the target has processed and kept; probes are never
    kept.
    """

    def __init__(self, target, spec: FeatureSpec, batch: int, capacity: int):
        self.target, self.spec, self.capacity = target, spec, capacity
        self.cache = self._new_cache(batch, capacity)
        self.shift = torch.zeros_like(self.cache.lengths)  # what rope positions behind the prompts are more than places

    @property
    def lengths(self) -> torch.Tensor:
        return self.cache.lengths

    @property
    def known_lengths(self) -> list[int]:
        """`lengths` on the host."""
        return self.cache.known_lengths

    @torch.no_grad()
    def prefill(self, prompts: list[list[int] | ImagePrompt]) -> Prefill:
        """Processes the prompts (ragged, none empty) in chunks, then, for a spec with a probe, one probe behind each.
        Raises UserError for images that do not fit their prompt.
        """
        device = self.target.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max())
        tokens = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)
        reading = self.target.read(tokens, lengths, [getattr(p, "images", {}) for p in prompts])
        self.shift, places = reading.shift, torch.arange(width, device=device).expand(len(prompts), -1)
        hidden, last, columns = [], None, torch.zeros(tokens.shape, device=device) if self.spec.columns else None
        for rows in reading.chunks(PREFILL_ROWS):
            watch = Watch(self.target.body, places[:, rows] < lengths[:, None]) if self.spec.columns else None
            with watch or nullcontext():
                final, tapped = self._run(
                    places[:, rows],
                    reading.seen(rows),
                    places[:, : rows.stop],
                    counts=(lengths - rows.start).clamp(0, rows.stop - rows.start),
                    **reading.inputs(rows),
                )
            if watch:
                columns[:, : rows.stop] += watch.sums
            self.cache.lengths = self.cache.lengths + final.size(1)
            hidden.append(tapped)
            ending = final[
                torch.arange(len(prompts), device=device), (lengths - 1 - rows.start).clamp(0, final.size(1) - 1)
            ]
            last = ending if last is None else torch.where((lengths > rows.start)[:, None], ending, last)
        self.cache.lengths = lengths
        probes = None if self.spec.probe is None else self._probes_behind_prompts(width)
        columns = None if columns is None else columns / lengths[:, None]
        features = Features(tokens, torch.cat(hidden, 1), lengths, probes, places, reading.visual, columns)
        if self.spec.rows == "text":
            features = keep(features, kept_rows(self.spec, tokens, reading.visual))
        return Prefill(self.target.project(last), features)

    @torch.no_grad()
    def verify(self, tree: DraftTree) -> Verified:
        """One forward over all tree nodes; nothing is kept until `commit`.

        A tree with probes has one behind every node v: it stands at the position of v's children and sees the kept
        rows, v with its ancestors, and itself. No node sees a probe.
        """
        if not tree.probes:
            return Verified(*(self._captured(tree) or self._eager(tree)), self.lengths)
        size, alone = (
            tree.size,
            torch.eye(tree.size, dtype=torch.bool, device=tree.tokens.device).expand_as(tree.ancestors),
        )
        own = torch.cat(
            [torch.cat([tree.ancestors, torch.zeros_like(alone)], 2), torch.cat([tree.ancestors, alone], 2)], 1
        )
        depths = torch.cat([tree.depths, tree.depths + 1], 1)
        rows = torch.cat([self.target.embed(tree.tokens), self._probe_rows(*tree.tokens.shape)], 1)
        final, hidden = self._run(*self._layout(depths, own), own=own, inputs_embeds=rows)
        return Verified(self.target.project(final[:, :size]), hidden[:, :size], self.lengths, final[:, size:])

    def _eager(self, tree: DraftTree) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and tapped states of a tree without probes."""
        layout = self._layout(tree.depths, tree.ancestors)
        final, hidden = self._run(*layout, own=tree.ancestors, input_ids=tree.tokens)
        return self.target.project(final), hidden

    def _captured(self, tree: DraftTree) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same from a captured graph: nodes and visible slots are padded to buckets; padding sees what is kept and
        itself, and stands behind the tree. None where passes are not captured.
        """
        target, cache, size = self.target, self.cache, tree.size
        if not target.graphs.on or type(cache) is not SlotCache:
            return None
        count = bucket(size, NODES) if size > 1 else 1
        visible = bucket(max(self.known_lengths) + count, STEP)
        cache.hold(visible)
        pad = (0, count - size)
        own = torch.eye(count, dtype=torch.bool, device=tree.tokens.device).repeat(len(tree.tokens), 1, 1)
        own[:, :size, :size] = tree.ancestors
        inputs = {
            "tokens": F.pad(tree.tokens, pad),
            "depths": F.pad(tree.depths, pad),
            "own": own,
            "lengths": self.lengths,
            "shift": self.shift,
        }
        key = ("verify", self.spec.taps, tree.tokens.size(0), count, visible)
        run = partial(static_pass, target, self.spec, cache, visible)
        found = target.graphs(cache, key, run, lambda: self._eager(tree), inputs)
        return found and tuple(x[:, :size] for x in found)

    def commit(self, path: torch.Tensor, counts: torch.Tensor, told: tuple[list, list] | None = None) -> None:
        """Keeps the nodes path [B, M] (root first; only the first counts [B] of a row are real) of the last verified
        tree. told: both on the host, where they are known there.
        """
        self.cache.commit(path, counts, told)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with only these batch rows."""
        self.cache.select(rows)
        self.shift = self.shift[rows]

    def admit(self, prompts: list[list[int] | ImagePrompt]) -> Prefill:
        """Processes more prompts, whose rows stand behind those that go on (none at first, where all were given up)."""
        new = type(self)(self.target, self.spec, len(prompts), max(map(len, prompts)) + 1)
        prefill = new.prefill(prompts)
        self.cache.join(new.cache)
        self.shift = torch.cat([self.shift, new.shift])
        return prefill

    def copy(self) -> "TextSession":
        """A session of its own with the same kept rows, so that one prefill serves batches whose requests end."""
        new = type(self)(self.target, self.spec, len(self.lengths), self.capacity)
        new.cache.select(self.lengths[:0])
        new.cache.join(self.cache)
        new.shift = self.shift
        return new

    def rewind(self, lengths: torch.Tensor) -> None:
        """Drops the kept rows behind the first lengths [B] of each row, so that one prefill serves several methods.
        Rows that `select` gave up do not come back. Raises ValueError for more rows than are kept.
        """
        if lengths.shape != self.lengths.shape or bool((lengths > self.lengths).any()):
            raise ValueError(
                f"rewind: found {lengths.tolist()}, expected at most the kept rows {self.lengths.tolist()}"
            )
        self._rewind(lengths.to(self.lengths))

    def reachable(self, length: int) -> int:
        """The most rows up to `length` kept ones that every request can be rewound to."""
        return length

    def _probes_behind_prompts(self, width):
        """[B, width, h]: states of a probe behind each prompt, at the prompt's last row; zero elsewhere."""
        lengths = self.lengths
        none = torch.zeros_like(lengths)[:, None]
        alone = torch.ones_like(none[..., None], dtype=torch.bool)
        final, _ = self._run(
            *self._layout(none, alone),
            own=alone,
            inputs_embeds=self._probe_rows(len(lengths), 1),
        )
        rows = torch.arange(len(lengths), device=lengths.device)
        return final.new_zeros(len(lengths), width, final.size(-1)).index_put_((rows, lengths - 1), final[:, 0])

    def _probe_rows(self, batch, count):
        if self.spec.probe is None:
            raise ValueError("a tree with probes needs a FeatureSpec with a probe")
        return self.spec.probe.detach().to(self.target.device, self.target.dtype).expand(batch, count, -1)

    def _layout(self, depths, own):
        """As `layout_behind`, reading no slot behind the longest row."""
        return layout_behind(self.cache.lengths, depths, own, max(self.known_lengths) + depths.size(1))

    def _new_cache(self, batch: int, capacity: int):
        config, target = self.target.config, self.target
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        form = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            head_dim,
            target.dtype,
            target.device,
        )
        return target.graphs.spare.take(self, *form) if target.graphs.on else SlotCache(*form)

    def _rewind(self, lengths) -> None:
        self.cache.lengths = lengths

    def _announce(self, own, counts, size: int) -> None:
        """What caches with states have to know of the next rows; keys and values need no more than their mask."""

    def _run(self, positions, seen, places, own=None, counts=None, **inputs):
        """own [B, T, T] bool: what the rows of a tree see of one another; or counts [B]: of rows of prompts, those that
        are real.
        """
        self._announce(own, counts, positions.size(1))
        self.cache.place(positions.size(1))
        return self.target.behind(
            self.spec,
            self.cache,
            positions,
            seen,
            places,
            **{"position_ids": positions + self.shift[:, None], **inputs},
        )


def layout_behind(lengths: torch.Tensor, depths: torch.Tensor, own: torch.Tensor, visible: int):
    """Rows depths [B, T] positions behind lengths [B] kept ones, each seeing all of these and own [B, T, T] of one
    another -> (positions [B, T], seen [B, T, visible] without windows, places [B, visible]).
    """
    size = depths.size(1)
    places = torch.arange(visible, device=lengths.device).expand(len(lengths), -1)
    seen = (places < lengths[:, None])[:, None].repeat(1, size, 1)
    slots = lengths[:, None] + torch.arange(size, device=lengths.device)
    seen.scatter_(2, slots[:, None].expand(-1, size, -1), own)
    positions = lengths[:, None] + depths
    return positions, seen, places.scatter(1, slots, positions)


def static_pass(target, spec: FeatureSpec, cache: SlotCache, visible: int, tokens, depths, own, lengths, shift):
    """A verify pass in which no shape depends on the lengths [B] -> logits and tapped states of all nodes."""
    positions, seen, places = layout_behind(lengths, depths, own, visible)
    with cache.standing(lengths, visible):
        cache.place(tokens.size(1))
        rope = positions + shift[:, None]
        final, hidden = target.behind(spec, cache, positions, seen, places, position_ids=rope, input_ids=tokens)
    return target.project(final), hidden
