"""The data block, the csv factory, and real learners on multi-channel images."""

import pickle
import re
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import ColReader, RandomSplitter
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy, accuracy_multi
from fastai.vision.augment import FlipItem, Hue, Resize, Saturation
from PIL import Image
from torch import nn

from fastai_crl.data.annotations import Annotations
from fastai_crl.data.loaders import HPADataLoaders, MultiChannelBlock, MultiChannelDataLoaders
from fastai_crl.data.splits import ColumnSplit, FoldSplit, GroupSplit, RandomSplit, StratifiedSplit
from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_LABELS_2021, HPA_MEAN, HPA_N_IDS, HPA_STD
from fastai_crl.images.image_set import ImageSet, image_ids
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.labels import shown_names

SHARED = Path(__file__).parents[3] / "shared" / "data"
FIELDS, CELLS, LABELS = SHARED / "hpa_fields", SHARED / "hpa_cells", SHARED / "hpa2018" / "train.csv"
N, SIDE = 20, 32


def needs(path: Path):
    return pytest.mark.skipif(not path.exists(), reason=f"real HPA data is not at {path}")


@pytest.fixture(autouse=True)
def _agg():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def target(i: int) -> str:
    """Labels 2, 10 and 3; every fourth row has none, every fifth two."""
    return "" if i % 4 == 3 else "10 2" if i % 5 == 0 else str((2, 10, 3)[i % 3])


def pixels(i: int, h: int = SIDE, w: int = SIDE) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 200, (4, h, w), dtype=np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set in the Kaggle layout: 20 ids, 32x32 pixels, 4 channels, 5 groups, a column of validation rows."""
    (tmp_path / "train").mkdir()
    for i in range(N):
        for c, p in zip(HPA_CHANNELS, pixels(i), strict=True):
            Image.fromarray(p).save(tmp_path / "train" / f"id{i:02}_{c}.png")
    rows = [{"Id": f"id{i:02}", "Target": target(i), "Group": f"g{i % 5}", "is_valid": i >= 15} for i in range(N)]
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    return tmp_path


def load(root: Path, **kwargs) -> HPADataLoaders:
    return HPADataLoaders.from_csv(root, **{"size": SIDE, "bs": 4, "num_workers": 0, **kwargs})


def edit(root: Path, change) -> None:
    df = pd.read_csv(root / "train.csv", dtype={"Target": str}, keep_default_na=False)
    (change(df)).to_csv(root / "train.csv", index=False)


def net(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(n_in, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out)
    )


def valid_ids(dls) -> list[str]:
    return list(dls.valid_ds.items["Id"])


def unnormalised(x: torch.Tensor, mean=HPA_MEAN, std=HPA_STD) -> np.ndarray:
    mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in (mean, std))
    return ((x.as_subclass(torch.Tensor).cpu() * std + mean) * 255).numpy()


# ---------------------------------------------------------------- images and targets


def test_validation_batches_hold_the_normalised_pixels_of_the_files(root):
    dls = load(root)
    assert type(dls) is HPADataLoaders and dls.channels == HPA_CHANNELS
    x, y = dls.valid.one_batch()
    assert type(x) is TensorMultiChannel and x.shape == (4, 4, SIDE, SIDE) and x.dtype == torch.float32
    assert y.shape == (4, 3) and y.dtype == torch.float32
    want = np.stack([pixels(int(i[2:])) for i in valid_ids(dls)])
    assert np.abs(unnormalised(x) - want).max() < 0.05
    decoded = dls.valid.decode((x, y))[0]
    assert type(decoded) is TensorMultiChannel and np.abs(decoded.numpy() - want).max() <= 1


def test_targets_are_those_of_the_csv_and_no_label_is_a_zero_row(root):
    dls = load(root)
    assert list(dls.vocab) == ["2", "3", "10"]
    for ds in (dls.train_ds, dls.valid_ds):
        for i, (_, y) in zip(ds.items["Id"], ds, strict=True):
            assert {v for v, t in zip(dls.vocab, y, strict=True) if t == 1} == set(target(int(i[2:])).split())
    assert any(y.sum() == 0 for _, y in dls.train_ds)


def test_without_augmentation_training_batches_are_exact_and_with_it_they_are_not(root):
    exact = load(root, batch_tfms=[], stats=None, shuffle=False)
    x, _ = exact.train.one_batch()
    want = np.stack([pixels(int(i[2:])) for i in exact.train_ds.items["Id"][:4]]) / 255
    assert np.abs(x.numpy() - want).max() < 1e-6
    x, _ = load(root, stats=None, shuffle=False).train.one_batch()
    assert type(x) is TensorMultiChannel and np.abs(x.numpy() - want).max() > 0.1 and x.min() >= 0 and x.max() <= 1


def test_size_and_order_of_channels(root):
    dls = load(root, size=(16, 24), channels=("blue", "green"), stats=None)
    x, _ = dls.valid.one_batch()
    assert x.shape == (4, 2, 16, 24) and x.channels == ("blue", "green")
    plane = Image.fromarray(pixels(int(valid_ids(dls)[0][2:]))[2]).resize((24, 16), Image.Resampling.BILINEAR)
    assert np.abs(x[0, 0].numpy() * 255 - np.asarray(plane)).max() < 0.05


def test_three_channels_with_imagenet_statistics(root):
    dls = load(root, channels=("red", "green", "blue"), stats="imagenet")
    x, _ = dls.valid.one_batch()
    want = np.stack([pixels(int(i[2:]))[:3] for i in valid_ids(dls)])
    assert np.abs(unnormalised(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) - want).max() < 0.05


def test_statistics(root):
    def of(**kwargs):
        t = load(root, **kwargs).train.after_batch.fs[-1]
        return t.mean.flatten().tolist(), t.std.flatten().tolist()

    assert of() == (pytest.approx(HPA_MEAN), pytest.approx(HPA_STD))
    assert of(channels=("yellow", "red"))[0] == pytest.approx([HPA_MEAN[3], HPA_MEAN[0]])
    assert of(stats=([0.1] * 4, [0.2] * 4)) == (pytest.approx([0.1] * 4), pytest.approx([0.2] * 4))
    dls = load(root, stats="data")
    ids = dls.train_ds.items["Id"]
    x = np.stack([pixels(int(i[2:])) for i in ids]) / 255
    mean, std = of(stats="data")
    assert mean == pytest.approx(x.mean((0, 2, 3)), abs=1e-6) and std == pytest.approx(x.std((0, 2, 3)), abs=1e-6)
    assert not any(type(f).__name__ == "Normalize" for f in load(root, stats=None).train.after_batch.fs)


def test_a_training_set_smaller_than_a_batch_still_gives_one(root):
    dls = load(root, bs=64)
    assert len(dls.train) == 1 and len(dls.train.one_batch()[0]) == 16
    assert [len(x) for x, _ in load(root, bs=5).train] == [5, 5, 5]


def test_no_file_size_needed_when_all_are_equal(root):
    assert load(root, size=None).one_batch()[0].shape[-2:] == (SIDE, SIDE)


# ---------------------------------------------------------------- split


def test_random_split_is_fastais(root):
    dls = load(root, stratify=False, valid_pct=0.3, seed=7)
    want = [f"id{i:02}" for i in RandomSplitter(0.3, seed=7)(range(N))[1]]
    assert valid_ids(dls) == want and len(want) == 6
    assert set(want).isdisjoint(dls.train_ds.items["Id"]) and len(dls.train_ds) == N - 6
    assert valid_ids(load(root, stratify=False, seed=8, valid_pct=0.3)) != want
    assert len(load(root, valid_pct=0).train_ds) == N


def test_groups_stay_together(root):
    dls = load(root, group_col="Group", valid_pct=0.4)
    sides = [set(ds.items["Group"]) for ds in (dls.train_ds, dls.valid_ds)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[1]) == 2 and len(dls.valid_ds) == 8
    assert valid_ids(load(root, group_col="Group", valid_pct=0.4)) == valid_ids(dls)


@pytest.mark.parametrize("form", [str, int, lambda v: str(v).lower()])
def test_valid_col_marks_the_rows(root, form):
    edit(root, lambda df: df.assign(is_valid=[form(v) for v in df["is_valid"]]))
    assert valid_ids(load(root, valid_col="is_valid")) == [f"id{i}" for i in range(15, 20)]


def test_bad_splits(root):
    with pytest.raises(ValueError, match=r"no column 'Plate', only .*Group.*group_col="):
        load(root, group_col="Plate")
    with pytest.raises(ValueError, match=r"valid_pct=1\.5"):
        load(root, valid_pct=1.5)
    with pytest.raises(ValueError, match=r"valid_pct=0\.01 puts 0 of 20"):
        load(root, stratify=False, valid_pct=0.01)
    edit(root, lambda df: df.assign(is_valid="maybe", Group=["g", *[""] * 19]))
    with pytest.raises(ValueError, match=r"is_valid that are not boolean.*maybe"):
        load(root, valid_col="is_valid")
    with pytest.raises(ValueError, match=r"Ids without a Group \(19 in all\): id01"):
        load(root, group_col="Group")
    edit(root, lambda df: df.assign(is_valid=True, Group="g"))
    with pytest.raises(ValueError, match="'is_valid' puts 20 of 20"):
        load(root, valid_col="is_valid")
    with pytest.raises(ValueError, match="'Group' holds one group"):
        load(root, group_col="Group")


# ---------------------------------------------------------------- labels


def test_vocab(root):
    dls = load(root, vocab="hpa")
    assert list(dls.vocab) == [str(i) for i in range(28)]
    assert load(root, vocab=[10, 3, 2]).one_batch()[1].shape == (4, 3)
    with pytest.raises(ValueError, match=r"not in the vocab \(2 in all\): '3' \(id id02\), '10' \(id id00\)"):
        load(root, vocab=["2"])
    with pytest.raises(ValueError, match="twice"):
        load(root, vocab=["2", "2", "3", "10"])
    with pytest.raises(ValueError, match="vocab='HPA'"):
        load(root, vocab="HPA")


def test_labels_that_are_words_and_other_columns(root):
    words = {"": "", "2": "b", "10": "a", "3": "c", "10 2": "a| b |"}
    edit(root, lambda df: df.assign(L=df["Target"].map(words)).rename(columns={"Id": "image"}).drop(columns="Target"))
    dls = load(root, id_col="image", label_col="L", label_delim="|")
    assert list(dls.vocab) == ["a", "b", "c"]
    i = list(dls.train_ds.items["image"]).index("id00")
    assert dls.train_ds[i][1].tolist() == [1, 1, 0]


def test_ids_stay_text(root):
    for f in (root / "train").iterdir():
        f.rename(f.with_name(f.name.replace("id", "0")))
    edit(root, lambda df: df.assign(Id=df["Id"].str.replace("id", "0")))
    assert load(root).one_batch()[0].shape == (4, 4, SIDE, SIDE)


def test_no_labels_at_all(root):
    edit(root, lambda df: df.assign(Target=""))
    with pytest.raises(ValueError, match="no vocabulary"):
        load(root)
    assert not load(root, vocab="hpa").one_batch()[1].any()


# ---------------------------------------------------------------- learners


@pytest.mark.parametrize("names", [None, "hpa"])
def test_learner_multi_label(root, names, tmp_path):
    dls = load(root, label_names=names)
    learn = Learner(dls, net(4, 3), metrics=accuracy_multi, path=tmp_path)
    with learn.no_logging():
        learn.fit(1)
        learn.show_results()
        prefix = root / "train" / "id03"
        image, label, on, scores = learn.predict(prefix, with_input=True)
        assert type(image) is TensorMultiChannel and np.abs(image.numpy() - pixels(3)).max() <= 1
        assert list(label) == [v for v, o in zip(dls.vocab, on, strict=True) if o] and len(scores) == 3
        assert torch.allclose(learn.predict(str(prefix))[2], scores)
        batch, _ = learn.get_preds(dl=dls.test_dl([root / "train" / i for i in image_ids(root / "train")]))
        assert batch.shape == (N, 3) and torch.allclose(batch[3], scores, atol=1e-5)
        rows = pd.DataFrame({"Id": ["id03", "id04"]})
        assert torch.allclose(learn.get_preds(dl=dls.test_dl(rows))[0], batch[3:5], atol=1e-5)
        assert torch.allclose(learn.predict(rows.iloc[0])[2], scores, atol=1e-5)
        dl = dls.test_dl(dls.valid_ds.items, with_labels=True)
        assert torch.equal(learn.get_preds(dl=dl)[1], learn.get_preds()[1])
    learn.export("model.pkl")
    loaded = load_learner(tmp_path / "model.pkl")
    assert torch.allclose(loaded.predict(prefix)[2], scores, atol=1e-5)
    assert list(loaded.dls.vocab) == ["2", "3", "10"] and loaded.dls.channels == HPA_CHANNELS


@pytest.mark.parametrize("names", [None, ["two", "three", "ten"]])
def test_learner_single_label(root, names, tmp_path):
    edit(root, lambda df: df.assign(Target=[str((2, 10, 3)[i % 3]) for i in range(N)]))
    dls = load(root, label_delim=None, label_names=names)
    assert list(dls.vocab) == ["2", "3", "10"]
    learn = Learner(dls, net(4, 3), metrics=accuracy, path=tmp_path)
    with learn.no_logging():
        learn.fit(1)
        learn.show_results(max_n=4)
        assert set(plt.gcf().axes[0].get_title().split("\n")) <= set(names or dls.vocab)
        label, index, _ = learn.predict(root / "train" / "id00")
    assert label == dls.vocab[index] and label in ("2", "3", "10")
    learn.export("model.pkl")
    load_learner(tmp_path / "model.pkl")


def test_show_batch_draws_colour_pictures_with_names(root):
    dls = load(root, vocab="hpa", label_names="hpa", shuffle=False, batch_tfms=[])
    dls.show_batch(max_n=4)
    axes = plt.gcf().axes
    shown = dls.train_ds.items["Target"].tolist()[:4]
    names = {"2": "Nucleoli", "3": "Nucleoli fibrillar center", "10": "Lysosomes"}
    for ax, t in zip(axes, shown, strict=True):
        assert ax.images[0].get_array().shape == (SIDE, SIDE, 3)
        assert set(filter(None, ax.get_title().split(";\n"))) == {names[v] for v in t.split()}
    i = dls.train_ds.items["Id"].tolist()[0]
    x = TensorMultiChannel(torch.from_numpy(pixels(int(i[2:]))))
    assert np.abs(axes[0].images[0].get_array() - x.composite()).max() < 0.02
    dls.show_batch(max_n=2, channels=("green",), stretch=99)
    assert not plt.gcf().axes[0].images[0].get_array()[..., 0].any()


def test_label_names_must_fit(root):
    with pytest.raises(ValueError, match="2 names for the 3 labels"):
        load(root, label_names=["a", "b"])
    with pytest.raises(ValueError, match="label_names='HPA'"):
        load(root, label_names="HPA")
    load(root, label_names={2: "two"}, shuffle=False).show_batch(max_n=4)
    titles = {t for ax in plt.gcf().axes for t in ax.get_title().split(";\n")}
    assert titles <= {"two", "3", "10", ""} and "two" in titles


@pytest.mark.parametrize("block", ["multi", "single"])
def test_plain_data_block_over_ids(root, block):
    df = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False).set_index("Id")["Target"]
    multi = block == "multi"
    db = DataBlock(
        blocks=(MultiChannelBlock(ImageSet(".", size=16)), MultiCategoryBlock if multi else CategoryBlock),
        get_items=image_ids,
        get_x=lambda i: root / "train" / i,
        get_y=lambda i: df[i].split() if multi else df[i],
        splitter=RandomSplitter(seed=1),
    )
    dls = db.dataloaders(root / "train", bs=4, num_workers=0)
    x, _ = dls.one_batch()
    assert type(x) is TensorMultiChannel and x.shape == (4, 4, 16, 16) and x.min() >= 0 and x.max() <= 1
    learn = Learner(dls, net(4, len(dls.vocab)))
    with learn.no_logging():
        learn.fit(1)
        learn.show_results()
        assert torch.allclose(learn.predict("id01")[2], learn.predict(root / "train" / "id01")[2])
    dls.show_batch()


def test_plain_data_block_over_a_data_frame(root):
    df = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    db = DataBlock(
        blocks=(MultiChannelBlock(ImageSet(".", ("red", "yellow"))), MultiCategoryBlock),
        get_x=ColReader("Id", pref=root / "train"),
        get_y=ColReader("Target", label_delim=" "),
    )
    x, _ = db.dataloaders(df, bs=4, num_workers=0).valid.one_batch()
    assert x.shape == (4, 2, SIDE, SIDE)


def test_workers_and_pickle(root):
    dls = load(root, num_workers=2)
    xs = [x for x, _ in dls.valid]
    assert type(xs[0]) is TensorMultiChannel and xs[0].channels == HPA_CHANNELS
    again = pickle.loads(pickle.dumps(dls))
    assert torch.allclose(again.valid.one_batch()[0], xs[0]) and list(again.vocab) == list(dls.vocab)


def test_a_file_damaged_after_the_check_is_named(root):
    dls = load(root, shuffle=False)
    file = root / "train" / f"{dls.train_ds.items['Id'].iloc[0]}_blue.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=file.name):
        list(dls.train)


# ---------------------------------------------------------------- bad input fails before training


def test_csv_absent_empty_or_without_rows(root):
    with pytest.raises(FileNotFoundError, match=r"labels\.csv does not exist"):
        load(root, csv_fname="labels.csv")
    (root / "train.csv").write_text("")
    with pytest.raises(ValueError, match=r"train\.csv cannot be read"):
        load(root)
    (root / "train.csv").write_text("Id,Target\n")
    with pytest.raises(ValueError, match=r"train\.csv has a header but no rows"):
        load(root)


def test_csv_without_the_columns(root):
    with pytest.raises(ValueError, match=r"no column 'name', only Id, Target.*id_col="):
        load(root, id_col="name")
    with pytest.raises(ValueError, match=r"no column 'y', only Id, Target.*label_col="):
        load(root, label_col="y")


def test_ids_empty_duplicate_or_without_images(root):
    original = (root / "train.csv").read_text()
    edit(root, lambda df: df.assign(Id=["", *df["Id"][1:]]))
    with pytest.raises(ValueError, match=r"Empty Id.*\(1 in all\): row 2"):
        load(root)
    (root / "train.csv").write_text(original)
    edit(root, lambda df: pd.concat([df, df[4:5]]))
    with pytest.raises(ValueError, match=r"Duplicate Id.*\(1 in all\): id04"):
        load(root)
    (root / "train.csv").write_text(original + "ghost,2,g0,False\n")
    with pytest.raises(FileNotFoundError, match=r"\(4 in all\): ghost_red\.png"):
        load(root)
    load(root, check=False)


def test_single_label_needs_a_label_in_every_row(root):
    with pytest.raises(ValueError, match=r"Empty Target.*\(5 in all\): id03, id07"):
        load(root, label_delim=None)


def test_bad_images_are_found_before_training(root):
    folder = root / "train"
    file = folder / "id07_green.png"
    intact = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"\(1 in all\): id07_green\.png"):
        load(root)
    file.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(ValueError, match=r"that cannot be read.*id07_green\.png"):
        load(root)
    Image.fromarray(pixels(7, 16, 16)[1]).save(file)
    with pytest.raises(ValueError, match=r"different size.*id07 \(red 32x32, green 16x16.*pass size="):
        load(root, size=None)
    assert load(root).one_batch()[0].shape == (4, 4, SIDE, SIDE)  # of one size as they are read
    for c, p in zip(HPA_CHANNELS, pixels(7, 16, 16), strict=True):
        Image.fromarray(p).save(folder / f"id07_{c}.png")
    with pytest.raises(ValueError, match=r"Images of different size.*id00 32x32, id07 16x16.*size=256"):
        load(root, size=None)
    assert load(root).one_batch()[0].shape == (4, 4, SIDE, SIDE)


def test_folder_missing_or_empty(root):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load(root, folder="nowhere")
    (root / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void is empty"):
        load(root, folder="void")


def test_statistics_that_do_not_fit(root):
    with pytest.raises(ValueError, match=r"\[0\.485, 0\.456, 0\.406\].*4 channels red"):
        load(root, stats="imagenet")
    with pytest.raises(ValueError, match=r"mean \[0\.1\]"):
        load(root, stats=([0.1], [0.2]))
    with pytest.raises(ValueError, match="stats='auto'"):
        load(root, stats="auto")
    with pytest.raises(ValueError, match=r"Channels without HPA statistics.*dapi"):
        load(root, channels=("red", "dapi"), check=False)


@pytest.mark.parametrize("tfm", [Resize(16), FlipItem()])
def test_item_transforms_that_would_do_nothing_are_refused(root, tfm):
    with pytest.raises(ValueError, match=f"{type(tfm).__name__} works on pictures"):
        load(root, item_tfms=tfm)


@pytest.mark.parametrize("tfm", [Hue(), Saturation()])
def test_batch_transforms_that_fail_on_four_channels_are_refused(root, tfm):
    with pytest.raises(ValueError, match=f"{type(tfm).__name__} needs 3 channels"):
        load(root, batch_tfms=[tfm])
    assert load(root, batch_tfms=[tfm], channels=("red", "green", "blue")).one_batch()[0].shape[1] == 3


# ---------------------------------------------------------------- real data


@needs(FIELDS)
def test_real_fields():
    dls = HPADataLoaders.from_csv(FIELDS, num_workers=0, vocab="hpa", stats=None, size=None)
    items = pd.concat([dls.train_ds.items, dls.valid_ds.items])
    dl = dls.test_dl(items, with_labels=True, bs=7)
    x, y = dl.one_batch()
    assert x.shape == (7, 4, 512, 512) and y.shape == (7, 28)
    for img, t, (_, row) in zip(x, y, items.iterrows(), strict=True):
        assert t.nonzero().flatten().tolist() == sorted(map(int, row["Target"].split()))
        for c, got in zip(HPA_CHANNELS, img.numpy(), strict=True):
            with Image.open(FIELDS / "train" / f"{row['Id']}_{c}.png") as im:
                assert np.abs(got * 255 - np.asarray(im)).max() < 0.1


@needs(CELLS)
def test_real_cells_split_by_montage():
    dls = HPADataLoaders.from_csv(CELLS, size=64, bs=64, group_col="Montage", num_workers=0)
    train, valid = (set(ds.items["Montage"]) for ds in (dls.train_ds, dls.valid_ds))
    assert train.isdisjoint(valid) and len(train) + len(valid) == 90
    assert len(dls.train_ds) + len(dls.valid_ds) == 809 and list(dls.vocab) == ["0", "2", "21", "23", "25"]
    plain = HPADataLoaders.from_csv(CELLS, size=64, num_workers=0, check=False)
    mixed = set(plain.train_ds.items["Montage"]) & set(plain.valid_ds.items["Montage"])
    assert mixed  # what group_col is for
    x, y = dls.one_batch()
    assert x.shape == (64, 4, 64, 64) and x.isfinite().all() and y.shape == (64, 5) and (y.sum(1) == 1).all()


@needs(LABELS)
def test_real_labels_of_the_full_set():
    rows = Annotations.from_csv(LABELS)
    assert rows.vocab() == [str(i) for i in range(28)]
    assert rows.counts() == {str(i): n for i, n in enumerate(HPA_COUNTS)}
    assert rows.targets().sum(0).A1.tolist() == list(HPA_COUNTS)
    assert len(rows) == HPA_N_IDS and len(RandomSplit().rows(rows)) == 6214


# ---------------------------------------------------------------- values in place of keywords


class Odd:
    """A stranger's split: every third row."""

    def rows(self, annotations):
        return range(0, len(annotations), 3)


SPLITS = {
    "random": (RandomSplit(0.3, 7), {"stratify": False, "valid_pct": 0.3, "seed": 7}),
    "groups": (GroupSplit("Group", 0.4), {"stratify": False, "group_col": "Group", "valid_pct": 0.4}),
    "stratified": (StratifiedSplit(0.3, 1), {"valid_pct": 0.3, "seed": 1}),
    "column": (ColumnSplit("is_valid"), {"valid_col": "is_valid"}),
    "fold": (FoldSplit("Group", "g1"), {"fold_col": "Group", "fold": "g1"}),
    "fastai": (RandomSplitter(0.3, seed=7), {"stratify": False, "valid_pct": 0.3, "seed": 7}),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_what_its_keywords_say(root, name):
    split, keywords = SPLITS[name]
    assert valid_ids(load(root, split=split)) == valid_ids(load(root, **keywords))


def test_a_split_of_ones_own(root):
    assert valid_ids(load(root, split=Odd())) == [f"id{i:02}" for i in range(0, N, 3)]
    for bad in ("random", 0.2, lambda o: ([0], [1]), lambda o: ([*range(N)], [0])):
        with pytest.raises(ValueError, match="split="):
            load(root, split=bad)
    with pytest.raises(ValueError, match=r"split= is given, and so is valid_pct="):
        load(root, split=Odd(), valid_pct=0.1)


def test_images_and_annotations_as_values(root):
    images = ImageSet(root / "train", ("red", "blue"), size=16)
    dls = MultiChannelDataLoaders.from_csv(
        root, images=images, annotations=Annotations.from_csv(root / "train.csv"), bs=4, num_workers=0
    )
    assert dls.one_batch()[0].shape == (4, 2, 16, 16) and dls.channels == ("red", "blue")
    with pytest.raises(ValueError, match=r"images= is given, and so is channels="):
        load(root, images=images, channels=("red",))


def test_only_the_preset_knows_the_statistics_of_hpa(root):
    def mean(cls):
        dls = cls.from_csv(root, size=16, bs=4, num_workers=0)
        return next(f for f in dls.after_batch.fs if type(f).__name__ == "Normalize").mean.flatten().tolist()

    assert mean(HPADataLoaders) == pytest.approx(HPA_MEAN)
    assert mean(MultiChannelDataLoaders) != pytest.approx(HPA_MEAN)


def test_label_names_of_the_preset(root):
    def shown(cls, **kwargs):
        dls = cls.from_csv(root, size=16, bs=4, num_workers=0, **kwargs)
        return shown_names(dls, len(dls.vocab))

    named = ["Nucleoli", "Nucleoli fibrillar center", "Lysosomes"]
    assert shown(HPADataLoaders, label_names="hpa") == shown(MultiChannelDataLoaders, label_names="hpa") == named
    assert shown(HPADataLoaders, label_names="hpa2021") == [*named[:2], "Microtubules"]
    for vocab in ("hpa", range(28), list(map(str, range(27, -1, -1)))):
        assert sorted(shown(HPADataLoaders, vocab=vocab)) == sorted(HPA_LABELS)
    assert shown(HPADataLoaders, vocab="hpa2021") == list(HPA_LABELS_2021)
    # Fewer labels, and those of 2021, may be anything: digits, grades, another competition's.
    for n in (11, 19, 27, 29):
        assert shown(HPADataLoaders, vocab=range(n)) == list(map(str, range(n)))
    for cls, options in (
        (MultiChannelDataLoaders, {}),
        (HPADataLoaders, {}),
        (HPADataLoaders, {"label_names": None}),
        (HPADataLoaders, {"label_names": {"2": "2"}}),
    ):
        assert shown(cls, **options) == ["2", "3", "10"]
    edit(root, lambda df: df.assign(Target=["mito", *["nucleus"] * (N - 1)]))
    for delim in (" ", None):
        assert shown(HPADataLoaders, label_delim=delim) == ["mito", "nucleus"]
        load(root, label_delim=delim).show_batch(max_n=4)
    edit(root, lambda df: df.assign(Target=["28", *["0"] * (N - 1)]))
    assert shown(HPADataLoaders) == ["0", "28"]
    for label_names in ("hpa", "hpa2021"):
        with pytest.raises(ValueError, match=f"without a name in label_names='{label_names}' .1 in all.: 28"):
            load(root, label_names=label_names)


@pytest.mark.parametrize("delim", [" ", None])
def test_one_column_per_label(root, delim, tmp_path):
    marks = {c: [int(i % 3 == k) for i in range(N)] for k, c in enumerate("abc")}
    edit(root, lambda df: df.assign(**marks))
    dls = load(root, label_col=list("abc"), label_delim=delim)
    assert list(dls.vocab) == ["a", "b", "c"]
    y = torch.stack([torch.as_tensor(t) for _, t in dls.valid_ds])
    wanted = torch.tensor([int(i[2:]) % 3 for i in dls.valid_ds.items["Id"]])
    assert torch.equal(y, wanted if delim is None else torch.eye(3)[wanted])
    learn = Learner(dls, net(4, 3), path=tmp_path)
    with learn.no_logging():
        learn.fit(1)
    learn.export("model.pkl")
    assert list(load_learner(tmp_path / "model.pkl").dls.vocab) == ["a", "b", "c"]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("sampler", [None, "class_aware"])
def test_an_export_holds_no_row(root, tmp_path, cache, sampler):
    edit(root, lambda df: df.assign(Patient=[f"PATIENT{i}" for i in range(N)]))
    learn = Learner(load(root, cache=cache, sampler=sampler), net(4, 3), path=tmp_path)
    with learn.no_logging():
        learn.fit(1)
        learn.get_preds()
    learn.export("model.pkl")
    with zipfile.ZipFile(tmp_path / "model.pkl") as z:
        held = b"".join(z.read(n) for n in z.namelist())
    assert b"PATIENT" not in held and b"id07" not in held and b"Patient" not in held


@pytest.mark.parametrize("cache", [False, True])
def test_training_on_all(root, tmp_path, cache):
    learn = Learner(load(root, valid_pct=0, cache=cache), net(4, 3), path=tmp_path)
    with learn.no_logging():
        learn.fit(1)
    assert len(learn.dls.train_ds) == N and len(learn.dls.valid_ds) == 0


def test_ids_that_name_no_file_of_the_folder(root):
    text = (root / "train.csv").read_text()
    (root / "train.csv").write_text(text + "./id03,2,g0,False\n")
    with pytest.raises(ValueError, match=r"name one file \(1 in all\): id03 \('id03' and './id03'"):
        load(root)
    (root / "other").mkdir()
    for c in HPA_CHANNELS:
        (root / "train" / f"id03_{c}.png").rename(root / "other" / f"id03_{c}.png")
    (root / "train.csv").write_text(text.replace("id03", "../other/id03"))
    with pytest.raises(ValueError, match="lead out of"):
        load(root)
    (root / "train.csv").write_text(re.sub("(id..),", r"train/\1,", text).replace("train/id03", "other/id03"))
    assert load(root, folder=".").one_batch()[0].shape == (4, 4, SIDE, SIDE)


@pytest.mark.parametrize("size", ["16", 16.0, 0, -4, (16, 16, 3), True])
def test_sizes_that_are_none(root, size):
    with pytest.raises(ValueError, match="whole number of pixels"):
        load(root, size=size)


@pytest.mark.parametrize("size", [16, np.int64(16), (16,), [16, 16], np.uint8(16)])
def test_sizes_of_any_integer_type(root, size):
    assert load(root, size=size).one_batch()[0].shape == (4, 4, 16, 16)


@needs(LABELS)
def test_loaders_of_the_full_set(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.csv").write_bytes(LABELS.read_bytes())
    Image.fromarray(pixels(0)[0]).save(tmp_path / "one.png")
    for i in Annotations.from_csv(LABELS).ids:
        for c in HPA_CHANNELS:
            (tmp_path / "train" / f"{i}_{c}.png").symlink_to(tmp_path / "one.png")
    dls = load(tmp_path, check=False)  # about a second; looking up each id anew took minutes
    assert len(dls.train_ds) == 24856 and len(dls.valid_ds) == 6216
