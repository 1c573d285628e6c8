"""Writes scenes drawn by code as LLaVA-format JSON with picture files: what drafters for `shapes-vlm` are trained and
measured on.
"""

import json
import random
from itertools import islice
from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.train.reference.scene_texts import describe, questions, request
from draftsmith.train.reference.scenes import picture, scenes

SHARE = 0.03  # held out, as in the target's recipe


def write_scenes(output: str, count: int, seed: int, held_out: bool) -> Path:
    """`output`/scenes.json and `output`/pictures: for each scene a description, and a conversation of all kinds of
    questions. Raises UserError when `output` exists.
    """
    folder = Path(output)
    if folder.exists():
        raise UserError(f"{folder} exists; expected a new place")
    partial = folder.with_name(f".{folder.name}.partial")
    (partial / "pictures").mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(f"{seed} {held_out}"), []
    for number, scene in enumerate(islice(scenes(1000 + seed, held_out, SHARE), count)):
        image = f"pictures/{number:06d}.png"
        picture(scene).save(partial / image)
        rows.append(_row(f"{number} describe", image, [(request(rng), describe(scene, rng))]))
        rows.append(_row(f"{number} questions", image, [(q.question, q.answer) for q in questions(scene, rng)]))
    (partial / "scenes.json").write_text(json.dumps(rows, indent=0), "utf-8")
    partial.rename(folder)
    return folder / "scenes.json"


def _row(name: str, image: str, turns: list[tuple[str, str]]) -> dict:
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": name, "image": image, "conversations": said}
