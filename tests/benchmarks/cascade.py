"""Cascades of models: their exact law, and whether a middle model pays, by criterion and by the clock.

    python tests/benchmarks/cascade.py --quick [--output FILE]
    python tests/benchmarks/cascade.py [--target TARGET] [--candidate MIDDLE ...] [--drafter METHOD ...] [--suite FILE]
        [--limit N] [--tokens N] [--temperature T] [--texts 50000] [--output FILE]

* law: the table of methods/polybasic.md 3.1 (three models, buffers of 1 to 3, three rules) and whole steps of cascades
  of three and four table models, enumerated exactly through `CascadeDrafter` itself: the largest difference from the
  exact values. --texts N: also N sampled texts through the real loop, G over the bound that a right sampler exceeds
  once in a million times.
* plan: what `draftsmith plan-cascade` measures, for every drafter: costs, agreement, the paper's criterion and the
  exact one, predicted and measured milliseconds a token. Seconds are the decoding thread's own.

--quick: the bundled `code` with copies of it and `code-mini` as middle models, under ten minutes on two quiet cores.
Ends with one JSON line: predicted_over_measured: of every chain; inserted, refused: what the exact criterion says, with
milliseconds a token with and without the middle model; law_error; sampled: G over its bound.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.launch.cascades import NOTHING, Asked, plan_cascade  # noqa: E402
from tests.eval.test_cascade import enumerated, error, four, sampled, three  # noqa: E402

CODE = ("skip:4", "skip:2", "bundled:targets/code-mini")


def law_error(quick: bool) -> float:
    """The largest difference from exact values: enumerated figures, and total variation of whole steps."""
    worst = 0.0
    for buffer in (1, 2) if quick else (1, 2, 3):
        worst = max(worst, *(abs(found - float(want)) for found, want in enumerated(buffer)))
    for seed in range(1 if quick else 4):
        for rule in ("rejection", "traversal", "block", "match"):
            worst = max(worst, error(three(seed + 1, buffer=2), rule, seed, length=2 if quick else 3)[0])
        worst = max(worst, error(four(seed + 1), "traversal", seed, length=2 if quick else 3)[0])
    return worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--target", default="bundled:targets/code")
    parser.add_argument("--candidate", nargs="*", default=list(CODE), help="the slowest first")
    parser.add_argument("--drafter", nargs="*", default=["suffix", "bundled:drafters/eagle3-code"])
    parser.add_argument("--suite", default="bundled:prompts/code.jsonl")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread: its own seconds are those of a pass
    quick, document = arguments.quick, {}
    document["law_error"] = law_error(quick)
    print(f"law: the largest difference from exact values is {document['law_error']:.1e}", flush=True)
    if arguments.texts:
        pairs = (("rejection", "rejection"), ("block", "traversal"), ("match", "match"))
        document["sampled"] = {f"{a}, {b}": round(sampled(a, b, arguments.texts), 3) for a, b in pairs}
        print(f"{arguments.texts} sampled texts, G over its bound: {document['sampled']}", flush=True)
    document["plans"] = {}
    for drafter in arguments.drafter[: 1 if quick else None]:
        asked = Asked(
            arguments.target,
            tuple(arguments.candidate),
            drafter,
            arguments.suite,
            Path("runs/cascade"),
            arguments.temperature,
            arguments.tokens or (40 if quick else 96),
            arguments.limit or (4 if quick else 16),
        )
        document["plans"][drafter] = plan_cascade(asked, lambda line: print(line, flush=True))
    line = {"predicted_over_measured": {}, "inserted": {}, "refused": {}, "law_error": document["law_error"]}
    for drafter, plan in document["plans"].items():
        rows = {row["chain"]: row for row in plan["rows"]}
        for name, row in rows.items():
            line["predicted_over_measured"][f"{name}, {drafter}"] = round(row["predicted_ms"] / row["measured_ms"], 3)
            if "exact" in row:
                verdict = line["inserted" if row["exact"] else "refused"]
                both = [round(rows[key]["measured_ms"], 2) for key in (name, NOTHING)]
                verdict[f"{name}, {drafter}"] = dict(zip(("with_ms", "without_ms"), both))
    if "sampled" in document:
        line["sampled"] = document["sampled"]
    if arguments.output:
        arguments.output.write_text(json.dumps(document | {"line": line}, indent=1))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
