"""The half of `fuzz.py` that loads: configs, weights, generation configs and tokenizers of targets, and drafters'
directories, each good one with something changed.

Everything that is loaded is checked a second time, from the bytes of the files and without our loading code: a target
has the tensors of its file, all of them and no others, and the logits that transformers computes with the config as it
stands there; a tokenizer gives the ids that the library of tokenizers gives; a drafter has the tensors of its file, the
draft vocabulary that the offsets say, and says nothing in its config that its head computes otherwise.
"""

import copy
import json
import random
import shutil
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.formats import open_head, read_files, save_drafter
from draftsmith.models.heads import EagleConfig, EagleHead
from draftsmith.models.notes import notes
from draftsmith.models.rendering import Renderer
from draftsmith.models.shown import ANSWER
from draftsmith.models.stops import Stops
from draftsmith.models.targets import TextTarget, describe
from draftsmith.train.reference.pretrain import train_tokenizer
from tests.conftest import tiny_head, tiny_target

VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    3,
    7,
    64,
    0.5,
    2.5,
    1e6,
    10**9,
    float("nan"),
    "",
    "8",
    "x",
    "llama",
    "default",
]
VALUES += [
    [],
    [1],
    [1, 2, 3],
    ["a"],
    {},
    {"a": 1},
    {"rope_type": "yarn", "factor": 2.0},
    {"type": "linear", "factor": 2},
]
PREFIXES = ("module.", "model.", "base_model.")
TEXT = "def add(a, b):\n    return os 😀 é <|end|>\n"


def entries(document, path=()) -> list[tuple]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    found = []
    for key, value in items:
        found += [(*path, key), *(entries(value, (*path, key)) if len(path) < 3 else [])]
    return found


def change(document: dict, draw: random.Random, keys: list[str] = []) -> str:
    """Changes an entry, or takes it out; the change in words."""
    *path, key = draw.choice(entries(document) + [(key,) for key in keys])
    place = document
    for step in path:
        place = place[step]
    if draw.random() < 0.2 and (isinstance(place, list) or key in place):
        del place[key]
        return f"{'.'.join(map(str, (*path, key)))} taken out"
    value = copy.deepcopy(draw.choice(VALUES))
    if isinstance(place, dict) and isinstance(place.get(key), int) and draw.random() < 0.4:
        value = place[key] + draw.choice([-1, 1, place[key]])
    place[key] = value
    return f"{'.'.join(map(str, (*path, key)))} = {value!r}"


def change_tensors(file: Path, draw: random.Random) -> str:
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    kind = draw.choice(["gone", "renamed", "prefixed", "wider", "another dtype", "one more", "other numbers", "torn"])
    if kind == "torn":
        file.write_bytes(file.read_bytes()[: draw.randrange(1, 400)])
        return "torn"
    if kind in ("gone", "renamed"):
        tensors.pop(name)
    if kind == "renamed":
        tensors[name.replace("layers.0", "layers.1") if draw.random() < 0.5 else f"{name}_"] = value
    if kind == "prefixed":
        prefix = draw.choice(PREFIXES)
        tensors = {f"{prefix}{key}": item for key, item in tensors.items()}
    if kind == "wider":
        tensors[name] = torch.cat([value, value])
    if kind == "another dtype":
        tensors[name] = value.to(draw.choice([torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool]))
    if kind == "one more":
        tensors[draw.choice(["lm_head.weight", "extra.weight", "model.layers.99.mlp.up_proj.weight"])] = value.clone()
    if kind == "other numbers":
        tensors[name] = value.flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name} {kind}"


# ------------------------------------------------------------------------------------------------------ targets


def target(folder: Path, draw: random.Random) -> tuple[str, str | None]:
    """(what was changed, what is wrong with what was loaded). Raises UserError where it is refused."""
    file = draw.choice(["config.json", "config.json", "generation_config.json", "model.safetensors"])
    if file == "model.safetensors":
        said = change_tensors(folder / file, draw)
    else:
        document = json.loads((folder / file).read_text())
        more = [
            "rope_scaling",
            "attention_bias",
            "tie_word_embeddings",
            "sliding_window",
            "eos_token_id",
            "suppress_tokens",
        ]
        said = "; ".join(change(document, draw, more) for _ in range(draw.choice([1, 1, 2])))
        (folder / file).write_text(json.dumps(document))
    try:
        described = describe(str(folder))
        loaded = TextTarget.load(str(folder))
        tokenizer = load_tokenizer(str(folder))
        notes(described, tokenizer, "t")
        stops = Stops.of(loaded, tokenizer).ids
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    wrong = None if all(0 <= stop < loaded.vocab_size for stop in stops) else f"stop ids {stops}"
    return said, wrong or wrong_target(folder, loaded)


def wrong_target(folder: Path, loaded: TextTarget) -> str | None:
    """The tensors of the file, all of them, and nothing that the file does not have."""
    stored, own = load_file(folder / "model.safetensors"), dict(loaded.model.state_dict())
    for prefix in PREFIXES:  # transformers takes one that all names have
        if all(name.startswith(prefix) for name in stored) and f"{prefix}model.embed_tokens.weight" in stored:
            stored = {name.removeprefix(prefix): value for name, value in stored.items()}
    tied = own["lm_head.weight"].data_ptr() == own["model.embed_tokens.weight"].data_ptr()
    for name, value in own.items():
        if name not in stored:
            if name == "lm_head.weight" and tied:
                continue
            return f"{name} is not in the file"
        if not torch.equal(value, stored[name].float()):
            return f"{name} has other numbers than the file"
    if left := sorted(stored.keys() - own.keys()):
        return f"{left[0]} of the file is not in the model"
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        if name in config and type(config[name]) is int and config[name] != getattr(loaded.config, name):
            return f"{name} {getattr(loaded.config, name)} in place of {config[name]}"
    return None


# --------------------------------------------------------------------------------------------------- tokenizers


def tokenizer(folder: Path, draw: random.Random) -> tuple[str, str | None]:
    file = draw.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    if file == "chat_template.jinja":
        text = (folder / file).read_text() if (folder / file).is_file() else "{{ messages[0].content }}"
        at = draw.randrange(len(text))
        said = f"template changed at {at}"
        (folder / file).write_text(
            text[:at]
            + draw.choice(["", "{", "}}", "{%", "'", "|", "m.", "{{ x.y }}"])
            + text[at + draw.randint(0, 5) :]
        )
    else:
        document = json.loads((folder / file).read_text())
        said = f"{file}: {change(document, draw)}"
        (folder / file).write_text(json.dumps(document))
    try:
        loaded = load_tokenizer(str(folder))
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_special_tokens(loaded.all_special_tokens)  # those that tokenizer_config.json alone names
    wrong = None
    if (
        file == "tokenizer.json"
        and loaded(TEXT, add_special_tokens=False)["input_ids"] != raw.encode(TEXT, add_special_tokens=False).ids
    ):
        wrong = "other ids than the library's"
    if loaded.chat_template:
        try:
            renderer = Renderer(loaded, target="t", vocab_size=300)
            prompt = renderer.prompt([{"role": "user", "content": "add"}])
            encoded = renderer.encode(
                [{"role": "user", "content": "add"}, {"role": "assistant", "content": "os"}], None, {2}
            )
        except UserError as error:
            raise UserError(f"{said}: {error}") from None
        if wrong is None and any(i < 0 or i >= 300 for i in prompt):
            wrong = "ids beyond the embedding"
        for ids, mask in encoded.rows:
            told = encoded.notes[ANSWER]  # that the template shows other than all of it
            if wrong is None and not told and "os" not in loaded.decode([i for i, m in zip(ids, mask) if m]):
                wrong = "what is supervised is not the answer"
    return said, wrong


# ----------------------------------------------------------------------------------------------------- drafters

FREE = {  # what a config may say without changing what is computed
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "num_hidden_layers",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range",
}  # fmt: skip
SAID_OTHERWISE = {"norm_before_residual": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
NUMBERS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


def drafter(folder: Path, draw: random.Random, own) -> tuple[str, str | None]:
    if draw.random() < 0.5:
        said = change_tensors(folder / "model.safetensors", draw)
    else:
        document = json.loads((folder / "config.json").read_text())
        more = ["rope_scaling", "fc_norm", "target_hidden_size", "eagle_config", "eagle_aux_hidden_state_layer_ids"]
        said = "; ".join(change(document, draw, more) for _ in range(draw.choice([1, 1, 2])))
        (folder / "config.json").write_text(json.dumps(document))
    try:
        head = open_head(read_files(folder), own.shared, own.layers, tell=lambda line: None)
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    return said, wrong_drafter(folder, head, own)


def wrong_drafter(folder: Path, head, own) -> str | None:
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    plain = lambda name: name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)  # noqa: E731
    named = {plain(name): value for name, value in stored.items()}
    weights = {plain(name): value for name, value in head.state_dict().items()}
    if head.name in ("eagle", "eagle3"):
        for name, value in weights.items():
            if name not in named:
                return f"{name} is not in the file"
            if named[name].dtype in (torch.bool, torch.int32, torch.int64):
                return f"{name} is of {named[name].dtype}"
            if not torch.equal(value, named[name].float()):
                return f"{name} has other numbers than the file"
        rest = named.keys() - weights.keys() - {"d2t", "t2d", "embed_tokens.weight", "fc.bias"}
        if rest:
            return f"{min(rest)} of the file is not in the head"
    if "d2t" in named:
        ids = torch.arange(len(named["d2t"])) + named["d2t"].long()
        if (
            not torch.equal(head.ids, ids)
            or "t2d" in named
            and not torch.equal(named["t2d"].bool().nonzero().flatten(), ids)
        ):
            return "another draft vocabulary than the file says"
    for name, value in SAID_OTHERWISE.items():
        if config.get(name) not in (value, None):
            return f"{name} {config[name]!r} is not what the head computes"
    for name in NUMBERS:
        said = config.get(name)
        if said is not None and hasattr(head.config, name) and getattr(head.config, name) != said:
            return f"{name} {getattr(head.config, name)} in place of {said!r}"
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    if (
        theta is not None
        and head.name in ("eagle", "eagle3")
        and head.config.rope_parameters.get("rope_theta") != theta
    ):
        return f"rope_theta {head.config.rope_parameters.get('rope_theta')} in place of {theta}"
    if not all(torch.isfinite(value).all() for value in weights.values()):
        return "weights that are no numbers"
    return None


# ------------------------------------------------------------------------------------------------------ the run


def made(folder: Path) -> dict[str, Path]:
    """Good directories of every kind."""
    for name, tied in (("target", False), ("tied", True)):
        one = tiny_target(layers=2, vocab=300, tie_word_embeddings=tied)
        one.model.generation_config.eos_token_id = 2
        one.model.save_pretrained(folder / name)
        train_tokenizer(["def add(a, b): return os"], 300).save_pretrained(folder / name)
    own = tiny_target()
    torch.manual_seed(3)
    save_drafter(tiny_head(own, 40), folder / "eagle3", {}, torch.float32)
    save_drafter(EagleHead(EagleConfig.for_target(own.config), own.shared), folder / "eagle", {}, torch.float32)
    from tests.models.heads.test_dream import dream_head
    from tests.models.heads.test_hivis import hivis_head
    from tests.models.heads.test_owl import tiny_owl

    for name, make in (("hivis", hivis_head), ("dream", dream_head), ("owl", tiny_owl)):
        save_drafter(make(own), folder / name, {}, torch.float32)
    return {place.name: place for place in folder.iterdir()}


def loads(count: int, seed: int, report=print) -> dict:
    draw, outcome, wrong, own = random.Random(seed), Counter(), [], tiny_target()
    kinds = ["target", "tied", "tokenizer", "eagle3", "eagle3", "eagle", "hivis", "dream", "owl"]
    with tempfile.TemporaryDirectory() as folder:
        good = made(Path(folder))
        for number in range(count):
            kind = kinds[number % len(kinds)]
            place = Path(folder) / "changed"
            shutil.copytree(good["target" if kind == "tokenizer" else kind], place)
            said, reason = "", None
            try:
                if kind in ("target", "tied"):
                    said, reason = target(place, draw)
                elif kind == "tokenizer":
                    said, reason = tokenizer(place, draw)
                else:
                    said, reason = drafter(place, draw, own)
                outcome[f"{kind} used"] += 1
            except UserError as error:
                outcome[f"{kind} refused"] += 1
                said = str(error)
                reason = "two lines" if "\n" in str(error) else None
            except Exception:
                reason = traceback.format_exc()[-900:]
            if reason:
                wrong.append({"kind": kind, "number": number, "changed": said, "reason": reason})
            shutil.rmtree(place)
            if number % 200 == 199:
                report(f"{number + 1:,} loads: {dict(outcome)}, {len(wrong)} wrong")
    return {"loads": dict(sorted(outcome.items())), "wrong_loads": wrong}
