"""What Hugging Face `generate` reaches on the same target and prompts: plain, prompt lookup, and assisted by a small
draft model.

Counted as in `decode`: the pass over the prompt and what it emits belong to neither tokens nor passes, and the seconds
start when it has ended. (The assisted loops already draft before that pass; these drafts are left out with it.) Sampled
texts come from the library's own random numbers: they follow the same law as ours and are not the same texts.
"""

import hashlib
import time

import torch
from transformers.generation.streamers import BaseStreamer

from draftsmith.eval.decode import Emit, Trace, cut
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


class Stopwatch:
    """Forwards of a model while it is entered: (start, end, tokens a row, the thread's own seconds at the end) of each,
    devices synchronised.
    """

    def __init__(self, model):
        self.model, self.forwards = model, []
        device = next(model.parameters()).device
        self.sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def __enter__(self):
        def before(_module, inputs, options):
            ids = options.get("input_ids", inputs[0] if inputs else None)
            self.sync()
            self.forwards.append([time.perf_counter(), 0.0, ids.size(1), 0.0])

        def after(_module, _inputs, _output):
            self.sync()
            self.forwards[-1][1], self.forwards[-1][3] = time.perf_counter(), time.thread_time()

        self.hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


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
        """Traces and seconds {"draft", "verify", "overhead", "total"} (on a CPU also the thread's own: {"busy":
        {"total"}}); `draft` counts the assistant's forwards only.
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
        with Stopwatch(self.target.model) as verifying, drafting or torch.no_grad():
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
            ended, ran = time.perf_counter(), time.thread_time()
        _, began, _, busy = verifying.forwards[0]
        seconds = {
            "draft": sum(end - start for start, end, *_ in drafting.forwards if start > began) if drafting else 0.0,
            "verify": sum(end - start for start, end, *_ in verifying.forwards[1:]),
            "total": ended - began,
        }
        seconds["overhead"] = seconds["total"] - seconds["verify"] - seconds["draft"]
        if device.type == "cpu":
            seconds["busy"] = {"total": ran - busy}
        if emissions:
            emissions.trace.drafted = [rows - 1 for _, _, rows, _ in verifying.forwards[1:]]
            return [emissions.trace], seconds
        return [plain_trace(text, stops) for text in texts], seconds


def plain_trace(text: list[int], stops: set[int]) -> Trace:
    """One token a pass; padding behind the end is cut off."""
    tokens = cut(text, len(text), stops)
    passes = len(tokens) - 1
    return Trace(tokens, [0] * passes, [0] * passes, [1] * passes)
