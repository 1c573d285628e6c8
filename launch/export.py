"""`draftsmith export` and `draftsmith import`: drafter directories as the engines load them, and public ones as
drafters of this project.
"""

from dataclasses import replace
from pathlib import Path
from string import Template

from draftsmith.launch.trained import Trained
from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats import fetch, layout_for, open_head, read_files, save_drafter, store
from draftsmith.models.formats.embedding import read_target
from draftsmith.models.formats.layout import Serving
from draftsmith.models.formats.place import SAFE_FILES
from draftsmith.models.formats.taps import CONVENTIONS
from draftsmith.models.targets import locate

ENGINES = ("vllm", "sglang", "speculators", "arctic")


def export_drafter(
    place: str | Path, out: str | Path, to: str, target: str | None = None, depth: int = 5, report=print
) -> Path:
    """Writes OUT (a new place) for an engine, checked key by key by reading it back. Only layouts that describe the
    target need its files (its embedding). depth: drafted tokens in the config and in the command that is shown; an OWL
    drafter drafts the n_predict that it was trained for. What goes beyond the training is reported, one line each.
    """
    if to not in ENGINES:
        raise UserError(f"--to: found {to}, expected {', '.join(ENGINES)}")
    out = new_place(out)
    stored = read_files(fetch(place))
    trained = Trained.of(stored)
    target = target or stored.target
    head = open_head(stored, stored.shared())
    layout, serving = layout_for(head, to), None
    context = head.config.max_position_embeddings
    if target is None:
        raise UserError(f"{stored.folder}: names no target; expected --target")
    if layout.described:
        config, architecture, embedding = read_target(target)
        head = open_head(stored, Shared(embedding), config.num_hidden_layers, tell=lambda line: None)  # told above
        serving = Serving(locate(target), architecture, depth)
        context = config.max_position_embeddings
    store(head, out, layout, {"head": head.name, "target": target, **stored.about}, stored.dtype, serving)
    config, tensors = layout.write(head, stored.dtype, serving)
    report(
        f"{len(tensors)} tensors in {out}, read back and "
        f"equal\n{command(layout, to, config, out, locate(target), depth)}"
    )
    for line in trained.exceeded(head.config.n_predict or depth, context):
        report(line)
    return out


def import_drafter(
    source: str, out: str | Path, target: str, pickle: bool = False, report=print, taps: str | None = None
) -> Path:
    """Writes OUT (a new place), a drafter of this project, from a public directory or Hub id. Its context is widened to
    the target's. taps: the convention of its tap numbers, where the directory does not tell.
    """
    if taps not in (None, *CONVENTIONS):
        raise UserError(f"--taps: found {taps}, expected {' or '.join(CONVENTIONS)}")
    out = new_place(out)
    stored = read_files(fetch(source, (*SAFE_FILES, "*.bin") if pickle else SAFE_FILES), pickle)
    config, _, embedding = read_target(target)
    head = open_head(stored, Shared(embedding), config.num_hidden_layers, taps, report)
    trained, wanted = head.config.max_position_embeddings, config.max_position_embeddings
    if trained is not None and trained < wanted:
        rope = {"original_max_position_embeddings": trained, **head.config.rope_parameters}
        rope = rope if rope.get("rope_type") == "yarn" else head.config.rope_parameters
        head.config = replace(head.config, max_position_embeddings=wanted, rope_parameters=rope)
        report(f"max_position_embeddings: {trained} -> {wanted}, the target's (engines fail behind the drafter's own)")
    save_drafter(
        head,
        out,
        {"target": target, "imported": {"from": source, "architectures": stored.config.get("architectures")}},
        stored.dtype,
    )
    report(
        f"{head.name} with taps {list(head.feature_spec.taps)} and {len(head.ids)} of {len(embedding)} tokens in "
        f"{out}, read back and equal"
    )
    return out


def new_place(out: str | Path) -> Path:
    if Path(out).exists():
        raise UserError(f"{out} exists; expected a new place")
    return Path(out)


def command(layout, engine: str, config: dict, drafter: str | Path, target: str, depth: int) -> str:
    """The shell command that serves a drafter with this config.json; drafter and target as the engine is to find
    them.
    """
    return Template(layout.engines[engine]).substitute(config, drafter=drafter, target=target, depth=depth)
