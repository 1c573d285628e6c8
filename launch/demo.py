"""`draftsmith demo`: the project's main job on a target that is at hand, from prompts to a measured drafter. Every step
is a command of its own.

`DEMOS` holds what the demos differ in; the flow is one.
"""

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from draftsmith.launch.doctor import packages_of
from draftsmith.launch.measurement import CODE, Request, measure
from draftsmith.launch.methods import bundled
from draftsmith.launch.prompts import write_prompts
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.files import write_new
from draftsmith.models.formats import fetch
from draftsmith.models.targets import locate
from draftsmith.train.recipe import DrafterRecipe, read_recipe

TEMPERATURES, SEED = [0.0, 0.8], 0  # of the answers


class Prompts(Protocol):
    """The prompts whose answers a drafter is trained on."""

    def command(self, output: str) -> str:
        """What a user would type to write them."""

    def write(self, output: str, tokenizer) -> None: ...


@dataclass(frozen=True)
class Functions:
    """`count` documented functions of the training modules of packages installed beside draftsmith."""

    count: int
    packages: tuple[str, ...]

    def command(self, output: str) -> str:
        return f"draftsmith prompts {output} --count {self.count} " + " ".join(f"--package {p}" for p in self.packages)

    def write(self, output: str, tokenizer) -> None:
        write_prompts(list(self.packages), output, self.count, SEED, tokenizer, held_out=False)


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a file of prompts, `bundled:PATH`, that are not set aside for measuring."""

    file: str

    def command(self, output: str) -> str:
        file = self.file.replace("bundled:", "recipes/")
        return f"""mkdir -p {Path(output).parent} && grep '"split": "train"' {file} > {output}"""

    def write(self, output: str, tokenizer) -> None:
        text = Path(bundled(self.file)).read_text("utf-8")
        lines = [line for line in text.splitlines() if '"split": "train"' in line]
        write_new(Path(output), "".join(line + "\n" for line in lines))


@dataclass(frozen=True)
class Demo:
    """What a demo has of its own. answer_tokens: of an answer to learn from, at most; answer_batch: of `regenerate`;
    recipe: a file below `recipes/`; overrides: of the recipe; shipped: the reference drafter, measured beside the new
    one; the rest as in `Request`.
    """

    target: str
    prompts: Prompts
    answer_tokens: int
    answer_batch: int
    recipe: str
    overrides: tuple[str, ...]
    shipped: str
    suite: str
    limit: int
    max_new_tokens: int
    temperatures: tuple[float, ...]
    tree: str
    output: str

    def request(self, output: Path) -> Request:
        """The measurement of the drafter that was trained below `output`, beside the shipped one."""
        return Request(
            [f"demo={output}/drafter", f"shipped={self.shipped}"],
            output,
            suites=(self.suite,),
            tree=self.tree,
            temperatures=self.temperatures,
            timed=(0.0,),
            max_new_tokens=self.max_new_tokens,
            limit=self.limit,
            seed=SEED,
        )


DEMOS = {
    "code": Demo(
        target="bundled:targets/code",
        prompts=Functions(1900, ("python", "sympy", "pandas")),  # their held-out modules are in the suite
        answer_tokens=128,
        answer_batch=256,
        recipe="eagle3-code.yaml",
        overrides=("head.regression=true",),  # a training of minutes
        shipped="bundled:drafters/eagle3-code",
        suite=CODE,
        limit=64,
        max_new_tokens=64,
        temperatures=(0.0, 0.6, 1.0),
        tree="auto",
        output="runs/demo",
    ),
    "smollm2": Demo(
        target="bundled:targets/smollm2",
        prompts=TrainingRows("bundled:prompts/chat.jsonl"),
        answer_tokens=128,
        answer_batch=64,
        recipe="eagle3-smollm2.yaml",
        overrides=(
            "head.draft_vocab_size=4096",
            "head.regression=true",  # a training of minutes
            "optimization.lr=0.0003",
            "optimization.muon_lr=0.001",
            "optimization.epochs=2.5",
            "evaluation.rows=8",
            "evaluation.times=2",
            "evaluation.tree=dynamic:6x4x16",
        ),
        shipped="bundled:drafters/eagle3-smollm2",
        suite="bundled:prompts/chat.jsonl",
        limit=24,  # held-out ones: they stand first
        max_new_tokens=48,
        temperatures=(0.0,),
        tree="dynamic:3x3x8",
        output="runs/demo-smollm2",
    ),
}


def demo(name: str, output: Path | None = None, report=print) -> None:
    """The demo of that name. Raises UserError for a name that is none, and where a model is missing."""
    if name not in DEMOS:
        raise UserError(f"demo: target: found {name}, expected {' or '.join(DEMOS)}")
    run(DEMOS[name], output or Path(DEMOS[name].output), report)


def run(chosen: Demo, output: Path, report=print) -> None:
    from draftsmith.launch.training import main

    started = time.time()
    stage = lambda number, text: report(f"\n[{number}/4, {(time.time() - started) / 60:.1f} min] {text}")  # noqa: E731
    prompts, answers = f"{output}/prompts.jsonl", f"{output}/answers.jsonl"
    recipe = Path(locate("bundled:targets")).parent / chosen.recipe
    overrides = [
        f"data.files={json.dumps([answers])}",
        f"output={json.dumps(str(output))}",
        *chosen.overrides,
    ]
    # What is missing is missed before the work
    if lacking := [gap.said for gap in packages_of(read_recipe(recipe, DrafterRecipe, overrides))]:
        raise UserError(f"demo: found no {', no '.join(lacking)}")
    fetch(chosen.shipped)
    tokenizer = load_tokenizer(chosen.target)
    stage(1, chosen.prompts.command(prompts))
    chosen.prompts.write(prompts, tokenizer)
    stage(
        2,
        f"draftsmith regenerate {chosen.target} {prompts} {answers} "
        + " ".join(f"--temperature {t}" for t in TEMPERATURES)
        + f" --max-new-tokens {chosen.answer_tokens} --batch {chosen.answer_batch}",
    )
    regenerate(
        chosen.target,
        prompts,
        answers,
        TEMPERATURES,
        chosen.answer_tokens,
        chosen.answer_batch,
        None,
        SEED,
        report,
    )
    stage(3, f"draftsmith train recipes/{chosen.recipe} {' '.join(overrides)}")
    code = main([str(recipe), *overrides])
    if code in (130, 143):  # it was asked to stop, and has said what is kept
        raise SystemExit(code)
    if code != 0:
        raise UserError("demo: training ended with an error, see above")
    request = chosen.request(output)
    stage(4, command(request))
    measure(request, report)
    report(f"done in {(time.time() - started) / 60:.1f} min")


def command(request: Request) -> str:
    """What a user would type to ask for this measurement."""
    usual = {field.name: field.default for field in fields(Request)}
    options = [*(f"--suite {file}" for file in request.suites if request.suites != usual["suites"])]
    options += [f"--temperature {t:g}" for t in request.temperatures if request.temperatures != usual["temperatures"]]
    options += [f"--tree {request.tree}"] if request.tree != usual["tree"] else []
    options += [f"--limit {request.limit}", f"--max-new-tokens {request.max_new_tokens}"]
    options += [f"--time-at {t:g}" for t in request.timed]
    return f"draftsmith eval {' '.join([*request.methods, *options])} --output {request.output}"
