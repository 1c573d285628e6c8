"""Whether a server's answers are the target's: the same tokenizer, the same model, and nothing between its distribution
and the draw but the temperature.

The target is loaded here once and scores what the server writes, prompt by prompt in one forward each. Greedy answers
may leave the target's own best token only where it is nearly a tie, since precisions and kernels differ. Of sampled
answers, the surprise must be the entropy on average, and the tokens that a cut of the distribution (top-k, top-p,
min-p) would exclude must come as often as they should.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from draftsmith.launch.answers.server import Completion, Refused, Server
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.noise import seed_of
from draftsmith.models.targets import TextTarget
from draftsmith.models.tree import DraftTree

PROBE = "def f(x):\n    return x ** 2  # naïve, 数学 🙂 'Hello', 1,234.5"
PROMPTS, TOKENS = 8, 64  # of which answers are compared, for every temperature
LONGEST = 1024  # tokens of such a prompt, where there are shorter ones
GAP = 1.0  # nats that a greedy token may lie behind the target's best one
TOP_K, TOP_P, MIN_P = (20, 40, 50), (0.8, 0.9, 0.95), (0.05, 0.1)  # what engines and models come with
DOUBT, DEVIATIONS = 1e-6, 6  # a probability below which chance is no explanation, and as standard deviations


def check_server(
    server: Server, target_name: str, dtype: torch.dtype | None, prompts: list[list[int]], temperatures, report
) -> None:
    """Raises UserError in one line for a server of another tokenizer, model or law."""
    short = [p for p in prompts if len(p) <= LONGEST] or [min(prompts, key=len)]
    asked = short[:: max(1, len(short) // PROMPTS)][:PROMPTS]
    find_form(server, asked[0])
    check_tokenizer(server)
    target = TextTarget.load(target_name, dtype, "cpu")
    for temperature in dict.fromkeys([0.0, *temperatures]):
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(partial(answered, server, temperature), asked, range(len(asked))))
        scored = [Scored.of(target, p, tokens, temperature) for p, tokens in zip(asked, answers) if tokens]
        if not scored:
            raise UserError(
                f"server {server.url}: gives texts alone, and none of {len(asked)} has certain tokens: it cannot be "
                f"compared with the target"
            )
        if temperature == 0:
            report(check_greedy(server, scored))
        else:
            check_sampled(server, scored, temperature)


def find_form(server: Server, prompt: list[int]) -> None:
    """Ids, or text for a server that refuses ids."""
    try:
        server.complete(prompt, 0.0, 1)
    except Refused as error:
        if error.status not in (400, 415, 422):
            raise
        server.as_text = True
        try:
            server.complete(prompt, 0.0, 1)
        except Refused:
            raise error from None


def check_tokenizer(server: Server) -> None:
    """A text must have as many tokens there as here, and the same ones where the server says which."""
    found = server.complete(PROBE, 0.0, 1)
    here = [server.tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (False, True)]
    if found.prompt_ids is not None and found.prompt_ids not in here:
        raise UserError(
            f"server {server.url}: reads a text as the tokens {found.prompt_ids[:8]}, expected {here[0][:8]} "
            f"(it serves another tokenizer than the target's)"
        )
    if found.prompt_tokens is not None and found.prompt_tokens not in map(len, here):
        raise UserError(
            f"server {server.url}: reads a text as {found.prompt_tokens} tokens, expected {len(here[0])} (it serves "
            f"another tokenizer than the target's)"
        )


def answered(server: Server, temperature: float, prompt: list[int], number: int) -> list[int] | None:
    """The ids of a short answer, None where there is doubt about them."""
    found = server.complete(prompt, temperature, TOKENS, seed_of(server.seed, number, "check") % 2**31)
    if found.tokens is not None:
        check_text(server, found)
    return server.tokens_of(found, TOKENS)


def check_text(server: Server, found: Completion) -> None:
    """Ids and text of an answer must be the same thing to the tokenizer here (the end may be a torn character)."""
    tokens = found.tokens[:-1] if found.tokens and found.tokens[-1] in server.stops else found.tokens
    here = server.tokenizer.decode(tokens)
    if here.strip(" \ufffd") != found.text.strip(" \ufffd"):
        raise UserError(
            f"server {server.url}: calls the tokens {tokens[:8]} {found.text[:40]!r}, expected {here[:40]!r} (it "
            f"serves another tokenizer than the target's)"
        )


@dataclass(frozen=True)
class Scored:
    """An answer of n tokens under the target's own distribution behind what stands before each of them, at the answer's
    temperature (1 for a greedy one). In nats: gap [n], how far the token lies behind the best one, best [n] ids;
    surprise [n] less its expectation, and variance [n]. cuts: {name: (times that tokens which it excludes came, times
    that they should)}.
    """

    tokens: torch.Tensor
    best: torch.Tensor
    gap: torch.Tensor
    surprise: torch.Tensor
    variance: torch.Tensor
    cuts: dict[str, tuple[int, float]]

    @classmethod
    @torch.inference_mode()
    def of(cls, target: TextTarget, prompt: list[int], answer: list[int], temperature: float) -> "Scored":
        if not all(0 <= token < target.vocab_size for token in answer):
            raise UserError(f"server: found token {max(answer)}, expected ids below {target.vocab_size}")
        session = target.open(FeatureSpec(taps=()), 1, len(prompt) + len(answer))
        logits = session.prefill([prompt]).logits[:, None]
        if len(answer) > 1:
            chain = DraftTree.of(torch.tensor([answer[:-1]]), torch.arange(-1, len(answer) - 2)[None])
            logits = torch.cat([logits, session.verify(chain).logits], 1)
        logs, tokens = torch.log_softmax(logits[0].double() / (temperature or 1.0), -1), torch.tensor(answer)
        own, probabilities = logs.gather(1, tokens[:, None]), logs.exp()
        entropy = -(probabilities * logs).sum(-1)
        ordered = probabilities.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # the mass of all that is more probable
        rank, mass = (logs > own).sum(-1), (probabilities * (logs > own)).sum(-1)
        cuts = {f"top_k={k}": (int((rank >= k).sum()), float(ordered[:, k:].sum())) for k in TOP_K}
        for p in TOP_P:
            cuts[f"top_p={p}"] = int((mass >= p).sum()), float(ordered[before >= p].sum())
        for m in MIN_P:
            least = m * ordered[:, :1]
            cuts[f"min_p={m}"] = int((own.exp() < least).sum()), float(ordered[ordered < least].sum())
        return cls(
            tokens,
            logs.argmax(-1),
            logs.max(-1).values - own[:, 0],
            -own[:, 0] - entropy,
            (probabilities * logs**2).sum(-1) - entropy**2,
            cuts,
        )


def check_greedy(server: Server, scored: list[Scored]) -> str:
    """One line about how the greedy answers differ, if they do."""
    number, at = max(
        ((i, int(s.gap.argmax())) for i, s in enumerate(scored)), key=lambda place: scored[place[0]].gap[place[1]]
    )
    one, count = scored[number], sum(len(s.gap) for s in scored)
    said, best = (server.tokenizer.decode([int(ids[at])]) for ids in (one.tokens, one.best))
    where = f"token {at + 1} of answer {number + 1} is {said!r}, {one.gap[at]:.2g} nats behind the target's {best!r}"
    if one.gap[at] > GAP:
        raise UserError(f"server {server.url}: {server.model} is not the target: {where}, expected at most {GAP:g}")
    same = sum(int((s.gap == 0).sum()) for s in scored)
    return f"{server.model} at {server.url}: {same} of {count} tokens of greedy answers are the target's own" + (
        f"; {where}" if same < count else ""
    )


def check_sampled(server: Server, scored: list[Scored], temperature: float) -> None:
    place = f"server {server.url}: at temperature {temperature:g}"
    counts = {name: [sum(s.cuts[name][i] for s in scored) for i in (0, 1)] for name in scored[0].cuts}
    missing = [name for name, (came, due) in counts.items() if came < due and chance(came, due) < DOUBT]
    if missing:  # of several the one that most of what should come, and least of what came, speaks for
        name = min(missing, key=lambda name: (counts[name][0] / counts[name][1], -counts[name][1]))
        came, due = counts[name]
        raise UserError(
            f"{place}: found {came} tokens that {name} would exclude, expected some {due:.0f}: it does not draw from "
            f"the whole distribution"
        )
    deviations = float(
        sum(s.surprise.sum() for s in scored) / sum(s.variance.sum() for s in scored).clamp(1e-12) ** 0.5
    )
    if abs(deviations) > DEVIATIONS:
        raise UserError(
            f"{place}: found answers that surprise the target {'more' if deviations > 0 else 'less'} than its own "
            f"({abs(deviations):.0f} standard deviations, expected at most {DEVIATIONS}): it draws from another "
            f"distribution"
        )


def chance(came: int, due: float) -> float:
    """Probability that a Poisson count of mean `due` is at most `came`."""
    return sum(math.exp(k * math.log(due) - due - math.lgamma(k + 1)) for k in range(came + 1))
