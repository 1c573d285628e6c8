"""Where a decoding pass goes: target, drafter, everything else; beside the library's own cached step.

    python tests/benchmarks/decoding.py [--quick] [--threads N] [--passes N] [--tree TREE] [--target NAME ...]

Targets `code` and `smollm2` with their shipped EAGLE-3 drafters, batches of 1 and 8, T = 0 and 1, on prompts of
`recipes/prompts`. Four things take turns on the same prompts, piece by piece, so that a busy machine meets all alike:
plain decoding and the drafter's tree at T = 0 and at T = 1; the library's cached steps (`model(...,
past_key_values=...)` with a `DynamicCache`) follow each round. Milliseconds are robust ones (low quantiles of like
passes, eval/measurement/speed.py), on a CPU with one thread in the thread's own seconds.

--quick: fewer passes (under 10 minutes on 2 cores). Ends with one JSON line:
overhead_share     by target: sampling and bookkeeping / a whole pass, the largest of batch, temperature and method
pass_over_library  by target: our pass over one row of plain greedy decoding / the library's step, batch 1
draft_share        drafting of the tree / its verify pass, `smollm2`, batch 1, T = 0
t1_over_t0         a drafted pass at T = 1 / at T = 0, `smollm2`, batch 1
syncs_per_pass     reads by the host in one drafted pass, `code`, batch 1, T = 0 (`Reads`), eager, and of static
                   shapes as a CUDA device captures them
auto_over_best     speed of what `--tree auto` chooses / the best of some trees and no drafting (eval/measurement/
                   sweep.py), `code`, by batch size
"""

import argparse
import json
import os
import time

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from draftsmith.eval.decode import Clock, Pass, generate, undisturbed
from draftsmith.eval.measurement.speed import low, robust_ms
from draftsmith.eval.measurement.sweep import sweep
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.methods import ASSISTANT, Methods
from draftsmith.models.drafters import NoDrafter, drafting
from draftsmith.models.grow import DynamicTree, chain, parse_tree

TARGETS = {
    "code": ("bundled:targets/code", "bundled:drafters/eagle3-code", "bundled:prompts/code.jsonl"),
    "smollm2": ("bundled:targets/smollm2", "bundled:drafters/eagle3-smollm2", "bundled:prompts/chat.jsonl"),
}
TREE = "dynamic:3x4x10"
TREES = (chain(2), chain(4), DynamicTree(3, 2, 6), DynamicTree(3, 4, 10), DynamicTree(6, 4, 16), DynamicTree(8, 6, 40))
READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"}
SIZES = {"nonzero", "masked_select"}  # operators whose result the host must wait for


class Reads:
    """Counts what makes the host wait for a device: values read into Python, and operators whose result has a size
    that depends on values. On a CPU nothing waits; the same calls would on a GPU.
    """

    def __init__(self):
        counted = self.counted = []

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if getattr(function, "__name__", "") in READS:
                    counted.append(function.__name__)
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket.__name__
                by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
                if by_mask or name in SIZES:
                    counted.append(name)
                return function(*args, **(kwargs or {}))

        self.modes = Functions(), Operators()

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in self.modes[::-1]:
            mode.__exit__(*error)


def reads_per_pass(target, drafter, prompt: list[int]) -> float:
    """By two lengths of text, so that the prefill is not counted."""

    def run(tokens: int) -> tuple[int, int]:
        clock = Clock(target.device)
        with Reads() as reads:
            generate(target, drafter, [prompt], Sampling(), tokens, clock=clock)
        return len(reads.counted), len(clock.passes)

    (few, some), (many, more) = run(8), run(40)
    return (many - few) / (more - some)


def library_ms(target, prompt: list[int], steps: int) -> list[float]:
    """Milliseconds of each of the library's greedy steps behind one prompt, output head and argmax included."""
    model, cache, took = target.model, DynamicCache(), []
    timer = time.thread_time if undisturbed(target.device) else time.perf_counter
    with torch.inference_mode():
        token = model(torch.tensor([prompt], device=target.device), past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(steps):
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            before = timer()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            token.tolist()
            took.append(1e3 * (timer() - before))
    return took


def split(target, drafters: dict, prompts: list[list[int]], batch: int, tokens: int) -> tuple[dict, dict]:
    """({(method, temperature): milliseconds of a pass by part}, {"ours", "library": milliseconds of a step of one row})
    over batches of the prompts, all in turn. The second is empty for larger batches.
    """
    units = {(name, t): [] for name in drafters for t in (0.0, 1.0)}
    library = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        for name, temperature in units if start % (2 * batch) else list(units)[::-1]:
            clock = Clock(target.device)
            generate(target, drafters[name], some, Sampling(temperature), tokens, clock=clock)
            units[name, temperature].append({"passes": clock.passes, "begin": clock.begin})
        if batch == 1:
            library += library_ms(target, some[0], tokens - 1)
    steps = {}
    if batch == 1:
        ours = [1e3 * sum(Pass(*p)[4:]) for unit in units["plain", 0.0] for p in unit["passes"]]
        steps = {
            name: low(torch.tensor(took), torch.ones(1, len(took))).item()
            for name, took in (("ours", ours), ("library", library))
        }
    return {key: robust_ms(found) for key, found in units.items()}, steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer passes (under 10 minutes on 2 cores)")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--tokens", type=int, help="new tokens of a text; default 96, with --quick 32")
    parser.add_argument("--prompts", type=int, help="default 16, with --quick 8")
    parser.add_argument("--tree", default=TREE, help="what the drafter grows")
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens, count = (
        arguments.tokens or (32 if arguments.quick else 96),
        arguments.prompts or (8, 16)[not arguments.quick],
    )
    found, summary = {}, {"overhead_share": {}, "pass_over_library": {}}
    print("| target | batch | T | method | target ms | drafter ms | sampling and bookkeeping ms | share |")
    print("| - | - | - | - | - | - | - | - |")
    for name in arguments.target:
        place, drafter, suite = TARGETS[name]
        methods = Methods.open([drafter], place, ASSISTANT, None, lambda line: None)
        target, (head,) = methods.target, methods.heads.values()
        prompts = [p.tokens for p in methods.prompts(suite, count, tokens, 60, True, lambda line: None)]
        drafters = {"plain": NoDrafter(), "eagle3": drafting(head, parse_tree(arguments.tree))}
        for batch in (1, 8):
            passes, steps = split(target, drafters, prompts, batch, tokens)
            for (method, temperature), ms in passes.items():
                share = ms["overhead"] / sum(ms.values())
                summary["overhead_share"][name] = max(summary["overhead_share"].get(name, 0), share)
                found[name, batch, temperature, method] = ms
                print(
                    f"| {name} | {batch} | {temperature:g} | {method} | {ms['verify']:.2f} | {ms['draft']:.2f} "
                    f"| {ms['overhead']:.2f} | {share:.1%} |"
                )
            if steps:
                summary["pass_over_library"][name] = steps["ours"] / steps["library"]
                print(
                    f"{name}: our pass over one row {steps['ours']:.2f} ms, the library's step {steps['library']:.2f}"
                )
        if name == "code":
            summary["syncs_per_pass"] = {"eager": reads_per_pass(target, drafters["eagle3"], prompts[0])}
            target.graphs.on = head.graphs.on = True  # static shapes, which a CUDA device captures
            generate(target, drafters["eagle3"], prompts[:1], Sampling(), 40)  # what the first use of a shape compares
            summary["syncs_per_pass"]["captured"] = reads_per_pass(target, drafters["eagle3"], prompts[0])
            target.graphs.on = head.graphs.on = False
            summary["auto_over_best"] = {}
            for batch in (1, 8):
                result = sweep(
                    target, head, prompts, methods.stops, list(TREES), Sampling(), batch, tokens, lambda line: None
                )
                print(f"{name}, batch {batch}: auto chose {result['auto']}, best {result['best']}")
                summary["auto_over_best"][batch] = result["auto_over_best"]
        if name == "smollm2":
            cold, hot = (found[name, 1, t, "eagle3"] for t in (0.0, 1.0))
            summary["draft_share"] = cold["draft"] / cold["verify"]
            summary["t1_over_t0"] = sum(hot.values()) / sum(cold.values())
    print(json.dumps(rounded(summary)))


def rounded(value):
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else round(value, 3)


if __name__ == "__main__":
    main()
