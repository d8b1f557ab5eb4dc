"""All that users need: `from fastai_crl.all import *`. (fastai itself is not exported: import it as usual.)"""

from .augment import (
    ChannelIntensity,
    Cutout,
    GaussianNoise,
    RandomAffine,
    RandomCropBatch,
    RandomD4,
    microscopy_transforms,
)
from .callback import CRLCallback
from .check import FolderReport, check
from .data import HPADataLoaders, MultiChannelBlock, TensorMultiChannel, check_folder, image_ids
from .duplicates import duplicate_groups
from .hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_MEAN, HPA_STD
from .inference import write_submission
from .interpret import CRLInterpretation, EpochPreds
from .leaks import find_leaks
from .learner import CRLLearner, crl_learner
from .losses import CRL, CRLLoss, imbalance
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
from .mining import Mined, mine, minority_classes
from .pack import Packed, pack
from .rivals import MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES, make_loss
from .sampled import ResampleCallback, SampledDL, with_sampler
from .samplers import ClassAwareSampler, RepeatFactorSampler
from .show import show_predictions
from .splits import add_folds, label_counts
from .synth import make_hpa
from .thresholds import FittedThresholds, fit_thresholds, rate_thresholds, set_thresholds
from .tta import d4_tta

__all__ = [
    "CRL",
    "HPA_CHANNELS",
    "HPA_COUNTS",
    "HPA_LABELS",
    "HPA_MEAN",
    "HPA_STD",
    "MULTI_LABEL_LOSSES",
    "SINGLE_LABEL_LOSSES",
    "CRLCallback",
    "CRLInterpretation",
    "CRLLearner",
    "CRLLoss",
    "CalibrationError",
    "ChannelIntensity",
    "ClassAwareSampler",
    "ClassBalancedAccuracy",
    "Cutout",
    "EpochPreds",
    "FittedThresholds",
    "FolderReport",
    "GaussianNoise",
    "HPADataLoaders",
    "MacroF1",
    "MeanAP",
    "MeanAPByGroup",
    "MeanAUROC",
    "MicroF1",
    "Mined",
    "MultiChannelBlock",
    "Packed",
    "RandomAffine",
    "RandomCropBatch",
    "RandomD4",
    "RepeatFactorSampler",
    "ResampleCallback",
    "SampledDL",
    "TensorMultiChannel",
    "add_folds",
    "check",
    "check_folder",
    "crl_learner",
    "d4_tta",
    "duplicate_groups",
    "find_leaks",
    "fit_thresholds",
    "frequency_groups",
    "image_ids",
    "imbalance",
    "label_counts",
    "label_report",
    "make_hpa",
    "make_loss",
    "microscopy_transforms",
    "mine",
    "minority_classes",
    "pack",
    "rate_thresholds",
    "set_thresholds",
    "show_predictions",
    "with_sampler",
    "write_submission",
]
