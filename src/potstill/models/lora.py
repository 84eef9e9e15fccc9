"""Low-rank adapters inside a network of any kind, through peft."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from potstill.contracts.errors import ModelError
from potstill.models.spec import LoraSpec


def add_lora(network: Any, lora: LoraSpec, name: str) -> None:
    """Freeze the weights and add adapters in place."""
    from peft import LoraConfig, inject_adapter_in_model

    # peft knows all-linear for transformers' models only (GPT-2's transposed layers too). The output layer stays out: it
    # may be tied to the embeddings.
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    every = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not output]
    linear = sorted({name.rpartition(".")[2] for name in every})
    ours = lora.targets == "all-linear" and not isinstance(network, PreTrainedModel)
    targets = every if ours else lora.targets
    options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha}
    config = LoraConfig(**options, lora_dropout=lora.dropout, target_modules=targets)
    try:
        inject_adapter_in_model(config, network)
    except ValueError as cause:
        raise ModelError(
            f"{name}: lora.targets {lora.targets} fit no layer. Write all-linear, or some of: {', '.join(linear)}."
        ) from cause
    for parameter, weight in network.named_parameters():
        weight.requires_grad_("lora_" in parameter)


def merged(network: Any) -> Any:
    """The network with its adapters added into the weights: a copy, or the network itself where it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = False
    return network
