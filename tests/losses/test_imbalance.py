"""Ω, the imbalance of labels, and the mix that it weighs."""

import pytest
import torch

from fastai_crl.hpa import HPA_COUNTS
from fastai_crl.losses.crl import Rectified
from fastai_crl.losses.imbalance import TrainingLabels, imbalance, mix, omega


def test_of_hpa():
    assert imbalance(HPA_COUNTS) == pytest.approx(0.476, rel=5e-3)


def test_by_hand():
    assert imbalance([30, 10]) == pytest.approx(0.25)
    assert imbalance([0.3, 0.1]) == pytest.approx(0.25)  # shares
    assert imbalance(torch.tensor([0, 0, 9])) == pytest.approx(2 / 3)
    assert imbalance([7, 7, 7]) == 0


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [1, float("nan")]])
def test_counts_that_say_nothing(counts):
    with pytest.raises(ValueError, match="counts="):
        imbalance(counts)


@pytest.mark.parametrize(("positives", "expected"), [(0, 0.5), (5, 0.45), (50, 0.0), (95, 0.45), (100, 0.5)])
def test_one_label_has_two_classes(positives, expected):
    """Its positives and its negatives: |½ - share of positives|."""
    assert float(omega(torch.tensor([float(positives)]), 100)) == pytest.approx(expected)
    assert imbalance([positives, 100 - positives]) == pytest.approx(expected)


def test_on_the_device_as_on_the_host():
    assert float(omega(torch.tensor(HPA_COUNTS).double(), 31072)) == pytest.approx(imbalance(HPA_COUNTS), abs=1e-12)
    assert float(omega(torch.zeros(3), 10)) == 0


def rectified(loss, counts=(0, 3)):
    return Rectified(loss, torch.tensor(counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_alpha_has_the_precision_of_the_loss(dtype, alpha):
    base, crl = torch.tensor(0.7, dtype=dtype), torch.tensor(0.3, dtype=dtype)
    mixed = mix(base, rectified(crl), alpha)
    assert mixed.dtype == dtype
    assert float(mixed) == pytest.approx(0.1 * float(crl) + 0.9 * float(base), rel=2 * torch.finfo(dtype).eps)


def test_without_a_triplet_it_is_the_base_loss():
    base, crl = torch.tensor(0.7, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    mixed = mix(base, rectified(crl, (0, 0)), 0.6)
    mixed.backward()
    assert mixed == base and base.grad == 1 and crl.grad == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_base_loss_that_is_not_finite_stays(value):
    base = torch.tensor(value, requires_grad=True)
    crl = torch.tensor(0.3, requires_grad=True)
    mixed = mix(base, rectified(crl), 0.6)
    mixed.backward()
    assert torch.equal(mixed.isnan(), base.isnan()) and not mixed.isfinite()
    assert base.grad == 1 and crl.grad == 0


def test_of_the_data_set_or_of_the_labels_seen_so_far():
    y = torch.eye(3)[[0] * 6 + [1, 2]]
    told = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 1), y), batch_size=2)
    untold = torch.utils.data.DataLoader(list(zip(torch.zeros(8, 1), y, strict=True)), batch_size=2)
    labels = TrainingLabels()
    assert float(labels.add(told, torch.zeros(2, 3), y[:2])) == pytest.approx(imbalance([6, 1, 1]))
    # Of another data set, which does not tell, the batches count.
    assert float(labels.add(untold, torch.zeros(2, 3), y[:2])) == pytest.approx(imbalance([2, 0, 0]))
    assert float(labels.add(untold, torch.zeros(2, 3), y[6:])) == pytest.approx(imbalance([2, 1, 1]))
    assert float(labels.add(told, torch.zeros(2, 3), y[:2])) == pytest.approx(imbalance([6, 1, 1]))
