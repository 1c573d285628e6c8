"""Processes: one program for a plain `python` call, `torchrun` and the `deepspeed` launcher."""

import contextlib
import logging
import os
import socket

from draftsmith.models.errors import UserError


def free_port() -> int:
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def processes():
    """Initialises DeepSpeed's process group and yields (rank, world size, device); takes it down again.

    Without a launcher (no RANK in the environment) this process is the only one, and the environment is left as it was.
    """
    before = dict(os.environ)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
        from deepspeed import comm
    except ImportError:
        raise UserError("training needs the package deepspeed, found none; pip install 'draftsmith[train]'") from None

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # The shared-memory op would be compiled at start-up and leaves large files in /dev/shm; gloo is enough here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    accelerator, local = deepspeed.get_accelerator(), int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    try:
        yield comm.get_rank(), comm.get_world_size(), torch.device(accelerator.device_name(local))
    finally:
        comm.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def engine_config(zero_stage: int, dtype: str, batch_rows: int, accumulation: int, clip: float) -> dict:
    """The DeepSpeed JSON of a recipe."""
    return {
        "train_micro_batch_size_per_gpu": batch_rows, "gradient_accumulation_steps": accumulation, "gradient_clipping": clip,
        "zero_optimization": {"stage": zero_stage}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype == "bf16"},
        "steps_per_print": 10**9, "wall_clock_breakdown": False,
    }
