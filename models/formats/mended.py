"""What drafters from elsewhere say of themselves where their tensors say something else: harmless contradictions are
mended and told; what the tensors leave open is refused.

Published heads copy much of config.json from their target (its architecture, its number of layers, its tied
embeddings), and converters change the types of the draft vocabulary's maps.
"""

import re
from collections.abc import Callable, Sequence

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.formats.layout import Stored, Tensors, architecture
from draftsmith.models.formats.taps import NAME, tap_indices
from draftsmith.models.heads.vocabulary import to_offsets

LAYER = re.compile(r"(?:layers|additional_layers)\.(\d+)\.")


def plain_names(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def holds_eagle3(tensors: Tensors) -> bool:
    """Anything that no EAGLE-1 head has: a layer that reads an embedding beside the state, or a draft vocabulary."""
    named = plain_names(tensors)
    query = named.get("layers.0.self_attn.q_proj.weight")
    fc = named.get("fc.weight")
    wide = query is not None and fc is not None and query.ndim == fc.ndim == 2 and query.size(1) == 2 * fc.size(0)
    return wide or any(name.startswith("midlayer.") or ".hidden_norm." in name or name == "d2t" for name in named)


def holds_eagle(tensors: Tensors) -> bool:
    """One layer as wide as the state behind `fc` over a state and an embedding, and no output head."""
    named = plain_names(tensors)
    fc = named.get("fc.weight")
    one = any(name.startswith("layers.0.") for name in named) and "lm_head.weight" not in named
    return one and fc is not None and fc.ndim == 2 and fc.size(1) == 2 * fc.size(0) and not holds_eagle3(tensors)


def check_spelling(
    tensors: Tensors,
    place: str,
    spell: Callable[[str], str] = lambda name: name.removeprefix("model.").replace("layers.0.", "midlayer.", 1),
) -> None:
    """Raises UserError for a tensor that stands there under two spellings of its name."""
    spelt = list(map(spell, tensors))
    twice = sorted({name for name in spelt if spelt.count(name) > 1})
    if twice:
        raise UserError(f"{place}: {twice[0]}: found under two spellings, expected one")


def mend_architecture(config: dict, names: Sequence[str], kind: str) -> list[str]:
    if architecture(config) in names:
        return []
    found, config["architectures"] = config.get("architectures"), [names[0]]
    return [f"architectures: found {found}, but the tensors are those of {kind}"]


def mend_layers(config: dict, said, tensors: Tensors) -> list[str]:
    """num_hidden_layers (of the target, often), where the file holds one layer."""
    if said in (None, 1) or any(found and int(found[1]) > 0 for found in map(LAYER.match, tensors)):
        return []
    config["num_hidden_layers"] = 1
    return [f"num_hidden_layers: found {said}, but the tensors are those of one layer"]


def mend_eagle(names: Sequence[str], kind: str = "an EAGLE-1 or EAGLE-2 head"):
    """`Layout.mend` of directories of EAGLE-1 heads, and of what is built like them, whose architecture may be any of
    `names`.
    """

    def mend(stored: Stored, layers: int | None, taps: str | None) -> tuple[dict, Tensors, list[str]]:
        config, tensors = dict(stored.config), plain_names(stored.tensors)
        check_spelling(stored.tensors, f"{stored.folder}/model.safetensors")
        lines = mend_architecture(config, names, kind)
        return config, tensors, lines + mend_layers(config, config.get("num_hidden_layers"), tensors)

    return mend


def mend_eagle3(names: Sequence[str] | None, taps_are: str | None = None):
    """`Layout.mend` of EAGLE-3 directories whose architecture may be any of `names` (None: it is told otherwise what
    they are); taps_are: the convention that the layout prescribes.
    """

    def mend(stored: Stored, layers: int | None, taps: str | None) -> tuple[dict, Tensors, list[str]]:
        config, tensors, place = dict(stored.config), plain_names(stored.tensors), f"{stored.folder}/model.safetensors"
        check_spelling(stored.tensors, place)
        layer = config.get("transformer_layer_config")
        said = (layer if isinstance(layer, dict) else {}) | config
        lines = [] if names is None else mend_architecture(config, names, "an EAGLE-3 head")
        lines += mend_layers(config, said.get("num_hidden_layers"), tensors)
        if said.get("tie_word_embeddings") and "lm_head.weight" in tensors:
            lines.append("tie_word_embeddings: found true, but the head has an lm_head.weight of its own")
            config["tie_word_embeddings"] = False
        vocab_size = said.get("vocab_size")
        lines += mend_size(config, tensors, vocab_size)
        if "d2t" in tensors and config.get("draft_vocab_size") != vocab_size:
            lines += mend_maps(tensors, vocab_size, place)
        found, line = tap_indices(config, f"{stored.folder}/config.json", layers, taps or taps_are)
        config[NAME] = list(found)
        config.pop("eagle_config", None)
        return config, tensors, lines + [line] * (line is not None and (taps is not None or taps_are is None))

    return mend


def mend_size(config: dict, tensors: Tensors, vocab_size) -> list[str]:
    """draft_vocab_size, from the rows of the output head."""
    head, said = tensors.get("lm_head.weight"), config.get("draft_vocab_size")
    rows = len(head) if head is not None and head.ndim == 2 else None
    mapped = "d2t" in tensors and tensors["d2t"].shape == (rows,)
    if rows is None or said == rows or not (mapped or rows == vocab_size):
        return []
    config["draft_vocab_size"] = rows
    if said is None and rows == vocab_size:
        return []  # engines take a missing one for the target's
    return [f"draft_vocab_size: found {said}, but lm_head.weight has {rows} rows"]


def mend_maps(tensors: Tensors, vocab_size, place: str) -> list[str]:
    """d2t as int64 and t2d as bool, in place. Raises UserError for a d2t whose numbers may not be the offsets that were
    meant.
    """
    offsets, kept, lines = tensors["d2t"], tensors.get("t2d"), []
    if offsets.is_floating_point():
        exact = 2 / torch.finfo(offsets.dtype).eps
        raise UserError(
            f"{place}: d2t: found {offsets.dtype}, expected torch.int64 (offsets above {exact:.0f} are rounded in it)"
        )
    if offsets.ndim != 1 or offsets.dtype == torch.bool or not isinstance(vocab_size, int):
        return []  # refused with what was expected
    if offsets.dtype != torch.int64:
        lines.append(f"d2t: found {offsets.dtype}, read as torch.int64")
        offsets = tensors["d2t"] = offsets.long()
    if kept is not None and kept.dtype != torch.bool and bool(((kept == 0) | (kept == 1)).all()):
        lines.append(f"t2d: found {kept.dtype} of zeros and ones, read as torch.bool")
        kept = tensors["t2d"] = kept.bool()
    ids = offsets + torch.arange(len(offsets))
    if kept is not None:
        given = kept.nonzero().flatten()
        if not torch.equal(ids.sort().values, given) and torch.equal(offsets.sort().values, given):
            raise UserError(f"{place}: d2t: found the target's ids themselves, expected offsets (id less row)")
        return lines
    if not bool((ids.diff() > 0).all()) or len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < vocab_size:
        raise UserError(
            f"{place}: d2t: found numbers that are no offsets of ascending ids below {vocab_size}, and no t2d to tell "
            f"what they are"
        )
    if len(ids) > 1 and bool((offsets.diff() > 0).all()):
        raise UserError(
            f"{place}: d2t: found numbers that may be offsets or the target's ids themselves, and no t2d to tell"
        )
    tensors["t2d"] = to_offsets(ids, vocab_size)["t2d"]
    return [*lines, "t2d: missing, made from d2t"]
