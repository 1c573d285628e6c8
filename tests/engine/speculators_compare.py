"""The speculators library loads exported EAGLE-3 drafters and gives the logits of our own head, for three
training-time-test steps.

    python -m tests.engine.speculators_compare [DRAFTER ...]     # default: the shipped one of the target `code`

Runs in .venv-vllm (`make test-vllm`). Prints one JSON line a drafter; exits with 1 when a logit is off by more than
1e-4 of the largest.
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
from draftsmith.models.formats import fetch, load_drafter, read_files
from draftsmith.models.targets import TextTarget

STEPS, TOLERANCE = 3, 1e-4


def main() -> int:
    return 0 if all([compare(drafter) for drafter in sys.argv[1:] or ["bundled:drafters/eagle3-code"]]) else 1


@torch.no_grad()
def compare(drafter: str) -> bool:
    target_name = read_files(fetch(drafter)).target
    target = TextTarget.load(target_name)
    tokens = torch.randint(3, target.vocab_size, (96,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_drafter(drafter, Path(temporary) / "eagle3", "speculators", report=lambda line: None)
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
            {
                "drafter": drafter,
                "largest_difference": worst,
                "largest_logit": scale,
                "steps": STEPS,
                "draft_vocabulary_equal": equal,
            }
        )
    )
    return equal and worst <= TOLERANCE * scale


if __name__ == "__main__":
    sys.exit(main())
