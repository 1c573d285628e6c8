"""Python source as questions and answers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.launch.prompts import write_prompts
from draftsmith.models.errors import UserError
from draftsmith.train.recipe import read_recipe
from draftsmith.train.reference import corpus
from draftsmith.train.reference.pretrain import TargetRecipe, first_model, pretrain, train_tokenizer
from tests.conftest import ROOT, tiny_target

SOURCE = '''
import os

class A:
    def plain(self, x):
        return x + 1

    @property
    def documented(self,
                   y: int = 2) -> int:
        """Twice y.

        More.
        """
        # why
        if y:
            y = 2 * y
        return y

def only_doc():
    """Nothing else."""

def one_line(): return 1

async def wait(): 
    "Short doc."
    await os.sleep()
'''


def functions(text=SOURCE):
    return {f.name: f for f in corpus.cut_functions(corpus.SourceFile("p", "p/m.py", Path("m.py"), text))}


def test_functions_are_cut_into_signature_with_docstring_and_body():
    found = functions()
    assert set(found) == {"plain", "documented", "wait"}
    assert (
        found["plain"].question == "def plain(self, x):"
        and found["plain"].answer == "    return x + 1"
        and not found["plain"].documented
    )
    assert found["documented"].question == (
        'def documented(self,\n               y: int = 2) -> int:\n    """Twice y.\n\n    More.\n    """'
    )
    assert (
        found["documented"].answer == "    # why\n    if y:\n        y = 2 * y\n    return y"
        and found["documented"].documented
    )
    assert found["wait"].answer == "    await os.sleep()" and found["wait"].question.endswith('"""Short doc."""')


def test_unparsable_files_give_nothing_and_equal_bodies_count_once():
    assert functions("def f(:") == {}
    files = [corpus.SourceFile("p", f"p/{n}.py", Path(n), SOURCE) for n in "ab"]
    assert {f.module for f in corpus.unique_functions(files)} == {"p/a.py"}


def test_split_depends_on_the_module_path_alone():
    assert [corpus.is_held_out(f"p/{n}.py", 0.5) for n in range(8)] == [
        corpus.is_held_out(f"p/{n}.py", 0.5) for n in range(8)
    ]
    share = sum(corpus.is_held_out(f"p/{n}.py", 0.2) for n in range(2000)) / 2000
    assert abs(share - 0.2) < 0.04


def test_installed_sources_are_found_with_version_and_licence():
    files = corpus.find_sources(["rich", "a-package-that-is-not-installed"])
    assert files and all(f.module.startswith("rich/") for f in files)
    listed = corpus.manifest(files)["rich"]
    assert "MIT" in listed["licence"] and len(listed["files"]) == len(files) and listed["version"][0].isdigit()


def test_prompts_of_the_two_splits_are_disjoint(tmp_path):
    tokenizer = train_tokenizer([SOURCE], 300)

    def read(name, held):
        return [
            json.loads(line)["name"]
            for line in write_prompts(  # noqa: E731
                ["rich", "typer", "omegaconf", "pluggy"],
                str(tmp_path / name),
                40,
                0,
                tokenizer,
                held,
                max_question=900,
                max_answer=2000,
            )
            .read_text()
            .splitlines()
        ]

    train, held = read("train.jsonl", False), read("held.jsonl", True)
    assert train and not {n.rsplit(":", 1)[0] for n in train} & {n.rsplit(":", 1)[0] for n in held}


def test_prompts_of_tests_are_other_files(tmp_path, tokenizer):
    """No file gives both kinds; of test files only the tests, documented or not."""
    kinds = [{f.module for f in corpus.find_sources(["networkx", "mpmath"], tests=tests)} for tests in (False, True)]
    assert kinds[0] and kinds[1] and not kinds[0] & kinds[1] and all("/test" in module for module in kinds[1])
    found = write_prompts(
        ["mpmath"],
        str(tmp_path / "tests.jsonl"),
        5,
        0,
        tokenizer,
        held_out=False,
        tests=True,
        max_question=500,
        max_answer=2000,
    )
    assert all(
        json.loads(line)["name"].rpartition(":")[2].startswith("test") for line in found.read_text().splitlines()
    )


def test_a_target_is_trained_on_from_another_one(tmp_path):
    """At first the other's weights under a new RoPE base; then repository rows and packed rows of the recipe's
    lengths.
    """
    target = tiny_target(layers=2, vocab=300, tie_word_embeddings=True)
    target.model.save_pretrained(tmp_path / "start")
    train_tokenizer([SOURCE], 300).save_pretrained(tmp_path / "start")
    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    recipe = read_recipe(
        ROOT / "recipes/targets/code-long.yaml",
        TargetRecipe,
        [
            f"start_from={tmp_path}/start",
            f"tokenizer={tmp_path}/start",
            "corpus.packages=[rich]",
            "corpus.max_question=900",
            "corpus.max_answer=900",
            *(f"model.{key}={value}" for key, value in shape.items()),
            "compile=false",
            f"output={tmp_path}/out",
            "stages=[{layers: 2, length: 64, batch: 4, tokens: 1024, repository: 0.5}, {layers: 2, length: 128, "
            "batch: 1, tokens: 256, repository: 1.0}]",
        ],
    )
    first = first_model(recipe)
    assert first.config.rope_parameters["rope_theta"] == 100000.0
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), target.model.state_dict().values()))
    pretrain(recipe, lambda line: None)
    assert any(
        not torch.equal(x.float(), first.state_dict()[name])
        for name, x in load_file(tmp_path / "out" / "model.safetensors").items()
    )
    with pytest.raises(UserError, match="has hidden_size 32, expected the recipe's 64"):
        first_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"hidden_size": 64})}))
