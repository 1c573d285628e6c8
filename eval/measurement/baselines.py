"""What Hugging Face `generate` reaches on the same target and prompts: plain, prompt lookup, and assisted by a small
draft model.

Counted as in `decode`: the pass over the prompt and what it emits belong to neither tokens nor passes, and the seconds
start when it has ended. (The assisted loops already draft before that pass; these drafts are left out with it.) Sampled
texts come from the library's own random numbers: they follow the same law as ours and are not the same texts.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from draftsmith.eval.decode import Emit, Pass, Trace, cut, undisturbed
from draftsmith.eval.sampling import Sampling
from draftsmith.models.errors import UserError
from draftsmith.models.targets import TextTarget


class Emissions(BaseStreamer):
    """The trace of one request, from the tokens that each pass of `generate` hands out: the prompt comes first and is
    dropped, then what the pass over it emitted. `drafted` is not known here.
    """

    def __init__(self, request: int, max_new_tokens: int, stops: set[int], emit: Emit | None = None):
        self.request, self.max_new_tokens, self.stops, self.emit = request, max_new_tokens, stops, emit
        self.trace, self.calls = Trace(), 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 1:
            return
        tokens, trace = value.flatten().tolist(), self.trace
        kept = cut(tokens, self.max_new_tokens - len(trace.tokens), self.stops)
        trace.tokens += kept
        if self.calls > 2:
            trace.accepted.append(len(tokens) - 1)
            trace.emitted.append(len(kept))
        if self.emit:
            self.emit(self.request, kept)

    def end(self) -> None:
        pass


class Forward(NamedTuple):
    """(wall, the thread's own) seconds at its start and end, and tokens a row."""

    start: tuple[float, float]
    end: tuple[float, float]
    rows: int


class Stopwatch:
    """Forwards of a model while it is entered, devices synchronised."""

    def __init__(self, model):
        self.model, self.forwards = model, []
        self.now = lambda: (time.perf_counter(), time.thread_time())
        device = next(model.parameters()).device
        self.sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def __enter__(self):
        def before(_module, inputs, options):
            ids = options.get("input_ids", inputs[0] if inputs else None)
            self.sync()
            self.began = self.now(), ids.size(1)

        def after(_module, _inputs, _output):
            self.sync()
            start, rows = self.began
            self.forwards.append(Forward(start, self.now(), rows))

        self.hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


DRAFTING = (  # of a generation config: how an assistant drafts, which changes no law
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)


@contextmanager
def clean(*models) -> Iterator[None]:
    """Without the decoding rules of the models' own generation configs, which `generate` takes for whatever a call does
    not say: all methods decode by one law.
    """
    own = [model.generation_config for model in models]
    for model in models:
        model.generation_config = GenerationConfig(**{key: getattr(model.generation_config, key) for key in DRAFTING})
    try:
        yield
    finally:
        for model, config in zip(models, own):
            model.generation_config = config


class Generate:
    """`model.generate` as a decoder of `measure.interleaved`. options are passed on; assistant is a draft model with
    the target's tokenizer.
    """

    keyed = False

    def __init__(self, target: TextTarget, assistant: TextTarget | None = None, **options):
        if assistant is not None and assistant.vocab_size != target.vocab_size:
            raise UserError(
                f"assistant {assistant.name}: vocab_size: found {assistant.vocab_size}, expected the target's "
                f"{target.vocab_size}"
            )
        drafted = assistant is not None or options
        if drafted and (target.stateful or (assistant is not None and assistant.stateful)):
            raise UserError(
                f"target {target.name}: found layers with a state, which the loops of transformers cannot take back; "
                f"expected a method of ours, such as lookup"
            )
        self.target, self.assistant = target, assistant
        self.options = options if assistant is None else {"assistant_model": assistant.model, **options}
        self.one_at_a_time = bool(self.options)  # the library refuses batches with a draft

    @torch.inference_mode()
    def __call__(
        self,
        prompts: list[list[int]],
        requests: list[int],
        sampling: Sampling,
        max_new_tokens: int,
        stops: set[int],
        emit: Emit | None = None,
    ):
        """Traces and seconds {"draft", "verify", "overhead", "total", "begin", "passes"} (on a CPU also the thread's
        own: {"busy": {"total"}}); `draft` counts the assistant's forwards only.
        """
        width, device = max(map(len, prompts)), self.target.device
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        torch.manual_seed(
            int.from_bytes(hashlib.blake2b(f"{sampling.seed}/{requests}".encode(), digest_size=7).digest(), "big")
        )
        law = (
            {"do_sample": False}
            if sampling.temperature == 0
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        )
        single = self.one_at_a_time or emit is not None  # the library streams single requests only
        emissions = Emissions(requests[0], max_new_tokens, stops, emit) if single else None
        drafting = Stopwatch(self.assistant.model) if self.assistant else None
        models = [self.target.model] + ([self.assistant.model] if self.assistant else [])
        with clean(*models), Stopwatch(self.target.model) as verifying, drafting or torch.no_grad():
            texts = self.target.model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stops) or None,
                pad_token_id=0,
                use_cache=True,
                repetition_penalty=sampling.repetition_penalty,
                streamer=emissions,
                **law,
                **self.options,
            )[:, width:].tolist()
            verifying.sync()
            ended = verifying.now()
        first, *behind = verifying.forwards
        drafts = [forward for forward in drafting.forwards if forward.start > first.end] if drafting else []
        spent = lambda forwards: sum(forward.end[0] - forward.start[0] for forward in forwards)  # noqa: E731
        seconds = {"draft": spent(drafts), "verify": spent(behind), "total": ended[0] - first.end[0]}
        seconds["overhead"] = seconds["total"] - seconds["verify"] - seconds["draft"]
        if device.type == "cpu":
            seconds["busy"] = {"total": ended[1] - first.end[1]}
        if emissions:
            emissions.trace.drafted = [forward.rows - 1 for forward in behind]
            traces = [emissions.trace]
        else:
            traces = [plain_trace(text, stops) for text in texts]
        own = int(undisturbed(device))  # the times of the passes: as in `Clock`
        longest = max(traces, key=lambda trace: len(trace.emitted)).emitted
        lengths = accumulate(longest, initial=width)
        seconds["begin"] = 0.0
        seconds["passes"] = passes(verifying.forwards, drafts, ended, own, len(prompts), list(lengths))
        return traces, seconds


def passes(
    forwards: list[Forward], drafts: list[Forward], ended: tuple[float, float], own: int, rows: int, lengths: list[int]
) -> list[Pass]:
    """The target's forwards behind the first, each from the end of the one before; what follows the last is its own.
    own: which of the two times.
    """
    found = []
    for before, forward, length in zip(forwards, forwards[1:], lengths):
        until = ended if forward is forwards[-1] else forward.end
        among = [draft for draft in drafts if before.end < draft.start < forward.start]
        verify, draft = (sum(f.end[own] - f.start[own] for f in some) for some in ([forward], among))
        overhead = until[own] - before.end[own] - verify - draft
        found.append(Pass(rows, forward.rows, forward.rows - 1, length, draft, verify, overhead))
    return found


def plain_trace(text: list[int], stops: set[int]) -> Trace:
    """One token a pass; padding behind the end is cut off."""
    tokens = cut(text, len(text), stops)
    passes = len(tokens) - 1
    return Trace(tokens, [0] * passes, [0] * passes, [1] * passes)
