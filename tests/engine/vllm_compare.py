"""A drafter (the shipped one unless --drafter is given) in vLLM beside our own decode loop: same target, prompts and
chain, fp32, greedy, end token ignored.

Counts are the engine's: every draft with its accepted tokens, those behind the last wanted token (overrun) included;
tau = 1 + accepted / drafts. Ours are recomputed from our own traces. Each layout is served as its engine reads it; the
speculators one is the model itself, as in `vllm serve DRAFTER`. Runs in .venv-vllm (`make test-vllm`); exits with 1
when a text differs or tau is off by more than 1 %.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from draftsmith.eval.decode import Trace, generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.export import export_drafter
from draftsmith.models.chat import encode_prompt, load_tokenizer
from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.formats import load_drafter
from draftsmith.models.grow import chain
from draftsmith.models.targets import TextTarget, locate

PROMPTS = "bundled:prompts"
TOLERANCE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drafter", default="bundled:drafters/eagle3-code")
    parser.add_argument("--target", default="bundled:targets/code")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.target)
    lines = (Path(locate(PROMPTS)) / "code.jsonl").read_text("utf-8").splitlines()[: options.prompts]
    prompts = [encode_prompt(tokenizer, json.loads(line)["messages"]) for line in lines]
    ours = decode(options.drafter, options.target, prompts, options.depth, options.new_tokens)
    figures, texts = {"ours": count(ours, options.depth)}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for layout in ("vllm", "speculators"):
            folder = export_drafter(
                options.drafter, Path(temporary) / f"eagle3-{layout}", layout, options.target, options.depth
            )
            speculative = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": options.depth}
            model = (
                {"model": str(folder)}
                if layout == "speculators"
                else {"model": locate(options.target), "speculative_config": speculative}
            )
            texts[layout], figures[f"vLLM, {layout}"] = serve(model, prompts, options.depth, options.new_tokens)
    show(figures)
    different = {
        layout: [i for i, (a, b) in enumerate(zip(found, ours)) if a != b.tokens] for layout, found in texts.items()
    }
    for layout, rows in different.items():
        if rows:
            print(f"{layout}: the texts of prompts {rows} differ")
    tau = {name: f["tau"] for name, f in figures.items()}
    identical = not any(different.values())
    print(
        json.dumps(
            {
                "tau_vllm": tau["vLLM, vllm"],
                "tau_vllm_speculators": tau["vLLM, speculators"],
                "tau_ours": tau["ours"],
                "texts_identical": identical,
            }
        )
    )
    return 0 if identical and all(abs(t / tau["ours"] - 1) <= TOLERANCE for t in tau.values()) else 1


def decode(drafter: str, target_name: str, prompts: list[list[int]], depth: int, new_tokens: int) -> list[Trace]:
    target = TextTarget.load(target_name)
    head = load_drafter(drafter, target.shared, target.layers)
    return [generate(target, HeadDrafter(head, chain(depth)), [p], Sampling(), new_tokens)[0] for p in prompts]


def count(traces: list[Trace], depth: int) -> dict:
    """The engine's figures of our traces: {"tau", "drafts", "accepted", "by position": [depth]}."""
    accepted = [a for trace in traces for a in trace.accepted]
    by_position = [sum(a > k for a in accepted) for k in range(depth)]
    return {
        "tau": 1 + sum(accepted) / len(accepted),
        "drafts": len(accepted),
        "accepted": sum(accepted),
        "by position": by_position,
    }


def serve(model: dict, prompts: list[list[int]], depth: int, new_tokens: int) -> tuple[list[list[int]], dict]:
    """Texts (token ids) and the engine's own counters."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(**model, dtype="float32", max_model_len=1024, enforce_eager=True, disable_log_stats=False)
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=p) for p in prompts],
        SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True),
        use_tqdm=False,
    )
    counters = {
        m.name.removeprefix("vllm:spec_decode_"): m
        for m in engine.get_metrics()
        if m.name.startswith("vllm:spec_decode_")
    }
    drafts, accepted = counters["num_drafts"].value, counters["num_accepted_tokens"].value
    engine.llm_engine.engine_core.shutdown(timeout=60)
    return [list(o.outputs[0].token_ids) for o in outputs], {
        "tau": 1 + accepted / drafts,
        "drafts": drafts,
        "accepted": accepted,
        "by position": counters["num_accepted_tokens_per_pos"].values[:depth],
    }


def show(figures: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="greedy chain, fp32, end token ignored: tokens accepted by position")
    for column in ("", "tau", "drafts", "accepted", *range(1, len(figures["ours"]["by position"]) + 1)):
        table.add_column(str(column), justify="right")
    for name, f in figures.items():
        table.add_row(name, f"{f['tau']:.4f}", *map(str, (f["drafts"], f["accepted"], *f["by position"])))
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
