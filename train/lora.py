"""LoRA (Hu et al., 2022) of a drafter by peft: its weights stay, low-rank changes of chosen linear layers train.

Everything that leaves a run is merged (`draftsmith.models.heads.adapted`); the adapter itself lies beside the drafter
as peft saves it.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.files import usual_modes
from draftsmith.train.recipe import Lora


class Adapter:
    """The adapter of a head. Making one wraps the head's layers in place, freezes all else and draws A from `seed`; B
    is zero.

    Raises UserError without the package peft and for modules that the head does not have.
    """

    def __init__(self, head: nn.Module, spec: Lora, base: str, seed: int):
        """base: the drafter that the head was loaded from, as adapter_config.json names it."""
        try:
            import peft
        except ImportError:
            raise UserError("lora needs the package peft, found none; pip install 'draftsmith[train]'") from None
        names = list(
            dict.fromkeys(
                name.rpartition(".")[2] for name, module in head.named_modules() if isinstance(module, nn.Linear)
            )
        )
        unknown = sorted(set(spec.modules) - set(names))
        if unknown:
            raise UserError(f"lora.modules: found {', '.join(unknown)}, expected some of {', '.join(names)}")
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.modules), base_model_name_or_path=base
        )
        self._model = peft.PeftModel(head, config, autocast_adapter_dtype=False)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of A and B of every layer, fp32, under peft's names; partitioned parameters must be gathered."""
        return {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in self._model.state_dict().items()
            if ".lora_" in name
        }

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Writes adapter_config.json and adapter_model.safetensors for `PeftModel.from_pretrained(head, folder)`;
        replaces what lies there.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            try:
                self._model.save_pretrained(str(new), state_dict=state, save_embedding_layers=False)
            except SafetensorError as error:
                raise OSError(f"{folder}: cannot be written ({' '.join(str(error).split())[:200]})") from None
            usual_modes(new)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """What `save` wrote, as `state` gives it."""
        found = load_file(folder / "adapter_model.safetensors")
        return {name.replace(".weight", ".default.weight"): value for name, value in found.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over the values of a `state`."""
        self._model.load_state_dict(state, strict=False)
