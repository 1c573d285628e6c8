"""Drafters in vLLM beside our own decode loop: same target, prompts and chain, fp32, the end token ignored.

    python -m tests.engine.vllm_compare                       # what `make test-vllm` compares
    python -m tests.engine.vllm_compare runs/NAME/drafter     # one drafter, of the target that it names

Greedy, the texts must be the same, and the drafts accepted at each position. At temperature 1 both sides draw at
random, and their acceptance lengths must agree, in each of the two ways in which vLLM drafts then: from the drafter's
distribution (draft_sample_method probabilistic; ours: a sampled chain under `rejection`), or its most probable tokens
(greedy, the default; ours: the chain under `match`). "Agree" means that no difference lies outside its joint interval:
bootstrap over prompts, 95 % for all differences of a run together.

Counts are the engine's: every pass that had drafts, with its accepted tokens, those behind the last wanted token
(overrun) included; tau = 1 + accepted / passes. Ours are recomputed from our own traces. Each layout is served as its
engine reads it; the speculators one is the model itself, as in `vllm serve DRAFTER`. Runs in .venv-vllm; exits with 1
when a text differs, a greedy tau is off by more than 1 %, or a sampled one does not agree.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: all texts at once, since drafts of preempted ones lose their distribution
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from rich.console import Console
from rich.table import Table

from draftsmith.eval.decode import Trace, generate
from draftsmith.eval.measurement.interval import difference_interval, ratio_interval
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import parse_rule
from draftsmith.launch.export import export_drafter
from draftsmith.launch.methods import bundled
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import LAYOUTS, fetch, load_drafter, read_files, save_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import EagleHead
from draftsmith.models.targets import TextTarget, locate

CODE = [f"bundled:drafters/{name}" for name in ("eagle3-code", "eagle-code", "hass-code")]
SMOLLM2 = "bundled:targets/smollm2"
SUITES = {SMOLLM2: "bundled:prompts/chat.jsonl"}  # its first prompts are held out from training
OTHER_SUITE = "bundled:prompts/code.jsonl"
TOLERANCE = 0.01  # of a greedy tau
BATCH = 8  # texts that our loop decodes together


@dataclass(frozen=True)
class Law:
    """One way to decode: the tree (with {depth}) and the rule of our loop, and vLLM's draft_sample_method (None: greedy
    decoding, where both draft the most probable tokens).
    """

    temperature: float
    tree: str
    rule: str
    drafts: str | None


LAWS = {
    "greedy": Law(0.0, "chain:{depth}", "match", None),
    "probabilistic drafts": Law(1.0, "sampled:chain:{depth}", "rejection", "probabilistic"),
    "one-hot drafts": Law(1.0, "chain:{depth}", "match", "greedy"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drafters", nargs="*", help="default: those shipped for code and smollm2 that vLLM loads")
    parser.add_argument("--target", help="default: the one that a drafter names")
    parser.add_argument("--suite", help="file of prompts; default: held-out ones that come with draftsmith")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2, help="texts of each prompt at temperature 1")
    options = parser.parse_args()
    results = {drafter: compare(drafter, options) for drafter in options.drafters or shipped()}
    agree = judge(results)
    print(json.dumps({**results, "agree": agree}))
    return 0 if agree else 1


def shipped() -> list[str]:
    """The bundled drafters of code, and those of smollm2 that vLLM loads where that target can be had."""
    served = {layout.head.name for layout in LAYOUTS if "vllm" in layout.engines}
    names = [f"bundled:drafters/{place.name}" for place in sorted(Path(locate("bundled:drafters")).iterdir())]
    told = {name: read_files(fetch(name)).about for name in names}
    found = [name for name, about in told.items() if about["target"] == SMOLLM2 and about["head"] in served]
    try:
        locate(SMOLLM2)
    except UserError as error:
        print(f"left out: {', '.join(found) or 'the drafters of smollm2'} ({error})")
        found = []
    return [*CODE, *found]


def compare(drafter: str, options: argparse.Namespace) -> dict:
    """{law: figures} of one drafter, ours beside vLLM's: an engine for each way to draft at temperature 1."""
    target_name = options.target or read_files(fetch(drafter)).target
    suite = options.suite or SUITES.get(target_name, OTHER_SUITE)
    prompts = [p.tokens for p in read_prompts(bundled(suite), load_tokenizer(target_name), options.prompts)]
    target = TextTarget.load(target_name)
    head, title = load_drafter(drafter, target.shared, target.layers), drafter
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(head, EagleHead) and head.config.bias:
            head, title = without_bias(head), f"{drafter} without the bias of its fc, which vLLM leaves out"
            drafter = save_drafter(head, Path(temporary) / "unbiased", {"target": target_name})
        traces = {name: {"ours": decode(target, head, prompts, law, options)} for name, law in LAWS.items()}
        del target
        other = "speculators" if head.name == "eagle3" else "vllm"
        for layout, drafts in ((other, "greedy"), ("vllm", "probabilistic")):
            folder, who = Path(temporary) / f"{head.name}-{layout}-{drafts}", f"vLLM, {layout} layout"
            export_drafter(drafter, folder, layout, target_name, options.depth, report=lambda line: None)
            wanted = [n for n, law in LAWS.items() if law.drafts in (None, drafts) and who not in traces[n]]
            found = serve(layout, head.name, folder, locate(target_name), drafts, wanted, prompts, options)
            for name, mine in found.items():
                traces[name][who] = mine
    show(title, traces, options)
    return {name: summary(LAWS[name], found, options) for name, found in traces.items()}


def without_bias(head: EagleHead) -> EagleHead:
    twin = EagleHead(replace(head.config, bias=False), head.shared)
    twin.load_state_dict({name: value for name, value in head.state_dict().items() if name != "fc.bias"})
    return twin.eval()


def repeated(prompts: list[list[int]], law: Law, options: argparse.Namespace) -> list[list[int]]:
    """Each prompt as often as texts are drawn from it, copies beside each other."""
    return [p for p in prompts for _ in range(options.samples if law.temperature else 1)]


def decode(target: TextTarget, head, prompts: list[list[int]], law: Law, options: argparse.Namespace) -> list[Trace]:
    """Our loop."""
    wanted, drafter = (
        repeated(prompts, law, options),
        HeadDrafter(head, parse_tree(law.tree.format(depth=options.depth))),
    )
    return [
        trace
        for start in range(0, len(wanted), BATCH)
        for trace in generate(
            target,
            drafter,
            wanted[start : start + BATCH],
            Sampling(law.temperature),
            options.new_tokens,
            requests=list(range(len(wanted)))[start : start + BATCH],
            verifier=parse_rule(law.rule),
        )
    ]


def serve(
    layout: str,
    method: str,
    folder: Path,
    target: str,
    drafts: str,
    wanted: list[str],
    prompts: list[list[int]],
    options,
) -> dict[str, list[Trace]]:
    """vLLM's texts by these laws, with the drafts accepted in each pass. method and drafts are those of its speculative
    configuration, wanted are names of laws.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    speculative = {
        "method": method,
        "model": str(folder),
        "num_speculative_tokens": options.depth,
        "draft_sample_method": drafts,
    }
    engine = LLM(
        **({"model": str(folder)} if layout == "speculators" else {"model": target, "speculative_config": speculative}),
        dtype="float32",
        max_model_len=1024,
        enable_chunked_prefill=False,  # of a request with a seed it asks for what a CPU's generator does not have
        max_num_batched_tokens=8192,
        enforce_eager=True,
        per_request_spec_decode_metrics="detailed",
        worker_extension_cls="tests.engine.repair.WorkerExtension",
    )
    found = {}
    for name in wanted:
        law, texts = LAWS[name], repeated(prompts, LAWS[name], options)
        sampling = [
            SamplingParams(temperature=law.temperature, max_tokens=options.new_tokens, ignore_eos=True, seed=seed)
            for seed in range(len(texts))
        ]
        outputs = engine.generate([TokensPrompt(prompt_token_ids=p) for p in texts], sampling, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        found[name] = [Trace(list(a.token_ids), a.spec_decode_metrics.per_step_accepted) for a in answers]
    engine.llm_engine.engine_core.shutdown(timeout=60)
    return found


def counts(traces: list[Trace], options: argparse.Namespace) -> list[int]:
    """How many passes accepted at least 1, 2, ... drafts."""
    return [sum(a > k for trace in traces for a in trace.accepted) for k in range(options.depth)]


def sums(traces: list[Trace], law: Law, options: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Per prompt: what its passes emitted (accepted drafts and one more token), and how many they were."""
    samples = options.samples if law.temperature else 1
    accepted = [[a for t in traces[i : i + samples] for a in t.accepted] for i in range(0, len(traces), samples)]
    return [sum(some) + len(some) for some in accepted], [len(some) for some in accepted]


def tau(traces: list[Trace]) -> float:
    accepted = [a for trace in traces for a in trace.accepted]
    return 1 + sum(accepted) / len(accepted)


def summary(law: Law, traces: dict[str, list[Trace]], options: argparse.Namespace) -> dict:
    """The JSON of one law: tau of each, and what is compared."""
    ours, *theirs = traces.values()
    figures = {"tau": {name: tau(found) for name, found in traces.items()}}
    if law.temperature == 0:
        return figures | {
            "texts_identical": all(a.tokens == b.tokens for found in theirs for a, b in zip(ours, found, strict=True)),
            "counts_identical": all(counts(found, options) == counts(ours, options) for found in theirs),
        }
    (served,) = theirs
    return figures | {
        "intervals": {name: ratio_interval(*sums(found, law, options)) for name, found in traces.items()},
        "difference_interval": difference_interval(sums(served, law, options), sums(ours, law, options)),
    }


def judge(results: dict[str, dict]) -> bool:
    """Whether everything agrees; says what does not. An interval of 95 % for one difference is widened about its middle
    to what holds for all of the run (Bonferroni, as if they were normal).
    """
    sampled = [law for laws in results.values() for law in laws.values() if "difference_interval" in law]
    wider = NormalDist().inv_cdf(1 - 0.025 / max(1, len(sampled))) / NormalDist().inv_cdf(0.975)
    wrong = []
    for drafter, laws in results.items():
        for name, law in laws.items():
            ours, *theirs = law["tau"].values()
            if "difference_interval" in law:
                low, high = law["difference_interval"]
                law["joint_interval"] = [(low + high) / 2 + side * wider * (high - low) / 2 for side in (-1, 1)]
                if not law["joint_interval"][0] <= 0 <= law["joint_interval"][1]:
                    wrong.append(f"{drafter}, {name}: tau differs by more than chance, {law['joint_interval']}")
            elif not law["texts_identical"]:
                wrong.append(f"{drafter}, {name}: texts differ")
            elif any(abs(t / ours - 1) > TOLERANCE for t in theirs):
                wrong.append(f"{drafter}, {name}: tau differs, {law['tau']}")
    for line in wrong:
        print(line)
    return bool(results) and not wrong


def show(title: str, traces: dict[str, dict[str, list[Trace]]], options: argparse.Namespace) -> None:
    table = Table(title=f"{title}\nfp32, end token ignored: passes that accepted at least 1, 2, ... drafts")
    for column in ("", "", "tau", "95 %", "passes", *range(1, options.depth + 1)):
        table.add_column(str(column), justify="right" if column else "left")
    for name, found in traces.items():
        law = LAWS[name]
        for who, mine in found.items():
            above, below = sums(mine, law, options)
            low, high = ratio_interval(above, below)
            figures = (f"{tau(mine):.4f}", f"{low:.2f} to {high:.2f}", sum(below), *counts(mine, options))
            first = who == "ours"
            label = (name if law.temperature == 0 else f"T = 1, {name}") if first else ""
            table.add_row(label, who, *map(str, figures), end_section=not law.temperature and who == list(found)[-1])
        if law.temperature:
            low, high = difference_interval(*(sums(mine, law, options) for mine in reversed(found.values())))
            table.add_row("", "difference", "", f"{low:+.2f} to {high:+.2f}", end_section=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
