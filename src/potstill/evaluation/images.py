"""How good a finished image classifier is: accuracy, likelihood, calibration, agreement with its teacher.

N images, V classes, D features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from potstill.contracts.batch import ImageBatch
from potstill.contracts.errors import DataError, NonFiniteError
from potstill.contracts.signals import FullLogits, Teacher
from potstill.divergences import ForwardKL, log_probs
from potstill.models.taps import tap


def calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of (share of images) * |accuracy - mean confidence|, in [0, 1].

    `bins` of equal width, (0, 1/bins], ..., (1 - 1/bins, 1]. Source: Guo et al., arXiv 1706.04599, equation 3.
    """
    confidence, correct = confidence_N.double(), correct_N.double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=index.device).index_add_(0, index, correct - confidence)
    return (gap.abs().sum() / len(confidence)).item()


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module, dataset: Any, batch: int = 512, teacher: Teacher | None = None
) -> dict[str, float]:
    """Metrics of `model` in evaluation mode over a dataset of images, means over all its N images.

    accuracy, nll (nats), ece (15 bins); with a teacher also teacher_agreement (the same most likely class) and
    teacher_kl, the forward KL(p || q) in nats. Raises DataError for empty data or labels outside the classes, and
    NonFiniteError for logits that are no numbers.
    """
    if len(dataset) == 0:
        raise DataError("There is no image to evaluate on: the test split is empty.")
    device, was_training = next(model.parameters()).device, model.training
    logits, labels, theirs = [], [], []
    model.eval()
    try:
        for rows in _batches(len(dataset), batch, "evaluate"):
            here: ImageBatch = dataset.batch(rows).to(device)
            logits.append(model(here.images).float())
            labels.append(here.labels_B)
            if teacher is not None:
                signal = teacher.score(here, FullLogits)
                assert isinstance(signal, FullLogits)
                theirs.append(signal.logits.float())
    finally:
        model.train(was_training)
    logits_NV, labels_N = torch.cat(logits), torch.cat(labels)
    if not logits_NV.isfinite().all():
        raise NonFiniteError("The classifier's logits are NaN or infinite on the test images: its weights are broken.")
    if labels_N.min() < 0 or labels_N.max() >= (classes := logits_NV.shape[1]):
        raise DataError(
            f"Labels lie in {int(labels_N.min())}..{int(labels_N.max())}, but the classifier knows 0..{classes - 1}."
        )
    confidence, predicted = logits_NV.softmax(-1).max(-1)
    correct = predicted == labels_N
    metrics = {
        "accuracy": correct.double().mean().item(),
        "nll": cross_entropy(logits_NV.double(), labels_N).item(),
        "ece": calibration_error(confidence, correct),
    }
    if theirs:
        p, q = log_probs(torch.cat(theirs)), log_probs(logits_NV)
        metrics["teacher_agreement"] = (p.argmax(-1) == predicted).double().mean().item()
        metrics["teacher_kl"] = ForwardKL()(teacher_logp=p, student_logp=q).double().mean().item()
    return metrics


@torch.no_grad()
def classifier_features(model: Any, images: Tensor, batch: int = 512) -> Tensor:
    """What enters the classifier's last linear layer, for Fréchet distances between sets of images.

    model: an ImageClassifier, put in evaluation mode. images [N, C, H, W] -> [N, D], float64 on the CPU.
    """
    if len(images) == 0:
        raise DataError("There are no images to take features of.")
    device, was_training, name = next(model.parameters()).device, model.training, model.head_name
    features = []
    model.eval()
    try:
        for rows in _batches(len(images), batch, "features"):
            with tap(model, inputs=[name]) as taps:
                model(images[rows].to(device))
            features.append(taps.inputs[name].double().cpu())
    finally:
        model.train(was_training)
    return torch.cat(features)


def _batches(size: int, batch: int, what: str) -> Iterator[Tensor]:
    console = Console(stderr=True)
    parts = torch.arange(size).split(batch)
    yield from track(parts, what, console=console, transient=True, disable=not console.is_terminal or len(parts) < 4)
