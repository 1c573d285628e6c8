"""Processes: one program for a plain `python` call, `torchrun` and the `deepspeed` launcher."""

import contextlib
import json
import logging
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.train.step import Leaf, PartitionedStep

OURS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def launched():
    """Yields (rank, world size, local rank) as the launcher set them; without a launcher (no RANK) this process is the
    only one. The environment is afterwards as it was.
    """
    before = dict(os.environ)
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        yield int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        os.environ.clear()
        os.environ.update(before)


def load_deepspeed():
    """The package, quiet. Raises UserError where it is not installed."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("training needs the package deepspeed, found none; pip install 'draftsmith[train]'") from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


@contextlib.contextmanager
def process_group(rank: int, world: int, local: int):
    """Initialises DeepSpeed's process group and yields this process's device; takes the group down again."""
    deepspeed = load_deepspeed()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # The shared-memory op would be compiled at start-up and leaves large files in /dev/shm; gloo is enough here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32: a recipe of fp32 trains several times faster there
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        _join_attempt(rank, world, accelerator.communication_backend_name())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    try:
        yield torch.device(accelerator.device_name(local))
    finally:
        deepspeed.comm.destroy_process_group()
        deepspeed.utils.groups._WORLD_GROUP = None  # before 0.19.8 it is kept, and the next run of this process fails


def _join_attempt(rank: int, world: int, backend: str) -> None:
    """Under torchrun: a store of this attempt's own. The agent's store still holds the addresses of an attempt that
    died, and gloo would try to reach them.
    """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not shared,
        timeout=timedelta(minutes=10),
    )
    torch.distributed.init_process_group(
        backend, store=torch.distributed.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=world
    )


def engine_config(zero_stage: int, dtype: str, accumulation: int, clip: float, extra: dict) -> dict:
    """The DeepSpeed JSON of a recipe; `extra` is the recipe's own file (`engine.config`), which holds what a recipe
    does not say.
    """
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return {
        **config,
        **extra,
        "zero_optimization": {**config["zero_optimization"], **extra.get("zero_optimization", {})},
    }


def read_engine_file(file: str | None, recipe: Path | None) -> dict:
    """The JSON beside a recipe. Raises UserError for a key that the recipe itself decides."""
    if file is None:
        return {}
    path = Path(file) if recipe is None or Path(file).is_file() else recipe.parent / file
    try:
        extra = json.loads(path.read_text("utf-8"))
    except OSError:
        raise UserError(f"engine.config: {path}: no such file; expected a DeepSpeed JSON file") from None
    except ValueError as error:
        raise UserError(f"engine.config: {path}: not valid JSON ({error})") from None
    taken = sorted(set(extra) & set(OURS)) if isinstance(extra, dict) else ["no object"]
    if taken or "stage" in extra.get("zero_optimization", {}):
        raise UserError(
            f"engine.config: {path}: found {', '.join(taken) or 'zero_optimization.stage'}, expected only what the "
            f"recipe does not decide"
        )
    return extra


def check_dtype(dtype: str) -> None:
    """Raises UserError for a precision that this machine's accelerator does not have."""
    accelerator = load_deepspeed().get_accelerator()
    if (
        dtype == "fp16"
        and not accelerator.is_fp16_supported()
        or dtype == "bf16"
        and not accelerator.is_bf16_supported()
    ):
        raise UserError(
            f"engine.dtype: found {dtype}, which {accelerator.device_name()} does not support; expected fp32"
            + (" or bf16" if dtype == "fp16" and accelerator.is_bf16_supported() else "")
        )


def engine(step: torch.nn.Module, optimizer, config: dict):
    """The DeepSpeed engine of a `TrainingStep`."""
    deepspeed = load_deepspeed()
    module = step
    if config["zero_optimization"]["stage"] == 3:
        module = PartitionedStep(step)
        deepspeed.utils.set_z3_leaf_modules(module, [Leaf])
    made, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in step.parameters() if p.requires_grad],
        optimizer=optimizer,
        config=config,
    )
    return made


def shard(target) -> None:
    """Spreads a frozen target's layers over all processes (ZeRO-3 inference): each holds a part, layers are gathered as
    they run.
    """
    deepspeed = load_deepspeed()
    config = engine_config(3, {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(target.dtype, "fp32"), 1, 1.0, {})
    target.shard(lambda layers: deepspeed.initialize(model=layers, config=config)[0])


def barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
