"""Facts of fastai and torch that the package relies on."""

import pickle

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler  # noqa: F401  (adds lr_find to Learner)
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize
from fastai.learner import Learner
from fastai.losses import (
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    MSELossFlat,
)
from fastai.metrics import accuracy_multi
from fastai.tabular.core import TabularPandas
from fastai.vision.learner import vision_learner
from fasttransform import Pipeline, Transform
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from fastai_crl._checks import check_on_device
from fastai_crl._fastai import (
    CaughtEmbedding,
    activation_of,
    add_columns,
    alone,
    as_validation,
    blended_targets,
    drop_columns,
    guard_fit,
    inner_loader,
    is_lr_search,
    keeps_workers,
    labels_beside_weights,
    loader_options,
    logits_and_targets,
    part_of,
    pipelines,
    rebuild,
    shared_bytes,
    transformed,
    transforms,
    unguard_fit,
)
from fastai_crl.losses import CRLLoss, make_loss


def test_the_loader_of_one_process_holds_the_whole_one():
    distributed = pytest.importorskip("fastai.distributed")
    whole = TfmdDL(list(range(8)), bs=2, num_workers=0, device="cpu")
    assert inner_loader(distributed.DistributedDL(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(type("Own", (distributed.DistributedDL,), {})(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(whole) is whole


class Training(Transform):
    """Adds 100, in training only, and after plain functions."""

    order, split_idx = 5, 0

    def encodes(self, x: int):
        return x + 100


def training_sets():
    """Items 0 to 7, ten times as much as targets; 0 to 3 are trained on, with `Training`."""
    splits = [[0, 1, 2, 3], [4, 5, 6, 7]]
    return Datasets(list(range(8)), [[Training(), lambda i: i + 1], [lambda i: i * 10]], splits=splits)


def test_the_pipelines_of_data_sets():
    sets = training_sets()
    dls = sets.dataloaders(bs=2, num_workers=0, device="cpu")
    for source, split in ((dls, 0), (dls.train_ds, 0), (dls.train.dataset, 0), (dls.valid_ds, 1)):
        x, y = pipelines(source)
        for pipe in (x, y):
            assert pipe.split_idx == split
            assert [transformed(i, transforms(pipe), split) for i in pipe.items] == list(pipe)
    x, _ = pipelines(sets.train)
    assert type(transforms(x)[-1]) is Training and len(transforms(x)) == 2
    assert [transformed(1, transforms(x), i) for i in (0, 1, None)] == [102, 2, 2]
    data = TensorDataset(torch.rand(2, 3), torch.rand(2))
    loader = torch.utils.data.DataLoader(data)
    assert pipelines(data) == pipelines(DataLoaders(loader, loader)) == []


def test_the_transforms_of_loaders():
    dls = training_sets().dataloaders(bs=2, num_workers=0, device="cpu", after_item=[Training()], before_batch=[])
    assert [type(f) for f in transforms(dls.train.after_item)] == [Training]
    assert transforms(dls.train.before_batch) == [] == transforms(Pipeline([]))


def test_a_training_set_as_validation():
    dls = training_sets().dataloaders(bs=4, num_workers=0, device="cpu", shuffle=False)
    dl = dls.train.new(shuffle=False)
    plain = [1, 2, 3, 4]
    with as_validation(dl):
        assert next(iter(dl))[0].tolist() == plain
    assert next(iter(dl))[0].tolist() == [x + 100 for x in plain]
    with as_validation([(1, 2)]):  # batches that have no data set
        pass


def test_workers_that_live_on():
    dl = TfmdDL(list(range(4)), bs=2, num_workers=1, persistent_workers=True, device="cpu")
    assert keeps_workers(dl) and not keeps_workers(TfmdDL([0], bs=1, num_workers=0, device="cpu"))
    assert not keeps_workers(dl.new())
    assert keeps_workers(dl.new(persistent_workers=keeps_workers(dl)))


def test_how_fastai_asks_for_a_loader_that_does_not_shuffle(tmp_path, monkeypatch):
    asked, new = [], TfmdDL.new
    monkeypatch.setattr(TfmdDL, "new", lambda self, *args, **kwargs: asked.append(kwargs) or new(self, *args, **kwargs))
    sets = Datasets([[0.5], [1.0]], [[lambda x: torch.tensor(x)]] * 2, splits=[[0], [1]])
    dls = sets.dataloaders(bs=1, num_workers=0, device="cpu")
    learn = Learner(dls, nn.Linear(1, 1), MSELossFlat(), path=tmp_path)
    asked.clear()
    with learn.no_bar(), learn.no_logging():
        learn.tta(n=1)
    assert asked[0] == {"shuffled": False, "drop_last": False}
    assert loader_options(asked[0]) == {"shuffle": False, "drop_last": False}
    assert loader_options({"shuffle": True, "bs": 2}) == {"shuffle": True, "bs": 2}


def test_bytes_that_processes_share():
    x = shared_bytes((2, 3, 4))
    assert x.shape == (2, 3, 4) and x.dtype == torch.uint8 and x.is_contiguous() and x.is_shared()
    x.numpy()[:] = 7
    assert (x == 7).all() and not torch.empty(2, 3, 4, dtype=torch.uint8).is_shared()


def test_an_assertion_on_the_device():
    true, false = torch.tensor(True), torch.tensor(False)
    torch._assert_async(true, "the rule")
    with pytest.raises(RuntimeError, match="the rule"):
        torch._assert_async(false, "the rule")

    @torch.compile(backend="eager", fullgraph=True)
    def checked(x):
        check_on_device((x > 0).all(), "the rule")
        return x + 1

    assert checked(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="the rule"):
        checked(torch.zeros(2))


# ---------------------------------------------------------------- activations

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
SIGMOID, SOFTMAX = LOGITS.sigmoid(), LOGITS.softmax(-1)


@pytest.mark.parametrize(
    ("loss", "multi", "single"),
    [
        (BCEWithLogitsLossFlat(), SIGMOID, SIGMOID),
        (CrossEntropyLossFlat(), SOFTMAX, SOFTMAX),
        (FocalLossFlat(), SOFTMAX, SOFTMAX),
        (LabelSmoothingCrossEntropy(), SOFTMAX, SOFTMAX),
        (make_loss("asl"), SIGMOID, SIGMOID),
        (make_loss("focal", single_label=True), SOFTMAX, SOFTMAX),
        (nn.BCEWithLogitsLoss(), SIGMOID, SOFTMAX),
        (nn.MultiLabelSoftMarginLoss(), SIGMOID, SOFTMAX),
        (F.binary_cross_entropy_with_logits, SIGMOID, SOFTMAX),
        (lambda outputs, targets: outputs.sum(), SIGMOID, SOFTMAX),
        (nn.MultiMarginLoss(), SIGMOID, SOFTMAX),
        (nn.CrossEntropyLoss(), SOFTMAX, SOFTMAX),
        (F.cross_entropy, SOFTMAX, SOFTMAX),
        (BaseLoss(nn.CrossEntropyLoss), SOFTMAX, SOFTMAX),
        (BaseLoss(nn.BCEWithLogitsLoss), SIGMOID, SOFTMAX),
        (CRLLoss(), SIGMOID, SOFTMAX),
        (CRLLoss(nn.CrossEntropyLoss()), SOFTMAX, SOFTMAX),
        (CRLLoss(nn.BCEWithLogitsLoss()), SIGMOID, SOFTMAX),
        (CRLLoss(LabelSmoothingCrossEntropy()), SOFTMAX, SOFTMAX),
        (nn.BCELoss(), LOGITS, LOGITS),  # its outputs are probabilities already
        (BCELossFlat(), LOGITS, LOGITS),
        (F.binary_cross_entropy, LOGITS, LOGITS),
        (MSELossFlat(), LOGITS, LOGITS),
    ],
)
def test_activation_of_losses(loss, multi, single):
    assert torch.equal(activation_of(loss, single_label=False)(LOGITS), multi)
    assert torch.equal(activation_of(loss, single_label=True)(LOGITS), single)


def test_log_probabilities_become_probabilities():
    logs = LOGITS.log_softmax(-1)
    torch.testing.assert_close(activation_of(nn.NLLLoss(), single_label=True)(logs), SOFTMAX)


# ---------------------------------------------------------------- what a fit has


def small_learner(tmp_path, cbs=None, single_label=False, **options):
    y = torch.arange(16) % 3 if single_label else (torch.rand(16, 3) < 0.4).float()
    data = torch.utils.data.TensorDataset(torch.randn(16, 4), y)
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu")
    loss = CrossEntropyLossFlat() if single_label else BCEWithLogitsLossFlat()
    return Learner(dls, nn.Linear(4, 3), loss, cbs=cbs, path=tmp_path, **options)


class Now(Callback):
    """Calls `look` at one event, after all others."""

    order = 70

    def __init__(self, event, look):
        super().__init__()
        setattr(self, event, look)


def test_the_recorder_shows_columns_that_the_learner_does_not_have(tmp_path):
    learn = small_learner(tmp_path, metrics=accuracy_multi)
    start = Callback(before_fit=lambda self: add_columns(self.learn, {"answer": lambda: 42}))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=start)
        assert learn.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "accuracy_multi", "answer", "time"]
        assert learn.recorder.values[-1][-1] == 42 and len(learn.metrics) == 1
        drop_columns(learn.recorder)
        learn.fit(1)
        assert "answer" not in learn.recorder.metric_names
    learn.remove_cbs([learn.recorder, learn.progress])
    assert add_columns(learn, {}) is None
    drop_columns(None)


def test_schedules_and_searches_run_the_fit_of_the_learner(tmp_path):
    learn, ran = small_learner(tmp_path), []

    def fit(*args, **kwargs):
        ran.append(args)

    guard_fit(learn, fit)
    learn.fit(1)
    learn.fit_one_cycle(2)
    learn.fine_tune(1)
    learn.lr_find(suggest_funcs=None, show_plot=False)
    assert len(ran) == 5
    unguard_fit(learn, print)  # not what guards it
    assert "fit" in vars(learn)
    unguard_fit(learn, fit)
    assert learn.fit.__func__ is Learner.fit


def test_a_search_for_the_learning_rate_is_known(tmp_path):
    learn, seen = small_learner(tmp_path), []
    look = Now("before_fit", lambda: seen.append(is_lr_search(learn)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=look)
        learn.add_cb(look)
        learn.lr_find(num_it=3, suggest_funcs=None, show_plot=False)
        learn.validate()
    assert seen == [False, True, False]


@pytest.mark.parametrize("single_label", [False, True])
def test_targets_that_mixup_blends(tmp_path, single_label):
    seen = []
    learn = small_learner(tmp_path, [MixUp(1.0)], single_label)
    look = Now(
        "after_loss", lambda: seen.append((blended_targets(learn), learn.yb[0], learn.loss.detach(), learn.pred))
    )
    look.run_valid = False
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=look)
    for blended, y, loss, pred in seen:
        if not single_label:
            assert blended is None and ((y > 0) & (y < 1)).any()
            continue
        other, share = blended
        each = [F.cross_entropy(pred, t, reduction="none") for t in (other, y)]
        torch.testing.assert_close(torch.Tensor(loss), torch.lerp(*each, share).mean())


class Batch:
    """What of a learner `logits_and_targets` looks at."""

    def __init__(self, pred, *yb, cbs=()):
        self.pred, self.yb, self.cbs = pred, yb, cbs


def test_logits_and_targets_of_a_batch(tmp_path):
    seen, of = [], logits_and_targets
    learn = small_learner(tmp_path, [Now("after_loss", lambda: seen.append((learn.pred, learn.yb[0], *of(learn))))])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    for pred, y, logits, targets in seen:
        assert torch.equal(logits, torch.Tensor(pred)) and torch.equal(targets, y)
        assert type(logits) is type(targets) is torch.Tensor
    assert len(seen) == 4
    one = torch.rand(4)
    assert of(Batch(one, one))[0] is one
    for pred, yb, message in [
        ((one, one), (one,), r"output is tuple: .* one tensor of logits"),
        (torch.rand(4, 3, 2), (one,), r"output is \(4, 3, 2\)"),
        (one, (one, one), "targets Tensor, Tensor: .* exactly one"),
        (one, (), "targets none"),
        (one, ([1],), "targets list"),
    ]:
        with pytest.raises(ValueError, match=message):
            of(Batch(pred, *yb))


def test_targets_of_images_that_mixup_blended(tmp_path):
    seen, mixup = [], MixUp(1.0)
    learn = small_learner(tmp_path, [mixup], single_label=True)
    look = Now("after_loss", lambda: seen.append((learn.yb[0], mixup.yb1[0], mixup.lam, logits_and_targets(learn)[1])))
    look.run_valid = False
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=look)
    assert len(seen) == 2
    for y, other, share, targets in seen:
        want = torch.eye(3)[y] * share.reshape(-1, 1) + torch.eye(3)[other] * (1 - share.reshape(-1, 1))
        torch.testing.assert_close(targets, want)


def test_the_embedding_is_caught_on_its_way():
    body, head = nn.Conv2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 3))
    model, x = nn.Sequential(body, head), torch.rand(6, 1, 4, 4)
    maps = body(x).flatten(1)
    for module, want in ((None, head[1](maps)), (head[1], head[1](maps)), (body, maps)):
        caught = CaughtEmbedding()
        hook = caught.hook(model.train(), module)
        model(x)
        assert torch.equal(caught.features, want) and caught.features.requires_grad
        assert pickle.loads(pickle.dumps(caught)).features is None
        model.eval()(x)
        assert caught.features is None  # of training batches only
        hook.remove()
        model.train()(x)
        assert caught.features is None
    assert CaughtEmbedding().hook(body, None) is None
    with pytest.raises(ValueError, match=r"Conv2d has no nn\.Linear whose input could be the embedding"):
        CaughtEmbedding().refuse(body)


def test_a_learner_is_rebuilt_as_another_class(hpa_dls, tmp_path):
    class Own(Learner):
        pass

    plain = vision_learner(hpa_dls, resnet18, weights=None, n_in=4, pretrained=False, path=tmp_path, lr=0.5, wd=0.25)
    plain.freeze()
    made = rebuild(plain, Own, [Now("after_fit", lambda: None)])
    assert type(made) is Own and made.model is plain.model and made.loss_func is plain.loss_func
    assert (made.lr, made.wd, made.path, made.arch, made.n_out) == (0.5, 0.25, tmp_path, resnet18, hpa_dls.c)
    assert [cb.name for cb in made.cbs if cb.learn is made] == [*(cb.name for cb in plain.cbs), "now"]
    assert made.opt.frozen_idx == plain.opt.frozen_idx > 0


class DistributedTrainer(Callback):
    """As fastai's: it would wrap model and loaders for several processes."""

    def before_fit(self):
        raise AssertionError("this process predicts alone")


def test_a_process_predicts_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")  # fastai would gather from a process that is not there
    data = TensorDataset(torch.rand(6, 4), torch.rand(6, 3))
    dls = DataLoaders.from_dsets(data, data, bs=2, num_workers=0, device="cpu")
    learn = Learner(dls, nn.DataParallel(nn.Linear(4, 3)), nn.MSELoss(), cbs=DistributedTrainer(), path=tmp_path)
    model = learn.model
    with learn.no_bar(), learn.no_logging(), alone(learn), alone(learn):
        assert learn.model is model.module
        assert len(learn.get_preds()[0]) == 6
    assert learn.model is model and learn.distributed_trainer and "to_detach" not in vars(learn)


def test_labels_travel_beside_weights(tmp_path):
    model = nn.Linear(2, 3)
    with labels_beside_weights(model, ["a", "b", "c"]):
        torch.save(model.state_dict(), tmp_path / "w.pth")
    assert "labels" not in model.state_dict()._metadata[""]
    with labels_beside_weights(model, None) as found:
        nn.DataParallel(model).module.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    assert found["labels"] == ["a", "b", "c"]
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "plain.pth")
    with labels_beside_weights(model, None) as found:
        model.load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=True))
    assert found.get("labels") is None


@pytest.mark.parametrize("split_idx", [0, 1])
def test_a_part_of_a_data_set_is_transformed_as_told(split_idx):
    class Tell(Transform):
        split_idx = 0

        def encodes(self, x: int):
            return -x

    dsets = Datasets(list(range(6)), [[Tell()], [lambda x: x % 2, Categorize()]], splits=[[0, 1, 2, 3], [4, 5]])
    part = part_of(dsets.train, [1, 3], split_idx)
    assert [item[0] for item in part] == ([-1, -3] if split_idx == 0 else [1, 3]) and part.vocab == dsets.vocab
    table = TabularPandas(pd.DataFrame({"a": [1.0, 2, 3], "y": ["u", "v", "u"]}), cont_names=["a"], y_names="y")
    assert part_of(table, [2, 0], split_idx).items["a"].tolist() == [3, 1]
    others = TensorDataset(torch.arange(4), torch.tensor([5, 6, 7, 8]))
    others.vocab = ["a"]
    part = part_of(others, [3], split_idx)
    assert len(part) == 1 and part[0][1] == 8 and part.vocab == ["a"]
