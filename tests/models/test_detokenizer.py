"""Text that comes piece by piece is the text of all tokens, and no character comes in parts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from draftsmith.models.detokenizer import Detokenizer
from draftsmith.train.reference.pretrain import train_tokenizer

TEXT = "naïve 😀 — 日本語, \ufffd! e\u0301 👩\u200d💻 end"


def byte_level():
    return train_tokenizer(["def add(a, b):\n    return a + b\n", "the quick brown fox"], 300)


def byte_fallback():
    """As SentencePiece models are converted: a few letters, and bytes for everything else."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abdefnï,!")
    model = BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token=None)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte-level": byte_level(), "byte fallback": byte_fallback()}


def streamed(tokenizer, groups):
    """(pieces, what is left) of groups of tokens."""
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(group) for group in groups], detokenizer.rest()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_that_span_tokens_come_whole(name):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(tokens) == TEXT and len(tokens) > len(TEXT)
    pieces, rest = streamed(tokenizer, [[token] for token in tokens])
    assert "".join(pieces) + rest == TEXT
    assert sum(piece.count("\ufffd") for piece in [*pieces, rest]) == 1  # the one that the text has
    said = [piece for piece in pieces if piece]
    assert len(said) > 20 if name == "byte-level" else len(said) > 5


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(st.lists(st.integers(0, 265), max_size=4), max_size=25))
def test_any_tokens_in_any_pieces_give_the_text_of_all(name, groups):
    """Also bytes that are no characters, of which random tokens mostly consist."""
    tokenizer = TOKENIZERS[name]
    pieces, rest = streamed(tokenizer, groups)
    assert "".join(pieces) + rest == tokenizer.decode([token for group in groups for token in group])


def test_a_broken_character_is_given_out_once_it_is_known_to_be_one():
    tokenizer = TOKENIZERS["byte fallback"]
    half, letter = tokenizer.convert_tokens_to_ids(["<0xE2>", "a"])
    pieces, rest = streamed(tokenizer, [[letter], [half], [half], [letter], [half]])
    assert (pieces, rest) == (["a", "", "", "\ufffd\ufffda", ""], "\ufffd")
