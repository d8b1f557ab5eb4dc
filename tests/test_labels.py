"""Labels of data sets, read without their images, against those that training gets."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, ColReader, IndexSplitter, ItemGetter, RegexLabeller, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.tabular.data import TabularDataLoaders
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fastai_crl import labels
from fastai_crl.callback import CRLCallback
from fastai_crl.data.annotations import Annotations
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.data.targets import RowLabels, RowPrefix
from fastai_crl.evaluate.metrics import MeanAPByGroup
from fastai_crl.labels import UnknownLabelsError, label_counts, label_names, read_labels

TEXT = ["a b", "", "b", "c a", "b", "a", "c b a", "a b"] * 5
ONE = [t.split()[0] if t else "d" for t in TEXT]
FRAME = pd.DataFrame({"id": [f"i{k}" for k in range(40)], "name": TEXT, "one": ONE, "n": [k % 3 for k in range(40)]})
FRAME = FRAME.assign(**{c: [int(c in t.split()) for t in TEXT] for c in "abc"})
NESTED = [(f"i{k}", t.split()) for k, t in enumerate(TEXT)]
PATHS = [Path(f"/none/{one}/i{k}.png") for k, one in enumerate(ONE)]
BY_ID = dict(zip(FRAME["id"], TEXT, strict=True))


def fail(o):
    raise AssertionError("an image was opened")


def opened(items, block, get_y=None, n=40, **kwargs):
    """Data sets whose inputs cannot be opened."""
    block = DataBlock(
        (TransformBlock(type_tfms=[]), block), get_y=get_y, splitter=IndexSplitter(range(n - 10, n)), **kwargs
    )
    sets = block.datasets(items)
    sets.tls[0].tfms.fs[:] = [fail]
    return sets


def by_pipeline(sets, i):
    """The oracle: labels (n, C) as fastai's pipeline gives them, one item after the other."""
    targets = sets.subset(i).tls[-1]
    y = np.stack([np.asarray(targets[k]) for k in range(len(targets))])
    return np.eye(len(sets.vocab), dtype=bool)[y] if y.ndim == 1 else y == 1


MULTI = MultiCategoryBlock
WAYS = {
    "column, split": (FRAME, MULTI, ColReader("name", label_delim=" ")),
    "column by place": (FRAME, MULTI, ColReader(1, label_delim=" ")),
    "function of a row": (FRAME, MULTI, lambda r: r["name"].split()),
    "attribute of a row": (FRAME, CategoryBlock, lambda r: r.one),
    "place of a row": (FRAME, CategoryBlock, lambda r: r.iloc[2]),
    "values of a row": (FRAME, CategoryBlock, lambda r: r.values[2]),
    "numbers": (FRAME, CategoryBlock, ColReader("n")),
    "whole Series": (FRAME, MULTI, lambda r: r.to_dict()["name"].split()),
    "name of a row": (FRAME, CategoryBlock, lambda r: str(r.name % 4)),
    "a column called name": (FRAME, CategoryBlock, lambda r: "x" if isinstance(r.name, str) else "y"),
    "one-hot": (FRAME, MULTI(encoded=True, vocab=list("abc")), ColReader(list("abc"))),
    "two columns": (FRAME, MULTI, lambda r: {r["one"], str(r["n"])}),
    "prefix": (FRAME, CategoryBlock, ColReader("one", pref="p_")),
    "missing category": (FRAME, CategoryBlock(vocab=["a", "b"], add_na=True), ColReader("one")),
    "vocabulary": (FRAME, MULTI(vocab=list("zcba")), ColReader("name", label_delim=" ")),
    "folder": (PATHS, CategoryBlock, parent_label),
    "name of a file": (PATHS, CategoryBlock, RegexLabeller(r"i\d*(\d)\.png")),
    "look-up": (list(BY_ID), MULTI, lambda i: BY_ID[i].split()),
    "array": (np.arange(40), CategoryBlock, lambda i: ONE[i]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_those_of_the_pipeline(way):
    sets = opened(*WAYS[way])
    for i in (0, 1):
        wanted = by_pipeline(sets, i)
        found = read_labels(sets.subset(i))
        assert found.dtype == bool and (found.toarray() == wanted).all(), way
        assert label_counts(sets.subset(i)).tolist() == wanted.sum(0).tolist()


def test_items_of_two_parts():
    getters = [ItemGetter(0), ItemGetter(1)]
    block = DataBlock((TransformBlock, MultiCategoryBlock), getters=getters, splitter=IndexSplitter([1]))
    sets = block.datasets(NESTED)
    assert (read_labels(sets.train).toarray() == by_pipeline(sets, 0)).all()


def test_several_inputs():
    block = DataBlock(
        (TransformBlock, TransformBlock, CategoryBlock),
        n_inp=2,
        getters=[ColReader("id"), ColReader("n"), ColReader("one")],
        splitter=IndexSplitter([0]),
    )
    assert label_counts(block.datasets(FRAME).train).sum() == 39


def test_labels_of_a_csv(hpa, hpa_dls):
    table = pd.read_csv(hpa / "train.csv", dtype=str, keep_default_na=False).set_index("Id")["Target"]
    for dl in hpa_dls:
        found = read_labels(dl)
        for row, item in zip(found.toarray(), dl.dataset.items["Id"], strict=True):
            assert {hpa_dls.vocab[c] for c in row.nonzero()[0]} == set(table[item].split())


def test_one_meaning_of_counts(hpa_dls):
    counts = [label_counts(s) for s in (hpa_dls, hpa_dls.train, hpa_dls.train_ds)]
    assert counts[0].dtype == torch.long and all(torch.equal(c, counts[0]) for c in counts)
    assert torch.equal(label_counts(hpa_dls.train, hpa_dls.c), counts[0])
    assert not torch.equal(label_counts(hpa_dls.valid), counts[0])
    MeanAPByGroup(label_counts(hpa_dls.train, hpa_dls.c))


def test_names(hpa_dls):
    assert label_names(hpa_dls, len(hpa_dls.vocab)) == list(hpa_dls.vocab)
    assert label_names(hpa_dls, 3) == ["0", "1", "2"]


def test_plain_data_sets():
    x, y = torch.rand(6, 3), torch.tensor([0, 2, 2, 1, 0, 2])
    hot = torch.eye(3)[y]
    for data in (TensorDataset(x, y), TensorDataset(x, hot), TensorDataset(x, hot.bool())):
        loader = torch.utils.data.DataLoader(data, 2)
        assert label_counts(loader).tolist() == [2, 1, 3]
        assert label_counts(DataLoaders(loader, loader), 3).tolist() == [2, 1, 3]
        assert label_counts(Subset(data, [5, 1])).tolist() == [0, 0, 2]
    assert label_counts(TensorDataset(x, y), 5).tolist() == [2, 1, 3, 0, 0]
    assert label_names(DataLoaders(loader, loader), 2) == ["0", "1"]


class Opens(torch.utils.data.Dataset):
    """Labels come with the opened item only, unless `targets` are given."""

    __getitem__ = fail

    def __init__(self, **given):
        vars(self).update(given)

    def __len__(self):
        return 4


def test_labels_that_come_with_the_opened_item_only_are_not_read():
    data = Opens()
    with pytest.raises(UnknownLabelsError, match=r"A Opens does not tell its labels.*Set its attribute targets"):
        read_labels(data)
    with pytest.warns(UserWarning, match=r"Set its attribute targets, \(n,\) class indices or \(n, C\)"):
        assert label_counts(torch.utils.data.DataLoader(data)) is None
    data.targets = [0, 2, 2, 1]  # as the warning says
    assert label_counts(data).tolist() == [1, 1, 2]
    data.targets = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 0]])
    assert label_counts(Subset(data, [0, 1])).tolist() == [2, 1]


@pytest.mark.parametrize("targets", [[0, 2, 2, 1], np.array([0, 2, 2, 1]), torch.tensor([0, 2, 2, 1])])
def test_data_sets_like_those_of_torchvision(targets):
    assert label_counts(Opens(targets=targets)).tolist() == [1, 1, 2]
    assert label_counts(Opens(targets=targets, target_transform=lambda y: 2 - int(y)), 4).tolist() == [2, 1, 1, 0]
    assert label_counts(Opens(targets=targets, target_transform=lambda y: torch.eye(3)[y])).tolist() == [1, 1, 2]


def test_targets_in_bfloat16():
    hot = torch.eye(3)[[0, 2, 2, 1]].bfloat16()
    assert label_counts(TensorDataset(torch.rand(4, 3), hot)).tolist() == [1, 1, 2]
    sets = Datasets([0, 1, 2, 3], [[fail], [lambda i: hot[i]]], do_setup=False)
    assert label_counts(sets).tolist() == [1, 1, 2]


def test_a_column_called_targets_is_not_taken():
    frame = pd.DataFrame({"a": [0.1, 0.2] * 8, "targets": [0, 1] * 8, "y": list("xyzx") * 4})
    table = TabularDataLoaders.from_df(frame, y_names="y", cont_names=["a", "targets"], y_block=CategoryBlock(), bs=4)
    with pytest.raises(UnknownLabelsError):
        read_labels(table)


@pytest.mark.parametrize("y", [torch.tensor([0, 1, 1]), torch.tensor([0.0, 1, 1]), torch.tensor([False, True, True])])
def test_one_binary_label(y):
    for shape in ((3,), (3, 1)):
        assert label_counts(TensorDataset(torch.rand(3, 2), y.reshape(shape)), 1).tolist() == [2]


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(torch.rand(4, 3)),
        TensorDataset(torch.rand(4, 3), torch.tensor([0, -1, 1, 1])),
        TensorDataset(torch.rand(4, 3), torch.rand(4)),
        TensorDataset(torch.rand(4, 3), torch.rand(4, 2) * 9),
        TensorDataset(torch.rand(4, 3), torch.full((4, 2), torch.nan)),
        TensorDataset(torch.rand(4, 3), torch.zeros(4, 2, 2)),
        TensorDataset(),
    ],
)  # fmt: skip
def test_targets_that_are_no_labels(data):
    with pytest.raises(UnknownLabelsError):
        read_labels(data)


def test_targets_that_do_not_fit():
    sets = opened(FRAME, MultiCategoryBlock, ColReader("name", label_delim=" "))
    for n_classes in (4, 2):
        with pytest.raises(UnknownLabelsError, match=rf"targets of 3 labels where there are {n_classes}"):
            read_labels(sets.train, n_classes)
    with pytest.raises(UnknownLabelsError, match=r"targets of shape \(30,\) and float32 fit no task"):
        read_labels(opened(FRAME, RegressionBlock, ColReader("n")).train)
    sets = Datasets([0, 1], [[fail], [lambda i: torch.zeros(2 + i)]], do_setup=False)
    with pytest.raises(UnknownLabelsError, match=r"of several shapes, \(2,\) and \(3,\)"):
        read_labels(sets)


def test_targets_without_encoding():
    y = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    sets = Datasets([0, 1, 2], [[fail], [lambda i: y[i]]], do_setup=False)
    assert read_labels(sets).toarray().tolist() == [[True, False], [False, False], [True, True]]


FRAMES = {
    "text": FRAME[["one", "name"]],
    "text of objects": FRAME[["one", "name"]].astype(object),
    "mixed": FRAME.assign(none=None, half=0.5, day=pd.Timestamp("2020-01-01"), kind=pd.Categorical(ONE)),
    "whole numbers": FRAME[["n", "a"]],
    "numbers, of which some are fractions": FRAME[["n", "a"]].assign(half=0.5),
    "a column twice": FRAME[["one", "name", "one"]],
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(
    "get", [lambda r: [str(v) for v in r.tolist()], lambda r: [str(r.iloc[0])], lambda r: [str(r.name), str(len(r))]]
)
def test_a_getter_gets_rows_as_in_training(kind, get):
    sets = opened(FRAMES[kind], MULTI, get)
    assert (read_labels(sets.train).toarray() == by_pipeline(sets, 0)).all()


def test_faults_of_a_getter_are_raised():
    sets = opened(FRAME, CategoryBlock(vocab=["a"]), ColReader("one"))
    with pytest.raises(KeyError, match="not included in the training dataset"):
        read_labels(sets.train)


def test_nothing_is_remembered():
    """Labels that are corrected, wherever they come from, are seen."""
    frame, by_id = FRAME.copy(), dict(zip(FRAME["id"], ONE, strict=True))
    rows = opened(frame, CategoryBlock, ColReader("one")).subset(0)
    looked_up = opened(list(by_id), CategoryBlock, lambda i: by_id[i]).subset(0)
    first = label_counts(rows)
    assert torch.equal(label_counts(looked_up), first)
    items = rows.tls[-1].items
    items.loc[items.index[0], "one"] = by_id["i0"] = "b"
    assert (label_counts(rows) - first).tolist() == [-1, 1, 0, 0]
    assert (label_counts(looked_up) - first).tolist() == [-1, 1, 0, 0]
    rows.items = rows.items[:5]
    assert label_counts(rows).sum() == 5


def corrected(table):
    """A table of labels in which each image has the first label of its vocabulary alone."""
    return table.assign(Target="0")


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("correct", ["items", "pipeline", "in place"])
def test_labels_of_a_csv_that_are_corrected_between_two_fits(tmp_path, hpa, cache, correct):
    for part in ("train", "train.csv"):
        (tmp_path / part).symlink_to(hpa / part)
    dls = HPADataLoaders.from_csv(
        tmp_path, size=16, bs=8, num_workers=0, batch_tfms=[], cache=cache, sampler="repeat_factor"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * 16 * 16, dls.c))
    learn = Learner(dls, model, BCEWithLogitsLossFlat(), cbs=CRLCallback(criterion="ranking", alpha="auto"))
    n = len(dls.train_ds)

    def fit():
        with learn.no_bar(), learn.no_logging():
            learn.fit(2)
        return learn.crl.alphas[-1], torch.cat([torch.Tensor(y) for _, y in dls.train]).mean(0), label_counts(dls)

    alpha, drawn, counts = fit()
    assert alpha < 0.25 or counts.count_nonzero() > 1
    pipeline = dls.train_ds.tls[-1]
    if correct == "items":
        dls.train_ds.items = corrected(dls.train_ds.items)
    elif correct == "pipeline":
        pipeline.items = corrected(pipeline.items)
    else:
        pipeline.items["Target"] = "0"
    alpha, drawn, counts = fit()
    only = torch.zeros(dls.c)
    only[list(dls.vocab).index("0")] = 1
    assert counts.tolist() == (n * only).tolist() and torch.equal(drawn, only)
    assert alpha == 0.25  # of Ω near 1 the most that ranking takes
    assert (dls.train.sampler.factors == 1).all() and len(dls.train) == n // 8


def test_a_getter_runs_once_for_each_item_and_the_encoding_once_for_each_value():
    calls = {"get": 0, "encode": 0}

    class Encode(Categorize):
        def encodes(self, o):
            calls["encode"] += 1
            return super().encodes(o)

    def get(i):
        calls["get"] += 1
        return ONE[i]

    sets = Datasets(range(40), [[fail], [get, Encode(vocab=list("abcd"))]], do_setup=False)
    assert read_labels(sets).shape == (40, 4)
    assert calls == {"get": 40, "encode": len(set(ONE))}


def test_many_items_are_asked_with_a_bar_in_one_process_of_several(monkeypatch, capsys):
    monkeypatch.setattr(labels, "_MANY", 30)
    sets = opened(FRAME, CategoryBlock, ColReader("one"))
    read_labels(sets.train)
    assert "30/30" not in capsys.readouterr().out
    monkeypatch.setattr(labels, "_MANY", 29)
    read_labels(sets.train)
    assert "30/30" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    read_labels(sets.train)
    assert not capsys.readouterr().out


def test_real_labels(shared):
    df = pd.read_csv(shared / "hpa2018" / "train.csv", dtype=str)
    vocab = [str(i) for i in range(28)]
    truth = df["Target"][10:].str.get_dummies(" ")[vocab].to_numpy(bool)
    getters = [RowPrefix(shared, "Id"), RowLabels(Annotations.from_frame(df).parser)]
    for way in ({"getters": getters}, {"get_y": ColReader("Target", label_delim=" ")}):
        block = DataBlock((TransformBlock, MULTI(vocab=vocab)), splitter=IndexSplitter(range(10)), **way)
        assert (read_labels(block.datasets(df).train).toarray() == truth).all()


def test_a_list_for_a_data_set_does_not_tell():
    items = [(torch.zeros(1), torch.tensor([1.0, 0]))] * 4
    for source in (items, torch.utils.data.DataLoader(items)):
        with pytest.warns(UserWarning, match="A list does not tell its labels"):
            assert label_counts(source) is None


def test_an_export_has_no_labels_to_tell(hpa_dls, tmp_path):
    Learner(hpa_dls, nn.Linear(1, 1), path=tmp_path, loss_func=BCEWithLogitsLossFlat()).export()
    dls = load_learner(tmp_path / "export.pkl").dls
    with pytest.raises(UnknownLabelsError, match=r"empty, as that of a learner from an export"):
        read_labels(dls)
    with pytest.warns(UserWarning, match="from an export"):
        assert label_counts(dls) is None
