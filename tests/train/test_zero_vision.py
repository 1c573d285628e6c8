"""Heads for targets that see, under DeepSpeed: two processes learn from rows with pictures what one process learns."""

import json
from collections import Counter
from itertools import accumulate

import pytest
import torch
import yaml

from draftsmith.launch.training import main
from draftsmith.models.features import FeatureSpec, Packing
from draftsmith.train import distributed
from tests.conftest import ROOT
from tests.tiny_vision import document, draw, saved_llava, tiny_vision
from tests.train.test_train import log_of, run, weights

ROWS = [
    (0, 1),
    (1, 3),
    (1, 1),
    (2, 2),
    (0, 4),
    (1, 2),
    (1, 5),
    (2, 1),
    (1, 4),
    (1, 2),
    (0, 2),
    (1, 3),
]  # (pictures, length of the answers) of each


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny LLaVA, rows of text and of one and two pictures, and what recipes for it have in common."""
    folder = tmp_path_factory.mktemp("seeing")
    saved_llava(folder / "target", 320)
    records = []
    for number, (count, length) in enumerate(ROWS):
        names = [f"{number}-{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            draw(folder / name, 10 * number + i)
        records.append(
            {
                "image": names,
                "conversations": [
                    turn
                    for i in range(max(1, count))
                    for turn in (
                        {"from": "human", "value": "<image>\nWhat is this?" if i < count else "What?"},
                        {"from": "gpt", "value": "A square. " * length},
                    )
                ],
            }
        )
        if count == 0:
            del records[-1]["image"]
    (folder / "rows.json").write_text(json.dumps(records))
    return folder


def recipe(seeing, head: str):
    """The head's recipe for LLaVA-1.5, cut down."""
    values = yaml.safe_load((ROOT / "recipes" / f"{head}-llava-1.5-7b.yaml").read_text())
    values |= {"target": str(seeing / "target"), "wandb": None}
    values["data"] |= {"files": [str(seeing / "rows.json")], "max_length": 64, "max_image_pixels": 64}
    values["optimization"] |= {"lr": 0.01, "epochs": 3, "batch_tokens": 64, "accumulation": 1, "warmup": 0.0}
    values["engine"] |= {"dtype": "fp32", "config": None, "zero_stage": 0}
    values["evaluation"] |= {"rows": 0}
    if head == "hivis":  # stage 2
        values["head"] |= {"residuals": 2, "qkv_bias": True}
        values["objective"] |= {"steps": 2, "topk_weight": 1.0}
    place = seeing / f"{head}.yaml"
    place.write_text(yaml.safe_dump(values))
    return place


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("head", "stages"),
    [
        ("dream", {"2": ["engine.zero_stage=2"], "3": ["engine.zero_stage=3", "engine.target=sharded"]}),
        ("hivis", {"2": ["engine.zero_stage=2", "engine.target=sharded"]}),
    ],
)
def test_zero_stages_in_two_processes_equal_one_process(seeing, head, stages):
    made = recipe(seeing, head)
    assert main([str(made), "optimization.accumulation=2", f"output={seeing}/{head}-1"]) == 0
    want = [line["loss"] for line in log_of(seeing / f"{head}-1")]
    assert want[-1] < want[0] and len(want) > 5
    for name, more in stages.items():
        two = run(
            [
                "deepspeed",
                "--num_gpus",
                "2",
                "--master_port",
                distributed.free_port(),
                "--module",
                "draftsmith.train",
                made,
                *more,
                f"output={seeing}/{head}-{name}",
            ],
            seeing,
        )
        assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
        assert [line["loss"] for line in log_of(seeing / f"{head}-{name}")] == pytest.approx(want, rel=1e-5), name
        for a, b in zip(weights(seeing / f"{head}-{name}").values(), weights(seeing / f"{head}-1").values()):
            torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=1e-2)  # stored in bf16


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_is_partitioned_runs_once_a_row_whatever_stands_in_it(family):
    """Each run of a partitioned weight waits for the other process, which has other rows: with more pictures, or more
    to be supervised.
    """
    target, ran, runs = tiny_vision(family), Counter(), []
    target.shard(
        lambda part: [
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
            for name, module in part.named_modules()
        ]
    )
    for documents in ([[9]], [[3, 5], [4, 2, 6], [7]]):
        texts = [document(family, lengths, seed) for seed, lengths in enumerate(documents)]
        mask = torch.cat([torch.arange(len(ids)) >= len(ids) - 4 for ids, _ in texts])
        packing = Packing((0, *accumulate(len(ids) for ids, _ in texts)), mask)
        features = target.features(
            torch.tensor([token for ids, _ in texts for token in ids]),
            packing,
            FeatureSpec(("last",)),
            [i for _, i in texts],
        )
        for part in features.teacher.final.split(2):
            features.teacher.project(part)
        runs.append(dict(ran))
        ran.clear()
    assert runs[0] == runs[1] and set(runs[0].values()) == {1} and len(runs[0]) > 8 * target.layers
