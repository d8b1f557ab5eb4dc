"""The Class Rectification Loss, the measure that weighs it, and other losses for imbalanced data."""

from .baselines import MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES, make_loss
from .complete import CompleteLoss
from .criteria import Criterion
from .crl import CRL
from .crl_loss import CRLLoss
from .frequency import start_at_frequency
from .imbalance import imbalance

__all__ = [
    "CRL",
    "MULTI_LABEL_LOSSES",
    "SINGLE_LABEL_LOSSES",
    "CRLLoss",
    "CompleteLoss",
    "Criterion",
    "imbalance",
    "make_loss",
    "start_at_frequency",
]
