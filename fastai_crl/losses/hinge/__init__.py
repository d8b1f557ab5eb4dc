"""The hinge criteria at class level: the sum over all triplets as weights of the scores, by one of two engines."""

from .engine import Engine, HingeOptions, check_engine, hinge_sum

__all__ = ["Engine", "HingeOptions", "check_engine", "hinge_sum"]
