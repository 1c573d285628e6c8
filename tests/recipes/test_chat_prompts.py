"""`recipes/prompts/chat.jsonl`: 400 different prompts in balanced categories, of which the first 80 are set aside for
measuring and share no wording with the 320 that answers for training are made from.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.launch.methods import bundled
from draftsmith.models.chat import load_tokenizer

FILE = bundled("bundled:prompts/chat.jsonl")
ROWS = [json.loads(line) for line in Path(FILE).read_text().splitlines()]
TEXTS = [row["messages"][0]["content"] for row in ROWS]
HELD_OUT = 80


def shared_runs(length: int) -> list[tuple[str, set[int]]]:
    """The runs of `length` words, case and punctuation aside, that several prompts have, with these prompts' rows."""
    rows_of = defaultdict(set)
    for row, text in enumerate(TEXTS):
        words = re.findall(r"[a-z0-9']+", text.lower())
        for start in range(len(words) - length + 1):
            rows_of[" ".join(words[start : start + length])].add(row)
    return [(run, rows) for run, rows in rows_of.items() if len(rows) > 1]


def test_400_prompts_are_all_different():
    assert len(ROWS) == 400 and len({row["name"] for row in ROWS}) == 400 and len(set(TEXTS)) == 400
    assert shared_runs(8) == []


def test_the_held_out_prompts_share_no_six_words_with_those_for_training():
    assert [row["split"] for row in ROWS] == ["held-out"] * HELD_OUT + ["train"] * (400 - HELD_OUT)
    crossing = [(run, rows) for run, rows in shared_runs(6) if min(rows) < HELD_OUT <= max(rows)]
    assert crossing == []


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:HELD_OUT], ROWS[:24], ROWS[HELD_OUT:]], ids=["all", "held-out", "24", "train"]
)
def test_categories_are_balanced(rows):
    counts = Counter(row["category"] for row in rows)
    assert len(counts) == 7 and max(counts.values()) - min(counts.values()) <= 1


def test_lengths_vary_and_every_prompt_fits():
    lengths = sorted(len(text.split()) for text in TEXTS)
    assert 8 <= lengths[0] < 10 and 100 < lengths[-1] <= 150
    prompts = read_prompts(FILE, load_tokenizer("bundled:targets/code"))
    assert len(prompts) == 400 and max(len(prompt.tokens) for prompt in prompts) < 512
