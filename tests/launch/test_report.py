"""`draftsmith eval` from the command line to the report, on a tiny target: files, figures that agree with each other,
pictures that are there.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch

from draftsmith.eval.decode import Trace
from draftsmith.eval.report import plots as pictures
from draftsmith.eval.report.report import span
from draftsmith.launch.cli import main
from draftsmith.launch.measurement import Request, measure, pieces
from draftsmith.launch.methods import labels
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.train.reference.pretrain import train_tokenizer
from tests.conftest import tiny_target, trained_head

pytest.importorskip("matplotlib")
PICTURES = {"acceptance", "time", "tau", "speedup", "batch", "sample", "sweep", "training"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target of 300 tokens, a drafter with a training log, an assistant and a suite of two turns."""
    root = tmp_path_factory.mktemp("report")
    target = tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = 2
    tokenizer = train_tokenizer(["def add(a, b): return a + b"], 300)
    for name, model in (("target", target), ("small", tiny_target(2, vocab=300))):
        model.model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    save_drafter(trained_head(target), root / "run" / "drafter", {"target": str(root / "target")})
    lines = [
        {
            "step": i + 1,
            "loss": 5 - i / 20,
            "conditional": [0.1 + i / 100] * 3,
            "accuracy": [0.1] * 3,
            "tokens_per_second": 9,
        }
        for i in range(60)
    ]
    (root / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo')
    rows = [
        {"question_id": 1, "category": "sum", "turns": ["add", "sub"]},
        {"question_id": 2, "category": "product", "turns": ["mul"]},
        {"prompt": "x" * 200},
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_from_the_command_line_to_the_report(place, monkeypatch, capsys):
    out = place / "out"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "draftsmith",
            "eval",
            str(place / "run" / "drafter"),
            "lookup",
            "hf-generate",
            "hf-lookup",
            "hf-assisted",
            "--assistant",
            str(place / "small"),
            "--suite",
            str(place / "chat.jsonl"),
            "--temperature",
            "0",
            "--temperature",
            "0.8",
            "--batch",
            "1",
            "--batch",
            "3",
            "--max-new-tokens",
            "12",
            "--skip-long",
            "--output",
            str(out),
        ],
    )
    main()
    shown = capsys.readouterr().out
    assert (
        "1 turns of more than 184 tokens are left out" in shown
        and "the target answers 1 turns that others follow" in shown
    )
    document = json.loads((out / "result.json").read_text())
    timed = [c for c in document["cells"] if "speedup" in c]
    ours, library = ["plain", "lookup", "run"], ["hf-generate", "hf-lookup", "hf-assisted"]
    assert [(c["temperature"], c["batch"], c["method"]) for c in timed] == [
        (t, b, m)
        for t in (0, 0.8)
        for b, names in ((1, [*ours[:2], *library, "run"]), (3, [*ours[:2], "hf-generate", "run"]))
        for m in names
    ]
    assert all(c["prompts"] == 3 and c.get("lossless", True) for c in document["cells"]) and document["lossless"]
    assert document["conditions"]["count"] == {"chat": 3} and not (out / "runs.jsonl.partial").exists()
    assert document["conditions"]["threads"] == 1 and document["conditions"]["thread_trial_ms"] == {}
    plain = next(c for c in timed if c["method"] == "plain")
    assert document["disturbance"] == plain["disturbance"] and "the machine was " in shown
    report = (out / "report" / "README.md").read_text()
    for cell in timed:
        assert cell["accounted_speedup"] >= cell["speedup"] * 0.999  # what is accounted is at most the whole
        assert ("identical" in cell) == (cell["temperature"] == 0 or cell["method"] in ours)
        assert ("tau_behind_first" in cell) == (cell["method"] != "run")
        assert f"| {cell['robust_tokens_per_second']:.0f} | {span(cell, 'robust_speedup')} | " in report
        assert {name: figures["prompts"] for name, figures in cell["categories"].items()} == {"sum": 2, "product": 1}
    assert "The machine was " in report
    assert (
        sum(line.endswith(" |") and ("| sum |" in line or "| product |" in line) for line in report.splitlines())
        == 2 * 2 * 5
    )
    assert (
        sum(line.startswith("| chat |") for line in report.splitlines()) == len(document["cells"]) + len(timed) - 8 + 20
    )
    assert "No sweep map" in report and "training.png" in report
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "draftsmith",
            "sweep",
            str(place / "run" / "drafter"),
            "--suite",
            str(place / "chat.jsonl"),
            "--tree",
            "chain:2",
            "--tree",
            "dynamic:3x2x6",
            "--tree",
            "dynamic:4x3x6",
            "--limit",
            "2",
            "--max-new-tokens",
            "8",
            "--output",
            str(out),
        ],
    )
    main()
    monkeypatch.setattr(sys, "argv", ["draftsmith", "report", str(out)])
    main()
    drawn = {p.stem: p.read_bytes() for p in (out / "report").glob("*.png")}
    assert drawn.keys() == PICTURES and all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in drawn.values())
    assert {
        line.split("](")[1].split(".png")[0]
        for line in (out / "report" / "README.md").read_text().splitlines()
        if line.startswith("![")
    } == PICTURES


def small_request(place, output, **changes) -> Request:
    return Request(
        [str(place / "run" / "drafter")],
        output,
        (str(place / "chat.jsonl"),),
        tree="chain:2",
        temperatures=(0.0,),
        max_new_tokens=8,
        limit=2,
        **changes,
    )


def test_the_same_measurement_asked_again_takes_what_is_there(place, tmp_path, monkeypatch):
    request = small_request(place, tmp_path)
    first = measure(request, lambda line: None)
    (tmp_path / "runs.jsonl").replace(tmp_path / "runs.jsonl.partial")  # as if it had been killed at the very end
    again = measure(request, lambda line: None)
    assert again["cells"] == first["cells"] and again["samples"] == first["samples"]


def test_in_bf16_texts_are_counted_and_identity_is_not_claimed(place, tmp_path):
    request = small_request(place, tmp_path, dtype="bf16")
    document = measure(request, lambda line: None)
    assert document["conditions"]["dtype"] == "bfloat16" and document["lossless"] is None
    assert all(cell["lossless"] is None for cell in document["cells"] if "identical" in cell)
    assert "identity is claimed in fp32 alone" in (tmp_path / "report" / "README.md").read_text()
    with pytest.raises(UserError, match='dtype: found "bf16", expected null'):
        measure(replace(request, dtype=None), lambda line: None)
    with pytest.raises(UserError, match="dtype: found fp8, expected fp32, bf16 or fp16"):
        measure(replace(request, dtype="fp8", output=tmp_path / "new"), lambda line: None)


def test_a_measurement_goes_on_with_its_number_of_threads(place, tmp_path, monkeypatch):
    request = Request(
        ["lookup"],
        tmp_path,
        (str(place / "chat.jsonl"),),
        str(place / "target"),
        temperatures=(0.0,),
        max_new_tokens=8,
        limit=1,
        threads=1,
    )
    first, usual = measure(request, lambda line: None), torch.get_num_threads()
    (tmp_path / "runs.jsonl").replace(tmp_path / "runs.jsonl.partial")
    with pytest.raises(UserError, match="found another run"):
        measure(replace(request, threads=2), lambda line: None)
    monkeypatch.delenv("OMP_NUM_THREADS")  # which would otherwise be followed by a trial
    torch.set_num_threads(2)
    try:
        again = measure(replace(request, threads=None), lambda line: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)
    assert again["cells"] == first["cells"] and again["conditions"] == first["conditions"]


def test_baselines_alone_need_no_drafter(place, tmp_path):
    document = measure(
        Request(
            ["lookup", "hf-generate"],
            tmp_path,
            (str(place / "chat.jsonl"),),
            str(place / "target"),
            temperatures=(0.5,),
            max_new_tokens=8,
            limit=1,
        ),
        lambda line: None,
    )
    assert [c["method"] for c in document["cells"]] == ["plain", "lookup", "hf-generate"] and document["conditions"][
        "first"
    ] is None
    assert (
        "tree_tau" not in document and "| chat | 0.5 | 1 | lookup |" in (tmp_path / "report" / "README.md").read_text()
    )


def test_verify_proves_and_finds(place, tmp_path, monkeypatch, capsys):
    from draftsmith.eval.verification import verifier as verify
    from tests.eval.measurement.test_measure import match_wrongly

    arguments = [
        "draftsmith",
        "verify",
        str(place / "run" / "drafter"),
        "lookup",
        "--suite",
        str(place / "chat.jsonl"),
        "--limit",
        "2",
        "--tree",
        "chain:2",
        "--tree",
        "dynamic:3x2x6",
        "--batch",
        "1",
        "--batch",
        "3",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
        "--dtype",
        "bf16",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    found = json.loads((tmp_path / "lossless.json").read_text())
    # 2 dtypes x (greedy, T=1, T=1 with everything) x (3 methods alone, 4 in batches)
    assert (
        found["lossless"]
        and len(found["comparisons"]) == 2 * 3 * 7
        and sum(c["claimed"] for c in found["comparisons"]) == 21
    )
    assert all(not c["differences"] for c in found["comparisons"] if c["claimed"])
    monkeypatch.setattr(verify, "follow", match_wrongly)
    (tmp_path / "lossless.json").unlink()  # else the finished proof is shown
    with pytest.raises(SystemExit) as end:
        main()
    lossy = [c for c in json.loads((tmp_path / "lossless.json").read_text())["comparisons"] if not c["lossless"]]
    assert end.value.code == 1 and "NOT lossless" in capsys.readouterr().out and lossy
    difference = lossy[0]["differences"][0]
    assert (
        difference.keys() == {"prompt", "token", "margin", "tolerated", "plain", "found"}
        and difference["margin"] > 1e-4
    )


def test_pieces_are_the_passes():
    class Letters:
        def decode(self, ids, **options):
            return "".join(map(chr, ids))

        def convert_ids_to_tokens(self, token):
            return chr(token)

    trace = Trace([97, 98, 99, 100], [1, 0], [2, 2], [2, 1])
    assert pieces(trace, Letters()) == ["a", "bc", "d"]
    assert pictures.page(["a\n", "\tb"]) == [
        (0, 0, 0, "a"),
        (1, 0, 1, " "),
        (1, 1, 1, " "),
        (1, 2, 1, " "),
        (1, 3, 1, " "),
        (1, 4, 1, "b"),
    ]
    wrapped = pictures.page(["x" * (pictures.COLUMNS + 1)])
    assert wrapped[-1] == (1, 0, 0, "x") and len(pictures.page(["\n" * 99])) == 0


def test_labels():
    assert labels(
        [
            "runs/a/drafter",
            "bundled:drafters/eagle3-code",
            "runs/b/x/",
            "mine=runs/c/drafter",
            "lookup/drafter",
            "other/a/drafter",
        ]
    ) == {
        "a": "runs/a/drafter",
        "eagle3-code": "bundled:drafters/eagle3-code",
        "x": "runs/b/x/",
        "mine": "runs/c/drafter",
        "lookup/drafter": "lookup/drafter",
        "other/a/drafter": "other/a/drafter",
    }
