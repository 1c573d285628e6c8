"""`draftsmith generate`: answers a prompt, or chats, and shows what every pass of the target emitted: text as it comes,
a new colour with every pass; then the acceptance length, and plain decoding of the same prompt beside it.

The text goes to the standard output, everything else to the standard error. Colours are for terminals only.
"""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType, Segment, Segments
from rich.style import Style
from transformers.utils import logging

from draftsmith.eval.decode import Trace
from draftsmith.eval.lossless import dtype_of
from draftsmith.eval.measurement.measure import Decoder, Looped, divergences
from draftsmith.eval.report.palette import colour_of_pass
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.conversation import COMMANDS, Conversation, chat
from draftsmith.launch.drafters import ACCELERATOR_TREE, CPU_TREE, grows, shaped
from draftsmith.launch.methods import ASSISTANT, Methods, labels
from draftsmith.models.detokenizer import Detokenizer
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import parse_tree
from draftsmith.models.pictures import open_pictures

COMPARED = 64  # tokens of a chat's answers that plain decoding repeats
WARM_UP = 8  # tokens
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {code: "\ufffd" for code in range(0x7F, 0xA0)}


@dataclass(frozen=True)
class Request:
    """What `draftsmith generate` was asked. prompt: None = what stands on the standard input, or a chat where that is a
    terminal. tree: None = `CPU_TREE` or, on an accelerator, `ACCELERATOR_TREE`; variables: of the chat template.
    """

    method: str
    prompt: str | None = None
    target: str | None = None
    assistant: str = ASSISTANT
    tree: str | None = None
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    system: str | None = None
    images: tuple[Path, ...] = ()
    compare: bool = True
    dtype: str | None = None
    datastore: str | None = None
    variables: Mapping = field(default_factory=dict)


class Passes:
    """Hears what every pass of one answer emits (`eval.decode.Emit`), the prompt's own first. show(text, number of the
    pass) gets the text, without stop tokens, as soon as its characters are complete. seconds: from the end of the
    prompt's pass on, those of `show` left out.
    """

    def __init__(self, tokenizer, stops: set[int], show: Callable[[str, int], None] = lambda text, number: None):
        self.emitted, self.seconds, self.text, self.stopped = [], 0.0, "", False
        self.detokenizer, self.stops, self.show = Detokenizer(tokenizer), stops, show

    def __call__(self, request: int, tokens: list[int]) -> None:
        if self.emitted:
            self.seconds += time.perf_counter() - self.resumed
        self.emitted.append(tokens)
        self._say(self.detokenizer.push([token for token in tokens if token not in self.stops]))
        self.resumed = time.perf_counter()

    def end(self) -> None:
        """Says what was held back."""
        self._say(self.detokenizer.rest())

    def _say(self, piece: str) -> None:
        self.text += piece
        if piece:
            self.show(piece, len(self.emitted) - 1)

    @property
    def tokens(self) -> list[int]:
        return [token for tokens in self.emitted for token in tokens]

    @property
    def passes(self) -> int:
        """Verify passes: without the prompt's own."""
        return max(0, len(self.emitted) - 1)

    @property
    def verified(self) -> int:
        """The tokens that these emitted."""
        return sum(map(len, self.emitted[1:]))

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.verified / self.seconds


class Responder:
    """A method that answers prompts, and plain decoding beside it. Every answer draws the same keyed noise, whatever
    was answered before.
    """

    def __init__(self, methods: Methods, decoder: Decoder, sampling: Sampling, max_new_tokens: int):
        self.methods, self.decoder, self.sampling, self.max_new_tokens = methods, decoder, sampling, max_new_tokens
        self.plain = Looped(methods.target, NoDrafter())

    @property
    def room(self) -> int:
        """Tokens that a prompt may take."""
        rows = self.decoder.drafter.size if isinstance(self.decoder, Looped) else 1
        return self.methods.target.context_length - self.max_new_tokens - rows

    @property
    def comparable(self) -> bool:
        """Some methods sample by other random numbers: their texts follow the same law and are not the same."""
        return self.sampling.temperature == 0 or self.decoder.keyed

    def answer(self, prompt: list[int], show=lambda text, number: None) -> Passes:
        """Ctrl-C stops it: what was said until then is the answer."""
        return self._decode(self.decoder, prompt, self.max_new_tokens, show)

    def again(self, prompt: list[int], count: int) -> Passes:
        """The first `count` tokens by plain decoding."""
        return self._decode(self.plain, prompt, count)

    def _decode(self, decoder, prompt, count, show=lambda text, number: None) -> Passes:
        passes = Passes(self.methods.tokenizer, self.methods.stops, show)
        try:
            decoder([prompt], [0], self.sampling, count, self.methods.stops, passes)
        except KeyboardInterrupt:
            passes.stopped = True
        passes.end()
        return passes

    def warm_up(self) -> None:
        """The first passes of a process are slow: they count for nobody."""
        prompt, _ = Conversation(self.methods.renderer, self.room).prompt("Hi")
        for decoder in (self.decoder, self.plain):
            decoder([prompt], [0], self.sampling, WARM_UP, self.methods.stops)

    def difference(self, prompt: list[int], found: list[int], plain: list[int]) -> dict | None:
        """None where `found` is what plain decoding gave; else as in `measure.divergences`, with the margin there."""
        if found == plain:
            return None
        decode = Looped(self.methods.target, NoDrafter(), margins=True)
        (trace,), _ = decode([prompt], [0], self.sampling, len(found), self.methods.stops)
        return next(iter(divergences([trace], [Trace(found)])), None)


class Screen:
    """Where text and notes go."""

    def __init__(self):
        settings = dict(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.text, self.notes = Console(**settings), Console(stderr=True, **settings)

    def show(self, text: str, number: int) -> None:
        """On a terminal coloured, and without control characters, which a text must not send there."""
        if self.text.is_terminal:
            style, lines = Style(color="#000000", bgcolor=colour_of_pass(number)), text.translate(CONTROLS).split("\n")
            parts = [Segment(lines[0], style)]
            for line in lines[1:]:  # a colour across a line's end would fill the line
                parts += [Segment("\n"), Segment(line, style)]
            self.text.print(Segments(parts), end="")
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, line: str, style: str = "dim") -> None:
        self.notes.print(line, style=style)

    @contextmanager
    def during(self, line: str):
        """A note that stands only meanwhile; on terminals alone."""
        if self.notes.is_terminal:
            self.notes.print(line, style="dim", end="")
        try:
            yield
        finally:
            if self.notes.is_terminal:
                self.notes.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))

    def read(self) -> str:
        """A message of the user; a line that ends in a backslash goes on in the next."""
        lines = [self._line("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("  "))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.text.is_terminal:
            return input(prompt)
        self.notes.print(prompt, end="")
        return input()


def generate(request: Request) -> None:
    """Raises UserError for what cannot be done before anything is loaded, SystemExit(130) where Ctrl-C ended the answer
    to a single prompt.
    """
    screen = Screen()
    ((name, method),) = labels([request.method]).items()
    if request.tree is not None and not grows(method):
        raise UserError(f"--tree: found {request.tree}, expected none: {method} drafts no tree of a given shape")
    tree, dtype = request.tree and parse_tree(request.tree), request.dtype and dtype_of(request.dtype)
    sampling = Sampling(request.temperature, seed=request.seed)
    open_pictures(request.images)
    prompt = request.prompt if request.prompt is not None or sys.stdin.isatty() else piped()
    if prompt is not None and not prompt.strip():
        raise UserError("prompt: found nothing, expected text")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the library's remarks would stand in the text
    with screen.during(f"loading {request.method} ..."):
        methods = Methods.open(
            [request.method],
            request.target,
            request.assistant,
            dtype,
            screen.note,
            request.datastore,
            request.variables,
        )
        if tree is None and grows(method) and not shaped(method):
            tree = CPU_TREE if methods.target.device.type == "cpu" else ACCELERATOR_TREE
        responder = Responder(methods, methods.decoder(name, tree), sampling, request.max_new_tokens)
        conversation = Conversation(methods.renderer, responder.room, request.system, request.images)
        responder.warm_up()
    title = f"{name}, {tree}" if tree else name
    compare = request.compare and method != "plain"

    def answer(text: str, compared: int) -> Passes:
        tokens, dropped = conversation.prompt(text)
        for line in conversation.renderer.passed_over():
            screen.note(line)
        if dropped:
            screen.note(f"the oldest {counted(dropped, 'turn')} left out: the context takes {responder.room} tokens")
        passes = responder.answer(tokens, screen.show)
        if passes.text:
            conversation.add(passes.text)
        if not passes.text.endswith("\n"):
            print(flush=True)
        tell(screen, responder, title, tokens, passes, compared if compare else 0)
        return passes

    if prompt is None:
        screen.note(f"{title} drafts for {methods.target.name}; {COMMANDS}")
        with suppress(ImportError):  # with it `input` edits and remembers lines, and takes pasted ones together
            import_module("readline").parse_and_bind("set enable-bracketed-paste on")
        chat(conversation, lambda text: answer(text, COMPARED), screen.read, screen.note)
        return
    if answer(prompt, request.max_new_tokens).stopped:
        raise SystemExit(130)


def tell(screen: Screen, responder: Responder, title: str, prompt: list[int], passes: Passes, compared: int) -> None:
    """The figures of an answer, and those of plain decoding for its first `compared` tokens (0: none)."""
    if not passes.verified:
        return screen.note(f"{'stopped before' if passes.stopped else 'ended with'} the first token")
    legend = " (a colour each)" if screen.text.is_terminal and screen.text.color_system else ""
    how = f"{passes.verified} tokens / {passes.passes} passes{legend}, {passes.rate:.1f} tokens/s"
    end = ", stopped" if passes.stopped else ""
    if len(passes.tokens) == responder.max_new_tokens and passes.tokens[-1] not in responder.methods.stops:
        end = f", cut at --max-new-tokens {responder.max_new_tokens}"
    screen.note(f"tau {passes.verified / passes.passes:.2f} = {how} ({title}{end})")
    if passes.stopped or not compared:
        return
    with screen.during("plain decoding beside it (Ctrl-C skips it) ..."):
        plain = responder.again(prompt, min(len(passes.tokens), compared))
    if plain.stopped or not plain.verified:
        return screen.note("plain decoding: skipped")
    part = f" (of the first {len(plain.tokens)} tokens)" if len(plain.tokens) < len(passes.tokens) else ""
    line = f"plain decoding: {plain.rate:.1f} tokens/s{part}, so {passes.rate / plain.rate:.2f}x"
    verdict, style = judge(responder, prompt, passes.tokens[: len(plain.tokens)], plain.tokens)
    screen.note(f"{line}; {verdict}", style)


def judge(responder: Responder, prompt: list[int], found: list[int], plain: list[int]) -> tuple[str, str]:
    """What to say of the two texts, and in which style."""
    if not responder.comparable:
        return "this method draws its own random numbers, so that sampled texts differ", "dim"
    difference = responder.difference(prompt, found, plain)
    if difference is None:
        return "the text is identical", "green"
    where = f"from token {difference['token'] + 1} on"
    if difference["margin"] is not None:
        where += f", where the two best scores are {difference['margin']:.1e} apart"
    if difference["tolerated"]:
        return f"the text differs {where}: a near-tie", "yellow"
    dtype = str(responder.methods.target.dtype).removeprefix("torch.")
    if dtype != "float32":
        return f"the text differs {where}: identity is claimed in fp32, this is {dtype}", "yellow"
    return f"the text is NOT identical: it differs {where}", "bold red"


def piped() -> str:
    """The prompt on the standard input."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 ({error.reason} at byte {error.start})") from None


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
