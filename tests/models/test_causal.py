import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError
from potstill.models.causal import CausalLM, evaluating
from potstill.models.spec import LoraSpec

VOCABULARY = 23


def tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(size - 2))]
    words_to_ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(words_to_ids, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


SHAPE = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2}
MODERN = SHAPE | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
CONFIGS = {
    "llama": lambda: LlamaConfig(**MODERN, **IDS),
    "qwen3": lambda: Qwen3Config(**MODERN, **IDS),
    "qwen3-sliding": lambda: Qwen3Config(
        **MODERN,
        **IDS,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_layer=4, n_embd=16, n_head=2, initializer_range=0.5, **IDS),
    "gemma2": lambda: Gemma2Config(**MODERN, **IDS, final_logit_softcapping=3.0, sliding_window=3),
    "cohere2": lambda: Cohere2Config(
        **{k: v for k, v in MODERN.items() if k != "head_dim"}, **IDS, logit_scale=0.25, sliding_window=3
    ),
    "granite": lambda: GraniteConfig(**{k: v for k, v in MODERN.items() if k != "head_dim"}, **IDS, logits_scaling=4.0),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=32, initializer_range=0.5, **IDS),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        attention_types=[[["global", "local"], 2]],
        window_size=3,
        initializer_range=0.5,
        **IDS,
    ),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=8, init_std=0.5, **IDS),
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype), tokenizer()).eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_the_networks_own(family):
    model, words = model_of(family), tokens(2, 6)
    assert_close(model(words), model.network(input_ids=words).logits)
    assert model(words).std() > 0.1  # big enough for the comparisons below to mean something


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_padding_on_either_side_changes_nothing(family, dtype):
    model, words = model_of(family, dtype), tokens(2, 6)
    pad, real = torch.full((2, 3), 5), torch.ones(2, 6, dtype=torch.bool)
    unpadded = model(words).float()
    left = model(torch.cat([pad, words], 1), torch.cat([pad < 0, real], 1)).float()
    right = model(torch.cat([words, pad], 1), torch.cat([real, pad < 0], 1)).float()
    assert left.isfinite().all()  # at the padding too: a NaN there would poison gradients
    close = (
        {"rtol": 1e-4, "atol": 1e-4}
        if dtype == torch.float32
        else {"rtol": 0.0, "atol": 0.06 * unpadded.abs().max().item()}
    )
    assert_close(left[:, 3:], unpadded, **close)
    assert_close(right[:, :6], unpadded, **close)


def test_positions_matter():
    """The padding test can fail: without the mask's positions a learned position embedding gives other logits."""
    model, words = model_of("gpt2"), tokens(1, 6)
    shifted = model.network(input_ids=words, position_ids=torch.arange(3, 9)[None]).logits
    assert (shifted - model(words)).abs().max() > 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_cache_continues_left_padded_rows(family):
    model, words = model_of(family), tokens(2, 8)
    attention = torch.ones(2, 8, dtype=torch.bool)
    attention[1, :3] = False
    cache = model.new_cache()
    parts = [model.hidden(words[:, a:b], attention[:, :b], cache) for a, b in ((0, 5), (5, 6), (6, 8))]
    assert_close(torch.cat(parts, 1)[attention], model.hidden(words, attention)[attention], rtol=1e-4, atol=1e-4)


def test_counted_positions_are_predicted_from_the_tokens_before():
    model, words = model_of("llama"), tokens(3, 5)
    counted = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
    batch = TokenBatch(torch.arange(3), words, torch.ones_like(counted), counted)
    full = model(words)
    by_hand = torch.stack([full[b, t - 1] for b in range(3) for t in range(5) if counted[b, t]])
    assert_close(model.counted_logits(batch), by_hand)
    assert model.counted_hidden(batch).shape == (6, 16)
    counted[1, 0] = True
    with pytest.raises(DataError, match="first token cannot count"):
        model.counted_logits(batch)


@pytest.mark.parametrize("family", ["llama", "cohere2", "granite", "opt", "gemma2"])
def test_the_head_as_one_linear_map(family):
    model = model_of(family)
    given = model.with_head(model.hidden(tokens(2, 4)))
    logits = torch.nn.functional.linear(given.hidden_ND, given.head_VD, given.bias_V) * given.scale
    assert_close(
        given.softcap * torch.tanh(logits / given.softcap) if given.softcap else logits, model.head(given.hidden_ND)
    )


def test_an_adapted_output_layer_is_no_linear_map():
    model = model_of("llama").with_lora(LoraSpec(targets=["lm_head"]))
    assert not model.has_linear_head
    with pytest.raises(ModelError, match="output layer is adapted"):
        model.with_head(torch.zeros(1, 16))


@pytest.mark.parametrize("family", CONFIGS)
def test_shortened_keeps_the_named_blocks_and_survives_saving(family, tmp_path):
    model, words = model_of(family), tokens(2, 7)
    short = model.shortened([0, 3])
    by_hand = copy.deepcopy(model)
    blocks = by_hand.blocks
    for i in (2, 1):  # cut the blocks out of the running network
        del blocks[i]
    by_hand.network.config.num_hidden_layers = 2
    if hasattr(by_hand.network.config, "layer_types"):
        by_hand.network.config.layer_types = [model.network.config.layer_types[i] for i in (0, 3)]
    assert_close(short(words), by_hand(words))
    assert (short(words) - model(words)).abs().max() > 1e-2
    cache = short.new_cache()
    steps = [short.hidden(words[:, t : t + 1], None, cache) for t in range(7)]
    assert_close(torch.cat(steps, 1), short.hidden(words), rtol=1e-4, atol=1e-4)
    short.save(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert len(again.blocks) == again.network.config.num_hidden_layers == 2
    assert_close(again(words), short(words))
    next(short.network.parameters()).data.zero_()
    assert next(model.network.parameters()).abs().sum() > 0  # a copy


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_shortened_spreads_evenly(count, kept):
    model, words = model_of("llama"), tokens(1, 4)
    assert_close(model.shortened(count)(words), model.shortened(kept)(words))


@pytest.mark.parametrize("layers", [0, 5, -1, [], [4], [1, 1], [-1]])
def test_shortened_refuses(layers):
    with pytest.raises(ModelError, match="layers 0 to 3: cannot keep"):
        model_of("llama").shortened(layers)


def test_shortened_refuses_blocks_that_do_not_fit_their_new_place():
    """Every second block of this one is a mixture of experts by its index: blocks 0 and 2 cannot stand at 0 and 1."""
    shape = Qwen3MoeConfig(
        **MODERN, **IDS, decoder_sparse_step=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8
    )
    model = CausalLM(AutoModelForCausalLM.from_config(shape), tokenizer())
    assert_close(model.shortened([0, 3])(tokens(1, 3)).shape, torch.Size([1, 3, VOCABULARY]))
    with pytest.raises(ModelError, match=r"Qwen3MoeForCausalLM cannot be cut to layers \[0, 2\]"):
        model.shortened([0, 2])


@pytest.mark.parametrize("name", CausalLM.PACKAGED)
def test_packaged(name, tmp_path):
    model = CausalLM.PACKAGED[name](tokenizer=tokenizer(), layers=1, width=32, heads=2)
    assert (model.name, model.vocabulary, len(model.blocks), model.stop_ids) == (name, VOCABULARY, 1, (1,))
    model.save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(theirs(tokens(1, 4)).logits, model.eval()(tokens(1, 4)))
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w4").input_ids == [5, 6]
    with pytest.raises(TypeError, match="depth"):
        CausalLM.PACKAGED[name](tokenizer=tokenizer(), depth=3)
    with pytest.raises(ModelError, match="even multiple of heads"):
        CausalLM.PACKAGED[name](tokenizer=tokenizer(), width=30, heads=4)


def test_packaged_on_the_meta_device():
    with torch.device("meta"):
        model = CausalLM.PACKAGED["llama-small"](tokenizer=tokenizer())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.device("meta"):
        assert len(model.shortened(2).blocks) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_lora_trains_adapters_alone_and_is_merged_when_saved(family, tmp_path):
    model, words = model_of(family), tokens(2, 6)
    before = model(words)
    frozen = {name: p.clone() for name, p in model.network.named_parameters()}
    model.with_lora(LoraSpec(r=2, alpha=8))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in frozen.values())
    assert_close(model(words), before)  # adapters start at zero
    torch.optim.SGD(trained, 0.5).step(lambda: (loss := model(words).logsumexp(-1).mean(), loss.backward())[0])
    torch.optim.SGD(trained, 0.5).step(lambda: (loss := model(words).logsumexp(-1).mean(), loss.backward())[0])
    adapted = model(words)
    assert (adapted - before).abs().max() > 1e-2
    for name, parameter in model.network.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    model.save(tmp_path)
    assert_close(CausalLM.from_pretrained(tmp_path)(words), adapted, rtol=1e-4, atol=1e-4)
    assert_close(model(words), adapted)  # saving leaves the adapters where they are
    assert_close(model.shortened(4)(words), adapted, rtol=1e-4, atol=1e-4)


def test_lora_refuses_unknown_targets():
    with pytest.raises(ModelError, match=r"lora.targets \['query'\] fit no layer.*q_proj"):
        model_of("llama").with_lora(LoraSpec(targets=["query"]))


def test_checkpointing_gives_the_same_gradients():
    model, words = model_of("llama").train(), tokens(2, 6)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(words).square().mean(), parameters)
    model.checkpoint_activations()
    again = torch.autograd.grad(model(words).square().mean(), parameters)
    assert_close(again, plain)
    assert model.network.is_gradient_checkpointing
    assert not model.checkpoint_activations(False).network.is_gradient_checkpointing


def test_evaluating_restores_each_module():
    model = model_of("llama").train()
    model.blocks[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.blocks[0].training
    assert not model.blocks[1].training


def test_fresh_weights_of_an_architecture(tmp_path):
    model = model_of("qwen3")
    model.save(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError, match=r"holds no weights.*pretrained: false"):
        CausalLM.from_pretrained(tmp_path)
    fresh = CausalLM.from_pretrained(tmp_path, pretrained=False, dtype=torch.bfloat16)
    assert fresh.dtype == torch.bfloat16
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]


def test_refuses_what_is_no_model_folder(tmp_path):
    with pytest.raises(ModelError, match=r"no model folder .*nowhere"):
        CausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        CausalLM.from_pretrained(tmp_path)
    model_of("llama").network.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        CausalLM.from_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights, which are never read"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        CausalLM.from_pretrained(tmp_path)


def test_refuses_an_unknown_id(monkeypatch):
    with pytest.raises(ModelError, match="nobody/nothing is no model folder here and no model of the Hugging Face hub"):
        CausalLM.from_pretrained("nobody/nothing")


def test_refuses_other_kinds(tmp_path):
    t5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    bert = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
    )
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for name in ("t5", "bert"):
        tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match="is a t5 model, not a causal language model"):
        CausalLM.from_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="lets tokens see later ones"):
        CausalLM.from_pretrained(tmp_path / "bert")


def test_refuses_missing_weights(tmp_path):
    model_of("gpt_neox").network.base_model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lacks weights of GPTNeoXForCausalLM"):
        CausalLM.from_pretrained(tmp_path)


def test_refuses_a_tokenizer_that_is_too_large():
    with pytest.raises(ModelError, match="tokenizer has 30 tokens, the model embeds 23"):
        CausalLM(model_of("llama").network, tokenizer(30))


def test_refuses_logits_it_cannot_reproduce():
    network = model_of("llama").network
    network.register_forward_hook(lambda module, args, output: output.__class__(logits=output.logits * 2))
    with pytest.raises(ModelError, match="changes its logits after the output layer"):
        CausalLM(network, tokenizer())
