"""All that users need: `from fastai_crl.all import *`; fastai itself is not exported, import it as usual."""

from fastai_crl.augment.presets import (
    ChannelIntensity,
    Cutout,
    GaussianNoise,
    RandomAffine,
    RandomCropBatch,
    RandomD4,
    microscopy_transforms,
)
from fastai_crl.callback import CRLCallback
from fastai_crl.data.annotations import Annotations
from fastai_crl.data.leaks import find_leaks
from fastai_crl.data.loaders import HPADataLoaders, MultiChannelBlock, MultiChannelDataLoaders
from fastai_crl.data.report import FolderReport, check
from fastai_crl.data.splits import ColumnSplit, FoldSplit, GroupSplit, RandomSplit, StratifiedSplit
from fastai_crl.data.stratify import add_folds
from fastai_crl.evaluate.decisions import decide, set_thresholds
from fastai_crl.evaluate.interpret import CRLInterpretation, EpochPreds
from fastai_crl.evaluate.metrics import (
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
from fastai_crl.evaluate.predictions import predict_probabilities, show_predictions
from fastai_crl.evaluate.shift import shift_thresholds, training_probabilities
from fastai_crl.evaluate.submission import write_submission
from fastai_crl.evaluate.thresholds import FittedThresholds, fit_thresholds, rate_thresholds
from fastai_crl.evaluate.tta import d4_tta
from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_MEAN, HPA_STD
from fastai_crl.images.cache import Packed, pack
from fastai_crl.images.duplicates import duplicate_groups
from fastai_crl.images.image_set import ImageSet, check_folder, image_ids
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.labels import label_counts, read_labels
from fastai_crl.learner import CRLLearner, crl_learner
from fastai_crl.losses.baselines import MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES, make_loss, register_loss
from fastai_crl.losses.crl import CRL
from fastai_crl.losses.crl_loss import CRLLoss
from fastai_crl.losses.imbalance import imbalance
from fastai_crl.mining.mine import Mined, mine, minority_classes
from fastai_crl.samplers import (
    ClassAwareSampler,
    RepeatFactorSampler,
    ResampleCallback,
    SampledDL,
    register_sampler,
    with_sampler,
)
from fastai_crl.synthetic.make_hpa import make_hpa

__all__ = [
    "CRL",
    "HPA_CHANNELS",
    "HPA_COUNTS",
    "HPA_LABELS",
    "HPA_MEAN",
    "HPA_STD",
    "MULTI_LABEL_LOSSES",
    "SINGLE_LABEL_LOSSES",
    "Annotations",
    "CRLCallback",
    "CRLInterpretation",
    "CRLLearner",
    "CRLLoss",
    "CalibrationError",
    "ChannelIntensity",
    "ClassAwareSampler",
    "ClassBalancedAccuracy",
    "ColumnSplit",
    "Cutout",
    "EpochPreds",
    "FittedThresholds",
    "FoldSplit",
    "FolderReport",
    "GaussianNoise",
    "GroupSplit",
    "HPADataLoaders",
    "ImageSet",
    "MacroF1",
    "MeanAP",
    "MeanAPByGroup",
    "MeanAUROC",
    "MicroF1",
    "Mined",
    "MultiChannelBlock",
    "MultiChannelDataLoaders",
    "Packed",
    "RandomAffine",
    "RandomCropBatch",
    "RandomD4",
    "RandomSplit",
    "RepeatFactorSampler",
    "ResampleCallback",
    "SampledDL",
    "StratifiedSplit",
    "TensorMultiChannel",
    "add_folds",
    "check",
    "check_folder",
    "crl_learner",
    "d4_tta",
    "decide",
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
    "predict_probabilities",
    "rate_thresholds",
    "read_labels",
    "register_loss",
    "register_sampler",
    "set_thresholds",
    "shift_thresholds",
    "show_predictions",
    "training_probabilities",
    "with_sampler",
    "write_submission",
]
