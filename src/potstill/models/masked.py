"""Masked language models: one adapter around BERT-style networks and around decoders made bidirectional.

A decoder (Llama, Qwen ...) becomes a masked-diffusion language model, as LLaDA (arXiv 2502.09992) and Dream (arXiv
2508.15487) are, by a full attention mask and a mask token. B batch, L length, V vocabulary. Only safetensors are read,
and no code that comes with a checkpoint.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from potstill.contracts.errors import ModelError
from potstill.models.lora import add_lora, merged
from potstill.models.spec import LoraSpec
from potstill.models.tokenizers import pad_id
from potstill.noise.masked import ancestral, subs_log_probs

MASK_TOKEN = "<|mask|>"


class MaskedLM(nn.Module):
    """A bidirectional language model with a mask token.

    `network` predicts the token at its own position. A decoder without a mask token gets one, and an embedding for it.
    """

    kind: ClassVar[str] = "masked_lm"
    PACKAGED: ClassVar[dict[str, Callable[..., "MaskedLM"]]] = {}
    network: Any  # a transformers PreTrainedModel

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.name = name or network.config.model_type
        self._decoder = type(network) in set(MODEL_FOR_CAUSAL_LM_MAPPING.values())
        if tokenizer.mask_token_id is None:
            if not self._decoder:
                raise ModelError(f"{self.name}: its tokenizer has no mask token. Use the tokenizer of a masked model.")
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        if len(tokenizer) > self.vocabulary:
            if not self._decoder:
                raise ModelError(
                    f"{self.name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {self.vocabulary}. "
                    "Use the tokenizer that belongs to the model, or resize the model's embeddings."
                )
            with torch.random.fork_rng(devices=[]):
                network.resize_token_embeddings(len(tokenizer))
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """The first position must see the last one: some decoders ignore a full attention mask."""
        if self.device.type == "meta":
            return
        tokens_BL = torch.tensor([[0, 1, 2], [0, 1, 3]], device=self.device) % self.vocabulary
        training = self.network.training
        self.network.eval()
        logits = self.logits(tokens_BL)
        self.network.train(training)
        if torch.equal(logits[0, 0], logits[1, 0]):
            raise ModelError(
                f"{self.name}: {type(self.network).__name__} stays causal under a full attention mask. Use a BERT-style "
                "model, or a decoder with plain attention (Llama, Qwen3 ...)."
            )

    @property
    def vocabulary(self) -> int:
        return self.network.get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def mask_id(self) -> int:
        return self.tokenizer.mask_token_id  # type: ignore[return-value]

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def length(self) -> int:
        """The longest sequence that the positions reach."""
        return int(self.network.config.max_position_embeddings)

    def _arguments(self, tokens_BL: Tensor, attention_BL: Tensor | None) -> dict[str, Any]:
        if attention_BL is None:
            attention_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        attention_BL = attention_BL.bool()
        if not self._decoder:
            return {"attention_mask": attention_BL.long()}
        dtype = self.network.get_input_embeddings().weight.dtype
        bias_BL = torch.zeros(attention_BL.shape, dtype=dtype, device=tokens_BL.device)
        # the lowest finite number, not -inf: a row of nothing but padding must not become NaN
        bias_BL = bias_BL.masked_fill(~attention_BL, torch.finfo(dtype).min)
        bias_B1LL = bias_BL[:, None, None, :].expand(-1, 1, tokens_BL.shape[1], -1)
        position_BL = (attention_BL.long().cumsum(1) - 1).clamp_min(0)
        return {"attention_mask": bias_B1LL, "position_ids": position_BL, "use_cache": False}

    def logits(self, tokens_BL: Tensor, attention_BL: Tensor | None = None) -> Tensor:
        """Raw logits at every position, the mask among the outcomes. [B, L] -> [B, L, V].

        `noise.masked.subs_log_probs` turns them into probabilities of tokens.
        """
        return self.network(input_ids=tokens_BL, **self._arguments(tokens_BL, attention_BL)).logits

    def embeddings(self, tokens_BL: Tensor) -> Tensor:
        """Input embeddings of tokens, [B, L] -> [B, L, D]; what `embedded` takes, also as mixtures of tokens."""
        return self.network.get_input_embeddings()(tokens_BL)

    def hidden(
        self, tokens_BL: Tensor, attention_BL: Tensor | None = None, *, embedded_BLD: Tensor | None = None
    ) -> Tensor:
        """Last hidden states of the trunk, for discriminators. [B, L, D].

        `embedded_BLD` replaces the embeddings of the tokens (a soft input that carries a gradient).
        """
        arguments = self._arguments(tokens_BL, attention_BL)
        given = {"input_ids": tokens_BL} if embedded_BLD is None else {"inputs_embeds": embedded_BLD}
        return self.network.base_model(**given, **arguments).last_hidden_state

    def forward(self, tokens_BL: Tensor, attention_BL: Tensor | None = None) -> Tensor:
        return self.logits(tokens_BL, attention_BL)

    def log_probs(self, tokens_BL: Tensor, attention_BL: Tensor | None = None) -> Tensor:
        """SUBS log-probabilities: the mask is never predicted, visible tokens are copied. [B, L, V]."""
        return subs_log_probs(self.logits(tokens_BL, attention_BL), tokens_BL, self.mask_id)

    @torch.no_grad()
    def samples(
        self,
        ids_B: Tensor,
        *,
        seed: int,
        length: int | None = None,
        steps: int | None = None,
        sampler: Callable[..., Tensor] = ancestral,
        **options: Any,
    ) -> Tensor:
        """Token rows from nothing but masks, each a function of (seed, id) alone. [B] -> [B, L].

        length: default, and at most, what the positions reach. steps: network calls, one a token by default. sampler:
        `noise.masked.ancestral`, `confident`, or another of their signature, with its `options`.
        """
        length = self.length if length is None else length
        if not 0 < length <= self.length:
            raise ModelError(f"{self.name} writes texts of 1 to {self.length} tokens, not {length}.")
        start_BL = torch.full((len(ids_B), length), self.mask_id, device=self.device)
        ids_B = ids_B.to(self.device)
        return sampler(self.log_probs, start_BL, self.mask_id, steps=steps or length, seed=seed, ids_B=ids_B, **options)

    def generate(self, count: int = 8, seed: int = 0, **options: Any) -> list[str]:
        """`count` texts from nothing but masks; options of `samples`."""
        rows = self.samples(torch.arange(count), seed=seed, **options)
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def copied(self) -> Self:
        """A copy with weights of its own; the tokenizer is shared."""
        return type(self)(copy.deepcopy(self.network), self.tokenizer, self.name)

    def last_blocks(self, count: int) -> list[nn.Module]:
        """The last `count` transformer blocks of the trunk, and whatever comes behind them (a final norm)."""
        base, total = self.network.base_model, self.network.config.num_hidden_layers
        if not 1 <= count <= total:
            raise ModelError(f"{self.name} has {total} blocks: 1 to {total} of them can be trained, not {count}.")
        path = next((n for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total), None)
        if path is None:
            raise ModelError(f"{self.name}: the blocks of {type(self.network).__name__} were not found.")
        children = list(base.named_children())
        place = [name for name, _ in children].index(path.partition(".")[0])
        return [*base.get_submodule(path)[total - count :], *(module for _, module in children[place + 1 :])]

    def with_lora(self, lora: LoraSpec) -> Self:
        """Freeze the weights and add low-rank adapters, in place; `save` merges them."""
        add_lora(self.network, lora, self.name)
        return self

    def checkpoint_activations(self, on: bool = True) -> Self:
        """Recompute activations in the backward pass (less memory, one more forward pass)."""
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.network.gradient_checkpointing_disable()
        return self

    def save(self, folder: Path) -> None:
        """Write a folder that AutoModelForMaskedLM (or ...CausalLM) and AutoTokenizer load; adapters are merged."""
        merged(self.network).save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, pretrained: bool = True) -> Self:
        """Load a Hugging Face folder or id; `pretrained=False`: its architecture and tokenizer with fresh weights."""
        folder = Path(path).expanduser()
        where = str(folder) if folder.is_dir() else str(path)
        if not folder.is_dir() and (folder.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1):
            raise ModelError(f"There is no model folder {path}. Give a folder with config.json, or a Hugging Face id.")
        if folder.is_dir() and pretrained and not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{path} holds no safetensors weights (pickled ones are never read). Save it again as safetensors, or "
                "write pretrained: false for fresh weights."
            )
        safe: dict[str, Any] = {"trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(where, **safe)
            auto: Any = AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM
            if auto is AutoModelForCausalLM and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise ValueError(f"{config.model_type} is neither a masked language model nor a decoder.")
            missing: Any = ()
            if pretrained:
                network, report = auto.from_pretrained(
                    where, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
                )
                missing = report["missing_keys"]
            else:
                network = auto.from_config(config, dtype=dtype, **safe)
            tokenizer = AutoTokenizer.from_pretrained(where, **safe)
        except Exception as cause:  # transformers raises many kinds; each means that this checkpoint cannot be read
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise ModelError(f"{path} cannot be loaded as a masked language model: {reason}") from cause
        if missing:
            raise ModelError(
                f"{path} lacks weights of {type(network).__name__} ({', '.join(sorted(missing)[:3])} ...): it was saved "
                "from a model of another kind. Write pretrained: false for fresh weights."
            )
        return cls(network, tokenizer, Path(path).name)


def _bert(name: str, tokenizer: PreTrainedTokenizerBase, layers: int, width: int, heads: int, length: int) -> MaskedLM:
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"{name} needs a tokenizer with a mask token, as character_tokenizer(..., mask=True) makes it."
        )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MaskedLM(BertForMaskedLM(config), tokenizer, name)


def mlm_small(
    *, tokenizer: PreTrainedTokenizerBase, layers: int = 3, width: int = 96, heads: int = 4, length: int = 64
) -> MaskedLM:
    """Three layers of width 96: a character-level masked-diffusion model that a laptop trains."""
    return _bert("mlm-small", tokenizer, layers, width, heads, length)


def mlm_tiny(
    *, tokenizer: PreTrainedTokenizerBase, layers: int = 1, width: int = 32, heads: int = 2, length: int = 64
) -> MaskedLM:
    """One layer of width 32, for tests."""
    return _bert("mlm-tiny", tokenizer, layers, width, heads, length)


MaskedLM.PACKAGED = {"mlm-small": mlm_small, "mlm-tiny": mlm_tiny}
