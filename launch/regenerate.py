"""`draftsmith regenerate`: the target answers prompts; the answers are what a drafter for it should be trained on."""

import hashlib
import json
import os
import time
from pathlib import Path

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement import journal
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.measurement.prompts import Prompt, read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.models.chat import stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import load_reader
from draftsmith.models.targets import TextTarget


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
) -> Path:
    """Writes one JSONL row per prompt: messages, tokens (prompt and answer ids), prompt_length, finished, temperature.

    Row i is decoded at temperatures[i % len]. Answers already in `output.partial` are kept, so that a killed run goes
    on; the file appears under its name only when complete.
    """
    target = TextTarget.load(target_name)
    tokenizer = load_reader(target_name, target)
    stops = stop_ids(target, tokenizer)
    prompts = read_prompts(prompts_file, tokenizer, limit)
    room = target.context_length - max_new_tokens - 1
    digest = hashlib.sha256(json.dumps([p.identity for p in prompts]).encode()).hexdigest()
    settings = {
        **target.identity,
        "prompts": digest,
        "temperatures": temperatures,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    partial = Path(f"{output}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = {entry["row"] for entry in journal.read(partial, settings)}
    fitting = [i for i in range(len(prompts)) if len(prompts[i].tokens) <= room]
    left = [i for i in fitting if i not in done]
    if len(fitting) < len(prompts):
        report(f"{len(prompts) - len(fitting)} prompts of more than {room} tokens are left out")
    tokens, answered, started = 0, 0, time.time()
    progress = Progress(report, "answers", len(left))
    with partial.open("a") as file:
        if not done and partial.stat().st_size == 0:
            file.write(json.dumps(settings) + "\n")
        for kind, temperature in enumerate(temperatures):
            mine = [i for i in left if i % len(temperatures) == kind]
            for start in range(0, len(mine), batch):
                group = mine[start : start + batch]
                traces = generate(
                    target,
                    NoDrafter(),
                    [prompts[i].tokens for i in group],
                    Sampling(temperature, seed=seed),
                    max_new_tokens,
                    stops,
                    group,
                )
                for i, trace in zip(group, traces):
                    file.write(
                        json.dumps(answer(i, prompts[i], trace.tokens, tokenizer, stops, temperature, partial.parent))
                        + "\n"
                    )
                    tokens += len(trace.tokens)
                file.flush()
                answered += len(group)
                progress(answered, f", {tokens / (time.time() - started):.0f} tok/s")
    lines = sorted(partial.read_text().splitlines()[1:], key=lambda line: json.loads(line)["row"])
    partial.write_text("".join(line + "\n" for line in lines))
    return partial.replace(output)


def answer(
    row: int, prompt: Prompt, tokens: list[int], tokenizer, stops: set[int], temperature: float, folder: Path
) -> dict:
    """folder: what file names of pictures start from. Raises UserError for pictures that are no files."""
    finished = tokens[-1] in stops
    text = tokenizer.decode(tokens[:-1] if finished else tokens)
    if not all(isinstance(picture, Path) for picture in prompt.pictures):
        raise UserError(
            f"prompt {prompt.name}: found a picture inside the data, expected the name of a file (answers refer to it)"
        )
    images = {"images": [os.path.relpath(picture, folder) for picture in prompt.pictures]} if prompt.pictures else {}
    return {
        "row": row,
        "messages": [*prompt.messages, {"role": "assistant", "content": text}],
        **images,
        "tokens": [*prompt.tokens, *tokens],
        "prompt_length": len(prompt.tokens),
        "finished": finished,
        "temperature": temperature,
    }
