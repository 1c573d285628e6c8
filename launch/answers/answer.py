"""An answer, and the row of JSONL that it becomes."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from draftsmith.eval.measurement.prompts import Prompt
from draftsmith.eval.sampling import Sampling
from draftsmith.models.errors import UserError

# The law of every answer beside its temperature: what is cut off or penalised, which is nothing, whatever the target's
# own generation config asks for.
LAW = {name: value for name, value in asdict(Sampling()).items() if name not in ("temperature", "seed")}


@dataclass(frozen=True)
class Answer:
    """row: the number of the request, which for a first turn is the conversation's place in its file, from 0; tokens:
    what the target wrote, the stop id included, None where only the text is known; text: without the stop id; count: of
    tokens; finished: the target ended it; server: the name of the model that a server calls this.
    """

    row: int
    tokens: list[int] | None
    text: str
    count: int
    finished: bool
    server: str | None = None

    @classmethod
    def of(cls, row: int, tokens: list[int], tokenizer, stops: set[int], server: str | None = None) -> "Answer":
        finished = tokens[-1] in stops
        text = tokenizer.decode(tokens[:-1] if finished else tokens)
        return cls(row, tokens, text, len(tokens), finished, server)


def row_of(answer: Answer, prompt: Prompt, place: dict, temperature: float, folder: Path, origin: dict) -> dict:
    """place: {"row"}, the conversation's place in its file, and where it has several turns {"turn"}, both from 0;
    folder: what file names of pictures start from; origin: whose answer it is, by which ids. Raises UserError for
    pictures that are no files.
    """
    if not all(isinstance(picture, Path) for picture in prompt.pictures):
        raise UserError(
            f"prompt {prompt.name}: found a picture inside the data, expected the name of a file (answers refer to it)"
        )
    row = place | {"messages": [*prompt.messages, {"role": "assistant", "content": answer.text}]}
    if prompt.tools:
        row["tools"] = prompt.tools
    if prompt.pictures:
        row["images"] = [os.path.relpath(picture, folder) for picture in prompt.pictures]
    if answer.tokens is not None:
        row |= {"tokens": [*prompt.tokens, *answer.tokens], "prompt_length": len(prompt.tokens)}
    row |= {"finished": answer.finished, "temperature": temperature, "sampling": LAW, **origin}
    return row if answer.server is None else row | {"server": answer.server}
