"""What becomes of rows as people have them, and how fast: with the real chat model `bundled:targets/smollm2`.

    python tests/benchmarks/rows.py [--quick] [--count 100000] [--repeats 3]

First a file of 1,000 rows with tools, calls, thoughts, contents in parts, nulls, several turns, empty answers,
ready-made text and rows that cannot be used, in known numbers: how many of each become rows, are told of, or refused,
and what is learned of one of each kind. Then --count rows of 500 tokens (--quick: 8,000) by one process and by two, in
turn: rows per second and the peak of memory, also of a file a quarter as long. Ends with one JSON line.

Rows per second are also given by the processor's time alone, which other work on the machine does not spoil: two
processes on two free cores take half of what the first and the others take together, unless what the first does by
itself (reading, writing, counting) is more. --only leaves out the rest: mixed, one, two, quarter; several may be given.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

from draftsmith.train import data
from draftsmith.train.encoding import Encoder, usual_processes

PARTS = ["mixed", "one", "two", "quarter"]
TARGET, QUICK, TOKENS = "bundled:targets/smollm2", 8000, 500
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"e": "6*7"}'}}
WORDS = "the a tree river of stone light carries over under every morning quiet number answer because open".split()


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


# kind: (rows of 1,000, a record, what becomes of it: how many rows, or None where it cannot be used)
KINDS = {
    "one turn": (300, {"messages": [user("Name a colour."), said("Blue is a colour.")]}, 1),
    "three turns": (150, {"messages": [user("Name a colour."), said("Blue, say.")] * 3}, 1),
    "nulls": (
        100,
        {"messages": [m | {"tool_calls": None, "name": None} for m in (user("Why?"), said("Because it is."))]},
        1,
    ),
    "parts": (
        100,
        {"messages": [user([{"type": "text", "text": "Why?"}]), said([{"type": "text", "text": "It is."}])]},
        1,
    ),
    "thoughts in the text": (80, {"messages": [user("Why?"), said("<think>\nHm.\n</think>\n\nBecause it is.")]}, 1),
    "thoughts beside it, not shown": (40, {"messages": [user("Why?"), said("Because.", reasoning_content="Hm.")]}, 1),
    "tools, not shown": (40, {"messages": [user("6*7?"), said("It is 42.")], "tools": [TOOL]}, 1),
    "calls, not shown": (20, {"messages": [user("6*7?"), said(None, tool_calls=[CALL])], "tools": [TOOL]}, None),
    "empty answers": (60, {"messages": [user("Why?"), said(" ")]}, 0),
    "an empty answer of two": (30, {"messages": [user("Why?"), said(""), user("Well?"), said("Because it is.")]}, 1),
    "ready-made text": (30, {"text": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"}, 1),
    "pictures": (20, {"messages": [user([{"type": "image_url"}]), said("A cat.")]}, None),
    "half a surrogate": (10, {"messages": [user("ok \ud800"), said("Fine.")]}, None),
    "nobody answers": (20, {"messages": [user("Why?")]}, None),
}


def write_mixed(file: Path) -> None:
    rows = [record for count, record, _ in KINDS.values() for _ in range(count)]
    random.Random(0).shuffle(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_long(file: Path, count: int) -> None:
    """Rows of about 500 tokens in two turns, no two of them alike."""
    draw = random.Random(1)
    with file.open("w") as out:
        for _ in range(count):
            texts = [" ".join(draw.choices(WORDS, k=n)) for n in (60, 170, 50, 175)]
            messages = [said(text) if n % 2 else user(text) for n, text in enumerate(texts)]
            out.write(json.dumps({"messages": messages}) + "\n")


class Timed(Encoder):
    """seconds: of the processor's time that this process encoded."""

    seconds = 0.0

    def __call__(self, record, file):
        began = time.thread_time()
        found = super().__call__(record, file)
        Timed.seconds += time.thread_time() - began
        return found


def prepare(file: Path, processes: int, folder: Path, told=lambda line: None):
    """(rows, seconds, seconds of this process's time, renderer)."""
    from draftsmith.models.chat import stop_ids
    from draftsmith.models.pictures import load_renderer
    from draftsmith.models.targets import describe

    described = describe(TARGET)
    renderer = load_renderer(TARGET, described)
    stops, vocab_size = stop_ids(described, renderer.reader), described.vocab_size
    began, cpu = time.time(), time.process_time()
    rows = data.prepare([str(file)], 2048, 0.2, renderer, stops, vocab_size, folder, told, processes=processes)
    return rows, time.time() - began, time.process_time() - cpu, renderer


def mixed(folder: Path) -> dict:
    file, told = folder / "mixed.jsonl", []
    write_mixed(file)
    rows, seconds, cpu, renderer = prepare(file, 1, folder / "rows", told.append)
    expected = sum(count * (made or 0) for count, _, made in KINDS.values())
    bad = sum(count for count, _, made in KINDS.values() if made is None)
    assert len(rows) == expected, (len(rows), expected)
    assert any(f"{bad} of 1,000 rows cannot be used" in line for line in told), told
    for line in told:
        print(line)
    for name, (_, record, made) in KINDS.items():
        if made and "messages" in record:
            from draftsmith.models.messages import messages_of, tools_of

            ids, mask = renderer.encode(messages_of(record), tools_of(record), {2}).rows[0]
            runs = groupby(zip(ids, mask), key=lambda pair: pair[1])
            texts = [(mark, renderer.tokenizer.decode([i for i, _ in run])) for mark, run in runs]
            print(
                f"{name}: "
                + "".join(f"[[{t}]]" if m else t for m, t in texts)
                .partition("<|im_start|>user")[2][:160]
                .replace("\n", "\\n")
            )
    return {
        "mixed_rows": len(rows),
        "mixed_bad": bad,
        "mixed_told": [line for line in told if "cannot be used" not in line],
        "mixed_tokens": int(rows.borders[-1]),
        "mixed_learned_tokens": int(rows.mask.sum()),
        "mixed_seconds_per_1000": round(seconds, 2),
        "mixed_cpu_seconds_per_1000": round(cpu, 2),
    }


def measured(file: Path, processes: int) -> dict:
    """In a process of its own, whose peak of memory is then its alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", str(file), str(processes), folder]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def run(file: str, processes: str, folder: str) -> None:
    data.Encoder = Timed
    rows, seconds, cpu, _ = prepare(Path(file), int(processes), Path(folder))
    own, others = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {
        "rows": len(rows),
        "tokens": int(rows.borders[-1]),
        "seconds": round(seconds, 2),
        "cpu": round(cpu, 2),
        "cpu_alone": round(cpu - Timed.seconds, 2),  # without encoding: what no other process does
        "cpu_others": round(others.ru_utime + others.ru_stime, 2),  # with what they take to start
        "mb": own.ru_maxrss / 1024,
        "mb_child": others.ru_maxrss / 1024,
    }
    print(json.dumps(found))


def by_the_clock(runs: dict) -> dict:
    best = {name: min(each, key=lambda r: r["seconds"]) for name, each in runs.items() if each}
    peak = lambda name, key: round(max(r[key] for r in runs[name]))  # noqa: E731
    found = {}
    for name in best.keys() & {"one", "two"}:
        found[f"rows_per_second_of_{name}"] = round(best[name]["rows"] / best[name]["seconds"])
        found[f"peak_mb_of_{name}"] = [peak(name, "mb"), peak(name, "mb_child")]
        found |= {"rows": best[name]["rows"], "tokens_a_row": round(best[name]["tokens"] / best[name]["rows"])}
    if best.keys() >= {"one", "two"}:
        found["two_over_one"] = round(best["one"]["seconds"] / best["two"]["seconds"], 2)
    if "quarter" in best:
        found["peak_mb_of_a_quarter"] = [peak("quarter", "mb"), peak("quarter", "mb_child")]
    return found


def by_the_processor(runs: dict) -> dict:
    """What the best of each kind of run took of the processor."""
    best = {name: min(each, key=lambda r: r["cpu"] + r["cpu_others"]) for name, each in runs.items() if each}
    found = {}
    if one := best.get("one"):
        found |= {
            "rows_per_cpu_second": round(one["rows"] / one["cpu"]),
            "alone_of_a_row": round(one["cpu_alone"] / one["cpu"], 4),
        }
    if two := best.get("two"):
        half = max(two["cpu_alone"], (two["cpu"] + two["cpu_others"]) / 2)
        found["rows_per_second_of_two_free_cores"] = round(two["rows"] / half)
        if one:
            found["two_over_one_on_free_cores"] = round(one["cpu"] / half, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} rows of {TOKENS} tokens, once")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(*options.run)
    count, repeats = (QUICK, 1) if options.quick else (options.count, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        found = mixed(Path(folder)) if "mixed" in options.only else {}
        runs = {name: [] for name in PARTS[1:]}
        whole, quarter = Path(folder) / "long.jsonl", Path(folder) / "quarter.jsonl"
        if set(options.only) - {"mixed"}:
            write_long(whole, count)
            write_long(quarter, count // 4)
        for _ in range(repeats):
            for name, file, processes in (("one", whole, 1), ("two", whole, 2), ("quarter", quarter, 1)):
                if name in options.only:
                    runs[name].append(measured(file, processes))
                    print(f"{name}: {runs[name][-1]}", flush=True)
    found |= by_the_clock(runs) | by_the_processor(runs)
    found |= {"cores": usual_processes(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
