"""Drafters of the bundled target that sees, on held-out scenes: acceptance length, speedup, and what the drafter's own
prefill takes.

    python tests/benchmarks/vlm.py [--quick] [--scenes 24] [--tree TREE] [NAME=DRAFTER ...] [--output FILE]

Without names: eagle2, eagle3, hivis and dream as they are bundled (recipes/{eagle,eagle3,hivis,dream}-shapes.yaml).
Each scene gives two prompts, a description and a question; up to 256 new tokens; temperatures 0 and 1. tau: a tree of
60 nodes and 7 levels, which the drafters of this target nearly fill, and one of 100 and 14 (not with --quick), 95 %
intervals by prompt. Overlap: sum_v min(p, q) of the target's law p and the drafter's q at each drafted step, over the
target's own texts of that temperature. Speedup: the tree of --tree for all (default `auto`: for each drafter the one
that eval/measurement/choose.py expects most of, on other held-out scenes), batch 1, all methods in turn on each prompt,
seconds of the decoding thread, the drafter's prefill included, the target's not. Prefill: rows that feed the drafter,
and milliseconds (medians). Every greedy text is compared with plain decoding's. Where both are there: hivis over eagle3
in speed and dream over eagle2 in tau, the quotient and its interval, prompts paired. --quick: 6 scenes, one tree for
all, temperature 0. Ends with one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from draftsmith.eval.measurement.choose import expected_tau, measure_costs, ranking, record
from draftsmith.eval.measurement.interval import quotient_interval, ratio_interval
from draftsmith.eval.measurement.measure import (
    Looped,
    decode_batches,
    interleaved,
    rate,
    summary,
    tau,
    tokens_and_passes,
    tokens_and_seconds,
)
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.methods import ASSISTANT, Methods
from draftsmith.launch.scenes import write_scenes
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.features import Packing
from draftsmith.models.formats import fetch
from draftsmith.models.grow import parse_tree

SHIPPED = [
    f"{name}=bundled:drafters/{folder}-shapes"
    for name, folder in (("eagle2", "eagle"), ("eagle3", "eagle3"), ("hivis", "hivis"), ("dream", "dream"))
]
LARGE, DEEP, QUICK_TREE, NEW = "dynamic:10x7x60", "dynamic:10x14x100", "dynamic:4x4x12", 256
REPEATS, STEPS = 5, 7


def prompts_of(scenes: int, seed: int, reader) -> list:
    """The first turns of held-out scenes."""
    with tempfile.TemporaryDirectory() as folder:
        return [p.tokens for p in read_prompts(write_scenes(f"{folder}/scenes", scenes, seed, held_out=True), reader)]


def rows_fed(context) -> int:
    """Rows of one prompt that a drafter keeps; those of one layer have the last one still pending."""
    return int(context.own.lengths[0]) if hasattr(context, "own") else int(context.cache.lengths[0]) + 1


@torch.inference_mode()
def prefill(target, head, prompts) -> dict[str, float]:
    """What the drafter's own prefill of one prompt takes: median rows, and milliseconds of the thread."""
    rows, times = [], []
    for prompt in prompts:
        features = target.open(head.feature_spec, 1, len(prompt) + 8).prefill([prompt]).features
        for _ in range(REPEATS):
            start = time.thread_time()
            context = head.prefill(features)
            times.append(1e3 * (time.thread_time() - start))
        rows.append(rows_fed(context))
    return {
        "tokens": statistics.median(rows),
        "ms": statistics.median(times),
        "prompt_tokens": statistics.median(map(len, prompts)),
    }


@torch.inference_mode()
def overlaps(target, head, prompts, traces) -> list[float]:
    """Mean of sum_v min(p, q) at each drafted step, teacher-forced over texts that the target wrote."""
    totals, counts = torch.zeros(STEPS), torch.zeros(STEPS)
    for prompt, trace in zip(prompts, traces):
        ids = [*prompt, *trace.tokens]
        features = target.features(
            torch.tensor(ids),
            Packing((0, len(ids)), torch.arange(len(ids)) >= len(prompt)),
            head.feature_spec,
            [prompt.images],
        )
        laws = features.teacher.project(features.teacher.final, None).float().softmax(-1)
        for k, (rows, outputs) in enumerate(head.unroll(features, STEPS)):
            p = laws[torch.searchsorted(features.packing.rows, rows) + k]
            q = torch.zeros_like(p).index_copy(1, head.ids, head.logits(outputs).float().softmax(-1))
            totals[k] += torch.minimum(p, q).sum()
            counts[k] += len(rows)
    return [round(x, 3) for x in (totals / counts).tolist()]


def choose(methods: Methods, head, prompts, temperature: float):
    sampling = Sampling(temperature)
    expected = expected_tau(record(methods.target, head, prompts, sampling, 96, methods.stops))
    return ranking(expected, measure_costs(methods.target, head, prompts, sampling, methods.stops, 1))[0][0]


def compare(what: str, first: str, second: str, counts: dict) -> None:
    """One line: first over second; counts: (above, below) of each, one entry a prompt."""
    if first in counts and second in counts:
        (above, below), (above2, below2) = counts[first], counts[second]
        low, high = quotient_interval(counts[first], counts[second])
        print(
            f"{what}: {first} over {second} {sum(above) / sum(below) / (sum(above2) / sum(below2)):.3f} ({low:.3f} "
            f"to {high:.3f})",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drafters", nargs="*", default=SHIPPED, help="NAME=DIRECTORY")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--output", help="where to write all figures as JSON")
    arguments = parser.parse_args()
    count, tree, temperatures = (
        (6, QUICK_TREE, (0.0,)) if arguments.quick else (arguments.scenes, arguments.tree, (0.0, 1.0))
    )
    methods = Methods.open(arguments.drafters, None, ASSISTANT)
    target, stops = methods.target, methods.stops
    prompts, table, passes = prompts_of(count, 0, methods.tokenizer), {}, {}
    texts = {
        t: decode_batches(target, NoDrafter(), prompts, Sampling(t), NEW, stops, 12, margins=t == 0)
        for t in temperatures
    }
    plain = texts[0.0]
    for name, head in methods.heads.items():
        about = json.loads((fetch(methods.folders[name]) / "draftsmith.json").read_text())
        row = table[name] = {
            "trained_s": round(about["seconds"], 1),
            "steps": about["step"],
            "prefill": prefill(target, head, prompts),
        }
        for temperature in temperatures:
            for policy, key in ((LARGE, f"tau T={temperature:g}"), (DEEP, f"deep tau T={temperature:g}"))[
                : 1 if arguments.quick else 2
            ]:
                found = decode_batches(
                    target, HeadDrafter(head, parse_tree(policy)), prompts, Sampling(temperature), NEW, stops, 12
                )
                passes.setdefault(key, {})[name] = tokens_and_passes(found)
                row[key] = [tau(found), *ratio_interval(*passes[key][name])]
            row[f"overlap T={temperature:g}"] = overlaps(target, head, prompts, texts[temperature])
            if temperature == 0:
                row["identical"] = f"{sum(a.tokens == b.tokens for a, b in zip(found, plain))}/{len(prompts)}"
        print(f"{name}: {json.dumps(row)}", flush=True)
    others = prompts_of(4, 1, methods.tokenizer) if tree == "auto" else []
    for temperature in temperatures:
        trees = {
            name: choose(methods, head, others, temperature) if tree == "auto" else parse_tree(tree)
            for name, head in methods.heads.items()
        }
        decoders = {"plain": Looped(target, NoDrafter())} | {
            n: Looped(target, HeadDrafter(h, trees[n])) for n, h in methods.heads.items()
        }
        runs = interleaved(decoders, prompts, Sampling(temperature), NEW, stops)
        for name in methods.heads:
            found = summary(runs[name], plain if temperature == 0 else None, runs["plain"])
            table[name][f"speed T={temperature:g}"] = cell = {
                "tree": str(trees[name]),
                **{
                    key: found[key]
                    for key in ("tau", "busy_speedup", "busy_speedup_interval", "speedup", "ms_per_pass")
                },
                "lossless": found.get("lossless"),
            }
            print(f"{name} T={temperature:g}: {json.dumps(cell)}", flush=True)
        for key in (key for key in passes if key.endswith(f"T={temperature:g}")):
            compare(key, "dream", "eagle2", passes[key])
        compare(
            f"speed T={temperature:g}",
            "hivis",
            "eagle3",
            {name: tokens_and_seconds(run, busy=True) for name, run in runs.items()},
        )
        print(f"plain T={temperature:g}: {rate(runs['plain']):.0f} tokens/s", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(table, indent=1))
    line = {
        "speedup": {n: round(r["speed T=0"]["busy_speedup"], 3) for n, r in table.items()},
        "tau": {n: round(r["tau T=0"][0], 3) for n, r in table.items()},
        "drafter_prefill_tokens": {n: r["prefill"]["tokens"] for n, r in table.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
