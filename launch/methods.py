"""What the measuring commands have in common: targets, drafters, baselines and suites by their names, checked before
any work.
"""

import hashlib
import json
import os
import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.measure import Decoder, Looped, decode_batches
from draftsmith.eval.measurement.prompts import Prompt, all_turns, first_turn
from draftsmith.eval.measurement.suites import read_suite
from draftsmith.eval.sampling import Sampling
from draftsmith.models.chat import stop_ids
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter, SuffixRule
from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, load_drafter
from draftsmith.models.grow import DynamicTree
from draftsmith.models.pictures import load_reader
from draftsmith.models.targets import TextTarget, locate

BASELINES = (
    "plain",
    "lookup",
    "suffix",
    "hf-generate",
    "hf-lookup",
    "hf-assisted",
)  # every other method is a drafter's directory
HOWL = "howl:"  # before a drafter's directory: HOWL over it
HOWL_TREE, HOWL_ROWS = DynamicTree(10, 7, 60), 60
SUFFIX_RULE = SuffixRule(
    factor=4
)  # of 1, 2 and 4 the best path on prompts of training modules (tests/benchmarks/suffix_rules.py)
KEYS = (
    "robust_speedup",
    "disturbance",
    "speedup",
    "tree",
    "sweep",
    "timed",
    "plain",
    "greedy",
    "sampled",
    "lossless",
    "identical",
    "cells",
    "samples",
    "conditions",
)  # of result.json
ASSISTANT = "bundled:targets/code-mini"
ANSWER_BATCH = 16


@dataclass
class Methods:
    """A target with its tokenizer and stop ids, heads {name: head} and where each lies, baselines {name: decoder}."""

    target: TextTarget
    tokenizer: object
    stops: set[int]
    heads: dict
    folders: dict[str, str]
    baselines: dict[str, Decoder]

    @classmethod
    def open(
        cls, names: list[str], target_name: str | None, assistant: str, dtype: torch.dtype | None = None
    ) -> "Methods":
        """names: `BASELINES`, drafters (directory, Hub id, `bundled:PATH`, or NAME=any of these) or `howl:` before a
        drafter. Without target_name the drafters name theirs.
        """
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f"methods: found {repeated[0]} twice, expected each once")
        if HOWL in names:
            raise UserError(f"{HOWL[:-1]}: found no drafter behind it, expected {HOWL}DRAFTER")
        folders = labels([name for name in names if name not in BASELINES and not name.startswith(HOWL)])
        places = {name: fetch(folder) for name, folder in folders.items()}
        under = {name: fetch(name.removeprefix(HOWL)) for name in names if name.startswith(HOWL)}
        if target_name is None:
            wanted = {name: target_of(place) for name, place in {**places, **under}.items()}
            if len(set(wanted.values())) > 1:
                raise UserError(
                    f"drafters: found targets {', '.join(sorted(set(wanted.values())))}, expected one (or --target)"
                )
            if not wanted:
                raise UserError(
                    f"methods: found no drafter among {', '.join(names)}, expected one that names its target, or "
                    f"--target"
                )
            target_name = next(iter(wanted.values()))
        target = TextTarget.load(target_name, dtype)
        tokenizer = load_reader(target_name, target)
        load = lambda place: load_drafter(place, target.shared, target.layers)  # noqa: E731
        heads = {name: load(place) for name, place in places.items()}
        lookup, baselines = LookupDrafter(), {}
        for name in names:
            if name == "lookup":
                baselines[name] = Looped(target, lookup)
            elif name == "suffix":
                baselines[name] = Looped(target, SuffixDrafter(HOWL_ROWS, SUFFIX_RULE))
            elif name in under:
                head = load(under[name])
                tree = HOWL_TREE if head.feature_spec.probe is None else replace(HOWL_TREE, size=HOWL_ROWS // 2)
                baselines[name] = Looped(
                    target, HowlDrafter(HeadDrafter(head, tree), SuffixDrafter(HOWL_ROWS, SUFFIX_RULE))
                )
            elif name == "hf-generate":
                baselines[name] = Generate(target)
            elif name == "hf-lookup":
                baselines[name] = Generate(
                    target, prompt_lookup_num_tokens=lookup.depth, max_matching_ngram_size=max(lookup.grams)
                )
            elif name == "hf-assisted":
                baselines[name] = Generate(target, assistant=TextTarget.load(assistant, target.dtype))
        return cls(target, tokenizer, stop_ids(target, tokenizer), heads, folders, baselines)

    def prompts(
        self, file: str, limit: int | None, max_new_tokens: int, rows: int, skip_long: bool, report=print
    ) -> list[Prompt]:
        """All turns of a suite's first `limit` conversations; prompts that leave no room for the new tokens and trees
        of `rows` rows are refused, or left out with skip_long.
        """
        room, place = self.target.context_length - max_new_tokens - rows, bundled(file)
        conversations = read_suite(place, limit)

        def fits(prompt: Prompt) -> bool:
            if len(prompt.tokens) > room and not skip_long:
                raise UserError(
                    f"{place} prompt {prompt.name}: found {len(prompt.tokens)} tokens, expected at most {room} "
                    f"(context "
                    f"{self.target.context_length}, {max_new_tokens} new tokens, trees of {rows}); --skip-long "
                    f"leaves it out"
                )
            return len(prompt.tokens) <= room

        def answer(asked: list[Prompt]) -> list[str]:
            report(f"{Path(place).stem}: the target answers {len(asked)} turns that others follow")
            traces = decode_batches(
                self.target,
                NoDrafter(),
                [p.tokens for p in asked],
                Sampling(),
                max_new_tokens,
                self.stops,
                ANSWER_BATCH,
            )
            return [self.tokenizer.decode([t for t in trace.tokens if t not in self.stops]) for trace in traces]

        fitting = [c for c in conversations if fits(first_turn(c, self.tokenizer, place))]
        found = [p for p in all_turns(fitting, self.tokenizer, place, answer) if fits(p)] if fitting else []
        if not found:
            raise UserError(f"{place}: found no prompt of at most {room} tokens, expected at least one")
        library = [name for name, decoder in self.baselines.items() if isinstance(decoder, Generate)]
        if library and any(prompt.pictures for prompt in found):
            raise UserError(f"{place}: found pictures, expected text alone for {library[0]}")
        left = sum(len(c.turns) for c in conversations) - len(found)
        if left:
            report(f"{Path(place).stem}: {left} turns of more than {room} tokens are left out")
        return found

    def identity(self) -> dict:
        """Names and hashes of what is measured."""
        digest = lambda folder: hashlib.sha256((fetch(folder) / "model.safetensors").read_bytes()).hexdigest()[:16]  # noqa: E731
        return {
            "target": self.target.name,
            "methods": ["plain", *self.baselines],
            "drafters": {n: digest(f) for n, f in self.folders.items()},
        }

    def machine(self) -> dict:
        return {
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": device_name(self.target.device),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def labels(folders: list[str]) -> dict[str, str]:
    """Drafters by name: NAME=FOLDER says it; otherwise the folder's own (the one above it for `drafter`), or all of the
    path where two agree.
    """
    named = {}
    for folder in folders:
        name, said, place = folder.partition("=")
        if not said or "/" in name:
            parts = folder.removeprefix("bundled:").rstrip("/").split("/")
            name, place = parts[-2] if parts[-1] == "drafter" and len(parts) > 1 else parts[-1], folder
        if name in KEYS:
            raise UserError(
                f"drafter {folder}: found the name {name}, which result.json uses; expected another (NAME={place})"
            )
        named[folder if name in named or name in BASELINES else name] = place
    return named


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def bundled(name: str) -> str:
    """A path, or `bundled:PATH` below the packaged recipes."""
    if name.startswith("bundled:") and name.endswith(".jsonl"):
        folder, _, file = name.rpartition("/")
        return str(Path(locate(folder)) / file)
    return locate(name)


def target_of(folder: Path) -> str:
    try:
        return json.loads((folder / "draftsmith.json").read_text("utf-8"))["target"]
    except (OSError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder}/draftsmith.json: no target named; expected --target or a drafter trained here"
        ) from None


def check_writable(folder: Path) -> None:
    """An unwritable place is found before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def write_json(path: Path, document: dict) -> None:
    """Complete or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".json") as file:
        json.dump(document, file, indent=1)
    os.replace(file.name, path)
