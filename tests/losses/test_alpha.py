"""The weight of the rectification over training."""

import math

import pytest
from fastai.callback.schedule import SchedCos

from fastai_crl.losses.alpha import check_alpha, ramp, scheduled


def test_the_ramp_is_half_a_cosine_over_the_first_quarter():
    assert [ramp(p) for p in (0, 0.125, 0.25, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    assert ramp(0.05) == pytest.approx((1 - math.cos(math.pi * 0.2)) / 2)


def test_schedules():
    assert scheduled(None, 0.1) == ramp(0.1)
    assert scheduled(SchedCos(0, 1), 0.5) == pytest.approx(0.5)
    assert [scheduled([0, 1, 0.5], p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 0.75, 0.5])


def test_what_a_weight_may_be():
    assert check_alpha("auto") == "auto" and check_alpha(0) == 0 and check_alpha(1.0) == 1.0
    for wrong in (-0.1, 1.1, math.nan, "half"):
        with pytest.raises(ValueError, match="alpha="):
            check_alpha(wrong)
