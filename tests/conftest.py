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
