"""Trains the bundled `code` targets, deep and thin, on Python source found on the machine.

Depth is grown in stages: a shallow model learns first, then every layer is followed by copies of itself whose output
projections start at zero (the function is unchanged at that moment), and training goes on with all of them. A stage
sees whole rows of packed documents; the loss covers every token. Muon for the matrices, AdamW for embeddings and norms;
both learning rates fall linearly to zero over the last `decay` share of all tokens.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.files import usual_modes
from draftsmith.models.targets import describe, locate
from draftsmith.train.optimizers import product_dtype
from draftsmith.train.recipe import Place, Strict
from draftsmith.train.reference import corpus
from draftsmith.train.reference.architecture import Architecture, grow, random_model
from draftsmith.train.reference.pretraining_run import Optimizer, PretrainingRun, make_optimizer
from draftsmith.train.reference.repository import RepositoryRows

FREE = ("family", "max_position_embeddings", "rope_theta", "states")  # what may differ from the target of a start
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] }}{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Corpus(Strict):
    packages: list[str]
    text_share: float = Field(ge=0, lt=1)
    max_question: int = Field(gt=0)
    max_answer: int = Field(gt=0)
    held_out: float = Field(gt=0, lt=1)


class Stage(Strict):
    """repository: share of the rows that are one repository document each (train/reference/repository.py); the others
    are packed documents.
    """

    layers: int = Field(gt=0)
    length: int = Field(gt=0)
    batch: int = Field(gt=0)
    tokens: int = Field(gt=0)
    repository: float = Field(0.0, ge=0, le=1)


class TargetRecipe(Strict):
    """tokenizer: that of another target (a draft model must share its target's); without it one is trained on the
    corpus. start_from: a target of the same shape whose weights are trained on; `model` may give it another RoPE base
    and more positions.
    """

    seed: int
    start_from: Place | None = None
    tokenizer: Place | None = None
    corpus: Corpus
    model: Architecture
    stages: list[Stage]
    optimizer: Optimizer
    compile: bool
    save_minutes: float = Field(gt=0)
    output: Place

    @model_validator(mode="after")
    def _depths_grow(self):
        for before, after in zip(self.stages, self.stages[1:]):
            if after.layers % before.layers:
                raise ValueError(f"stages: found {before.layers} layers before {after.layers}, expected a multiple")
        return self


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat template above; every text it can be asked to encode is encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def chat(function: corpus.Function) -> str:
    return f"<|bos|><|user|>{function.question}<|end|><|assistant|>{function.answer}<|end|>"


class Documents:
    """Tokenised documents of both splits: `train` (chat and text forms) and `held_out` (chat form only)."""

    def __init__(self, recipe: TargetRecipe, folder: Path):
        spec = recipe.corpus
        files = corpus.find_sources(spec.packages)
        functions = corpus.unique_functions(files)
        train = [f for f in functions if not corpus.is_held_out(f.module, spec.held_out)]
        held = [f for f in functions if corpus.is_held_out(f.module, spec.held_out) and f.documented]
        texts = [f for f in files if not corpus.is_held_out(f.module, spec.held_out)]
        rng = random.Random(recipe.seed)
        sample = rng.sample(train, min(len(train), 30_000))
        if recipe.tokenizer is None:
            self.tokenizer = train_tokenizer(
                [f.question for f in sample] + [f.answer for f in sample], recipe.model.vocab_size
            )
        else:
            self.tokenizer = load_tokenizer(recipe.tokenizer)
        if len(self.tokenizer) > recipe.model.vocab_size:
            raise UserError(
                f"model.vocab_size: found {recipe.model.vocab_size}, expected at least the {len(self.tokenizer)} ids "
                f"of the tokenizer"
            )
        (folder / "corpus.json").write_text(json.dumps(corpus.manifest(files), indent=0))
        self.chat = self._encode(train, spec)
        self.held_out = self._encode(held, spec)
        self.repository = RepositoryRows(list(texts), self.tokenizer, recipe.seed)
        rng.shuffle(texts)
        budget = int(sum(map(len, self.chat)) * spec.text_share / (1 - spec.text_share))
        self.text = []
        for source in texts:
            if budget <= 0:
                break
            ids = self.tokenizer(f"<|bos|>{source.text[:6000]}<|end|>")["input_ids"]
            self.text.append(ids)
            budget -= len(ids)

    def _encode(self, functions: list[corpus.Function], spec: Corpus) -> list[list[int]]:
        kept = []
        for start in range(0, len(functions), 4096):
            part = functions[start : start + 4096]
            questions = self.tokenizer([f.question for f in part])["input_ids"]
            whole = self.tokenizer([chat(f) for f in part])["input_ids"]
            kept += [
                w
                for q, w in zip(questions, whole)
                if len(q) <= spec.max_question and len(w) - len(q) <= spec.max_answer
            ]
        return kept

    def stream(self, epoch: int, seed: int) -> torch.Tensor:
        documents = self.chat + self.text
        random.Random(seed * 1000 + epoch).shuffle(documents)
        return torch.tensor([token for document in documents for token in document], dtype=torch.int32)


class Rows:
    """Training rows in a seeded order: packed documents epoch after epoch, and repository documents among them."""

    def __init__(self, documents: Documents, seed: int):
        self.documents, self.seed, self.rng = documents, seed, random.Random(seed)
        self.epoch, self.cursor, self.stream = 0, 0, documents.stream(0, seed)

    def draw(self, stage: Stage) -> torch.Tensor:
        """[batch, length + 1] int32."""
        width = stage.length + 1
        whole = sum(self.rng.random() < stage.repository for _ in range(stage.batch)) if stage.repository else 0
        need = (stage.batch - whole) * width
        if self.cursor + need > len(self.stream):
            self.epoch, self.cursor = self.epoch + 1, 0
            self.stream = self.documents.stream(self.epoch, self.seed)
        packed = self.stream[self.cursor : self.cursor + need].view(-1, width)
        self.cursor += need
        repository = torch.tensor([self.documents.repository.row(width) for _ in range(whole)], dtype=torch.int32)
        return torch.cat([packed, repository.view(-1, width)])


def first_model(recipe: TargetRecipe):
    """A random model of the first stage's depth, or the weights of `start_from` under the recipe's shape."""
    config = recipe.model.config(recipe.stages[0].layers)
    if recipe.start_from is None:
        return random_model(config)
    started = describe(recipe.start_from).config
    for name in ("model_type", "num_hidden_layers", *type(recipe.model).model_fields):
        found, wanted = getattr(started, name, None), getattr(config, name, None)
        if name not in FREE and found != wanted:
            raise UserError(f"start_from: {recipe.start_from} has {name} {found}, expected the recipe's {wanted}")
    return AutoModelForCausalLM.from_pretrained(locate(recipe.start_from), config=config, dtype=torch.float32)


def language_loss(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy (nats per token) of rows [B, S + 1]."""
    rows = rows.long()
    hidden = model.get_decoder()(input_ids=rows[:, :-1]).last_hidden_state
    return F.cross_entropy(model.get_output_embeddings()(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # documents of any length: each would be compiled anew
def loss_per_byte(model, tokenizer, documents: list[list[int]], device, limit: int = 400) -> tuple[float, float]:
    """Held-out loss: (nats per token, nats per byte of text), each document on its own, special tokens included."""
    nats = tokens = size = 0
    for ids in documents[:limit]:
        row = torch.tensor([ids], device=device)
        nats += float(language_loss(model, row)) * (len(ids) - 1)
        tokens += len(ids) - 1
        size += len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    return nats / tokens, nats / size


def pretrain(recipe: TargetRecipe, log=print) -> Path:
    """Runs all stages; `recipe.output` appears when complete: bf16 safetensors, tokenizer, corpus manifest, held-out
    figures.

    Until then everything is in `output.partial`, with a snapshot of the weights (`checkpoint`, fp32) every
    `save_minutes`; it is for looking at, a killed run starts anew. Raises UserError when `output` exists or the loss
    stops being finite.
    """
    if Path(recipe.output).exists():
        raise UserError(f"output: {recipe.output} exists; expected a new place")
    torch.manual_seed(recipe.seed)
    folder = Path(f"{recipe.output}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = product_dtype(torch.device(device))
    documents = Documents(recipe, folder)
    log(
        f"chat {sum(map(len, documents.chat)):,} tokens, text {sum(map(len, documents.text)):,}, held out "
        f"{len(documents.held_out)} documents"
    )
    documents.tokenizer.save_pretrained(folder)
    model = first_model(recipe).to(device)
    run = PretrainingRun(
        recipe.optimizer, sum(stage.tokens for stage in recipe.stages), recipe.save_minutes, log, unit="tokens"
    )
    rows = Rows(documents, recipe.seed)
    for stage in recipe.stages:
        if stage.layers != model.config.num_hidden_layers:
            model = grow(model, stage.layers).to(device)
        if recipe.compile:
            for layer in model.get_decoder().layers:
                layer.compile()  # layers are alike: one compilation serves them all
        optimizer, end = make_optimizer(model, recipe.optimizer), run.seen + stage.tokens
        while run.seen < end:
            with torch.autocast(device, torch.bfloat16, enabled=fast is torch.bfloat16):
                loss = language_loss(model, rows.draw(stage).to(device))
            run.step(model, optimizer, loss, stage.batch * stage.length, f"layers {stage.layers} epoch {rows.epoch}")
            if run.due():
                nats, per_byte = loss_per_byte(model, documents.tokenizer, documents.held_out, device, 100)
                log(f"held-out loss {nats:.3f} per token, {per_byte:.4f} per byte")
                model.save_pretrained(folder / "checkpoint")
    model.eval()
    nats, per_byte = loss_per_byte(model, documents.tokenizer, documents.held_out, device)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    figures = {
        "held_out_nats_per_token": nats,
        "held_out_nats_per_byte": per_byte,
        "tokens": run.seen,
        "minutes": run.minutes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (folder / "training.json").write_text(json.dumps(figures, indent=1))
    log(json.dumps(figures))
    usual_modes(folder)
    return folder.rename(recipe.output)
