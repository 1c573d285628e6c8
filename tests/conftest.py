"""Shared fixtures: a tiny random Llama as target and a tiny random EAGLE-3 head for it, fp32, seeded."""

import json
import os
import signal
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PIP_NO_INDEX", "1")  # no test fetches anything: what was fetched before is used

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which transformers does

import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.training import main
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Packing, TrainingFeatures
from draftsmith.models.heads import Eagle3Config, Eagle3Head, Eagle3Objective
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets.checks import RECURRENT
from draftsmith.models.targets.place import present
from draftsmith.train import telemetry
from draftsmith.train.reference.pretrain import train_tokenizer

ROOT = Path(__file__).parents[1]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that are given more time than others come first: what is left for the end is short, so that
    processes which share the tests end together.
    """
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A test of a target with states is skipped under versions of transformers that have none for us: the rest runs."""
    try:
        return (yield)
    except UserError as error:
        if f"expected {RECURRENT} or newer" not in str(error):
            raise
        pytest.skip(str(error))


def tiny_target(layers: int = 7, vocab: int = 61, seed: int = 0, **changes) -> TextTarget:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **dict(
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=256,
                initializer_range=0.3,
            ),
            **changes,
        }
    )
    return TextTarget(LlamaForCausalLM(config).float(), "tiny")


def tiny_head(
    target: TextTarget, draft_vocab: int | None = None, seed: int = 1, sharpness: float = 0.3, **shape
) -> Eagle3Head:
    torch.manual_seed(seed)
    config = Eagle3Config.for_target(target.config, draft_vocab_size=draft_vocab, **shape)
    ids = None if draft_vocab is None else torch.randperm(target.vocab_size)[:draft_vocab].sort().values
    head = Eagle3Head(config, target.shared, ids)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=sharpness) if parameter.ndim == 2 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return head.eval()


def pack(target: TextTarget, head, rows: list[list[int]], starts: list[int]) -> TrainingFeatures:
    """Rows of ids as one packed row; of row i the target wrote what stands from starts[i] on."""
    mask = torch.cat([torch.arange(len(row)) >= start for row, start in zip(rows, starts)])
    packing = Packing((0, *accumulate(map(len, rows))), mask)
    return target.features(torch.tensor([token for row in rows for token in row]), packing, head.feature_spec)


def trained_head(
    target: TextTarget,
    draft_vocab: int | None = None,
    prompts: list[list[int]] = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]],
) -> Eagle3Head:
    """A tiny head trained for a moment on the target's own greedy text: right now and then, so that walks of every
    length occur.
    """
    head = tiny_head(target, draft_vocab)
    rows = [p + t.tokens for p, t in zip(prompts, generate(target, NoDrafter(), prompts, Sampling(), 40))]
    features = pack(target, head, rows, [0] * len(rows))
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(25):
        loss, _ = head.loss(features, Eagle3Objective(steps=4, decay=0.8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def train_killed_at(step: int, arguments: list[str]) -> None:
    """`draftsmith train`, dead at the moment when `step` would enter the log: with engine.checkpoint_minutes=0 the
    checkpoint of the step before is the last one that is complete. The same arguments resume it.
    """

    class Killed(Exception):
        pass

    write = telemetry.Log.write

    def dying(log, line):
        if line["step"] == step:
            raise Killed
        write(log, line)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(telemetry.Log, "write", dying)
        main(arguments)


@pytest.fixture(autouse=True)
def linear_of_torch(monkeypatch):
    """ZeRO-3 puts a function of its own in the place of `torch.nn.functional.linear` and leaves it there; tests that
    come later in the same process must not meet it.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture
def target():
    return tiny_target()


@pytest.fixture
def head(target):
    return tiny_head(target, draft_vocab=40)


SMOLLM2 = "bundled:targets/smollm2"


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the real target, on machines where it lies."""
    if not present(SMOLLM2):
        pytest.skip(f"{SMOLLM2} is not on this machine (draftsmith fetch {SMOLLM2})")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2_target(smollm2) -> TextTarget:
    """The real target, in fp32."""
    return TextTarget.load(smollm2)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(
        ["def add(a, b):\n    return a + b\n", "the quick brown fox", "import os\nimport sys\n"], 300
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A tiny target with a real tokenizer and 24 rows to learn from."""
    folder = tmp_path_factory.mktemp("run")
    target = tiny_target(vocab=300)
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"def f{i}(a):"},
                {"role": "assistant", "content": f"    return a + {i}\n" * (1 + i % 2)},
            ]
        }
        for i in range(10, 34)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = yaml.safe_load((ROOT / "recipes" / "eagle3-code.yaml").read_text())
    recipe |= {"target": str(folder / "target"), "output": str(folder / "out")}
    recipe["data"] |= {"files": [str(folder / "rows.jsonl")], "max_length": 64}
    recipe["head"] |= {"intermediate_size": None, "draft_vocab_size": 200}
    recipe["objective"] |= {"steps": 3}
    recipe["optimization"] |= {"batch_tokens": 100, "epochs": 2}
    recipe["evaluation"] |= {"rows": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
