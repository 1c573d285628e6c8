"""`draftsmith longbench`: suites of long prompts, from logs of conversations, from long documents, or from Python
source on this machine.

LongSpecBench (OWL, Lee et al., 2025) is 200 conversations of 4K to 64K tokens drawn from WildChat; its list was not
published, so that it is drawn anew here. A row is one of `draftsmith eval`'s `messages` rows: {name, category,
messages, tokens, hash, turn, synthetic}; the category is its bin of lengths, by which the results of an evaluation come
out split.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from draftsmith.eval.measurement.suites import read_rows
from draftsmith.launch.prompts import HELD_OUT
from draftsmith.models.errors import UserError
from draftsmith.models.files import write_new
from draftsmith.models.messages import UNWRITTEN, messages_of
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.rendering import Renderer
from draftsmith.train.reference import corpus
from draftsmith.train.reference.repository import open_file, question

QUESTION = "Summarize the text above."  # of documents that bring none of their own
KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")  # of a message; logs have much beside
HASHED = 1000  # tokens that tell whether two prompts are the same
STRANGE = (
    0.05  # share of characters that no text has (unprintable, or a broken encoding's mark) from which on it is none
)


@dataclass(frozen=True)
class Candidate:
    """A prompt that ends with a user's turn. answer: what was answered to it, where that is known; document: what it
    shares with others that differ in their questions alone; tokens: rendered ids.
    """

    name: str
    messages: list[dict]
    answer: str | None = None
    document: str | None = None
    synthetic: bool = False
    tokens: tuple[int, ...] = ()

    @property
    def turn(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def row(self, category: str) -> dict:
        digest = hashlib.sha256(json.dumps(self.tokens[:HASHED]).encode()).hexdigest()[:16]
        shared = {} if self.document is None else {"document": self.document}
        return {
            "name": self.name,
            "category": category,
            "tokens": len(self.tokens),
            "hash": digest,
            "turn": self.turn,
            "synthetic": self.synthetic,
            **shared,
            "messages": self.messages,
        }


def conversations(file: str, left_out: Counter) -> Iterator[Candidate]:
    """Rows with `conversation` (WildChat) or `messages`, each cut at its last user turn; flagged ones and such without
    text are left out.
    """
    for number, row in read_rows(Path(file)):
        turns = (row.get("conversation") or row.get("messages")) if isinstance(row, dict) else None
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns
        ):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{file} row {number}: found {found}, expected `conversation` or `messages`, a list of role and content"
            )
        if any(item.get("toxic") or item.get("redacted") for item in (row, *turns)):
            left_out["flagged as toxic or redacted"] += 1
            continue
        try:
            messages = messages_of({"messages": [{k: t[k] for k in KEPT if k in t} for t in turns]})
        except (UserError, RecursionError):
            left_out["of no text"] += 1
            continue
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if last is None or not all(_has_text(m) for m in messages[: last + 1]):
            left_out["without text"] += 1
            continue
        answer = messages[last + 1]["content"] if last + 1 < len(messages) else None
        yield Candidate(
            str(row.get("conversation_hash") or row.get("name") or f"{Path(file).name}:{number}"),
            messages[: last + 1],
            answer,
        )


def _has_text(message: dict) -> bool:
    content = message["content"]
    return isinstance(content, str) and bool(content.strip() or message.get("tool_calls"))


def documents(file: str, left_out: Counter) -> Iterator[Candidate]:
    """Rows with `text` and, where the corpus has one, its `question`."""
    for number, row in read_rows(Path(file)):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(
                f"{file} row {number}: found {sorted(row) if isinstance(row, dict) else type(row).__name__}, "
                f"expected `text`"
            )
        if not isinstance(row.get("question") or "", str):
            raise UserError(f"{file} row {number}: question: found {row['question']!r}, expected text")
        if not row["text"].strip():
            left_out["without text"] += 1
            continue
        content = row["text"].rstrip() + "\n\n" + (row.get("question") or QUESTION)
        yield Candidate(
            str(row.get("name") or row.get("id") or f"{Path(file).name}:{number}"),
            [{"role": "user", "content": content}],
            row.get("answer"),
        )


def repositories(
    packages: list[str],
    held_out: bool,
    length: int,
    reader,
    seed: int,
    questions: int = 1,
    max_question: int = 128,
    answer: tuple[int, int] = (24, 224),
) -> Iterator[Candidate]:
    """Questions for a function behind files of its package, module after module in a seeded order, each of at least
    `length` tokens where the package has them: the function's own file stands last, before it the files that come
    before it by path (behind the first file the last one). Up to `questions` documented functions of a module are cut
    out of its file and asked for one at a time; those whose body stands anywhere in the files are left out.

    held_out: the module asked about is one that no training of the bundled models saw; the files before it may be
    others.
    """
    files = corpus.find_sources(packages)
    homes = {package: [f for f in files if f.package == package] for package in packages}
    modules = [
        (home, at)
        for home in homes.values()
        for at, f in enumerate(home)
        if corpus.is_held_out(f.module, HELD_OUT) == held_out
    ]
    rng = random.Random(seed)
    rng.shuffle(modules)
    tokenizer = Renderer.of(reader).tokenizer
    size = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    for home, at in modules:
        fitting = [f for f in corpus.cut_functions(home[at]) if f.documented]
        fitting = [f for f in fitting if size(f.question) <= max_question and answer[0] <= size(f.answer) <= answer[1]]
        last = open_file(home[at], rng.sample(fitting, min(questions, len(fitting))))
        if not last.asked:
            continue
        shown, total = [last], size(last.text)
        for back in range(1, len(home)):
            if total >= length:
                break
            shown.insert(0, open_file(home[at - back], []))
            total += size(shown[0].text)
        context = "".join("".join(file.text.split()) for file in shown)
        for function in last.asked:
            if "".join(function.answer.split()) not in context:
                messages = [{"role": "user", "content": question(shown, function)}]
                yield Candidate(f"{function.module}:{function.name}", messages, function.answer, function.module)


def rendered(candidates: Iterator[Candidate], reader, least: int, left_out: Counter) -> list[Candidate]:
    """With their tokens; what cannot reach `least` tokens is not rendered, duplicates and what is no text are left
    out.
    """
    kept, seen = [], set()
    for candidate in candidates:
        text = "".join(m["content"] for m in candidate.messages)
        strange = sum(not (c.isprintable() or c in "\n\r\t\f\v") or c == "\ufffd" for c in text)
        if UNWRITTEN.search(text) or strange > STRANGE * len(text):
            left_out["of no text"] += 1
            continue
        if len(text.encode("utf-8", "replace")) < least:  # no token is shorter than a byte
            left_out["too short"] += 1
            continue
        candidate = replace(candidate, tokens=tuple(encode_prompt(reader, candidate.messages)))
        start = (
            candidate.tokens[:HASHED]
            if candidate.document is None
            else (candidate.document, candidate.messages[-1]["content"])
        )
        if start in seen:
            left_out["twice"] += 1
            continue
        seen.add(start)
        kept.append(candidate)
    return kept


def filled(candidates: list[Candidate], edges: tuple[int, ...], reader, seed: int) -> list[Candidate]:
    """Each with other, unrelated candidates before it, until it reaches a length drawn evenly over the bins; marked
    synthetic where any were needed. An answered one goes before as turns of its own, one without an answer as text in
    front of the next user's turn.
    """
    rng, made = random.Random(seed), []
    for candidate in candidates:
        bin_ = rng.randrange(len(edges) - 1)
        wanted, before, text, total, others = (
            rng.randrange(edges[bin_], edges[bin_ + 1]),
            [],
            "",
            len(candidate.tokens),
            list(candidates),
        )
        rng.shuffle(others)
        for other in others:
            if total >= wanted:
                break
            if other is candidate or total + len(other.tokens) >= edges[bin_ + 1]:
                continue
            first, *more = other.messages if other.messages[0]["role"] == "user" else other.messages[1:]
            first = {"role": "user", "content": text + first["content"]}
            if other.answer is None:
                text = "\n\n".join(m["content"] for m in (first, *more)) + "\n\n"
            else:
                before, text = [*before, first, *more, {"role": "assistant", "content": other.answer}], ""
            total += len(other.tokens)
        system = [m for m in candidate.messages[:1] if m["role"] == "system"]
        first, *more = candidate.messages[len(system) :]
        messages = [*system, *before, {"role": first["role"], "content": text + first["content"]}, *more]
        made.append(
            replace(
                candidate,
                messages=messages,
                synthetic=len(messages) > len(candidate.messages) or bool(text),
                tokens=tuple(encode_prompt(reader, messages)),
            )
        )
    return made


def bin_of(length: int, edges: tuple[int, ...]) -> str | None:
    """`4K-8K` for edges 4096 and 8192; None outside of all bins."""
    return next((f"{label(low)}-{label(high)}" for low, high in zip(edges, edges[1:]) if low <= length < high), None)


def label(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def natural(rows: dict[str, list], count: int, rng: random.Random) -> list:
    """Uniform over everything that is in some bin."""
    every = [row for found in rows.values() for row in found]
    return rng.sample(every, min(count, len(every)))


def balanced(rows: dict[str, list], count: int, rng: random.Random) -> list:
    """Equally many of every bin, as far as it has them."""
    return [row for found in rows.values() for row in rng.sample(found, min(count // len(rows), len(found)))]


SAMPLERS: dict[str, Callable] = {"natural": natural, "balanced": balanced}


def in_bins(
    candidates: list[Candidate], edges: tuple[int, ...], count: int, sampler: str, seed: int, left_out: Counter
) -> list[dict]:
    """Suite rows of the sampled candidates, the shortest first."""
    bins = {f"{label(low)}-{label(high)}": [] for low, high in zip(edges, edges[1:])}
    for candidate in candidates:
        place = bin_of(len(candidate.tokens), edges)
        if place is None:
            left_out["too short" if len(candidate.tokens) < edges[0] else "too long"] += 1
        else:
            bins[place].append(candidate)
    chosen = SAMPLERS[sampler](bins, count, random.Random(seed))
    return [c.row(bin_of(len(c.tokens), edges)) for c in sorted(chosen, key=lambda c: (len(c.tokens), c.name))]


def cut(candidates: list[Candidate], lengths: tuple[int, ...], count: int, reader, left_out: Counter) -> list[dict]:
    """The prompts of the first `count` documents that reach the greatest length, each cut from the left to every
    length: the same questions behind ever more context. The prompts of a document are cut at the same character, which
    is where the longest of them has the length.
    """
    documents: dict[str, list[Candidate]] = {}
    tokenizer = Renderer.of(reader).tokenizer
    for candidate in candidates:
        if len(candidate.messages) > 1:
            left_out["of several turns"] += 1
        elif len(candidate.tokens) < max(lengths):
            left_out["too short"] += 1
        else:
            documents.setdefault(candidate.document or candidate.name, []).append(candidate)
    rows = []
    for name, found in list(documents.items())[:count]:
        longest = max(found, key=lambda candidate: len(candidate.tokens))
        text = longest.messages[0]["content"]
        starts = [start for start, _ in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
        for length in lengths:
            place = len(longest.tokens) - length
            while len(encode_prompt(reader, [{"role": "user", "content": text[starts[max(0, place)] :]}])) > length:
                place += 1  # a text that is cut may need more tokens than it had as a part
            for candidate in found:
                messages = [{"role": "user", "content": candidate.messages[0]["content"][starts[max(0, place)] :]}]
                shorter = replace(
                    candidate,
                    name=f"{candidate.name}@{label(length)}",
                    messages=messages,
                    document=name,
                    tokens=tuple(encode_prompt(reader, messages)),
                )
                rows.append(shorter.row(label(length)))
    return rows


def write_suite(rows: list[dict], output: str, left_out: Counter, report=print) -> Path:
    """JSONL. Raises UserError when nothing is left."""
    told = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
    if not rows:
        raise UserError(f"sources: found no prompt that fits ({told or 'they are empty'}), expected at least one")
    write_new(Path(output), "".join(json.dumps(row) + "\n" for row in rows))
    counts = Counter(row["category"] for row in rows)
    report(
        f"{len(rows)} prompts: {', '.join(f'{category} {counts[category]}' for category in counts)}"
        + (f"; left out: {told}" if told else "")
    )
    return Path(output)


def longbench(
    sources: list[Iterator[Candidate]],
    output: str,
    reader,
    edges: tuple[int, ...],
    count: int,
    sampler: str,
    fill: bool,
    seed: int,
    left_out: Counter,
    report=print,
) -> Path:
    """A suite of `count` prompts sampled over the bins between `edges` (tokens)."""
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: found {sampler}, expected {' or '.join(SAMPLERS)}")
    if len(edges) < 2 or list(edges) != sorted(set(edges)) or edges[0] < 1:
        raise UserError(f"edges: found {', '.join(map(str, edges))}, expected at least two ascending numbers of tokens")
    found = rendered((c for source in sources for c in source), reader, 0 if fill else edges[0], left_out)
    if fill:
        found = filled(found, edges, reader, seed)
    return write_suite(in_bins(found, edges, count, sampler, seed, left_out), output, left_out, report)
