"""What Group Tree Optimization gave the shipped `code` drafter beside as much more of its own training, and what a step
of it costs.

    python tests/benchmarks/gto.py [--quick | --cost] [--first DIRECTORY] [--second DIRECTORY] [--output FILE]

first: the drafter trained with GTO (recipes/eagle3-code-gto.yaml), second: the one trained on for the same time without
it (recipes/eagle3-code-continued.yaml), both from the shipped start. Decodes the prompts of recipes/prompts/code.jsonl
with both; intervals (95 %) resample prompts, the same for both drafters. Ends with one JSON line of the 60-node tree at
temperature 0. --cost instead times the parts of a training step with GTO on eight packed answers of the target, from
the shipped start, its weights moved a little: milliseconds of the thread, medians.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.measurement.interval import quotient_interval, ratio_interval  # noqa: E402
from draftsmith.eval.measurement.measure import decode_batches, tokens_and_passes  # noqa: E402
from draftsmith.eval.measurement.prompts import read_prompts  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.launch.measurement import bundled  # noqa: E402
from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.drafters import HeadDrafter, NoDrafter  # noqa: E402
from draftsmith.models.features import Packing  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.grow import parse_tree  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402
from draftsmith.train import gto  # noqa: E402
from draftsmith.train.recipe import DrafterRecipe, read_recipe  # noqa: E402

RECIPE, REPEATS = Path(__file__).resolve().parents[2] / "recipes" / "eagle3-code-gto.yaml", 7
TREES = ("dynamic:10x7x60", "dynamic:4x5x24")
START = "bundled:drafters/eagle3-code"


def compare(target, places: dict[str, str], prompts, stops, tree: str, temperature: float, new_tokens: int) -> dict:
    """tau of every drafter with its interval, and its gain over the second one's with the interval of that."""
    counts = {}
    for name, place in places.items():
        head = load_drafter(place, target.shared, target.layers)
        counts[name] = tokens_and_passes(
            decode_batches(
                target, HeadDrafter(head, parse_tree(tree)), prompts, Sampling(temperature), new_tokens, stops, 13
            )
        )
    tau = {name: sum(tokens) / sum(passes) for name, (tokens, passes) in counts.items()}
    return {
        "tau": tau,
        "interval": {name: ratio_interval(*count) for name, count in counts.items()},
        "gain": {name: tau[name] / tau["continued"] - 1 for name in places},
        "gain_interval": {
            name: [x - 1 for x in quotient_interval(count, counts["continued"])] for name, count in counts.items()
        },
    }


def cost(target, prompts, stops) -> dict[str, float]:
    """Milliseconds of the parts of one training step; what `gto` takes is all but the first two."""
    recipe = read_recipe(RECIPE, DrafterRecipe)
    head, frozen = (load_drafter(START, target.shared, target.layers) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.train().parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    answers = decode_batches(target, NoDrafter(), prompts[:8], Sampling(), 96, stops, 8)
    rows = [prompt + trace.tokens for prompt, trace in zip(prompts, answers)]
    mask = torch.cat([torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts)])
    packing = Packing((0, *accumulate(map(len, rows))), mask)
    tokens = torch.tensor([token for row in rows for token in row])
    features = target.features(tokens, packing, replace(head.feature_spec, trees=True))
    step = gto.Gto(recipe.gto, frozen.eval().requires_grad_(False), stops)
    starts = gto.windows(packing, tokens, recipe.gto.group_size, stops)
    at = gto.draw_groups(starts, recipe.gto.groups, recipe.gto.group_size, torch.Generator().manual_seed(0)).flatten()

    @torch.no_grad()
    def grown(some):
        return step.policy.grow(some, some.root_at(features, at), tokens[at])

    mine, theirs = grown(head), grown(frozen)
    trie, _ = gto.union(mine, theirs)
    nodes, counts = mine.follow(features.score(trie, at)[1][:, : mine.size])
    path, lengths = mine.tokens.gather(1, nodes[:, 1 : int(counts.max())]), counts - 1
    parts = {
        "target": lambda: target.features(tokens, packing, head.feature_spec),
        "own loss": lambda: head.loss(features, recipe.goal)[0].backward(),
        "trees of M": lambda: grown(head),
        "trees of M0": lambda: grown(frozen),
        "union": lambda: gto.union(mine, theirs),
        "scoring": lambda: features.score(trie, at),
        "chains of M": lambda: gto.chain_log_prob(head, features, at, path, lengths).sum().backward(),
        "chains of M0": lambda: gto.chain_log_prob(frozen, features, at, path, lengths),
    }
    times = {name: [] for name in parts}
    for _ in range(REPEATS + 1):
        for name, call in parts.items():
            start = time.thread_time()
            call()
            times[name].append(1e3 * (time.thread_time() - start))
    return {
        "tokens": len(tokens),
        "roots": len(at),
        **{name: round(statistics.median(some[1:]), 1) for name, some in times.items()},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the 60-node tree at temperature 0 only")
    parser.add_argument("--first", default="bundled:drafters/eagle3-code-gto")
    parser.add_argument("--second", default="bundled:drafters/eagle3-code-continued")
    parser.add_argument("--cost", action="store_true", help="time the parts of a training step instead")
    parser.add_argument("--output", help="where to write all figures as JSON")
    arguments = parser.parse_args()
    target, tokenizer = TextTarget.load("bundled:targets/code"), load_tokenizer("bundled:targets/code")
    stops = stop_ids(target, tokenizer)
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer)]
    if arguments.cost:
        print(json.dumps(cost(target, prompts, stops)))
        return
    places, figures = (
        {"gto": arguments.first, "continued": arguments.second} | ({} if arguments.quick else {"start": START}),
        {},
    )
    for tree in TREES[:1] if arguments.quick else TREES:
        for temperature in (0.0,) if arguments.quick else (0.0, 1.0):
            figures[f"{tree} T={temperature:g}"] = found = compare(
                target, places, prompts, stops, tree, temperature, 64
            )
            print(f"{tree}, T={temperature:g}: {json.dumps(found)}", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1))
    found = figures[f"{TREES[0]} T=0"]
    print(
        json.dumps(
            {
                "gto_tau": round(found["tau"]["gto"], 4),
                "continued_tau": round(found["tau"]["continued"], 4),
                "gain": round(found["gain"]["gto"], 4),
                "ci95": [round(x, 4) for x in found["gain_interval"]["gto"]],
            }
        )
    )


if __name__ == "__main__":
    main()
