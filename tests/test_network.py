"""What `crl_learner` refuses before it makes a network, and what it says."""

import urllib.error

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_crl.evaluate.predictions import predict_probabilities
from fastai_crl.learner import crl_learner


def loaders(targets):
    loader = DataLoader(TensorDataset(torch.rand(len(targets), 4, 32, 32), targets), 4)
    return DataLoaders(loader, loader)


SEVERAL, ONE = loaders(torch.eye(3).repeat(4, 1)), loaders(torch.arange(12) % 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"critrion": "ranking"}, r"no keyword critrion= \(did you mean criterion=\?\)"),
        ({"lin_ftr": [], "qqq": 1}, r"no keyword lin_ftr= \(did you mean lin_ftrs=\?\), qqq=: see help"),
    ],
)
def test_the_nearest_keyword_is_named(kwargs, message):
    with pytest.raises(TypeError, match=message):
        crl_learner(SEVERAL, xresnet18, **kwargs)


def test_what_is_no_architecture():
    with pytest.raises(TypeError, match=r"arch is a Sequential that has been made: give the function"):
        crl_learner(SEVERAL, nn.Sequential(nn.Conv2d(4, 3, 3)))
    with pytest.raises(TypeError, match=r"arch=None: give a function"):
        crl_learner(SEVERAL, None)


def test_names_are_those_of_timm():
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match=r'"xresnet18" is a name of fastai.s.*without quotes'):
        crl_learner(SEVERAL, "xresnet18")
    with pytest.raises(ValueError, match=r'"resnet19t" is no name of a timm model \(did you mean "resnet1.t"\?\)'):
        crl_learner(SEVERAL, "resnet19t")
    with pytest.raises(TypeError, match="qqq"):  # timm's own
        crl_learner(SEVERAL, "resnet10t", qqq=1)


@pytest.mark.parametrize(
    ("dls", "loss", "message"),
    [
        (SEVERAL, CrossEntropyLossFlat(), r'CrossEntropyLoss is for one class per image.*several labels.*"bce"'),
        (SEVERAL, nn.CrossEntropyLoss(), "is for one class per image"),
        (ONE, BCEWithLogitsLossFlat(), r'BCEWithLogitsLoss is for several labels per image.*class index.*"ce"'),
    ],
)
def test_a_loss_of_the_other_kind_of_task(dls, loss, message):
    with pytest.raises(ValueError, match=message):
        crl_learner(dls, xresnet18, loss_func=loss, n_out=3)


def test_the_counts_of_a_named_loss_come_from_loaders_of_torch():
    learn = crl_learner(SEVERAL, xresnet18, loss_func="weighted_bce")
    torch.testing.assert_close(learn.loss_func.func.pos_weight, torch.full((3,), 2**0.5))


def test_weights_that_cannot_be_had():
    def arch(weights=None, pretrained=False):
        raise urllib.error.URLError("no route")

    with pytest.raises(OSError, match=r"needs the weights of arch.*no route.*pretrained=False"):
        crl_learner(SEVERAL, arch, n_out=3, pretrained=True)
    with pytest.raises(urllib.error.URLError, match="no route"):
        crl_learner(SEVERAL, arch, n_out=3)


def test_images_of_bytes_are_scaled(tmp_path):
    "A data set of arrays, (n, C, H, W) uint8: the network sees 0 to 1, in training and in prediction."
    x = torch.randint(0, 256, (12, 4, 32, 32), dtype=torch.uint8)
    y = torch.eye(3).repeat(4, 1)
    weights, probs = [], []
    for images in (x, x.float() / 255):
        loader = DataLoader(TensorDataset(images, y), 4)
        torch.manual_seed(0)
        learn = crl_learner(DataLoaders(loader, loader), xresnet18, path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
        probs.append(predict_probabilities(learn)[0])
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(*probs)
