"""Taps: what flows through a network's modules, by module name, and the batch statistics that BatchNorm layers see.

Hooks sit on the instances, only inside the `with` block. Gradients flow through what is tapped.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.contracts.errors import ModelError, did_you_mean


class _Seen(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ModelError(f"Nothing flowed through {name}: it was not tapped, or the forward pass did not reach it.")


@dataclass
class Taps:
    """Tensors by module name; of a module called several times, the last."""

    outputs: dict[str, Tensor] = field(default_factory=_Seen)
    inputs: dict[str, Tensor] = field(default_factory=_Seen)


def module_at(module: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; ModelError with the nearest name where there is none."""
    modules = dict(module.named_modules())
    if name not in modules:
        raise ModelError(f"{type(module).__name__} has no module {name!r}.{did_you_mean(name, filter(None, modules))}")
    return modules[name]


def _tensor(value: Any, name: str) -> Tensor:
    """A module's tensor: itself, or the first of a tuple or of a transformers output."""
    if isinstance(value, Tensor):
        return value
    if (isinstance(value, tuple) and value) or hasattr(value, "to_tuple"):
        return _tensor(value[0], name)
    raise ModelError(f"{name} passes a {type(value).__name__}, no tensor, so it cannot be tapped.")


@contextmanager
def tap(module: nn.Module, outputs: Iterable[str] = (), inputs: Iterable[str] = ()) -> Iterator[Taps]:
    """`with tap(model, ["network.stages.0"]) as taps: logits = model(x)`, then `taps.outputs["network.stages.0"]`.

    An input is the module's first positional argument. Raises ModelError for names that the module has not.
    """
    seen = Taps()

    def keep_output(name: str) -> Any:
        return lambda _module, _args, output: seen.outputs.__setitem__(name, _tensor(output, name))

    def keep_input(name: str) -> Any:
        return lambda _module, args: seen.inputs.__setitem__(name, _tensor(args, name))

    with ExitStack() as hooks:  # RemovableHandle is a context manager
        for name in outputs:
            hooks.enter_context(module_at(module, name).register_forward_hook(keep_output(name)))
        for name in inputs:
            hooks.enter_context(module_at(module, name).register_forward_pre_hook(keep_input(name)))
        yield seen


@dataclass(frozen=True)
class BatchNormInput:
    """What one BatchNorm layer sees: mean and biased variance of its input per channel, with gradient; and what it
    remembers, without."""

    mean_C: Tensor
    variance_C: Tensor
    running_mean_C: Tensor
    running_variance_C: Tensor


def _batchnorms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, _BatchNorm)]


@contextmanager
def tap_batchnorm(module: nn.Module) -> Iterator[dict[str, BatchNormInput]]:
    """Batch statistics of the input of every BatchNorm layer, in the order of the forward pass.

    Channels are dimension 1; mean and variance run over all the others. Running statistics are those before the pass.
    Raises ModelError for a network without BatchNorm, or whose layers keep no running statistics.
    """
    layers = _batchnorms(module)
    if not layers or any(layer.running_mean is None for _, layer in layers):
        raise ModelError(
            f"{type(module).__name__} has no BatchNorm layers with running statistics, so there is nothing to match. "
            f"Take a network with norm: batch."
        )
    seen: dict[str, BatchNormInput] = {}

    def keep(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
            seen[name] = BatchNormInput(mean, variance, layer.running_mean.clone(), layer.running_var.clone())

        return hook

    with ExitStack() as hooks:
        for name, layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(keep(name)))
        yield seen


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Training mode inside the block, so that BatchNorm uses the batch's own statistics; modes and running statistics
    are as before when it ends."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.clone()) for _, layer in _batchnorms(module) for b in layer.buffers(recurse=False)]
    module.train()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def batchnorm_coupled(module: nn.Module) -> bool:
    """Whether a sample's output depends on its batch mates: a BatchNorm layer in training mode, or one that keeps no
    running statistics."""
    return any(layer.training or layer.running_mean is None for _, layer in _batchnorms(module))
