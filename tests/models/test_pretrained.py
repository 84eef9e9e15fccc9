"""SmolLM2 from its package: the conversion, its refusals, and that the weights are the model."""

import json
import math

import pytest
import torch

from potstill import assets
from potstill.contracts.errors import ModelError
from potstill.models.pretrained import gguf_to_transformers, smollm2

pytestmark = pytest.mark.needs("gguf")

GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light."
)


@pytest.fixture(scope="module")
def loaded(asset_or_skip):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = asset_or_skip(smollm2)
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_folder_is_complete_and_not_quantized(loaded):
    folder, model, tokenizer = loaded
    assert (folder / "model.safetensors").stat().st_size > 500e6
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_hidden_layers"] == 30
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer(GENESIS).input_ids) == GENESIS


def test_weights_equal_the_dequantized_file(loaded, asset_or_skip):
    """Against gguf's own dequantizer, for tensors whose layout GGUF does not permute."""
    import gguf

    _, model, _ = loaded
    root = asset_or_skip(lambda: assets.asset("smollm2"))
    tensors = {t.name: t for t in gguf.GGUFReader(root / next(iter(assets.PACKAGES["smollm2"].files))).tensors}
    for name, parameter in {
        "blk.7.ffn_down.weight": model.model.layers[7].mlp.down_proj.weight,
        "blk.29.attn_v.weight": model.model.layers[29].self_attn.v_proj.weight,
        "output_norm.weight": model.model.norm.weight,
    }.items():
        ours = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        torch.testing.assert_close(parameter.detach(), ours.view_as(parameter), rtol=0, atol=0)


@torch.no_grad()
def test_model_knows_a_capital_and_reads_english(loaded):
    """Query and key weights are permuted in GGUF: done wrongly, the text comes out as noise."""
    _, model, tokenizer = loaded
    question = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**question, max_new_tokens=3, do_sample=False)[0])
    tokens = tokenizer(GENESIS, return_tensors="pt").input_ids
    assert model(tokens, labels=tokens).loss.item() < math.log(10)  # perplexity


def test_second_call_converts_nothing(loaded, monkeypatch):
    folder, *_ = loaded
    monkeypatch.setattr("potstill.models.pretrained.gguf_to_transformers", lambda *_: pytest.fail("converted again"))
    assert smollm2() == folder


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="There is no file"):
        gguf_to_transformers(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="is no GGUF file: it does not start with the letters GGUF"):
        gguf_to_transformers(tmp_path / "text.gguf", tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match="cannot read .*cut.gguf"):
        gguf_to_transformers(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
