"""What moving accepted rows to the front of the cache costs after every pass, and what leaving them would save.

    python tests/benchmarks/compaction.py [--target bundled:targets/smollm2] [--batch 1 8 32] [--nodes 10]
        [--length 300] [--dtype bf16] [--output FILE]

A pass writes a row for every node of the draft trees, of which the accepted ones are kept. The cache moves these to the
front after every pass (R = 1). READER moves them every R passes (or less often, where few requests are decoded), so
that the target reads the dead rows until then. With c_0 the fixed cost of a move, w dead rows a pass and c_r what one
dead row adds to a pass, that costs

    c_0 / R + c_r * w * (R - 1) / 2

a pass (moved rows cost the same at every R), which is least at R* = sqrt(2 c_0 / (c_r w)).

c_0 is what a move of a single row a request costs, c_r the difference of passes behind `--length` rows and behind 512
more, by the row. Medians of the thread's own seconds, tau = 2. Prints a Markdown table and ends with one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from math import sqrt
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.lossless import dtype_of  # noqa: E402
from draftsmith.models.features import FeatureSpec  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402
from draftsmith.models.tree import DraftTree  # noqa: E402

TAU, EVERY, MORE = 2, (1, 2, 4, 8, 16, 32), 512


def milliseconds(call, repeats: int) -> float:
    found = []
    for _ in range(repeats + 2):
        started = time.thread_time()
        call()
        found.append(1e3 * (time.thread_time() - started))
    return statistics.median(found[2:])


def of_batch(target: TextTarget, batch: int, nodes: int, length: int, repeats: int) -> dict:
    """Milliseconds a pass, and what a move and a dead row cost of it."""
    generator, passes = torch.Generator().manual_seed(0), {}
    draw = lambda *shape: torch.randint(target.vocab_size, shape, generator=generator)  # noqa: E731
    parents = torch.tensor([-1, *(n // 2 for n in range(nodes))])
    tree = DraftTree.of(draw(batch, nodes + 1), parents.expand(batch, -1))
    session = target.open(FeatureSpec(taps=()), batch, length + MORE + nodes + 1)
    # Rows of the longer sessions stand at the front for requests of unlike lengths, as in decoding
    session.prefill(draw(batch, length + MORE).tolist())
    for rows in (length + MORE, length):
        session.rewind(torch.full((batch,), rows))
        passes[rows] = milliseconds(lambda: session.verify(tree), repeats)
    cache, moves = session.cache, {}
    lengths = cache.lengths - torch.arange(batch) % 7
    for rows in (1, TAU):
        path, counts = torch.arange(rows).add(1).expand(batch, -1), torch.full((batch,), rows)

        def move():
            cache.lengths = lengths
            cache.commit(path, counts)

        moves[rows] = milliseconds(move, 10 * repeats)
    dead, row = batch * (nodes + 1 - TAU), (passes[length + MORE] - passes[length]) / (MORE * batch)
    fixed = moves[1]
    cost = {every: fixed / every + row * dead * (every - 1) / 2 for every in EVERY}
    return {
        "pass_ms": round(passes[length], 2),
        "move_ms": round(moves[TAU], 3),
        "share": round(moves[TAU] / passes[length], 4),
        "dead_row_us": round(1e3 * row, 2),
        "best_r": round(min(32, max(1, sqrt(2 * fixed / max(row * dead, 1e-9)))), 1),
        "ms_by_r": {str(every): round(ms, 3) for every, ms in cost.items()},
        "most_saved": round((cost[1] - min(cost.values())) / passes[length], 4),
    }


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="bundled:targets/smollm2")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--nodes", type=int, default=10, help="drafted nodes of a tree")
    parser.add_argument("--length", type=int, default=300, help="committed rows of a request")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", help="of the target; default: fp32 on a CPU")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    target = TextTarget.load(a.target, a.dtype and dtype_of(a.dtype))
    found = {str(batch): of_batch(target, batch, a.nodes, a.length, a.repeats) for batch in a.batch}
    heads = " | ".join(f"R = {every}" for every in EVERY)
    print(f"| batch | pass, ms | move, ms (share) | dead row, us | R* | {heads} | most saved |")
    print("|-" * (6 + len(EVERY)) + "|")
    for batch, row in found.items():
        costs = " | ".join(f"{ms:.2f}" for ms in row["ms_by_r"].values())
        print(
            f"| {batch} | {row['pass_ms']} | {row['move_ms']} ({row['share']:.1%}) | {row['dead_row_us']} "
            f"| {row['best_r']} | {costs} | {row['most_saved']:.1%} |"
        )
    if a.output:
        a.output.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
