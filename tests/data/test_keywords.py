"""The keywords of `from_csv`: shown, checked, and each with one owner."""

import inspect

import pandas as pd
import pytest
from fastai.callback.data import PartialDL
from fastai.data.transforms import RandomSplitter
from fastcore.basics import noop

from fastai_crl.data import Annotations, HPADataLoaders, MultiChannelDataLoaders, RandomSplit
from fastai_crl.data.splits import split_by
from fastai_crl.images import ImageSet
from fastai_crl.samplers import SampledDL

BOTH = pytest.mark.parametrize("loaders", [HPADataLoaders, MultiChannelDataLoaders])


def load(path, loaders=HPADataLoaders, **kwargs):
    return loaders.from_csv(path, **{"bs": 4, "size": 16, "num_workers": 0, "check": False, **kwargs})


@BOTH
def test_the_signature_shows_all_keywords_with_their_defaults(loaders):
    shown = inspect.signature(loaders.from_csv).parameters
    for makes in (ImageSet, Annotations.from_csv, split_by):
        defaults = {name: p.default for name, p in inspect.signature(makes).parameters.items() if p.default != p.empty}
        assert {name: shown[name].default for name in defaults} == defaults | {k: 256 for k in defaults if k == "size"}
    assert {"val_bs", "shuffle", "pin_memory", "dl_type", "verbose", "before_iter"} <= set(shown)


@BOTH
def test_unknown_keywords_are_named_with_the_nearest(loaders, hpa):
    near = {
        "after_batch": "batch_tfms",
        "label_colum": "label_col",
        "num_worker": "num_workers",
        "val_pct": "valid_pct",
    }
    said = ", ".join(rf"{wrong}= \(did you mean {right}=\?\)" for wrong, right in near.items())
    with pytest.raises(TypeError, match=f"no keyword {said}, xyzzy=:"):
        load(hpa, loaders, **dict.fromkeys([*near, "xyzzy"]))


def test_keywords_of_fastais_loaders_pass(hpa):
    class Own(SampledDL):
        def __init__(self, *args, flavour, **kwargs):
            self.flavour = flavour
            super().__init__(*args, **kwargs)

    of_fastai = {
        "val_bs": 3,
        "shuffle": False,
        "dl_kwargs": [{}, {"bs": 2}],
        "val_after_batch": [],
        "wif": noop,
        "n": 8,
    }
    dls = load(hpa, dl_type=Own, flavour="sweet", val_flavour="sour", sampler_kwargs={"seed": 1}, **of_fastai)
    assert (dls.train.flavour, dls.valid.flavour, dls.train.bs, dls.valid.bs) == ("sweet", "sour", 4, 2)
    assert len(load(hpa, dl_type=PartialDL, partial_n=8).train) == 2
    with pytest.raises(TypeError, match="no keyword sampler_kwargs="):
        load(hpa, sampler_kwargs={"seed": 1})


@BOTH
def test_an_option_beside_the_value_that_has_its_own(loaders, hpa):
    images, annotations = ImageSet(hpa / "train", size=16), Annotations.from_csv(hpa / "train.csv")
    dls = loaders.from_csv(hpa, bs=4, images=images, annotations=annotations, split=RandomSplit(0.5))
    assert dls.one_batch()[0].shape == (4, 4, 16, 16) and len(dls.valid_ds) == 30
    for options, said in (
        ({"images": images, "bits": 12}, "images= is given, and so is size=, bits="),
        ({"annotations": annotations, "label_delim": None}, "annotations= is given, and so is label_delim="),
        ({"split": RandomSplit(0.5), "seed": 1, "sampler": range(8)}, "split= is given, and so is seed="),
        ({"annotations": pd.DataFrame()}, r"annotations= is given a DataFrame: call from_df\(table, path\)"),
        ({"csv_fname": pd.DataFrame()}, "csv_fname= is given a DataFrame"),
        ({"annotations": "train.csv"}, "annotations= takes an Annotations, not a str"),
        ({"size": 16, "split": "random"}, "split='random' is no split"),
    ):
        with pytest.raises(ValueError, match=said):
            load(hpa, loaders, **options)
    with pytest.raises(ValueError, match="images= is given, and so is folder=, size=:"):
        loaders.from_csv(hpa, "train.csv", "train", 16, images=images)


def test_a_seed_beside_a_split_is_the_samplers(hpa):
    for split in (RandomSplit(0.5), RandomSplitter(0.5, seed=42)):
        a, b, c = (load(hpa, split=split, sampler="repeat_factor", seed=s).train.get_idxs() for s in (1, 1, 2))
        assert a == b != c


@BOTH
def test_rows_of_a_table(loaders, hpa):
    df = pd.read_csv(hpa / "train.csv", dtype=str).rename(columns={"Target": "labels"})
    a = loaders.from_df(df, hpa, label_col="labels", size=16, seed=3)
    b = loaders.from_csv(hpa, size=16, seed=3)
    assert type(a) is loaders and a.vocab == b.vocab and list(a.valid_ds.items["Id"]) == list(b.valid_ds.items["Id"])
