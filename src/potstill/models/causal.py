"""Causal language models: one adapter around any transformers architecture, and three small packaged ones.

B batch, T tokens, S new tokens, N counted positions, D features, V vocabulary. Position ids follow from the attention
mask, so padding on either side changes nothing. Only safetensors are read, and no code that comes with a checkpoint.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError
from potstill.contracts.signals import HiddenAndHead
from potstill.models.lora import add_lora, merged
from potstill.models.spec import LoraSpec
from potstill.models.tokenizers import pad_id

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class CausalLM(nn.Module):
    """A causal language model and its tokenizer.

    The logits are `head(hidden(...))`, so that an objective may ask for the head at counted positions only. Where an
    architecture bends its logits (Gemma's soft cap, Cohere's and Granite's scales), so does `head`; one that bends them
    in another way, or that lets a token see later ones, is refused with a ModelError when it is built.
    """

    kind: ClassVar[str] = "causal_lm"
    PACKAGED: ClassVar[dict[str, Callable[..., "CausalLM"]]] = {}

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.name = name or network.config.model_type
        self.compiled = False  # whether torch.compile was asked for, so that losses fuse their work too
        config = network.config
        self.softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self.scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self._takes_positions = "position_ids" in inspect.signature(network.base_model.forward).parameters
        if len(tokenizer) > self.vocabulary:
            raise ModelError(
                f"{self.name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {self.vocabulary}. "
                "Use the tokenizer that belongs to the model, or resize the model's embeddings."
            )
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Two rows that differ in their last token: the head must give the network's logits, the past the same ones."""
        if self.device.type == "meta":
            return
        first, last = torch.tensor([0, 1, 2]) % self.vocabulary, torch.tensor([[3], [4]]) % self.vocabulary
        tokens_BT = torch.cat([first.expand(2, 3), last], 1).to(self.device)
        with evaluating(self):
            logits = self(tokens_BT).float()
            theirs = self.network(input_ids=tokens_BT, use_cache=False).logits.float()
        size = theirs.abs().max().clamp_min(1e-6)
        loose = 1e-3 if self.dtype in (torch.float32, torch.float64) else 5e-2
        if not (theirs[0, :3] - theirs[1, :3]).abs().max() <= loose * size:
            raise ModelError(
                f"{self.name}: {type(self.network).__name__} lets tokens see later ones, so it is no causal language "
                "model. Use a decoder, or the masked_lm kind."
            )
        if logits.shape != theirs.shape or not (logits - theirs).abs().max() <= loose * size:
            raise ModelError(
                f"{self.name}: {type(self.network).__name__} changes its logits after the output layer in a way that "
                "CausalLM does not know. Use an architecture whose logits are a linear map of its last hidden states, "
                "scaled or soft-capped."
            )

    @property
    def vocabulary(self) -> int:
        return self.network.get_output_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.get_input_embeddings().parameters()).dtype

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the tokenizer's and those of the model's generation config."""
        listed = getattr(self.network.generation_config, "eos_token_id", None)
        ids = set(listed if isinstance(listed, Sequence) else [listed]) | {self.tokenizer.eos_token_id}
        return tuple(sorted(i for i in ids if i is not None))

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, from input to output."""
        return cast(nn.ModuleList, self.network.get_submodule(_blocks(self.network)))

    def hidden(self, tokens_BS: Tensor, attention_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Last hidden states after the final norm, [B, S] -> [B, S, D].

        With a cache (`new_cache()`), the tokens continue the cached ones and `attention_BT` covers both.
        """
        past = cache.get_seq_length() if cache is not None else 0
        if attention_BT is None:
            attention_BT = tokens_BS.new_ones(len(tokens_BS), past + tokens_BS.shape[1])
        attention_BT = attention_BT.long()
        extra = {}
        if self._takes_positions:
            extra["position_ids"] = (attention_BT.cumsum(1) - 1).clamp_min(0)[:, past:]
        output = self.network.base_model(
            input_ids=tokens_BS,
            attention_mask=attention_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return output.last_hidden_state

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.network.config)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of last hidden states, [..., D] -> [..., V]."""
        logits = self.network.get_output_embeddings()(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @property
    def has_linear_head(self) -> bool:
        """Whether the output layer is one weight and bias (adapters on it are not)."""
        return type(self.network.get_output_embeddings()) is nn.Linear

    def with_head(self, hidden: Tensor) -> HiddenAndHead:
        """Hidden states and the output layer, [*P, D], for losses that never hold [*P, V] logits."""
        output = self.network.get_output_embeddings()
        if not self.has_linear_head:
            raise ModelError(
                f"{self.name}: the output layer is adapted, so it is no single weight [V, D]. "
                "Use a loss on full logits, or adapt other layers."
            )
        return HiddenAndHead(hidden, output.weight, output.bias, self.scale, self.softcap)

    def forward(self, tokens_BT: Tensor, attention_BT: Tensor | None = None) -> Tensor:
        """Logits at every token, [B, T] -> [B, T, V]."""
        return self.head(self.hidden(tokens_BT, attention_BT))

    def counted_hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states that predict the counted tokens, row by row. [N, D]."""
        if batch.counted_BT[:, 0].any():
            raise DataError("A first token cannot count: nothing before it predicts it. Clear counted_BT[:, 0].")
        return self.hidden(batch.tokens_BT, batch.attention_BT)[:, :-1][batch.counted_BT[:, 1:]]

    def counted_logits(self, batch: TokenBatch) -> Tensor:
        """Logits that predict the counted tokens, row by row. [N, V]."""
        return self.head(self.counted_hidden(batch))

    def checkpoint_activations(self, on: bool = True) -> Self:
        """Recompute activations in the backward pass (less memory, one more forward pass)."""
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.network.gradient_checkpointing_disable()
        return self

    def with_lora(self, lora: LoraSpec) -> Self:
        """Freeze the weights and add low-rank adapters, in place; `save` and `shortened` merge copies of them."""
        add_lora(self.network, lora, self.name)
        return self

    def shortened(self, layers: int | list[int]) -> Self:
        """A copy that keeps some transformer blocks: a number spread evenly (first and last too), or those named.

        It is built anew from the shortened config, so layer indices, caches and saved folders are right.
        """
        network = merged(self.network)
        config, prefix = copy.deepcopy(network.config), _blocks(network) + "."
        total = config.num_hidden_layers
        kept = _spread(total, layers) if isinstance(layers, int) else list(layers)
        if not kept or len(set(kept)) < len(kept) or not all(0 <= i < total for i in kept):
            raise ModelError(f"{self.name} has layers 0 to {total - 1}: cannot keep {layers}. Name each kept one once.")
        per_layer = {k: v for k, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == total}
        config.num_hidden_layers = len(kept)
        for field, values in per_layer.items():
            setattr(config, field, [values[i] for i in kept])
        state = {}
        for name, tensor in network.state_dict().items():
            if name.startswith(prefix):
                old, _, rest = name.removeprefix(prefix).partition(".")
                if int(old) not in kept:
                    continue
                name = f"{prefix}{kept.index(int(old))}.{rest}"
            state[name] = tensor
        try:
            with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten at once
                short = AutoModelForCausalLM.from_config(config, dtype=self.dtype).to(self.device)
            short.load_state_dict(state)
            reread = type(config).from_dict(config.to_dict())
            if any(list(getattr(reread, field)) != list(getattr(config, field)) for field in per_layer):
                raise ValueError("its config does not survive saving")
        except (ValueError, RuntimeError, KeyError, IndexError) as cause:
            raise ModelError(
                f"{self.name}: {type(network).__name__} cannot be cut to layers {kept}: {str(cause).splitlines()[0]} "
                "Train a smaller config of the same family instead."
            ) from cause
        short.generation_config = copy.deepcopy(network.generation_config)
        return type(self)(short.train(network.training), self.tokenizer, f"{self.name}[{len(kept)} of {total} layers]")

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, pretrained: bool = True) -> Self:
        """Load a Hugging Face folder or id; `pretrained=False`: its architecture and tokenizer with fresh weights."""
        path = str(path)
        folder = Path(path).expanduser()
        if folder.is_dir():
            path = str(folder)
            _check_folder(folder, pretrained)
        elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
            raise ModelError(f"There is no model folder {path}. Give a folder with config.json, or a Hugging Face id.")
        safe: dict[str, Any] = {"trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(path, **safe)
        except (OSError, ValueError) as cause:
            raise ModelError(
                f"{path} is no model folder here and no model of the Hugging Face hub or its cache that transformers "
                f"knows without foreign code: {_first_line(cause)}"
            ) from cause
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"{path} is a {config.model_type} model, not a causal language model. Use one that continues text "
                "(Llama, Qwen3, GPT-2 ...)."
            )
        try:
            if pretrained:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
                )
            else:
                loaded = AutoModelForCausalLM.from_config(config, dtype=dtype, **safe), {"missing_keys": ()}
            network, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        except Exception as cause:  # transformers raises many kinds; each means that this checkpoint cannot be read
            raise ModelError(f"{path} cannot be loaded as a causal language model: {_first_line(cause)}") from cause
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:3])
            raise ModelError(
                f"{path} lacks weights of {type(network).__name__} ({some} ...): it was saved from a model of another "
                "kind. Use a causal language model's checkpoint, or pretrained: false for fresh weights."
            )
        return cls(network, tokenizer, Path(path).name)

    def save(self, folder: Path) -> None:
        """Write a folder that AutoModelForCausalLM and AutoTokenizer load; adapters are merged."""
        merged(self.network).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def shared_vocabulary(first: CausalLM, second: CausalLM) -> int:
    """How many words two models of one tokenizer both score: their heads may be padded to different widths.

    A ModelError where their tokenizers differ, since word i of one is then not word i of the other.
    """
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise ModelError(
            f"{first.name} and {second.name} have different tokenizers ({len(first.tokenizer)} and "
            f"{len(second.tokenizer)} tokens), so their words cannot be compared. Use models of one family."
        )
    return min(first.vocabulary, second.vocabulary)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode inside the block, each module as it was afterwards."""
    training = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_folder(folder: Path, pretrained: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no Hugging Face model folder.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])} ...). Save one beside the model."
        )
    if pretrained and not any(folder.glob("*.safetensors")):
        pickles = any(p for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = "only pickled weights, which are never read" if pickles else "no weights"
        raise ModelError(f"{folder} holds {found}. Save the model again as safetensors, or write pretrained: false.")


def _blocks(network: PreTrainedModel) -> str:
    """The name of the list of transformer blocks."""
    total = network.config.num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name
    raise ModelError(f"{type(network).__name__} has no list of {total} transformer blocks.")


def _spread(total: int, count: int) -> list[int]:
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _packaged(name: str, config: Callable[..., PreTrainedConfig], **default: int) -> Callable[..., CausalLM]:
    def build(
        *,
        tokenizer: PreTrainedTokenizerBase,
        layers: int = default["layers"],
        width: int = default["width"],
        heads: int = default["heads"],
        kv_heads: int | None = None,
        context: int = 2048,
    ) -> CausalLM:
        if width % heads or (width // heads) % 2:
            raise ModelError(f"{name}: width {width} must be an even multiple of heads {heads} (rotary embeddings).")
        ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        shape = config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=-(-8 * width // 48) * 16,  # 8/3 of the width, up to a multiple of 16
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            head_dim=width // heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            **ids,
        )
        return CausalLM(AutoModelForCausalLM.from_config(shape), tokenizer, name)

    build.__doc__ = f"{name}: {config.__name__} of the tokenizer's vocabulary, tied embeddings, fresh float32 weights."
    return build


CausalLM.PACKAGED = {
    "llama-tiny": _packaged("llama-tiny", LlamaConfig, layers=2, width=64, heads=4),
    "llama-small": _packaged("llama-small", LlamaConfig, layers=4, width=128, heads=4),
    "qwen3-tiny": _packaged("qwen3-tiny", Qwen3Config, layers=2, width=64, heads=4),
}
