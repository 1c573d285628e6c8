"""Whether the evaluation's own claims hold on the bundled target: the chosen tree against a sweep, accounted against
wall speedup, batches against single rows, and the shipped drafter against prompt lookup and assisted generation.

    python tests/benchmarks/evaluation.py [--quick] [--output runs/benchmark]

Everything is one interleaved run a comparison; speeds of the sweep are tau over median passes. Ends with one JSON line:
auto_over_best      speed of `--tree auto`'s tree / speed of the best tree of the sweep that holds it, T = 0, batch 1
accounted_over_wall accounted / wall speedup of the shipped drafter, T = 0, batch 1
batch_identity      share of texts of ragged batches of 8 that equal the single runs, T = 0 and 0.6
*_tau               acceptance length at T = 0.6 on the prompts whose plain greedy continuation does not loop: the
                    shipped EAGLE-3 drafter with the reported 60-node tree (the line before has it with the smaller tree
                    that auto chose for speed), prompt lookup (the better of ours and the library's), the library's
                    assisted generation with `code-mini`
"""

import argparse
import json
from pathlib import Path

from draftsmith.eval.measurement.measure import decode_batches
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.measurement import CODE, Request, measure
from draftsmith.launch.methods import ASSISTANT, Methods
from draftsmith.launch.sweep import sweep
from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.grow import parse_tree

DRAFTER, TEMPERATURE = "bundled:drafters/eagle3-code", 0.6
QUICK_TREES = [
    "chain:2",
    "chain:4",
    *(f"dynamic:{k}x{depth}x{size}" for k in (3, 8) for depth, size in ((2, 8), (4, 12), (4, 24), (6, 16), (6, 40))),
]


def batch_identity(prompts: int, max_new_tokens: int, tree: str) -> float:
    methods = Methods.open([DRAFTER], None, ASSISTANT)
    texts = [p.tokens for p in methods.prompts(CODE, prompts, max_new_tokens, 60, False)]
    drafter, equal, total = HeadDrafter(next(iter(methods.heads.values())), parse_tree(tree)), 0, 0
    for temperature in (0.0, TEMPERATURE):
        ragged, single = (
            decode_batches(methods.target, drafter, texts, Sampling(temperature), max_new_tokens, methods.stops, size)
            for size in (8, 1)
        )
        equal += sum(a.tokens == b.tokens for a, b in zip(ragged, single))
        total += len(texts)
    return equal / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="16 prompts, 12 trees (about 5 minutes on 2 cores)")
    parser.add_argument("--output", default="runs/benchmark")
    arguments = parser.parse_args()
    output, prompts, tokens = Path(arguments.output), 16 if arguments.quick else None, 48 if arguments.quick else 128
    swept = sweep(DRAFTER, CODE, None, QUICK_TREES if arguments.quick else None, 0.0, 1, tokens, 8, 0, output)
    document = measure(
        Request(
            [DRAFTER, "lookup", "hf-lookup", "hf-assisted"],
            output,
            temperatures=(0.0, TEMPERATURE),
            max_new_tokens=tokens,
            limit=prompts,
        )
    )
    cells = {(cell["temperature"], cell["method"]): cell for cell in document["cells"] if "speedup" in cell}
    reported = next(c for c in document["cells"] if "speedup" not in c and c["temperature"] == TEMPERATURE)
    tau = {
        method: cell["not_looping"]["tau"]
        for (temperature, method), cell in cells.items()
        if temperature == TEMPERATURE
    }
    auto = cells[TEMPERATURE, document["conditions"]["first"]]
    print(f"T = {TEMPERATURE}, not looping: tau {auto['not_looping']['tau']:.3f} with {auto['tree']}")
    print(
        json.dumps(
            {
                "auto_over_best": round(swept["auto_over_best"], 4),
                "accounted_over_wall": round(document["accounted_speedup"] / document["speedup"], 4),
                "batch_identity": batch_identity(prompts or 64, tokens, document["tree"]),
                "eagle3_tau": round(reported["not_looping"]["tau"], 3),
                "lookup_tau": round(max(tau["lookup"], tau["hf-lookup"]), 3),
                "assisted_tau": round(tau["hf-assisted"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
