"""Judging a set of graphs by what it teaches: train a fresh graph classifier on it, measure AUC on real graphs.

V classes, N graphs. Graphs are PyG `Data` with integer labels `x`, `edge_index`, optionally `edge_attr`, and `y`.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, NonFiniteError, require
from potstill.models.graphs import GraphClassifier


@dataclass(frozen=True)
class Judged:
    """One training run: AUC at the step with the best validation AUC (the first such step)."""

    validation_auc: float
    test_auc: float
    step: int


def collate(graphs: Sequence[Any]) -> Any:
    """One PyG `Batch` of several graphs."""
    return require("torch_geometric.data", "graphs").Batch.from_data_list(list(graphs))


def labels_of(graphs: Sequence[Any]) -> Tensor:
    """Class of each graph. [N], int64."""
    return torch.tensor([int(graph.y) for graph in graphs], dtype=torch.long)


@torch.no_grad()
def graph_logits(model: GraphClassifier, graphs: Sequence[Any], batch: int = 512) -> Tensor:
    """Logits of every graph, in evaluation mode. [N, V]."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    logits = [model(collate(graphs[i : i + batch]).to(device)).cpu() for i in range(0, len(graphs), batch)]
    model.train(was_training)
    return torch.cat(logits)


def auc(logits_NV: Tensor, labels_N: Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count one half.

    The score of class c is its log-odds, logit_c - logsumexp of the others (probabilities would saturate into ties).
    With two classes this is the usual AUC of class 1; with more, the mean of the AUCs of one class against the rest.
    """
    if not logits_NV.isfinite().all():
        raise NonFiniteError("AUC needs finite logits; the classifier's are NaN or infinite. Lower its learning rate.")
    logits_NV = logits_NV.double()
    areas = []
    for c in range(logits_NV.shape[1]):
        others = torch.cat([logits_NV[:, :c], logits_NV[:, c + 1 :]], 1)
        score_N, positive_N = logits_NV[:, c] - others.logsumexp(1), labels_N == c
        pairs = int(positive_N.sum()) * int((~positive_N).sum())
        if pairs:
            wins = mannwhitneyu(
                score_N[positive_N].numpy(), score_N[~positive_N].numpy(), method="asymptotic"
            ).statistic
            areas.append(float(wins) / pairs)
    if not areas:
        raise DataError(f"AUC needs graphs of two classes, but all {len(labels_N)} are of one.")
    return sum(areas) / len(areas)


def drawn(items: int, size: int, seed: int, step: int, weights: Tensor | None) -> Tensor:
    """Which items step `step` trains on, a function of (seed, step) alone. [min(size, items)] or [size], int64.

    Without weights every item is used once an epoch, in an order keyed by the epoch (the last batch of an epoch may be
    short). With weights each of `size` independent draws takes item i with probability weights[i] / sum.
    """
    if weights is None:
        epoch, place = divmod(step, math.ceil(items / size))
        return keyed.permutation(keyed.key(seed, "epoch", epoch), items)[place * size : (place + 1) * size]
    cumulative = weights.double().cumsum(0)
    points = keyed.uniform(keyed.key(seed, "draw", step), torch.arange(size)) * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp_max(items - 1)


def judged(
    judge: GraphClassifier,
    items: Sequence[Any],
    *,
    validation: Sequence[Any],
    test: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int,
    seed: int,
    every: int = 20,
    weights: Tensor | None = None,
) -> tuple[Judged, GraphClassifier]:
    """Train `judge` on `items` by cross-entropy and return its AUCs at the best validation step, and it at that step.

    Validation comes every `every` steps and at both ends, so the untrained judge is a candidate. A draw that repeats an
    item is computed once and weighted by its count. Randomness is keyed by the seed.
    """
    if not items:
        raise DataError("There is nothing to train a judge on: the set of graphs is empty.")
    judge.train()
    device = next(judge.parameters()).device
    everything = collate(items).to(device) if len(items) <= batch else None  # few: collate once, weight by the counts
    truth = labels_of(validation)
    best, best_step, best_state = -1.0, 0, judge.state_dict()
    with torch.random.fork_rng(devices=[]):
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                reached = auc(graph_logits(judge, validation), truth)
                if reached > best:
                    best, best_step, best_state = reached, step, copy.deepcopy(judge.state_dict())
            if step == steps:
                break
            counts = torch.bincount(drawn(len(items), batch, seed, step, weights), minlength=len(items))
            rows = torch.arange(len(items)) if everything is not None else counts.nonzero()[:, 0]
            graphs = everything if everything is not None else collate([items[i] for i in rows]).to(device)
            torch.manual_seed(keyed.key(seed, "dropout", step) & (2**63 - 1))
            losses = torch.nn.functional.cross_entropy(judge(graphs), graphs.y.view(-1), reduction="none")
            loss = (losses * counts[rows].to(device)).sum() / counts.sum()
            if not loss.isfinite():
                raise NonFiniteError(f"The judge's loss became {loss.item()} at step {step}. Lower its learning rate.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    judge.load_state_dict(best_state)
    judge.eval()
    return Judged(best, auc(graph_logits(judge, test), labels_of(test)), best_step), judge
