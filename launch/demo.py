"""`draftsmith demo`: the project's main job on the bundled target, from prompts to a measured drafter. Every step is a
command of its own.
"""

import json
import time
from pathlib import Path

from draftsmith.launch.measurement import Request, measure
from draftsmith.launch.prompts import write_prompts
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate

TARGET, SHIPPED = "bundled:targets/code", "bundled:drafters/eagle3-code"
PACKAGES = [
    "python",
    "sympy",
    "pandas",
]  # installed beside draftsmith; their held-out modules are among the evaluation prompts
COUNT, TEMPERATURES, ANSWER_TOKENS, SEED = 1900, [0.0, 0.8], 128, 0
EVALUATED, NEW_TOKENS, TEMPERATURES_EVALUATED = 64, 64, (0.0, 0.6, 1.0)


def demo(output: Path, report=print) -> None:
    from draftsmith.launch.training import main

    started = time.time()
    stage = lambda number, text: report(f"\n[{number}/4, {(time.time() - started) / 60:.1f} min] {text}")  # noqa: E731
    stage(
        1, f"draftsmith prompts {output}/prompts.jsonl --count {COUNT} " + " ".join(f"--package {p}" for p in PACKAGES)
    )
    write_prompts(PACKAGES, f"{output}/prompts.jsonl", COUNT, SEED, load_tokenizer(TARGET), held_out=False)
    stage(
        2,
        f"draftsmith regenerate {TARGET} {output}/prompts.jsonl {output}/answers.jsonl "
        + " ".join(f"--temperature {t}" for t in TEMPERATURES)
        + f" --max-new-tokens {ANSWER_TOKENS} --batch 256",
    )
    regenerate(
        TARGET,
        f"{output}/prompts.jsonl",
        f"{output}/answers.jsonl",
        TEMPERATURES,
        ANSWER_TOKENS,
        256,
        None,
        SEED,
        report,
    )
    recipe = str(Path(locate("bundled:targets")).parent / "eagle3-code.yaml")
    overrides = [f"data.files={json.dumps([f'{output}/answers.jsonl'])}", f"output={json.dumps(str(output))}"]
    stage(3, f"draftsmith train recipes/eagle3-code.yaml {' '.join(overrides)}")
    if main([recipe, *overrides]) != 0:
        raise UserError("demo: training ended with an error, see above")
    drafters = [f"demo={output}/drafter", f"shipped={SHIPPED}"]
    stage(
        4,
        "draftsmith eval " + " ".join(drafters) + f" --limit {EVALUATED} "
        f"--max-new-tokens {NEW_TOKENS} --time-at 0 --output {output}",
    )
    measure(
        Request(
            drafters,
            output,
            temperatures=TEMPERATURES_EVALUATED,
            timed=(0.0,),
            max_new_tokens=NEW_TOKENS,
            limit=EVALUATED,
            seed=SEED,
        ),
        report,
    )
    report(f"done in {(time.time() - started) / 60:.1f} min")
