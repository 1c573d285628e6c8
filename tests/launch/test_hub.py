"""Push and load through a server that speaks the Hub's protocol; every client is a process of its own, as a user's
is.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from draftsmith.launch.card import acceptance, measured
from draftsmith.launch.export import export_drafter
from draftsmith.launch.hub import push as publish
from draftsmith.launch.hub import stage
from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate
from tests.hub_server import TOKEN

ROOT = Path(__file__).parents[2]
DRAFTER = "bundled:drafters/eagle3-code"
CELL = {
    "method": "eagle3-code dynamic:10x7x60",
    "drafter": "eagle3-code",
    "tree": "dynamic:10x7x60",
    "suite": "code",
    "temperature": 0.0,
    "batch": 16,
    "tau": 3.25,
    "tau_interval": [3.0, 3.5],
    "acceptance_by_depth": [0.9, 0.8, 0.75],
    "prompts": 64,
    "identical": 64,
    "lossless": True,
}
RESULT = {
    "cells": [
        CELL,
        {**CELL, "temperature": 1.0, "tau": 1.5, "acceptance_by_depth": [0.5]},
        {**CELL, "drafter": None, "method": "plain"},
    ],
    "conditions": {
        "drafters": {"eagle3-code": DRAFTER},
        "target": "bundled:targets/code",
        "dtype": "float32",
        "cores": 2,
        "seed": 0,
    },
}


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen([sys.executable, "-m", "tests.hub_server"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait()


@pytest.fixture
def client(server, tmp_path):
    """Runs a command against the server with a cache of its own, signed in unless said."""

    def run(*command, token=TOKEN, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        found = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env={
                **kept,
                "PYTHONPATH": str(ROOT),
                "HF_ENDPOINT": server,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "OMP_NUM_THREADS": "1",
                **({"HF_TOKEN": token} if token else {}),
                **environment,
            },
        )
        assert TOKEN not in found.stdout + found.stderr and "X-Amz-Signature" not in found.stdout + found.stderr
        return found

    return run


def log(server, since: int = 0) -> list[dict]:
    with urllib.request.urlopen(f"{server}/control/log") as answer:
        return json.load(answer)[since:]


def fail(server, route: str, *statuses: int) -> None:
    body = json.dumps({"route": route, "statuses": statuses}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{server}/control/fail", body)).close()


def fetch(server, repository: str, file: str, revision: str = "main") -> bytes:
    request = urllib.request.Request(
        f"{server}/{repository}/resolve/{revision}/{file}", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read()


# Command lines (and `load PLACE`) one after another in one process, since starting one takes longer than all that it
# does.
SEVERAL = """
import contextlib, sys
from draftsmith.launch import cli
from draftsmith.models.errors import UserError
from draftsmith.models.formats import from_pretrained
for line in sys.argv[1:]:
    print("--", line)
    if line.startswith("load "):
        try:
            print(sum(p.double().sum().item() for p in from_pretrained(line[5:]).parameters()))
        except UserError as error:
            print("error:", error)
        continue
    sys.argv[1:] = line.split()
    with contextlib.redirect_stderr(sys.stdout):
        try:
            cli.main()
        except SystemExit as end:
            print("ended with", end.code)
"""


def said(process) -> list[str]:
    """What each of SEVERAL said."""
    assert process.returncode == 0, process.stderr
    return [part.partition("\n")[2].strip() for part in process.stdout.split("-- ")[1:]]


def test_push_then_from_pretrained_gives_the_same_head(server, client, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    push = f"push {DRAFTER} tester/eagle3-code --results {tmp_path / 'result.json'} --license apache-2.0"
    start = len(log(server))
    export = f"export tester/eagle3-code {tmp_path / 'out'} --to speculators"
    evaluate = f"eval tester/eagle3-code --limit 1 --max-new-tokens 4 --tree chain:2 --output {tmp_path / 'eval'}"
    pushed, there, here, *_, again = said(
        client("-c", SEVERAL, push, "load tester/eagle3-code", f"load {DRAFTER}", export, evaluate, push)
    )
    assert "pushed to" in pushed and "pushed to" in again
    assert (
        there == here
        and float(there)
        and (tmp_path / "out" / "model.safetensors").is_file()
        and (tmp_path / "eval" / "result.json").is_file()
    )
    routes = [entry["route"] for entry in log(server, start)]
    assert routes.count("put") == routes.count("commit") == 1  # the second push changed nothing and sent nothing
    snapshot = next((tmp_path / "home").rglob("snapshots/*"))
    assert {p.name for p in snapshot.iterdir()} == {
        "config.json",
        "draftsmith.json",
        "model.safetensors",
    }  # nothing else is downloaded
    ours = load_file(Path(locate(DRAFTER)) / "model.safetensors")
    assert all(ours[name].equal(value) for name, value in load_file(snapshot / "model.safetensors").items())

    card = fetch(server, "tester/eagle3-code", "README.md").decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0" and {"speculative-decoding", "eagle3", "vllm", "sglang"} <= set(
        header["tags"]
    )
    (entry,) = header["model-index"]
    assert [r["metrics"][0]["value"] for r in entry["results"]] == [3.25, 1.5] and entry["name"] == "eagle3-code"
    assert "| code | 0 | 16 | dynamic:10x7x60 | 3.25 (3.00 to 3.50) | 0.90 | 0.80 | 0.75 | 64 | 64/64 |" in card
    assert "steps: 2,248" in card and "muon_lr: 0.02" in card and str(ROOT) not in card


def test_a_cut_off_push_goes_on_where_it_stopped(server, client):
    start = len(log(server))
    fail(server, "commit", 403, 503)  # the second passes by itself
    first, second = said(client("-c", SEVERAL, *2 * [f"push {DRAFTER} tester/cut"]))
    error, code = first.splitlines()[-2:]
    assert error.startswith("error: tester/cut: HTTP 403") and code == "ended with 2", first
    assert "the same command goes on" in error and "Traceback" not in first
    assert "again in 1 s" in second and "pushed to" in second and "ended" not in second, second
    routes = [entry["route"] for entry in log(server, start)]
    assert routes.count("put") == 1 and routes.count("commit") == 3  # the weights were sent once


def test_private_repositories_and_branches(client, tmp_path):
    push = f"push {DRAFTER} tester/secret --private --revision trial"
    _, loaded, unknown, empty = said(
        client("-c", SEVERAL, push, "load tester/secret@trial", "load tester/secret@other", "load tester/secret")
    )
    assert float(loaded) and "no such revision" in unknown and "config.json is missing" in empty
    stranger = client(
        "-c",
        SEVERAL,
        "load tester/secret@trial",
        f"push {DRAFTER} tester/x",
        token=None,
        HF_HOME=str(tmp_path / "stranger"),
    )
    outside, refused = said(stranger)
    assert "no such repository, or a private one" in outside and "error: tester/x: HTTP 401" in refused


def test_repositories_of_others_are_left_alone(server, client):
    """A public one asked to be private, one that holds a model, one with other weights."""
    signed = {"Authorization": f"Bearer {TOKEN}"}
    held = {
        "open": (),
        "model": ("config.json", "model.safetensors"),
        "shards": ("config.json", "draftsmith.json", "model-00001-of-00002.safetensors"),
    }
    for name, files in held.items():
        urllib.request.urlopen(
            urllib.request.Request(f"{server}/api/repos/create", json.dumps({"name": name}).encode(), signed)
        ).close()
        lines = [json.dumps({"key": "file", "value": {"path": file, "content": ""}}) for file in files]
        urllib.request.urlopen(
            urllib.request.Request(f"{server}/api/models/tester/{name}/commit/main", "\n".join(lines).encode(), signed)
        ).close()
    public, model, shards = said(
        client(
            "-c",
            SEVERAL,
            f"push {DRAFTER} tester/open --private",
            *(f"push {DRAFTER} tester/{n}" for n in ("model", "shards")),
        )
    )
    assert "is public, expected a private one" in public and "found a model that draftsmith did not push" in model
    assert "found model-00001-of-00002.safetensors, expected no weights beside" in shards
    assert fetch(server, "tester/model", "config.json") == b""


def test_a_dry_run_shows_everything_and_calls_nobody():
    said = []
    assert publish(DRAFTER, "tester/dry", dry_run=True, report=said.append) is None  # the tests run offline
    shown = "\n".join(said)
    assert "README.md" in shown and "1,472,904 model.safetensors" in shown and "nothing was sent" in shown
    assert "Not measured. `draftsmith eval tester/dry` measures it." in shown and "model-index" not in shown
    assert "vllm serve" in shown and "sglang.launch_server" in shown


def test_a_speculators_directory_is_published_with_a_verifier_that_others_can_load(tmp_path):
    folder = export_drafter(DRAFTER, tmp_path / "spec", "speculators", depth=4, report=lambda line: None)
    staged = stage(folder, "tester/spec", tmp_path / "staged", None, "someone/target", None)
    config, card = json.loads((staged / "config.json").read_text()), (staged / "README.md").read_text()
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "someone/target",
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert "vllm serve tester/spec\n" in card and "base_model: someone/target" in card
    assert not [p for p in staged.iterdir() if str(ROOT).encode() in p.read_bytes()]
    with pytest.raises(UserError, match="found the verifier bundled:targets/code, expected a Hub id"):
        stage(folder, "tester/spec", tmp_path / "again", None, None, None)


@pytest.mark.parametrize(
    ("place", "repository", "options", "message"),
    [
        (DRAFTER, "name", {}, "name: expected a Hub id, USER/NAME"),
        ("/none", "tester/x", {}, "/none: no such directory"),
        (DRAFTER, "tester/x", {"results": Path("none.json")}, "none.json: no such file"),
        (DRAFTER, "tester/x", {"target": "/tmp"}, "names the target /tmp, expected a Hub id"),
        (DRAFTER, "tester/x", {}, "tester/x: .*offline"),
    ],
)
def test_mistakes_are_one_line(place, repository, options, message):
    with pytest.raises(UserError, match=message) as caught:
        publish(place, repository, **options)
    assert "\n" not in str(caught.value)


def test_only_figures_of_this_drafter_are_published(tmp_path):
    def given(document):
        (tmp_path / "result.json").write_text(json.dumps(document))
        return tmp_path / "result.json"

    folder = Path(locate(DRAFTER))
    cells, conditions = measured(folder, given(RESULT))
    assert [cell["tau"] for cell in cells] == [3.25, 1.5] and conditions["cores"] == 2
    two = {**RESULT["conditions"], "drafters": {"a": "/none/a", "b": "/none/b"}}
    for document, message in (
        ({**RESULT, "conditions": two}, "found the drafters a, b"),
        ({"tree_tau": 3.0}, "cells: missing"),
        ({**RESULT, "cells": []}, "no cells of eagle3-code"),
    ):
        with pytest.raises(UserError, match=message):
            measured(folder, given(document))
    assert measured(folder, None) == ([], {})
    mine = tmp_path / "drafter"
    mine.mkdir()
    given(RESULT)
    os.utime(tmp_path / "result.json", (1, 1))
    (mine / "model.safetensors").write_bytes(b"newer")
    with pytest.raises(UserError, match="older than .*; measure the drafter again"):
        measured(mine, None)


def test_the_card_quotes_the_robust_speedup_where_there_is_one():
    cell = {**RESULT["cells"][0], "speedup": 0.67}
    assert "| 0.67x |" in (before := "\n".join(acceptance("tester/x", [cell], {}))) and "undisturbed" not in before
    card = "\n".join(acceptance("tester/x", [{**cell, "robust_speedup": 1.8}], {"threads": 1}))
    assert "| 1.80x |" in card and "0.67" not in card and "undisturbed passes" in card and "threads 1" in card
