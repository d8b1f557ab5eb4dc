"""Samplers for imbalanced data, and fastai data loaders that draw with them."""

from .base import SAMPLERS, EpochSampler, Sampler, SamplerFactory, check_sampler, register_sampler, takes
from .class_aware import ClassAwareSampler
from .loader import SampledDL, with_sampler
from .repeat_factor import RepeatFactorSampler

__all__ = [
    "SAMPLERS",
    "ClassAwareSampler",
    "EpochSampler",
    "RepeatFactorSampler",
    "SampledDL",
    "Sampler",
    "SamplerFactory",
    "check_sampler",
    "register_sampler",
    "takes",
    "with_sampler",
]
