"""Ω, the imbalance of labels, and the mix that it weighs."""

import math

import numpy as np
import pytest
import torch
from fastai.callback.schedule import SchedCos, SchedExp

from fastai_crl.hpa import HPA_COUNTS
from fastai_crl.losses.imbalance import check_alpha, check_schedule, imbalance, mix, omega, ramp, scheduled


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_alpha_has_the_precision_of_the_loss(dtype, alpha):
    base, crl = torch.tensor(0.7, dtype=dtype), torch.tensor(0.3, dtype=dtype)
    mixed = mix(base, crl, torch.tensor(True), alpha)
    assert mixed.dtype == dtype
    assert float(mixed) == pytest.approx(0.1 * float(crl) + 0.9 * float(base), rel=2 * torch.finfo(dtype).eps)


def test_without_a_triplet_it_is_the_base_loss():
    base, crl = torch.tensor(0.7, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    mixed = mix(base, crl, torch.tensor(False), 0.6)
    mixed.backward()
    assert mixed == base and base.grad == 1 and crl.grad == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_base_loss_that_is_not_finite_stays(value):
    base = torch.tensor(value, requires_grad=True)
    crl = torch.tensor(0.3, requires_grad=True)
    mixed = mix(base, crl, torch.tensor(True), 0.6)
    mixed.backward()
    assert torch.equal(mixed.isnan(), base.isnan()) and not mixed.isfinite()
    assert base.grad == 1 and crl.grad == 0


def test_the_ramp_is_half_a_cosine_over_the_first_quarter():
    assert [ramp(p) for p in (0, 0.125, 0.25, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    assert ramp(0.05) == pytest.approx((1 - math.cos(math.pi * 0.2)) / 2)


def test_schedules():
    assert scheduled(None, 0.1) == ramp(0.1)
    assert scheduled(SchedCos(0, 1), 0.5) == pytest.approx(0.5)
    assert [scheduled([0, 1, 0.5], p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 0.75, 0.5])
    assert scheduled(lambda pct: 1 + 1e-9, 0.5) == 1 and scheduled(SchedExp(1e-3, 1), 1) == 1  # rounding


def test_what_a_schedule_may_be():
    for fine in (None, [0.5], (0, 1), np.linspace(0, 1, 5), SchedCos(0, 1), torch.tensor([0.0, 1.0])):
        assert check_schedule(fine) is fine
    for wrong in ([], [0, 2], [math.nan], [-0.1, 0], ["half"], "cos", [[0, 1]], 0.5, {0: 1}, [None]):
        with pytest.raises(ValueError, match=r"schedule=.*factors of . in \[0, 1\]"):
            check_schedule(wrong)


def test_what_a_weight_may_be():
    assert check_alpha("auto") == "auto" and check_alpha(0) == 0 and check_alpha(1.0) == 1.0
    for wrong in (-0.1, 1.1, math.nan, "half"):
        with pytest.raises(ValueError, match="alpha="):
            check_alpha(wrong)
