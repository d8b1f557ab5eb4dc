"""All that users need: `from fastai_crl.all import *`. (fastai itself is not exported: import it as usual.)"""

from .callback import CRLCallback
from .data import HPADataLoaders, MultiChannelBlock, TensorMultiChannel, check_folder, image_ids
from .hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_MEAN, HPA_STD
from .inference import write_submission
from .learner import CRLLearner, crl_learner
from .losses import CRL, CRLLoss, imbalance
from .metrics import MacroF1, MeanAP, label_report
from .mining import Mined, mine, minority_classes
from .sampled import SampledDL, with_sampler
from .samplers import ClassAwareSampler, RepeatFactorSampler
from .synth import make_hpa

__all__ = [
    "CRL",
    "HPA_CHANNELS",
    "HPA_COUNTS",
    "HPA_LABELS",
    "HPA_MEAN",
    "HPA_STD",
    "CRLCallback",
    "CRLLearner",
    "CRLLoss",
    "ClassAwareSampler",
    "HPADataLoaders",
    "MacroF1",
    "MeanAP",
    "Mined",
    "MultiChannelBlock",
    "RepeatFactorSampler",
    "SampledDL",
    "TensorMultiChannel",
    "check_folder",
    "crl_learner",
    "image_ids",
    "imbalance",
    "label_report",
    "make_hpa",
    "mine",
    "minority_classes",
    "with_sampler",
    "write_submission",
]
