"""The model card: what was measured, from result.json, and how the drafter was trained, from draftsmith.json. Nothing
is made up: what was not measured says so. The same directory and result give the same card, byte for byte, so that
pushing again changes nothing.
"""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from draftsmith.launch.export import command
from draftsmith.launch.trained import Trained
from draftsmith.models.errors import UserError
from draftsmith.models.formats import LAYOUTS
from draftsmith.models.formats.layout import Layout, Stored, read_json
from draftsmith.models.hub import HUB_ID
from draftsmith.models.targets import Weights, locate
from draftsmith.models.targets.place import HUB_FILE

SERVED_DEPTH = 5
DRAWN_DRAFTS = (
    "At temperatures above 0 vLLM drafts the most probable tokens, or draws its drafts from the drafter where "
    '`"draft_sample_method": "probabilistic"` stands in this configuration. Both keep the target\'s law; which of them '
    "accepts more depends on the drafter."
)
SHOWN_ELSEWHERE = {"head", "target", "weights", "recipe", "settings", "trained", "imported"}


def model_card(
    repository: str, stored: Stored, layout: Layout, cells: list[dict], conditions: dict, licence: str | None
) -> str:
    """README.md of a repository (USER/NAME). cells: the drafter's rows of result.json, none where it was not
    measured.
    """
    name, target, head = repository.split("/")[1], stored.target, layout.head.name
    hub, file = bool(HUB_ID.fullmatch(target)), HUB_FILE.fullmatch(target)
    base = target if hub else file and file["repository"]
    place = (
        target if hub else f"""$(python -c "from draftsmith.models.targets import locate; print(locate('{target}'))")"""
    )
    served = (
        () if layout.described and stored.serving is None else layout.engines
    )  # they do not load what names no verifier
    exports = [
        f"draftsmith export {repository} {name}-{engine} --to {engine}"
        for other in LAYOUTS
        if other.head is layout.head
        for engine in other.engines
        if engine not in served and (other.described or stored.config.get("bias") is False)
    ]  # vLLM applies no bias of an EAGLE-1 head's fc, so that heads with one are not exported to it
    data = ModelCardData(
        base_model=base,
        license=licence,
        library_name="draftsmith",
        pipeline_tag="text-generation",
        model_name=name,
        tags=["speculative-decoding", "draft-model", head, *layout.engines, "draftsmith"],
        eval_results=[result(cell) for cell in cells] or None,
    )
    shown = (
        f"[{target.removeprefix('hub:')}](https://huggingface.co/{base})"
        if base
        else f"`{target}`, a reference model that comes with draftsmith"
    )
    lines = [
        f"# {name}",
        f"A drafter for speculative decoding ({head}) of {shown}, trained by draftsmith. Decoding with "
        "it changes the speed, not the text.",
        "## Acceptance length",
        *acceptance(repository, cells, conditions),
        "## Use",
        *(
            f"With {engine}:\n\n```bash\n{command(layout, engine, stored.config, repository, place, SERVED_DEPTH)}\n```"
            for engine in served
        ),
        *([DRAWN_DRAFTS] if "vllm" in served else []),
        "\n".join(["With draftsmith:\n\n```bash", f"draftsmith eval {repository}", *exports, "```"]),
        f"```python\nfrom draftsmith.models.formats import from_pretrained\nfrom draftsmith.models.targets import "
        f"TextTarget\n\n"
        f'target = TextTarget.load("{target}")\nhead = from_pretrained("{repository}", target)\n```',
        "## Trained for",
        "\n".join(Trained.of(stored).lines()),
        "## Training",
        *training(stored.about),
    ]
    return f"---\n{data.to_yaml().rstrip()}\n---\n\n" + "\n\n".join(lines) + "\n"


def acceptance(repository: str, cells: list[dict], conditions: dict) -> list[str]:
    """The table of tau per suite, temperature and tree, with the acceptance of every depth, and what it was measured
    under.
    """
    if not cells:
        return [f"Not measured. `draftsmith eval {repository}` measures it."]
    depth = max(len(cell["acceptance_by_depth"]) for cell in cells)
    timed = any("speedup" in cell for cell in cells)
    robust = any("robust_speedup" in cell for cell in cells)
    speed = lambda cell: cell.get("robust_speedup", cell.get("speedup"))  # noqa: E731  (earlier versions: totals alone)
    head = [
        "suite",
        "T",
        "batch",
        "tree",
        "tau",
        *map(str, range(1, depth + 1)),
        *(["speedup"] if timed else []),
        "prompts",
        "texts as plain decoding",
    ]
    rows = [head, ["---"] * len(head)]
    for cell in cells:
        rates = [f"{rate:.2f}" for rate in cell["acceptance_by_depth"]]
        interval = " ({:.2f} to {:.2f})".format(*cell["tau_interval"]) if cell.get("tau_interval") else ""
        rows.append(
            [
                cell["suite"],
                f"{cell['temperature']:g}",
                str(cell["batch"]),
                cell["tree"],
                f"{cell['tau']:.2f}{interval}",
                *rates,
                *[""] * (depth - len(rates)),
                *([f"{speed(cell):.2f}x" if speed(cell) else ""] if timed else []),
                str(cell["prompts"]),
                f"{cell['identical']}/{cell['prompts']}" if "identical" in cell else "",
            ]
        )
    machine = ", ".join(
        f"{key} {conditions[key]}"
        for key in ("max_new_tokens", "seed", "dtype", "device", "processor", "cores", "threads", "torch")
        if conditions.get(key) is not None
    )
    return [
        "tau = tokens emitted / verify passes of the target, bonus token included (plain decoding is 1), all prompts "
        "pooled, 95 % interval in "
        "brackets. The numbered columns are the acceptance of each drafted depth, given that the depth before was "
        "accepted."
        + (" Speedup is over plain decoding of the same prompts, from undisturbed passes." if robust else ""),
        "\n".join("| " + " | ".join(row) + " |" for row in rows),
        drafts(cells),
        f"Measured with `draftsmith eval`: {machine}.",
    ]


def drafts(cells: list[dict]) -> str:
    """How the drafts of the table came about, in the words of an engine."""
    most_probable = "the drafter's most probable tokens (one-hot, as with vLLM's `draft_sample_method` greedy)"
    if not any(cell["tree"].startswith("sampled:") and cell["temperature"] > 0 for cell in cells):
        return f"Drafts were {most_probable} at every temperature, verified by sampling and matching."
    return (
        f"In trees named `sampled` drafts were drawn from the drafter, else they were {most_probable}; all were "
        f"verified by sampling and matching."
    )


def training(about: dict) -> list[str]:
    """Recipe, data and figures of the run, as far as draftsmith.json tells."""
    figures = {key: value for key, value in about.items() if key not in SHOWN_ELSEWHERE and value is not None}
    if about.get("weights"):
        figures = {"weights of the target": str(Weights(**about["weights"])), **figures}
    lines = [f"- {key.replace('_', ' ')}: {figure(value)}" for key, value in figures.items()]
    found = ["\n".join(lines)] if lines else []
    if "imported" in about:
        found.append(f"Not trained by draftsmith: imported from {about['imported'].get('from')}.")
    if "recipe" in about:
        found.append(
            "Recipe (`draftsmith train`; data files are named, not published):\n\n```yaml\n"
            + yaml.safe_dump(about["recipe"], sort_keys=False).rstrip()
            + "\n```"
        )
    return found or ["Not recorded."]


def figure(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure(part)}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def result(cell: dict) -> EvalResult:
    """One row as the Hub's model-index shows it."""
    return EvalResult(
        task_type="text-generation",
        task_name="Speculative decoding",
        dataset_type=cell["suite"],
        dataset_name=cell["suite"],
        dataset_config=f"temperature {cell['temperature']:g}, batch {cell['batch']}, {cell['tree']}",
        metric_type="acceptance_length",
        metric_name="tau (tokens per verify pass)",
        metric_value=round(float(cell["tau"]), 4),
    )


def measured(folder: Path, results: Path | None) -> tuple[list[dict], dict]:
    """(the drafter's cells, conditions) of a result.json: the given one, or the one in the drafter's parent folder;
    ([], {}) without any.

    Raises UserError when it holds no figures of this drafter, or when the one that was found is older than the weights.
    """
    file = results or folder.parent / "result.json"
    if not file.is_file():
        if results:
            raise UserError(f"{results}: no such file; expected a result.json of draftsmith eval")
        return [], {}
    weights = folder / "model.safetensors"
    if results is None and weights.is_file() and weights.stat().st_mtime > file.stat().st_mtime:
        raise UserError(f"{file}: older than {weights}; measure the drafter again or name the file by --results")
    document = read_json(file)
    conditions, drafters = document.get("conditions", {}), document.get("conditions", {}).get("drafters", {})
    if "cells" not in document:
        raise UserError(f"{file}: cells: missing; expected a result.json of draftsmith eval")
    here = [name for name, place in drafters.items() if Path(locate(place)).resolve() == folder.resolve()] or list(
        drafters
    )
    if len(here) != 1:
        raise UserError(f"{file}: found the drafters {', '.join(here) or 'none'}, expected {folder}")
    cells = [cell for cell in document["cells"] if cell.get("drafter") == here[0]]
    if not cells:
        raise UserError(f"{file}: found no cells of {here[0]}, expected at least one")
    return cells, conditions
