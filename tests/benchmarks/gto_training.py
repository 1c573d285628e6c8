"""Trains with Group Tree Optimization and without it from one start for equal processor time, and compares the
drafters.

    python tests/benchmarks/gto_training.py TABLE --answers FILE --prompts FILE [--seconds 150] [--folder runs/gto]
        [--output FILE]

TABLE: `rates` three learning rates each for GTO and for continued training; `seeds` the shipped settings with three
seeds; `ablations` another reward, no debiasing, other group sizes and the paper's omega; `hass` and `owl` the shipped
drafters of these names as starts. answers: what the trainings read (the recipes' headers say how it is made); prompts:
those that are decoded, of other functions. A run takes as many steps as fit `--seconds` processor seconds, by the time
of a short run of its own (the table gives what it took in the end); what stands in the folder is not trained again.
tau: 60-node tree, 64 new tokens; 95 % intervals of the gain over continued training of the same start and seed resample
prompts. Ends with one JSON line: the table.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from draftsmith.eval.measurement.interval import quotient_interval, ratio_interval
from draftsmith.eval.measurement.measure import decode_batches, tokens_and_passes
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.formats import load_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import TextTarget
from draftsmith.train.loop import train
from draftsmith.train.recipe import DrafterRecipe, read_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TREES = ("dynamic:10x7x60", "dynamic:4x5x24")
SHORT = (0.01, 0.01, 0.05)  # epochs of a run that warms up, and of the two whose difference times a step
RATES = {"high": (0.005, 0.001), "middle": (0.0015, 0.0003), "low": (0.0005, 0.0001)}  # of Muon and of AdamW
ABLATIONS = {
    "lse": ["gto.reward_agg=lse"],
    "no debiasing": ["gto.debias=false"],
    "m = 4": ["gto.group_size=4", "gto.groups=8"],
    "m = 16": ["gto.group_size=16", "gto.groups=2"],
    "omega 0.5": ["gto.omega=0.5"],
}  # roots of a row stay 32
STARTS = {"hass": "hass-code", "owl": "owl-code-long"}
TABLES = ("rates", "seeds", "ablations", *STARTS)


def runs(table: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> (recipe, changes). A name ends in `continued` where the others of its group are compared with it."""
    if table == "rates":
        return {
            f"{name} {arm}": (f"eagle3-code-{arm}", [f"optimization.muon_lr={muon}", f"optimization.lr={adam}"])
            for name, (muon, adam) in RATES.items()
            for arm in ("continued", "gto")
        }
    if table == "seeds":
        return {
            f"seed {seed} {arm}": (f"eagle3-code-{arm}", [f"seed={seed}"])
            for seed in range(3)
            for arm in ("continued", "gto")
        }
    if table == "ablations":
        return {"continued": ("eagle3-code-continued", []), "gto": ("eagle3-code-gto", [])} | {
            name: ("eagle3-code-gto", changes) for name, changes in ABLATIONS.items()
        }
    return {f"{table} {arm}": (STARTS[table], start(STARTS[table], arm)) for arm in ("continued", "gto")}


def start(recipe: str, arm: str) -> list[str]:
    """Changes that turn the recipe of a shipped drafter into one that goes on from it as eagle3-code-gto.yaml and
    -continued.yaml do.
    """
    model = read_recipe(RECIPES / f"eagle3-code-{arm}.yaml", DrafterRecipe)
    optimization = {name: getattr(model.optimization, name) for name in ("name", "lr", "muon_lr", "schedule", "warmup")}
    return [
        f"head.start_from=bundled:drafters/{recipe}",
        f"gto={json.dumps(model.gto.model_dump()) if model.gto else 'null'}",
        *(f"optimization.{name}={value}" for name, value in optimization.items()),
        "data.features=online",
        "optimization.batch_tokens=1024",
        "optimization.accumulation=1",
        "evaluation.rows=0",
        "engine.checkpoint_minutes=60",
    ]


def timed(recipe: str, changes: list[str], answers: str, place: Path, epochs: float) -> tuple[float, int]:
    """Processor seconds and steps of one training into `place`."""
    shutil.rmtree(place, ignore_errors=True)
    made = read_recipe(
        RECIPES / f"{recipe}.yaml",
        DrafterRecipe,
        [*changes, f"data.files=[{answers}]", f"optimization.epochs={epochs}", f"output={place}"],
    )
    before = time.process_time()
    train(made, report=lambda line: None)
    return time.process_time() - before, len((place / "log.jsonl").read_text().splitlines())


def trained(
    recipe: str,
    changes: list[str],
    answers: str,
    place: Path,
    seconds: float,
    short: tuple[float, ...] = SHORT,
    like: dict | None = None,
) -> dict:
    """A drafter in `place/drafter` and what it took; what is there already is taken as it is. short: epochs of the runs
    that warm up and time a step; like: what another one took whose steps cost the same, then there are as many of them.
    """
    if not (place / "took.json").exists():
        if like is None:
            *_, (early, few), (late, many) = (timed(recipe, changes, answers, place, epochs) for epochs in short)
            step = (late - early) / (many - few)
            step_ms, epochs = round(1e3 * step), seconds / step / (many / short[-1])
        else:
            step_ms, epochs = like["step_ms"], like["epochs"] * seconds / like["asked"]
        took, steps = timed(recipe, changes, answers, place, epochs)
        found = {"seconds": round(took, 1), "steps": steps, "step_ms": step_ms, "epochs": epochs, "asked": seconds}
        (place / "took.json").write_text(json.dumps(found))
    return json.loads((place / "took.json").read_text())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0])
    parser.add_argument("--tree", nargs="*", default=TREES[:1])
    parser.add_argument("--change", nargs="*", default=[], help="of all runs, as for `draftsmith train`")
    parser.add_argument("--folder", default="runs/gto")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    listed, table = (
        {name: (recipe, [*changes, *arguments.change]) for name, (recipe, changes) in runs(arguments.table).items()},
        {},
    )
    for name, (recipe, changes) in listed.items():
        table[name] = trained(
            recipe, changes, arguments.answers, Path(arguments.folder) / name.replace(" ", "-"), arguments.seconds
        )
        print(f"{name}: {table[name]}", flush=True)
    counts = {}
    for name, (recipe, changes) in listed.items():
        made = read_recipe(RECIPES / f"{recipe}.yaml", DrafterRecipe, changes)
        target, tokenizer = TextTarget.load(made.target), load_tokenizer(made.target)
        prompts, stops = [p.tokens for p in read_prompts(arguments.prompts, tokenizer)], stop_ids(target, tokenizer)
        places = {name: Path(arguments.folder) / name.replace(" ", "-") / "drafter"}
        places |= {f"{name.removesuffix('continued')}start": made.head.start_from} if name.endswith("continued") else {}
        for key, place in places.items():
            head = load_drafter(str(place), target.shared, target.layers)
            for tree in arguments.tree:
                for temperature in arguments.temperature:
                    traces = decode_batches(
                        target, HeadDrafter(head, parse_tree(tree)), prompts, Sampling(temperature), 64, stops, 13
                    )
                    counts[key, cell := f"{tree} T={temperature:g}"] = found = tokens_and_passes(traces)
                    beside = counts.get((group_of(key, listed), cell), found)
                    row = {"tau": sum(found[0]) / sum(found[1]), "interval": ratio_interval(*found)}
                    row["gain"] = row["tau"] / (sum(beside[0]) / sum(beside[1])) - 1
                    row["gain_interval"] = [x - 1 for x in quotient_interval(found, beside)]
                    table.setdefault(key, {})[cell] = row
                    print(
                        f"{key}, {cell}: tau {row['tau']:.3f}, {row['gain']:+.2%} ({row['gain_interval'][0]:+.2%} to "
                        f"{row['gain_interval'][1]:+.2%})",
                        flush=True,
                    )
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(table, indent=1))
    print(json.dumps(table))


def group_of(name: str, listed) -> str:
    """The continued run that a run is compared with."""
    group = [
        other for other in listed if other.endswith("continued") and name.startswith(other.removesuffix("continued"))
    ]
    return max(group, key=len)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
