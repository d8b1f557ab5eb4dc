"""The packed cache: the same pixels as the files, through kills, full disks and damage; whole batches from it."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.core import TfmdDL
from fastai.data.transforms import RandomSplitter, ToTensor
from fastai.learner import Learner, load_learner
from fasttransform import Transform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import fastai_crl.images.cache
import fastai_crl.images.image_set
from fastai_crl.data.cached_loader import PackedDL, one_ahead
from fastai_crl.data.loaders import HPADataLoaders, MultiChannelBlock
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.cache import Packed, pack
from fastai_crl.images.image_set import ImageSet, image_ids
from fastai_crl.images.open import open_channels
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.samplers import SampledDL, with_sampler

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def root(hpa, tmp_path) -> Path:
    """The first 20 images of the synthetic set, of 32 pixels, to do with as one likes."""
    df = pd.read_csv(hpa / "train.csv", dtype=str)[:20]
    (tmp_path / "train").mkdir()
    for i in df["Id"]:
        for c in HPA_CHANNELS:
            shutil.copy(hpa / "train" / f"{i}_{c}.png", tmp_path / "train")
    df.to_csv(tmp_path / "train.csv", index=False)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The files that are decoded."""
    files, read = [], fastai_crl.images.image_set.read_planes

    def spy(file, *args, **kwargs):
        files.append(file)
        return read(file, *args, **kwargs)

    monkeypatch.setattr(fastai_crl.images.image_set, "read_planes", spy)
    return files


def pixels(p: Packed) -> np.ndarray:
    return np.load(p.path / "images.npy")


def packed(root: Path, ids=None, check=True, **kwargs) -> Packed:
    return pack(ImageSet(root / "train", **{"size": 24, **kwargs}), ids, progress=False, check=check)


def assert_same(p: Packed, folder: Path, **kwargs) -> None:
    assert len(p) == len(p.ids) == len(pixels(p))
    for i, got in zip(p.ids, pixels(p), strict=True):
        want = open_channels(folder / i, **kwargs)
        assert torch.equal(p.get(folder / i), want) and np.array_equal(got, want.numpy())


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("size", [24, (10, 20), None])
def test_packed_images_are_those_that_are_read(root, size):
    p = packed(root, size=size)
    assert p.ids == tuple(image_ids(root / "train")) and p.path.parent == root / ".cache"
    assert pixels(p).dtype == np.uint8
    assert_same(p, root / "train", size=size)


@pytest.mark.parametrize("folder", ["hpa_fields", "hpa_cells"])
def test_real_images(shared, tmp_path, folder):
    source = shared / folder
    ids = image_ids(source / "train")[:40]
    p = pack(ImageSet(source / "train", size=64), ids, tmp_path, progress=False)
    assert sorted(ids) == list(p.ids)
    assert_same(p, source / "train", size=64)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    size=st.none() | st.integers(1, 12) | st.tuples(st.integers(1, 12), st.integers(1, 12)),
    wide=st.booleans(),
    one_file=st.booleans(),
    bits=st.none() | st.just(16),
    stretch=st.none() | st.floats(51, 100) | st.just((1, 98)),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_pack_then_read_equals_read(shape, size, wide, one_file, bits, stretch, seed):
    dtype = np.uint16 if wide else np.uint8
    channels = tuple(f"c{i}" for i in range(shape[0]))
    pattern = "{id}.tif" if one_file else "{channel}+{id}.png"
    options = {"channels": channels, "pattern": pattern, "bits": bits, "stretch": stretch}
    with tempfile.TemporaryDirectory() as d:
        for k in range(3):
            a = np.random.default_rng([seed, k]).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
            if one_file:
                tifffile.imwrite(f"{d}/i{k}.tif", a, photometric="minisblack")
            else:
                for c, plane in zip(channels, a, strict=True):
                    Image.fromarray(plane).save(f"{d}/{c}+i{k}.png")
        p = pack(ImageSet(d, size=size, **options), cache=f"{d}/cache", progress=False)
        assert_same(p, Path(d), size=size, **options)


def test_what_is_packed_is_not_decoded_again(root, decoded):
    a = packed(root)
    decoded.clear()
    b = packed(root, ids=a.ids[::-1])  # the order of the ids does not matter
    assert len(decoded) == 4  # the first image, for its size
    assert a.path == b.path and np.array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 25},
        {"channels": ("green", "red")},
        {"stretch": 99},
        {"bits": 12},
        {"ids": ["synthetic-000001"]},
    ],
)
def test_other_arguments_make_another_cache(root, change):
    a, b = packed(root), packed(root, **change)
    assert a.path != b.path
    options = {k: v for k, v in change.items() if k != "ids"}
    assert_same(b, root / "train", **{"size": 24, **options})
    assert_same(packed(root), root / "train", size=24)


def test_changed_files_are_noticed_and_packed_again(root, decoded, capsys):
    p = packed(root)
    file = root / "train" / f"{p.ids[3]}_blue.png"
    Image.fromarray(np.full((32, 32), 200, np.uint8)).save(file)
    assert p.get(root / "train" / p.ids[3]) is None and p.get(root / "train" / p.ids[2]) is not None
    decoded.clear()
    q = packed(root)
    assert {f.name.rsplit("_", 1)[0] for f in decoded} == {
        p.ids[0],
        p.ids[3],
    } and "1 of 20 images" in capsys.readouterr().out
    assert_same(q, root / "train", size=24)
    assert (q.batch(np.array([3]))[0, 2] == 200).all()
    decoded.clear()
    os.utime(file)  # touched, with the same bytes
    assert np.array_equal(pixels(packed(root)), pixels(q)) and len(decoded) == 4 and not capsys.readouterr().out


def same_look(file: Path, data: bytes) -> None:
    """Write other bytes of equal length into a file, and set its times back."""
    before = file.stat()
    assert len(data) == before.st_size
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_other_bytes_of_equal_size_and_time_are_noticed(root, how):
    ids = list(image_ids(root / "train"))
    for i in ids:
        for c in HPA_CHANNELS:
            Image.fromarray(np.full((8, 8), 100, np.uint8)).save(root / "train" / f"{i}_{c}.bmp")
    options = {"pattern": "{id}_{channel}.bmp"}
    p = packed(root, **options)
    file = root / "train" / f"{ids[7]}_green.bmp"
    data = file.read_bytes()[:-64] + bytes([200] * 64)
    if how == "in place":
        same_look(file, data)
    else:
        before = file.stat()
        file.with_suffix(".new").write_bytes(data)
        os.utime(file.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
        file.with_suffix(".new").rename(file)
    assert p.get(root / "train" / ids[7]) is None
    assert (packed(root, **options).batch(np.array([7]))[0, 1] == 200).all()


def test_a_copy_of_the_files_is_no_change(root, decoded):
    want = np.array(pixels(packed(root)))
    for file in (root / "train").iterdir():  # other inode, other times
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    decoded.clear()
    p = packed(root)
    assert np.array_equal(pixels(p), want) and len(decoded) == 4
    decoded.clear()
    assert torch.equal(p.get(root / "train" / p.ids[2]), torch.from_numpy(want[2])) and not decoded


def test_images_of_different_size_need_a_size(root):
    ids = list(image_ids(root / "train"))
    for c in HPA_CHANNELS:
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(root / "train" / f"{ids[5]}_{c}.png")
    for check in (True, False):
        with pytest.raises(ValueError, match=rf"{ids[5]}.*size=256"):
            packed(root, size=None, check=check)


def test_a_damaged_file_is_named_and_the_rest_is_kept(root, decoded):
    ids = list(image_ids(root / "train"))
    file = root / "train" / f"{ids[-1]}_red.png"
    good = file.read_bytes()
    file.write_bytes(good[:100])
    with pytest.raises(ValueError, match=rf"{file.name} \("):
        packed(root)
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read"):
        packed(root, check=False)
    file.write_bytes(good)
    assert_same(packed(root), root / "train", size=24)


def test_bad_arguments(root):
    with pytest.raises(ValueError, match="ids is empty"):
        packed(root, ids=[])
    with pytest.raises(FileNotFoundError, match="ghost_red"):
        packed(root, ids=["ghost"])
    with pytest.raises(ValueError, match="stretch="):
        packed(root, stretch=3)


# ---------------------------------------------------------------- interruptions and damage


def slowly(root: Path, delay: float, most: int) -> None:
    """In a process of its own: pack, each file taking `delay` seconds, no file beyond `most` bytes."""
    read = fastai_crl.images.image_set.read_planes
    fastai_crl.images.image_set.read_planes = lambda *args, **kwargs: time.sleep(delay) or read(*args, **kwargs)
    fastai_crl.images.cache._MARK_EVERY = 2
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        packed(root)
    except OSError as e:
        (root / "error.txt").write_text(str(e))
        os._exit(3)
    os._exit(0)


def start(root: Path, delay: float = 0.0, most: int = 0) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(root, delay, most))
    process.start()
    return process


def marked(root: Path) -> int:
    rows = list((root / ".cache").glob("*/rows.npy"))
    try:
        return int(np.count_nonzero(np.load(rows[0])["files"])) if rows else 0
    except (ValueError, EOFError):  # being written
        return 0


@needs_fork
def test_a_killed_run_goes_on_where_it_stopped(root, decoded):
    process, end = start(root, 0.05), time.monotonic() + 60
    while marked(root) < 4 and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = marked(root)
    assert 4 <= done < 20
    with pytest.raises(ValueError, match=rf"images are missing \({20 - done} in all\).*Call pack again"):
        Packed(next((root / ".cache").iterdir()), root / "train")
    decoded.clear()
    p = packed(root)
    assert len(decoded) == 4 * (20 - done + 1)  # and the first, for its size
    assert_same(p, root / "train", size=24)


@needs_fork
def test_a_full_disk_is_an_error_and_what_fits_is_kept(root, decoded):
    row = 4 * 24 * 24
    process = start(root, most=10 * row + 500)
    process.join(60)
    assert process.exitcode == 3
    assert "No space for the packed cache" in (root / "error.txt").read_text()
    done = marked(root)
    assert 2 <= done <= 10
    with pytest.raises(ValueError, match=rf"images are missing \({20 - done} in all"):
        Packed(next((root / ".cache").iterdir()), root / "train")
    decoded.clear()
    assert_same(packed(root), root / "train", size=24)
    assert len(decoded) > 4 * (20 - done)


def test_a_disk_that_is_known_to_be_too_small(root, monkeypatch, decoded):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(fastai_crl.images.cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"No space for the packed cache .*pass cache= on another disk"):
        packed(root)
    assert len(decoded) == 4


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_cache_is_an_error_and_is_mended(root, decoded, keep):
    p = packed(root)
    file = p.path / "images.npy"
    n = file.stat().st_size
    want = np.array(pixels(p))
    os.truncate(file, int(keep * n) if 0 < keep < 1 else keep % n)
    with pytest.raises(ValueError, match=r"damaged or truncated .*Call pack again"):
        Packed(p.path, root / "train")
    decoded.clear()
    q = packed(root)
    assert np.array_equal(pixels(q), want) and len(decoded) == 4 * {0: 21, 100: 21, 0.5: 12, -1: 2}[keep]


def test_the_cache_of_other_images_in_the_place_of_one(root, tmp_path):
    own = packed(root)
    want, ids = np.array(pixels(own)), list(own.ids)
    shutil.copytree(root, tmp_path / "more")
    for file in (root / "train").glob(f"{ids[0]}_*"):
        shutil.copyfile(file, tmp_path / "more" / "train" / file.name.replace(ids[0], "other"))
    more = packed(tmp_path / "more")
    shutil.rmtree(own.path)
    shutil.copytree(more.path, own.path)
    found = packed(root)
    assert list(found.ids) == ids and np.array_equal(pixels(found), want)


def test_a_cache_with_more_behind_it_is_mended(root, decoded):
    file = packed(root).path / "images.npy"
    whole = file.read_bytes()
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"its pixels take .* bytes, not .*Call pack again"):
        Packed(file.parent, root / "train")
    packed(root)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_cut_off_under_a_running_training_is_an_error_that_names_it(root, workers):
    dls = load(root, True, num_workers=workers)
    path = next((root / ".cache").iterdir())
    batches = iter(dls.train)
    next(batches)
    os.truncate(path / "images.npy", 5000)  # a memory map would end the process here
    with pytest.raises((ValueError, RuntimeError), match=rf"packed cache {path} has been cut off.*Call pack again"):
        for _ in range(3):
            list(dls.train)
    with pytest.raises(ValueError, match="cut off"):
        dls.train.dataset.tls[0].tfms.fs[-1].cache.batch(np.arange(20))
    assert_same(packed(root), root / "train", size=24)


def test_flipped_bits_are_found(root):
    p = packed(root)
    p.verify()
    want, start = np.array(pixels(p)), os.path.getsize(p.path / "images.npy") - 20 * 4 * 24 * 24
    with open(p.path / "images.npy", "r+b") as f:
        for row, at in ((3, 0), (3, 99), (19, 4 * 24 * 24 - 1)):
            f.seek(start + row * 4 * 24 * 24 + at)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 16]))
    with pytest.raises(
        ValueError,
        match=rf"Damaged images in .*2 in all.*{p.ids[3]}, {p.ids[19]}.*Delete .*the next call packs them again",
    ):
        p.verify()
    shutil.rmtree(p.path)
    q = packed(root)
    assert np.array_equal(pixels(q), want)
    q.verify()


@needs_fork
@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() != 0, reason="only root can become someone else")
def test_a_finished_cache_that_may_only_be_read(root):
    with tempfile.TemporaryDirectory() as d:
        home = Path(d)
        shutil.copytree(root / "train", home / "train")
        shutil.copy(root / "train.csv", home)
        want = np.array(pixels(packed(home)))
        for folder, _, files in os.walk(home):
            os.chmod(folder, 0o555)
            for f in files:
                os.chmod(Path(folder) / f, 0o444)

        def other(send):
            os.setgid(65534)
            os.setuid(65534)
            try:
                send.send(np.array_equal(pixels(packed(home)), want) and len(load(home, True).train) > 0)
                packed(home, size=12)
            except OSError as e:
                send.send(str(e))
            os._exit(0)

        receive, send = multiprocessing.Pipe(False)
        process = multiprocessing.get_context("fork").Process(target=other, args=(send,))
        process.start()
        assert receive.poll(60) and receive.recv() is True
        assert receive.poll(60) and "is not finished, and cannot be written" in receive.recv()
        process.join()
        os.chmod(home, 0o755)


def test_an_interrupted_run_keeps_what_is_done(root, monkeypatch, decoded):
    read, n = fastai_crl.images.image_set.read_planes, []

    def stop(*args, **kwargs):
        n.append(1)
        if len(n) > 4 * 12:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    monkeypatch.setattr(fastai_crl.images.image_set, "read_planes", stop)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        packed(root)
    assert marked(root) == 11  # the twelfth image read is the first, for its size


def test_what_is_no_image_set(root):
    with pytest.raises(ValueError, match=r"images= takes an ImageSet, not a str: pass ImageSet\(folder\)"):
        pack("train")
    with pytest.raises(ValueError, match=r"images= takes an ImageSet, not a tuple"):
        MultiChannelBlock(("red", "green"))


@pytest.mark.parametrize("name", ["rows.npy", "cache.json"])
def test_other_damage_is_an_error_and_is_mended(root, name):
    p = packed(root)
    want = np.array(pixels(p))
    (p.path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or truncated"):
        Packed(p.path, root / "train")
    assert np.array_equal(pixels(packed(root)), want)
    np.save(p.path / "rows.npy", np.ones(3, np.uint64))
    with pytest.raises(ValueError, match=r"3 rows .*for 20 ids"):
        Packed(p.path, root / "train")
    assert np.array_equal(pixels(packed(root)), want)


def test_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="call pack"):
        Packed(tmp_path, tmp_path)


# ---------------------------------------------------------------- loading


def load(root: Path, cache, **kwargs) -> HPADataLoaders:
    options = {"size": 24, "bs": 4, "num_workers": 0, "batch_tfms": [], "vocab": "hpa", "stratify": False, **kwargs}
    return HPADataLoaders.from_csv(root, cache=cache, **options)


def assert_same_batches(a, b) -> None:
    assert len(a) == len(b) > 0
    for p, q in zip(a, b, strict=True):
        assert type(p) is type(q) is tuple and len(p) == len(q)
        for s, t in zip(p, q, strict=True):
            assert type(s) is type(t) and s.dtype == t.dtype and torch.equal(s, t)
        assert p[0].channels == q[0].channels


@pytest.fixture
def per_item(monkeypatch) -> list[int]:
    """The items that are made one by one."""
    made, create = [], TfmdDL.create_item
    monkeypatch.setattr(TfmdDL, "create_item", lambda dl, s: made.append(s) or create(dl, s))
    return made


@pytest.mark.parametrize("label_delim", [" ", None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_without_a_cache(root, label_delim, num_workers, per_item):
    if label_delim is None:
        df = pd.read_csv(root / "train.csv", dtype=str)
        df.assign(Target=df["Target"].str.split().str[0]).to_csv(root / "train.csv", index=False)
    plain, fast = (load(root, c, label_delim=label_delim, num_workers=num_workers) for c in (False, True))
    assert type(fast.train) is PackedDL and type(plain.train) is TfmdDL and (root / ".cache").is_dir()
    assert_same_batches(plain.valid, fast.valid)
    for dls in (plain, fast):
        dls.train.rng.seed(7)
    per_item.clear()
    fast.train.rng.seed(7)
    got = list(fast.train)
    assert not per_item
    plain.train.rng.seed(7)
    for p, q in zip(plain.train, got, strict=True):
        assert torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) and type(p[1]) is type(q[1])
    assert [len(x) for x, _ in got] == [4] * 4  # 16 images to train on


def test_the_last_batch_is_dropped_or_kept_as_usual(root):
    for drop in (True, False):
        dls = load(root, True, bs=6, drop_last=drop, valid_pct=0.5)
        sizes = [len(x) for x, _ in dls.train]
        assert sizes == ([6] if drop else [6, 4]) and [len(x) for x, _ in dls.valid] == [6, 4]


class Darker(Transform):
    def encodes(self, x: TensorMultiChannel):
        return x // 2


def test_item_transforms_run(root, per_item):
    plain, fast = (load(root, c, item_tfms=Darker()) for c in (False, True))
    assert_same_batches(plain.valid, fast.valid)
    assert type(fast.valid) is PackedDL and len(per_item) >= 8
    assert not torch.equal(fast.valid.one_batch()[0], load(root, True).valid.one_batch()[0])


def test_test_loaders_predictions_and_export(root, tmp_path, per_item):
    dls = load(root, True)
    plain = load(root, False)
    rows = pd.concat([dls.valid_ds.items, dls.train_ds.items])
    assert_same_batches(plain.test_dl(rows, with_labels=True), dls.test_dl(rows, with_labels=True))
    prefixes = [root / "train" / i for i in rows["Id"]]
    dl = dls.test_dl(prefixes)
    per_item.clear()
    assert (
        torch.equal(dl.one_batch()[0], plain.test_dl(prefixes).one_batch()[0]) and len(per_item) == 4
    )  # the plain one
    other = root / "other"
    shutil.copytree(root / "train", other)
    unknown = [prefixes[0], *(other / p.name for p in prefixes[1:3])]
    assert torch.equal(dls.test_dl(unknown).one_batch()[0], plain.test_dl(prefixes[:3]).one_batch()[0])
    net = nn.Sequential(nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 28))
    learn = Learner(dls, net, path=tmp_path)
    with learn.no_logging():
        learn.fit(1)
        learn.show_results(max_n=2)
        preds, targets = learn.get_preds()
        assert preds.shape == targets.shape == (4, 28)
        assert torch.allclose(learn.tta(n=2)[1], targets)
        prefix = root / "train" / dls.valid_ds.items["Id"].iloc[0]
        one = learn.predict(prefix)[2]
        assert torch.allclose(one, preds[0], atol=1e-5)
        learn.export("m.pkl")
        assert (tmp_path / "m.pkl").stat().st_size < 200_000  # the pixels stay where they are
        assert torch.allclose(load_learner(tmp_path / "m.pkl").predict(prefix)[2], one, atol=1e-5)
        shutil.rmtree(root / ".cache")
        assert torch.allclose(load_learner(tmp_path / "m.pkl").predict(prefix)[2], one, atol=1e-5)
    dls.show_batch(max_n=2)


def test_predictions_follow_a_changed_file(root):
    dls = load(root, True, stats=None)
    prefix = root / "train" / dls.valid_ds.items["Id"].iloc[0]
    for c in HPA_CHANNELS:
        Image.fromarray(np.full((32, 32), 51, np.uint8)).save(f"{prefix}_{c}.png")
    assert torch.allclose(dls.test_dl([prefix, root / "train" / "x"][:1]).dataset[0][0].float(), torch.tensor(51.0))


def test_batches_follow_changed_files_and_do_not_miss_those_that_are_gone(root, tmp_path):
    dls = load(root, True, stats=None)
    learn = Learner(dls, nn.Conv2d(4, 1, 1), loss_func=nn.MSELoss(), path=tmp_path)
    learn.export("m.pkl")
    ids = list(dls.valid_ds.items["Id"])
    before = dls.valid.one_batch()[0]
    for c in HPA_CHANNELS:
        Image.fromarray(np.full((32, 32), 51, np.uint8)).save(root / "train" / f"{ids[1]}_{c}.png")
        (root / "train" / f"{ids[2]}_{c}.png").unlink()
    with pytest.warns(
        UserWarning, match=rf"have changed since they were packed in .* \(1 in all\): {ids[1]}\. They are"
    ):
        x, _ = dls.valid.one_batch()
    assert torch.allclose(x[1], torch.tensor(0.2)) and torch.equal(x[[0, 2, 3]], before[[0, 2, 3]])
    again = load_learner(tmp_path / "m.pkl")
    with pytest.warns(UserWarning, match="have changed since"):
        (x,) = again.dls.test_dl([root / "train" / i for i in ids]).one_batch()
    assert torch.allclose(x[1], torch.tensor(0.2)) and torch.equal(x[[0, 2, 3]], before[[0, 2, 3]])


def test_a_batch_is_made_one_ahead_in_order_and_errors_come_through():
    made, using = [], []
    for item in one_ahead(lambda k: made.append(k) or k * k, range(6)):
        using.append(item)
        assert len(made) <= len(using) + 1
    assert using == [k * k for k in range(6)] and list(one_ahead(str, [])) == []
    for error in (ValueError("cut off"), KeyboardInterrupt()):

        def fails(k, error=error):
            if k == 2:
                raise error
            return k

        batches = one_ahead(fails, range(5))
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(type(error)):
            next(batches)
    n = threading.active_count()
    batches = one_ahead(str, range(5))
    next(batches)
    batches.close()  # as when training is interrupted
    assert threading.active_count() == n


@pytest.mark.gpu
def test_batches_for_a_gpu_are_those_for_a_cpu_and_nothing_synchronises(root):
    fast, plain = load(root, True, stats=None), load(root, True, stats=None, device="cpu")
    fast.train.rng.seed(1)
    plain.train.rng.seed(1)
    fast.train.one_batch()
    plain.train.one_batch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(fast.train)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, plain.train, strict=True):
        assert a[0].is_cuda and a[1].is_cuda and a[0].channels == HPA_CHANNELS
        assert all(type(s) is type(t) and torch.equal(s.cpu(), t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("sampler", ["class_aware", "repeat_factor"])
def test_samplers(root, sampler, per_item):
    plain, fast = (load(root, c, sampler=sampler, seed=3) for c in (False, True))
    assert type(fast.train) is PackedDL and type(plain.train) is SampledDL and len(fast.train) == len(plain.train)
    per_item.clear()
    got = list(fast.train)
    assert not per_item and got
    for p, q in zip(plain.train, got, strict=True):
        assert torch.equal(p[0], q[0]) and torch.equal(p[1], q[1])
    again = with_sampler(load(root, True), sampler)
    assert type(again.train) is PackedDL and again.train.sampler is not None


def test_places_in_the_cache_are_looked_up_once(root, monkeypatch):
    dls = load(root, True)
    calls, rows = [], Packed.rows
    monkeypatch.setattr(Packed, "rows", lambda self, prefixes: calls.append(1) or rows(self, prefixes))
    for _ in range(3):
        list(dls.train)
    list(dls.train.new(shuffle=False))
    assert len(calls) == 1
    list(dls.valid)
    assert len(calls) == 2
    dls.train_ds.items = dls.train_ds.items[::-1].reset_index(drop=True)
    plain = load(root, False)
    plain.train_ds.items = dls.train_ds.items
    assert_same_batches(*(x.train.new(shuffle=False, drop_last=False) for x in (plain, dls)))
    assert len(calls) == 3


def test_cache_elsewhere_and_other_options(root, tmp_path):
    options = {"stretch": 99, "channels": ("green", "blue"), "stats": "data"}
    plain = load(root, False, **options)
    fast = load(root, tmp_path / "elsewhere", **options)
    assert_same_batches(plain.valid, fast.valid)
    assert not (root / ".cache").exists() and len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_caches_are_shared_with_pack(root, decoded):
    packed(root)
    decoded.clear()
    load(root, True)
    assert len(decoded) == 4 and len(list((root / ".cache").iterdir())) == 1


@pytest.mark.parametrize("block", [MultiCategoryBlock, CategoryBlock])
def test_in_a_plain_data_block(root, block, per_item):
    df = pd.read_csv(root / "train.csv", dtype=str).set_index("Id")["Target"]
    ids, vocab = list(image_ids(root / "train")), [str(i) for i in range(28)]

    def loaders(cache):
        db = DataBlock(
            blocks=(MultiChannelBlock(ImageSet(".", size=24), cache), block(vocab=vocab)),
            get_x=lambda i: root / "train" / i,
            get_y=lambda i: df[i].split() if block is MultiCategoryBlock else df[i].split()[0],
            splitter=RandomSplitter(seed=1),
        )
        return db.dataloaders(ids, bs=4, num_workers=0)

    plain, fast = loaders(None), loaders(packed(root))
    assert type(fast.train) is PackedDL
    assert_same_batches(plain.valid, fast.valid)
    per_item.clear()
    list(fast.valid)
    assert not per_item


def test_targets_that_are_no_categories_are_made_item_by_item(root, per_item):
    block = MultiChannelBlock(ImageSet(".", size=24), packed(root))
    db = DataBlock(blocks=(block, block), get_x=lambda i: root / "train" / i, get_y=lambda i: root / "train" / i)
    dls = db.dataloaders(list(image_ids(root / "train")), bs=4, num_workers=0)
    per_item.clear()
    x, y = dls.valid.one_batch()
    assert torch.equal(x, y) and len(per_item) == 4


def test_packed_pickles_as_a_reference(root):
    p = packed(root)
    data = pickle.dumps(p)
    assert len(data) < 1000 and np.array_equal(pixels(pickle.loads(data)), pixels(p))
    os.truncate(p.path / "images.npy", 500)
    assert pickle.loads(data) is None


def test_batch_is_a_copy(root):
    p = packed(root)
    x = p.batch(np.array([3, 3, 0]))
    assert type(x) is TensorMultiChannel and x.channels == HPA_CHANNELS and x.shape == (3, 4, 24, 24)
    assert np.array_equal(x.numpy(), pixels(p)[[3, 3, 0]])
    x[0] = 0
    assert np.array_equal(p.batch(np.array([3]))[0].numpy(), x[1].numpy())
    assert p.rows([root / "train" / p.ids[2], str(root / "train" / p.ids[0])]).tolist() == [2, 0]
    assert p.rows([root / "train" / "ghost"]) is None and p.get(root / "train" / "ghost") is None


def test_the_cache_says_what_it_holds(root):
    p = packed(root)
    what = json.loads((p.path / "cache.json").read_text())
    assert what["folder"] == "../train" and what["channels"] == list(HPA_CHANNELS) and what["shape"] == [20, 4, 24, 24]
    assert np.load(io.BytesIO((p.path / "images.npy").read_bytes())).shape == (20, 4, 24, 24)
    assert "20 images of (4, 24, 24)" in repr(p)


def test_to_tensor_is_what_blocks_add(root):
    # What makes a loader go item by item is any other item transform: this one is fastai's own.
    assert [type(f) for f in load(root, True).train.after_item.fs] == [ToTensor]


def test_a_pipe_in_place_of_a_packed_file_is_not_waited_for(root):
    p = packed(root)
    file = root / "train" / f"{p.ids[1]}_red.png"
    file.unlink()
    os.mkfifo(file)
    assert p.get(root / "train" / p.ids[1]) is None
    for check in (True, False):
        with pytest.raises(ValueError, match=rf"{file.name}.*it is a named pipe"):
            packed(root, check=check)
