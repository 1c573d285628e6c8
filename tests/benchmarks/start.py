"""How a fresh EAGLE-3 head starts: what of the target's own weights it takes, compared at equal processor time.

    python tests/benchmarks/start.py --answers FILE --prompts FILE [--recipe eagle3-code] [--minutes 3 10 30]
        [--start NAME ...] [--change section.key=value ...] [--folder runs/start] [--output FILE]

Starts: `output head` takes the target's rows of the output head and its final norm, and nothing else; `high tap` also
lets `fc` pass the high tap through; `last layer` also takes the target's last decoder layer; `regression` then fits
`fc` and the attention to rows of the answers (`head.regression`); `three steps` is that with three steps of
training-time test instead of the recipe's. `large rates` and `small rates`: those of random starts and a tenth of them,
whatever the recipe says.
answers: what all trainings read; prompts: those that are decoded (other ones). A run takes as many steps as fit its
minutes of processor time, by the time of a short run of the first start (a step costs the same whatever it started
from; `three steps` has a short run of its own); what stands in the folder is not trained again. tau:
60-node tree, T = 0, 64 new tokens; 95 % intervals resample prompts, of gains over the first start prompts are paired.
Prints a Markdown table and ends with one JSON line: {minutes: {start: {"tau", "interval", "gain", ...}}}.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.lossless import dtype_of  # noqa: E402
from draftsmith.eval.measurement.interval import quotient_interval, ratio_interval  # noqa: E402
from draftsmith.eval.measurement.measure import decode_batches, tokens_and_passes  # noqa: E402
from draftsmith.eval.measurement.prompts import read_prompts  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.drafters import HeadDrafter  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.grow import parse_tree  # noqa: E402
from draftsmith.models.heads import Eagle3Head  # noqa: E402
from draftsmith.models.heads.layer import copy_norm  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402
from draftsmith.train.recipe import DrafterRecipe, read_recipe  # noqa: E402
from tests.benchmarks.gto_training import RECIPES, trained  # noqa: E402

TREE, NEW_TOKENS, BATCH = "dynamic:10x7x60", 64, 13


@torch.no_grad()
def output_head(head: Eagle3Head, target: TextTarget) -> None:
    head.lm_head.weight.copy_(target.head.weight[head.ids])
    copy_norm(target.body.norm, head.norm)


@torch.no_grad()
def high_tap(head: Eagle3Head, target: TextTarget) -> None:
    output_head(head, target)
    head.fc.weight.zero_()
    head.fc.weight[:, -head.config.hidden_size :] = torch.eye(head.config.hidden_size)


LESS = "three steps"
LARGE = ["optimization.lr=0.003", "optimization.muon_lr=0.02"]
SMALL = ["optimization.lr=0.0003", "optimization.muon_lr=0.002"]
PLAIN, REGRESSED = ["head.regression=false"], ["head.regression=true"]
# name -> (what replaces `Eagle3Head.start_from`, changes of the recipe)
STARTS = {
    "output head": (output_head, PLAIN),
    "output head, large rates": (output_head, PLAIN + LARGE),
    "high tap": (high_tap, PLAIN),
    "last layer": (Eagle3Head.start_from, PLAIN),
    "last layer, large rates": (Eagle3Head.start_from, PLAIN + LARGE),
    "last layer, small rates": (Eagle3Head.start_from, PLAIN + SMALL),
    "regression": (Eagle3Head.start_from, REGRESSED),
    "regression, small rates": (Eagle3Head.start_from, REGRESSED + SMALL),
    LESS: (Eagle3Head.start_from, [*REGRESSED, "objective.steps=3"]),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--recipe", default="eagle3-code")
    parser.add_argument("--minutes", type=float, nargs="*", default=[3.0, 10.0, 30.0])
    parser.add_argument("--start", nargs="*", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--change", nargs="*", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/start"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recipe = read_recipe(RECIPES / f"{arguments.recipe}.yaml", DrafterRecipe, arguments.change)
    target, tokenizer = TextTarget.load(recipe.target, dtype_of(recipe.engine.dtype)), load_tokenizer(recipe.target)
    prompts = [p.tokens for p in read_prompts(arguments.prompts, tokenizer, arguments.limit)]
    stops, table = stop_ids(target, tokenizer), {}
    shipped = Eagle3Head.start_from
    usual = ["evaluation.rows=0", "engine.checkpoint_minutes=60", "data.features=online", *arguments.change]
    print("| minutes | start | steps | tau | over the first |\n| - | - | - | - | - |", flush=True)
    like = {}  # of the first run with these steps of training-time test
    for minutes in arguments.minutes:
        first = None
        for name in arguments.start:
            begin, changes = STARTS[name]
            place = arguments.folder / f"{minutes:g}-{name.replace(',', '').replace(' ', '-')}"
            Eagle3Head.start_from = begin
            try:
                took = trained(
                    arguments.recipe,
                    [*usual, *changes],
                    arguments.answers,
                    place,
                    60 * minutes,
                    like=like.get(name == LESS),
                )
            finally:
                Eagle3Head.start_from = shipped
            like.setdefault(name == LESS, took)
            head = load_drafter(str(place / "drafter"), target.shared, target.layers)
            drafter = HeadDrafter(head, parse_tree(TREE))
            counts = tokens_and_passes(
                decode_batches(target, drafter, prompts, Sampling(), NEW_TOKENS, stops, BATCH, lambda done: None)
            )
            first = first or counts
            row = {"tau": sum(counts[0]) / sum(counts[1]), "interval": ratio_interval(*counts), **took}
            row["gain"] = row["tau"] / (sum(first[0]) / sum(first[1])) - 1
            row["gain_interval"] = [x - 1 for x in quotient_interval(counts, first)]
            table.setdefault(f"{minutes:g}", {})[name] = row
            (low, high), (worst, best) = row["interval"], row["gain_interval"]
            gain = f"{row['gain']:+.1%} ({worst:+.1%} to {best:+.1%})" if counts is not first else ""
            print(
                f"| {minutes:g} | {name} | {row['steps']} | {row['tau']:.2f} ({low:.2f}-{high:.2f}) | {gain} |",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(table, indent=1))
    print(json.dumps(table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
