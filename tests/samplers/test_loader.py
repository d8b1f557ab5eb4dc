"""fastai loaders that draw with a sampler, alone and in several processes."""

import pickle

import numpy as np
import pytest
import torch
from fastai.callback import schedule  # noqa: F401  (adds fit_one_cycle)
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, TransformBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.distributed import DistributedDL
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn

from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.labels import read_labels
from fastai_crl.samplers import (
    SAMPLERS,
    ClassAwareSampler,
    RepeatFactorSampler,
    SampledDL,
    register_sampler,
    with_sampler,
)

from .test_samplers import make_targets


def tiny(dls):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, dls.c))
    return Learner(dls, model, loss_func=BCEWithLogitsLossFlat())


def hpa_loaders(hpa, **kwargs):
    kwargs = {"num_workers": 0, "size": 32, "bs": 16, "batch_tfms": [], "valid_pct": 0.3, **kwargs}
    return HPADataLoaders.from_csv(hpa, **kwargs)


def whole_batches(sampler, bs):
    """The batches of a sampler's first epoch, (T, bs)."""
    drawn = sampler.indices()
    return drawn[: len(drawn) // bs * bs].reshape(-1, bs)


def epoch_targets(dl):
    return torch.stack([torch.Tensor(y).cpu() for b in dl for y in b[1]])


@pytest.mark.parametrize("sampler", ["class_aware", "repeat_factor"])
def test_training_with_workers_then_predictions_in_order(hpa, sampler, tmp_path):
    dls = hpa_loaders(hpa, sampler=sampler, num_workers=2)
    assert isinstance(dls, HPADataLoaders) and dls.channels == ("red", "green", "blue", "yellow")
    assert type(dls.valid) is TfmdDL
    targets = read_labels(dls.train).toarray()
    assert (dls.train.sampler.labels != dls.train.sampler.labels.__class__(targets)).nnz == 0
    learn = tiny(dls)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        assert len(learn.recorder.losses) == len(dls.train) == len(dls.train.sampler) // 16
        for kwargs in ({"ds_idx": 0}, {"dl": dls.train}, {"dl": dls.train.new(shuffle=False, drop_last=False)}):
            assert (learn.get_preds(**kwargs)[1].numpy() == targets).all()
        assert (learn.tta(ds_idx=0, n=1)[1].numpy() == targets).all()
        assert (learn.get_preds()[1].numpy() == read_labels(dls.valid).toarray()).all()
        test = dls.test_dl([hpa / "test" / p.name.removesuffix("_red.png") for p in (hpa / "test").glob("*_red.png")])
        assert len(learn.get_preds(dl=test)[0]) == 6
        learn.show_results(ds_idx=0, max_n=2)
        dls.show_batch(max_n=2)
    learn.path = tmp_path
    learn.export("learner.pkl")
    assert len(load_learner(tmp_path / "learner.pkl").dls.train) == 0


def test_loader_epochs_differ_and_repeat_by_seed(hpa):
    def run(**kwargs):
        dls = hpa_loaders(hpa, sampler="class_aware", **kwargs)
        return [epoch_targets(dls.train) for _ in range(2)]

    first, again, workers = run(), run(), run(num_workers=2)
    assert not torch.equal(*first)
    for other in (again, workers):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    dls = hpa_loaders(hpa, sampler="class_aware")
    dls.train.sampler.set_epoch(1)
    assert torch.equal(epoch_targets(dls.train), first[1])


def test_batches_of_the_loader_are_those_of_the_sampler(hpa):
    dls = hpa_loaders(hpa, sampler="class_aware")
    targets = read_labels(dls.train).toarray()
    drawn = np.stack([torch.Tensor(b[1]).numpy() for b in dls.train])
    assert (drawn == targets[whole_batches(ClassAwareSampler(targets, seed=42), 16)]).all()


def test_a_training_set_smaller_than_a_batch_makes_one_batch(hpa):
    for sampler in ("class_aware", "repeat_factor"):
        dls = hpa_loaders(hpa, sampler=sampler, bs=64)
        assert len(dls.train) == 1 and len(list(dls.train)) == 1


def test_unknown_sampler_is_refused_before_anything_is_read(hpa):
    with pytest.raises(ValueError, match="sampler='balanced' is unknown: use one of 'class_aware', 'repeat_factor'"):
        HPADataLoaders.from_csv(hpa / "nowhere", sampler="balanced")


def blocks(n=90, multi=True):
    y = make_targets(n, counts=(60, 30, 12, 4))
    block = MultiCategoryBlock(encoded=True, vocab=list("abcd")) if multi else CategoryBlock(vocab=list("abcd"))
    items = np.arange(n)
    label = (lambda i: y[i].astype(float).tolist()) if multi else (lambda i: "aaabbc"[i % 6] if i > 3 else "d")
    return DataBlock((TransformBlock, block), get_x=lambda i: torch.tensor(float(i)), get_y=label), items


@pytest.mark.parametrize("multi", [True, False])
def test_any_data_block(multi):
    block, items = blocks(multi=multi)
    dls = block.dataloaders(items, bs=8, dl_type=SampledDL, sampler="repeat_factor", num_workers=0)
    assert isinstance(dls.train.sampler, RepeatFactorSampler) and dls.valid.sampler is None
    assert read_labels(dls.train).shape == (72, 4)
    assert len(list(dls.train)) == len(dls.train) == len(dls.train.sampler) // 8
    assert sorted(torch.cat([b[0] for b in dls.valid]).tolist()) == sorted(float(x[0]) for x in dls.valid_ds)
    assert dls.train.new(dls.valid_ds, shuffle=True).sampler is None


def test_with_sampler_keeps_the_other_loaders():
    block, items = blocks()
    dls = block.dataloaders(items, bs=8, num_workers=0)
    new = with_sampler(dls, "class_aware", seed=3)
    assert new.valid is dls.valid and type(new.train) is SampledDL and type(dls.train) is TfmdDL
    assert new.train.sampler.seed == 3
    assert isinstance(with_sampler(new, "repeat_factor", t=0.5).train.sampler, RepeatFactorSampler)
    copy = pickle.loads(
        pickle.dumps(with_sampler(dls, RepeatFactorSampler(read_labels(dls.train), t=0.5)).train.sampler)
    )
    assert copy.t == 0.5


def test_any_sampler_of_indices_and_none():
    block, items = blocks()
    dls = block.dataloaders(items, bs=8, num_workers=0)
    weighted = torch.utils.data.WeightedRandomSampler([1.0] + [0.0] * 71, 40)
    assert with_sampler(dls, weighted).train.get_idxs() == [0] * 40
    assert sorted(with_sampler(dls, None).train.get_idxs()) == list(range(72))


class Stratum:
    """A stranger's sampler, in one class: `per_label` images of each label in turn, then the next round."""

    def __init__(self, targets, bs, per_label=2):
        self.members, self.bs, self.per_label = [c.indices for c in targets.T.tocsr()], bs, per_label

    def __len__(self):
        return self.per_label * sum(len(m) > 0 for m in self.members)

    def __iter__(self):
        return (int(np.random.choice(m)) for m in self.members if len(m) for _ in range(self.per_label))


@pytest.fixture
def registered():
    names = dict(SAMPLERS)
    yield
    SAMPLERS.clear()
    SAMPLERS.update(names)


@pytest.mark.usefixtures("registered")
def test_a_strangers_sampler_by_name_by_class_and_as_an_object(hpa):
    register_sampler("stratum", Stratum)
    targets = read_labels(hpa_loaders(hpa).train)
    occur = int((targets.sum(0) > 0).sum())
    for sampler in ("stratum", Stratum, Stratum(targets, 16), lambda targets: Stratum(targets, 16)):
        dls = hpa_loaders(hpa, sampler=sampler, bs=4)
        assert len(dls.train) == 2 * occur // 4
        drawn = epoch_targets(dls.train).sum(0).numpy()
        assert (drawn > 0).sum() >= 2 * occur // 4 * 4 // 2  # each label in turn, whole batches
    block, items = blocks()
    dls = block.dataloaders(items, bs=8, num_workers=0)
    assert with_sampler(dls, "stratum", per_label=5).train.sampler.per_label == 5
    assert with_sampler(dls, Stratum).train.sampler.bs == 8
    assert len(block.dataloaders(items, bs=4, dl_type=SampledDL, sampler=Stratum, num_workers=0).train) == 2


def test_a_factory_gets_what_it_asks_for(monkeypatch):
    block, items = blocks()
    dls = block.dataloaders(items, bs=8, num_workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = {}

    def factory(dataset, bs, world_size):
        asked.update(dataset=dataset, bs=bs, world_size=world_size)
        return range(len(dataset))

    train = with_sampler(dls, factory).train
    monkeypatch.setattr(type(train), "_labels", lambda self: pytest.fail("labels that nobody asked for were read"))
    assert len(train.get_idxs()) == 64
    assert asked == {"dataset": dls.train_ds, "bs": 16, "world_size": 2}


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        ("balanced", {}, "sampler='balanced' is unknown: use one of 'class_aware', 'repeat_factor'"),
        (7, {}, "sampler=7 is a int: give a name"),
        ((i for i in range(4)), {}, "generator: give a name.*with a length"),
        (range, {}, "class 'range'.*does not tell its parameters: wrap it"),
        ([0, 1], {"seed": 1}, "seed: the sampler is an object"),
        ("repeat_factor", {"bs_": 1, "t": 0.1}, "repeat_factor has no option bs_: it has t, seed"),
        (lambda: None, {}, "made a NoneType, which is no sampler"),
        ([], {}, "drew 0 indices.*at least one"),
        ([0, 72], {}, "drew 72: indices of a data set of 72 items are whole numbers from 0 to 71"),
        ([0, -1], {}, "drew -1"),
        ([0, 1.5], {}, "drew 0.0"),
        ([True, False], {}, "drew True"),
    ],
)
def test_what_is_no_sampler_is_refused(sampler, options, says):
    block, items = blocks()
    dls = block.dataloaders(items, bs=2, num_workers=0)
    with pytest.raises(ValueError, match=says):
        with_sampler(dls, sampler, **options).train.get_idxs()


def test_options_and_loaders_are_checked_at_the_call():
    block, items = blocks()
    dls = block.dataloaders(items, bs=2, num_workers=0)
    with pytest.raises(ValueError, match="repeat_factor has no option thresh: it has t, seed"):
        with_sampler(dls, "repeat_factor", thresh=0.1)
    with pytest.raises(ValueError, match="dls is a TfmdDL: give DataLoaders"):
        with_sampler(dls.train, "repeat_factor")


@pytest.mark.parametrize(("length", "says"), [(3, "drew more than 3 indices"), (9, "drew 5 indices, its length is 9")])
def test_a_sampler_of_another_length_than_it_says_is_refused(length, says):
    class Liar(list):
        def __len__(self):
            return length

    block, items = blocks()
    train = with_sampler(block.dataloaders(items, bs=2, num_workers=0), Liar(range(5))).train
    with pytest.raises(ValueError, match=says):
        train.get_idxs()


@pytest.mark.parametrize(
    ("name", "factory", "says"), [("", list, "name=''"), (3, list, "name=3"), ("own", [1], r"factory=\[1\]")]
)
def test_only_callables_are_registered_and_only_by_a_name(name, factory, says):
    with pytest.raises(ValueError, match=says):
        register_sampler(name, factory)


def test_data_that_hide_their_labels_need_targets():
    data = torch.utils.data.TensorDataset(torch.arange(40.0), torch.zeros(40))
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0)
    with pytest.raises(ValueError, match=r"targets of shape \(40,\) and float32 fit no task: give \(n, C\)"):
        len(with_sampler(dls, "class_aware").train)
    opened = DataLoaders.from_dsets(list(data), list(data), bs=8, num_workers=0)
    with pytest.raises(ValueError, match=r"list does not tell its labels.*give targets="):
        len(with_sampler(opened, "class_aware").train)
    with pytest.raises(ValueError, match="targets of 3 samples for a data set of 40"):
        len(with_sampler(dls, "class_aware", targets=np.eye(3)).train)
    assert len(with_sampler(dls, "class_aware", targets=np.arange(40) % 4).train) == 5


def test_a_loader_shuffles_unless_told_otherwise():
    block, items = blocks()
    dls = block.dataloaders(items, bs=8, dl_type=SampledDL, num_workers=0)
    assert dls.train.sampler is None and sorted(dls.train.get_idxs()) == list(range(72))


def test_labels_that_are_corrected_between_two_fits():
    """The next pass draws by the new labels, and has the length that fastai has been told; then the length is new."""
    y = torch.zeros(64, 2)
    y[:, 0], y[:4, 1] = 1, 1
    data = torch.utils.data.TensorDataset(torch.arange(64)[:, None].float(), y)
    dls = with_sampler(DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device="cpu"), "repeat_factor", t=1.0)
    learn = Learner(dls, nn.Linear(1, 2), loss_func=BCEWithLogitsLossFlat())
    lengths, drawn = [], []

    class Seen(Callback):
        run_valid = False

        def before_train(self):
            drawn.append([])

        def after_batch(self):
            drawn[-1] += self.learn.xb[0][:, 0].long().tolist()
            lengths.append((len(dls.train), self.learn.n_iter))

    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.0, cbs=Seen())
        before = len(dls.train)
        assert before == len(drawn[0]) // 4 == (60 + 4 * 4) // 4 and np.bincount(drawn[0])[:4].min() == 4
        y[1:4, 1] = 0  # a single image is left, which comes √64 times
        learn.fit_one_cycle(2, 0.0, cbs=Seen())
    assert len(drawn[1]) == before * 4 and set(drawn[1]) == set(range(64))
    assert len(drawn[2]) == len(dls.train) * 4 == (63 + 8) // 4 * 4
    assert drawn[2].count(0) >= 7 and max(drawn[2].count(i) for i in range(1, 64)) == 1
    assert learn.pct_train == pytest.approx(1)


def test_loaders_of_another_type_are_refused():
    class Other(TfmdDL):
        pass

    block, items = blocks()
    with pytest.raises(ValueError, match=r"is a Other.*dl_type=SampledDL"):
        with_sampler(block.dataloaders(items, bs=8, dl_type=Other, num_workers=0), None)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sampler", ["class_aware", "repeat_factor"])
def test_processes_share_the_samplers_batches_without_overlap(sampler, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(DistributedDL, "_broadcast", lambda self, t, rank: list(t))
    targets = make_targets()
    data = torch.utils.data.TensorDataset(torch.arange(600), torch.from_numpy(targets).float())

    def rank(r):
        dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu")
        dl = DistributedDL(with_sampler(dls, sampler, targets).train, r, world, device="cpu")
        drawn = [b[0].tolist() for b in dl]
        assert len(drawn) == len(dl) and all(len(b) == 8 for b in drawn)
        return drawn

    together = np.concatenate([np.array(rank(r)) for r in range(world)], 1)  # the k-th batches of all processes
    assert (together == whole_batches(SAMPLERS[sampler](targets), 8 * world)).all()
