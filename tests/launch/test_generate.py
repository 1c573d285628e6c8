"""`draftsmith generate`: the text that is shown is the target's, whoever drafts it; what passes emitted, chats, a
terminal, and bad input.
"""

import io
import re
import sys

import pytest
import torch

from draftsmith.eval import decode
from draftsmith.eval.report.palette import colour_of_pass
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification import verifier
from draftsmith.launch import generate
from draftsmith.launch.cli import main
from draftsmith.launch.conversation import Conversation
from draftsmith.launch.generate import Passes, Responder, Screen, judge
from draftsmith.launch.methods import Methods
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.models.grow import DynamicTree
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.targets import TextTarget
from tests.conftest import tiny_target, trained_head
from tests.eval.measurement.test_measure import match_wrongly
from tests.launch.test_eval_errors import fails

NEW = 24
METHODS = ("{drafter}", "mine={drafter}", "howl:{drafter}", "suffix", "lookup", "plain", "hf-generate", "hf-lookup")
METHODS += ("hf-assisted",)
PROMPT = "def add(a):\n    return 😀"


@pytest.fixture(scope="module")
def place(folder, tokenizer):
    """`folder` with a drafter and an assistant. The target is random and its tokens mostly bytes: most of its text is
    no whole character.
    """
    target = TextTarget.load(folder / "target")
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": PROMPT}])
    save_drafter(trained_head(target, prompts=[prompt]), folder / "drafter", {"target": str(folder / "target")})
    tiny_target(2, vocab=300).model.save_pretrained(folder / "small")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """run(method, ..., typed=None) -> (standard output, standard error); typed: lines on a terminal's input."""

    def run(method, *arguments, typed=None):
        method = method.format(drafter=place / "drafter")
        monkeypatch.setattr(sys, "stdin", Keyboard(typed))
        options = ["--max-new-tokens", NEW, "--target", place / "target", "--assistant", place / "small"]
        monkeypatch.setattr(sys, "argv", ["draftsmith", "generate", *map(str, (method, *arguments, *options))])
        capsys.readouterr()
        main()
        return capsys.readouterr()

    return run


class Keyboard(io.StringIO):
    """A terminal's input; None in the place of a line is Ctrl-C."""

    def __init__(self, lines):
        super().__init__()
        self.lines = list(lines or [])

    def isatty(self):
        return True

    def readline(self, *_):
        line = self.lines.pop(0) if self.lines else ""
        if line is None:
            raise KeyboardInterrupt
        return line + "\n" if line else ""


@pytest.fixture(scope="module")
def plain(place, tokenizer):
    """plain(messages, sampling) -> the text of plain decoding."""
    target = TextTarget.load(place / "target")

    def plain(messages, sampling=Sampling()):
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        prompt = encode_prompt(tokenizer, messages)
        (trace,) = decode.generate(target, NoDrafter(), [prompt], sampling, NEW, {2})
        return tokenizer.decode([token for token in trace.tokens if token != 2])

    return plain


@pytest.mark.parametrize("method", METHODS)
def test_every_method_shows_the_text_of_plain_decoding(run, plain, method):
    shown = run(method, PROMPT)
    assert shown.out.removesuffix("\n") == plain(PROMPT).removesuffix("\n") and len(shown.out) > NEW / 2
    assert "\ufffd" in shown.out and "\x1b" not in shown.err
    tau, compared = re.search(r"^tau (\d+\.\d\d) = ", shown.err, re.M), "the text is identical" in shown.err
    assert tau and compared == (method != "plain")
    if method in ("plain", "hf-generate"):
        assert float(tau[1]) == 1
    if "{drafter}" in method:
        assert float(tau[1]) > 1


@pytest.mark.parametrize("method", ["{drafter}", "howl:{drafter}", "suffix"])
def test_sampled_texts_are_those_of_plain_sampling_with_the_same_seed(run, plain, method):
    shown = run(method, PROMPT, "--temperature", 0.7, "--seed", 5)
    assert shown.out.removesuffix("\n") == plain(PROMPT, Sampling(0.7, seed=5)).removesuffix("\n")
    assert shown.out != run(method, PROMPT, "--temperature", 0.7, "--seed", 6, "--no-compare").out


def test_what_the_library_samples_is_not_compared(run):
    assert "own random numbers" in run("hf-generate", PROMPT, "--temperature", 0.7).err


def test_what_is_piped_in_is_one_prompt(run, plain, monkeypatch):
    monkeypatch.setattr(Keyboard, "isatty", lambda self: False)
    monkeypatch.setattr(Keyboard, "read", lambda self: PROMPT + "\n", raising=False)
    assert run("lookup", "--no-compare").out.removesuffix("\n") == plain(PROMPT).removesuffix("\n")


def test_a_chat_is_prompting_with_its_history(run, plain, monkeypatch):
    monkeypatch.setattr(generate, "COMPARED", 8)
    shown = run("{drafter}", "--system", "brief", typed=["one\\", "two", "  ", "three", "/reset", "/help", "three"])
    before = [{"role": "system", "content": "brief"}]
    first = [*before, {"role": "user", "content": "one\ntwo"}]
    second = [*first, {"role": "assistant", "content": plain(first)}, {"role": "user", "content": "three"}]
    alone = [*before, {"role": "user", "content": "three"}]
    texts = [plain(messages) for messages in (first, second, alone)]
    assert len(set(texts)) == 3
    assert shown.out == "".join(text if text.endswith("\n") else text + "\n" for text in texts)
    assert shown.err.count("the text is identical") == shown.err.count("(of the first 8 tokens)") == 3
    assert "forgotten" in shown.err and "no such command: /help" in shown.err


def test_a_chat_goes_on_behind_ctrl_c_and_prompts_that_do_not_fit(run, plain):
    shown = run("lookup", "--no-compare", typed=[None, "x" * 400, "one", "/exit", "two"])
    assert shown.out.removesuffix("\n") == plain("one").removesuffix("\n")
    assert shown.err.count("Ctrl-D leaves") == 2  # told at the start and behind Ctrl-C
    assert len(re.findall(r"error: prompt: found 4\d\d tokens, expected at most 221 ", shown.err)) == 1


def test_the_oldest_turns_are_left_out_where_the_context_ends(tokenizer):
    def count(*texts):
        roles = ["user", "assistant"] * len(texts)
        return len(encode_prompt(tokenizer, [{"role": r, "content": t} for r, t in zip(roles, texts)]))

    talk = Conversation(tokenizer, count("b", "B", "c", "C", "d"))
    for text, dropped in (("a", 0), ("b", 0), ("c", 0), ("d", 1)):
        tokens, left = talk.prompt(text)
        assert left == dropped and len(tokens) <= talk.room
        talk.add(text.upper())
    with pytest.raises(UserError, match="prompt: found 9[0-9] tokens, expected at most"):
        talk.prompt("x" * 90)
    assert [[m["content"] for m in turn] for turn in talk.turns] == [["b", "B"], ["c", "C"], ["d", "D"]]
    kept = [m for turn in talk.turns[1:] for m in turn]
    assert talk.prompt("e") == (encode_prompt(tokenizer, [*kept, {"role": "user", "content": "e"}]), 1)


@pytest.fixture
def responder(place):
    """responder(dtype) over the trained drafter."""

    def open_(dtype=None):
        methods = Methods.open([f"drafter={place / 'drafter'}"], None, "", dtype)
        return Responder(methods, methods.decoder("drafter", DynamicTree(3, 4, 10)), Sampling(), NEW)

    return open_


def test_ctrl_c_stops_an_answer_and_what_was_said_is_kept(responder, tokenizer):
    one, prompt = responder(), encode_prompt(tokenizer, [{"role": "user", "content": PROMPT}])
    whole, said, pressed = one.answer(prompt), [], []

    def show(text, number):
        said.append(text)
        if number >= 3 and not pressed:
            pressed.append(number)
            raise KeyboardInterrupt

    stopped = one.answer(prompt, show)
    assert stopped.stopped and not whole.stopped and len(stopped.emitted) >= 4
    assert stopped.emitted == whole.emitted[: len(stopped.emitted)] and stopped.text == "".join(said)
    assert whole.text.startswith(stopped.text) and one.again(prompt, NEW).tokens == whole.tokens


def test_ctrl_c_ends_a_single_prompt_with_its_figures_and_code_130(run, plain, capsys, monkeypatch):
    show, calls = Screen.show, []

    def pressed(screen, text, number):
        show(screen, text, number)
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "show", pressed)
    with pytest.raises(SystemExit) as end:
        run("{drafter}", PROMPT)
    shown = capsys.readouterr()
    assert end.value.code == 130 and ", stopped)" in shown.err and "plain decoding" not in shown.err
    assert plain(PROMPT).startswith(shown.out.removesuffix("\n")) and shown.out


def test_a_terminal_gets_a_colour_for_every_pass_and_no_control_characters(monkeypatch, capsys, tokenizer):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    passes = Passes(tokenizer, {2}, Screen().show)
    texts = ["a\n", "é", "\x1b[2J", "x" * 300, "\t\r"]
    for text in texts:
        passes(0, tokenizer.encode(text, add_special_tokens=False))
    passes.end()
    out = capsys.readouterr().out
    found = re.findall(r"\x1b\[38;2;0;0;0;48;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m", out, re.S)
    assert [f"#{int(r):02X}{int(g):02X}{int(b):02X}" for r, g, b, _ in found] == [colour_of_pass(n) for n in range(5)]
    assert [text for *_, text in found] == ["a", "é", "␛[2J", "x" * 300, "\t␍"]  # no colour across a line's end
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == "a\né␛[2J" + "x" * 300 + "\t␍"


def test_passes_count_what_the_target_verified(tokenizer):
    passes = Passes(tokenizer, {2})
    for tokens in ([65], [66, 67, 68], [69, 2]):
        passes(0, tokens)
    assert (passes.passes, passes.verified, passes.tokens) == (2, 5, [65, 66, 67, 68, 69, 2])
    assert passes.text == tokenizer.decode([65, 66, 67, 68, 69]) and passes.rate > 0


def test_a_lossy_method_is_found_out(run, monkeypatch):
    monkeypatch.setattr(verifier, "follow", match_wrongly)
    assert "the text is NOT identical: it differs from token " in run("{drafter}", PROMPT).err


def test_identity_is_claimed_in_fp32_only(responder, tokenizer):
    one, prompt = responder(torch.bfloat16), encode_prompt(tokenizer, [{"role": "user", "content": PROMPT}])
    plain = one.again(prompt, NEW).tokens
    assert judge(one, prompt, plain, plain) == ("the text is identical", "green")
    found, style = judge(one, prompt, [*plain[:5], (plain[5] + 1) % 300], plain[:6])
    assert "differs from token 6 on" in found and "claimed in fp32, this is bfloat16" in found and style == "yellow"


ERRORS = {
    "a tree for what grows none": (
        ["lookup", "hi", "--tree", "chain:3"],
        "--tree: found chain:3, expected none: lookup drafts no tree of a given shape",
    ),
    "a tree that is none": (["{drafter}", "hi", "--tree", "oak"], "tree: found 'oak', expected chain:DEPTH"),
    "an unknown dtype": (["{drafter}", "hi", "--dtype", "int3"], "dtype: found int3, expected fp32, bf16 or fp16"),
    "no temperature": (["{drafter}", "hi", "--temperature", "nan"], "temperature=nan"),
    "an empty prompt": (["{drafter}", " "], "prompt: found nothing, expected text"),
    "no drafter there": (["/none", "hi"], "/none: no such directory"),
    "nothing that names a target": (["suffix", "hi"], "methods: found no drafter among suffix, expected one that"),
    "howl over nothing": (["howl", "hi"], "howl: found no drafter behind it, expected howl:DRAFTER"),
    "too long": (["{drafter}", "x" * 400], "tokens, expected at most -10 (the target's context without"),
    "no picture": (["{drafter}", "hi", "--image", "/none.png"], "/none.png: no such file, expected a picture"),
    "a picture for a target that does not see": (
        ["{drafter}", "hi", "--image", "{picture}"],
        "picture.png, expected text alone: this target does not see",
    ),
    "no method": ([], "Missing argument"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(place, tmp_path, arguments, message, capsys, monkeypatch):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    words = [a.format(drafter=place / "drafter", picture=tmp_path / "picture.png") for a in arguments]
    assert message in fails(["generate", *words], capsys, monkeypatch)
