"""What a trained learner is worth and what it decides: metrics, thresholds, interpretation, submissions."""

from .decisions import decide, set_thresholds
from .interpret import CRLInterpretation, EpochPreds
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
from .predictions import predict_probabilities, show_predictions
from .shift import shift_thresholds, training_probabilities
from .submission import write_submission
from .thresholds import FittedThresholds, fit_thresholds, rate_thresholds
from .tta import d4_tta

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
    "d4_tta",
    "decide",
    "fit_thresholds",
    "frequency_groups",
    "label_report",
    "predict_probabilities",
    "rate_thresholds",
    "set_thresholds",
    "shift_thresholds",
    "show_predictions",
    "training_probabilities",
    "write_submission",
]
