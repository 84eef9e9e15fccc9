"""Checkpoints of everything that a run needs to go on to the same numbers: weights, buffers, optimizers, position.

Randomness is keyed and the data order is a function of the step, so there is no generator state to save.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potstill.contracts.errors import RunError
from potstill.training.files import load_tensors, read_json, save_tensors, whole_folder, write_json


def save_checkpoint(
    folder: Path,
    step: int,
    objective: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-N` whole, then drop all but the newest `keep`."""
    path = folder / f"step-{step:08d}"
    with whole_folder(path) as part:
        aliases = save_tensors(part / "model.safetensors", objective.state_dict())
        tensors: dict[str, Tensor] = {}
        for player, optimizer in optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{player}/{index}/{k}": torch.as_tensor(v) for k, v in values.items() if v is not None}
        optimizer_aliases = save_tensors(part / "optimizers.safetensors", tensors)
        write_json(
            part / "state.json", {"step": step, "aliases": aliases, "optimizer_aliases": optimizer_aliases, **state}
        )
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def load_checkpoint(
    path: Path, objective: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], device: torch.device
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote; refuses one of another network. Returns its state."""
    state = read_json(path / "state.json")
    weights = load_tensors(path / "model.safetensors", state["aliases"], device)
    try:
        objective.load_state_dict(weights)
    except RuntimeError as cause:
        first = str(cause).splitlines()[1].strip() if len(str(cause).splitlines()) > 1 else str(cause)
        raise RunError(f"{path} does not belong to this recipe's models: {first} Use another output folder.") from cause
    tensors = load_tensors(path / "optimizers.safetensors", state["optimizer_aliases"], device)
    for player, optimizer in optimizers.items():
        restored: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            owner, index, field = name.split("/")
            if owner == player:
                # Adam's own step counters live on the CPU, whatever the parameters' device.
                restored.setdefault(int(index), {})[field] = tensor.cpu() if field == "step" else tensor
        whole = optimizer.state_dict()
        whole["state"] = restored
        optimizer.load_state_dict(whole)
    return state
