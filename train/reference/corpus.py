"""Python source found on the machine as training documents for the bundled `code` target.

Two document forms: `chat` (question = signature and docstring of a function, answer = its body, cut out with `ast`) and
`text` (a whole source file). Nothing is downloaded and nothing of the corpus is ever committed; `manifest` lists what
was read (package, version, licence, file, hash). Train and held-out documents are split by a hash of the module path,
so that no file contributes to both; a body that occurs in several files belongs to the first of them.
"""

import ast
import hashlib
import importlib.metadata
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 200_000  # of a source file
MOST_LINES, MOST_DOC_LINES = 60, 12  # of a function
TEST_FOLDERS = {"test", "tests", "testing"}
SKIPPED_FOLDERS = {
    "idlelib",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "_vendor",
    "vendor",
    "third_party",
    "__pycache__",
}


@dataclass(frozen=True)
class SourceFile:
    """One Python file: `module` is its path below the package root with the package name in front."""

    package: str
    module: str
    path: Path
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Function:
    """A function as a question (signature and docstring, one trailing newline less) and its answer (the body).

    first, last: its lines in the file, counted from 1, decorators included.
    """

    module: str
    name: str
    question: str
    answer: str
    documented: bool
    first: int
    last: int


def is_held_out(module: str, share: float = 0.03) -> bool:
    """Whether the module belongs to the held-out split: a hash of its path, independent of order and machine."""
    return int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) / 2**32 < share


def find_sources(packages: list[str], tests: bool = False) -> list[SourceFile]:
    """Source files of the standard library ("python") and of the named installed distributions, in a fixed order: those
    outside of folders of tests, or those inside.

    Packages that are not installed are left out; generated or enormous files (over `MOST_BYTES`) are skipped.
    """
    files = []
    for package in packages:
        if package == "python":
            root = Path(sysconfig.get_paths()["stdlib"])
            paths = [(p, p.relative_to(root)) for p in root.rglob("*.py")]
        else:
            try:
                listed = importlib.metadata.files(package) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            paths = [
                (Path(p.locate()), Path(str(p)))
                for p in listed
                if str(p).endswith(".py") and not str(p).startswith("..")
            ]
        for path, relative in sorted(paths, key=lambda pair: str(pair[1])):
            folders = set(relative.parts[:-1])
            if (
                folders & SKIPPED_FOLDERS
                or bool(folders & TEST_FOLDERS) != tests
                or not path.is_file()
                or path.stat().st_size > MOST_BYTES
            ):
                continue
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:
                continue
            files.append(SourceFile(package, f"{package}/{relative.as_posix()}", path, text))
    return files


def cut_functions(source: SourceFile) -> list[Function]:
    """Functions of a file as question and answer. Files that do not parse give none."""
    try:
        module = ast.parse(source.text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = source.text.splitlines()
    found = []
    for node in ast.walk(module):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body, doc = node.body, ast.get_docstring(node)
        if doc is not None:
            body = body[1:]
        if not body:
            continue
        first, last = body[0].lineno, body[-1].end_lineno
        if doc is not None:
            first = node.body[0].end_lineno + 1  # comments between docstring and first statement belong to the answer
        if last - first + 1 > MOST_LINES or first <= node.lineno:
            continue
        header_end = node.body[0].lineno - 1
        header = "\n".join(lines[node.lineno - 1 : header_end])
        answer = textwrap.dedent("\n".join(lines[first - 1 : last]))
        if not answer.strip() or not header.rstrip().endswith(":"):
            continue
        question = textwrap.dedent(header).rstrip()
        if doc and doc.strip():
            kept = doc.strip().splitlines()[:MOST_DOC_LINES]
            quoted = "\n".join(['"""' + kept[0], *kept[1:]]) + ('"""' if len(kept) == 1 else '\n"""')
            question += "\n" + textwrap.indent(quoted, "    ")
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        found.append(
            Function(
                source.module, node.name, question, textwrap.indent(answer, "    "), bool(doc), start, node.end_lineno
            )
        )
    return found


def unique_functions(files: list[SourceFile]) -> list[Function]:
    """All functions of the files; of equal answers (whitespace aside) only the first is kept."""
    seen, kept = set(), []
    for source in files:
        for function in cut_functions(source):
            key = hashlib.sha256("".join(function.answer.split()).encode()).digest()
            if key not in seen:
                seen.add(key)
                kept.append(function)
    return kept


def manifest(files: list[SourceFile]) -> dict:
    """What was read: for every package its version, licence and {file: first 16 hex digits of its SHA-256}."""
    packages: dict[str, dict] = {}
    for source in files:
        if source.package not in packages:
            if source.package == "python":
                version, licence = sysconfig.get_python_version(), "PSF-2.0"
            else:
                meta = importlib.metadata.metadata(source.package)
                version = meta["Version"]
                licence = (
                    meta.get("License-Expression")
                    or next(
                        (c.rsplit(" :: ", 1)[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License")),
                        None,
                    )
                    or (meta.get("License") or "unknown").splitlines()[0][:60]
                )
            packages[source.package] = {"version": version, "licence": licence, "files": {}}
        packages[source.package]["files"][source.module] = source.digest[:16]
    return packages
