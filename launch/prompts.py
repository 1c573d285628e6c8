"""`draftsmith prompts`: questions (signature and docstring) cut out of Python source found on the machine."""

import json
import random
from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.models.files import write_new
from draftsmith.train.reference import corpus

LEAST = 24  # tokens of an answer: shorter functions are trivial
HELD_OUT = 0.03  # share of module paths that no training of the bundled models sees


def write_prompts(
    packages: list[str],
    output: str,
    count: int,
    seed: int,
    tokenizer,
    held_out: bool,
    tests: bool = False,
    max_question: int = 128,
    max_answer: int = 224,
) -> Path:
    """Writes `count` documented functions of the train (or held-out) split as JSONL {name, messages}, in a seeded
    order; with `tests` test functions instead, documented or not (the bundled models' corpus leaves their folders out).

    Lengths are in tokens. The function's own body is used only to leave out trivial ones; it is not written.
    """
    functions = [
        f
        for f in corpus.unique_functions(corpus.find_sources(packages, tests=tests))
        if (f.name.startswith("test") if tests else f.documented) and corpus.is_held_out(f.module, HELD_OUT) == held_out
    ]
    random.Random(seed).shuffle(functions)
    rows, asked = [], set()
    for function in functions:
        if len(rows) == count:
            break
        if function.question in asked:
            continue
        asked.add(function.question)
        if (
            len(tokenizer(function.question)["input_ids"]) <= max_question
            and LEAST <= len(tokenizer(function.answer)["input_ids"]) <= max_answer
        ):
            rows.append(
                {
                    "name": f"{function.module}:{function.name}",
                    "messages": [{"role": "user", "content": function.question}],
                }
            )
    if not rows:
        raise UserError(
            f"packages {', '.join(packages)}: found no {'test' if tests else 'documented'} functions that fit, "
            f"expected at least one"
        )
    return write_new(Path(output), "".join(json.dumps(row) + "\n" for row in rows))
