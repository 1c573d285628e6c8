"""The EAGLE-3 training step beside the packages specforge and speculators: tokens per CPU-second, and how memory grows
with the length.

    python tests/benchmarks/training.py [--quick]

Needs no GPU. Makes `.venv-peers` (about 2 GB; TORCH_INDEX_URL names another index for torch) and runs each package from
its own wheel there, as a worker of `peers.py` beside a worker of ours. Ends with one JSON line: `ratio`, our tokens per
CPU-second over the better peer's, and `memory_exponent`.

The step: Llama target of random weights (seed 0; hidden 256, intermediate 688, 8 layers, 8 query and 4 key/value heads,
vocabulary 8,192), one-layer drafter with 2,048 tokens, 7 steps, loss decay 0.8, fp32, 1 thread, fused AdamW, clipping
at 0.5, output head trained. Taps and final states are cached; the teacher's logits are recomputed inside the step. The
draft vocabulary holds every argmax of the target at the timed shapes, so that all rows are supervised for all three.
`1x256` is one document of 256 tokens, `2x512` two of 512, `half` is 2x512 with the second half of each supervised.
Workers take turns, one step each; medians of CPU time.

Each package runs in the fastest configuration that works on a CPU (the others are timed without --quick);
FlexAttention, the default of both, has no backward there. torch 2.13 and transformers 5.19, which specforge pins lower.
  specforge    attention `sdpa`, TORCHDYNAMO_DISABLE=1 (compiled is no faster and compiles for half a minute), teacher
               from full logits (its
               compact teacher is no faster here). [1] `specforge.core.loss`, a Triton kernel, is replaced before the
                   import by the same
               loss with the same closed-form gradient in plain torch (as fast as or faster than autograd through
                   log_softmax). The
               embeddings are frozen, as its trainer does.
  speculators  attention `sdpa` (eager is 6 % slower at 1x256 and 2.7 times at 2x512), loss `kl_div` in the eager form
      that the package
               offers, documents packed in one row. [2] The output head, which it freezes, is unfrozen. Its teacher
                   computes only the 2,048
               draft columns; the other two also find the argmax over the vocabulary.

Same work: all three start from the same weights, and the losses of the first step at 1x256 are compared. specforge
divides by all rows, we by the supervised ones; speculators' KL is our cross-entropy less the teacher's entropy.

Memory: growth of the peak resident size over one step that follows a step of 64 tokens, a fresh process per length, one
document or documents of 512 tokens; the exponent is the slope of log growth over log length, the larger of the two
layouts. The column `peak MiB` of the table is the growth since the worker was ready, optimizer state included.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.models.features import FeatureSpec, Packing
from draftsmith.models.heads import Eagle3Config, Eagle3Head
from draftsmith.models.targets import TextTarget

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-peers"
SHARED = ["transformers>=5.17,<5.20"]
PEERS = {  # the package, and what its training core imports beyond torch and transformers
    "specforge": ["specforge==0.2.0"],
    "speculators": [
        "speculators==0.9.0",
        "pydantic>=2",
        "pydantic-settings>=2",
        "loguru",
        "openai>=2",
        "datasets>=4,<=5.1",
        "hs-connectors==0.9.0",
    ],
}
NOTES = {
    "draftsmith": "head.loss, attention of models/heads/attention.py",
    "specforge": "sdpa, TORCHDYNAMO_DISABLE=1, full-vocabulary teacher; [1] its Triton loss kernel replaced by the "
    "same formula in plain torch",
    "specforge-compiled": "the same with its torch.compile helpers; [1]",
    "specforge-compact": "as specforge, with its compact teacher; [1]",
    "speculators": "sdpa, its eager kl_div, documents packed in one row; [2] its output head unfrozen",
    "speculators-eager": "as speculators, with eager attention; [2]",
}
OTHERS = {"specforge": ["specforge-compiled", "specforge-compact"], "speculators": ["speculators-eager"]}
TIMED = {"1x256": (1, 256), "half": (2, 512), "2x512": (2, 512), "1x2048": (1, 2048)}  # documents, tokens of each
ONE_DOCUMENT = {"1x512": (1, 512), "1x1024": (1, 1024), "1x2048": (1, 2048), "1x4096": (1, 4096)}
PACKED = {"1x512": (1, 512), "2x512": (2, 512), "4x512": (4, 512), "8x512": (8, 512)}
WARM = {"1x64": (1, 64)}
ROUNDS = {"1x256": 15, "half": 5, "2x512": 7, "1x2048": 3}


def install() -> list[str]:
    """Makes the peers' environment once; returns the peers that are installed in it. What cannot be installed is named
    in one line.
    """
    python, stamp = VENV / "bin" / "python", VENV / ".draftsmith"
    wanted = hashlib.sha256(json.dumps([sys.version_info[:2], SHARED, PEERS]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return list(PEERS)

    def pip(*arguments):
        """None, or why nothing was installed."""
        done = subprocess.run(
            [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", *arguments],
            capture_output=True,
            text=True,
        )
        return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]

    print(f"making {VENV.name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    index = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    error = (pip("torch==2.13.0", *index) and pip("torch>=2.6,<2.14", *index)) or pip(*SHARED)
    if error:
        print(f"torch and transformers: not installed ({error})")
        return []
    installed = []
    for name, (package, *needs) in PEERS.items():
        error = (pip(*needs) if needs else None) or pip("--no-deps", package)
        if error:
            print(f"{name}: not installed ({error})")
        else:
            installed.append(name)
    if len(installed) == len(PEERS):
        stamp.write_text(wanted)
    return installed


def prepare(folder: Path, shapes: dict[str, tuple[int, int]]) -> torch.Tensor:
    """Writes what the workers share and each shape's cached features. Returns the teacher's mean entropy per step at
    1x256 [7].
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    target = TextTarget(LlamaForCausalLM(config).float())
    spec, last = FeatureSpec(taps=(*Eagle3Config.for_target(config).taps, "last")), []
    target.body.norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0]))
    counts = torch.zeros(config.vocab_size)
    for name, (documents, length) in shapes.items():
        tokens = torch.randint(config.vocab_size, (documents, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if name == "half":
            mask[:, : length // 2] = False
        packing = Packing(tuple(range(0, documents * length + 1, length)), mask.flatten())
        hidden = target.features(tokens.flatten(), packing, spec).hidden.view(documents, length, -1)
        taps, states = (x.contiguous() for x in hidden.split([3 * config.hidden_size, config.hidden_size], -1))
        save_file(
            {"tokens": tokens, "mask": mask, "taps": taps, "last": last.pop().contiguous(), "final": states},
            folder / f"{name}.safetensors",
        )
        if name in TIMED:
            counts += torch.bincount(target.project(states).argmax(-1).flatten(), minlength=config.vocab_size)
        if name == "1x256":
            final = states[0]
    ids = counts.topk(2048).indices.sort().values
    missed = float(1 - counts[ids].sum() / counts.sum())
    print(f"draft vocabulary: {int((counts > 0).sum())} different argmaxes, {missed:.1%} of the rows outside")
    head = Eagle3Head(Eagle3Config.for_target(config, draft_vocab_size=len(ids)), target.shared, ids)
    drafter = {f"drafter.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(
        {
            "embedding": target.embedding.clone(),
            "lm_head": target.head.weight.clone(),
            "norm": target.body.norm.weight.clone(),
            "ids": ids,
            **drafter,
        },
        folder / "shared.safetensors",
    )
    entropy = torch.distributions.Categorical(logits=target.project(final, ids)).entropy()
    return torch.stack([entropy[1 + k : -1].mean() for k in range(7)])


class Worker:
    """A process of peers.py. `step` returns its answer; a worker that fails says why in one line and answers None from
    then on.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.log = name, folder / f"{name}.log"
        python = sys.executable if name == "draftsmith" else VENV / "bin" / "python"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if name != "specforge-compiled":
            environment["TORCHDYNAMO_DISABLE"] = "1"
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("peers.py"), name, folder],
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
        )
        self.alive = True
        ready = self._answer()
        self.parameters = ready and ready["parameters"]

    def step(self, shape: str) -> dict | None:
        if self.alive:
            self.process.stdin.write(f"step {shape}\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline() if self.alive else ""
        if self.alive and not line:
            self.alive = False
            print(
                f"{self.name}: does not run ({(self.log.read_text().strip().splitlines() or ['no message'])[-1][:300]})"
            )
        return json.loads(line) if line else None

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare_losses(first: dict[str, list[float]], entropy: torch.Tensor):
    """First losses per worker at 1x256, brought to one reduction: the mean cross-entropy over the supervised rows."""
    ours = torch.tensor(first["draftsmith"])
    rows = torch.tensor([256 - 2 - k for k in range(len(ours))])
    for name, losses in first.items():
        theirs = torch.tensor(losses)
        if name.startswith("specforge"):
            theirs = theirs * 256 / rows
        elif name.startswith("speculators"):
            theirs = theirs + entropy
        print(
            f"  {name:20} {' '.join(f'{x:.4f}' for x in theirs.tolist())}   largest difference from ours "
            f"{float((theirs - ours).abs().max()):.1e}"
        )


def time_steps(workers: list[Worker], entropy: torch.Tensor, factor: int) -> dict[str, dict[str, float]]:
    """{shape: {worker: tokens per CPU-second}}, medians of interleaved rounds after one step of warm-up."""
    figures = {}
    for shape, (documents, length) in TIMED.items():
        warm = {worker.name: worker.step(shape) for worker in workers}
        if shape == "1x256":
            print("losses of the 7 steps before any update, 1x256, as the mean cross-entropy over the supervised rows:")
            compare_losses({name: answer["losses"] for name, answer in warm.items() if answer}, entropy)
            print(
                f"{'shape':8} {'worker':20} {'CPU-s/step':>10} {'tokens per CPU-s: median (min - max)':>38} "
                f"{'wall s':>7} {'trained':>10} {'peak MiB':>9}"
            )
        answers = {worker.name: [] for worker in workers}
        for _ in range(factor * ROUNDS[shape]):
            for worker in workers:
                answers[worker.name].append(worker.step(shape))
        figures[shape] = {}
        for worker in workers:
            if not worker.alive:
                continue
            cpu = sorted(answer["cpu"] for answer in answers[worker.name])
            wall = statistics.median(answer["wall"] for answer in answers[worker.name])
            rate = figures[shape][worker.name] = documents * length / statistics.median(cpu)
            spread = f"{rate:.0f} ({documents * length / cpu[-1]:.0f} - {documents * length / cpu[0]:.0f})"
            print(
                f"{shape:8} {worker.name:20} {statistics.median(cpu):10.3f} {spread:>38} {wall:7.2f} "
                f"{worker.parameters:10,} "
                f"{answers[worker.name][-1]['growth_from_start']:9.0f}",
                flush=True,
            )
    return figures


def grow_memory(name: str, shapes: dict[str, tuple[int, int]], folder: Path) -> float | None:
    """Prints the growth of peak memory per shape; returns its exponent in the number of tokens."""
    points = []
    for shape, (documents, length) in shapes.items():
        worker = Worker(name, folder)
        worker.step("1x64")
        answer = worker.step(shape)
        worker.close()
        if answer is None:
            return None
        points.append((documents * length, answer["growth"]))
    x, y = [math.log(tokens) for tokens, _ in points], [math.log(growth) for _, growth in points]
    exponent = statistics.linear_regression(x, y).slope
    print(
        f"{name:20} "
        + "  ".join(f"{shape} {growth:.0f} MiB" for shape, (_, growth) in zip(shapes, points))
        + f"  exponent {exponent:.2f}",
        flush=True,
    )
    return exponent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one configuration per peer, fewer rounds, memory of ours only (4 to 8 minutes)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter()

    def part(name):
        nonlocal clock
        print(f"-- {name}: {time.perf_counter() - clock:.0f} s", flush=True)
        clock = time.perf_counter()

    peers = install()
    part(f"environment of the peers ({VENV.name})")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        entropy = prepare(folder, {**WARM, **TIMED, **ONE_DOCUMENT, **PACKED})
        part("target and cached features")
        names = [
            "draftsmith",
            *peers,
            *([] if arguments.quick else [other for peer in peers for other in OTHERS[peer]]),
        ]
        workers = [worker for worker in (Worker(name, folder) for name in names) if worker.alive]
        rates = time_steps(workers, entropy, 1 if arguments.quick else 2)
        for worker in workers:
            worker.close()
        part("timing, interleaved")
        print("growth of peak memory over one step:")
        exponents = [grow_memory("draftsmith", shapes, folder) for shapes in (ONE_DOCUMENT, PACKED)]
        if not arguments.quick:
            for peer in peers:
                grow_memory(peer, ONE_DOCUMENT, folder)
                grow_memory(peer, PACKED, folder)
        part("memory")
    ratio = {}
    for shape in ("1x256", "2x512", "1x2048", "half"):
        best = max((rate for name, rate in rates[shape].items() if name != "draftsmith"), default=None)
        ratio[shape] = best and round(rates[shape]["draftsmith"] / best, 2)
    for name in names:
        print(f"{name}: {NOTES[name]}")
    print(json.dumps({"ratio": ratio, "memory_exponent": round(max(exponents), 2)}))


if __name__ == "__main__":
    main()
