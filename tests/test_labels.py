"""Labels of data sets, read without their images, against those that training gets."""

import gc
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import ColReader, IndexSplitter, ItemGetter, RegexLabeller, parent_label
from torch.utils.data import Subset, TensorDataset

from fastai_crl import labels
from fastai_crl.evaluate.metrics import MeanAPByGroup
from fastai_crl.labels import label_counts, label_names, read_labels

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
        __getitem__ = fail

        def __len__(self):
            return 6

    assert read_labels(Opens()) is None


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
    if data.tensors:
        assert read_labels(data) is None


def test_targets_that_do_not_fit():
    sets = opened(FRAME, MultiCategoryBlock, ColReader("name", label_delim=" "))
    assert read_labels(sets.train, 4) is None and read_labels(sets.train, 2) is None
    assert read_labels(opened(FRAME, RegressionBlock, ColReader("n")).train) is None


def test_targets_without_encoding():
    y = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    sets = Datasets([0, 1, 2], [[fail], [lambda i: y[i]]], do_setup=False)
    assert read_labels(sets).toarray().tolist() == [[True, False], [False, False], [True, True]]


def test_a_quick_reading_that_would_be_wrong_is_not_taken():
    """A getter that sees more than the columns gets real rows."""
    sets = opened(FRAME, CategoryBlock, lambda r: "light" if type(r) is not pd.Series else "real")
    assert list(sets.vocab) == ["real"] and read_labels(sets.train).sum() == 30


@pytest.mark.parametrize("get", [lambda r: r["one"], lambda r: r.one, lambda r: r.iloc[2], lambda r: r.values[2]])
def test_rows_are_not_made_where_columns_do(get):
    made = []
    sets = opened(FRAME, CategoryBlock(vocab=list("abcd")), lambda r: made.append(type(r) is pd.Series) or get(r))
    made.clear()
    assert read_labels(sets.train).sum() == 30 and sum(made) <= 5  # those that are compared with the training's


def test_faults_of_a_getter_are_raised():
    sets = opened(FRAME, CategoryBlock(vocab=["a"]), ColReader("one"))
    with pytest.raises(KeyError, match="not included in the training dataset"):
        read_labels(sets.train)


class Clock:
    """Time that passes only in getters: `spend` what each costs, in seconds of the processor and of waiting."""

    def __init__(self, monkeypatch):
        self.cpu = self.wall = self.calls = 0
        monkeypatch.setattr(labels, "time", self)

    def thread_time(self):
        return self.cpu

    def perf_counter(self):
        return self.wall

    def spend(self, cpu=0.0, wait=0.0):
        self.cpu, self.wall, self.calls = self.cpu + cpu, self.wall + cpu + wait, self.calls + 1

    def counts(self, n, cost):
        """Counts of a training set of `n` items, a and b in turn; `cost(i)` is what item i costs; and the calls."""
        label = [lambda i: "ab"[i % 2]]
        sets = opened(range(n + 10), CategoryBlock(vocab=list("ab")), lambda i: label[0](i), n=n + 10)
        label[0] = lambda i: self.spend(**cost(i)) or "ab"[i % 2]
        self.calls = 0
        return label_counts(sets.subset(0)), self.calls


@pytest.mark.parametrize(
    ("n", "cost", "most"),
    [
        (25_000, {"cpu": 0.0014}, 450),  # a picture, opened
        (1_000, {"cpu": 0.002}, 510),
        (25_000, {"cpu": 0.06}, 15),
        (25_000, {"wait": 0.001}, 650),  # a disk in a network
        (25_000, {"wait": 0.1}, 10),
        (300, {"wait": 0.1}, 10),
        (25_000, {"cpu": 1e-5, "wait": 3e-4}, 5100),
    ],
)
def test_labels_that_cost_too_much_are_left(monkeypatch, n, cost, most):
    clock = Clock(monkeypatch)
    found, calls = clock.counts(n, lambda i: cost)
    assert found is None and calls <= most
    assert clock.wall < 2


@pytest.mark.parametrize(
    ("n", "cost"),
    [
        (25_000, {"cpu": 5e-5, "wait": 1.5e-4}),  # waits three times as long as it works
        (2_000, {"cpu": 5e-5, "wait": 9e-4}),
        (100_000, {"cpu": 1.5e-4}),
        (100, {"cpu": 0.005}),
        (1, {"cpu": 9.0}),
    ],
)
def test_a_busy_machine_loses_no_labels(monkeypatch, n, cost):
    found, _ = Clock(monkeypatch).counts(n, lambda i: cost)
    assert found.tolist() == [(n + 1) // 2, n // 2]


@pytest.mark.parametrize("n", [50, 25_000])
def test_what_the_first_item_costs_is_not_what_each_does(monkeypatch, n):
    found, _ = Clock(monkeypatch).counts(n, lambda i: {"cpu": 1.0, "wait": 9.0} if i == 0 else {"cpu": 1e-5})
    assert found.sum() == n


def test_a_late_start_of_opening_is_noticed(monkeypatch):
    found, calls = Clock(monkeypatch).counts(25_000, lambda i: {"wait": 0.02 if i >= 100 else 0})
    assert found is None and calls < 150


def test_labels_are_read_on_demand_whatever_they_cost(monkeypatch):
    clock = Clock(monkeypatch)
    train = opened(range(60), CategoryBlock(vocab=["a"]), lambda i: clock.spend(wait=1.0) or "a", n=60).subset(0)
    assert read_labels(train) is None and read_labels(train, open_images=True).shape == (50, 1)
    assert read_labels(train) is None  # what was read on demand is not taken for cheap


def test_read_once_and_again_where_changed():
    calls = []

    def get(r):
        calls.append(1)
        return r["one"]

    frame = FRAME.copy()
    train = opened(frame, CategoryBlock, get).subset(0)
    first = label_counts(train)
    n = len(calls)
    assert read_labels(train) is read_labels(train) and len(calls) == n
    items = train.tls[-1].items
    items.loc[items.index[0], "one"] = "b"
    changed = label_counts(train)
    assert (changed - first).tolist() == [-1, 1, 0, 0]
    train.items = train.items[:5]
    assert label_counts(train).sum() == 5


def test_cache_holds_nothing_alive():
    gc.collect()
    n = len(labels._known)
    train = opened(FRAME, CategoryBlock, ColReader("one")).subset(0)
    read_labels(train)
    assert len(labels._known) == n + 1
    del train
    gc.collect()
    assert len(labels._known) == n


def test_real_labels_in_a_second(shared):
    df = pd.read_csv(shared / "hpa2018" / "train.csv", dtype=str)
    for get in (ColReader("Target", label_delim=" "), lambda r: r.Target.split()):
        sets = opened(df, MultiCategoryBlock(vocab=[str(i) for i in range(28)]), get, n=len(df))
        train = sets.subset(0)
        start = time.thread_time()
        counts = label_counts(train)
        assert time.thread_time() - start < 1
        assert counts.tolist() == df["Target"][:-10].str.get_dummies(" ")[list(map(str, range(28)))].sum().tolist()


def test_a_list_for_a_data_set_does_not_tell():
    items = [(torch.zeros(1), torch.tensor([1.0, 0]))] * 4
    assert read_labels(items) is None and label_counts(torch.utils.data.DataLoader(items)) is None
