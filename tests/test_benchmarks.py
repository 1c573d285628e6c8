"""The accelerator benchmark runs on a CPU with toy shapes: every section is there, and in fp32 nothing changes but the
speed.
"""

import json
import sys

import pytest
import torch

from tests.benchmarks import gpu, verification
from tests.conftest import trained_head


def test_accelerator_benchmark_measures_every_section(tmp_path, monkeypatch, capsys):
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--output", str(output)])
    assert gpu.main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == json.loads(output.read_text())
    assert {"date", "card", "torch", "transformers", "command"} <= figures.keys()
    both = ("captured", "eager")
    rows = [(p["rows"], p["passes"]) for p in figures["verify"]["passes"]]
    assert rows == [(rows, passes) for rows in (1, 16, 32, 60) for passes in both]
    assert {"rows", "passes", "ms", "host_ms", "floor_ms", "ratio"} == figures["verify"]["passes"][0].keys()
    assert [(level["what"], level["passes"], level["width"]) for level in figures["draft"]["levels"]] == [
        ("root level", "eager", 1),
        ("later level", "eager", 1),
        ("later level", "eager", 10),
        *((tree, passes, None) for tree in ("dynamic:10x7x60", "chain:5") for passes in both),
    ]
    for run in figures["overhead"]["runs"]:  # the phases lie inside the total
        assert (
            run["passes"] >= 1 and min(run[f"{phase}_ms"] for phase in ("draft", "verify", "overhead", "loop")) >= 0
        ), run
    runs = figures["bundled"]["runs"]
    assert len(runs) == 2 * 2 * 3 and all(
        r["identical"] == r["prompts"] == 2 and r["lossless"] for r in runs if r["dtype"] == "float32"
    ), runs
    parted = [d for d in figures["bundled"]["divergences"] if d["dtype"] == "bfloat16"]
    assert len(parted) == sum(r["prompts"] - r["identical"] for r in runs)
    assert all(r["tau"] > 1.5 for r in runs if r["method"] != "plain" and r["T"] == 0) and all(
        r["tau"] == 1 for r in runs if r["method"] == "plain"
    )
    assert [row["tokens"] for row in figures["training"]["lengths"]] == [24, 48]
    assert figures["training"]["longest"] == 48 and figures["training"]["ended_by"] == "limit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device", "cpu", "--tiny", "--sections", "verify,dance"],
            "--sections: found 'dance', expected some of verify,draft",
        ),
        (["--device", "cpu"], "--device: found cpu, expected --tiny with it"),
        (["--device", "cuda"], "--device: found no CUDA device"),
    ],
)
def test_accelerator_benchmark_refuses_what_it_cannot_measure(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        gpu.main()
    assert refusal.value.code == 2 and message in capsys.readouterr().err


def test_verification_benchmark_pairs_the_rules_on_the_same_trees(target):
    prompts, head = [[3, 1, 4], [1, 5, 9, 2, 6], [8]], trained_head(target, 50)
    figures = verification.acceptance(target, head, prompts, {7}, "sampled:binary:2", 1.0, 8, 20, True)
    assert (
        figures["trees"] >= 20
        and 0 < figures["traversal"]["expected"] < 2
        and 0 < figures["ceiling_of_any_accepted"] <= 1
    )
    assert (
        figures["traversal_over_rrs_interval"][0]
        <= figures["traversal_over_rrs"]
        <= figures["traversal_over_rrs_interval"][1]
    )
    top_k = verification.acceptance(target, head, prompts, {7}, "dynamic:3x2x6", 1.0, 8, 20, False)
    assert (
        top_k["largest_difference"] < 1e-5 and abs(top_k["traversal"]["expected"] - top_k["match"]["expected"]) < 1e-5
    )
    assert verification.worst_law_error(1) < 1e-12
