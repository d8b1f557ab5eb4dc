"""A network that starts at the frequencies of its labels."""

import pytest
import torch
from fastai.vision.learner import create_head, vision_learner
from torch import nn
from torchvision.models import resnet18

from fastai_crl.labels import label_counts
from fastai_crl.losses import make_loss, start_at_frequency


def network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=bias))


def network_of(dls) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(dls.c))
    model(dls.one_batch()[0])
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_it_predicts_each_label_as_often_as_it_occurs(bias):
    model = network(bias)
    kept = model[-1].bias
    layer = start_at_frequency(model, counts=[50, 0, 100], n=100)
    assert layer is model[-1] and isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad
    assert not bias or layer.bias is kept  # an optimizer that has it goes on with it
    nn.init.zeros_(layer.weight)
    expected = torch.tensor([0.5, 0.01, 0.99])  # as if there, and missing, once
    torch.testing.assert_close(model(torch.randn(2, 5)).sigmoid(), expected.expand(2, 3))


def test_with_weights_it_starts_where_the_weighted_loss_is_least():
    y = torch.zeros(100, 3)
    for c, count in enumerate((50, 2, 90)):
        y[:count, c] = 1
    loss = make_loss("weighted_bce", counts=y.sum(0), n=100)
    start = start_at_frequency(network(), y.sum(0), 100, pos_weight=loss.func.pos_weight).bias
    (slope,) = torch.autograd.grad(loss(start.expand(100, 3), y), start)
    torch.testing.assert_close(slope, torch.zeros(3), atol=1e-7, rtol=0)


def test_the_head_of_fastai_gets_the_bias_that_it_lacks():
    head = create_head(4, 3)
    assert head[-1].bias is None
    start_at_frequency(head, counts=[50, 20, 10], n=100)
    assert head[-1].bias.sigmoid().tolist() == pytest.approx([0.5, 0.2, 0.1])
    assert any(p is head[-1].bias for p in head.parameters())


def test_it_trains_as_the_logit_adjusted_loss_does():
    torch.manual_seed(0)
    counts, x, y = [40, 8, 2], torch.randn(60, 5), (torch.rand(60, 3) < 0.3).float()
    started, adjusted = network(), network()
    nn.init.zeros_(adjusted[-1].bias)
    adjusted.load_state_dict({**started.state_dict(), "2.bias": torch.zeros(3)})
    start_at_frequency(started, counts, n=60)
    losses = nn.BCEWithLogitsLoss(), make_loss("logit_adjusted", counts=counts, n=60)
    for model, loss in zip((started, adjusted), losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(20):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(started(x), adjusted(x) + losses[1].shift, rtol=1e-4, atol=1e-5)


def test_counts_of_data(hpa_dls):
    layer = start_at_frequency(network_of(hpa_dls), dls=hpa_dls)
    counts, n = label_counts(hpa_dls.train), len(hpa_dls.train_ds)
    torch.testing.assert_close(layer.bias.detach().cpu(), (counts.clamp(1, n - 1) / n).logit())


def test_a_frozen_learner_trains_its_new_bias(hpa_dls, tmp_path):
    learn = vision_learner(hpa_dls, resnet18, n_in=4, pretrained=False, path=tmp_path)
    learn.freeze()  # makes the optimizer, as pretrained=True does
    frozen = learn.opt.frozen_idx
    bias = start_at_frequency(learn).bias
    torch.testing.assert_close(bias.detach(), start_at_frequency(network_of(hpa_dls), dls=hpa_dls).bias.detach())
    before, stem = bias.detach().clone(), next(learn.model.parameters()).detach().clone()
    assert learn.opt.frozen_idx == frozen > 0
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert not torch.equal(bias, before) and torch.equal(next(learn.model.parameters()), stem)
    assert start_at_frequency(learn, counts=[1] * hpa_dls.c, n=2).bias is bias


def test_one_class_per_image_has_another_way(single_label_dls):
    with pytest.raises(ValueError, match="is for several labels"):
        start_at_frequency(network(), dls=single_label_dls)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.Sequential(network(), nn.BatchNorm1d(3)),
            {"counts": [1, 2, 3], "n": 9},
            "is BatchNorm1d.*nn.Linear with 3",
        ),
        (network(), {"counts": [1, 2], "n": 9}, "out_features=3.*nn.Linear with 2 outputs"),
        (nn.ReLU(), {"counts": [1, 2], "n": 9}, "of ReLU is none"),
        (network(), {"counts": [1, 2, 3]}, "start_at_frequency needs .* n=, the number"),
        (network(), {}, "start_at_frequency needs to know how common"),
        (network(), {"counts": [1, 2, 30], "n": 9}, "from 0 to n"),
        (network(), {"counts": [1, 2, 3], "n": 9, "pos_weight": torch.ones(2)}, r"pos_weight=\[1.0, 1.0\].*3 labels"),
        (network(), {"counts": [1, 2, 3], "n": 9, "pos_weight": [1, 0, 2]}, "number above 0 for each"),
    ],
)
def test_what_cannot_start(model, options, message):
    with pytest.raises(ValueError, match=message):
        start_at_frequency(model, **options)
