"""How good the bundled `code` target is: held-out loss, and how much its continuations loop beside the text people
wrote.

    python tests/benchmarks/target.py [--quick] [--target bundled:targets/code]
    python tests/benchmarks/target.py --contexts [--target bundled:targets/code-long]

Held-out functions are cut from the packages of the target's recipe as installed here, so figures move a little with
their versions. Ends with one JSON line. repeated_4grams: share of the 4-grams of a text (token ids, stop token
excluded) that occurred in it before. --contexts: instead the loss of the last 256 tokens of held-out repository
documents (train/reference/repository.py) behind ever more of what stands before them, and the loss of the same
documents by position: a longer context must not make it worse.
"""

import argparse
import json

import torch
import torch.nn.functional as F

from draftsmith.eval.measurement.interval import difference_interval
from draftsmith.eval.measurement.measure import decode_batches, repeated_4grams
from draftsmith.eval.sampling import Sampling
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.targets import TextTarget
from draftsmith.train.recipe import read_recipe
from draftsmith.train.reference import corpus
from draftsmith.train.reference.pretrain import TargetRecipe, chat, loss_per_byte
from draftsmith.train.reference.repository import RepositoryRows

CONTEXTS, LAST = (
    (128, 768, 1792, 3840, 7936),
    256,
)  # tokens before the last ones: rows of 384 (the length that `code` was trained at), 1K, 2K, 4K, 8K
POSITIONS = (0, 384, 1024, 2048, 4096, 8192)


@torch.no_grad()
def loss_by_context(target, tokenizer, files, documents: int) -> dict:
    """Nats per token {"by_context": {tokens before: loss}, "behind_least": {tokens before: [difference, low, high]},
    "by_position"}; the differences are to the shortest context, paired by document.
    """
    rows, length = RepositoryRows(files, tokenizer, 0), CONTEXTS[-1] + LAST
    losses, positions = [], []
    for _ in range(documents):
        row = torch.tensor([rows.row(length)], device=target.device)

        def each(part):
            return F.cross_entropy(
                target.model(input_ids=part[:, :-1]).logits[0].float(), part[0, 1:], reduction="none"
            )  # noqa: E731

        cuts = [each(row[:, -LAST - before :]) for before in CONTEXTS]
        losses.append([float(found[-LAST:].mean()) for found in cuts])
        positions.append([float(cuts[-1][low:high].mean()) for low, high in zip(POSITIONS, POSITIONS[1:])])
    ones, by_context = [1.0] * documents, list(zip(*losses))
    mean = lambda values: round(sum(values) / len(values), 4)  # noqa: E731
    behind = {
        before: [mean(values) - mean(by_context[0]), *difference_interval((values, ones), (by_context[0], ones))]
        for before, values in zip(CONTEXTS, by_context)
    }
    return {
        "documents": documents,
        "by_context": {before: mean(values) for before, values in zip(CONTEXTS, by_context)},
        "behind_least": {before: [round(x, 4) for x in found] for before, found in behind.items()},
        "by_position": {
            f"{low}-{high}": mean(values) for low, high, values in zip(POSITIONS, POSITIONS[1:], zip(*positions))
        },
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="60 functions of the standard library, sympy and pandas (2 minutes)"
    )
    parser.add_argument("--target", default="bundled:targets/code")
    parser.add_argument("--contexts", type=int, metavar="DOCUMENTS", nargs="?", const=48)
    arguments = parser.parse_args()
    recipe = read_recipe("recipes/targets/code.yaml", TargetRecipe)
    packages, count = (["python", "sympy", "pandas"], 60) if arguments.quick else (recipe.corpus.packages, 400)
    target, tokenizer = TextTarget.load(arguments.target), load_tokenizer(arguments.target)
    if arguments.contexts:
        files = [f for f in corpus.find_sources(packages) if corpus.is_held_out(f.module, recipe.corpus.held_out)]
        print(json.dumps(loss_by_context(target, tokenizer, files, arguments.contexts)))
        return
    stops = stop_ids(target, tokenizer)
    functions = [
        f
        for f in corpus.unique_functions(corpus.find_sources(packages))
        if f.documented and corpus.is_held_out(f.module, recipe.corpus.held_out)
    ]
    rows = []
    for function in functions:
        prompt, whole = (
            encode_prompt(tokenizer, [{"role": "user", "content": function.question}]),
            tokenizer(chat(function))["input_ids"],
        )
        if len(prompt) <= recipe.corpus.max_question and 24 <= len(whole) - len(prompt) <= recipe.corpus.max_answer:
            rows.append((prompt, whole))
    rows = rows[:: max(1, len(rows) // count)][:count]
    nats, per_byte = loss_per_byte(target.model, tokenizer, [whole for _, whole in rows], target.device, count)
    figures = {
        "functions": len(rows),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_nats_per_byte": round(per_byte, 4),
        "repeated_4grams": {
            "held_out_text": round(repeated_4grams([whole[len(prompt) : -1] for prompt, whole in rows]), 4)
        },
    }
    for temperature in (0.0, 0.8):
        traces = decode_batches(
            target, NoDrafter(), [prompt for prompt, _ in rows], Sampling(temperature), 128, stops, 32
        )
        figures["repeated_4grams"][f"T={temperature}"] = round(
            repeated_4grams([[t for t in trace.tokens if t not in stops] for trace in traces]), 4
        )
        figures.setdefault("ends_within_128", {})[f"T={temperature}"] = round(
            sum(t.tokens[-1] in stops for t in traces) / len(traces), 3
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
