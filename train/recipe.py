"""Recipes: YAML files checked by pydantic. Unknown keys are refused; `section.key=value` overrides any value.

A recipe knows nothing about tensors. Every default that a person would want to change stands in the YAML, not here.
"""

from pathlib import Path
from typing import Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftsmith.models.errors import UserError


class Strict(BaseModel):
    """A section of a recipe: no unknown keys, no silent conversion of a wrong type, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


R = TypeVar("R", bound=Strict)


def read_recipe(path: str | Path, kind: type[R], overrides: list[str] = ()) -> R:
    """Reads and checks a YAML recipe.

    Raises `UserError` naming the file and the key, with the value found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; expected a YAML file")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}, expected a mapping of sections")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected section.key=value")
        try:
            merged = OmegaConf.create(values)
            OmegaConf.update(merged, key, yaml.safe_load(text), merge=True)
            values = OmegaConf.to_container(merged)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
            raise UserError(f"override {override!r}: {' '.join(str(error).split())}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if not key:  # a rule between keys
            raise UserError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from None
        if first["type"] == "extra_forbidden":
            raise UserError(f"{path}: {key}: unknown key") from None
        if first["type"] == "missing":
            raise UserError(f"{path}: {key}: missing") from None
        raise UserError(f"{path}: {key}: found {first['input']!r}; {first['msg']}") from None


class Data(Strict):
    """files: JSONL or Parquet with `messages`, `text`, or `tokens` + `prompt_length` (as `draftsmith regenerate` writes)."""

    files: list[str]
    max_length: int = Field(gt=8)


class Head(Strict):
    name: Literal["eagle3"]
    intermediate_size: int | None = Field(gt=0)
    draft_vocab_size: int | None = Field(gt=0)


class Objective(Strict):
    steps: int = Field(gt=0)
    decay: float = Field(gt=0, le=1)


class Optimization(Strict):
    name: Literal["muon", "adamw"]
    lr: float = Field(gt=0)
    muon_lr: float = Field(gt=0)
    epochs: float = Field(gt=0)
    batch_rows: int = Field(gt=0)
    accumulation: int = Field(gt=0)
    warmup: float = Field(ge=0, le=1)
    clip: float = Field(gt=0)


class Engine(Strict):
    zero_stage: Literal[0, 1, 2]
    dtype: Literal["fp32", "bf16"]
    checkpoint_minutes: float = Field(ge=0)


class DrafterRecipe(Strict):
    """One run of drafter training; see recipes/eagle3-code.yaml for what every value means."""

    target: str
    seed: int
    data: Data
    head: Head
    objective: Objective
    optimization: Optimization
    engine: Engine
    output: str
