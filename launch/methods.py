"""What the measuring commands have in common: targets, drafters, baselines and suites by their names, checked before
any work.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.measure import Decoder, Looped, decode_batches
from draftsmith.eval.measurement.prompts import Prompt, all_turns
from draftsmith.eval.measurement.suites import read_suite
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import KINDS, LIBRARY, Drafters, check_vocabulary, places, retrieves, takes, trained
from draftsmith.models.chat import stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.drafters.datastore import Datastore
from draftsmith.models.errors import UserError
from draftsmith.models.files import write_whole
from draftsmith.models.formats import fetch
from draftsmith.models.formats.layout import other_weights, read_json
from draftsmith.models.grow import TreePolicy
from draftsmith.models.notes import notes
from draftsmith.models.pictures import load_renderer
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import TextTarget, locate
from draftsmith.models.templates import CLOCK

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
    """A target with its chat template and stop ids, and methods by the names that results give them. heads {name: head}
    of the trained drafters, and where each lies; baselines {name: decoder}, all the others but plain decoding; named:
    the METHOD of each, as `drafters` knows it.
    """

    target: TextTarget
    renderer: Renderer
    stops: set[int]
    heads: dict
    folders: dict[str, str]
    baselines: dict[str, Decoder]
    named: dict[str, str]
    drafters: Drafters

    @classmethod
    def open(
        cls,
        names: list[str],
        target_name: str | None,
        assistant: str,
        dtype: torch.dtype | None = None,
        report=print,
        datastore: str | None = None,
        variables: Mapping = {},
    ) -> "Methods":
        """names: METHOD or NAME=METHOD; datastore: what those that retrieve read; variables: of the chat template.
        Without target_name the drafters name theirs, and other weights than they were trained for are refused; for a
        target that is named, they are told.
        """
        chosen = target_name is not None
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f"methods: found {repeated[0]} twice, expected each once")
        named = labels(names)
        if datastore is not None and not any(map(retrieves, named.values())):
            raise UserError(
                f"--datastore: found {datastore}, expected none: none of {', '.join(names)} retrieves (reader)"
            )
        store = None if datastore is None else Datastore(Path(datastore))
        found = {place: fetch(place) for name in named.values() for place in places(name)}
        if target_name is None:
            wanted = sorted({target_of(folder) for folder in found.values()})
            if len(wanted) > 1:
                raise UserError(f"drafters: found targets {', '.join(wanted)}, expected one (or --target)")
            if not wanted:
                raise UserError(
                    f"methods: found no drafter among {', '.join(names)}, expected one that names its target, or "
                    f"--target"
                )
            target_name = wanted[0]
        target = TextTarget.load(target_name, dtype)
        renderer = load_renderer(target_name, target, variables)
        for line in notes(target, renderer.reader, target_name):
            report(line)
        for name, place in ((name, place) for name, method in named.items() for place in places(method)):
            if others := other_weights(about(found[place]), target):
                if not chosen:
                    raise UserError(f"drafter {name}: {others}; --target measures it on these all the same")
                report(f"drafter {name}: {others}; its acceptance length may be lower than there")
        for name, place in ((name, place) for name, method in named.items() for place in places(method)):
            if others := other_variables(about(found[place]), renderer):
                report(f"drafter {name}: {others}; its acceptance length may be lower than there")
        drafters = Drafters(target, assistant, store)
        if store is not None:
            check_vocabulary(store, target_name, renderer.tokenizer)
        folders = {name: method for name, method in named.items() if trained(method)}
        heads = {name: drafters.head(place) for name, place in folders.items()}
        baselines = {
            name: drafters.decoder(method)
            for name, method in named.items()
            if name not in folders and method != "plain"
        }
        stops = stop_ids(target, renderer.reader)
        return cls(target, renderer, stops, heads, folders, baselines, named, drafters)

    @property
    def tokenizer(self):
        """Or the `Reader` of a target that sees."""
        return self.renderer.reader

    def decoder(self, name: str, tree: TreePolicy | None = None) -> Decoder:
        """A method by its name here; tree: what a head in it grows."""
        if name in self.baselines and tree is None:
            return self.baselines[name]
        return self.drafters.decoder(self.named[name], tree)

    def shape(self, tree: TreePolicy) -> None:
        """Gives this tree to the methods that have one of their own and can take it."""
        self.baselines |= {name: self.decoder(name, tree) for name in self.baselines if takes(self.named[name], tree)}

    @property
    def rows(self) -> int:
        """Of the largest tree of the methods whose trees are their own."""
        return max((d.drafter.size for d in self.baselines.values() if isinstance(d, Looped)), default=1)

    def prompts(
        self, file: str, limit: int | None, max_new_tokens: int, rows: int, skip_long: bool, report=print
    ) -> list[Prompt]:
        """All turns of a suite's first `limit` conversations; prompts that leave no room for the new tokens and trees
        of `rows` rows are refused, or left out with skip_long.
        """
        room, place = self.target.context_length - max_new_tokens - rows, bundled(file)
        conversations = read_suite(place, limit)

        def fits(prompt: Prompt) -> bool:
            if (highest := max(prompt.tokens)) >= self.target.vocab_size:
                raise UserError(
                    f"{place} prompt {prompt.name}: found token id {highest}, expected 0..{self.target.vocab_size - 1}"
                )
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

        found = all_turns(conversations, self.renderer, place, answer, fits)
        for line in self.renderer.passed_over():
            report(f"{Path(place).stem}: {line}")
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

        def digest(place: str) -> str:
            folder = fetch(place)
            files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
            return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]

        assisted = "hf-assisted" in self.named.values()
        return {
            **self.target.identity,
            "methods": ["plain", *self.baselines],
            "renamed": {name: self.named[name] for name in self.baselines if self.named[name] != name},
            "drafters": {n: digest(f) for n, f in self.folders.items()}
            | {place: digest(place) for name in self.baselines for place in places(self.named[name])},
            **({"assistant": self.drafters.assistant} if assisted else {}),
            **({} if self.drafters.datastore is None else {"datastore": self.drafters.datastore.about}),
        }

    def machine(self) -> dict:
        return {
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": device_name(self.target.device),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **({"template_variables": told} if (told := self.renderer.told()) else {}),
        }


def labels(methods: list[str]) -> dict[str, str]:
    """Methods by name: NAME=METHOD says it; otherwise a drafter's is that of its folder (the one above it for
    `drafter`), or all of the path where two agree, and any other method is its own.
    """
    named = {}
    for asked in methods:
        name, said, method = asked.partition("=")
        if not said or "/" in name or ":" in name:
            name = method = asked
            if trained(asked):
                parts = asked.removeprefix("bundled:").rstrip("/").split("/")
                name = parts[-2] if parts[-1] == "drafter" and len(parts) > 1 else parts[-1]
        if name in KEYS and (name, method) != ("plain", "plain"):
            raise UserError(
                f"drafter {asked}: found the name {name}, which result.json uses; expected another (NAME={method})"
            )
        taken = name in named or trained(method) and (name in KINDS or name in LIBRARY)
        named[asked if taken else name] = method
    return named


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def bundled(name: str) -> str:
    """A path, or `bundled:PATH` below the packaged recipes."""
    if name.startswith("bundled:") and name.endswith(".jsonl"):
        folder, _, file = name.rpartition("/")
        return str(Path(locate(folder)) / file)
    return locate(name)


def about(folder: Path) -> dict:
    """What a drafter's directory says of its training; {} where it says nothing."""
    return read_json(folder / "draftsmith.json") if (folder / "draftsmith.json").is_file() else {}


def other_variables(about: dict, renderer: Renderer) -> str:
    """In which variables of the chat template a drafter was trained with other values than a renderer's; "" where in
    none, or where nothing is recorded.
    """
    trained = about.get("trained")
    recorded = trained.get("template_variables") if isinstance(trained, dict) else None
    here = renderer.told()
    return ", ".join(
        f"trained with {name} {value!r}, here it is {here.get(name)!r}"
        for name, value in (recorded or {}).items()
        if name != CLOCK and here.get(name) != value
    )


def target_of(folder: Path) -> str:
    target = about(folder).get("target")
    if target is None:
        raise UserError(f"{folder}/draftsmith.json: no target named; expected --target or a drafter trained here")
    return target


def check_writable(folder: Path) -> None:
    """An unwritable place is found before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def write_json(path: Path, document: dict) -> None:
    write_whole(path, json.dumps(document, indent=1))
