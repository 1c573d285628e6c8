"""Training-free drafters: their laws, what they accept from trajectory to trajectory, and what their memories cost.

    python tests/benchmarks/training_free.py --quick [--output FILE]
    python tests/benchmarks/training_free.py --target TARGET --suite FILE [--drafter DIR] [--tree FILE.json]
        [--temperature T] [--trajectories N] [--prompts N] [--new-tokens N] [--texts 50000] [--laws N] [--output FILE]
        [--dtype bf16] [--abreast N] [--nodes N]
        [--reader DIR [--suites FOLDER]]

* law: whole steps of STAND and Token Recycling (memory, draw, verify, learn) enumerated exactly on small vocabularies:
  the largest total variation to the target's joint law. With --texts N also N sampled texts through the real loop: G
  over the bound that a right sampler exceeds once in a million times.
* trajectories: every method samples each prompt N times, memories kept from one to the next (`draftsmith eval
  --trajectories`). STAND in its three modes (with --tree also its tuned tree), Token Recycling, suffix decoding with
  the other trajectories in its index, prompt lookup, a trained drafter, plain decoding. Differences are paired by
  prompt. --abreast decodes so many prompts in one batch, each with memories of its own: the same acceptance lengths
  sooner, and seconds that are those of a batch. --nodes: static trees of so many drafted nodes, the likeliest by the
  shape's own prior, in place of the papers' of 80, and of the trained drafter's in place of 59: what a CPU can afford.
* memory: entries, bytes, lookups and updates a second after a million tokens.
* reader: READER over the trained drafter DIR beside that drafter alone, greedy, one tree, one prompt at a time, on the
  categories of Spec-Bench that copy from their prompts, paired by prompt (reader.py measures more). Only with --reader.

--quick takes the bundled `code` target, 6 prompts of 16 trajectories (under ten minutes on a quiet machine). Ends with
one JSON line: stand_tau by trajectory, best_other_tau_16 of the other training-free methods at the last one,
gumbel_over_deterministic: quotient of accepted tokens over all trajectories, draft_share: seconds of drafting over
those of verify passes; reader_over_head: quotient of tau by category (null where it was not measured).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.lossless import dtype_of  # noqa: E402
from draftsmith.eval.measurement.journal import Journal  # noqa: E402
from draftsmith.eval.measurement.progress import Progress  # noqa: E402
from draftsmith.eval.measurement.trajectories import Method, Scaled, ahead, figures, trajectories  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.eval.verification.rules import RULES  # noqa: E402
from draftsmith.launch.drafters import Drafters, shaped  # noqa: E402
from draftsmith.launch.methods import ASSISTANT, Methods  # noqa: E402
from draftsmith.models.drafters.ngrams import NgramMemory  # noqa: E402
from draftsmith.models.drafters.recycling import RecyclingDrafter  # noqa: E402
from draftsmith.models.drafters.stand import StandDrafter  # noqa: E402
from draftsmith.models.grow import DynamicTree, StaticTree, binary, parse_tree  # noqa: E402
from draftsmith.models.topology import CHAIN, candidates  # noqa: E402
from tests.benchmarks import reader  # noqa: E402
from tests.benchmarks.public import suites_folder  # noqa: E402
from tests.steps import Enumerated, Table, law_of_steps, learning, recycled, started  # noqa: E402
from tests.table_target import TableTarget, g_over_bound  # noqa: E402

OTHERS = ("recycling", "suffix", "lookup")
COPYING = ("rag", "summarisation")
SHAPES = (StaticTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)), ""), StaticTree(((0,), (1,), (2,), (0, 0)), ""))
BEFORE = [(0, 1, 2, 0, 1, 1, 2, 0, 2, 1), (0, 1, 1, 2, 0, 1, 2)]


def worst_law_error(seeds: int) -> float:
    worst = 0.0
    for seed in range(seeds):
        p, tree = Table(3, seed), SHAPES[seed % 2]
        for rule in ("rejection", "traversal"):
            drafter = started(Enumerated(tree, lasting=True), p, BEFORE, (0, 1))
            worst = max(worst, law_of_steps(drafter, RULES[rule], p, (0, 1), 4, learning)[0])
        drafter = started(RecyclingDrafter(3, tree, lasting=True), p, BEFORE, (0, 1))
        worst = max(worst, law_of_steps(drafter, RULES["match"], p, (0, 1), 4, recycled)[0])
    return worst


def sampled_texts(count: int) -> dict[str, float]:
    """G over its bound, by mode and rule."""
    found = {}
    for mode, rule in (("gumbel", "rejection"), ("gumbel", "traversal"), ("sequential", "rejection")):
        target, drafter = TableTarget(3, seed=2), StandDrafter(binary(2), mode, lasting=True)
        found[f"{mode}, {rule}"] = round(g_over_bound(target, drafter, RULES[rule], [0, 1], count, 4), 3)
    return found


def memory(tokens: int) -> dict:
    """One memory that learns `tokens` tokens (ids of a power law, four a pass), unbounded and with its usual bound."""
    generator, found = np.random.default_rng(0), {}
    text = np.minimum(generator.zipf(1.3, tokens + 4), 49_151).astype(np.int64)
    ends = np.lib.stride_tricks.sliding_window_view(text, 4)
    ids = generator.integers(49_152, size=(1000, 4, 10))
    probs = np.sort(generator.dirichlet(np.full(10, 0.3), (1000, 4)).astype(np.float32))[..., ::-1]
    for name, most in (("unbounded", 4 * tokens + 8), ("bounded", 1_000_000)):
        learned, start = NgramMemory(max_entries=most), time.thread_time()
        for step in range(tokens // 4):
            part = ends[4 * step : 4 * step + 4]
            learned.update(part, np.zeros(4, int), ids[step % 1000], probs[step % 1000])
        seconds, passes, asked = time.thread_time() - start, 300, ends[-32:]
        start = time.thread_time()
        for _ in range(passes):
            learned.find(asked, np.zeros(32, int))
        found[name] = {
            "tokens": tokens,
            "entries": len(learned),
            "bytes": learned.nbytes,
            "updates_per_second": round(tokens / seconds),
            "lookups_per_second": round(32 * passes / (time.thread_time() - start)),
        }
    return found


def made(methods: Methods, drafter: str | None, tree: str | None, nodes: int | None) -> dict[str, Method]:
    drafters: Drafters = methods.drafters
    own = nodes and StaticTree(tuple(candidates(nodes, CHAIN)), f"{nodes} nodes")
    names = {name: name for name in ("plain", "stand", "stand:sequential", "stand:deterministic", *OTHERS)}
    found = {
        name: Method(
            lambda method=method: drafters.drafter(method, own if shaped(method) else None, lasting=True),
            drafters.rule(method),
            method not in ("plain", "lookup"),
        )
        for name, method in names.items()
    }
    if tree is not None:
        tuned = parse_tree(tree)
        found["stand, tuned tree"] = Method(lambda: drafters.drafter("stand", tuned, True), drafters.rule("stand"))
    if drafter is not None:
        grown = DynamicTree(10, 7, (nodes or 59) + 1)
        found["trained drafter"] = Method(lambda: drafters.drafter(drafter, grown), drafters.rule(drafter), False)
    return found


def scaled(arguments) -> tuple[dict[str, dict], dict[str, Scaled], int]:
    methods = Methods.open(["stand"], arguments.target, ASSISTANT, arguments.dtype and dtype_of(arguments.dtype))
    prompts = methods.prompts(arguments.suite, None, arguments.new_tokens, 128, True, print)
    prompts = [p.tokens for p in prompts][:: max(1, len(prompts) // arguments.prompts)][: arguments.prompts]
    journal = None
    if arguments.output:
        settings = {name: str(value) for name, value in vars(arguments).items()} | methods.identity()
        journal = Journal(Path(f"{arguments.output}.partial"), json.loads(json.dumps(settings)))
    runs = trajectories(
        methods.target,
        made(methods, arguments.drafter, arguments.tree, arguments.nodes),
        prompts,
        arguments.trajectories,
        1,
        Sampling(arguments.temperature),
        arguments.new_tokens,
        methods.stops,
        Progress(print, "trajectories", len(prompts), every=0),
        journal=journal,
        abreast=arguments.abreast,
    )
    table = {name: figures(run, runs["plain"], 1, 0) for name, run in runs.items()}
    last = arguments.trajectories - 1
    for name, run in runs.items():
        table[name]["stand_ahead_at_the_last"] = ahead(runs["stand"], run, 1, last, 0)
    return table, runs, last


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--target", default="bundled:targets/code")
    parser.add_argument("--suite", default="bundled:prompts/code.jsonl")
    parser.add_argument("--drafter", help="a trained drafter beside them")
    parser.add_argument("--tree", help="a tree that tune-tree wrote, for STAND")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--laws", type=int, help="how many random laws are enumerated")
    parser.add_argument("--reader", help="a trained drafter that READER widens")
    parser.add_argument("--suites", type=Path, help="the folder of Spec-Bench's file")
    parser.add_argument("--dtype", help="of the target; default: fp32 on a CPU")
    parser.add_argument("--abreast", type=int, default=1, help="prompts decoded in one batch")
    parser.add_argument("--nodes", type=int, help="drafted nodes of the trees; default: the papers'")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.reader:
        suites = suites_folder(arguments.suites, ["spec_bench.jsonl"])
    arguments.prompts = arguments.prompts or (6 if arguments.quick else 24)
    arguments.new_tokens = arguments.new_tokens or (48 if arguments.quick else 128)
    document = {"law_error": worst_law_error(arguments.laws or (4 if arguments.quick else 20))}
    if arguments.texts:
        document["sampled_texts"] = sampled_texts(arguments.texts)
    document["memory"] = memory(50_000 if arguments.quick else 1_000_000)
    document["trajectories"], _, last = scaled(arguments)
    table = document["trajectories"]
    for name, cell in table.items():
        by = [round(part["tau"], 2) for part in cell["numbers"]]
        print(f"{name}: tau {cell['tau']:.3f}, by trajectory {by}, {cell['tokens_per_second']:.1f} tokens/s")
    document["reader"] = {}
    if arguments.reader:
        found = reader.compared(arguments.reader, suites, COPYING, "dynamic:3x4x10", 8, arguments.new_tokens)
        print("\n".join(reader.shown(found)))
        document["reader"] = {part: cells["1"] for part, cells in found.items()}
    stand = table["stand"]["numbers"]
    accepted = {name: table[name]["tau"] - 1 for name in ("stand", "stand:deterministic")}
    document["line"] = {
        "stand_tau": {"1": round(stand[0]["tau"], 3), str(last + 1): round(stand[last]["tau"], 3)},
        f"best_other_tau_{last + 1}": round(max(table[name]["numbers"][last]["tau"] for name in OTHERS), 3),
        "gumbel_over_deterministic": round(accepted["stand"] / accepted["stand:deterministic"], 3),
        "reader_over_head": {
            part: document["reader"].get(part, {}).get("reader over it", {}).get("quotient") for part in COPYING
        },
        "draft_share": round(table["stand"]["draft_share"], 4),
        "law_error": document["law_error"],
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1))
        Path(f"{arguments.output}.partial").unlink()  # a later run measures anew
    print(json.dumps(document["line"]))


if __name__ == "__main__":
    main()
