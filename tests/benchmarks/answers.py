"""Answers a second: batches that run to their ends, continuous batching, lower precision, a drafter, a server; all on
the same prompts.

    python tests/benchmarks/answers.py [--quick] [--target bundled:targets/code] [--prompts recipes/prompts/code.jsonl]
        [--drafter bundled:drafters/eagle3-code --tree chain:2 ...] [--server http://127.0.0.1:8000]

Half of the prompts are answered at T = 0, half at T = 0.8. They are cut into pieces of like lengths, and each piece is
answered in every way before the next one begins, so that what else the machine does meets all of them; a speedup is the
median over the pieces of the ratio to plain continuous batching. `groups` is the way of before: batches in the order of
the file, each padded to its longest prompt and run until its last answer ends. A server is not checked here
(`draftsmith regenerate` does that); its first piece comes after a few requests that warm it up. `same`: texts that are
plain's own; of a server the greedy ones alone are comparable. Ends with one JSON line.
"""

import argparse
import json
import statistics
import time
from collections import deque

import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.lossless import dtype_of
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.answers.decoding import Work, decoded_by, open_drafter
from draftsmith.launch.answers.server import Server, served
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.targets import TextTarget

TEMPERATURES = (0.0, 0.8)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="48 prompts, 2 pieces, 96 tokens at most")
    parser.add_argument("--target", default="bundled:targets/code")
    parser.add_argument("--prompts", default="recipes/prompts/code.jsonl")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--drafter")
    parser.add_argument("--tree", action="append", help="of the drafter; default: chain:2")
    parser.add_argument("--server")
    parser.add_argument("--concurrency", type=int, default=64)
    options = parser.parse_args()
    if options.quick:
        options.count, options.pieces, options.max_new_tokens = 48, 2, 96
    tokenizer = load_tokenizer(options.target)
    target = TextTarget.load(options.target)
    stops = stop_ids(target, tokenizer)
    room = target.context_length - options.max_new_tokens - 64
    prompts = [p.tokens for p in read_prompts(options.prompts, tokenizer) if len(p.tokens) <= room][: options.count]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    pieces = [order[number :: options.pieces] for number in range(options.pieces)]
    work = Work(options.target, frozenset(stops), TEMPERATURES, options.max_new_tokens, 0, options.batch)

    def continuous(target, drafter):
        def answer(rows):
            waiting = [deque(i for i in rows if i % 2 == kind) for kind in (0, 1)]

            def take(kind, count):
                chosen = [waiting[kind].popleft() for _ in range(min(count, len(waiting[kind])))]
                return [(i, prompts[i]) for i in chosen]

            return dict(decoded_by(target, drafter, work, take))

        return answer

    def groups(rows):
        found = {}
        for kind, temperature in enumerate(TEMPERATURES):
            mine = sorted(i for i in rows if i % 2 == kind)
            for start in range(0, len(mine), options.batch):
                group = mine[start : start + options.batch]
                traces = generate(
                    target,
                    NoDrafter(),
                    [prompts[i] for i in group],
                    Sampling(temperature),
                    options.max_new_tokens,
                    stops,
                    group,
                )
                found |= {i: trace.tokens for i, trace in zip(group, traces)}
        return found

    def from_server(rows):
        service = Server(options.server, options.target, tokenizer, stops, 0)
        asked = [(i, prompts[i], TEMPERATURES[i % 2]) for i in rows]
        answers = served(service, asked, options.max_new_tokens, options.concurrency)
        return {answer.row: answer.tokens or [0] * answer.count for answer in answers}

    ways = {"plain": continuous(target, NoDrafter()), "groups": groups}
    ways["bf16"] = continuous(TextTarget.load(options.target, dtype_of("bf16")), NoDrafter())
    for tree in (options.tree or ["chain:2"]) if options.drafter else ():
        drafter = open_drafter(Work(**vars(work) | {"drafter": options.drafter, "tree": tree}), target)
        ways[f"drafter {tree}"] = continuous(target, drafter)
    if options.server:
        ways["server"] = from_server
        from_server(order[-4:])
    ways["plain"](order[-2:])
    rates, texts = {name: [] for name in ways}, {name: {} for name in ways}
    for number, rows in enumerate(pieces, 1):
        for name, answer in ways.items():
            started = time.time()
            found = answer(rows)
            rates[name].append(sum(map(len, found.values())) / (time.time() - started))
            texts[name] |= found
            print(f"piece {number} of {len(pieces)}, {name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    result = {
        "target": options.target,
        "prompts": len(prompts),
        "batch": options.batch,
        "max_new_tokens": options.max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    for name, found in rates.items():
        comparable = [i for i in order if name != "server" or TEMPERATURES[i % 2] == 0]
        result[name] = {
            "tokens_per_second": round(statistics.median(found), 1),
            "speedup": round(statistics.median(a / b for a, b in zip(found, rates["plain"])), 3),
            "pieces": [round(rate, 1) for rate in found],
            "same": f"{sum(texts[name][i] == texts['plain'][i] for i in comparable)}/{len(comparable)}",
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
