"""How good the bundled `code` target is: held-out loss, and how much its continuations loop beside the text people wrote.

    python tests/benchmarks/target.py [--quick] [--target bundled:targets/code]

Held-out functions are cut from the packages of the target's recipe as installed here, so figures move a little with their versions.
Ends with one JSON line. repeated_4grams: share of the 4-grams of a text (token ids, stop token excluded) that occurred in it before.
"""

import argparse
import json

from draftsmith.eval.measure import decode_batches, repeated_4grams
from draftsmith.eval.sampling import Sampling
from draftsmith.models.chat import encode_prompt, load_tokenizer, stop_ids
from draftsmith.models.drafter import NoDrafter
from draftsmith.models.targets import TextTarget
from draftsmith.train import corpus
from draftsmith.train.pretrain import TargetRecipe, chat, loss_per_byte
from draftsmith.train.recipe import read_recipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="60 functions of the standard library, sympy and pandas (2 minutes)")
    parser.add_argument("--target", default="bundled:targets/code")
    arguments = parser.parse_args()
    recipe = read_recipe("recipes/targets/code.yaml", TargetRecipe)
    packages, count = (["python", "sympy", "pandas"], 60) if arguments.quick else (recipe.corpus.packages, 400)
    target, tokenizer = TextTarget.load(arguments.target), load_tokenizer(arguments.target)
    stops = stop_ids(target, tokenizer)
    functions = [f for f in corpus.unique_functions(corpus.find_sources(packages)) if f.documented and corpus.is_held_out(f.module, recipe.corpus.held_out)]
    rows = []
    for function in functions:
        prompt, whole = encode_prompt(tokenizer, [{"role": "user", "content": function.question}]), tokenizer(chat(function))["input_ids"]
        if len(prompt) <= recipe.corpus.max_question and 24 <= len(whole) - len(prompt) <= recipe.corpus.max_answer:
            rows.append((prompt, whole))
    rows = rows[::max(1, len(rows) // count)][:count]
    nats, per_byte = loss_per_byte(target.model, tokenizer, [whole for _, whole in rows], target.device, count)
    figures = {"functions": len(rows), "held_out_nats_per_token": round(nats, 4), "held_out_nats_per_byte": round(per_byte, 4),
               "repeated_4grams": {"held_out_text": round(repeated_4grams([whole[len(prompt):-1] for prompt, whole in rows]), 4)}}
    for temperature in (0.0, 0.8):
        traces = decode_batches(target, NoDrafter(), [prompt for prompt, _ in rows], Sampling(temperature), 128, stops, 32)
        figures["repeated_4grams"][f"T={temperature}"] = round(repeated_4grams([[t for t in trace.tokens if t not in stops] for trace in traces]), 4)
        figures.setdefault("ends_within_128", {})[f"T={temperature}"] = round(sum(t.tokens[-1] in stops for t in traces) / len(traces), 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
