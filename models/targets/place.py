"""Where the target behind a name lies: a directory as it is, a Hub id, a bundled one, or a GGUF file, which becomes a
directory.
"""

import os
import re
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

import draftsmith.recipes
from draftsmith.models.errors import UserError
from draftsmith.models.hub import HUB_ID, hub_reason
from draftsmith.models.targets.fetched import FetchedTarget
from draftsmith.models.targets.gguf import dequantised
from draftsmith.models.targets.weights import check_adapter, one_line, quietly

RECIPES = Path(draftsmith.recipes.__file__).parent
BUNDLED, HUB = "bundled:", "hub:"
HUB_FILE = re.compile(r"hub:(?P<repository>[\w][\w.-]*/[\w][\w.-]*)/(?P<file>[\w./-]+\.gguf)(@(?P<revision>[\w./-]+))?")


def say(line: str) -> None:
    """What takes its time is told beside the output of a command, as downloads are."""
    print(line, file=sys.stderr, flush=True)


def locate(name: str | Path) -> str:
    """The directory or Hub id behind a name. `bundled:NAME` is a reference model: one that lies in the package, or one
    that is fetched once. A `.gguf` file, a folder with one, or `hub:USER/NAME/FILE.gguf` is dequantised once; the
    directory is that of the result. Raises UserError.
    """
    text = os.path.expanduser(name)
    if text.startswith(BUNDLED):
        place, table = bundled(text)
        return str(place if table is None else table.directory(text, say))
    file = gguf_file(text)
    return text if file is None else str(dequantised(file, text, say))


def present(name: str | Path) -> bool:
    """Whether `locate` finds what is needed on this machine: nothing is downloaded, though a GGUF file may still have
    to be dequantised.
    """
    text = str(name)
    if text.startswith(BUNDLED):
        try:
            return bundled(text)[0].is_dir()
        except UserError:
            return False
    if text.startswith(HUB):
        found = HUB_FILE.fullmatch(text)
        return found is not None and isinstance(
            try_to_load_from_cache(found["repository"], found["file"], revision=found["revision"]), str
        )
    if Path(text).suffix.lower() == ".gguf":
        return Path(text).is_file()
    if (Path(text) / "config.json").is_file() or any(Path(text).glob("*.gguf")):
        return True
    return bool(HUB_ID.fullmatch(text)) and isinstance(try_to_load_from_cache(text, "config.json"), str)


def read_config(name: str | Path) -> tuple[str, PreTrainedConfig]:
    """Where a target lies, and its config. Raises UserError when there is no such target."""
    place = locate(name)
    try:
        return place, AutoConfig.from_pretrained(place, trust_remote_code=False)  # else it may ask at the terminal
    except Exception as error:  # values of another kind raise whatever comes of them
        check_adapter(place, str(name))  # which may come without a config
        raise UserError(f"target {name}: cannot be loaded ({one_line(error)})") from None


def read_generation(place: str, name: str) -> GenerationConfig | None:
    """The generation config at a place (directory or Hub id); None where there is none. Raises UserError for a file
    that is none: transformers would leave it out without a word, stop ids and all.
    """
    try:
        with quietly():
            return GenerationConfig.from_pretrained(place)
    except Exception as error:
        if isinstance(error, OSError) and not (Path(place) / "generation_config.json").is_file():
            return None
        raise UserError(f"target {name}: generation_config.json: cannot be read ({one_line(error)})") from None


def bundled(name: str) -> tuple[Path, FetchedTarget | None]:
    """The directory of `bundled:NAME`, which is there unless it comes with the table that says how it is fetched."""
    place = RECIPES / name.removeprefix(BUNDLED)
    if place.is_dir():
        return place, None
    table = FetchedTarget.read(place.with_name(f"{place.name}.yaml"))
    if table is None:
        listed = [p.parent for p in RECIPES.glob("*/*/config.json")]
        listed += [p.with_suffix("") for p in RECIPES.glob("*/*.yaml") if FetchedTarget.read(p)]
        known = sorted(f"{p.parent.name}/{p.name}" for p in listed)
        raise UserError(f"{name}: no such bundled model; found {', '.join(known) or 'none'}")
    return table.place, table


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a name stands for, downloaded where it lies on the Hub; None for other names."""
    if name.startswith(HUB):
        return hub_file(name)
    place = Path(name)
    if place.suffix.lower() == ".gguf":
        if not place.is_file():
            raise UserError(f"target {name}: no such file, expected a GGUF file")
        return place
    if not place.is_dir() or any(place.glob("*.safetensors")):
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        shown = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise UserError(f"target {name}: found {len(files)} GGUF files ({shown}), expected one; name the file itself")
    return files[0] if files else None


def hub_file(name: str) -> Path:
    """`hub:USER/NAME/FILE.gguf[@REVISION]` as a file of the Hub's cache; only this file is downloaded."""
    found = HUB_FILE.fullmatch(name)
    if found is None:
        raise UserError(f"target {name}: expected hub:USER/NAME/FILE.gguf or hub:USER/NAME/FILE.gguf@REVISION")
    try:
        return Path(hf_hub_download(found["repository"], found["file"], revision=found["revision"]))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"target {name}: the Hub: {hub_reason(error)}") from None
