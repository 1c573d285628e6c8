"""What becomes of rows as people have them, and how fast: with the real chat model `bundled:targets/smollm2`.

    python tests/benchmarks/rows.py [--quick] [--count 100000] [--repeats 3]

First a file of 1,000 rows with tools, calls, thoughts, contents in parts, nulls, several turns, empty answers,
ready-made text and rows that cannot be used, in known numbers: how many of each become rows, are told of, or refused,
and what is learned of one of each kind. Then --count rows of 500 tokens (--quick: 8,000) by one process and by two, in
turn: rows per second and the peak of memory, also of a file a quarter as long. Ends with one JSON line.
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


def prepare(file: Path, processes: int, folder: Path, told=lambda line: None):
    """(rows, seconds)."""
    from draftsmith.models.chat import stop_ids
    from draftsmith.models.pictures import load_renderer
    from draftsmith.models.targets import describe
    from draftsmith.train import data

    described = describe(TARGET)
    renderer = load_renderer(TARGET, described)
    stops, vocab_size = stop_ids(described, renderer.reader), described.vocab_size
    began = time.time()
    rows = data.prepare([str(file)], 2048, 0.2, renderer, stops, vocab_size, folder, told, processes=processes)
    return rows, time.time() - began, renderer


def mixed(folder: Path) -> dict:
    file, told = folder / "mixed.jsonl", []
    write_mixed(file)
    rows, seconds, renderer = prepare(file, 1, folder / "rows", told.append)
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
    }


def measured(file: Path, processes: int) -> dict:
    """In a process of its own, whose peak of memory is then its alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", str(file), str(processes), folder]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def run(file: str, processes: str, folder: str) -> None:
    rows, seconds, _ = prepare(Path(file), int(processes), Path(folder))
    own, others = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {"rows": len(rows), "tokens": int(rows.borders[-1]), "seconds": seconds, "mb": own, "mb_child": others}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} rows of {TOKENS} tokens, once")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(*options.run)
    count, repeats = (QUICK, 1) if options.quick else (options.count, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        found = mixed(Path(folder))
        whole, quarter = Path(folder) / "long.jsonl", Path(folder) / "quarter.jsonl"
        write_long(whole, count)
        write_long(quarter, count // 4)
        runs = {name: [] for name in ("one", "two", "quarter")}
        for _ in range(repeats):
            for name, file, processes in (("one", whole, 1), ("two", whole, 2), ("quarter", quarter, 1)):
                runs[name].append(measured(file, processes))
                print(f"{name}: {runs[name][-1]}", flush=True)
    best = {name: min(each, key=lambda r: r["seconds"]) for name, each in runs.items()}
    found |= {
        "rows": best["one"]["rows"],
        "tokens_a_row": round(best["one"]["tokens"] / best["one"]["rows"]),
        "rows_per_second": round(best["one"]["rows"] / best["one"]["seconds"]),
        "rows_per_second_of_two": round(best["two"]["rows"] / best["two"]["seconds"]),
        "two_over_one": round(best["one"]["seconds"] / best["two"]["seconds"], 2),
        "peak_mb": round(max(r["mb"] for r in runs["one"])),
        "peak_mb_of_a_quarter": round(max(r["mb"] for r in runs["quarter"])),
        "peak_mb_of_two": [round(max(r[key] for r in runs["two"])) for key in ("mb", "mb_child")],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
