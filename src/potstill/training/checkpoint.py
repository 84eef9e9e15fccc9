"""Checkpoints of everything that a run needs to go on to the same numbers: weights, buffers, optimizers, position.

Randomness is keyed and the data order is a function of the step, so there is no generator state to save. The files of a
sharded run are those of any other, so that a run may go on sharded or not, and on another number of processes.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from potstill.contracts.errors import RunError
from potstill.contracts.files import load_tensors, read_json, save_tensors, whole_folder, write_json
from potstill.training.sharding import gathered, rows_of


def save_checkpoint(
    folder: Path,
    step: int,
    objective: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
    writes: bool = True,
) -> Path:
    """Write `folder/step-N` whole, then drop all but the newest `keep`.

    What is sharded is gathered: then every process calls this, and only the first one `writes`.
    """
    path = folder / f"step-{step:08d}"
    weights = gathered(objective.state_dict(keep_vars=True), writes)
    tensors: dict[str, Tensor] = {}
    for player, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{player}/{index}/{k}": torch.as_tensor(v) for k, v in values.items() if v is not None}
    tensors = gathered(tensors, writes)
    if not writes:
        return path
    with whole_folder(path) as part:
        aliases = save_tensors(part / "model.safetensors", weights)
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


def load_weights(path: Path, objective: nn.Module) -> dict[str, Any]:
    """Restore the models that `save_checkpoint` wrote; refuses those of another network. Returns its state."""
    state = read_json(path / "state.json")
    weights = load_tensors(path / "model.safetensors", state["aliases"])
    try:
        objective.load_state_dict(weights)
    except RuntimeError as cause:
        first = str(cause).splitlines()[1].strip() if len(str(cause).splitlines()) > 1 else str(cause)
        raise RunError(f"{path} does not belong to this recipe's models: {first} Use another output folder.") from cause
    return state


def load_optimizers(path: Path, optimizers: Mapping[str, torch.optim.Optimizer], device: torch.device) -> None:
    """Restore the optimizers that `save_checkpoint` wrote; of a sharded parameter's state, the rows of this process alone."""
    aliases = read_json(path / "state.json")["optimizer_aliases"]
    parameters = {name: [p for g in o.param_groups for p in g["params"]] for name, o in optimizers.items()}
    restored: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in optimizers}
    with safe_open(path / "optimizers.safetensors", "pt") as file:
        for name in [*file.keys(), *aliases]:
            player, index, field = name.split("/")
            if player not in optimizers:
                continue
            stored, like = file.get_slice(aliases.get(name, name)), parameters[player][int(index)]
            if isinstance(like, DTensor) and tuple(stored.get_shape()) == tuple(like.shape):
                tensor: Any = torch.empty_like(like, requires_grad=False)
                tensor.to_local().copy_(rows_of(stored, like))
            else:  # Adam's own step counters live on the CPU, whatever the parameters' device
                tensor = file.get_tensor(aliases.get(name, name)).to("cpu" if field == "step" else device)
            restored[player].setdefault(int(index), {})[field] = tensor
    for player, optimizer in optimizers.items():
        optimizer.load_state_dict(optimizer.state_dict() | {"state": restored[player]})
