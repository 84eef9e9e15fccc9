"""One thread, no hub, and a single rule for what may be skipped."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(module, ...): skipped without these optional modules; an error under CI")


def _skip(reason: str) -> None:
    """Skip, or fail where POTSTILL_NO_SKIP=1 says that everything must be there."""
    if os.environ.get("POTSTILL_NO_SKIP") == "1":
        pytest.fail(f"{reason} (POTSTILL_NO_SKIP=1)")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _needs(request):
    """`@pytest.mark.needs("rdkit", "pandas")`: optional modules of a test."""
    for mark in request.node.iter_markers("needs"):
        for module in mark.args:
            if importlib.util.find_spec(module) is None:
                _skip(f"{module} is not installed")


@pytest.fixture(scope="session")
def asset_or_skip():
    """`asset_or_skip(load)`: what `load()` gives, or a skip where packaged data is found nowhere."""
    from potstill.contracts.errors import AssetError

    def get(load):
        try:
            return load()
        except AssetError as missing:
            _skip(str(missing))

    return get


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """`tiny_lm(seed, config=..., tokenizer=...)`: the folder of a tiny causal language model with fresh weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from potstill.models.tokenizers import character_tokenizer

    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"()-<>|/\n"

    def make(seed=0, config=LlamaConfig, tokenizer=None, template=None, spread=0.3, **options):
        tokenizer = tokenizer or character_tokenizer(alphabet)
        if template:
            tokenizer.chat_template = template
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        torch.manual_seed(seed)
        made = config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, **shape | ids | options)
        network = AutoModelForCausalLM.from_config(made)
        with torch.no_grad():  # fresh weights all say nearly the same: spread them, so that models differ
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, spread)
        folder = tmp_path_factory.mktemp("lm")
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(teachers, monkeypatch):
    """Teachers are trained once a module, outside the user's cache."""
    monkeypatch.setenv("POTSTILL_CACHE", str(teachers))
    return teachers
