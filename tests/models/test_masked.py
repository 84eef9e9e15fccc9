import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from potstill.contracts.errors import ModelError
from potstill.models.masked import MaskedLM, mlm_small, mlm_tiny
from potstill.models.spec import LoraSpec
from potstill.models.tokenizers import character_tokenizer

TEXT = "abcdefgh "
COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer(mask=True):
    return character_tokenizer(TEXT, mask=mask)


def build(kind: str) -> MaskedLM:
    torch.manual_seed(0)
    size, spare = len(tokenizer()), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        model = mlm_tiny(tokenizer=tokenizer())
    elif kind == "roberta":
        model = MaskedLM(
            RobertaForMaskedLM(RobertaConfig(vocab_size=size, max_position_embeddings=66, **COMMON, **spare)),
            tokenizer(),
        )
    elif kind == "modernbert":
        config = ModernBertConfig(vocab_size=size, **COMMON, **spare, cls_token_id=1, sep_token_id=2)
        model = MaskedLM(ModernBertForMaskedLM(config), tokenizer())
    elif kind == "gpt2":  # learned positions, so they must not count the padding
        config = GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
        model = MaskedLM(GPT2LMHeadModel(config), tokenizer())
    elif kind == "llama":
        config = LlamaConfig(vocab_size=size - 1, num_key_value_heads=1, **COMMON, **spare)
        model = MaskedLM(LlamaForCausalLM(config), tokenizer(mask=False))
    else:
        config = Qwen3Config(vocab_size=size, num_key_value_heads=1, head_dim=8, **COMMON, **spare)
        model = MaskedLM(Qwen3ForCausalLM(config), tokenizer())
    return model.eval()


KINDS = ["bert", "roberta", "modernbert", "llama", "qwen3", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_sees_every_other_and_no_padding(kind):
    model = build(kind)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    logits = model.logits(tokens)
    assert logits.shape == (2, 4, len(model.tokenizer))
    for changed in range(4):
        other = tokens.clone()
        other[:, changed] = model.mask_id
        moved = (model.logits(other) - logits).abs().amax((0, 2)) > 0
        assert moved.all()
    assert model.logits(tokens, torch.zeros(2, 4, dtype=torch.bool)).isfinite().all()  # nothing but padding
    for side in ("left", "right"):
        pad = torch.full((2, 3), 10)
        no = torch.zeros(2, 3, dtype=torch.bool)
        real, parts = torch.ones(2, 4, dtype=torch.bool), slice(3, None) if side == "left" else slice(4)
        if side == "left" and kind in ("bert", "roberta", "modernbert"):
            continue  # their positions count the padding
        padded = torch.cat([pad, tokens] if side == "left" else [tokens, pad], 1)
        attention = torch.cat([no, real] if side == "left" else [real, no], 1)
        got = model.logits(padded, attention)
        assert got.isfinite().all()
        assert_close(got[:, parts], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = build(kind)
    model.save(tmp_path)
    again = MaskedLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[5, 6, model.mask_id, 8]])
    assert again.mask_id == model.mask_id
    assert_close(again.logits(tokens), model.logits(tokens))
    fresh = MaskedLM.from_pretrained(tmp_path, pretrained=False).eval()
    assert not torch.allclose(fresh.logits(tokens), model.logits(tokens))


def test_packaged_folder_is_transformers_own(tmp_path):
    model = mlm_small(tokenizer=tokenizer()).eval()
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 500_000
    model.save(tmp_path)
    network, tokens = AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokens("ab<mask>d", return_tensors="pt")["input_ids"]
    assert_close(network(ids).logits, model.logits(ids))


def test_a_decoder_without_a_mask_token_gets_one_and_keeps_its_logits():
    config = LlamaConfig(
        vocab_size=len(tokenizer(mask=False)), num_key_value_heads=1, **COMMON | {"num_hidden_layers": 1}
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[4, 5, 6]])
    causal = network(tokens).logits
    model = MaskedLM(network, tokenizer(mask=False))
    assert model.mask_id == len(tokenizer(mask=False))
    assert_close(model.logits(tokens)[0, 2, :-1], causal[0, 2])  # the last row of one layer sees all either way
    assert not torch.allclose(model.logits(tokens)[0, 0, :-1], causal[0, 0])


def test_hidden_states_and_soft_inputs():
    model = build("bert")
    tokens = torch.tensor([[5, 6, 7, 8]])
    hidden = model.hidden(tokens)
    assert hidden.shape == (1, 4, 32)
    soft = model.embeddings(tokens).detach().requires_grad_()
    assert_close(model.hidden(tokens, embedded_BLD=soft), hidden)
    model.hidden(tokens, embedded_BLD=soft).square().sum().backward()
    assert soft.grad.abs().sum() > 0


def test_lora_trains_adapters_and_merges(tmp_path):
    model = build("bert").with_lora(LoraSpec(r=2, alpha=4))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    model.save(tmp_path)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert_close(MaskedLM.from_pretrained(tmp_path).eval().logits(tokens), model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ModelError, match="There is no model folder"):
        MaskedLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no safetensors"):
        MaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs a tokenizer with a mask token"):
        mlm_small(tokenizer=tokenizer(mask=False))
    with pytest.raises(ModelError, match="its tokenizer has no mask token"):
        MaskedLM(build("bert").network, tokenizer(mask=False))
    with pytest.raises(ModelError, match="stays causal"):

        class Stubborn(GPT2LMHeadModel):
            def forward(self, input_ids, **_options):
                return super().forward(input_ids)

        MaskedLM(Stubborn(GPT2Config(vocab_size=14, n_embd=16, n_layer=1, n_head=2)), tokenizer())
