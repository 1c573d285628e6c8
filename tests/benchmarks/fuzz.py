"""Whatever a file, a checkpoint or a drafter's directory holds: one line, or what it should be.

    python tests/benchmarks/fuzz.py [--quick] [--rows 20000] [--loads 2000] [--seed 0]

Rows: good records and mutations of them (values, keys, characters, bytes of the line) go through
`draftsmith.train.data.prepare` under three chat templates, and every one is compared with `tests/oracle.py`, which
works out what is to be learned a second time, without our code. Loads: `tests/benchmarks/fuzz_loads.py`. Ends with one
JSON line: how many of each were used and refused, and what was wrong (nothing, or the exit code is 1).
"""

import argparse
import copy
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.models.errors import UserError  # noqa: E402
from draftsmith.models.rendering import Renderer  # noqa: E402
from draftsmith.train import data  # noqa: E402
from draftsmith.train.records import encode_record  # noqa: E402
from draftsmith.train.reference.pretrain import train_tokenizer  # noqa: E402
from tests.oracle import TEMPLATES, Bad, Taught, expected  # noqa: E402

STOP, VOCABULARY, MARK = 2, 300, "<|beyond|>"  # a token whose id the embedding does not have
BATCH = 500  # rows of a file
CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"e": "6*7"}'}}
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}
TALK = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return os"}]
GOOD = [
    {"messages": TALK},
    {"messages": TALK * 3},
    {"messages": [{"role": "system", "content": "sys"}, *TALK], "tools": [TOOL]},
    {"messages": TALK * 2, "tools": json.dumps([TOOL])},
    {"messages": [TALK[1], *TALK * 2, TALK[0]]},
    {"messages": [TALK[0], TALK[1] | {"content": "<think>\nfox\n</think>\n\nos"}, *TALK]},
    {"messages": [TALK[0], TALK[1] | {"reasoning_content": "fox"}, TALK[0], TALK[1] | {"weight": 0}, *TALK]},
    {
        "messages": [
            TALK[0],
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            TALK[1],
        ],
        "tools": [TOOL],
    },
    {"messages": [TALK[0], {"role": "assistant", "content": "os", "function_call": CALL["function"]}]},
    {"messages": [TALK[0] | {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, TALK[1]]},
    {"messages": json.dumps(TALK), "system": "be brief"},
    {"conversations": [{"from": "human", "value": "add"}, {"from": "gpt", "value": "os"}], "system_prompt": ""},
    {
        "conversations": [
            {"from": "system", "value": "sys"},
            {"from": "human", "value": "6*7"},
            {"from": "function_call", "value": '{"name": "calc", "arguments": {"e": 1}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "It is 42.", "weight": 1},
        ]
    },
    {"conversations": TALK},
    {"tokens": [1, 3, 9, 4, 8, 7, 2], "prompt_length": 4, "tokenizer": None, "target": "t"},
    {"tokens": [1, 3, 9, 4, 8, 7, 2, 2, 2], "prompt_length": 4, "row": 1, "turn": 0},
    {"text": "import os\nimport sys\n"},
]
VALUES = [None, True, False, 0, 1, -1, 2, 2**70, 300, 1.5, float("nan"), "", " ", "\n", "a", "None", "[", "[]", "{}"]
VALUES += ['[{"a": 1}]', '{"a": null}', "\ud800", "\x00", "\x1b[31m", "\ufdd2", "\u2028", "😀", "e\u0301", "<|end|>"]
VALUES += ["x<|end|>y", "<|assistant|>", "<|bos|>", MARK, "</think>", "<think>", '"\\ud800"', '{"e": "\\ud800"}']
VALUES += [
    [],
    {},
    [[]],
    [{}],
    [None],
    TALK,
    [CALL],
    [TOOL],
    CALL,
    TOOL,
    [{"type": "text", "text": "a"}],
    [{"type": "text"}],
]
VALUES += [[{"type": "image_url", "image_url": {"url": "x"}}], ["a"], {"role": "user"}, "user", "assistant", "system"]
VALUES += ["tool", "function", "human", "gpt", "observation", json.dumps([CALL]), [1, 2, 3], [1, True], [1, 301, 2]]
KEYS = ["messages", "conversations", "text", "tokens", "prompt_length", "tools", "functions", "system", "system_prompt"]
KEYS += ["role", "content", "from", "value", "tool_calls", "function_call", "weight", "reasoning_content", "thinking"]
KEYS += ["image", "images", "name", "function", "arguments", "tokenizer", "type", "id", "x", "\ud800"]


def places(value, found=None) -> list[tuple]:
    """(container, key) of everything in a record."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


def mutated(draw: random.Random) -> str:
    """A line of a file."""
    record = copy.deepcopy(draw.choice(GOOD))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 2, 3])):
        inside = places(record)
        if not inside:
            break
        container, key = draw.choice(inside)
        kind, item = draw.random(), container[key]
        if kind < 0.15:
            del container[key]
        elif kind < 0.3 and isinstance(container, list):
            container.insert(draw.randrange(len(container) + 1), copy.deepcopy(item))
        elif kind < 0.4 and isinstance(container, dict):
            container[draw.choice(KEYS)] = copy.deepcopy(item)
        elif kind < 0.5 and isinstance(container, dict):
            container[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        elif kind < 0.65 and isinstance(item, str):
            at, new = draw.randrange(len(item) + 1), draw.choice([v for v in VALUES if isinstance(v, str)])
            container[key] = item[:at] + new + item[at:]
        elif kind < 0.7 and isinstance(container, list):
            draw.shuffle(container)
        else:
            container[key] = copy.deepcopy(draw.choice(VALUES))
    line = json.dumps(record, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.06:  # bytes of the line
        at = draw.randrange(len(line) + 1)
        line = draw.choice([line[:at], line[:at] + draw.choice('"{}[],:\\x\x00\xa0') + line[at:], line * 2, "[" * 9999])
    return line.replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogatepass").decode("latin-1")


def tokenizer_of(template: str):
    tokenizer = train_tokenizer(["def add(a, b):\n    return os\n", "the quick brown fox", "import sys\n"], VOCABULARY)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    tokenizer.chat_template = template
    return tokenizer


def supervised(tokenizer, rows: Iterator[tuple], by_ids: bool) -> list[Taught]:
    """As the oracle says it."""
    found = []
    for ids, mask in rows:
        at = 0
        for mark, run in groupby(map(bool, mask)):
            stop = at + len(list(run))
            if mark:
                pair = [ids[:at], ids[at:stop]]
                found.append(Taught(*(map(tuple, pair) if by_ids else map(tokenizer.decode, pair))))
            at = stop
    return found


def compared(line: str, name: str, renderer: Renderer) -> tuple[str, str | None]:
    """(what became of a line, what is wrong with that)."""
    raw = line.encode("latin-1")
    try:
        want = expected(raw, name, VOCABULARY, renderer.fingerprint, {MARK})
    except Bad as bad:
        want = bad
    try:
        record = json.loads(raw)
        rows = encode_record(record, renderer, {STOP}, VOCABULARY).rows
        picture = isinstance(record, dict) and (record.get("image") or record.get("images"))
        found = (
            UserError("a picture")
            if picture
            else supervised(renderer.tokenizer, rows, "tokens" in line and record.get("tokens") is not None)
        )
    except (UserError, ValueError, RecursionError) as error:
        found = error
    refused = isinstance(found, Exception)
    if refused != isinstance(want, Bad):
        return "wrong", f"{'refused' if refused else 'used'} ({found}), the oracle says {want!r}"
    if refused:
        return "refused", "two lines" if "\n" in str(found) and isinstance(found, UserError) else None
    if sorted(map(repr, found)) != sorted(map(repr, want)):
        return "wrong", f"found {found}, the oracle says {want}"
    return "used" if found else "empty", None


def rows(count: int, seed: int, report=print) -> dict:
    draw, outcome, wrong = random.Random(seed), Counter(), []
    renderers = {name: Renderer(tokenizer_of(template)) for name, template in TEMPLATES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, count, BATCH):
            name = list(TEMPLATES)[start // BATCH % len(TEMPLATES)]
            lines = [mutated(draw) or "{}" for _ in range(min(BATCH, count - start))]  # a blank line is no row
            verdicts = []
            for line in lines:
                try:
                    kind, reason = compared(line, name, renderers[name])
                except Exception:
                    kind, reason = "wrong", traceback.format_exc()[-800:]
                outcome[kind] += 1
                verdicts.append(kind)
                if reason:
                    wrong.append({"template": name, "line": line[:600], "reason": reason})
            file, said = Path(folder) / f"{start}.jsonl", []
            file.write_bytes("\n".join(lines).encode("latin-1"))
            try:
                data.prepare(
                    [str(file)], 4096, 0.999, renderers[name], {STOP}, VOCABULARY, Path(folder) / "rows", said.append
                )
            except Exception:
                wrong.append({"template": name, "reason": traceback.format_exc()[-800:]})
            told = next(
                (int(m[1].replace(",", "")) for s in said if (m := re.search(r": ([\d,]+) of [\d,]+ rows cannot", s))),
                0,
            )
            if told != verdicts.count("refused"):
                wrong.append(
                    {"template": name, "reason": f"{told} rows refused, {verdicts.count('refused')} one by one"}
                )
            if start % (10 * BATCH) == 0:
                report(f"{start + len(lines):,} rows: {dict(outcome)}, {len(wrong)} wrong")
    return {"rows": dict(outcome), "wrong_rows": wrong}


def main() -> int:
    from tests.benchmarks.fuzz_loads import loads

    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="2,000 rows and 200 loads")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--loads", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = (2000, 200) if options.quick else (options.rows, options.loads)
    began = time.time()
    found = rows(counts[0], options.seed) | loads(counts[1], options.seed)
    wrong = found["wrong_rows"] + found["wrong_loads"]
    for case in wrong[:20]:
        print(json.dumps(case), file=sys.stderr)
    print(
        json.dumps(
            found
            | {"seconds": round(time.time() - began)}
            | {"wrong_rows": len(found["wrong_rows"]), "wrong_loads": len(found["wrong_loads"])}
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
