"""Statistics of a frozen target's attention: entropies of rows and means of columns, without an attention matrix being
kept (DREAM, section 4).

The target runs its usual kernels. Behind the layers that are asked about, the weights are computed once more from the
queries and keys that the kernel got (after the rope and any norms of theirs, so that it holds for every architecture),
in fp32, for one group of heads and a block of queries at a time, and reduced at once. The mask builder is registered
under the same name: without one transformers passes no mask, and weights that were recomputed would not be causal.
"""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from draftsmith.models.errors import UserError
from draftsmith.models.features import Middle
from draftsmith.models.targets import grouped

NAME = "draftsmith_statistics"
CHUNK = 2**24  # weights computed at a time (64 MB in fp32)


def attend(module, query, key, value, attention_mask, scaling=None, **options):
    """`sdpa`, and a look at its inputs for who asked: module.note(query [B, H, Q, D], key [B, H_kv, K, D], mask [B, 1,
    Q, K], scaling).
    """
    output = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    note = getattr(module, "note", None)
    if note is not None:
        note(query, key, attention_mask[..., : key.size(2)], module.head_dim**-0.5 if scaling is None else scaling)
    return output


def weight_blocks(query, key, mask, scaling):
    """Attention weights [B, H / H_kv, q, K] fp32, additive mask [B, 1, Q, K], one block of queries and one key head
    after the other, as (which queries, weights). Masked entries are exactly 0.
    """
    batch, heads, queries, _ = query.shape
    group = heads // key.size(1)
    size = max(1, CHUNK // (batch * group * key.size(2)))
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        for shared, own in zip(key.split(1, 1), query[:, :, rows].split(group, 1)):
            scores = own.float() @ shared.float().mT * scaling
            yield rows, torch.softmax(scores + mask[:, :, rows].float(), -1)


def row_entropy(query, key, mask, scaling) -> torch.Tensor:
    """[B, Q] fp32: entropy in nats of each query's weights, mean over heads (DREAM, AE of section 4.1)."""
    entropy = query.new_zeros(query.size(0), query.size(2), dtype=torch.float32)
    for rows, weights in weight_blocks(query, key, mask, scaling):
        entropy[:, rows] -= torch.xlogy(weights, weights).sum((1, 3))
    return entropy / query.size(1)


def column_sums(query, key, mask, scaling, asking) -> torch.Tensor:
    """[B, K] fp32: the weight that each key receives from the queries `asking` [B, Q] bool, mean over heads, summed
    over them.
    """
    sums = query.new_zeros(query.size(0), key.size(2), dtype=torch.float32)
    for rows, weights in weight_blocks(query, key, mask, scaling):
        sums += (weights * asking[:, None, rows, None]).sum((1, 2))
    return sums / query.size(1)


class Watch:
    """A context in which a decoder body's forwards are watched; one for each forward.

    columns: whether to sum the last layer's columns, over the rows `asking` [B, Q] bool -> `sums` [B, K] fp32. middle:
    which intermediate state to choose, rows `real` [B, Q] bool counting in a document's mean -> `state` [B, Q, h] and
    `entropies` [B, Q, hi - lo] fp32. Nothing but the best state so far is kept.
    """

    def __init__(
        self, body, asking: torch.Tensor | None = None, middle: Middle | None = None, real: torch.Tensor | None = None
    ):
        self.body, self.asking, self.middle, self.real = body, asking, middle, real
        self.sums = self.state = self.best = None
        self.found: list[torch.Tensor] = []

    @property
    def entropies(self) -> torch.Tensor:
        return torch.stack(self.found, -1)

    def __enter__(self) -> "Watch":
        from transformers import AttentionInterface, AttentionMaskInterface  # there is a model: their code is loaded
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        layers, config = self.body.layers, self.body.config
        first, behind = (0, 1) if self.middle is None else self.middle.layers
        if not 0 <= first < behind <= len(layers):
            raise UserError(f"middle.layers: found {first}..{behind}, expected a range inside 0..{len(layers)}")
        if config._attn_implementation not in ("sdpa", grouped.NAME):
            raise UserError(
                f"attention statistics: found a target with {config._attn_implementation} attention, expected sdpa"
            )
        self.before, self.watched, self.hooks = config._attn_implementation, [], []
        if self.asking is not None:
            self.watch(layers[-1].self_attn, self.note_columns)
        for layer in layers[first:behind] if self.middle else ():
            self.watch(layer.self_attn, self.note_entropy)
            self.hooks.append(layer.register_forward_hook(self.choose))
        config._attn_implementation = NAME
        return self

    def __exit__(self, *_):
        self.body.config._attn_implementation = self.before
        for module in self.watched:
            del module.note
        for hook in self.hooks:
            hook.remove()

    def watch(self, module, note) -> None:
        before = getattr(module, "note", None)
        module.note = note if before is None else lambda *inputs: (before(*inputs), note(*inputs))
        if before is None:
            self.watched.append(module)

    def note_columns(self, *inputs) -> None:
        self.sums = column_sums(*inputs, self.asking)

    def note_entropy(self, *inputs) -> None:
        self.found.append(row_entropy(*inputs))

    def choose(self, _layer, inputs, output) -> None:
        """Keeps this layer's state where its attention was sharper than that of every layer before."""
        entropy = self.found[-1]
        if self.middle.granularity == "sample":
            entropy = ((entropy * self.real).sum(1) / self.real.sum(1))[:, None].expand_as(entropy)
        leaving = output[0] if isinstance(output, tuple) else output
        state = leaving if self.middle.feature == "output" else inputs[0]
        if self.best is None:
            self.best, self.state = entropy, state
            return
        better = entropy < self.best  # ties stay with the lower layer
        self.best = torch.where(better, entropy, self.best)
        self.state = torch.where(better[..., None], state, self.state)
