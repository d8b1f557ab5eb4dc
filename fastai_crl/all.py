"""All that users need: `from fastai_crl.all import *`; fastai itself is not exported, import it as usual."""
# ruff: noqa: F403  (each wing lists what it exports)

from fastai_crl import augment, compare, data, evaluate, losses, mining, predict
from fastai_crl.augment import *
from fastai_crl.callback import CRLCallback
from fastai_crl.compare import *
from fastai_crl.data import *
from fastai_crl.evaluate import *
from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_LABELS_2021, HPA_MEAN, HPA_STD
from fastai_crl.images import (
    ImageSet,
    Packed,
    Reader,
    TensorMultiChannel,
    check_folder,
    duplicate_groups,
    image_ids,
    pack,
    register_reader,
)
from fastai_crl.labels import label_counts, read_labels
from fastai_crl.learner import CRLLearner, crl_learner
from fastai_crl.losses import *
from fastai_crl.mining import *
from fastai_crl.predict import *
from fastai_crl.samplers import (
    ClassAwareSampler,
    RepeatFactorSampler,
    SampledDL,
    register_sampler,
    with_sampler,
)

# Of images and samplers only what has no name of fastai's own.
__all__ = [
    "HPA_CHANNELS",
    "HPA_COUNTS",
    "HPA_LABELS",
    "HPA_LABELS_2021",
    "HPA_MEAN",
    "HPA_STD",
    "CRLCallback",
    "CRLLearner",
    "ClassAwareSampler",
    "ImageSet",
    "Packed",
    "Reader",
    "RepeatFactorSampler",
    "SampledDL",
    "TensorMultiChannel",
    "check_folder",
    "crl_learner",
    "duplicate_groups",
    "image_ids",
    "label_counts",
    "pack",
    "read_labels",
    "register_reader",
    "register_sampler",
    "with_sampler",
]
__all__ += augment.__all__ + compare.__all__ + data.__all__ + evaluate.__all__ + losses.__all__
__all__ += mining.__all__ + predict.__all__
