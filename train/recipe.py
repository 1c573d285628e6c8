"""Recipes: YAML files checked by pydantic. Unknown keys are refused; `section.key=value` overrides any value.

A recipe knows nothing about tensors. Every default that a person would want to change stands in the YAML, not here.
"""

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    create_model,
    model_validator,
)

from draftsmith.models.errors import UserError
from draftsmith.models.heads import HEADS
from draftsmith.models.pictures import MAX_PIXELS


class Strict(BaseModel):
    """A section of a recipe: no unknown keys, no silent conversion of a wrong type, finite numbers, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def kind_of(cls, values: dict) -> "type[Strict]":
        """The class that checks these values, where they themselves say so."""
        return cls


R = TypeVar("R", bound=Strict)
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, in which ~ is the user's home, or another name


class Yaml(yaml.SafeLoader):
    """Plain scalars as YAML 1.2 reads them (its core schema): `1e-4` is a number; `2026-11-27`, `1:30`, `off` and `yes`
    are text; `010` is ten. Digits may stand in groups: 1_000; `1e3` is a whole number as people write one. A key may
    stand once in a mapping.
    """

    yaml_implicit_resolvers = {}

    def number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)

    def decimal(self, node: yaml.ScalarNode) -> int | float:
        whole = WHOLE.fullmatch(self.construct_scalar(node).replace("_", ""))
        return int(whole[1]) * 10 ** int(whole[2]) if whole else self.construct_yaml_float(node)

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"found {key.value} twice", key.start_mark)
                seen.add(key.value)
        return node


MERGE = "tag:yaml.org,2002:merge"
WHOLE = re.compile(r"([-+]?[0-9]+)[eE]\+?([0-9]{1,2})")
SCALARS = {  # tag: (its form, what it begins with)
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
for kind, (form, first) in SCALARS.items():
    Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{form})$"), first)
Yaml.add_constructor("tag:yaml.org,2002:int", Yaml.number)
Yaml.add_constructor("tag:yaml.org,2002:float", Yaml.decimal)


def read_recipe(path: str | Path, kind: type[R], overrides: list[str] = ()) -> R:
    """Reads and checks a YAML recipe.

    Raises `UserError` naming the file and the key, with the value found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; expected a YAML file")
    try:
        values = yaml.load(path.read_text("utf-8"), Yaml)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}, expected a mapping of sections")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected section.key=value")
        try:
            merged = OmegaConf.create(values)
            OmegaConf.update(merged, key, yaml.load(text, Yaml), merge=True)
            values = OmegaConf.to_container(merged)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"override {override!r}: {' '.join(str(error).split())}") from None
    try:
        return kind.kind_of(values).model_validate(values)
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


def has_section(path: str | Path, name: str) -> bool:
    """Whether a recipe has a section, where it can be read at all: what tells kinds of recipe apart."""
    try:
        values = yaml.load(Path(path).read_text("utf-8"), Yaml)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(values, dict) and name in values


class Data(Strict):
    """files: JSONL, JSON (either gzipped) or Parquet files, or `hub:NAME[@REVISION][:[CONFIG:]SPLIT]`, with `messages`,
    `conversations`, `text`, or `tokens` + `prompt_length` (as `draftsmith regenerate` writes). max_image_pixels: of a
    picture, for targets that see; larger ones are bad rows. chat_template_kwargs: variables of the target's chat
    template, such as {enable_thinking: false}; strftime_now: the date that templates are told. processes: that encode
    long files, by default one a core, up to 8.
    """

    files: list[Place] = Field(min_length=1)
    max_length: int = Field(gt=8)
    max_bad_rows: float = Field(ge=0, lt=1)
    features: Literal["online", "cached"]
    max_image_pixels: int = Field(MAX_PIXELS, gt=0)
    chat_template_kwargs: dict[str, JsonValue] = {}
    processes: int | None = Field(None, gt=0)


def known(name: str) -> str:
    if name not in HEADS:
        raise ValueError(f"expected one of {', '.join(HEADS)}")
    return name


class Head(Strict):
    """name and what it starts from, beside what the head of this name has in its `Shape`. regression: whether a fresh
    head that can also starts in closed form from rows of the data, which is ahead in trainings of minutes and behind in
    longer ones (recipes/README.md).
    """

    name: Annotated[str, AfterValidator(known)]
    start_from: Place | None
    regression: bool = False

    @property
    def shape(self) -> dict:
        return self.model_dump(exclude={"name", "start_from", "regression"})


class Lora(Strict):
    """Adapts the drafter of `head.start_from` by low-rank changes of the linear layers named in `modules`; all else
    stays.
    """

    rank: int = Field(gt=0)
    alpha: int = Field(gt=0)
    modules: list[str] = Field(min_length=1)


class Gto(Strict):
    """Group Tree Optimization of the drafter of `head.start_from`, beside its own objective; see train/gto.py for what
    the values mean.
    """

    groups: int = Field(gt=0)
    group_size: int = Field(gt=1)
    tree: str
    reward_agg: Literal["lse", "lme", "node_sum", "max", "mean"]
    reward_mode: Literal["prob", "greedy"]
    debias: bool
    clip: float = Field(gt=0, lt=1)
    delta: float = Field(ge=0)
    min_spread: float = Field(gt=0)
    omega: float = Field(gt=0)
    baseline: Literal["group", "position"] = "group"


class SoftBudget(Strict):
    """The soft-budget tree loss beside the head's own objective; see train/soft_budget.py for what the values mean.
    roots: of each packed row; theta: width of the border of the tree, in nats; omega: its weight.
    """

    roots: int = Field(gt=0)
    tree: str
    theta: float = Field(gt=0)
    omega: float = Field(gt=0)


class Objective(Strict):
    """What the head of the recipe has in its `Objective`."""


def section(base: type[R], kind: type) -> type[R]:
    """A section that also has the fields of a head's dataclass; those without a default are to be given."""
    given = {field.name: ... if field.default is MISSING else field.default for field in fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    return create_model(base.__name__, __base__=base, **{name: (hints[name], value) for name, value in given.items()})


class Optimization(Strict):
    name: Literal["muon", "adamw"]
    lr: float = Field(gt=0)
    muon_lr: float | None = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant"]
    epochs: float = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    accumulation: int = Field(gt=0)
    warmup: float = Field(ge=0, le=1)
    clip: float = Field(gt=0)


class Engine(Strict):
    zero_stage: Literal[0, 1, 2, 3]
    dtype: Literal["fp32", "bf16", "fp16"]
    target: Literal["replicated", "sharded"]
    config: Place | None
    checkpoint_minutes: float = Field(ge=0)


class Evaluation(Strict):
    """The acceptance length of `rows` held-out rows' prompts, measured `times` times during the run; the drafter with
    the best is kept.
    """

    rows: int = Field(ge=0)
    times: int = Field(gt=0)
    tree: str
    max_new_tokens: int = Field(gt=0)


class DrafterRecipe(Strict):
    """One run of drafter training; see recipes/eagle3-code.yaml for what every value means."""

    target: Place
    seed: int
    data: Data
    head: Head
    lora: Lora | None
    objective: Objective
    gto: Gto | None
    soft_budget: SoftBudget | None = None
    optimization: Optimization
    engine: Engine
    evaluation: Evaluation
    wandb: str | None
    output: Place

    @classmethod
    def kind_of(cls, values):
        """With the sections `head` and `objective` of the head that is named."""
        named = HEADS.get(values["head"].get("name")) if isinstance(values.get("head"), dict) else None
        if named is None:
            return cls
        return create_model(
            cls.__name__,
            __base__=cls,
            head=(section(Head, named.Shape), ...),
            objective=(section(Objective, named.Objective), ...),
        )

    @property
    def kind(self) -> type:
        """The head's class."""
        return HEADS[self.head.name]

    @property
    def on_trees(self) -> bool:
        """Whether the target scores trees in training."""
        return self.gto is not None or self.soft_budget is not None

    @property
    def goal(self):
        """The head's objective."""
        return self.kind.Objective(**self.objective.model_dump())

    @model_validator(mode="after")
    def _fits(self):
        if self.optimization.batch_tokens < self.data.max_length:
            raise ValueError(
                f"optimization.batch_tokens: found {self.optimization.batch_tokens}, expected at least data.max_length "
                f"{self.data.max_length}"
            )
        if self.optimization.name == "muon" and self.engine.zero_stage > 0:
            raise ValueError(
                f"engine.zero_stage: found {self.engine.zero_stage}, expected 0 with optimization.name muon (it "
                f"needs whole matrices)"
            )
        if self.optimization.name == "muon" and self.optimization.muon_lr is None:
            raise ValueError("optimization.muon_lr: found null, expected a rate with optimization.name muon")
        if self.lora is not None and self.head.start_from is None:
            raise ValueError("head.start_from: found null, expected a drafter to adapt with lora")
        if self.lora is not None and self.optimization.name == "muon":
            raise ValueError(
                "optimization.name: found muon, expected adamw with lora (Muon bounds the step of a matrix, not of a "
                "product of two)"
            )
        if self.head.regression and self.kind.regress is None:
            raise ValueError(f"head.regression: found true, expected false ({self.head.name} has no such start)")
        if self.gto is not None and self.head.start_from is None:
            raise ValueError("head.start_from: found null, expected a trained drafter with gto")
        if self.on_trees and (self.data.features, self.engine.target) != ("online", "replicated"):
            raise ValueError(
                f"data.features, engine.target: found {self.data.features}, {self.engine.target}, expected online, "
                f"replicated with {'gto' if self.gto else 'soft_budget'} "
                "(every process has its own trees scored)"
            )
        return self
