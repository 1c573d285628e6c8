"""Drafters on disk, as serving engines read them. Other conventions for layer taps exist only here.

A layout is one file that ends in a `Layout`, and its name in LAYOUTS; loading, saving, importing and exporting find it
there.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats import arctic, dream, eagle, eagle3, hivis, speculators
from draftsmith.models.formats.layout import Layout, Serving, Stored, other_weights, read_files, written
from draftsmith.models.formats.place import fetch
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets.place import say

__all__ = [
    "LAYOUTS",
    "fetch",
    "from_pretrained",
    "layout_for",
    "layout_of",
    "load_drafter",
    "open_head",
    "read_files",
    "save_drafter",
    "store",
]

LAYOUTS = (
    hivis.LAYOUT,
    eagle3.LAYOUT,
    speculators.LAYOUT,
    eagle.LAYOUT,
    eagle.VLLM_LAYOUT,
    arctic.LAYOUT,
    dream.LAYOUT,
)


def told_once_a_run(line: str) -> None:
    """Beside the output of a command, by the first process of several."""
    if os.environ.get("RANK", "0") == "0":
        say(line)


def load_drafter(place: str | Path, shared: Shared, taps_below: int | None = None):
    """The head at a place (directory, Hub id or `bundled:NAME`, any layout), for a target that shares this and has
    `taps_below` layers. fp32 or the embedding's dtype.

    Raises UserError naming the file and the key when something is missing, unknown or of another target.
    """
    return open_head(read_files(fetch(place)), shared, taps_below)


def open_head(
    stored: Stored, shared: Shared, taps_below: int | None = None, taps: str | None = None, tell=told_once_a_run
):
    """`load_drafter` of a directory that was read. taps: which convention its tap numbers follow, one of
    `taps.CONVENTIONS`, where the user says it; tell: gets a line for each contradiction that was mended.
    """
    layout = layout_of(stored)
    config, tensors, lines = layout.mend(stored, taps_below, taps)
    for line in lines:
        tell(f"{stored.folder}: {line}")
    return layout.read(config, tensors, shared, taps_below, stored.folder)


def from_pretrained(place: str | Path, target: TextTarget | None = None):
    """The head at a place, in evaluation mode, for an opened target; without one the target that the drafter names is
    loaded. Raises UserError where other weights than it was trained for lie there.
    """
    if target is None:
        stored = read_files(fetch(place))
        if stored.target is None:
            raise UserError(f"{place}: names no target; expected one to be given")
        target = TextTarget.load(stored.target)
        if others := other_weights(stored.about, target):
            raise UserError(f"{place}: {others}")
    return load_drafter(place, target.shared, target.layers)


def save_drafter(head, folder: str | Path, about: dict, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a head in the layout that drafters are kept in. `about` (target, recipe, figures) goes to
    draftsmith.json.
    """
    layout = next(layout for layout in LAYOUTS if layout.head is type(head))
    return store(head, Path(folder), layout, {"head": head.name, **about}, dtype)


def store(head, folder: Path, layout: Layout, about: dict, dtype: torch.dtype, serving: Serving | None = None) -> Path:
    """Writes a directory beside its place, checks it by reading it back bit for bit, then moves it there."""
    config, tensors = layout.write(head, dtype, serving)
    with written(folder, config, tensors, about) as new:
        again = load_drafter(new, replace(head.shared, embedding=head.shared.embedding.float()))
        for (name, value), (_, own) in zip(again.state_dict().items(), head.state_dict().items(), strict=True):
            if not torch.equal(value.to("cpu", dtype), own.to("cpu", dtype)):
                raise RuntimeError(f"{name} differs after reloading")
        if not torch.equal(again.ids.cpu(), head.ids.cpu()):
            raise RuntimeError("draft vocabulary differs after reloading")
    return folder


def layout_of(stored: Stored) -> Layout:
    """Raises UserError that says what lies there instead."""
    holding = [layout for layout in LAYOUTS if layout.holds(stored.tensors)]
    named = [layout for layout in holding or LAYOUTS if layout.recognises(stored.config)]
    if not named and "speculators_model_type" not in stored.config:
        named = holding
    if named:
        return named[0]
    known = ", ".join(sorted({layout.head.name for layout in LAYOUTS}))
    raise UserError(f"{stored.folder}/config.json: {family(stored)}, expected a head that draftsmith has: {known}")


def layout_for(head, engine: str) -> Layout:
    """The layout in which an engine (`export --to`) loads this head. Raises UserError where none does."""
    mine = [layout for layout in LAYOUTS if layout.head is type(head)]
    for layout in mine:
        if engine in layout.engines:
            if difference := layout.unable(head, engine):
                raise UserError(f"--to {engine}: {difference} ({engine} would compute something else)")
            return layout
    engines = ", ".join(name for layout in mine for name in layout.engines) or "none: no engine does"
    raise UserError(f"--to {engine}: {engine} does not load heads of kind {head.name}; expected one of {engines}")


def family(stored: Stored) -> str:
    """What lies there where no layout recognises it."""
    config = stored.config
    if config.get("model_type") == "mlp_speculator":
        return "found an LSTM or MLP speculator (Arctic)"
    if config.get("model_type") == "medusa":
        return "found a Medusa head"
    if "speculators_model_type" in config:
        return f"found a speculators drafter of kind {config['speculators_model_type']}"
    return f"architectures: found {config.get('architectures')}"
