"""What one accelerator gives: verify passes and draft levels beside the memory floor, the loop's own time, the bundled
models, training.

    python tests/benchmarks/gpu.py [--quick] [--sections verify,draft,overhead,bundled,training] [--output FILE.json]

The large target is a Llama of Llama-3.1-8B's shape with random bf16 weights, made on the device; the head is EAGLE-3's
for that shape (draft vocabulary 32,000). Each section builds what it needs, prints its table and rewrites FILE.json as
soon as it is done, so that a time limit loses only the section in progress. Ends with one JSON line of all figures.

Times are medians in milliseconds of synchronised calls after a warm-up. `ms` ends when the device is done, `host_ms`
when the host has issued all work: where they are close, launching the kernels takes the time and not the device.
Passes with and without CUDA graphs stand beside each other (without CUDA: of static shapes, and as ever).
`floor_ms` = bytes that one call must read / bandwidth of a device copy measured here (bytes read + bytes written, per
second). `--device cpu --tiny` runs every section on toy shapes; its times mean nothing.
"""

import argparse
import datetime
import gc
import json
import platform
import shlex
import statistics
import sys
import time
import traceback
from itertools import product
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.decode import Clock, generate  # noqa: E402
from draftsmith.eval.measurement.measure import Looped, decode_batches, interleaved, summary  # noqa: E402
from draftsmith.eval.measurement.prompts import read_prompts  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.launch.measurement import CHAIN_DEPTH, LARGE_TREE  # noqa: E402
from draftsmith.launch.methods import bundled, check_writable, write_json  # noqa: E402
from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.drafters import HeadDrafter, NoDrafter  # noqa: E402
from draftsmith.models.features import Features, FeatureSpec  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.grow import chain, parse_tree  # noqa: E402
from draftsmith.models.heads import Eagle3Config, Eagle3Objective  # noqa: E402
from draftsmith.models.noise import Draw  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402
from draftsmith.models.tree import DraftTree  # noqa: E402
from tests.benchmarks.gpu_models import (  # noqa: E402
    FULL,
    QUICK,
    TINY,
    Scale,
    random_features,
    random_head,
    random_target,
    random_tokens,
)

ROWS = (1, 16, 32, 60)  # tree sizes of the verify passes, root included
WIDTHS = (1, 10)  # nodes of a draft level
TARGET, DRAFTER, PROMPTS = "bundled:targets/code", "bundled:drafters/eagle3-code", "bundled:prompts/code.jsonl"


# Measuring


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, action):
    """Calls once: (result, milliseconds until the device is done, milliseconds until the host is)."""
    synchronise(device)
    start = time.perf_counter()
    result = action()
    host = time.perf_counter()
    synchronise(device)
    return result, 1e3 * (time.perf_counter() - start), 1e3 * (host - start)


def medians(calls: list[tuple[float, float]]) -> dict:
    """{"ms", "host_ms"} of (device, host) milliseconds."""
    device, host = zip(*calls)
    return {"ms": statistics.median(device), "host_ms": statistics.median(host)}


def repeated(device: torch.device, action, repeats: int, warm_up: int = 3) -> dict:
    calls = [timed(device, action)[1:] for _ in range(warm_up + repeats)]
    return medians(calls[warm_up:])


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copying a buffer of `size` bytes on the device."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    place = torch.empty_like(source)
    return 2 * size / (1e-3 * repeated(device, lambda: place.copy_(source), 10)["ms"])


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def beside_floor(figures: dict, size: int, bandwidth: float) -> dict:
    floor = 1e3 * size / bandwidth
    return {**figures, "floor_ms": floor, "ratio": figures["ms"] / floor}


def show(title: str, rows: list[dict]) -> None:
    """One table (the title alone where there are no rows); every row has the columns of the first."""

    def text(v):
        return (
            "-"
            if v is None
            else f"{v:.3f}"
            if isinstance(v, float) and abs(v) < 100
            else f"{v:.0f}"
            if isinstance(v, float)
            else str(v)
        )  # noqa: E731

    cells = [list(rows[0]), *[[text(row[name]) for name in rows[0]] for row in rows]] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}", *["  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in cells], sep="\n", flush=True)


def kind(model, asked: bool) -> str:
    """How the passes of a target or head ran whose graphs were switched on, or not."""
    return "captured" if model.graphs.on else "eager (graphs given up)" if asked else "eager"


# Sections


@torch.inference_mode()
def verify(scale: Scale, device: torch.device) -> dict:
    """A verify pass over binary trees, ancestors and masks included; weights and keys and values are what it must
    read.
    """
    target, bandwidth = random_target(scale, device), copy_bandwidth(device, scale.copied)
    session = target.open(FeatureSpec(Eagle3Config.for_target(target.config).taps), 1, scale.context + max(ROWS))
    session.prefill([random_tokens(scale, scale.context)])
    weights, config = size_of(target.model) - target.embedding.numel() * target.embedding.element_size(), target.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * target.embedding.element_size()
    rows = []
    for count, graphs in product(ROWS, (True, False)):
        target.graphs.on = graphs
        tokens = torch.tensor([random_tokens(scale, count)], device=device)
        parents = torch.tensor([[-1, *[(i - 1) // 2 for i in range(1, count)]]], device=device)
        figures = repeated(device, lambda t=tokens, p=parents: session.verify(DraftTree.of(t, p)), scale.repeats)
        size = weights + row * (scale.context + count)
        rows.append({"rows": count, "passes": kind(target, graphs), **beside_floor(figures, size, bandwidth)})
    show(
        f"verify pass behind {scale.context} rows, batch 1, bf16; device copy {bandwidth / 1e9:.0f} GB/s, weights "
        f"{weights / 1e9:.2f} GB",
        rows,
    )
    return {"copy_bytes_per_second": bandwidth, "weight_bytes": weights, "context": scale.context, "passes": rows}


@torch.inference_mode()
def draft(scale: Scale, device: torch.device) -> dict:
    """Levels of `expand` at fixed widths, and whole trees. Each round commits one row, so the context grows by one row
    a round.
    """
    target, bandwidth = random_target(scale, device), copy_bandwidth(device, scale.copied)
    head = random_head(scale, target.embedding)
    features = target.open(head.feature_spec, 1, scale.context).prefill([random_tokens(scale, scale.context)]).features
    committed = Features(features.tokens[:, -1:], features.hidden[:, -1:], torch.ones_like(features.lengths))
    root, fused = committed.tokens[:, 0], size_of(head.fc)
    warm_up, rows = 3, []
    for width in WIDTHS:
        context, first, later = head.prefill(features), [], []
        tokens = torch.tensor([random_tokens(scale, width)], device=device)
        from_root, onwards = torch.zeros_like(tokens), torch.arange(width, device=device)[None]
        for turn in range(warm_up + scale.repeats):
            (_, beam), *times = timed(
                device, lambda c=context: head.expand(head.roots(c), root[:, None], torch.zeros_like(root)[:, None])
            )
            first += [tuple(times)] * (turn >= warm_up)
            for parents in (from_root, onwards, onwards):
                (_, beam), *times = timed(device, lambda b=beam, t=tokens, p=parents: head.expand(b, t, p))
                later += [tuple(times)] * (turn >= warm_up)
            head.extend(context, committed)
        if width == WIDTHS[0]:
            rows.append(
                {
                    "what": "root level",
                    "passes": "eager",
                    "width": 1,
                    **beside_floor(medians(first), size_of(head), bandwidth),
                }
            )
        rows.append(
            {
                "what": "later level",
                "passes": "eager",
                "width": width,
                **beside_floor(medians(later), size_of(head) - fused, bandwidth),
            }
        )
    for policy, graphs in product((parse_tree(LARGE_TREE), chain(CHAIN_DEPTH)), (True, False)):
        head.graphs.on = graphs
        drafter, calls = HeadDrafter(head, policy), []
        drafter.begin(features, root)
        for turn in range(warm_up + scale.repeats):
            draw = Draw(0.0, 0, [0], [scale.context + turn])
            calls.append(timed(device, lambda d=drafter, w=draw: d.propose(w))[1:])
            drafter.observe(committed, root)
        size, passes = size_of(head) * policy.depth - fused * (policy.depth - 1), kind(head, graphs)
        rows.append(
            {
                "what": str(policy),
                "passes": passes,
                "width": None,
                **beside_floor(medians(calls[warm_up:]), size, bandwidth),
            }
        )
    show(f"drafting behind {scale.context} rows, batch 1, bf16; head {size_of(head) / 1e9:.2f} GB", rows)
    return {"head_bytes": size_of(head), "context": scale.context, "levels": rows}


def overhead(scale: Scale, device: torch.device) -> dict:
    """Milliseconds per pass by phase of the decode loop, the drafter's prefill included; `loop_ms` is what draft,
    verify and overhead leave of the total.
    """
    target = random_target(scale, device)
    drafter, prompt, rows = (
        HeadDrafter(random_head(scale, target.embedding), parse_tree(LARGE_TREE)),
        random_tokens(scale, scale.context),
        [],
    )
    for temperature in (0.0, 1.0):
        for method in (NoDrafter(), drafter):
            generate(target, method, [prompt], Sampling(temperature), 3)
            clock = Clock(device)
            trace = generate(target, method, [prompt], Sampling(temperature), scale.loop_tokens, clock=clock)[0]
            split = {phase: 1e3 * seconds / len(trace.emitted) for phase, seconds in clock.seconds.items()}
            split["loop"] = split["total"] - split["draft"] - split["verify"] - split["overhead"]
            rows.append(
                {
                    "method": str(method),
                    "T": temperature,
                    "passes": len(trace.emitted),
                    **{f"{k}_ms": v for k, v in split.items()},
                }
            )
    show(f"decode loop, per pass, batch 1, vocabulary {target.vocab_size}", rows)
    return {"runs": rows}


def bundled_models(scale: Scale, device: torch.device) -> dict:
    """The bundled target and shipped drafter on held-out prompts, one at a time: plain, 60-node tree and chain of 5,
    interleaved.

    Texts are compared with a plain run of the same dtype and temperature that records the top-2 gap of the scores at
    each token (logits at T = 0, logits and keyed noise at T = 1). `gap` is that of the plain run where the texts part;
    null at the first token.
    """
    tokenizer = load_tokenizer(TARGET)
    prompts = [p.tokens for p in read_prompts(bundled(PROMPTS), tokenizer, scale.prompts)]
    rows, parted = [], []
    for dtype in (torch.float32, torch.bfloat16):
        target = TextTarget.load(TARGET, dtype, device)
        head, stops = load_drafter(bundled(DRAFTER), target.shared, target.layers), stop_ids(target, tokenizer)
        drafters = [
            NoDrafter(),
            *(HeadDrafter(head, policy) for policy in (parse_tree(LARGE_TREE), chain(CHAIN_DEPTH))),
        ]
        methods = {str(drafter): Looped(target, drafter) for drafter in drafters}
        for temperature in (0.0, 1.0):
            sampling, labels = Sampling(temperature), {"dtype": str(dtype).removeprefix("torch."), "T": temperature}
            reference = decode_batches(target, NoDrafter(), prompts, sampling, scale.new_tokens, stops, 1, margins=True)
            for method, run in (runs := interleaved(methods, prompts, sampling, scale.new_tokens, stops)).items():
                figures = summary(run, reference, runs["plain"])
                rows.append(
                    {
                        **labels,
                        "method": method,
                        **{k: figures[k] for k in ("tau", "tokens_per_second", "speedup", "accounted_speedup")},
                        "identical": figures["identical"],
                        "prompts": figures["prompts"],
                        "lossless": figures["lossless"],
                    }
                )
                parted += [
                    {**labels, "method": method, "prompt": d["prompt"], "token": d["token"], "gap": d["margin"]}
                    for d in figures["divergences"]
                ]
    show(f"bundled target and drafter, {len(prompts)} prompts, up to {scale.new_tokens} new tokens, batch 1", rows)
    show(f"texts that part from plain decoding: {len(parted)}", parted)
    return {"new_tokens": scale.new_tokens, "runs": rows, "divergences": parted}


def training(scale: Scale, device: torch.device) -> dict:
    """Training-time-test steps (loss, backward, AdamW on fp32 copies of bf16 parameters) on one random sequence.

    The longest sequence is sought by doubling: the last length that ran, and what ended the search (`memory`, `time` or
    `limit`).
    """
    torch.manual_seed(0)
    shape = (scale.shape["vocab_size"], scale.shape["hidden_size"])
    embedding, output = (torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02 for _ in range(2))
    head = random_head(scale, embedding)
    copies = [p.detach().float() for p in head.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=1e-5)

    def step(features):
        head.loss(features, Eagle3Objective(scale.steps, 0.8))[0].backward()
        for parameter, copy in zip(head.parameters(), copies):
            parameter.grad, copy.grad = None, parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in zip(head.parameters(), copies):
                parameter.copy_(copy)
        optimizer.zero_grad()

    def measure(length, warm_up, repeats):
        """A row of the table, or None where memory did not suffice."""
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            features = random_features(scale, head, output, length)
            ms = repeated(device, lambda: step(features), repeats, warm_up)["ms"]
        except torch.OutOfMemoryError:
            return None
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return {"tokens": length, "ms": ms, "tokens_per_second": 1e3 * length / ms, "peak_gib": peak and peak / 2**30}

    rows, ended = [measure(scale.length, 2, max(2, scale.repeats // 3))], "limit"
    while rows[-1] is not None and 2 * rows[-1]["tokens"] <= scale.longest:
        if 4 * rows[-1]["ms"] > 1e3 * scale.patience:  # attention grows with the square of the length
            ended = "time"
            break
        rows.append(measure(2 * rows[-1]["tokens"], 1, 1))
        if rows[-1] is None:
            head.zero_grad()
            release(device)
    if rows[-1] is None:
        rows, ended = rows[:-1], "memory"
    parameters, longest = sum(p.numel() for p in head.parameters()), rows[-1]["tokens"] if rows else 0
    show(
        f"training, {scale.steps} steps, {parameters / 1e6:.0f} M parameters, bf16; longest sequence {longest} "
        f"(ended by {ended})",
        rows,
    )
    return {"head_parameters": parameters, "steps": scale.steps, "lengths": rows, "longest": longest, "ended_by": ended}


SECTIONS = {"verify": verify, "draft": draft, "overhead": overhead, "bundled": bundled_models, "training": training}


def release(device: torch.device) -> None:
    """Gives the memory of dead tensors back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rounded(value):
    """Floats to five significant digits, in lists and dicts too."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer repeats and prompts")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: a check of this program, not a measurement")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after each section")
    arguments = parser.parse_args()
    device, wanted = torch.device(arguments.device), arguments.sections.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        parser.error(f"--sections: found {unknown[0]!r}, expected some of {','.join(SECTIONS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found no CUDA device, expected one (or --device cpu --tiny)")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("--device: found cpu, expected --tiny with it (the large target is never made on a CPU)")
    if arguments.output:
        check_writable(arguments.output.parent)
    scale = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    figures = {
        "date": datetime.date.today().isoformat(),
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": f"python tests/benchmarks/gpu.py {shlex.join(sys.argv[1:])}".rstrip(),
        "seconds": {},
    }
    print(*[f"{k}: {figures[k]}" for k in ("date", "card", "torch", "transformers", "command")], sep="\n", flush=True)
    failed = False
    for name in wanted:
        start = time.perf_counter()
        try:
            figures[name] = rounded(SECTIONS[name](scale, device))
        except Exception as error:  # the other sections are still worth having
            traceback.print_exc()
            figures[name], failed = {"error": f"{type(error).__name__}: {str(error)[:200]}"}, True
        figures["seconds"][name] = round(time.perf_counter() - start, 1)
        release(device)
        if arguments.output:
            write_json(arguments.output, figures)
    print(json.dumps(figures))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
