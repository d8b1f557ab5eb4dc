"""What a trained learner is worth and what it decides: predictions, metrics, thresholds, interpretation."""

from .decider import set_thresholds
from .decisions import decide
from .interpret import CRLInterpretation
from .metrics import (
    CalibrationError,
    ClassBalancedAccuracy,
    MacroF1,
    MeanAP,
    MeanAPByGroup,
    MeanAUROC,
    MicroF1,
    frequency_groups,
    label_report,
)
from .predictions import EpochPreds, predict_probabilities
from .recall import RecallAtLeast
from .shift import shift_thresholds, training_probabilities
from .thresholds import FittedThresholds, fit_thresholds

__all__ = [
    "CRLInterpretation",
    "CalibrationError",
    "ClassBalancedAccuracy",
    "EpochPreds",
    "FittedThresholds",
    "MacroF1",
    "MeanAP",
    "MeanAPByGroup",
    "MeanAUROC",
    "MicroF1",
    "RecallAtLeast",
    "decide",
    "fit_thresholds",
    "frequency_groups",
    "label_report",
    "predict_probabilities",
    "set_thresholds",
    "shift_thresholds",
    "training_probabilities",
]
