import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.contracts.errors import DataError, NonFiniteError
from potstill.contracts.signals import FullLogits
from potstill.evaluation.images import calibration_error, classifier_features, evaluate_classifier
from potstill.models.images import ImageClassifier
from potstill.tasks.base import Images


class Table(nn.Module):
    """Image i holds the number i; its logits are the log-probabilities of row i."""

    def __init__(self, rows):
        super().__init__()
        self.logp = nn.Parameter(torch.tensor(rows).log())

    def forward(self, images):
        assert not self.training
        return self.logp[images.flatten().long()]


class Given:
    name, gives = "given", frozenset({FullLogits})

    def __init__(self, rows):
        self.table = Table(rows).eval()

    def score(self, batch, need):
        return FullLogits(self.table(batch.images))


ROWS = [[0.9, 0.1], [0.7, 0.3], [0.35, 0.65], [0.05, 0.95], [0.48, 0.52]]


def numbered(labels):
    return Images(torch.arange(float(len(labels))).view(-1, 1, 1, 1), torch.tensor(labels))


def test_metrics_by_hand():
    """Right on images 0, 1 and 3. ECE: bins of 1/15 put 0.9 and 0.7, 0.65, 0.95, 0.52 in five different bins."""
    got = evaluate_classifier(model := Table(ROWS), numbered([0, 0, 0, 1, 0]), batch=2)
    nll = -(math.log(0.9) + math.log(0.7) + math.log(0.35) + math.log(0.95) + math.log(0.48)) / 5
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["nll"] == pytest.approx(nll)
    assert got["ece"] == pytest.approx((0.1 + 0.3 + 0.65 + 0.05 + 0.52) / 5)
    assert set(got) == {"accuracy", "nll", "ece"}
    assert model.training  # as it was


def test_calibration_error_averages_within_bins_only():
    """0.61 and 0.66 share the bin (9/15, 10/15]: |(1 - 0.61) + (0 - 0.66)|; 1 and 14/15 + 0.01 share the last."""
    confidence = torch.tensor([0.61, 0.66, 1.0, 14 / 15 + 0.01, 0.2], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True, False])
    expected = (abs(0.39 - 0.66) + abs(1 / 15 - 0.01) + 0.2) / 5
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert calibration_error(confidence, correct, bins=1) == pytest.approx(abs(3 - confidence.sum().item()) / 5)


def test_the_upper_edge_of_a_bin_belongs_to_it():
    two = torch.tensor([0.5, 0.4], dtype=torch.float64)  # of two bins, both lie in (0, 1/2]
    assert calibration_error(two, torch.tensor([True, False]), bins=2) == pytest.approx(abs(0.5 - 0.4) / 2)


def test_agreement_and_forward_kl_with_a_teacher():
    theirs = [[0.6, 0.4], [0.2, 0.8], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]]
    got = evaluate_classifier(Table(ROWS), numbered([0] * 5), batch=3, teacher=Given(theirs))
    kl = sum(p * math.log(p / q) for ps, qs in zip(theirs, ROWS) for p, q in zip(ps, qs)) / 5
    assert got["teacher_kl"] == pytest.approx(kl, rel=1e-5)
    assert got["teacher_agreement"] == pytest.approx(3 / 5)  # images 0, 2, 4


def test_features_are_what_the_head_sees():
    torch.manual_seed(0)
    model = ImageClassifier.PACKAGED["convnet"](size=8)
    x = torch.randn(7, 1, 8, 8)
    features = classifier_features(model, x, batch=3)
    assert model.training
    assert features.dtype == torch.float64
    assert_close(model.network.head(features.float()), model.eval()(x))


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="the test split is empty"):
        evaluate_classifier(Table(ROWS), Images(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(DataError, match=r"Labels lie in 0\.\.2, but the classifier knows 0\.\.1"):
        evaluate_classifier(Table(ROWS), numbered([0, 2]))
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite"):
        evaluate_classifier(Table([[math.nan, 0.5]]), numbered([0]))
    with pytest.raises(DataError, match="no images"):
        classifier_features(ImageClassifier.PACKAGED["mlp"](size=8), torch.zeros(0, 1, 8, 8))
