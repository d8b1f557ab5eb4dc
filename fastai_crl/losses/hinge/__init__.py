"""The hinge criteria at class level: the mean of all hinges of a batch as weights of its scores."""

from .weights import hinge_weights

__all__ = ["hinge_weights"]
