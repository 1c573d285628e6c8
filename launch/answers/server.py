"""Answers by a server that speaks OpenAI's completions protocol: vLLM, SGLang, llama.cpp and what is built like them.

Prompts are sent as token ids, or as text where a server takes no ids and its own tokenizer finds the same ones. Ids
come back where a server gives them (vLLM, SGLang). Elsewhere only the text does: its ids are known when encoding it
gives back the very text and as many tokens as the server counted.
"""

import os
import queue
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from draftsmith.eval.decode import cut
from draftsmith.launch.answers.answer import Answer
from draftsmith.models.errors import UserError
from draftsmith.models.noise import seed_of

# What would make the law another one than the target's at this temperature. All of it is sent: vLLM takes what is
# missing from the model's generation_config.json, llama.cpp has defaults of its own. Servers ignore unknown keys.
NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repeat_penalty": 1.0,  # llama.cpp's name
    "samplers": ["temperature"],  # llama.cpp: nothing else takes part
}
BUSY = {408, 409, 425, 429, 500, 502, 503, 504}  # answers that another try may better
LONGEST_WAIT = 30.0  # seconds between two tries
TRIES, FIRST_TRIES = 12, 3  # about three minutes; for the first word to a server


@dataclass(frozen=True)
class Completion:
    """prompt_tokens, prompt_ids: what the server read, where it says so. tokens: None where it gives only the text."""

    text: str
    tokens: list[int] | None
    finished: bool
    stop: int | None
    count: int | None
    prompt_tokens: int | None
    prompt_ids: list[int] | None


class Server:
    """One model of a server. Raises UserError where the server cannot be reached, or serves several models none of
    which has the target's name. The key is OPENAI_API_KEY, where it is set.
    """

    def __init__(self, url: str, target: str, tokenizer, stops: set[int], seed: int):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer, self.stops, self.seed = tokenizer, stops, seed
        self.closed, self.as_text, self.tries = threading.Event(), False, FIRST_TRIES
        key = os.environ.get("OPENAI_API_KEY")
        try:
            self.client = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(900, connect=10),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            )
            found = self._ask("GET", "/v1/models").get("data") or []
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"server {url}: {error}; expected http://HOST:PORT") from None
        fitting = [m for m in found if target in (m.get("id"), m.get("root"))] or found
        if len(fitting) != 1:
            names = ", ".join(str(m.get("id")) for m in found) or "none"
            raise UserError(f"server {self.url}: found the models {names}, expected one, or one of the name {target}")
        self.model, self.context = fitting[0]["id"], fitting[0].get("max_model_len")
        self.tries = TRIES

    def answer(self, row: int, prompt: list[int], temperature: float, max_new_tokens: int) -> Answer:
        """Raises UserError where the server reads another prompt, or ends without a reason that we know."""
        found = self.complete(prompt, temperature, max_new_tokens, seed_of(self.seed, row) % 2**31)
        if found.prompt_tokens not in (None, len(prompt)):
            raise UserError(
                f"server {self.url}: read prompt {row} as {found.prompt_tokens} tokens, expected {len(prompt)}"
            )
        tokens = self.tokens_of(found, max_new_tokens)
        if tokens:
            answer = Answer.of(row, tokens, self.tokenizer, self.stops, self.model)
        else:
            answer = Answer(row, None, found.text, found.count or 0, found.finished, self.model)
        if not answer.finished and not found.finished and answer.count < max_new_tokens and found.count is not None:
            raise UserError(
                f"server {self.url}: cut the answer to prompt {row} off after {answer.count} tokens, expected "
                f"{max_new_tokens} (is its context too short?)"
            )
        return answer

    def complete(self, prompt: list[int] | str, temperature: float, max_new_tokens: int, seed: int = 0) -> Completion:
        """Ids become text for a server that takes no ids."""
        if self.as_text and not isinstance(prompt, str):
            prompt = self._written(prompt)
        asked = {
            "model": self.model,
            "prompt": list(prompt) if not isinstance(prompt, str) else prompt,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop_token_ids": sorted(self.stops),
            "return_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            **NEUTRAL,
        }
        return self._read(self._ask("POST", "/v1/completions", asked))

    def tokens_of(self, found: Completion, limit: int) -> list[int] | None:
        """The ids of an answer, the stop id included, cut at it and at the limit. None where only a text came and there
        is doubt about them.
        """
        tokens = found.tokens
        if tokens is None:
            tokens = self.tokenizer(found.text, add_special_tokens=False)["input_ids"]
            known = found.count in (None, len(tokens), len(tokens) + found.finished)
            if not known or self.tokenizer.decode(tokens) != found.text or (found.finished and found.stop is None):
                return None
        if found.finished and found.stop is not None and not self.stops & set(tokens[-1:]):
            tokens = [*tokens, found.stop]
        return cut(tokens, limit, self.stops)

    def _read(self, said: dict) -> Completion:
        try:
            choice, usage = said["choices"][0], said.get("usage") or {}
            text, reason = choice["text"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError):
            raise UserError(f"server {self.url}: found {str(said)[:120]}, expected choices with a text") from None
        if reason not in ("stop", "length"):
            raise UserError(f"server {self.url}: found finish_reason {reason!r}, expected stop or length")
        stop = next((choice[k] for k in ("stop_reason", "matched_stop") if isinstance(choice.get(k), int)), None)
        own = self.tokenizer.eos_token_id
        if stop is None:  # servers do not say which of several it was; a chat model's own ends its turns
            stop = next(iter(self.stops)) if len(self.stops) == 1 else own if own in self.stops else None
        return Completion(
            text,
            choice.get("token_ids"),
            reason == "stop",
            stop,
            usage.get("completion_tokens"),
            usage.get("prompt_tokens"),
            choice.get("prompt_token_ids"),
        )

    def _written(self, prompt: list[int]) -> str:
        """Raises UserError for a prompt that its text does not give back."""
        text = self.tokenizer.decode(prompt)
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != list(prompt):
            raise UserError(
                f"server {self.url}: takes no token ids, and the text of a prompt gives other ids than its own: "
                f"{text[:60]!r}"
            )
        return text

    def _ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """What the server answers, asked again with growing pauses while it fails."""
        for number in range(self.tries):
            if number and self.closed.wait(min(LONGEST_WAIT, 2**number / 4) * random.uniform(0.5, 1.5)):
                break
            try:
                response = self.client.request(method, path, json=body)
                if response.status_code == 200:
                    return response.json()
                found = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
                if response.status_code not in BUSY:
                    raise Refused(f"server {self.url}{path}: {found}", response.status_code)
            except httpx.UnsupportedProtocol:
                raise
            except (httpx.TransportError, ValueError) as error:
                found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"server {self.url}{path}: {found} ({self.tries} times); the same command goes on later")


class Refused(UserError):
    """A server says no to a request, and would again."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def served(
    server: Server, asked: list[tuple[int, list[int], float]], max_new_tokens: int, concurrency: int
) -> Iterator[Answer]:
    """Answers to asked (row, prompt, temperature), `concurrency` requests at a time, as they end. The threads do not
    keep a process alive that is told to stop.
    """
    server.closed.clear()
    waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
    for request in asked:
        waiting.put(request)

    def work():
        while not server.closed.is_set():
            try:
                row, prompt, temperature = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put(server.answer(row, prompt, temperature, max_new_tokens))
            except Exception as error:  # raised again where the answers are read
                done.put(error)

    for _ in range(min(concurrency, len(asked))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in asked:
            found = done.get()
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        server.closed.set()
