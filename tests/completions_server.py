"""A completions server on 127.0.0.1 in OpenAI's protocol, over a target and our own decode loop.

As engines do, it takes what a request does not say from defaults of its own, and it can be told to lack things: ids in
prompts, ids in answers, keys of a request that it should heed. `fail` makes requests fail: with HTTP 500, or by closing
the connection in the middle of an answer.
"""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import NoDrafter

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass
class Completions:
    """defaults: of sampling, as from a generation_config.json; deaf: keys that are not heeded; fail(number of the
    request) -> None, "error", "drop" or "refuse"; requests: the bodies so far.
    """

    target: object
    tokenizer: object
    stops: set[int]
    models: tuple[str, ...] = ("served",)
    context: int = 2048
    takes_ids: bool = True
    gives_ids: bool = True
    defaults: dict = field(default_factory=dict)
    deaf: tuple[str, ...] = ()
    fail: object = lambda number: None
    requests: list[dict] = field(default_factory=list)
    decoding: threading.Lock = field(default_factory=threading.Lock)

    def sampling(self, asked: dict) -> Sampling:
        heard = {k: v for k, v in asked.items() if k in NEUTRAL and k not in self.deaf}
        values = NEUTRAL | self.defaults | heard
        return Sampling(**values | {"top_k": max(values["top_k"], 0), "seed": asked.get("seed", 0)})

    def answer(self, asked: dict) -> dict:
        prompt = asked["prompt"]
        if isinstance(prompt, str):
            special = asked.get("add_special_tokens", True)
            prompt = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        stops = self.stops | set(asked.get("stop_token_ids", ()))
        with self.decoding:
            (trace,) = generate(
                self.target, NoDrafter(), [prompt], self.sampling(asked), asked["max_tokens"], stops, [0]
            )
        ended = trace.tokens[-1] in stops
        text = self.tokenizer.decode(trace.tokens[:-1] if ended else trace.tokens)
        choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
        if self.gives_ids and asked.get("return_token_ids"):
            choice |= {"token_ids": trace.tokens, "prompt_token_ids": prompt}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(trace.tokens)}
        return {"object": "text_completion", "model": asked["model"], "choices": [choice], "usage": usage}


def handler(completions: Completions):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def say(self, status: int, document: dict, torn: bool = False):
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if torn else body)
            self.close_connection = torn

        def do_GET(self):
            models = [{"id": name, "max_model_len": completions.context} for name in completions.models]
            self.say(200, {"data": models}) if self.path == "/v1/models" else self.say(404, {"error": self.path})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            completions.requests.append(asked)
            failure = completions.fail(len(completions.requests))
            if failure == "error":
                self.say(500, {"error": {"message": "out of luck"}})
            elif failure == "refuse" or self.path != "/v1/completions" or asked["model"] not in completions.models:
                self.say(404, {"error": {"message": "no such model"}})
            elif not isinstance(asked["prompt"], str) and not completions.takes_ids:
                self.say(400, {"error": {"message": "prompt must be a string"}})
            else:
                self.say(200, completions.answer(asked), torn=failure == "drop")

    return Handler


@contextmanager
def serving(completions: Completions):
    """Its address while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(completions))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
