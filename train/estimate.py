"""What a run will take before anything is loaded: parameters are counted on the meta device, time is measured on one
layer and one short step.

Memory is per process, in bytes. Activations of the drafter are `saved_per_row` numbers (the head's own config says
them) per row that is trained on and step, and once per supervised token the teacher's probabilities [Vd] in fp32.
Behind a probe the target's own activations are kept too, about

    layers * (8 h + 4 I)   numbers per row that is trained on.

What Python and its libraries take (about 0.7 GB) is not in it.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from draftsmith.models.features import Packing, Shared, Teacher, TrainingFeatures
from draftsmith.models.targets import Description
from draftsmith.models.targets.form import narrow, shallow
from draftsmith.train.lora import Adapter
from draftsmith.train.recipe import DrafterRecipe
from draftsmith.train.start import build_optimizer, muon_parts

TIMES = 5
PROBE = 1024  # tokens of the timed layer and step, at most
FEW_IDS = 1024  # of the timed layer's embedding
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Estimate:
    """memory: bytes by part; disk: bytes by part; seconds_per_token: of one process, by part; tokens: of all epochs
    (None without the files).
    """

    target_parameters: int
    head_parameters: int
    memory: dict[str, int]
    disk: dict[str, int]
    seconds_per_token: dict[str, float]
    tokens: int | None

    def seconds(self, world: int) -> float:
        """Of the whole run, or of a million tokens where the files are not there."""
        return (self.tokens or 10**6) / world * sum(self.seconds_per_token.values())


def estimate(
    recipe: DrafterRecipe,
    described: Description,
    world: int,
    device: torch.device,
    corpus: tuple[int, int] | None,
    timed: bool = True,
) -> Estimate:
    """corpus: (tokens, tokens written by the target) of the recipe's files; timed: measure a layer and a step too.

    Raises UserError for a target that the head cannot draft for.
    """
    config, engine, spec = described.config, recipe.engine, recipe.optimization
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        head = head_like(recipe, config, model.get_input_embeddings().weight)
        head_parameters = sum(p.numel() for p in head.parameters())
        if recipe.lora is not None:
            Adapter(head, recipe.lora, recipe.head.start_from, recipe.seed)
    item = BYTES[engine.dtype] if device.type == "cpu" else 2  # elsewhere a target has its own half precision
    target_parameters, spread = (
        sum(p.numel() for p in part.parameters()) for part in (model, model.get_decoder().layers)
    )
    each = item if described.stored is None else described.stored / target_parameters  # quantised ones stay packed
    held = target_parameters - spread + spread // world if engine.target == "sharded" else target_parameters
    whole, trained = (
        sum(p.numel() for p in head.parameters()),
        sum(p.numel() for p in head.parameters() if p.requires_grad),
    )
    part = lambda stage: world if engine.zero_stage >= stage else 1  # noqa: E731
    width, rows = BYTES[engine.dtype], spec.batch_tokens
    matrices = sum(p.numel() for p in muon_parts(head)[0]) if spec.name == "muon" else 0
    optimizer = (
        4 * matrices
        + 8 * (trained - matrices)
        + (0 if engine.dtype == "fp32" and engine.zero_stage == 0 else 4 * trained)
    )
    c, probes = head.config, head.feature_spec.probe is not None
    hidden, written = config.hidden_size, corpus[1] / corpus[0] if corpus else 1.0
    memory = {
        "target": round(held * each),
        "target's states": rows
        * ((len(head.feature_spec.taps) + 8) * hidden + 3 * (config.intermediate_size or hidden))
        * item,
        "head": whole * width // part(3),
        "gradients": trained * width // part(2),
        "optimizer": optimizer // part(1),
        "activations": int(rows * written * (recipe.goal.steps * c.saved_per_row * width + 4 * c.draft_vocab_size)),
    }
    if probes:
        memory["probes"] = int(
            rows * written * config.num_hidden_layers * (8 * hidden + 4 * (config.intermediate_size or hidden)) * item
        )
    disk = {"drafter": head_parameters * 2, "checkpoint": whole * width + head_parameters * 4 + optimizer}
    if corpus is not None:
        disk["rows"] = corpus[0] * 5
        if recipe.data.features == "cached":
            disk["features"] = (corpus[0] * len(head.feature_spec.taps) + corpus[1]) * hidden * item
    tokens = None if corpus is None else int(corpus[0] * spec.epochs)
    seconds = probe(recipe, config, device, written) if timed else {}
    if seconds and recipe.data.features == "cached":
        seconds["target"] /= max(1.0, spec.epochs)  # the target reads every row once
    return Estimate(target_parameters, head_parameters, memory, disk, seconds, tokens)


def head_like(recipe: DrafterRecipe, config, matrix: torch.Tensor) -> nn.Module:
    """The recipe's head on the device, which may be meta, of a matrix [V, h] that stands for the target's embedding and
    output head.
    """
    wanted = recipe.kind.Config.for_target(config, **recipe.head.shape)
    return recipe.kind(
        wanted, Shared(matrix, lambda x: x @ matrix.T), torch.arange(wanted.draft_vocab_size, device=matrix.device)
    )


def probe(recipe: DrafterRecipe, config, device: torch.device, written: float) -> dict[str, float]:
    """Seconds per token on this device: the target's layers (three less one, halved, times their number) and one
    training step with its optimizer, on a row of which the target wrote a share of `written`.
    """
    dtype, size = (
        torch.float32 if device.type == "cpu" else torch.bfloat16,
        min(PROBE, recipe.optimization.batch_tokens),
    )
    tokens = torch.zeros(1, size, dtype=torch.int64, device=device)
    with torch.no_grad():
        one, three = (
            median_seconds(lambda m=few_layers(config, n, device, dtype): m(input_ids=tokens, use_cache=False), device)
            for n in (1, 3)
        )
    layer = max(three - one, 0.0) / 2
    hidden, vocab = config.hidden_size, config.vocab_size
    matrix = torch.randn(vocab, hidden, device=device, dtype=dtype) * 0.02
    head = head_like(recipe, config, matrix).to(device)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.02)
    if recipe.lora is not None:
        Adapter(head, recipe.lora, recipe.head.start_from, recipe.seed)
    packing = Packing((0, size), torch.arange(size) >= round(size * (1 - written)))
    states = torch.randn(size, len(head.feature_spec.taps) * hidden, device=device, dtype=dtype)
    final = torch.randn(len(packing.rows), hidden, device=device, dtype=dtype)
    features = TrainingFeatures(
        tokens[0], states, packing, Teacher(final, lambda x, ids: x @ matrix.T), probe=lambda x: x + final
    )
    optimizer = build_optimizer(recipe, head)

    def step():
        head.loss(features, recipe.goal)[0].backward()

    drafter, update = median_seconds(step, device), median_seconds(optimizer.step, device)
    passes = 1 + 2 * written * (head.feature_spec.probe is not None)  # probes behind the written rows, there and back
    return {
        "target": passes * layer * config.num_hidden_layers / size,
        "drafter": drafter / size,
        "optimizer": update / recipe.optimization.batch_tokens,
    }


def few_layers(config, layers: int, device, dtype):
    """The decoder of a target's first layers, random, with a small vocabulary."""
    few = shallow(config, layers)
    narrow(few, FEW_IDS)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(few).to(dtype).eval().get_decoder()


def median_seconds(call, device: torch.device) -> float:
    """Of `TIMES` calls, after one for warming up."""
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    seconds = []
    for _ in range(TIMES + 1):
        sync()
        start = time.perf_counter()
        call()
        sync()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[TIMES // 2]
