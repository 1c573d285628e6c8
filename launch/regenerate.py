"""`draftsmith regenerate`: the target answers prompts; the answers are what a drafter for it should be trained on.

Conversations are answered turn by turn, all the first turns before the second ones. The prompts of each temperature are
taken longest first, since those that are processed together are padded to one length. What ends first is written first;
the finished file is in the order of the prompts.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path

import torch

from draftsmith.eval.lossless import dtype_of
from draftsmith.eval.measurement import journal
from draftsmith.eval.measurement.journal import check_finished
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.measurement.suites import read_suite
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.answers.answer import Answer, row_of
from draftsmith.launch.answers.check import check_server
from draftsmith.launch.answers.decoding import Work, repeatedly, spread
from draftsmith.launch.answers.precision import cpu_flags, slow_on
from draftsmith.launch.answers.server import Server, served
from draftsmith.launch.answers.talks import Talks
from draftsmith.models.chat import stop_ids
from draftsmith.models.errors import UserError, keeping
from draftsmith.models.files import alone, write_whole
from draftsmith.models.formats import fetch
from draftsmith.models.grow import parse_tree
from draftsmith.models.notes import notes
from draftsmith.models.pictures import load_renderer
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
    variables: Mapping = {},
) -> Path:
    """Writes one JSONL row per answer: messages, tokens (prompt and answer ids), prompt_length, finished, temperature,
    target, tokenizer (its fingerprint); of a server also its model's name, and no ids where it gives none. Every turn
    of a conversation is answered, behind the target's own answers to those before it.

    Conversation i is decoded at temperatures[i % len]; variables: of the chat template. Answers already in
    `output.partial` are kept, so that a killed run goes on; the file appears under its name only when complete. dtype:
    fp32, bf16 or fp16, by default that of `TextTarget.load`; of the copy that checks a server, where there is one.
    Neither the batch, nor the processes, nor a drafter with its tree changes a text in fp32. An output that is there
    already is left as it is. Raises UserError, also where it is one of other prompts or settings, or another process
    writes it.
    """
    check_options(dtype, processes, drafter, server)
    kinds = [Sampling(temperature, seed=seed).temperature for temperature in temperatures]
    partial, described = Path(f"{output}.partial"), describe(target_name)
    renderer = load_renderer(target_name, described, variables)
    for line in notes(described, renderer.reader, target_name):
        report(line)
    before = settings_of(output) if Path(output).exists() else partial
    renderer = renderer.at(journal.settings_before(before).get("clock"))
    stops = stop_ids(described, renderer.reader)
    talks = Talks(read_suite(prompts_file, limit, every=True), renderer, prompts_file)
    service = open_server(server, target_name, renderer.tokenizer, stops, seed, talks) if server else None
    settings = {
        **identity_of(target_name, described.weights),
        "prompts": talks.digest,
        "temperatures": temperatures,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "dtype": "server's" if service else dtype or ("checkpoint's" if torch.cuda.is_available() else "fp32"),
        **({"template_variables": dict(variables)} if variables else {}),
        **({"clock": renderer.clock} if renderer.clock else {}),
    }
    if Path(output).exists():
        check_finished(Path(output), journal.settings_before(settings_of(output)), settings)
        report(f"{output} is there already, of the same prompts and settings; remove it to answer again")
        return Path(output)
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = {(entry["row"], entry.get("turn", 0)): entry for entry in journal.read(partial, settings)}
    context = min(described.context_length, (service and service.context) or described.context_length)
    room = context - max_new_tokens - (2 * parse_tree(tree).size if drafter else 1)  # a tree, with its probes
    going = talks.first(room, report)
    left = sum(len(talks.conversations[i].turns) for i in going) - len(done)
    if service:
        if left:
            prompts, precision = [prompt.tokens for prompt in going.values()], dtype and dtype_of(dtype)
            check_server(service, target_name, precision, prompts, kinds, report)
        answer = by_server(service, kinds, max_new_tokens, concurrency)
    else:
        if left and (line := dtype and not torch.cuda.is_available() and slow_on(cpu_flags(), dtype)):
            report(line)
        work = Work(target_name, frozenset(stops), tuple(kinds), max_new_tokens, seed, batch, dtype, drafter, tree)
        answer = by_decoding(work, processes, renderer.reader)
    origin = {"target": target_name, "tokenizer": renderer.fingerprint}
    tokens, started, number, progress = 0, time.time(), 0, Progress(report, "answers", left)
    with partial.open("a") as file:
        if partial.stat().st_size == 0:
            file.write(json.dumps(settings) + "\n")
        while going:
            waiting = [(i, prompt) for i, prompt in going.items() if (i, prompt.turn) not in done]
            waiting.sort(key=lambda entry: -len(entry[1].tokens))
            asked = [(talks.request(i, p.turn), p.tokens, i % len(kinds)) for i, p in waiting]
            for given in answer(asked) if asked else ():
                i, turn = talks.place(given.row)
                row = row_of(given, going[i], talks.label(i, turn), kinds[i % len(kinds)], partial.parent, origin)
                file.write(json.dumps(row) + "\n")
                file.flush()
                done[i, turn], tokens, number = row, tokens + given.count, number + 1
                progress(number, f", {tokens / (time.time() - started):.0f} tok/s")
            said = {i: done[i, prompt.turn]["messages"][-1]["content"] for i, prompt in going.items()}
            going = talks.following(going, said, room, report)
    return finish(partial, Path(output))


Asked = list[tuple[int, list[int], int]]  # number of the request, prompt, number of the temperature


def by_decoding(work: Work, processes: int, reader) -> Callable[[Asked], Iterator[Answer]]:
    """What answers requests by our own loop, each at its temperature in this order. Loaded once by a single process."""
    local = repeatedly(work)

    def answer(asked: Asked) -> Iterator[Answer]:
        waiting = [deque(r[:2] for r in asked if r[2] == number) for number in range(len(work.temperatures))]

        def take(number: int, most: int) -> list[tuple[int, list[int]]]:
            return [waiting[number].popleft() for _ in range(min(most, len(waiting[number])))]

        found = local(take) if processes == 1 else spread(work, take, min(processes, len(asked)))
        return (Answer.of(number, tokens, reader, set(work.stops)) for number, tokens in found)

    return answer


def by_server(
    service: Server, temperatures: list[float], max_new_tokens: int, concurrency: int
) -> Callable[[Asked], Iterator[Answer]]:
    def answer(asked: Asked) -> Iterator[Answer]:
        requests = [(number, prompt, temperatures[kind]) for number, prompt, kind in asked]
        return served(service, requests, max_new_tokens, concurrency)

    return answer


def settings_of(output: str | Path) -> Path:
    """The file beside finished answers that says what they were made with."""
    return Path(f"{output}.settings.json")


def finish(partial: Path, output: Path) -> Path:
    """The rows of a complete journal in order, under their own name, and its settings beside them: the journal goes
    only when they are there.
    """
    settings, *rows = partial.read_text().splitlines()
    write_whole(settings_of(output), settings + "\n")
    place = lambda line: ((row := json.loads(line))["row"], row.get("turn", 0))  # noqa: E731
    lines = sorted(rows, key=place)
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


def open_server(url: str, target_name: str, tokenizer, stops: set[int], seed: int, talks: Talks) -> Server:
    if picture := next((talk for talk in talks.conversations if talk.pictures), None):
        raise UserError(f"prompt {picture.name}: found a picture, expected text alone with --server")
    return Server(url, target_name, tokenizer, stops, seed)
