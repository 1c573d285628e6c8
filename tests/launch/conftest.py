"""A place to work in, and the command line as a user meets it."""

import json
import sys

import pytest

from draftsmith.launch import cli
from draftsmith.models.formats import save_drafter
from draftsmith.train.reference.pretrain import train_tokenizer
from tests.conftest import tiny_head, tiny_target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a target, a drafter for it and prompts."""
    root, target = tmp_path_factory.mktemp("place"), tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(root / "target")
    train_tokenizer(["def add(a, b): return a + b"], 300).save_pretrained(root / "target")
    save_drafter(tiny_head(target, 40), root / "drafter", {"target": str(root / "target")})
    for name, count in (("prompts", 6), ("others", 5)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"add {i}"}) + "\n" for i in range(count)))
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, output, last line of the errors) of the command line in this process."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        found = capsys.readouterr()
        return code, found.out, (found.err.splitlines() or [""])[-1]

    return run
