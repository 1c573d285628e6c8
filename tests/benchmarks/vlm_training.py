"""Trains the drafters of the bundled target that sees for about equal processor time, and DREAM without each of its
parts for equal steps.

    python tests/benchmarks/vlm_training.py --answers FILE [--share 1.0] [--folder runs/vlm] [NAME ...]

Without names: eagle2, eagle3, hivis-stage1 (the first stage alone, for the time of both), hivis (after hivis-half, its
first stage) and dream. Parts: no-cross (the gate of the cross-attention stays shut, so that no state of the target is
seen), no-middle (no intermediate supervision), all-visual (no compression), one-step (not over its own states).
hivis-gto, dream-gto and hivis-continued, dream-continued go on from what is trained, with and without GTO. share: of
the epochs that the recipes name; what stands in the folder is not trained again. The last line, JSON, says what each
took. tests/benchmarks/vlm.py measures FOLDER/NAME/drafter. answers: the header of recipes/dream-shapes.yaml says how
they are made.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.models import formats  # noqa: E402
from draftsmith.models.formats import dream  # noqa: E402
from draftsmith.models.heads import HEADS, DreamHead  # noqa: E402
from draftsmith.train.recipe import DrafterRecipe, read_recipe  # noqa: E402
from tests.benchmarks.gto_training import RECIPES, start, timed  # noqa: E402

STAGE2 = [
    "head.residuals=3",
    "objective.steps=3",
    "objective.topk_weight=1.0",
    "objective.mask=path",
    "optimization.lr=0.003",
    "optimization.muon_lr=0.005",
]


class ShutDream(DreamHead):
    """DREAM whose cross-attention never opens; what it saves is a DREAM drafter."""

    name = "dream-shut"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.layers[1].attn_gate.requires_grad_(False)


HEADS[ShutDream.name] = ShutDream
formats.LAYOUTS += (replace(dream.LAYOUT, head=ShutDream),)


def jobs(folder: Path) -> dict[str, tuple[str, list[str], float]]:
    """Name -> (recipe, changes, times its epochs), in the order in which they can be trained."""
    return {
        "eagle2": ("eagle-shapes", [], 1.0),
        "eagle3": ("eagle3-shapes", [], 1.0),
        "hivis-stage1": ("hivis-shapes", [], 2.23),
        "hivis-half": ("hivis-shapes", [], 1.0),
        "hivis": ("hivis-shapes", [*STAGE2, f"head.start_from={folder}/hivis-half/drafter"], 0.73),
        "dream": ("dream-shapes", [], 1.0),
        "no-cross": ("dream-shapes", [f"head.name={ShutDream.name}"], 1.0),
        "no-middle": ("dream-shapes", ["objective.middle_weight=0.0"], 1.0),
        "all-visual": ("dream-shapes", ["head.keep_ratio=1.0"], 1.0),
        "one-step": ("dream-shapes", ["objective.steps=1"], 1.0),
        "hivis-continued": ("hivis-shapes", [*STAGE2[:4], *further(folder, "hivis", "continued")], 0.36),
        "hivis-gto": ("hivis-shapes", [*STAGE2[:4], *further(folder, "hivis", "gto")], 0.15),
        "dream-continued": ("dream-shapes", further(folder, "dream", "continued"), 0.25),
        "dream-gto": ("dream-shapes", further(folder, "dream", "gto"), 0.15),
    }


def further(folder: Path, name: str, arm: str) -> list[str]:
    """From a drafter on, at the rates of eagle3-code-{arm}.yaml."""
    changes = [
        change
        for change in start(f"{name}-shapes", arm)
        if not change.startswith(("head.start_from", "optimization.batch_tokens"))
    ]
    return [*changes, f"head.start_from={folder}/{name}/drafter"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "names", nargs="*", default=["eagle2", "eagle3", "hivis-stage1", "hivis-half", "hivis", "dream"]
    )
    parser.add_argument("--answers", required=True)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--folder", default="runs/vlm")
    arguments = parser.parse_args()
    folder, table = Path(arguments.folder), {}
    for name in arguments.names:
        (recipe, changes, factor), took = jobs(folder)[name], folder / name / "took.json"
        if not took.exists():
            epochs = read_recipe(RECIPES / f"{recipe}.yaml", DrafterRecipe).optimization.epochs
            seconds, steps = timed(recipe, changes, arguments.answers, folder / name, epochs * factor * arguments.share)
            took.write_text(json.dumps({"seconds": round(seconds, 1), "steps": steps}))
        table[name] = json.loads(took.read_text())
        print(f"{name}: {table[name]}", flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
