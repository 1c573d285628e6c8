"""`draftsmith regenerate`: the target answers prompts; the answers are what a drafter for it should be trained on.

The prompts of each temperature are taken longest first, since those that are processed together are padded to one
length. What ends first is written first; the finished file is in the order of the prompts.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import torch

from draftsmith.eval.lossless import dtype_of
from draftsmith.eval.measurement import journal
from draftsmith.eval.measurement.journal import check_finished
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.measurement.prompts import Prompt, read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.answers.answer import Answer, row_of
from draftsmith.launch.answers.check import check_server
from draftsmith.launch.answers.decoding import Work, decoded, spread
from draftsmith.launch.answers.precision import cpu_flags, slow_on
from draftsmith.launch.answers.server import Server, served
from draftsmith.models.chat import stop_ids
from draftsmith.models.errors import UserError, keeping
from draftsmith.models.files import alone, write_whole
from draftsmith.models.formats import fetch
from draftsmith.models.grow import parse_tree
from draftsmith.models.notes import notes
from draftsmith.models.pictures import load_reader
from draftsmith.models.targets import describe
from draftsmith.models.targets.weights import identity_of

TREE = "chain:2"  # what a drafter drafts in a batch (tests/benchmarks/answers.py)
CONCURRENCY = 64


def writing(regenerate: Callable[..., Path]) -> Callable[..., Path]:
    """One process at a time writes to an output, and one that Ctrl-C ends says what it leaves."""

    @wraps(regenerate)
    def alone_there(target_name: str, prompts_file: str, output: str, *more, **options) -> Path:
        place, partial = Path(output), Path(f"{output}.partial")

        def kept() -> str:
            answers = partial.read_bytes().count(b"\n") - 1 if partial.is_file() else 0  # behind the settings
            if answers < 1:
                return "nothing is answered yet: the same command begins anew"
            return f"{answers} answers are kept in {partial}: the same command goes on"

        with alone(place.parent, place.name, output), keeping(kept):
            return regenerate(target_name, prompts_file, output, *more, **options)

    return alone_there


@writing
def regenerate(
    target_name: str,
    prompts_file: str,
    output: str,
    temperatures: list[float],
    max_new_tokens: int,
    batch: int,
    limit: int | None,
    seed: int,
    report=print,
    dtype: str | None = None,
    processes: int = 1,
    drafter: str | None = None,
    tree: str = TREE,
    server: str | None = None,
    concurrency: int = CONCURRENCY,
) -> Path:
    """Writes one JSONL row per prompt: messages, tokens (prompt and answer ids), prompt_length, finished, temperature;
    of a server also its model's name, and no ids where it gives none.

    Row i is decoded at temperatures[i % len]. Answers already in `output.partial` are kept, so that a killed run goes
    on; the file appears under its name only when complete. dtype: fp32, bf16 or fp16, by default that of
    `TextTarget.load`; of the copy that checks a server, where there is one. Neither the batch, nor the processes, nor a
    drafter with its tree changes a text in fp32. An output that is there already is left as it is. Raises UserError,
    also where it is one of other prompts or settings, or another process writes it.
    """
    check_options(dtype, processes, drafter, server)
    kinds = [Sampling(temperature, seed=seed).temperature for temperature in temperatures]
    described = describe(target_name)
    tokenizer = load_reader(target_name, described)
    for line in notes(described, tokenizer, target_name):
        report(line)
    stops = stop_ids(described, tokenizer)
    prompts = read_prompts(prompts_file, tokenizer, limit)
    service = open_server(server, target_name, tokenizer, stops, seed, prompts) if server else None
    settings = {
        **identity_of(target_name, described.weights),
        "prompts": hashlib.sha256(json.dumps([p.identity for p in prompts]).encode()).hexdigest(),
        "temperatures": temperatures,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "dtype": "server's" if service else dtype or ("checkpoint's" if torch.cuda.is_available() else "fp32"),
    }
    if Path(output).exists():
        check_finished(Path(output), journal.settings_before(settings_of(output)), settings)
        report(f"{output} is there already, of the same prompts and settings; remove it to answer again")
        return Path(output)
    partial = Path(f"{output}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = {entry["row"] for entry in journal.read(partial, settings)}
    context = min(described.context_length, (service and service.context) or described.context_length)
    room = context - max_new_tokens - (2 * parse_tree(tree).size if drafter else 1)  # a tree, with its probes
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt.tokens) <= room]
    if len(fitting) < len(prompts):
        report(f"{len(prompts) - len(fitting)} prompts of more than {room} tokens are left out")
    left = sorted((i for i in fitting if i not in done), key=lambda i: -len(prompts[i].tokens))
    if not left:
        answers = iter(())
    elif service:
        check_server(
            service, target_name, dtype and dtype_of(dtype), [prompts[i].tokens for i in fitting], kinds, report
        )
        asked = [(i, prompts[i].tokens, kinds[i % len(kinds)]) for i in left]
        answers = served(service, asked, max_new_tokens, concurrency)
    else:
        if line := dtype and not torch.cuda.is_available() and slow_on(cpu_flags(), dtype):
            report(line)
        work = Work(target_name, frozenset(stops), tuple(kinds), max_new_tokens, seed, batch, dtype, drafter, tree)
        answers = (
            Answer.of(row, tokens, tokenizer, stops)
            for row, tokens in decode_all(work, prompts, left, min(processes, len(left)))
        )
    tokens, started, progress = 0, time.time(), Progress(report, "answers", len(left))
    with partial.open("a") as file:
        if partial.stat().st_size == 0:
            file.write(json.dumps(settings) + "\n")
        for number, answer in enumerate(answers, 1):
            row = row_of(answer, prompts[answer.row], kinds[answer.row % len(kinds)], partial.parent)
            file.write(json.dumps(row) + "\n")
            file.flush()
            tokens += answer.count
            progress(number, f", {tokens / (time.time() - started):.0f} tok/s")
    return finish(partial, Path(output))


def decode_all(work: Work, prompts: list[Prompt], left: list[int], processes: int) -> Iterator[tuple[int, list[int]]]:
    """(row, tokens) of the rows that are left, taken in this order at each temperature."""
    count = len(work.temperatures)
    waiting = [deque(i for i in left if i % count == number) for number in range(count)]

    def take(number: int, most: int) -> list[tuple[int, list[int]]]:
        rows = [waiting[number].popleft() for _ in range(min(most, len(waiting[number])))]
        return [(i, prompts[i].tokens) for i in rows]

    return decoded(work, take) if processes == 1 else spread(work, take, processes)


def settings_of(output: str | Path) -> Path:
    """The file beside finished answers that says what they were made with."""
    return Path(f"{output}.settings.json")


def finish(partial: Path, output: Path) -> Path:
    """The rows of a complete journal in order, under their own name, and its settings beside them: the journal goes
    only when they are there.
    """
    settings, *rows = partial.read_text().splitlines()
    write_whole(settings_of(output), settings + "\n")
    lines = sorted(rows, key=lambda line: json.loads(line)["row"])
    ordered = Path(f"{output}.ordered")
    ordered.write_text("".join(line + "\n" for line in lines))
    os.replace(ordered, output)
    partial.unlink()
    return output


def check_options(dtype: str | None, processes: int, drafter: str | None, server: str | None) -> None:
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise UserError(f"dtype: found {dtype}, expected fp32, bf16 or fp16")
    beside = [name for name, given in {"--drafter": drafter, "--processes": processes > 1}.items() if given]
    if server and beside:
        raise UserError(f"regenerate: found --server beside {beside[0]}, expected one of them: the server decodes")
    if drafter:
        fetch(drafter)


def open_server(url: str, target_name: str, tokenizer, stops: set[int], seed: int, prompts: list[Prompt]) -> Server:
    if picture := next((prompt for prompt in prompts if prompt.pictures), None):
        raise UserError(f"prompt {picture.name}: found a picture, expected text alone with --server")
    return Server(url, target_name, getattr(tokenizer, "tokenizer", tokenizer), stops, seed)
