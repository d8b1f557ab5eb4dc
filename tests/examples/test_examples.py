"""The example script, run as a user runs it, and the benchmark of mining."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from PIL import Image

from fastai_crl.hpa import HPA_LABELS
from fastai_crl.images.image_set import image_ids
from fastai_crl.labels import shown_names
from fastai_crl.predict.submission import write_submission

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "train_hpa.py"
PICTURES = ["batch.png", "results.png", "training.png"]
OPTIONS = ("--n", 100, "--epochs", 2, "--size", 32, "--bs", 16, "--seed", 1)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # quicker for so small images, and on busy cores
COLUMNS = ["label", "support", "train", "group", "precision", "recall", "F1", "balanced", "threshold", "AP", "AUROC"]
COLUMNS += ["ECE", "triplets"]


def run_script(folder: Path, *args: object) -> str:
    """Run the script in `folder`, as from a job without a terminal, and return what it printed."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(script: Path) -> ModuleType:
    """Import a script, as the worker processes of a data loader do."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_pictures(out: Path, names: list[str] = PICTURES) -> None:
    for name in names:
        with Image.open(out / name) as im:
            pixels = np.asarray(im.convert("RGB"))
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 20, name


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A run on synthetic data: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    return folder, run_script(folder, *OPTIONS)


@pytest.fixture(scope="module")
def plain(synthetic):
    """A second run, without rectification, beside it: what it printed."""
    return run_script(synthetic[0], *OPTIONS, "--alpha", 0)


@pytest.mark.slow
def test_the_script_prints_both_tables_and_nothing_else(synthetic):
    folder, printed = synthetic
    assert "\r" not in printed and "█" not in printed and "\x1b" not in printed
    assert str(folder) not in printed
    lines = printed.splitlines()
    assert lines[0].startswith("SYNTHETIC")
    header = next(line.split() for line in lines if "valid_loss" in line)
    assert header[:3] == ["epoch", "train_loss", "valid_loss"] and header[-1] == "time"
    assert {"macro_f1", "mean_ap", "crl_alpha", "crl_loss", "crl_triplets", "crl_labels"} <= set(header)
    epochs = [line.split() for line in lines if line.split()[:1] in (["0"], ["1"])]
    assert [e[0] for e in epochs] == ["0", "1"] and all(len(e) == len(header) for e in epochs)
    assert all(any(line.startswith(f"{name}  ") for line in lines) for name in HPA_LABELS)
    pictures = [line.split()[0] for line in lines[lines.index("Pictures:") + 1 : -1]]
    assert pictures == [f"runs/hpa/{name}" for name in PICTURES] and all((folder / p).is_file() for p in pictures)
    assert lines[-1].startswith("Next, ") and lines[-1].endswith("--seed 1 --alpha 0")


@pytest.mark.slow
def test_the_script_saves_tables_that_agree(synthetic):
    folder, printed = synthetic
    out = folder / "runs" / "hpa"
    history, labels = pd.read_csv(out / "history.csv"), pd.read_csv(out / "labels.csv")
    assert history["epoch"].tolist() == [0, 1] and history["time"].notna().all()
    assert np.isfinite(history[["train_loss", "valid_loss"]]).all(axis=None)
    assert labels.columns.tolist() == COLUMNS and sorted(labels["label"]) == sorted(HPA_LABELS)
    assert labels["train"].is_monotonic_decreasing and labels["triplets"].sum() == history["crl_triplets"].sum()
    assert f"{history['valid_loss'].iloc[-1]:.4f}" in printed
    (data,) = (folder / "data" / "synthetic_hpa").iterdir()
    wanted = pd.read_csv(data / "train.csv", dtype=str)["Target"].str.split().explode().astype(int).value_counts()
    found = labels.set_index("label")[["train", "support"]].sum(axis=1)
    assert all(found[HPA_LABELS[c]] == n for c, n in wanted.items())
    learn = load_learner(out / "learner.pkl")
    by_name = dict(zip(shown_names(learn.dls, learn.dls.c), learn.thresholds, strict=True))
    assert labels["threshold"].tolist() == pytest.approx([by_name[label] for label in labels["label"]])
    assert history["mean_ap"].iloc[-1] == pytest.approx(labels["AP"].mean())


@pytest.mark.slow
def test_the_script_saves_pictures(synthetic):
    check_pictures(synthetic[0] / "runs" / "hpa")


@pytest.mark.slow
def test_a_run_without_rectification_is_compared(synthetic, plain):
    runs = synthetic[0] / "runs"
    frames = [pd.read_csv(runs / name / "labels.csv", index_col="label") for name in ("hpa", "hpa_plain")]
    assert (frames[1]["triplets"] == 0).all()
    assert frames[0][["train", "support"]].equals(frames[1][["train", "support"]])
    history = pd.read_csv(runs / "hpa_plain" / "history.csv")
    assert len(history) == 2 and (history["crl_alpha"] == 0).all()
    lines = plain.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Labels gained most and lost most"))
    header, rows = (
        lines[start + 1].split(),
        [re.split(r"\s{2,}", line.strip()) for line in lines[start + 2 : start + 12]],
    )
    gains = pd.Series({row[0]: float(row[1 + header.index("AP_gain")]) for row in rows})
    wanted = (frames[0]["AP"] - frames[1]["AP"]).dropna().sort_values(ascending=False)
    assert len(gains) == 10 and gains.is_monotonic_decreasing
    assert gains.to_numpy() == pytest.approx(np.r_[wanted[:5], wanted[-5:]], abs=6e-4)
    assert gains.to_numpy() == pytest.approx(wanted[gains.index].to_numpy(), abs=6e-4)
    saved = [np.load(runs / name / "validation.npz") for name in ("hpa", "hpa_plain")]
    rare = np.argsort(saved[0]["counts"], kind="stable")[:14]
    found = [(a["targets"].astype(bool) & (a["probs"] > a["thresholds"]))[:, rare] for a in saved]
    more, less = (found[0] & ~found[1]).sum(), (found[1] & ~found[0]).sum()
    assert f"{more} with the rectification, {less} without" in plain
    check_pictures(runs / "hpa", [*PICTURES, "gain.png", *["found.png"] * bool(more)])
    check_pictures(runs / "hpa_plain", PICTURES)
    assert "runs/hpa/gain.png" in plain and lines[-1].startswith("Next, your own images")


@pytest.mark.slow
def test_the_exported_learner_makes_the_submission_again(synthetic, tmp_path):
    folder = synthetic[0]
    out = folder / "runs" / "hpa"
    (data,) = (folder / "data" / "synthetic_hpa").iterdir()
    submission = pd.read_csv(out / "submission.csv", dtype=str)
    assert submission.columns.tolist() == ["Id", "Predicted"]
    assert submission["Id"].tolist() == list(image_ids(data / "test")) and len(submission) == 10
    assert all(0 <= int(c) < 28 for row in submission["Predicted"] for c in row.split())
    learn = load_learner(out / "learner.pkl")
    with learn.no_bar():
        again = write_submission(learn, data / "test", tmp_path / "again.csv")
    assert again.equals(submission)


@pytest.mark.slow
def test_the_script_on_real_cells_keeps_groups_together(shared, tmp_path):
    real = shared / "hpa_cells"
    table = pd.read_csv(real / "train.csv", dtype=str)
    kept = table["Montage"].isin(table["Montage"].drop_duplicates()[::3])
    data = tmp_path / "cells"
    data.mkdir()
    (data / "train").symlink_to(real / "train")
    table[kept].to_csv(data / "train.csv", index=False)
    args = ("--path", data, "--group_col", "Montage", "--size", 32, "--epochs", 1, "--bs", 32, "--out", "out")
    printed = run_script(tmp_path, *args)
    assert "SYNTHETIC" not in printed
    ids = pd.read_csv(tmp_path / "out" / "submission.csv", dtype=str)["Id"]  # no test folder: the validation ids
    valid = table["Id"].isin(ids)
    assert 0 < valid.sum() == len(ids) < kept.sum()
    assert not set(table["Montage"][valid]) & set(table["Montage"][kept & ~valid])
    labels = pd.read_csv(tmp_path / "out" / "labels.csv")
    assert set(labels["label"]) <= set(HPA_LABELS) and len(labels) > 1
    check_pictures(tmp_path / "out")


def test_importing_the_script_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load(SCRIPT)  # as the worker processes of a data loader do
    assert callable(module.main) and not list(tmp_path.iterdir())


def test_history_of_a_training_in_two_phases(tmp_path):
    file = tmp_path / "history.csv"
    file.write_text("epoch,loss,time\n0,0.5,00:01\nepoch,loss,time\n0,0.25,00:02\n1,0.125,00:03\n")
    module = load(SCRIPT)
    history = module.read_history(file)
    assert history["epoch"].tolist() == [0, 1, 2] and history["loss"].tolist() == [0.5, 0.25, 0.125]
    assert history.equals(pd.read_csv(file))


@pytest.fixture(scope="module")
def mining():
    return load(EXAMPLES / "benchmarks" / "mining.py")


@pytest.mark.parametrize("n", [8, 64, 300])
def test_the_rivals_of_the_mining_benchmark_compute_the_same(mining, n):
    logits, targets = mining.batch(n, "cpu", seed=n)
    logits.requires_grad_()
    expected = mining.CRL(7)(logits, targets)
    assert (expected > 0) == (n > 8)  # the smallest has no triplet
    for rival in (mining.loop, mining.lean_loop, mining.dense):
        found = rival(logits, targets, 7)
        found = found if torch.is_tensor(found) else logits.sum() * found
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected)), rtol=1e-4, atol=1e-7
        )


def test_the_peak_of_memory_is_that_of_the_step(mining):
    x, y = torch.zeros(1000, 100), torch.zeros(1000, 100)
    assert 1.9 * x.nbytes < mining.peak_bytes(lambda x, y: (x * 2).exp().sum(), x, y) < 6 * x.nbytes
