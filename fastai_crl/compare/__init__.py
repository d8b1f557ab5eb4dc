"""Which loss, sampler or network is best for some data: a paired comparison of learners, with honest intervals."""

from .answer import Comparison
from .compare import compare_learners
from .losses import compare_losses

__all__ = ["Comparison", "compare_learners", "compare_losses"]
