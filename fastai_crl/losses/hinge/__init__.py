"""The hinge criteria at class level: the mean of all hinges of a batch as weights of its scores."""

from .sides import HingeOptions
from .weights import HingeWeights, hinge_weights

__all__ = ["HingeOptions", "HingeWeights", "hinge_weights"]
