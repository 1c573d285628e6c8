"""Whether the robust speedup survives a machine that others use: the shipped drafter's speed alone, and beside one busy
process and as many as there are cores.

    python tests/benchmarks/robust.py [--quick]

Every measurement is plain decoding and the drafter in turn on the same prompts, in an order that goes round the
numbers of busy processes, on the number of threads that a trial chose. Ends with one JSON line: for each number of busy
processes the robust and wall speedups of all repeats and how disturbed the plain passes were (1: not at all; where
that is not near 1 without a busy process either, others were using the machine and nothing here was alone); and over
all measurements together (largest - smallest) / median of both speedups.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

from draftsmith.eval.measurement.measure import Looped, interleaved, summary
from draftsmith.eval.measurement.speed import in_words
from draftsmith.eval.measurement.threads import chosen_threads
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.measurement import CODE
from draftsmith.launch.methods import ASSISTANT, Methods
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.grow import parse_tree

DRAFTER, TREE = "bundled:drafters/eagle3-code", "dynamic:3x4x10"


@contextmanager
def busy(number: int):
    """That many processes that only count, for as long as it is entered."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="8 prompts, 2 repeats (a minute on 2 quiet cores)")
    prompts, tokens, repeats = (8, 48, 2) if parser.parse_args().quick else (32, 64, 5)
    methods = Methods.open([DRAFTER], None, ASSISTANT)
    texts = [p.tokens for p in methods.prompts(CODE, prompts, tokens, 60, False)]
    head = next(iter(methods.heads.values()))
    decoders = {
        "plain": Looped(methods.target, NoDrafter()),
        "drafter": Looped(methods.target, HeadDrafter(head, parse_tree(TREE))),
    }
    found = {number: [] for number in dict.fromkeys((0, 1, os.cpu_count()))}
    with chosen_threads(methods.target) as tried:
        threads = torch.get_num_threads()
        for repeat in range(repeats):
            for number in found:
                with busy(number):
                    runs = interleaved(decoders, texts, Sampling(), tokens, methods.stops, 1)
                plain, drafted = (summary(runs[name], None, runs["plain"]) for name in decoders)
                more = {"disturbance": plain["disturbance"], "best": sum(plain["robust_ms_per_pass"].values())}
                found[number].append(drafted | more)
                shown = f"robust {drafted['robust_speedup']:.2f}x, wall {drafted['speedup']:.2f}x"
                print(f"repeat {repeat}, {number} busy: {shown}; {in_words(more['disturbance'])}", flush=True)
    table = Table(title=f"speedup of {DRAFTER}, {TREE}, {len(texts)} prompts, {tokens} tokens, beside busy processes")
    for name in ("busy processes", "robust", "busy", "wall", "accounted", "plain passes / best", "ms of the best"):
        table.add_column(name, justify="right")
    keys = ("robust_speedup", "busy_speedup", "speedup", "accounted_speedup")
    for number, rows in found.items():
        shown = [" ".join(f"{row[key]:.2f}" for row in rows) for key in keys]
        best = " ".join(f"{row['best']:.1f}" for row in rows)
        table.add_row(str(number), *shown, " ".join(f"{row['disturbance']:.1f}" for row in rows), best)
    Console(width=150).print(table)
    every = lambda key: [row[key] for rows in found.values() for row in rows]  # noqa: E731
    result = {
        "tau": round(found[0][0]["tau"], 3),
        "threads": threads,
        "thread_trial_ms": {number: round(ms, 2) for number, ms in tried.items()},
        "beside": {
            number: {
                "robust": [round(row["robust_speedup"], 3) for row in rows],
                "wall": [round(row["speedup"], 3) for row in rows],
                "disturbance": [round(row["disturbance"], 2) for row in rows],
            }
            for number, rows in found.items()
        },
        "robust_spread": round(spread(every("robust_speedup")), 3),
        "wall_spread": round(spread(every("speedup")), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
