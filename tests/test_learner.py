"""`crl_learner`: the literal line, the stem, and what it infers."""

import copy

import numpy as np
import pytest
import torch
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import resnet18

from fastai_crl.callback import CRLCallback
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.evaluate.decider import threshold_in_use
from fastai_crl.evaluate.decisions import decide
from fastai_crl.evaluate.predictions import predict_probabilities
from fastai_crl.labels import label_counts, shown_names
from fastai_crl.learner import CRLLearner, _in_mixed_precision, crl_learner
from fastai_crl.losses.crl_loss import CRLLoss
from fastai_crl.stem import stem_of


@pytest.mark.slow
def test_the_literal_line(hpa_dls):
    learn = crl_learner(hpa_dls)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.default_epochs = 1
    learn.fit_one_cycle()
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))
    assert len(learn.recorder.values) == 1


def test_fit_one_cycle_without_argument(hpa_dls, tmp_path):
    learn = crl_learner(hpa_dls, xresnet18, n_epoch=2, alpha=0.4, path=tmp_path)
    learn.fit_one_cycle()
    assert len(learn.recorder.values) == 2 and max(learn.crl.alphas) == pytest.approx(0.4)
    learn.fit_one_cycle(1, 1e-3)
    assert len(learn.recorder.values) == 1
    assert learn.recorder.metric_names[3:5] == ["macro_f1", "mean_ap"]
    learn.export("x.pkl")
    again = load_learner(tmp_path / "x.pkl")
    assert isinstance(again, CRLLearner) and again.default_epochs == 2
    item = hpa_dls.valid_ds.items.iloc[0]
    torch.testing.assert_close(again.predict(item)[2], learn.predict(item)[2])


def test_multi_label_defaults(hpa_dls):
    learn = crl_learner(hpa_dls, resnet18, k=7, level="instance", criterion="relative", schedule=[1.0])
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat)
    assert learn.crl.term.k == 7 and learn.crl.term.level == "instance" and learn.crl.schedule == [1.0]
    assert stem_of(learn.model).in_channels == 4
    assert all(p.requires_grad for p in learn.model.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("ranking", "label", 1.0)),
        ({"average": "triplet", "rho": 0.3}, ("ranking", "triplet", 0.3)),
        ({"criterion": "relative"}, ("relative", "triplet", 0.5)),
        ({"criterion": "ranking"}, ("ranking", "label", 1.0)),
    ],
)
def test_default_criterion(hpa_dls, options, expected):
    term = crl_learner(hpa_dls, xresnet18, **options).crl.term
    assert (term.criterion.name, term.average, term.rho) == expected


def test_what_ranking_does_not_serve_needs_a_criterion(hpa_dls):
    with pytest.raises(ValueError, match=r"'ranking' .*Give another criterion"):
        crl_learner(hpa_dls, xresnet18, level="instance")


def shifts_of(term):
    """What the term is given to add to the logits, a list that grows with each batch."""
    seen, rectify = [], term.rectify
    term.rectify = lambda batch, shift: (seen.append(shift), rectify(batch, shift))[1]
    return seen


def test_single_label_defaults(single_label_dls):
    learn = crl_learner(single_label_dls, xresnet18)
    share = label_counts(single_label_dls).clamp(1) / len(single_label_dls.train_ds)
    torch.testing.assert_close(learn.loss_func.shift.cpu(), share.log())
    seen = shifts_of(learn.crl.term)
    learn.fit_one_cycle(1)
    torch.testing.assert_close(seen[0].cpu(), share.log())  # CRL sees what its base sees
    assert learn.recorder.metric_names[3:6] == ["accuracy", "balanced_accuracy", "macro_f1"]


def test_classes_that_cannot_be_counted(tmp_path):
    class Opened(torch.utils.data.Dataset):
        """Labels that only reading an item tells."""

        def __len__(self):
            return 8

        def __getitem__(self, i):
            return torch.rand(4, 32, 32), torch.tensor(i % 3)

    loaders = [torch.utils.data.DataLoader(Opened(), 4) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"cannot be counted.*A Opened does not tell its labels.*=make_loss\("):
        learn = crl_learner(DataLoaders(*loaders), xresnet18, n_out=3, path=tmp_path)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


def test_three_channels(hpa):
    dls = HPADataLoaders.from_csv(
        hpa, size=32, bs=16, num_workers=0, channels=("red", "green", "blue"), stats="imagenet"
    )
    assert stem_of(crl_learner(dls, xresnet18).model).in_channels == 3


def test_a_crl_loss_is_refused(hpa_dls):
    with pytest.raises(ValueError, match=r"loss_func is a CRLLoss.*give its base loss"):
        crl_learner(hpa_dls, xresnet18, loss_func=CRLLoss(k=9))


class Pretrained:
    """resnet18 whose weights count as pretrained, without a download."""

    def __call__(self, weights=None):
        torch.manual_seed(3)
        return resnet18()


def test_pretrained_stem_sees_every_channel(hpa_dls, monkeypatch):
    from fastai.vision.learner import model_meta

    arch = Pretrained()
    monkeypatch.setitem(model_meta, arch, model_meta[resnet18])
    rgb = arch().conv1.weight.detach()
    learn = crl_learner(hpa_dls, arch, pretrained=True)
    stem = stem_of(learn.model)
    torch.testing.assert_close(stem.weight[:, :3], rgb * 3 / 4)
    torch.testing.assert_close(stem.weight[:, 3], rgb.mean(1) * 3 / 4)
    flat = torch.ones(1, 4, 32, 32)  # the same grey in all channels gives what it gave in three
    torch.testing.assert_close(stem(flat), nn.functional.conv2d(flat[:, :3], rgb, stride=2, padding=3))
    frozen = [p.requires_grad for p in learn.model[0][1:].parameters() if p.ndim > 1]
    assert stem.weight.requires_grad and not any(frozen)
    before = stem.weight.detach().clone()
    learn.fit_one_cycle(1)
    assert all((stem.weight[:, c] != before[:, c]).any() for c in range(4))
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    n_params = sum(p.numel() for p in learn.model.parameters())
    assert sum(p.numel() for group in learn.opt.param_lists for p in group) == n_params


def test_crl_has_no_weight_in_a_pretrained_network_unless_asked(hpa_dls, monkeypatch, capsys):
    from fastai.vision.learner import model_meta

    arch = Pretrained()
    monkeypatch.setitem(model_meta, arch, model_meta[resnet18])
    learn = crl_learner(hpa_dls, arch, pretrained=True)
    assert learn.crl.alpha == 0 and "CRL's weight at 0" in capsys.readouterr().out
    learn.fit_one_cycle(1)
    assert set(learn.crl.alphas) == {0.0} and learn.crl.counts_frame().empty
    for options in ({"alpha": "auto", "criterion": "relative"}, {"alpha": 0.1}):
        assert crl_learner(hpa_dls, arch, pretrained=True, **options).crl.alpha == options["alpha"]
    mine = CRLCallback(criterion="ranking")
    assert crl_learner(hpa_dls, arch, pretrained=True, cbs=mine).crl.alpha == "auto"
    assert crl_learner(hpa_dls, resnet18).crl.alpha == "auto" and "weight at 0" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"k, schedule: a pretrained network trains without CRL.*alpha=\"auto\""):
        crl_learner(hpa_dls, arch, pretrained=True, k=3, schedule=[1.0])


def test_timm_model(hpa_dls):
    pytest.importorskip("timm", reason="timm is not installed")
    learn = crl_learner(hpa_dls, "resnet10t", level="instance", criterion="relative", scope="attribute", schedule=[1.0])
    learn.fit_one_cycle(1)
    assert learn.crl.counts_frame().to_numpy().sum() > 0


def test_user_callbacks_and_metrics(hpa_dls):
    from fastai.callback.training import GradientClip

    learn = crl_learner(hpa_dls, xresnet18, cbs=GradientClip(), metrics=[])
    assert {type(cb) for cb in learn.cbs} >= {GradientClip, CRLCallback} and not learn.metrics


def test_show_results_has_probabilities(hpa_dls):
    learn = crl_learner(hpa_dls, xresnet18)
    learn.thresholds = 0.0  # all labels are predicted
    axes = learn.show_results(max_n=2, shuffle=False)
    probs, targets = learn.get_preds()
    text = [t.get_text() for t in axes[0].texts]
    best = int((probs[0] * (targets[0] == 1)).argmax())
    name = shown_names(hpa_dls, len(probs[0]))[best]
    line = next(t for t in text if f" {name} ." in t)
    assert f"{probs[0, best]:.2f}".removeprefix("0") in line and line.startswith("✓")


def test_show_results_interpretation_and_tta(hpa_dls):
    from fastai.interpret import Interpretation

    learn = crl_learner(hpa_dls, xresnet18)
    learn.fit_one_cycle(1)
    learn.show_results(max_n=2)
    Interpretation.from_learner(learn).plot_top_losses(2)
    probabilities, targets = learn.tta(n=1)
    assert probabilities.shape == targets.shape == (len(hpa_dls.valid_ds), len(hpa_dls.vocab))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_mixed_precision_needs_a_gpu(hpa_dls):
    with pytest.raises(ValueError, match="mixed_precision=True needs a CUDA device"):
        crl_learner(hpa_dls, resnet18, mixed_precision=True)
    assert not hasattr(crl_learner(hpa_dls, resnet18), "mixed_precision")


@pytest.mark.parametrize("in_hardware", [True, False])
def test_bfloat16_where_the_gpu_has_it(hpa_dls, monkeypatch, in_hardware):
    def supported(including_emulation=True):
        return including_emulation or in_hardware

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    learn = _in_mixed_precision(crl_learner(hpa_dls, resnet18))
    assert learn.mixed_precision.amp_mode == (AMPMode.BF16 if in_hardware else AMPMode.FP16)


@pytest.mark.gpu
def test_mixed_precision(hpa_dls):
    learn = crl_learner(hpa_dls, resnet18)
    assert learn.mixed_precision and not hasattr(
        crl_learner(hpa_dls, resnet18, mixed_precision=False), "mixed_precision"
    )
    learn.fit_one_cycle(1)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_data_that_are_no_images():
    from fastai.data.core import DataLoaders

    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.zeros(8, 2))
    dls = DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device="cpu")
    with pytest.raises(ValueError, match=r"\(4, 3\), \(4, 2\).*Learner\(dls, model, cbs=CRLCallback"):
        crl_learner(dls)


def test_thresholds(hpa_dls, tmp_path):
    learn = crl_learner(hpa_dls, xresnet18, path=tmp_path)
    assert learn.thresholds is None
    thresholds, report = learn.fit_thresholds(how="rate", folds=3)
    assert learn.thresholds.tolist() == thresholds.tolist() and report.index.tolist() == list(hpa_dls.vocab)
    probs, targets = learn.get_preds()
    assert report.positives.tolist() == targets.sum(0).tolist()
    assert (
        learn.predict(hpa_dls.valid_ds.items.iloc[0])[1].tolist() == (probs[0].double().numpy() > thresholds).tolist()
    )
    learn.thresholds = thresholds / 2
    learn.export("x.pkl")
    assert load_learner(tmp_path / "x.pkl").thresholds.tolist() == (thresholds / 2).tolist()


def test_loss_by_name(hpa_dls, single_label_dls):
    learn = crl_learner(hpa_dls, xresnet18, loss_func="weighted_bce")
    assert learn.loss_func.func.pos_weight.shape == (hpa_dls.c,)
    assert crl_learner(single_label_dls, xresnet18, loss_func="focal").loss_func.func.gamma == 2
    with pytest.raises(ValueError, match="'bce' is a loss of the other kind of task: use one of 'ce'"):
        crl_learner(single_label_dls, xresnet18, loss_func="bce")


def test_a_callback_of_the_user_takes_the_place_of_ours(hpa_dls, tmp_path):
    own = CRLCallback(alpha=0.5, schedule=[1.0])
    learn = crl_learner(hpa_dls, xresnet18, cbs=own, path=tmp_path)
    assert learn.crl is own and [cb for cb in learn.cbs if isinstance(cb, CRLCallback)] == [own]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert len(own.history) == 1 and learn.recorder.metric_names.count("crl_alpha") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alpha": 0.3}, "alpha"),
        ({"schedule": [1.0]}, "schedule"),
        ({"k": 3, "criterion": "relative"}, "k, criterion"),
    ],
)
def test_options_beside_a_callback_of_the_user(hpa_dls, options, named):
    with pytest.raises(ValueError, match=f"cbs has a CRLCallback.*give {named} to it"):
        crl_learner(hpa_dls, xresnet18, cbs=CRLCallback(), **options)
    with pytest.raises(ValueError, match="has a CRLCallback already"):
        crl_learner(hpa_dls, xresnet18, cbs=[CRLCallback(), CRLCallback()])
    with pytest.raises(ValueError, match=f"cbs has a CRLCallback.*give {named} to it"):
        crl_learner(hpa_dls, xresnet18, cbs=CRLCallback, **options)


def flat(n_out):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out))
    nn.init.zeros_(model[-1].weight)
    model[-1].bias.data = torch.linspace(-1, 2, n_out)
    return model


class TimmLike(nn.Module):
    """A loss with no reduction and no activation."""

    def forward(self, logits, targets):
        return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss(), TimmLike(), CRLLoss(TimmLike())]
)
def test_losses_of_torch_give_probabilities(hpa_dls, loss, tmp_path):
    model = flat(hpa_dls.c)
    learn = CRLLearner(hpa_dls, model, loss_func=loss, path=tmp_path)
    expected = model[-1].bias.detach().sigmoid()
    with learn.no_bar():
        probs, targets, losses = learn.get_preds(with_loss=True)
        _, decided, one = learn.predict(hpa_dls.valid_ds.items.iloc[0])
    torch.testing.assert_close(probs[0], expected)
    torch.testing.assert_close(one, expected)
    assert decided.tolist() == (expected > 0.5).tolist() and len(losses) == len(targets)
    learn.export("x.pkl")
    torch.testing.assert_close(load_learner(tmp_path / "x.pkl").predict(hpa_dls.valid_ds.items.iloc[0])[2], expected)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MultiMarginLoss(), CRLLoss(nn.MultiMarginLoss())])
def test_losses_of_torch_give_probabilities_of_classes(single_label_dls, loss, tmp_path):
    model = flat(single_label_dls.c)
    learn = CRLLearner(single_label_dls, model, loss_func=loss, path=tmp_path)
    expected = model[-1].bias.detach().softmax(0)
    with learn.no_bar():
        probs, _, losses = learn.get_preds(with_loss=True)
        _, decided, one = learn.predict(single_label_dls.valid_ds.items[0])
    torch.testing.assert_close(probs[0], expected)
    torch.testing.assert_close(one, expected)
    assert int(decided) == single_label_dls.c - 1 and len(losses) == len(probs)


def test_a_loss_of_torch_in_crl_learner(hpa_dls, single_label_dls):
    learn = crl_learner(hpa_dls, xresnet18, loss_func=nn.MultiLabelSoftMarginLoss())
    assert learn.loss_func.activation(torch.zeros(2)).tolist() == [0.5, 0.5]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    own = BCEWithLogitsLossFlat()
    assert crl_learner(hpa_dls, xresnet18, loss_func=own).loss_func is own


class Cells(torch.utils.data.Dataset):
    def __init__(self, as_dict=False):
        self.as_dict = as_dict

    def __len__(self):
        return 16

    def __getitem__(self, i):
        x, y = torch.rand(4, 16, 16), (torch.arange(3) == i % 3).float()
        return {"image": x, "target": y} if self.as_dict else (x, y)


def torch_loaders(**options):
    from fastai.data.core import DataLoaders

    loader = torch.utils.data.DataLoader(Cells(**options), batch_size=8)
    return DataLoaders(loader, loader)


@pytest.mark.parametrize("with_c", [False, True])
def test_loaders_of_torch(with_c, tmp_path):
    dls = torch_loaders()
    if with_c:
        dls.c = 3
    learn = crl_learner(dls, xresnet18, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
    assert learn.recorder.values[-1][-2] > 0  # triplets
    assert learn.model(torch.rand(2, 4, 16, 16)).shape == (2, 3)


def test_batches_of_dicts():
    with pytest.raises(ValueError, match=r"a dict of image, target.*Let the data set give \(image, target\)"):
        crl_learner(torch_loaders(as_dict=True))


def test_shift_goes_to_the_term(single_label_dls, hpa_dls):
    for dls, options in (
        (single_label_dls, {}),
        (hpa_dls, {}),
        (hpa_dls, {"shift": "base"}),
        (hpa_dls, {"shift": None}),
    ):
        learn = crl_learner(dls, xresnet18, loss_func="logit_adjusted", schedule=[1.0], **options)
        seen = shifts_of(learn.crl.term)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        assert seen
        if options.get("shift", "base"):
            assert torch.equal(seen[0], learn.loss_func.shift)
        else:
            assert seen[0] is None and learn.crl.term.shift is None


# ---- where a multi-label network starts ----
def test_a_multi_label_network_starts_at_the_frequencies(hpa_dls):
    learn = crl_learner(hpa_dls, xresnet18)
    counts, n = label_counts(hpa_dls.train), len(hpa_dls.train_ds)
    bias = learn.model[-1][-1].bias
    assert bias.sigmoid().tolist() == pytest.approx((counts.clamp(1, n - 1) / n).tolist(), rel=1e-4)
    started = bias.detach().clone()
    learn.fit_one_cycle(1, 1e-3)
    assert not torch.equal(learn.model[-1][-1].bias, started)  # it is trained
    assert crl_learner(hpa_dls, xresnet18, loss_func="bce").model[-1][-1].bias is None


def test_a_network_that_cannot_start_there_says_so(hpa_dls):
    with pytest.warns(UserWarning, match="is BatchNorm1d.*It starts as it is"):
        crl_learner(hpa_dls, xresnet18, bn_final=True)


# ---------------------------------------------------------------- what is exchanged after the learner was made


@pytest.fixture
def fitted(hpa_dls, tmp_path):
    """A learner with a threshold per label."""
    learn = CRLLearner(hpa_dls, flat(hpa_dls.c), loss_func=BCEWithLogitsLossFlat(), path=tmp_path)
    learn.thresholds = torch.linspace(0.1, 0.9, hpa_dls.c)
    return learn


@pytest.mark.parametrize(
    "loss",
    [nn.BCEWithLogitsLoss(), nn.functional.binary_cross_entropy_with_logits, BCEWithLogitsLossFlat()],
    ids=["torch", "function", "fastai"],
)
def test_another_loss_is_completed_and_keeps_the_thresholds(fitted, loss):
    before = fitted.thresholds
    fitted.loss_func = loss
    with fitted.no_bar(), fitted.no_logging():
        probs, _, decided = fitted.get_preds(with_decoded=True)
    assert 0 <= probs.min() <= probs.max() <= 1 and fitted.thresholds.tolist() == before.tolist()
    assert torch.equal(decided, probs > torch.from_numpy(before))
    fitted.thresholds = 0.5
    fitted.loss_func = BCEWithLogitsLossFlat()
    assert fitted.thresholds is None


def test_a_loss_that_loses_the_thresholds_says_so(fitted):
    class Decided(nn.BCEWithLogitsLoss):
        def activation(self, x):
            return x.sigmoid()

    before = fitted.loss_func
    with pytest.warns(UserWarning, match=r"thresholds go with its loss.*own thresh=0\.3"):
        fitted.loss_func = BCEWithLogitsLossFlat(thresh=0.3)
    fitted.loss_func = before
    with pytest.warns(UserWarning, match=r"thresholds go with its loss. Decided takes no thresholds"):
        fitted.loss_func = Decided()
    assert fitted.thresholds is None


def test_mixup_stands_in_for_the_loss_within_a_fit(single_label_dls, tmp_path):
    learn = CRLLearner(single_label_dls, flat(2), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.thresholds = [0.2, 0.3]
    loss = learn.loss_func
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=MixUp())
    assert learn.loss_func is loss and learn.thresholds.tolist() == [0.2, 0.3]


def renamed(dls):
    """The same data under other labels, as many."""
    new = copy.copy(dls)
    new.vocab = [f"new {v}" for v in dls.vocab]
    return new


def test_data_of_other_labels(fitted):
    old, new = fitted.dls, renamed(fitted.dls)
    with pytest.warns(UserWarning, match=r"made for other labels .*: 0, 1.*new loaders have new 0, new 1"):
        fitted.dls = new
    with pytest.raises(ValueError, match=r"thresholds are for other labels .*: 0, 1.*have new 0, .*Fit or set"):
        threshold_in_use(fitted)
    fitted.thresholds = dict.fromkeys(new.vocab, 0.25)
    assert set(threshold_in_use(fitted)) == {0.25}
    with pytest.warns(UserWarning, match="made for other labels"):
        fitted.dls = old


def test_weights_remember_their_labels(fitted, tmp_path, recwarn):
    fitted.save("a")
    fitted.load("a")
    Learner(fitted.dls, flat(fitted.dls.c), loss_func=BCEWithLogitsLossFlat(), path=tmp_path).load("a")
    assert not [w for w in recwarn if "labels" in str(w.message)]
    other = CRLLearner(renamed(fitted.dls), flat(fitted.dls.c), loss_func=BCEWithLogitsLossFlat(), path=tmp_path)
    with pytest.warns(UserWarning, match=r"made for other labels .*: 0, 1.*loaders have new 0, new 1"):
        other.load("a")


def test_an_export_that_fails_leaves_the_learner_as_it_was(fitted, tmp_path):
    with fitted.no_bar(), fitted.no_logging():
        fitted.fit(1)
        dls, opt = fitted.dls, fitted.opt
        with pytest.raises(RuntimeError, match="does not exist"):
            fitted.export(tmp_path / "no" / "x.pkl")
        assert fitted.dls is dls and fitted.opt is opt
        before = [p.detach().clone() for p in fitted.model.parameters()]
        fitted.fit(1)
    assert any(not torch.equal(a, b) for a, b in zip(before, fitted.model.parameters(), strict=True))


def test_thresholds_of_one_label_per_image_are_a_shift_by_default(single_label_dls):
    learn = crl_learner(single_label_dls, xresnet18)
    with learn.no_bar():
        found, asked = learn.fit_thresholds(folds=2), learn.fit_thresholds(how="shift", folds=2)
    assert found.shift == asked.shift is not None and np.array_equal(found.thresholds, learn.thresholds)


def test_single_label_metrics_follow_the_thresholds(single_label_dls):
    learn = crl_learner(single_label_dls, xresnet18)
    with learn.no_bar(), learn.no_logging():
        probs, targets = predict_probabilities(learn)
        for thresholds in (None, [1e-6, 1], [1, 1e-6]):
            if thresholds:
                learn.thresholds = thresholds
            chosen = decide(probs, thresholds or 0.5, single_label=True).argmax(1)
            assert learn.validate()[1] == pytest.approx(np.mean(chosen == targets.numpy()))
            assert learn.get_preds(with_decoded=True)[2].tolist() == chosen.tolist()
