"""Processes, devices and autocast, through Accelerate. One process unless torchrun or `accelerate launch` says otherwise."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from potstill.contracts.errors import MissingExtra
from potstill.training.spec import TrainSpec


def accelerator(spec: TrainSpec, folder: Path | None = None) -> Accelerator:
    """The Accelerator of a run; its shared state is renewed, so that several runs of one process may differ."""
    cpu = spec.device == "cpu" or not torch.accelerator.is_available()
    # Only the settings are renewed: the process group, once joined, stays.
    AcceleratorState._reset_state(reset_partial_state=PartialState._shared_state != {} and not _distributed())
    trackers = []
    for name in spec.trackers if folder is not None else []:
        if name == "wandb":
            try:
                import wandb  # noqa: F401
            except ImportError as cause:
                raise MissingExtra(
                    "train.trackers asks for wandb. Install it with: pip install 'potstill[wandb]'."
                ) from cause
        trackers.append(name)
    return Accelerator(
        cpu=cpu, mixed_precision=spec.precision, log_with=trackers or None, project_dir=str(folder) if folder else None
    )


def _distributed() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
