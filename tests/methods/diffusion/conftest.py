import pytest

from potstill.models.build import build


@pytest.fixture
def untrained_judge(monkeypatch):
    """A judge with fresh weights: its verdicts do not matter here."""
    monkeypatch.setattr(
        "potstill.methods.diffusion.comparison.trained",
        lambda kind, spec, source, context, *rest: build(kind, spec, context=context, seed=0),
    )
