"""Samplers for imbalanced data, and fastai data loaders that draw with them."""

from .class_aware import ClassAwareSampler
from .loader import ResampleCallback, SampledDL, with_sampler
from .repeat_factor import RepeatFactorSampler

__all__ = ["ClassAwareSampler", "RepeatFactorSampler", "ResampleCallback", "SampledDL", "with_sampler"]
