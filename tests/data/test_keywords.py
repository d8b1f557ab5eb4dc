"""The keywords of `from_csv`: shown, checked, and each with one owner."""

import inspect

import pandas as pd
import pytest
from fastai.callback.data import PartialDL
from fastai.data.transforms import RandomSplitter
from fastcore.basics import noop

from fastai_crl.data import (
    Annotations,
    HPADataLoaders,
    MultiChannelBlock,
    MultiChannelDataLoaders,
    RandomSplit,
    add_folds,
    check,
    find_leaks,
)
from fastai_crl.data.splits import split_by
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images import CHANNELS, ImageSet, duplicate_groups, image_ids, open_channels, pack
from fastai_crl.samplers import SampledDL

BOTH = pytest.mark.parametrize("loaders", [HPADataLoaders, MultiChannelDataLoaders])


def load(path, loaders=HPADataLoaders, **kwargs):
    return loaders.from_csv(path, **{"bs": 4, "num_workers": 0, "check": False, **kwargs})


@BOTH
def test_the_signature_shows_all_keywords_with_their_defaults(loaders):
    shown = inspect.signature(loaders.from_csv).parameters
    for makes in (ImageSet, Annotations.from_csv, split_by):
        for name, p in inspect.signature(makes).parameters.items():
            if p.default is not p.empty and name != "size":
                assert shown[name].default == p.default, name
    assert shown["size"].default == 256 and shown["bs"].default == 32 and shown["csv_fname"].default == "train.csv"
    assert {"val_bs", "shuffle", "num_workers", "pin_memory", "dl_type", "verbose", "before_iter"} <= set(shown)
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


def test_channels_not_given_are_those_of_the_home_case():
    assert CHANNELS == HPA_CHANNELS  # so what checks or splits the files looks for those that the preset opens
    for taker in (MultiChannelBlock, add_folds, check, duplicate_groups, find_leaks, image_ids, open_channels, pack):
        assert inspect.signature(taker).parameters["channels"].default is CHANNELS, taker


@BOTH
@pytest.mark.parametrize(
    "wrong, near",
    [
        ("valid_pc", "valid_pct"),
        ("label_colum", "label_col"),
        ("batch_tfm", "batch_tfms"),
        ("val_pct", "valid_pct"),
        ("num_worker", "num_workers"),
        ("after_batch", "batch_tfms"),
        ("after_item", "item_tfms"),
        ("do_setup", None),
        ("xyzzy", None),
    ],
)
def test_an_unknown_keyword_is_named_with_the_nearest(loaders, wrong, near, hpa):
    said = rf"no keyword {wrong}=( \(did you mean {near}=\?\))?:"
    with pytest.raises(TypeError, match=said.replace(")?:", "):") if near else said):
        load(hpa, loaders, **{wrong: 0.1})


def test_several_unknown_keywords_are_all_named(hpa):
    with pytest.raises(TypeError, match=r"stratifi= \(did you mean stratify=\?\), xyzzy="):
        load(hpa, stratifi=True, xyzzy=1)


OF_FASTAI = {
    "val_bs": 3,
    "shuffle": False,
    "val_shuffle": True,
    "shuffle_train": True,
    "device": "cpu",
    "item_tfms": noop,
    "batch_tfms": [],
    "pin_memory": False,
    "pin_memory_device": "",
    "drop_last": False,
    "timeout": 0,
    "persistent_workers": False,
    "batch_size": 2,
    "indexed": True,
    "n": 8,
    "verbose": False,
    "wif": noop,
    "before_iter": noop,
    "after_iter": noop,
    "before_batch": noop,
    "dl_kwargs": [{}, {"bs": 2}],
    "val_num_workers": 0,
    "val_drop_last": True,
    "val_after_batch": [],
}


@pytest.mark.filterwarnings("ignore:`shuffle_train` is deprecated")
@pytest.mark.parametrize("name", OF_FASTAI)
def test_keywords_of_fastais_loaders_pass(name, hpa):
    x, _ = load(hpa, size=16, **{name: OF_FASTAI[name]}).one_batch()
    assert len(x) == (2 if name == "batch_size" else 4)


def test_keywords_of_a_loaders_type_pass(hpa):
    class Own(SampledDL):
        def __init__(self, *args, flavour, **kwargs):
            self.flavour = flavour
            super().__init__(*args, **kwargs)

    options = {"dl_type": Own, "sampler_kwargs": {"seed": 1}}
    dls = load(hpa, size=16, flavour="sweet", val_flavour="sour", **options)
    assert (dls.train.flavour, dls.valid.flavour) == ("sweet", "sour") and len(dls.one_batch()[0]) == 4
    assert len(load(hpa, size=16, dl_type=PartialDL, partial_n=8).train) == 2
    with pytest.raises(TypeError, match=r"no keyword flavor= \(did"):
        load(hpa, flavor="sweet", **options)
    with pytest.raises(TypeError, match="no keyword sampler_kwargs="):
        load(hpa, sampler_kwargs={"seed": 1})


def values(path):
    return {
        "images": ImageSet(path / "train", size=16),
        "annotations": Annotations.from_csv(path / "train.csv"),
        "split": RandomSplit(0.5),
    }


@BOTH
@pytest.mark.parametrize(
    "value, option, owner",
    [
        ("images", {"size": 256}, "ImageSet"),
        ("images", {"size": None}, "ImageSet"),
        ("images", {"folder": "nowhere"}, "ImageSet"),
        ("images", {"channels": ("red",)}, "ImageSet"),
        ("images", {"bits": 12}, "ImageSet"),
        ("annotations", {"csv_fname": "none.csv"}, "Annotations"),
        ("annotations", {"label_delim": None}, "Annotations"),
        ("split", {"seed": 42}, "split"),
        ("split", {"valid_pct": 0.2}, "split"),
    ],
)
def test_an_option_beside_the_value_that_has_its_own(loaders, value, option, owner, hpa):
    (name,) = option
    with pytest.raises(ValueError, match=f"{value}= is given, and so is {name}=: the {owner} has its own"):
        load(hpa, loaders, **{value: values(hpa)[value]}, **option)


def test_options_by_place_count_too(hpa):
    given = values(hpa)
    with pytest.raises(ValueError, match=r"images= is given, and so is folder=, size=:"):
        HPADataLoaders.from_csv(hpa, "train.csv", "train", 16, images=given["images"])
    with pytest.raises(ValueError, match=r"annotations= is given, and so is csv_fname=:"):
        HPADataLoaders.from_csv(hpa, "train.csv", annotations=given["annotations"])


@BOTH
def test_the_three_values_together(loaders, hpa):
    dls = load(hpa, loaders, **values(hpa))
    assert dls.one_batch()[0].shape == (4, 4, 16, 16) and len(dls.valid_ds) == 30


def test_a_seed_beside_a_split_is_the_samplers(hpa):
    def drawn(seed, split):
        return load(hpa, size=16, split=split, sampler="class_aware", seed=seed).train.get_idxs()

    for split in (RandomSplit(0.5), RandomSplitter(0.5, seed=42)):
        assert drawn(1, split) == drawn(1, split) != drawn(2, split)
    with pytest.raises(ValueError, match=r"split= is given, and so is seed=: the split has its own"):
        load(hpa, split=RandomSplit(0.5), sampler=range(8), seed=1)


@BOTH
def test_values_of_another_type(loaders, hpa):
    with pytest.raises(ValueError, match=r"images= takes an ImageSet, not a str: pass ImageSet\(folder\)"):
        load(hpa, loaders, images="train")
    table = pd.read_csv(hpa / "train.csv")
    with pytest.raises(ValueError, match=r"annotations= takes an Annotations, not a DataFrame: .*from_frame\(table\)"):
        load(hpa, loaders, annotations=table)
    with pytest.raises(ValueError, match="split='random' is no split"):
        load(hpa, loaders, split="random")
