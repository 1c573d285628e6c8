"""READER beside the drafter that it widens: acceptance length and tokens a second, by kind of prompt and batch size.

    python tests/benchmarks/reader.py [--drafter DIR] [--suites FOLDER] [--part NAME ...] [--datastore DIR]
        [--batch 1 4 8] [--prompts N] [--new-tokens N] [--tree TREE] [--temperature T] [--dtype bf16] [--output FILE]
    python tests/benchmarks/reader.py --memory [--tokens 10000000]

Parts: `rag` and `summarisation`, the categories of Spec-Bench that copy from their prompts, and what does not:
`humaneval`, `chat` (MT-bench) and Spec-Bench's `qa`, `maths` and `translation`, read from FOLDER (default: what
DRAFTSMITH_SUITES names, else `../shared/data/suites` beside the project). Methods: the drafter, `reader` alone and
`reader:DRAFTER`; with --datastore (`draftsmith datastore build`) the last two once more with its texts. All in turn on
the same batches, one tree for all; quotients of tau are paired by prompt, 95 % intervals. tokens a second are those of
the decoding thread's own seconds, where it is alone. Prints a Markdown table and ends with one JSON line: {part:
{batch: {method: {"tau", "quotient", "interval", "tokens_per_second"}}}}.

--memory: a datastore of so many tokens (ids of a power law) is built and asked: seconds, peak memory of the process,
bytes on disk, microseconds a query; the same of the index of a request's own text after a million tokens.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.lossless import dtype_of  # noqa: E402
from draftsmith.eval.measurement.interval import quotient_interval  # noqa: E402
from draftsmith.eval.measurement.journal import Journal  # noqa: E402
from draftsmith.eval.measurement.measure import interleaved, tau, tokens_and_passes, tokens_and_seconds  # noqa: E402
from draftsmith.eval.measurement.progress import Progress  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.launch.drafters import Drafters  # noqa: E402
from draftsmith.launch.methods import ASSISTANT, Methods  # noqa: E402
from draftsmith.models.drafters.datastore import LONGEST, Datastore, write  # noqa: E402
from draftsmith.models.drafters.retrieval import matches  # noqa: E402
from draftsmith.models.drafters.suffix_index import SuffixIndex  # noqa: E402
from draftsmith.models.grow import parse_tree  # noqa: E402
from tests.benchmarks.public import suites_folder  # noqa: E402

PARTS = {  # file, category
    "rag": ("spec_bench.jsonl", "rag"),
    "summarisation": ("spec_bench.jsonl", "summarization"),
    "humaneval": ("eagle_humaneval.jsonl", None),
    "chat": ("eagle_mt_bench.jsonl", None),
    "qa": ("spec_bench.jsonl", "qa"),
    "maths": ("spec_bench.jsonl", "math_reasoning"),
    "translation": ("spec_bench.jsonl", "translation"),
}


def part_of(methods: Methods, folder: Path, part: str, limit: int, new_tokens: int) -> list[list[int]]:
    """The token ids of the first prompts of a part."""
    name, category = PARTS[part]
    lines = [line for line in (folder / name).read_text().splitlines() if line.strip()]
    mine = [line for line in lines if category in (None, json.loads(line).get("category"))][:limit]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"{part}.jsonl"
        file.write_text("\n".join(mine))
        return [p.tokens for p in methods.prompts(str(file), None, new_tokens, 128, True)]


def compared(
    drafter: str,
    folder: Path,
    parts: Sequence[str],
    tree: str,
    limit: int,
    new_tokens: int,
    batches: Sequence[int] = (1,),
    datastore: str | None = None,
    temperature: float = 0.0,
    dtype: str | None = None,
    journal: Path | None = None,
) -> dict:
    """{part: {batch: {method: figures}}}."""
    asked, grown = [drafter, "reader", f"reader:{drafter}"], parse_tree(tree)
    methods = Methods.open(asked, None, ASSISTANT, dtype and dtype_of(dtype), datastore=datastore)
    alone = Drafters(methods.target, ASSISTANT)
    decoders = {"drafter": alone.decoder(drafter, grown), "reader": alone.decoder("reader")}
    decoders["reader over it"] = alone.decoder(f"reader:{drafter}", grown)
    if datastore is not None:
        decoders["reader, datastore"] = methods.drafters.decoder("reader")
        decoders["reader over it, datastore"] = methods.drafters.decoder(f"reader:{drafter}", grown)
    settings = {"drafter": drafter, "tree": tree, "limit": limit, "tokens": new_tokens, "temperature": temperature}
    kept, found = journal and Journal(journal, settings | methods.identity()), {}
    for part in parts:
        prompts = part_of(methods, folder, part, limit, new_tokens)
        for batch in batches:
            runs = interleaved(
                decoders,
                prompts,
                Sampling(temperature),
                new_tokens,
                methods.stops,
                batch,
                Progress(print, f"{part}, batch {batch}", len(prompts), every=0),
                journal=kept,
                key=f"{part}/{batch}",
            )
            first, cells = tokens_and_passes(runs["drafter"].traces), {}
            for name, run in runs.items():
                counts = tokens_and_passes(run.traces)
                tokens, seconds = tokens_and_seconds(run, all("busy" in one for one in run.seconds))
                cells[name] = {
                    "tau": round(tau(run.traces), 3),
                    "quotient": round(tau(run.traces) / tau(runs["drafter"].traces), 3),
                    "interval": [round(x, 3) for x in quotient_interval(counts, first)],
                    "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
                }
            found.setdefault(part, {})[str(batch)] = cells | {"prompts": len(prompts)}
    return found


def shown(found: dict) -> list[str]:
    lines = ["| part | batch | method | tau | over the drafter | tokens/s |", "| - | - | - | - | - | - |"]
    for part, by_batch in found.items():
        for batch, cells in by_batch.items():
            for name, cell in cells.items():
                if name == "prompts":
                    continue
                low, high = cell["interval"]
                quotient = "" if name == "drafter" else f"{cell['quotient']:.2f} ({low:.2f}-{high:.2f})"
                rate = cell["tokens_per_second"]
                lines.append(f"| {part} | {batch} | {name} | {cell['tau']:.2f} | {quotient} | {rate} |")
    return lines


def drawn(generator, count: int) -> np.ndarray:
    return np.minimum(generator.zipf(1.3, count), 49_151)


def microseconds(ask, generator) -> int:
    contexts = [drawn(generator, LONGEST).tolist() for _ in range(1000)]
    started = time.thread_time()
    for context in contexts:
        ask(context)
    return round(1e6 * (time.thread_time() - started) / len(contexts))


def memory(tokens: int) -> dict:
    """Of a datastore, in texts of 511 tokens and their ends."""
    generator = np.random.default_rng(0)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    with tempfile.TemporaryDirectory() as place:
        folder, before, started = Path(place) / "store", peak(), time.time()
        write((drawn(generator, 511) for _ in range(tokens // 512)), folder, 49_152, {})
        seconds, after, store = time.time() - started, peak(), Datastore(folder)
        return {
            "tokens": len(store),
            "seconds": round(seconds, 1),
            "peak_mb_more": round(after - before),
            "mb_on_disk": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6),
            "microseconds_a_query": microseconds(lambda text: store.following(store.search(text)[1]), generator),
        }


def index_memory(tokens: int) -> dict:
    """Of the index of the text itself, four tokens a pass."""
    generator, index = np.random.default_rng(0), SuffixIndex(tokens)
    text = drawn(generator, tokens).tolist()
    started = time.thread_time()
    for start in range(0, tokens, 4):
        index.append(0, text[start : start + 4])
    return {
        "tokens": len(index),
        "bytes": index.nbytes,
        "tokens_per_second": round(tokens / (time.thread_time() - started)),
        "microseconds_a_query": microseconds(lambda context: matches(context, index, None), generator),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--drafter", default="bundled:drafters/eagle3-smollm2")
    parser.add_argument("--suites", type=Path)
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--datastore")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--prompts", type=int, default=8, help="of each part")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--tree", default="dynamic:3x4x10")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", help="of the target; default: fp32 on a CPU")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of --memory's datastore")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args()
    if a.memory:
        print(json.dumps({"datastore": memory(a.tokens), "index": index_memory(1_000_000)}))
        return
    torch.set_num_threads(1)
    folder = suites_folder(a.suites, [PARTS[part][0] for part in a.part])
    journal = a.output and Path(f"{a.output}.partial")
    found = compared(
        a.drafter,
        folder,
        a.part,
        a.tree,
        a.prompts,
        a.new_tokens,
        a.batch,
        a.datastore,
        a.temperature,
        a.dtype,
        journal,
    )
    print("\n".join(shown(found)))
    if a.output:
        a.output.write_text(json.dumps(found, indent=1))
        journal.unlink()  # a later run measures anew
    print(json.dumps(found))


if __name__ == "__main__":
    main()
