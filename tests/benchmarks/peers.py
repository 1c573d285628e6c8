"""One worker of `training.py`: a drafter and its optimizer that answer `step SHAPE` on stdin with one JSON line on
stdout.

    python tests/benchmarks/peers.py WORKER FOLDER        WORKER: a key of WORKERS; FOLDER: the files that training.py
                                                          prepared

A step is zero_grad, forward (the teacher recomputed from the cached final states through the target's output head),
backward, clipping at 0.5 and fused AdamW, the same for every worker. The peers' modules are imported from their
installed wheels; what this file changes in them is named in `training.py`. Row t of a document consumes the features at
x_t and the token x_{t+1}; its first step is supervised when x_{t+1} and x_{t+2} are.
"""

import contextlib
import json
import re
import resource
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

STEPS, DECAY, CLIP = 7, 0.8, 0.5
SIZES = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=688,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
)

# A worker is built from the tensors all shapes share: embedding, lm_head [V, h]; norm [h]; ids [D]; drafter.NAME, our
# initial weights. It returns (module, loss); loss(data) takes one shape's tokens, mask [B, S], taps [B, S, 3h], last
# and final [B, S, h] (before and after the target's final norm) and returns the loss and the K losses of the steps, by
# the worker's own formula and reduction.


def supervised(mask):
    """mask [B, S] of supervised tokens -> [B, S], whether row t's first step is supervised."""
    return F.pad(mask[:, 1:-1] & mask[:, 2:], (0, 2))


def drafter_weights(shared):
    return {name.removeprefix("drafter."): tensor for name, tensor in shared.items() if name.startswith("drafter.")}


def draftsmith(shared):
    from transformers import LlamaConfig

    from draftsmith.models.features import Packing, Shared, Teacher, TrainingFeatures
    from draftsmith.models.heads import Eagle3Config, Eagle3Head, Eagle3Objective

    config = Eagle3Config.for_target(LlamaConfig(num_hidden_layers=8, **SIZES), draft_vocab_size=len(shared["ids"]))
    head = Eagle3Head(config, Shared(shared["embedding"]), shared["ids"])
    head.load_state_dict(drafter_weights(shared))

    def project(hidden, ids):
        return F.linear(hidden, shared["lm_head"] if ids is None else shared["lm_head"][ids])

    def loss(data):
        documents, length = data["tokens"].shape
        packing = Packing(tuple(range(0, documents * length + 1, length)), data["mask"].flatten())
        teacher = Teacher(data["final"].flatten(0, 1)[packing.rows + 1], project)
        total, sums = head.loss(
            TrainingFeatures(data["tokens"].flatten(), data["taps"].flatten(0, 1), packing, teacher),
            Eagle3Objective(STEPS, DECAY),
        )
        return total, sums["loss"] / sums["rows"]

    return head, loss


class PlainLogSoftmaxLoss(torch.autograd.Function):
    """-mean_rows( mask <p, log softmax z> ), z and p [B, S, D], mask [B, S, 1]; gradient mask (softmax(z) sum(p) - p) /
    rows.
    """

    @staticmethod
    def forward(ctx, logits, target, mask):
        log_q = logits.log_softmax(-1)
        ctx.save_for_backward(log_q, target, mask)
        return -(torch.einsum("bsd,bsd->bs", target, log_q) * mask[..., 0]).mean()

    @staticmethod
    def backward(ctx, grad):
        log_q, target, mask = ctx.saved_tensors
        return log_q.exp().sub_(target).mul_(mask * (grad / log_q[..., 0].numel())), None, None


def specforge(shared, compact=False):
    kernels = types.ModuleType("specforge.core.loss")
    kernels.LogSoftmaxLoss = PlainLogSoftmaxLoss
    sys.modules["specforge.core.loss"] = kernels
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from transformers import LlamaConfig

    ids = shared["ids"]
    config = LlamaConfig(num_hidden_layers=1, draft_vocab_size=len(ids), pretraining_tp=1, **SIZES)
    drafter = LlamaForCausalLMEagle3(config, attention_backend="sdpa").float()
    drafter.load_state_dict(
        {
            **drafter_weights(shared),
            "embed_tokens.weight": shared["embedding"],
            "d2t": ids - torch.arange(len(ids)),
            "t2d": torch.zeros(len(shared["lm_head"]), dtype=torch.bool).index_fill_(0, ids, True),
        }
    )
    drafter.embed_tokens.requires_grad_(False)
    model = OnlineEagle3Model(drafter, length=STEPS, attention_backend="sdpa")

    def loss(data):
        final = F.pad(data["final"][:, 1:], (0, 0, 0, 1))
        if compact:
            teacher = dict(target=None, target_hidden_for_compact=final, target_head_weight=shared["lm_head"])
        else:
            teacher = dict(target=F.linear(final, shared["lm_head"]))
        losses = model(
            input_ids=F.pad(data["tokens"][:, 1:], (0, 1)),
            attention_mask=torch.ones_like(data["mask"]),
            loss_mask=supervised(data["mask"]).long()[..., None],
            hidden_states=data["taps"],
            **teacher,
        )[0]
        return sum(DECAY**k * step for k, step in enumerate(losses)), torch.stack(losses)

    return model, loss


def speculators(shared, attention):
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from transformers import LlamaConfig

    ids = shared["ids"]
    layer = LlamaConfig(num_hidden_layers=1, **SIZES)
    layer._attn_implementation = attention
    model = Eagle3DraftModel(Eagle3SpeculatorConfig(transformer_layer_config=layer, draft_vocab_size=len(ids)))
    weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in drafter_weights(shared).items()}
    model.load_state_dict(
        {
            **weights,
            "embed_tokens.weight": shared["embedding"],
            "verifier_lm_head.weight": shared["lm_head"][ids],
            "verifier_norm.weight": shared["norm"],
            "d2t": ids - torch.arange(len(ids)),
            "t2d": torch.zeros(len(shared["lm_head"]), dtype=torch.bool).index_fill_(0, ids, True),
        }
    )
    model.lm_head.requires_grad_(True)
    objective = resolve_loss_config("kl_div", "eager")

    def loss(data):
        documents, length = data["tokens"].shape
        rows = length - 1  # a document gives one row less than it has tokens; all documents lie packed in one row

        def packed(x):
            return x.flatten(0, 1)[None]

        _, total, metrics = model(
            hidden_states=packed(data["taps"][:, :-1]),
            input_ids=packed(data["tokens"][:, 1:]),
            document_ids=torch.arange(documents).repeat_interleave(rows)[None],
            loss_mask=packed(supervised(data["mask"])[:, :-1]),
            position_ids=1 + torch.arange(rows).repeat(documents)[None],
            verifier_last_hidden_states=packed(data["last"][:, 1:]),
            ttt_steps=STEPS,
            ttt_step_loss_decay=DECAY,
            loss_config=objective,
        )
        return total, torch.stack([metrics[f"loss_{k}_sum"] / DECAY**k for k in range(STEPS)])

    return model, loss


WORKERS = {
    "draftsmith": draftsmith,
    "specforge": specforge,
    "specforge-compiled": specforge,
    "specforge-compact": lambda shared: specforge(shared, compact=True),
    "speculators": lambda shared: speculators(shared, "sdpa"),
    "speculators-eager": lambda shared: speculators(shared, "eager"),
}


def peak_mib():
    """Peak resident size of this process. Linux: VmHWM, since ru_maxrss starts at the size of the process that started
    this one.
    """
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def forget_peak():
    """Linux: the peak starts again from the present size (imports and loading may have needed more)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints stays out of the answers
    worker, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, loss = WORKERS[worker](load_file(folder / "shared.safetensors"))
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    print(json.dumps({"parameters": sum(p.numel() for p in trained)}), file=answers, flush=True)
    shapes, start = {}, None
    for line in sys.stdin:
        shape = line.split()[1]
        if shape not in shapes:
            shapes[shape] = {
                name: tensor.clone() for name, tensor in load_file(folder / f"{shape}.safetensors").items()
            }
        forget_peak()
        before, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
        start = start or before
        optimizer.zero_grad()
        total, losses = loss(shapes[shape])
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        cpu, wall, peak = time.process_time() - cpu, time.perf_counter() - wall, peak_mib()
        answer = {
            "cpu": cpu,
            "wall": wall,
            "growth": peak - before,
            "growth_from_start": peak - start,
            "losses": losses.tolist(),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
