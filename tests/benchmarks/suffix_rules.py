"""Which settings of suffix decoding draft best on repository-level prompts of training modules (held-out ones are kept
for what is reported).

    python tests/benchmarks/suffix_rules.py [--output runs/suffix-rules]

Greedy texts of `code-long` behind 2K tokens of context, up to 256 new tokens, decoded once; every rule is then replayed
along them, which gives its acceptance length exactly: trees of 32 rows, the request's own text alone. Ends with one
JSON line {form, factor, min_prob, norm: tau}.
"""

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path

from draftsmith.eval.decode import decode
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.measurement.shared_prefill import SharedSession
from draftsmith.eval.sampling import Sampling
from draftsmith.launch import longbench
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixIndex, SuffixRule
from draftsmith.models.targets import TextTarget

TARGET, PACKAGES, LENGTH, DOCUMENTS, QUESTIONS, NEW, ROWS = (
    "bundled:targets/code-long",
    ["pandas", "sympy", "peft", "networkx"],
    2048,
    24,
    2,
    256,
    32,
)


def replay(prompt: list[int], text: list[int], rule: SuffixRule) -> int:
    """Passes that a rule needs for a greedy text (its first token is known already)."""
    index, context, at, passes = SuffixIndex(), prompt + text[:1], 1, 0
    index.append(0, context)
    while at < len(text):
        draft, node, accepted = index.speculate(context[-rule.depth :], rule, ROWS - 1), -1, 0
        children = {(parent, token): number for number, (parent, token) in enumerate(zip(draft.parents, draft.tokens))}
        while at + accepted < len(text) and (node, text[at + accepted]) in children:
            node, accepted = children[node, text[at + accepted]], accepted + 1
        new = text[at : at + accepted + 1]
        index.append(0, new)
        context, at, passes = context + new, at + len(new), passes + 1
    return passes


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/suffix-rules"))
    output = parser.parse_args().output
    target, tokenizer, left_out = TextTarget.load(TARGET), load_tokenizer(TARGET), Counter()
    candidates = longbench.rendered(
        longbench.repositories(PACKAGES, False, LENGTH, tokenizer, 0, QUESTIONS), tokenizer, LENGTH, left_out
    )
    file = longbench.write_suite(
        longbench.cut(candidates, (LENGTH,), DOCUMENTS, tokenizer, left_out), str(output / "prompts.jsonl"), left_out
    )
    drafter, stops, texts = SuffixDrafter(ROWS, SuffixRule(factor=4)), stop_ids(target, tokenizer), []
    shared = SharedSession(target, drafter.feature_spec, LENGTH + NEW + 2 * ROWS)
    for prompt in read_prompts(file, tokenizer):
        (trace,) = decode(
            shared.session, shared.prefill(prompt.tokens), drafter, [prompt.tokens], Sampling(), NEW, stops
        )
        texts.append((prompt.tokens, trace.tokens))
    tokens, found = sum(len(text) - 1 for _, text in texts), {}
    for form, factor, least, norm in product(("path", "tree"), (1.0, 2.0, 4.0), (0.1, 0.05), ("node", "siblings")):
        rule = SuffixRule(form, factor=factor, min_prob=least, norm=norm)
        found[f"{form}, {factor:g}, {least}, {norm}"] = round(
            tokens / sum(replay(prompt, text, rule) for prompt, text in texts), 3
        )
        print(list(found.items())[-1], flush=True)
    print(json.dumps({"prompts": len(texts), "tokens": tokens, **found}))


if __name__ == "__main__":
    main()
