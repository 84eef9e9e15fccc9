"""Atomic files: what is there is whole. Tensors are safetensors, everything else JSON."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.contracts.errors import RunError

RESUME = "What was saved before is whole; free some space, then go on with: potstill resume"


@contextmanager
def disk_errors(path: Path, way: str = RESUME) -> Iterator[None]:
    """Turn a full disk (with the `way` out) or a forbidden path into one sentence."""
    try:
        yield
    except Exception as cause:
        # safetensors reports the operating system's error in its message only.
        text = str(cause)
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text
        denied = getattr(cause, "errno", None) in (errno.EACCES, errno.EROFS) or "os error 13" in text
        if full:
            raise RunError(f"The disk is full: {path} could not be written. {way}") from cause
        if denied:
            raise RunError(f"{path} may not be written. Choose another folder with output=PATH.") from cause
        raise


@contextmanager
def whole_file(path: Path, way: str = RESUME, alone: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `path` in one rename when the block has ended well.

    alone: nobody else writes this file, so that what a killed process left of it is written over.
    """
    with disk_errors(path, way):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part") if alone else _part(path)
        try:
            yield part
            _sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with whole_file(path) as part:
        part.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended well; an older one is replaced."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)
        part.mkdir()
        try:
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
                path.rename(old)
                part.rename(path)
                shutil.rmtree(old)
            else:
                part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Save named tensors; those that share storage are saved once. Returns the aliases: name -> name it equals."""
    kept: dict[str, Tensor] = {}
    owner: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in owner:
            aliases[name] = owner[identity]
            continue
        owner[identity] = name
        kept[name] = tensor.detach().cpu().contiguous()
    save_file({name: t.clone() if t._is_view() else t for name, t in kept.items()}, path)
    return aliases


def load_tensors(path: Path, aliases: Mapping[str, str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    tensors = load_file(path, device=str(device))
    return tensors | {name: tensors[same] for name, same in aliases.items()}


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
