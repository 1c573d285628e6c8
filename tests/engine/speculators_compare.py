"""The speculators library loads the exported shipped drafter and gives the logits of our own head, for three
training-time-test steps.

Runs in .venv-vllm (`make test-vllm`). Prints one JSON line; exits with 1 when a logit is off by more than 1e-4 of the
largest.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}

import torch
from speculators import SpeculatorModel, SpeculatorModelConfig

from draftsmith.launch.export import export_drafter
from draftsmith.models.features import Packing
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget

DRAFTER, TARGET, STEPS, TOLERANCE = "bundled:drafters/eagle3-code", "bundled:targets/code", 3, 1e-4


@torch.no_grad()
def main() -> int:
    target = TextTarget.load(TARGET)
    tokens = torch.randint(3, target.vocab_size, (96,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_drafter(DRAFTER, Path(temporary) / "eagle3-code", "speculators")
        head = load_drafter(folder, target.shared, target.layers)
        config = SpeculatorModelConfig.from_pretrained(folder)
        config.transformer_layer_config._attn_implementation = "eager"
        model = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    features = target.features(
        tokens, Packing((0, len(tokens)), torch.ones(len(tokens), dtype=torch.bool)), head.feature_spec
    )
    theirs = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: theirs.append(logits[0]))
    shifted = tokens.roll(-1)[
        None
    ]  # row t holds the features at x_t and the token x_{t+1}; nothing looks at the last row
    model(features.hidden[None], shifted, torch.zeros_like(shifted), ttt_steps=STEPS)
    worst, scale = 0.0, max(float(logits.abs().max()) for logits in theirs)
    for (rows, output), logits in zip(head.unroll(features, STEPS), theirs, strict=True):
        worst = max(worst, float((head.logits(output) - logits[rows]).abs().max()))
    equal = torch.equal(model.d2t + torch.arange(len(model.d2t)), head.ids)
    print(
        json.dumps(
            {"largest_difference": worst, "largest_logit": scale, "steps": STEPS, "draft_vocabulary_equal": equal}
        )
    )
    return 0 if equal and worst <= TOLERANCE * scale else 1


if __name__ == "__main__":
    sys.exit(main())
