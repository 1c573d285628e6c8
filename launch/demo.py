"""`draftsmith demo`: the project's main job on the bundled target, from prompts to a measured drafter. Every step is a command of its own."""

import json
import time
from pathlib import Path

from draftsmith.launch.measurement import measure_drafters
from draftsmith.launch.prompts import write_prompts
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate

TARGET, SHIPPED, PROMPTS = "bundled:targets/code", "bundled:drafters/eagle3-code", "bundled:prompts/code.jsonl"
PACKAGES = ["python", "sympy", "pandas"]  # installed beside draftsmith; their held-out modules are among the evaluation prompts
COUNT, TEMPERATURES, ANSWER_TOKENS, SEED = 1900, [0.0, 0.8], 128, 0
EVALUATED, NEW_TOKENS, SAMPLED = 64, 64, [0.6, 1.0]


def demo(output: Path, report=print) -> None:
    from draftsmith.launch.training import main

    started = time.time()
    stage = lambda number, text: report(f"\n[{number}/4, {(time.time() - started) / 60:.1f} min] {text}")  # noqa: E731
    stage(1, f"draftsmith prompts {output}/prompts.jsonl --count {COUNT} " + " ".join(f"--package {p}" for p in PACKAGES))
    write_prompts(PACKAGES, f"{output}/prompts.jsonl", COUNT, SEED, load_tokenizer(TARGET), held_out=False)
    stage(2, f"draftsmith regenerate {TARGET} {output}/prompts.jsonl {output}/answers.jsonl " + " ".join(f"--temperature {t}" for t in TEMPERATURES)
          + f" --max-new-tokens {ANSWER_TOKENS} --batch 256")
    regenerate(TARGET, f"{output}/prompts.jsonl", f"{output}/answers.jsonl", TEMPERATURES, ANSWER_TOKENS, 256, None, SEED, report)
    recipe = str(Path(locate("bundled:targets")).parent / "eagle3-code.yaml")
    overrides = [f"data.files={json.dumps([f'{output}/answers.jsonl'])}", f"output={json.dumps(str(output))}"]
    stage(3, f"draftsmith train recipes/eagle3-code.yaml {' '.join(overrides)}")
    if main([recipe, *overrides]) != 0:
        raise UserError("demo: training ended with an error, see above")
    stage(4, f"draftsmith eval {output}/drafter --limit {EVALUATED} --max-new-tokens {NEW_TOKENS} (here beside the shipped drafter)")
    measure_drafters({"demo": f"{output}/drafter", "shipped": SHIPPED}, TARGET, PROMPTS, output / "result.json", None, SAMPLED, NEW_TOKENS,
                     EVALUATED, SEED, report)
    report(f"done in {(time.time() - started) / 60:.1f} min")
