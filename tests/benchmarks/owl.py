"""`[SPEC]` against no `[SPEC]` at equal rows to verify, and OWL's drafting time by context length.

    python tests/benchmarks/owl.py [OFF SPEC] [--rows 32] [--temperature 0] [--limit 78] [--output owl.json]

OFF and SPEC are drafters of one target, by default the two shipped ones. All prompts of `prompts/code.jsonl`, up to 64
new tokens, dynamic trees 8 wide and 8 deep. With R rows to verify, OFF has R nodes, SPEC R / 2 nodes and a probe behind
each; "no probe": SPEC's own drafter starting from the target's states, R nodes. Differences are paired by prompt, 95 %
intervals. Drafting time: one tree of 30 nodes behind contexts of random states (thread time, median of 40, contexts in
turn), beside an untrained EAGLE-3 head of the same target. Ends with one JSON line.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from draftsmith.eval.measurement.interval import difference_interval, ratio_interval
from draftsmith.eval.measurement.measure import decode_batches, tau, tokens_and_passes
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.measurement import CODE
from draftsmith.launch.methods import ASSISTANT, Methods
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.features import Features
from draftsmith.models.grow import DynamicTree
from draftsmith.models.heads import Eagle3Config, Eagle3Head

SHIPPED = ("bundled:drafters/owl-code-long", "bundled:drafters/owl-code-long-spec")
LENGTHS = (256, 1024, 4096, 16384)


class WithoutProbes(HeadDrafter):
    """A drafter with [SPEC] that asks for no probes: it starts from the target's own states."""

    def __init__(self, head, policy):
        super().__init__(head, policy)
        self.feature_spec, self.probes, self.size = replace(self.feature_spec, probe=None), False, policy.size


def compare(target, stops, prompts, off, spec, temperature: float, rows: int, max_new_tokens: int, plain) -> dict:
    """tau of each at `rows` rows, and the paired difference SPEC - OFF."""
    whole, half = DynamicTree(8, 8, rows), DynamicTree(8, 8, rows // 2)
    drafters = {
        "off": HeadDrafter(off, whole),
        "spec": HeadDrafter(spec, half),
        "no probe": WithoutProbes(spec, whole),
        "spec, equal nodes": HeadDrafter(spec, whole),
    }
    cell, counted = {"T": temperature, "rows": rows}, {}
    for name, drafter in drafters.items():
        traces = decode_batches(target, drafter, prompts, Sampling(temperature, seed=0), max_new_tokens, stops, 13)
        counted[name] = tokens_and_passes(traces)
        cell[name] = [tau(traces), *ratio_interval(*counted[name])]
        cell["identical"] = cell.get("identical", 0) + sum(a.tokens == b.tokens for a, b in zip(traces, plain))
    cell["difference"] = [cell["spec"][0] - cell["off"][0], *difference_interval(counted["spec"], counted["off"])]
    return cell


@torch.inference_mode()
def drafting(head, lengths) -> dict[int, float]:
    """Milliseconds of the thread for one tree, by context length."""
    policy, width = DynamicTree(8, 8, 30), head.shared.embedding.size(1) * len(head.feature_spec.taps)
    contexts, root, times = {}, torch.tensor([5]), {length: [] for length in lengths}
    for length in lengths:
        tokens, last = torch.randint(0, head.config.vocab_size, (1, length)), torch.ones(1, dtype=torch.int64)
        contexts[length] = head.prefill(Features(tokens, torch.randn(1, length, width), last * length))
    for _ in range(40):
        for length, context in contexts.items():
            head.extend(context, Features(root[None], torch.randn(1, 1, width), last))
            start = time.thread_time()
            policy.grow(head, head.roots(context), root)
            times[length].append(1e3 * (time.thread_time() - start))
    return {length: statistics.median(some) for length, some in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drafters", nargs="*", default=SHIPPED)
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 32, 60])
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--output", default="owl.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    methods = Methods.open(list(arguments.drafters), None, ASSISTANT)
    off, spec = methods.heads.values()
    prompts = [p.tokens for p in methods.prompts(CODE, arguments.limit, 64, 2 * max(arguments.rows), False)]
    cells = []
    for temperature in arguments.temperature:
        plain = decode_batches(
            methods.target, NoDrafter(), prompts, Sampling(temperature, seed=0), 64, methods.stops, 13
        )
        for rows in arguments.rows:
            cells.append(compare(methods.target, methods.stops, prompts, off, spec, temperature, rows, 64, plain))
            cell = cells[-1]
            shown = "  ".join(
                f"{name} {cell[name][0]:.3f} ({cell[name][1]:.2f}-{cell[name][2]:.2f})"
                for name in ("off", "spec", "difference", "no probe", "spec, equal nodes")
            )
            print(
                f"T {temperature:g} rows {rows}: {shown}  identical {cell['identical']}/{4 * len(prompts)}", flush=True
            )
    eagle = Eagle3Head(Eagle3Config.for_target(methods.target.config), methods.target.shared).eval()
    document = {
        "prompts": len(prompts),
        "cells": cells,
        "owl_ms": drafting(off, LENGTHS),
        "eagle3_ms": drafting(eagle, LENGTHS),
    }
    Path(arguments.output).write_text(json.dumps(document, indent=1))
    print(
        json.dumps(
            {
                "owl_ms": document["owl_ms"],
                "eagle3_ms": document["eagle3_ms"],
                "gain_T0": [c["difference"] for c in cells if c["T"] == 0],
            }
        )
    )


if __name__ == "__main__":
    main()
