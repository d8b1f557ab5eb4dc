"""A stranger's readers: of a folder per image, of a file format of one's own, in place of ours."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fastai_crl.data import HPADataLoaders
from fastai_crl.images import ImageSet, Input, Reader, Source, open_channels, pack, readers, register_reader
from fastai_crl.images.readers import header, read_planes

RNG = np.random.default_rng(0)
CHANNELS = ("dna", "actin", "er")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    "What a test registers is forgotten."
    monkeypatch.setattr(readers, "_READERS", list(readers._READERS))


# ---------------------------------------------------------------- one .npy per channel in a folder


def open_folder(folder: Input, n: int) -> Source:
    files = [folder.path / f"{k}.npy" for k in range(n)]
    first = np.load(files[0], mmap_mode="r")
    return Source(n, *first.shape, lambda: np.stack([np.load(f) for f in files]), first.dtype)


NPY = Reader("npy folder", (".planes",), open_folder)


def write(folder: Path, a: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for k, plane in enumerate(a):
        np.save(folder / f"{k}.npy", plane)


@pytest.fixture
def plate(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    images = {f"w{k}": RNG.integers(0, 65536, (3, 10, 12), dtype=np.uint16) for k in range(8)}
    for i, a in images.items():
        write(tmp_path / "train" / f"{i}.planes", a)
    pd.DataFrame({"Id": list(images), "Target": ["x", "y"] * 4}).to_csv(tmp_path / "train.csv", index=False)
    return tmp_path, images


def test_a_folder_format(plate):
    root, images = plate
    few = ImageSet(root / "train", CHANNELS, "{id}.planes")
    with pytest.raises(ValueError, match=r"w0\.planes \(it is a folder, and no reader takes it\)"):
        few.check()
    register_reader(NPY)
    assert list(few.ids()) == list(images) and few.check() == {(10, 12): 8}
    for i, a in images.items():
        assert np.array_equal(few.open(i).numpy(), np.round(a * (255 / 65535)).astype(np.uint8))
    assert few.with_(bits=16, size=(5, 6)).open("w0").shape == (3, 5, 6)


def test_in_training_and_in_the_cache(plate):
    root, _ = plate
    register_reader(NPY)
    options = {"channels": CHANNELS, "pattern": "{id}.planes", "size": None, "bs": 4, "num_workers": 0, "stats": None}
    plain, cached = (HPADataLoaders.from_csv(root, batch_tfms=[], cache=cache, **options) for cache in (False, True))
    assert torch.equal(plain.valid.one_batch()[0], cached.valid.one_batch()[0])
    p = pack(ImageSet(root / "train", CHANNELS, "{id}.planes"), progress=False)
    inside = root / "train" / "w2.planes" / "1.npy"
    before = inside.stat()
    np.save(inside, np.zeros((10, 12), np.uint16))
    os.utime(inside, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert p.get(root / "train" / "w2") is None and p.get(root / "train" / "w1") is not None
    again = pack(ImageSet(root / "train", CHANNELS, "{id}.planes"), progress=False)
    assert not again.batch(np.array([2]))[0, 1].any() and again.batch(np.array([2]))[0, 0].any()


def test_what_a_reader_gets_wrong_is_found_by_the_check(plate):
    root, _ = plate
    images = ImageSet(root / "train", CHANNELS, "{id}.planes")
    register_reader(NPY)
    (root / "train" / "w3.planes" / "2.npy").unlink()
    np.save(root / "train" / "w4.planes" / "2.npy", np.zeros((9, 12), np.uint16))
    np.save(root / "train" / "w5.planes" / "2.npy", np.zeros((10, 12), np.float32))
    with pytest.raises(ValueError, match=r"3 in all\): w3.*w4.*w5"):
        images.check()
    for source in (
        lambda f, n: Source(n, 10, 12, lambda: np.zeros((n, 12, 10), np.uint8)),
        lambda f, n: Source(n, 10, 12, lambda: np.zeros((n, 10, 12), np.uint16)),
        lambda f, n: Source(n, 0, 12, lambda: np.zeros((n, 0, 12), np.uint8)),
        lambda f, n: Source(n + 1, 10, 12, lambda: np.zeros((n + 1, 10, 12), np.uint8)),
        lambda f, n: Source(n, 10, 12, lambda: np.zeros((n, 10, 12), np.float32), np.float32),
        lambda f, n: 1 / 0,
    ):
        register_reader(Reader("npy folder", (".planes",), source))
        with pytest.raises(ValueError, match=r"w1\.planes cannot be read"):
            images.open("w1")
        with pytest.raises(ValueError, match="8 in all"):
            images.check()


def test_one_thread_at_a_time(tmp_path):
    "Files are checked and read by several threads; a reader is called by one, unless it says otherwise."
    inside, most = [], {}

    def watched(name):
        def call(*_):
            inside.append(name)
            most[name] = max(most.get(name, 0), inside.count(name))
            time.sleep(0.005)
            inside.remove(name)
            return np.zeros((1, 8, 8), np.uint8)

        return lambda file, n: (call(), Source(1, 8, 8, call))[1]

    for name, threads in (("alone", False), ("together", True)):
        register_reader(Reader(name, (f".{name}",), watched(name), threads=threads))
        for k in range(16):
            (tmp_path / f"{k}.{name}").write_bytes(b"x")
        ImageSet(tmp_path, ("grey",), f"{{id}}.{name}").check()
    assert most["alone"] == 1 < most["together"]


# ---------------------------------------------------------------- files


def test_a_file_format_by_its_first_bytes(tmp_path):
    def open_raw(file: Input, n: int) -> Source:
        h, w = (int.from_bytes(file.start[k : k + 2], "big") for k in (3, 5))

        def decode():
            file.stream.seek(7)
            return np.frombuffer(file.stream.read(), np.uint8).reshape(n, h, w)

        return Source(n, h, w, decode, intact=file.size == 7 + n * h * w)

    a = RNG.integers(0, 256, (2, 5, 6), dtype=np.uint8)
    (tmp_path / "x.raw").write_bytes(b"RAW\0\5\0\6" + a.tobytes())
    with pytest.raises(ValueError, match="cannot identify"):
        header(tmp_path / "x.raw", 2)
    register_reader(Reader("raw", (".raw",), open_raw, lambda file: file.start.startswith(b"RAW")))
    assert header(tmp_path / "x.raw", 2) == (5, 6) and np.array_equal(read_planes(tmp_path / "x.raw", 2), a)
    assert np.array_equal(open_channels(tmp_path / "x", ("a", "b"), pattern="{id}.raw").numpy(), a)
    (tmp_path / "x.raw").write_bytes(b"RAW\0\5\0\6" + a.tobytes()[:-1])
    with pytest.raises(ValueError, match="cannot reshape"):
        header(tmp_path / "x.raw", 2)


def test_a_reader_is_asked_before_those_of_the_package(tmp_path):
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / "a.png")
    mine = Reader("mine", (".png",), lambda f, n: Source(n, 2, 2, lambda: np.full((n, 2, 2), 5, np.uint8)))
    assert (read_planes(tmp_path / "a.png") == 9).all()
    for _ in range(2):
        register_reader(mine)
    assert (read_planes(tmp_path / "a.png") == 5).all() and [r.name for r in readers._READERS].count("mine") == 1


def test_readers_say_how_many_channels_a_file_can_hold():
    register_reader(Reader("two", (".two",), open_folder, channels=(1,)))
    with pytest.raises(ValueError, match="one file for 2 channels"):
        ImageSet(".", ("a", "b"), "{id}.two")
    assert ImageSet(".", "a", "{id}.two").per_file == 1
    assert pickle.loads(pickle.dumps(ImageSet(".", "a", "{id}.two"))).per_file == 1


def test_what_is_no_reader():
    with pytest.raises(TypeError, match="reader='npy': give a Reader"):
        register_reader("npy")
