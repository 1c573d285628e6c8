"""Repository-level documents: neighbouring source files one behind another, with functions that were cut out of them
asked for in turn.

A turn shows one or several files and asks for a function of the last one (signature and docstring), whose lines are not
shown; the answer is its body, and further functions of the file follow as turns of their own. Names and idioms of the
answer so repeat from far back in the context. Files stand in the order of their paths: those of one folder are
neighbours.
"""

import random
from dataclasses import dataclass

from draftsmith.train.reference.corpus import Function, SourceFile, cut_functions

ASKED = 6  # functions cut out of one file at most
MAX_CHARACTERS = 12_000  # of one file; longer ones are shown up to there


@dataclass(frozen=True)
class OpenFile:
    """A file without the lines of `asked`, headed by a comment with its path."""

    text: str
    asked: list[Function]


def open_file(source: SourceFile, functions: list[Function]) -> OpenFile:
    """The file without the given functions, of which those that overlap an earlier one, or lie beyond MAX_CHARACTERS,
    are left alone.
    """
    lines = source.text.splitlines()
    end, size = 0, 0
    while end < len(lines) and size + len(lines[end]) < MAX_CHARACTERS:
        size += len(lines[end]) + 1
        end += 1
    asked, hidden = [], set()
    for function in functions:
        span = range(function.first - 1, function.last)
        if function.last <= end and hidden.isdisjoint(span):
            asked.append(function)
            hidden.update(span)
    kept = [line for number, line in enumerate(lines[:end]) if number not in hidden]
    return OpenFile(f"# {source.module}\n" + "\n".join(kept).strip("\n") + "\n", asked)


def question(files: list[OpenFile], function: Function) -> str:
    """The user's turn: the files, then the signature and docstring of the function that is asked for."""
    return "\n\n".join([*(file.text for file in files), function.question])


class RepositoryRows:
    """Seeded training rows of repository documents over `files`, tokenised as they are asked for."""

    def __init__(self, files: list[SourceFile], tokenizer, seed: int):
        self.files, self.tokenizer, self.rng = files, tokenizer, random.Random(seed)

    def row(self, length: int) -> list[int]:
        """`length` ids: a run of neighbouring files from a random one on, cut from the left as a long prompt is, so
        that it ends with answers.
        """
        at, ids = self.rng.randrange(len(self.files)), []
        while len(ids) < length:
            shown = self.rng.randint(1, 2)
            ids += self.tokenizer(self._turns([self.files[(at + k) % len(self.files)] for k in range(shown)]))[
                "input_ids"
            ]
            at += shown
        return [*self.tokenizer("<|bos|><|user|>")["input_ids"], *ids[2 - length :]]

    def _turns(self, run: list[SourceFile]) -> str:
        functions = cut_functions(run[-1])
        last = open_file(run[-1], self.rng.sample(functions, min(len(functions), self.rng.randint(1, ASKED))))
        shown = [*(open_file(source, []) for source in run[:-1]), last]
        if not last.asked:
            return "<|user|>" + "\n\n".join(file.text for file in shown)
        first, *others = last.asked
        turns = [f"<|user|>{question(shown, first)}<|end|><|assistant|>{first.answer}<|end|>"]
        return "".join(turns + [f"<|user|>{f.question}<|end|><|assistant|>{f.answer}<|end|>" for f in others])
