"""Submissions for a folder without labels."""

import errno
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastcore.basics import noop
from filelock import FileLock
from torch import nn

from fastai_crl._files import replace_file
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.evaluate.decider import set_thresholds
from fastai_crl.predict import submission, write_submission

N = 40


@pytest.fixture
def learn(hpa_dls, tmp_path):
    return Learner(hpa_dls, nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(hpa_dls.vocab))), path=tmp_path)


def test_submission(learn, hpa, tmp_path):
    table = write_submission(learn, hpa / "test", tmp_path / "submission.csv", thresh=0.6)
    sample = pd.read_csv(hpa / "sample_submission.csv")
    assert sorted(table.Id) == sorted(sample.Id) and list(table.columns) == ["Id", "Predicted"]
    assert pd.read_csv(tmp_path / "submission.csv", dtype=str).equals(table.astype(str))
    for i, predicted in zip(table.Id, table.Predicted, strict=True):
        probs = learn.predict(hpa / "test" / i)[2]
        expected = {learn.dls.vocab[c] for c in (probs > 0.6).nonzero().flatten()} or {learn.dls.vocab[probs.argmax()]}
        assert set(predicted.split()) == expected


def test_loaded_learner_predicts_the_same(learn, hpa, tmp_path):
    expected = write_submission(learn, hpa / "test", tmp_path / "a.csv")
    learn.export("x.pkl")
    assert write_submission(load_learner(tmp_path / "x.pkl"), hpa / "test", tmp_path / "b.csv").equals(expected)


def test_every_image_gets_a_label(learn, hpa, tmp_path):
    table = write_submission(learn, hpa / "test", tmp_path / "a.csv", thresh=1.0)
    assert (table.Predicted.str.split().str.len() == 1).all()


def test_missing_channel_is_named(learn, hpa, tmp_path):
    shutil.copytree(hpa / "test", tmp_path / "test")
    gone = sorted((tmp_path / "test").glob("*_blue.png"))[2]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        write_submission(learn, tmp_path / "test", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
    assert torch.is_tensor(learn.predict(hpa / "test" / "synthetic-000060")[2])


# ---------------------------------------------------------------- thresholds and probabilities


def read_probs(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype={"Id": str}, float_precision="round_trip").set_index("Id")


def test_probabilities_are_kept_in_full(learn, hpa, tmp_path):
    table = write_submission(learn, hpa / "test", tmp_path / "s.csv")
    probs = read_probs(tmp_path / "s_probs.csv")
    assert list(probs.index) == list(table.Id) and list(probs.columns) == [str(v) for v in learn.dls.vocab]
    dl = learn.dls.test_dl([hpa / "test" / i for i in table.Id])
    assert np.array_equal(probs.to_numpy(np.float32), learn.get_preds(dl=dl)[0].numpy())
    assert sorted(f.name for f in tmp_path.iterdir() if f.suffix != ".pkl") == ["s.csv", "s_probs.csv"]


def plain_decisions(probs: pd.DataFrame, cuts: dict[str, float]) -> list[str]:
    """Labels by image, in a plain loop."""
    return [
        " ".join([c for c in probs if row[c] > cuts[c]] or [max(probs, key=lambda c: row[c])])
        for _, row in probs.iterrows()
    ]


def test_thresholds_by_label(learn, hpa, tmp_path):
    def write(thresh=None):
        return write_submission(learn, hpa / "test", tmp_path / "s.csv", thresh).Predicted.tolist()

    vocab = [str(v) for v in learn.dls.vocab]
    values = np.random.default_rng(0).random(len(vocab)).round(2)
    cuts = dict(zip(vocab, values.tolist(), strict=True))
    write()
    probs = read_probs(tmp_path / "s_probs.csv")
    want = plain_decisions(probs, cuts)
    assert len(set(want)) > 1 and want != plain_decisions(probs, dict.fromkeys(vocab, 0.5))
    assert write(values) == write(torch.tensor(values)) == write({int(k): v for k, v in cuts.items()}) == want
    assert write() == plain_decisions(probs, dict.fromkeys(vocab, 0.5))
    # The likeliest label comes in only where there is no other, however likely it is.
    likeliest = probs.idxmax(axis=1).iloc[0]
    assert write({v: float(v == likeliest) for v in vocab})[0] == " ".join(v for v in vocab if v != likeliest)
    set_thresholds(learn, values)
    assert write() == want and write(0.5) == plain_decisions(probs, dict.fromkeys(vocab, 0.5))
    learn.export("x.pkl")
    again = write_submission(load_learner(tmp_path / "x.pkl"), hpa / "test", tmp_path / "s.csv")
    assert again.Predicted.tolist() == want


def test_bad_arguments(learn, hpa, tmp_path):
    def write(**kwargs):
        write_submission(learn, hpa / "test", tmp_path / "s.csv", **kwargs)

    vocab = [str(v) for v in learn.dls.vocab]
    with pytest.raises(ValueError, match=rf"thresholds of shape \(3,\) do not fit {len(vocab)} labels"):
        write(thresh=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"Thresholds out of range \(1 in all\): 1\.5"):
        write(thresh=1.5)
    with pytest.raises(ValueError, match=r"Thresholds out of range \(1 in all\): nan"):
        write(thresh=[float("nan"), *[0.5] * (len(vocab) - 1)])
    cuts = dict.fromkeys(vocab, 0.5)
    with pytest.raises(ValueError, match=rf"without threshold.*\(1 in all\): {vocab[0]}\."):
        write(thresh={k: v for k, v in cuts.items() if k != vocab[0]})
    with pytest.raises(ValueError, match=r"without label \(1 in all\): ghost"):
        write(thresh={**cuts, "ghost": 0.5})
    assert not list(tmp_path.glob("s*"))


def test_loaders_without_names_of_images(learn, hpa, tmp_path):
    data = torch.utils.data.TensorDataset(torch.rand(4, 4, 32, 32), torch.rand(4, 2))
    other = Learner(DataLoaders.from_dsets(data, data, bs=2, device="cpu"), nn.Flatten(), nn.MSELoss(), path=tmp_path)
    with pytest.raises(ValueError, match=r"do not say how their images are named.*predict_probabilities"):
        write_submission(other, hpa / "test", tmp_path / "s.csv")


def test_damage_is_found_before_predicting(learn, hpa, tmp_path):
    shutil.copytree(hpa / "test", tmp_path / "test")
    last = sorted((tmp_path / "test").glob("*_green.png"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    calls = Count()
    learn.add_cb(calls)
    with pytest.raises(ValueError, match=last.name):
        write_submission(learn, tmp_path / "test", tmp_path / "s.csv")
    assert calls.images == 0 and not list(tmp_path.glob("s*"))


def test_probabilities_that_are_not_finite(learn, hpa, tmp_path):
    with torch.no_grad():
        learn.model[1].bias[2] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \(6 in all\): synthetic-000060"):
        write_submission(learn, hpa / "test", tmp_path / "s.csv")
    assert not (tmp_path / "s.csv").exists()


# ---------------------------------------------------------------- streaming


class Count(Callback):
    """Counts the images predicted, and after each batch the parts that are kept."""

    def __init__(self, folder: Path | None = None, stop_after: int | None = None):
        self.folder, self.stop_after, self.images, self.parts = folder, stop_after, 0, []

    def after_batch(self):
        self.images += len(self.x)
        if self.folder is not None:
            self.parts.append(len(list(self.folder.glob("*.parts/[0-9]*.part"))))
        if self.stop_after is not None and self.images >= self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one batch of eight."""
    monkeypatch.setattr(submission, "PART", 8)


def left(tmp_path: Path, name: str = "s.csv") -> list[Path]:
    """Return the folders of parts of a submission."""
    return sorted(f for f in tmp_path.glob("*.parts") if f.name.startswith(f"{name}."))


@pytest.fixture(scope="module")
def many(hpa, tmp_path_factory) -> Path:
    """A folder of 40 images to predict."""
    folder = tmp_path_factory.mktemp("many")
    for file in sorted((hpa / "train").iterdir())[: 4 * N]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def plain(hpa, tmp_path) -> Learner:
    """A learner with the default transforms, as users have it."""
    dls = HPADataLoaders.from_csv(hpa, size=32, bs=8, num_workers=0)
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(dls.vocab))), path=tmp_path)


def test_parts_are_whole_batches_written_as_they_come(plain, many, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "PART", 10)  # rounded up to two batches of eight
    counts = Count(tmp_path)
    plain.add_cb(counts)
    write_submission(plain, many, tmp_path / "s.csv")
    assert counts.parts == [0, 0, 1, 1, 2] and counts.images == N and not left(tmp_path)


def test_an_interrupted_run_is_continued_with_the_same_result(plain, many, tmp_path, small_parts):
    whole = write_submission(plain, many, tmp_path / "whole.csv")
    [folder] = interrupted(plain, many, tmp_path / "s.csv")
    assert folder.stat().st_mode & 0o777 == 0o700 and not (tmp_path / "s.csv").exists()
    counts = Count()
    plain.add_cb(counts)
    table = write_submission(plain, many, tmp_path / "s.csv")
    assert counts.images == N - 16 and table.equals(whole) and not left(tmp_path)
    for name in ("{}.csv", "{}_probs.csv"):
        assert (tmp_path / name.format("s")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()
    interrupted(plain, many, tmp_path / "s.csv")
    counts.images = 0
    write_submission(plain, many, tmp_path / "s.csv", resume=False)
    assert counts.images == N


def test_nothing_is_predicted_twice_when_only_the_tables_are_missing(plain, many, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, "to_csv", fail)
        with pytest.raises(OSError, match=r"No space left on device: .*s_probs\.csv could not be written.*Free space"):
            write_submission(plain, many, tmp_path / "s.csv", bs=16)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == []
    counts = Count()
    plain.add_cb(counts)
    table = write_submission(plain, many, tmp_path / "s.csv", bs=16)
    assert counts.images == 0 and len(table) == table.Id.nunique() == N


KILLED = """
import sys, time
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai_crl.predict import submission

submission.PART = 8

class Slow(Callback):
    def after_batch(self):
        time.sleep(0.3)

learn = load_learner(sys.argv[1])
learn.add_cb(Slow())
submission.write_submission(learn, sys.argv[2], sys.argv[3], progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_with_the_same_result(plain, many, tmp_path, small_parts):
    plain.export("x.pkl")
    whole = write_submission(plain, many, tmp_path / "whole.csv")
    args = [sys.executable, "-c", KILLED, tmp_path / "x.pkl", many, tmp_path / "s.csv"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)

    def done() -> int:
        return len(list(tmp_path.glob("s.csv.*.parts/[0-9]*.part")))

    try:
        until = time.monotonic() + 120
        while done() < 2:
            assert process.poll() is None and time.monotonic() < until, "the process ended or hung before it wrote"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "s.csv").exists()
    kept = 8 * done()
    assert 16 <= kept < N
    learn, counts = load_learner(tmp_path / "x.pkl"), Count()
    learn.add_cb(counts)
    table = write_submission(learn, many, tmp_path / "s.csv")
    assert counts.images == N - kept and table.Id.is_unique and table.equals(whole) and not left(tmp_path)
    assert (tmp_path / "s_probs.csv").read_bytes() == (tmp_path / "whole_probs.csv").read_bytes()


@pytest.fixture
def spoilt(many, tmp_path) -> tuple[Path, list[str]]:
    """A copy of `many` in which the first image lacks a file, another is damaged within, and a whole part truncated."""
    folder = Path(shutil.copytree(many, tmp_path / "spoilt"))
    ids = sorted({f.name.rsplit("_", 1)[0] for f in folder.iterdir()})
    (folder / f"{ids[0]}_red.png").unlink()
    raw = bytearray((folder / f"{ids[5]}_green.png").read_bytes())
    raw[60] ^= 255  # header and end are intact
    (folder / f"{ids[5]}_green.png").write_bytes(raw)
    for i in ids[16:24]:
        file = folder / f"{i}_blue.png"
        file.write_bytes(file.read_bytes()[:-20])
    return folder, [ids[k] for k in (0, 5, *range(16, 24))]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_listed(plain, many, spoilt, tmp_path, small_parts, workers):
    whole = write_submission(plain, many, tmp_path / "whole.csv")
    folder, bad = spoilt
    with pytest.warns(UserWarning, match=rf"left out \(10 in all\): {bad[0]}, {bad[1]}, .*s_skipped\.csv says why"):
        table = write_submission(plain, folder, tmp_path / "s.csv", num_workers=workers, skip_unreadable=True)
    assert table.equals(whole[~whole.Id.isin(bad)].reset_index(drop=True)) and not left(tmp_path)
    skipped = pd.read_csv(tmp_path / "s_skipped.csv").set_index("Id").Why
    assert list(skipped.index) == bad and skipped.str.contains(r"_(?:red|green|blue)\.png").all()
    assert list(read_probs(tmp_path / "s_probs.csv").index) == list(table.Id)


def test_skipping_goes_on_after_a_kill_and_skips_nothing_else(plain, many, spoilt, tmp_path, small_parts):
    folder, bad = spoilt
    with pytest.warns(UserWarning, match="left out"):
        whole = write_submission(plain, folder, tmp_path / "whole.csv", skip_unreadable=True)
    cb = Count(stop_after=20)
    plain.add_cb(cb)
    with pytest.raises(KeyboardInterrupt):
        write_submission(plain, folder, tmp_path / "s.csv", skip_unreadable=True)
    plain.remove_cb(cb)
    assert left(tmp_path)
    with pytest.warns(UserWarning, match="10 in all"):
        assert write_submission(plain, folder, tmp_path / "s.csv", skip_unreadable=True).equals(whole)
    with pytest.raises(FileNotFoundError, match=f"{bad[0]}_red.png"):
        write_submission(plain, folder, tmp_path / "s.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        write_submission(plain, folder, tmp_path / "s.csv", ids=bad, skip_unreadable=True)
    with pytest.raises(ValueError, match="Duplicate ids"):
        write_submission(plain, many, tmp_path / "s.csv", ids=bad[:1] * 2, skip_unreadable=True)
    # Nothing to skip: the list is empty, and an error that no file causes stays one.
    write_submission(plain, many, tmp_path / "s.csv", skip_unreadable=True)
    assert (tmp_path / "s_skipped.csv").read_text().strip() == "Id,Why"
    write_submission(plain, many, tmp_path / "s.csv")
    assert not (tmp_path / "s_skipped.csv").exists()
    with pytest.raises(ZeroDivisionError):
        write_submission(plain, many, tmp_path / "s.csv", tta=lambda learn, dl: 1 / 0, skip_unreadable=True)


def test_test_time_augmentation(plain, many, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "PART", 24)
    seen = []

    def tta(learn, dl):
        seen.append(len(dl.dataset))
        logits, targets = learn.get_preds(dl=dl, act=noop)
        probs = torch.cat([batch.sigmoid() for batch in logits.split(8)])  # in longer tensors the last bits can differ
        return 1 - probs, targets

    write_submission(plain, many, tmp_path / "a.csv")
    write_submission(plain, many, tmp_path / "b.csv", tta=tta)
    a, b = (read_probs(tmp_path / f"{n}_probs.csv").to_numpy(np.float32) for n in "ab")
    assert seen == [24, 16] and np.array_equal(b, 1 - a)


def test_loader_options_and_silence(plain, many, tmp_path, capfd):
    counts = Count()
    plain.add_cb(counts)
    one = write_submission(plain, many, tmp_path / "s.csv", bs=20, progress=False)
    assert counts.images == N and capfd.readouterr().out == ""
    plain.remove_cb(counts)
    assert one.equals(write_submission(plain, many, tmp_path / "t.csv", num_workers=2))


def test_file_names_are_those_of_the_training(hpa, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for file in (hpa / part).iterdir():
            i, c = file.stem.rsplit("_", 1)
            shutil.copy(file, tmp_path / part / f"{c}-{i}.png")
    shutil.copy(hpa / "train.csv", tmp_path)
    tables = []
    for path, options in ((hpa, {}), (tmp_path, {"pattern": "{channel}-{id}.png"})):
        dls = HPADataLoaders.from_csv(path, size=32, num_workers=0, **options)
        torch.manual_seed(0)
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(dls.vocab))), path=tmp_path)
        tables.append(write_submission(learn, path / "test", tmp_path / "s.csv"))
    assert tables[0].equals(tables[1])


def test_the_check_knows_the_depth_that_training_was_told(tmp_path):
    # int32 has no range of its own: only bits= tells, and the learner has it.
    for k in range(8):
        for c in ("a", "b"):
            (tmp_path / "train").mkdir(exist_ok=True)
            values = np.random.default_rng(k).integers(0, 4096, (8, 8)).astype(np.int32)
            tifffile.imwrite(tmp_path / "train" / f"{k}_{c}.tif", values)
    pd.DataFrame({"Id": range(8), "Target": ["x", "y"] * 4}).to_csv(tmp_path / "train.csv", index=False)
    options = {"channels": ("a", "b"), "pattern": "{id}_{channel}.tif", "size": 8, "bs": 4, "stats": None}
    dls = HPADataLoaders.from_csv(tmp_path, bits=12, num_workers=0, batch_tfms=[], **options)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 2))
    learn = Learner(dls, net, loss_func=BCEWithLogitsLossFlat(), path=tmp_path)
    table = write_submission(learn, tmp_path / "train", tmp_path / "s.csv", progress=False)
    assert list(table["Id"]) == [str(k) for k in range(8)]


# ---------------------------------------------------------------- nothing but what this run would compute


def interrupted(learn, folder, fname, **kwargs):
    """Leave two parts of eight; return the folders of parts that there are now."""
    stop = Count(stop_after=20)
    learn.add_cb(stop)
    with pytest.raises(KeyboardInterrupt):
        write_submission(learn, folder, fname, progress=False, **kwargs)
    learn.remove_cb(stop)
    return left(fname.parent, fname.name)


@pytest.mark.parametrize("damage", ["zeroed row", "zeroed", "flipped bit", "cut off", "longer", "shorter", "missing"])
def test_damaged_parts_are_predicted_anew(plain, many, tmp_path, small_parts, damage):
    whole = write_submission(plain, many, tmp_path / "whole.csv", progress=False)
    [folder] = interrupted(plain, many, tmp_path / "s.csv")
    first, second = sorted(folder.glob("[0-9]*.part"))
    data, row = first.read_bytes(), 4 * len(plain.dls.vocab)
    first.write_bytes(
        {
            "zeroed row": data[:-row] + bytes(row),
            "zeroed": bytes(len(data)),
            "flipped bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
            "cut off": data[:-row],
            "longer": data + bytes(row),
        }.get(damage, data)
    )
    if damage == "missing":
        first.unlink()
    if damage == "shorter":  # and whole in itself
        replace_file(first, lambda f: f.write(hashlib.sha256(data[32:-row]).digest() + data[32:-row]))
    counts = Count()
    plain.add_cb(counts)
    assert write_submission(plain, many, tmp_path / "s.csv", progress=False).equals(whole)
    assert counts.images == N - 8 and second.name == "000001.part"
    assert (tmp_path / "s_probs.csv").read_bytes() == (tmp_path / "whole_probs.csv").read_bytes()


def partial_tta(times):
    return functools.partial(lambda learn, dl, times: learn.get_preds(dl=dl), times=times)


class Scaled(nn.Module):
    """A network that depends on what is neither weight nor buffer."""

    def __init__(self, n):
        super().__init__()
        self.factor, self.net = 1.0, nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 32 * 32, n))

    def forward(self, x):
        return self.factor * self.net(x)


def test_parts_of_anything_else_are_named_and_removed(hpa, many, tmp_path, small_parts):
    folder = shutil.copytree(many, tmp_path / "images")
    dls = HPADataLoaders.from_csv(hpa, size=32, bs=8, num_workers=0)
    learn = Learner(dls, Scaled(len(dls.vocab)), loss_func=BCEWithLogitsLossFlat(), path=tmp_path)
    seen = set(interrupted(learn, folder, tmp_path / "s.csv"))

    def same(**kwargs):
        found = set(interrupted(learn, folder, tmp_path / "s.csv", **kwargs))
        assert found == seen

    def other(**kwargs):
        with pytest.warns(UserWarning, match=r"s\.csv\.[0-9a-f]{16}\.parts holds predictions of s\.csv by another run"):
            found = set(interrupted(learn, folder, tmp_path / "s.csv", **kwargs))
        assert len(found) == len(seen) + 1
        seen.update(found)

    same()
    other(bs=4)
    other(tta=partial_tta(times=2))
    other(tta=partial_tta(times=3))
    with pytest.warns(UserWarning, match="another run"):
        same(tta=partial_tta(times=2))
    learn.model.factor = 2.0
    other()
    learn.model.net[0].eps = 0.1
    other()
    with torch.no_grad():
        learn.model.net[2].bias[0] += 1e-6
    other()
    learn.model.net[0].running_mean += 1e-6
    other()
    learn.loss_func = nn.CrossEntropyLoss()
    other()
    learn.loss_func = nn.BCEWithLogitsLoss()  # the probabilities are those of before
    dls.valid.after_batch.fs[-1].mean += 1e-3
    other()
    files = sorted(folder.iterdir())
    os.replace(shutil.copy2(files[-1], tmp_path / "x"), files[4])  # another image under the same name
    other()
    for file in files[:4]:
        shutil.copy(file, folder / f"z{file.name}")
    other()
    with pytest.warns(UserWarning, match="another run"):
        write_submission(learn, folder, tmp_path / "s.csv", progress=False)
    assert not left(tmp_path)


def test_two_writers(plain, many, tmp_path, small_parts):
    [folder] = interrupted(plain, many, tmp_path / "s.csv")
    with FileLock(folder / "lock"):
        for options in ({}, {"bs": 4}):  # the same predictions, and others for the same file
            with pytest.raises(RuntimeError, match=r"s\.csv is being written by another process"):
                write_submission(plain, many, tmp_path / "s.csv", progress=False, **options)
        write_submission(plain, many, tmp_path / "t.csv", progress=False)
    with pytest.warns(UserWarning, match="another run"):
        write_submission(plain, many, tmp_path / "s.csv", progress=False)
    assert not left(tmp_path)


def test_a_folder_of_parts_that_others_planted(plain, many, tmp_path, small_parts):
    [folder] = interrupted(plain, many, tmp_path / "s.csv")
    secret = tmp_path / "secret"
    shutil.move(folder, secret)
    folder.symlink_to(secret)
    with pytest.raises(PermissionError, match=r"\.parts is a link, .*cannot be trusted: remove it"):
        write_submission(plain, many, tmp_path / "s.csv", progress=False)
    folder.unlink()
    shutil.copytree(secret, folder)
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="others may write to"):
        write_submission(plain, many, tmp_path / "s.csv", progress=False)
    folder.chmod(0o700)
    link = folder.with_name(f"s.csv.{'0' * 16}.parts")
    link.symlink_to(secret)  # one of another run is left alone
    write_submission(plain, many, tmp_path / "s.csv", progress=False)
    assert len(list(secret.iterdir())) == 3 and link.is_symlink() and not folder.exists()


def test_links_and_modes(plain, many, tmp_path):
    real, link = tmp_path / "deep" / "r.csv", tmp_path / "s.csv"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    for name in ("s.csv.part", "s_probs.csv.part", "s.csv.lock"):  # names that could be foreseen
        (tmp_path / name).symlink_to(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").write_text("precious")
    write_submission(plain, many, link, progress=False)
    assert link.is_symlink() and len(pd.read_csv(real)) == N and real.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "notes.txt").read_text() == "precious" and (tmp_path / "s_probs.csv").stat().st_mode & 0o600


def test_names_of_files(plain, many, tmp_path, small_parts):
    names = ("a.csv", "a.txt", "x.parts")
    assert [len(interrupted(plain, many, tmp_path / name)) for name in names] == [1, 1, 1]
    for name in names:
        write_submission(plain, many, tmp_path / name, progress=False)
    found = {f.name for f in tmp_path.iterdir()}
    assert found == {*names, "a_probs.csv", "a.txt_probs.csv", "x.parts_probs.csv"}


def test_a_missing_folder_is_made_and_a_folder_is_no_file(plain, many, tmp_path):
    table = write_submission(plain, many, tmp_path / "out" / "deep" / "s.csv", progress=False)
    assert len(pd.read_csv(tmp_path / "out" / "deep" / "s.csv")) == len(table) == N
    counts = Count()
    plain.add_cb(counts)
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        write_submission(plain, many, tmp_path / "out", progress=False)
    assert counts.images == 0


def test_ids_and_folders_inside(plain, many, tmp_path):
    table = write_submission(plain, many, tmp_path / "s.csv", progress=False)
    some = table.Id.tolist()[5:1:-1]
    found = write_submission(plain, many, tmp_path / "t.csv", ids=some, progress=False)
    assert found.Id.tolist() == some and found.Predicted.tolist() == table.Predicted.tolist()[5:1:-1]
    for k, file in enumerate(sorted(many.iterdir())):
        (tmp_path / "plates" / f"p{k // 80}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "plates" / f"p{k // 80}" / file.name)
    inside = write_submission(plain, tmp_path / "plates", tmp_path / "u.csv", subfolders=True, progress=False)
    assert inside.Id.tolist() == [f"p{k // 20}/{i}" for k, i in enumerate(table.Id)]
    assert inside.Predicted.tolist() == table.Predicted.tolist()
    two = write_submission(plain, tmp_path / "plates", tmp_path / "v.csv", ids=inside.Id[:2], progress=False)
    assert two.equals(inside[:2])
    with pytest.raises(FileNotFoundError, match="ghost_"):
        write_submission(plain, many, tmp_path / "w.csv", ids=["ghost"])
    with pytest.raises(ValueError, match="holds no id"):
        write_submission(plain, many, tmp_path / "w.csv", ids=[])
    assert write_submission(plain, many, tmp_path / "w.csv", ids=some[0], progress=False).Id.tolist() == [some[0]]


def labelled(tmp_path, hpa, labels, **options):
    """A learner on the images of `hpa`, with other labels."""
    home = shutil.copytree(hpa, tmp_path / "home")
    frame = pd.read_csv(home / "train.csv", dtype=str)
    frame["Target"] = [labels[k % len(labels)] for k in range(len(frame))]
    frame.to_csv(home / "train.csv", index=False)
    dls = HPADataLoaders.from_csv(home, size=32, bs=8, num_workers=0, **options)
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(dls.vocab))), path=tmp_path)


def test_labels_that_hold_the_delimiter(hpa, many, tmp_path):
    learn = labelled(tmp_path, hpa, ["cell wall|wall", "cell"], label_delim="|")
    with pytest.raises(ValueError, match=r"hold the delimiter \(1 in all\): 'cell wall'.*delim="):
        write_submission(learn, many, tmp_path / "s.csv", delim=" ")
    learn.export("d.pkl")
    for own in (learn, load_learner(tmp_path / "d.pkl")):  # that of its csv
        table = write_submission(own, many, tmp_path / "s.csv", thresh=0, progress=False)
        assert {frozenset(p.split("|")) for p in table.Predicted} == {frozenset(learn.dls.vocab)}
    none = write_submission(learn, many, tmp_path / "s.csv", thresh=1, at_least_one=False, progress=False)
    assert set(none.Predicted) == {""}


@pytest.mark.parametrize("loss", [CrossEntropyLossFlat, nn.CrossEntropyLoss])
def test_single_label(hpa, many, tmp_path, loss):
    learn = labelled(tmp_path, hpa, ["a b", "b", "c"], label_delim=None)
    learn.loss_func = loss()
    table = write_submission(learn, many, tmp_path / "s.csv", progress=False)
    probs = read_probs(tmp_path / "s_probs.csv")
    assert np.allclose(probs.sum(1), 1, atol=1e-5) and table.Predicted.tolist() == probs.idxmax(axis=1).tolist()
    with pytest.raises(ValueError, match=r"thresh=0.3: a single-label task takes the likeliest class"):
        write_submission(learn, many, tmp_path / "s.csv", thresh=0.3)
