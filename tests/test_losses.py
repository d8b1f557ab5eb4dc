"""The loss against plain loops, in value and gradient, and what a fastai loss must be able to do."""

import io
import math
import pickle

import pytest
import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from fastai_crl import losses
from fastai_crl.hpa import HPA_COUNTS
from fastai_crl.losses import CRL, CRLLoss, imbalance

from . import oracle

VARIANTS = [(level, criterion) for level in ("class", "instance") for criterion in losses.CRITERIA]


def expected_loss(logits, targets, features, crl):
    "The oracle's loss for the options of `crl`, differentiable in logits and features."
    n_classes = logits.shape[1]
    if targets.ndim == 1:
        rows = nn.functional.one_hot(targets, n_classes).tolist()
        p = logits.softmax(1)
    else:
        rows, p = targets.tolist(), logits.sigmoid()
    scores = p if crl.score_space == "probability" else logits if targets.ndim == 2 else (p / (1 - p)).log()
    found = oracle.triplets(scores.tolist(), rows, crl.k, crl.rho, crl.scope, crl.level, features.tolist())
    if not found:
        return None
    each, positives, negatives = oracle.pair_distances(found, scores, rows, crl.scope, crl.level, features)
    margin = 0.5 if crl.score_space == "probability" else 2.0
    if crl.level == "instance":
        margin = 2 * math.pi / (n_classes if crl.scope == "joint" else 2)
    margin = margin if crl.margin is None else crl.margin
    if crl.criterion == "relative":
        return oracle.relative(each, margin)
    if crl.criterion == "absolute":
        return oracle.absolute(positives, negatives, margin)
    if crl.level == "instance":
        low, high = 0.0, max(oracle.distance(x, y) for x in features.tolist() for y in features.tolist())
    elif crl.score_space == "probability":
        low, high = -1.0, 1.0
    else:
        high = float(scores.max() - scores.min())
        low = -high
    return oracle.distribution(positives, negatives, low, high, crl.bins)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize(("level", "criterion"), VARIANTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_value_and_gradient_equal_plain_loop(data, level, criterion, scope, space):
    n, n_classes = data.draw(st.integers(2, 14)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64) * data.draw(st.sampled_from([1, 5]))
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if data.draw(st.booleans()):
        targets = torch.randint(0, n_classes, (n,), generator=generator)
    else:
        targets = (torch.rand(n, n_classes, generator=generator) < data.draw(st.sampled_from([0.2, 0.4, 0.8]))).double()
        if data.draw(st.booleans()):
            targets[torch.rand(n, n_classes, generator=generator) < 0.2] = 0.3
    crl = CRL(
        k=data.draw(st.integers(1, 16)),
        rho=data.draw(st.sampled_from([0.3, 0.5, 1.0])),
        margin=data.draw(st.sampled_from([None, 0.0, 0.7])),
        scope=scope,
        level=level,
        criterion=criterion,
        score_space=space,
        bins=data.draw(st.sampled_from([2, 17, 100])),
    )
    inputs = (logits.requires_grad_(), features.requires_grad_())
    expected = expected_loss(logits, targets, features, crl)
    found = crl(logits, targets, features)
    if expected is None:
        assert found.item() == 0 and not crl.counts.any() and not any(g.any() for g in gradients(found, *inputs))
        return
    tolerance = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(found, torch.as_tensor(expected), **tolerance)
    if expected.requires_grad:
        for ours, theirs in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
