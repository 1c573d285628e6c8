"""How much of one batch's gradient of Group Tree Optimization is signal, and where it points beside the drafter's own
loss.

    python tests/benchmarks/gto_gradient.py DRAFTER --answers FILE [--batches 60] [--change gto.groups=8 ...]

DRAFTER: a directory trained on from the start of recipes/eagle3-code-gto.yaml (at the start itself no group has any
spread). Of both losses, for each of the batches: the mean square norm of a batch's gradient, that of the expected
gradient (unbiased: noise of the mean taken off) and their ratio, the share of signal; the cosine of the two mean
gradients; then what a step of 0.3 % of the weights' norm along each mean does on other batches: reward (node_sum),
greedily accepted tokens a root, the drafter's own loss. Ends with one JSON line.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402
from draftsmith.train import gto  # noqa: E402
from draftsmith.train.data import prepare  # noqa: E402
from draftsmith.train.features import Online  # noqa: E402
from draftsmith.train.recipe import DrafterRecipe, read_recipe  # noqa: E402
from draftsmith.train.schedule import Schedule  # noqa: E402
from tests.benchmarks.gto import RECIPE  # noqa: E402

OTHERS, STEP = 16, 0.003


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


class Losses:
    """Both losses of one head on packed rows."""

    def __init__(self, recipe, head, frozen, stops):
        self.head, self.objective, self.gto = (
            head,
            recipe.goal,
            gto.Gto(recipe.gto.model_copy(update={"omega": 1.0}), frozen, stops),
        )

    def gradients(self, features) -> dict[str, torch.Tensor]:
        losses = {"token": self.head.loss(features, self.objective)[0], "gto": self.gto(self.head, features)[0]}
        return {name: flat(torch.autograd.grad(loss, list(self.head.parameters()))) for name, loss in losses.items()}

    @torch.no_grad()
    def figures(self, batches) -> dict[str, float]:
        sums, loss = 0, 0.0
        for features in batches:
            loss += float(self.head.loss(features, self.objective)[0]) / len(batches)
            sums = sums + self.gto(self.head, features)[1]["gto"]
        found = gto.figures(sums)
        return {"reward": found["reward"], "accepted": found["accepted"], "token loss": loss}


def moved(head, before: list[torch.Tensor], direction: torch.Tensor) -> None:
    """Sets the weights to `before` less a step of `STEP` of their norm along `direction`."""
    length = STEP * flat(before).norm() / direction.norm()
    with torch.no_grad():
        for parameter, old, part in zip(head.parameters(), before, direction.split([p.numel() for p in before])):
            parameter.copy_(old - length * part.view_as(old))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drafter")
    parser.add_argument("--answers", required=True)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--change", nargs="*", default=["gto.groups=8"])
    arguments = parser.parse_args()
    recipe = read_recipe(RECIPE, DrafterRecipe, [*arguments.change, f"data.files=[{arguments.answers}]"])
    target, tokenizer = TextTarget.load(recipe.target), load_tokenizer(recipe.target)
    stops = stop_ids(target, tokenizer)
    head = load_drafter(arguments.drafter, target.shared, target.layers).train()
    frozen = load_drafter(recipe.head.start_from, target.shared, target.layers).eval().requires_grad_(False)
    losses, total, squares = Losses(recipe, head, frozen, stops), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(
            recipe.data.files,
            recipe.data.max_length,
            recipe.data.max_bad_rows,
            tokenizer,
            stops,
            target.vocab_size,
            Path(folder),
        )
        online = Online(target, rows, replace(head.feature_spec, trees=True))
        schedule = Schedule(rows.lengths, np.arange(len(rows)), recipe.optimization.batch_tokens, 1, 7, 3.0)
        drawn = [bins[0] for (_, _, bins), _ in zip(schedule.after(0), range(arguments.batches + OTHERS))]
        for number, batch in enumerate(drawn[: arguments.batches]):
            for name, gradient in losses.gradients(replace(online(batch), seed=number)).items():
                total[name] = total.get(name, 0) + gradient
                squares[name] = squares.get(name, 0.0) + float(gradient @ gradient)
        others = [replace(online(batch), seed=number) for number, batch in enumerate(drawn[arguments.batches :])]
    count, table = arguments.batches, {}
    before, start = [p.detach().clone() for p in head.parameters()], losses.figures(others)
    for name in total:
        mean, square = total[name] / count, squares[name] / count
        signal = (float(mean @ mean) - square / count) / (1 - 1 / count)
        moved(head, before, mean)
        after = losses.figures(others)
        table[name] = {
            "square_norm": square,
            "signal": signal,
            "share": signal / square,
            "step": {key: after[key] - start[key] for key in start},
        }
        print(f"{name}: {json.dumps(table[name])}", flush=True)
    cosine = float(total["token"] @ total["gto"] / (total["token"].norm() * total["gto"].norm()))
    print(
        json.dumps(
            {
                "batches": count,
                "roots": recipe.gto.groups * recipe.gto.group_size,
                "before": start,
                **table,
                "cosine": cosine,
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
