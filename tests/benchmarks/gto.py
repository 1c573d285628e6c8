"""What Group Tree Optimization gave the shipped `code` drafter beside as much more of its own training, and what a step of it costs.

    python tests/benchmarks/gto.py [--quick] [--first DIRECTORY] [--second DIRECTORY] [--cost DRAFTER] [--output FILE]

first: the drafter trained with GTO (recipes/eagle3-code-gto.yaml), second: the one trained on for the same time without it
(recipes/eagle3-code-continued.yaml), both from the shipped start. Decodes the prompts of recipes/prompts/code.jsonl with both; intervals (95 %)
resample prompts, the same for both drafters. Ends with one JSON line of the 60-node tree at temperature 0. --cost times the parts of a training
step with GTO, DRAFTER being the start and, its weights moved a little, the drafter that is trained.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.interval import quotient_interval, ratio_interval  # noqa: E402
from draftsmith.eval.measure import decode_batches, tokens_and_passes  # noqa: E402
from draftsmith.eval.prompts import read_prompts  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.launch.measurement import bundled  # noqa: E402
from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.drafter import HeadDrafter  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.grow import parse_tree  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402

TREES = ("dynamic:10x7x60", "dynamic:4x5x24")
START = "bundled:drafters/eagle3-code"


def compare(target, places: dict[str, str], prompts, stops, tree: str, temperature: float, new_tokens: int) -> dict:
    """tau of every drafter with its interval, and its gain over the second one's with the interval of that."""
    counts = {}
    for name, place in places.items():
        head = load_drafter(place, target.shared, target.layers)
        counts[name] = tokens_and_passes(decode_batches(target, HeadDrafter(head, parse_tree(tree)), prompts, Sampling(temperature), new_tokens, stops, 13))
    tau = {name: sum(tokens) / sum(passes) for name, (tokens, passes) in counts.items()}
    return {"tau": tau, "interval": {name: ratio_interval(*count) for name, count in counts.items()},
            "gain": {name: tau[name] / tau["continued"] - 1 for name in places},
            "gain_interval": {name: [x - 1 for x in quotient_interval(count, counts["continued"])] for name, count in counts.items()}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the 60-node tree at temperature 0 only")
    parser.add_argument("--first", default="bundled:drafters/eagle3-code-gto")
    parser.add_argument("--second", default="bundled:drafters/eagle3-code-continued")
    parser.add_argument("--cost", metavar="DRAFTER", help="time a training step instead")
    parser.add_argument("--output", help="where to write all figures as JSON")
    arguments = parser.parse_args()
    target, tokenizer = TextTarget.load("bundled:targets/code"), load_tokenizer("bundled:targets/code")
    stops = stop_ids(target, tokenizer)
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer)]
    places, figures = {"gto": arguments.first, "continued": arguments.second} | ({} if arguments.quick else {"start": START}), {}
    for tree in TREES[:1] if arguments.quick else TREES:
        for temperature in (0.0,) if arguments.quick else (0.0, 1.0):
            figures[f"{tree} T={temperature:g}"] = found = compare(target, places, prompts, stops, tree, temperature, 64)
            print(f"{tree}, T={temperature:g}: {json.dumps(found)}", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1))
    found = figures[f"{TREES[0]} T=0"]
    print(json.dumps({"gto_tau": round(found["tau"]["gto"], 4), "continued_tau": round(found["tau"]["continued"], 4),
                      "gain": round(found["gain"]["gto"], 4), "ci95": [round(x, 4) for x in found["gain_interval"]["gto"]]}))


if __name__ == "__main__":
    main()
