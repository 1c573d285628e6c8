"""GGUF files as targets: what is loaded is what the file holds, the directory is complete or invisible, and a file of
which something would be lost is refused.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.targets import TextTarget, describe, gguf, locate
from draftsmith.models.targets.cache import cache_root, content_hash
from draftsmith.models.targets.gguf_header import LLAMA3
from draftsmith.models.targets.weights import Weights, check_checkpoint
from tests.conftest import tiny_target
from tests.tiny_gguf import dequantised, write_gguf

ASKED = [{"role": "user", "content": "def f12(a): it's 3 apples\n\n  x = ²"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the module's own: the user's is not touched."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path_factory.getbasetemp() / "draftsmith-gguf"))
    return cache_root()


def model(**changes):
    return tiny_target(vocab=320, intermediate_size=64, **changes).model


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizer) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model(), tokenizer)


def test_weights_tokenizer_and_end_are_those_of_the_file(file, tokenizer):
    target, read = TextTarget.load(file), load_tokenizer(file)
    want = dequantised(model())
    assert target.model.state_dict().keys() == want.keys()
    for key, value in target.model.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), want[key]), key
    assert encode_prompt(read, ASKED) == encode_prompt(tokenizer, ASKED)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert stop_ids(target, read) == {tokenizer.eos_token_id}
    assert target.weights == describe(file).weights == Weights(content_hash(file), "Q4_1")
    assert target.identity == {"target": str(file), "weights": content_hash(file)}


def test_what_is_kept_is_an_ordinary_directory(file):
    place = Path(locate(file))
    config = json.loads((place / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert {p.name for p in place.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "weights.json",
    }
    assert str(file.parent) not in "".join(p.read_text() for p in place.glob("*.json"))


def test_a_folder_and_a_renamed_copy_stand_for_the_same_target(file, tmp_path):
    """The content is the key: nothing is dequantised twice."""
    made = Path(locate(file)).stat().st_mtime_ns
    (tmp_path / "MODEL.GGUF").write_bytes(file.read_bytes())
    assert locate(tmp_path / "MODEL.GGUF") == locate(file.parent) == locate(file)
    assert Path(locate(file)).stat().st_mtime_ns == made


def test_another_content_under_the_same_name_is_another_target(tmp_path, tokenizer):
    one = write_gguf(tmp_path / "x.gguf", model(), tokenizer)
    first = locate(one)
    write_gguf(tmp_path / "x.gguf", model(seed=1), tokenizer)
    assert locate(one) != first


@pytest.mark.parametrize(("kind", "tied"), [("F32", True), ("Q8_0", False)])
def test_tied_heads_and_other_kinds(kind, tied, tmp_path, tokenizer):
    stored = model(tie_word_embeddings=tied)
    target = TextTarget.load(write_gguf(tmp_path / "x.gguf", stored, tokenizer, kind))
    assert target.weights.quantisation == kind and target.model.config.tie_word_embeddings == tied
    assert (target.head.weight is target.embedding) == tied
    want = dequantised(stored, kind)
    assert all(torch.equal(v.to(torch.bfloat16), want[k]) for k, v in target.model.state_dict().items())


def test_all_ids_that_end_a_turn_end_an_answer(tmp_path, tokenizer):
    file = write_gguf(tmp_path / "x.gguf", model(), tokenizer, metadata={"tokenizer.ggml.eot_token_id": 7})
    assert stop_ids(describe(file), load_tokenizer(file)) == {tokenizer.eos_token_id, 7}


def test_the_rope_of_llama_3_comes_from_its_divisors(tmp_path, tokenizer):
    """transformers leaves `rope_freqs.weight` out; the config that follows from it gives the model's frequencies."""
    rope = {**LLAMA3, "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    stored = model(rope_parameters=rope, head_dim=32, max_position_embeddings=131072)
    plain = 10000.0 ** -(torch.arange(16) / 16)
    factors = (plain / stored.model.rotary_emb.inv_freq).numpy()
    assert sorted(set(factors.round(2))) == pytest.approx([1, 1.96, 4.68, 8])
    file = write_gguf(tmp_path / "x.gguf", stored, tokenizer, extra={"rope_freqs.weight": factors})
    target = TextTarget.load(file)
    torch.testing.assert_close(target.body.rotary_emb.inv_freq, stored.model.rotary_emb.inv_freq)
    other = write_gguf(tmp_path / "y.gguf", stored, tokenizer, extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(UserError, match="found rope_freqs.weight of another form, expected those of Llama 3.1"):
        locate(other)


def test_digits_stand_alone_where_the_file_says_so(tmp_path, tokenizer):
    """`smollm` splits every digit off before GPT-2's rule: a blank before one stays by itself."""
    read = load_tokenizer(write_gguf(tmp_path / "x.gguf", model(), tokenizer, split="smollm"))
    split = lambda text: [piece for piece, _ in read.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]  # noqa: E731
    assert split("a 12 it's") == ["a", "Ġ", "1", "2", "Ġit", "'s"]


REFUSED = {
    "no GGUF at all": (lambda f, m, t: f.write_bytes(b"GGML" * 99), "found b'GGML' at the beginning of"),
    "half a file": (
        lambda f, m, t: f.write_bytes(write_gguf(f, m, t).read_bytes()[:-50000]),
        "cannot be read as GGUF",
    ),
    "a tensor too few": (
        lambda f, m, t: write_gguf(f, m, t, without="blk.3.attn_k.weight"),
        "model.layers.3.self_attn.k_proj.weight: missing",
    ),
    "a bias that the model has no place for": (
        lambda f, m, t: write_gguf(f, m, t, extra={"blk.0.attn_q.bias": np.ones(32)}),
        "without place are blk.0.attn_q.bias",
    ),
    "an unknown architecture": (
        lambda f, m, t: write_gguf(f, m, t, architecture="oracle"),
        "transformers cannot read it",
    ),
    "no tokenizer": (lambda f, m, t: write_gguf(f, m, None), "transformers cannot read it"),
    "a scaled rope": (
        lambda f, m, t: write_gguf(f, m, t, metadata={"llama.rope.scaling.type": "yarn"}),
        "llama.rope.scaling.type: found yarn, but this transformers reads rope_type default",
    ),
    "scaled logits": (
        lambda f, m, t: write_gguf(f, m, t, metadata={"llama.logit_scale": 0.25}),
        "llama.logit_scale: found 0.25, but this transformers reads logits_scaling None",
    ),
    "one of several parts": (
        lambda f, m, t: write_gguf(f, m, t, metadata={"split.count": 3}),
        "found one of 3 parts",
    ),
    "more tokens than rows": (
        lambda f, m, t: write_gguf(f, tiny_target(vocab=256, intermediate_size=64).model, t),
        "found 300 tokens, expected at most 256 (rows of the embedding)",
    ),
    "no file": (lambda f, m, t: None, "no such file, expected a GGUF file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_of_which_something_would_be_lost_is_refused(kind, tmp_path, tokenizer, cache):
    write, message = REFUSED[kind]
    before = {p.name for p in (cache / "targets").glob("*")}
    write(tmp_path / "x.gguf", model(), tokenizer)
    with pytest.raises(UserError) as caught:
        locate(tmp_path / "x.gguf")
    line = str(caught.value)
    assert message in line and line.startswith(f"target {tmp_path / 'x.gguf'}: ") and "\n" not in line, line
    left = {p.name for p in (cache / "targets").glob("*")} - before
    assert all(name.endswith(".lock") for name in left), left


def test_several_files_in_a_folder_and_a_name_without_a_file_are_refused(file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match="found 2 GGUF files \\(a.gguf, b.gguf\\), expected one"):
        locate(tmp_path)
    for name in ("hub:somebody/something", "hub:x.gguf", "hub:a/b/c.safetensors"):
        with pytest.raises(UserError, match="expected hub:USER/NAME/FILE.gguf"):
            locate(name)


def test_without_the_package_one_line_names_it(tmp_path, tokenizer, monkeypatch):
    file = write_gguf(tmp_path / "x.gguf", model(seed=3), tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="GGUF files need the package gguf, found none \\(pip install 'draftsmith"):
        locate(file)


def test_a_conversion_that_dies_leaves_nothing_and_the_next_one_clears_up(tmp_path, tokenizer, monkeypatch):
    """Killed between the weights and the tokenizer: there is no target; the next process makes it."""

    class Killed(BaseException):
        pass

    file = write_gguf(tmp_path / "x.gguf", model(seed=2), tokenizer)
    place = gguf.target_place(content_hash(file))
    left = place.parent / f".{place.name}-dead"
    left.mkdir(parents=True)
    (left / "half").write_text("")

    def dying(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(gguf, "save", dying)
        locate(file)
    assert not place.exists() and not left.exists()
    assert not [p for p in place.parent.glob(f".{place.name}-*")]
    check_checkpoint(locate(file), "tiny", TextTarget.load(file).config)
    assert place.is_dir()
