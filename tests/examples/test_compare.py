"""The comparison of losses in examples/benchmarks: its arithmetic, its splits, and a tiny run of the whole."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat

from fastai_crl.callback import CRLCallback
from fastai_crl.losses.crl_loss import CRL

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import compare_stats  # noqa: E402
import compare_tasks  # noqa: E402
import compare_train  # noqa: E402


def toy_bank(n: int = 400, c: int = 6, single_label: bool = False) -> compare_tasks.Bank:
    """Features that tell long-tailed labels, apart from noise."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(c, 16))
    p = 0.6 ** np.arange(c)
    if single_label:
        y = rng.choice(c, n, p=p / p.sum())
        x = centres[y]
    else:
        y = (rng.random((n, c)) < 0.5 * p).astype(np.float32)
        x = y @ centres
    x = (x + rng.normal(size=(n, 16))).astype(np.float32)
    return compare_tasks.Bank("toy", x, y, np.arange(n) >= n * 3 // 4)


def cells_bank(montages: tuple[int, ...] = (8, 8, 5, 4, 3)) -> compare_tasks.Bank:
    """Cells of 4 features that spell their index, nine to a montage."""
    y = np.repeat(np.repeat(np.arange(5), montages), 9)
    group = np.repeat(np.arange(sum(montages)), 9)
    x = np.tile(np.arange(len(y), dtype=np.float32)[:, None], (1, 4))
    held = compare_tasks._some_montages(y, group, 0.3, np.random.default_rng(0))
    return compare_tasks.Bank("cells", x, y, held, group)


# ---- splits ----
def test_no_montage_is_on_two_sides():
    bank = cells_bank()
    bank.x = np.eye(len(bank.y), dtype=np.float32)  # a mosaic's features tell its cells
    data = compare_tasks.split(bank, 3)
    sides = {k: set(bank.group[(x > 0).any(0).numpy()]) for k, x in data.x.items()}
    assert not sides["train"] & sides["valid"] and not sides["test"] & (sides["train"] | sides["valid"])
    assert sides["test"] == set(bank.group[bank.test])
    for k, x in data.x.items():  # and each mosaic has the labels of its cells, no others
        of_cells = torch.stack([(x[:, torch.from_numpy(bank.y == c)] > 0).any(1) for c in range(5)], 1)
        assert torch.equal(of_cells, data.y[k] > 0), k


def test_the_test_images_are_those_of_every_seed_and_the_others_are_not():
    for bank in (toy_bank(), toy_bank(single_label=True), cells_bank()):
        first, second = (compare_tasks.split(bank, seed) for seed in (0, 1))
        assert torch.equal(first.x["test"], second.x["test"]) and torch.equal(first.y["test"], second.y["test"])
        assert not torch.equal(first.x["train"], second.x["train"])


def test_mosaics_of_pixels_hold_their_cells():
    x = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(1, 4, 2, 3, 3)
    tiled = compare_tasks._tile(x)
    assert tiled.shape == (1, 2, 6, 6)
    for i, (top, left) in enumerate(((0, 0), (0, 3), (3, 0), (3, 3))):
        assert np.array_equal(tiled[0, :, top : top + 3, left : left + 3], x[0, i])


def test_components_are_turned_by_known_rows_alone():
    rng = np.random.default_rng(0)
    x, known = rng.normal(size=(60, 5)) * [3, 1, 1, 1, 0.1], np.arange(60) < 40
    changed = x.copy()
    changed[~known] += 7
    a, b = (compare_tasks._components(v, known, 3) for v in (x, changed))
    np.testing.assert_allclose(a[known], b[known], atol=1e-6)
    assert a[known].std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.corrcoef(a[known].T), np.eye(3), atol=1e-5)


# ---- training ----
class Recorded:
    """A loader of the batches that the plain loop draws."""

    def __init__(self, data: compare_tasks.Split, order, steps: int):
        self.x, self.y, self.order, self.steps = data.x["train"], data.y["train"], order, steps
        self.device, self.dataset, self.n_inp, self.bs = torch.device("cpu"), [], 1, 16

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            i = torch.from_numpy(next(self.order))
            yield self.x[i], self.y[i]

    def to(self, device: torch.device) -> None:
        pass


def test_the_plain_loop_trains_as_a_learner_with_the_callback_does(monkeypatch):
    data = compare_tasks.split(toy_bank(), 0)
    options = {"criterion": "ranking", "average": "label"}
    config = compare_train.Config(alpha=0.4, crl=options, lr=1e-2, epochs=2, bs=16)
    # Without dropout and with plain gradient descent at a fixed rate, both are the same sum of gradients.
    monkeypatch.setattr(compare_train, "head", lambda d, c: torch.nn.Linear(d, c))
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr))
    monkeypatch.setattr(
        torch.optim.lr_scheduler, "OneCycleLR", lambda o, *args, **kwargs: torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    )
    plain = compare_train.train(data, config, seed=5)
    torch.manual_seed(5)
    model, steps = torch.nn.Linear(16, 6), len(data.y["train"]) // 16
    order = compare_train.batches("uniform", data.y["train"], 16, 5)
    dls = DataLoaders(Recorded(data, order, steps), Recorded(data, order, 0))
    learn = Learner(
        dls, model, BCEWithLogitsLossFlat(), opt_func=lambda p, lr: _sgd(p, lr), cbs=CRLCallback(0.4, **options)
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
    torch.testing.assert_close(plain.weight, model.weight, atol=1e-6, rtol=1e-5)
    alone = compare_train.train(data, compare_train.Config(lr=1e-2, epochs=2, bs=16), seed=5)
    assert (alone.weight - plain.weight).abs().max() > 1e-3  # the term does train


def _sgd(params, lr):
    from fastai.optimizer import SGD

    return SGD(params, lr)


def test_every_sampler_and_term_trains_and_tells_the_labels():
    data = compare_tasks.split(toy_bank(), 0)
    for sampler in ("uniform", "class_aware", "repeat_factor"):
        for alpha, options in compare.TERMS.values():
            CRL(**options)
            config = compare_train.Config(alpha=alpha, crl=options, sampler=sampler, epochs=4, bs=32)
            values = compare.run(data, config, 0, final=True)
            assert values["map"] > 0.6, (sampler, options, values)


def test_pixels_train_too():
    rng = np.random.default_rng(0)
    y = (rng.random((160, 3)) < 0.4).astype(np.float32)
    x = rng.integers(0, 60, (160, 3, 32, 32), dtype=np.uint8) + (150 * y[:, :, None, None]).astype(np.uint8)
    data = compare_tasks.split(compare_tasks.Bank("toy", x, y, np.arange(160) >= 120), 0)
    alpha, options = compare.TERMS["CRL"]
    config = compare_train.Config(alpha=alpha, crl=options, epochs=8, bs=16)
    assert compare.run(data, config, 0, final=True)["map"] > 0.9


def test_samplers_are_given_the_same_number_of_steps():
    y = torch.from_numpy(toy_bank().y)
    for sampler in ("uniform", "class_aware", "repeat_factor"):
        order = compare_train.batches(sampler, y, 32, 0)
        assert [len(next(order)) for _ in range(40)] == [32] * 40


# ---- measures and tables ----
def test_measures_of_a_worked_example():
    y = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])
    probs = np.array([[0.9, 0.6, 0.1], [0.8, 0.2, 0.1], [0.4, 0.7, 0.2], [0.1, 0.1, 0.3]])
    values = compare_train.evaluate(probs, y, torch.tensor([30.0, 10.0, 2.0]), np.array([0.3, 0.65, 0.25]))
    assert values["map"] == 1 and values["f1_tuned"] == 1
    assert values["f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3, abs=1e-5)
    assert values["recall_tail"] == 0 and values["label_count"] == "30 10 2"
    assert values["label_recall"] == "0.6667 1 0"


def test_single_label_measures_go_by_the_likeliest_class():
    probs = np.array([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.1, 0.2, 0.7]])
    values = compare_train.evaluate(probs, torch.tensor([0, 1, 1, 2]), torch.tensor([9.0, 5.0, 1.0]))
    assert values["accuracy"] == 0.75 and values["balanced"] == pytest.approx(2.5 / 3, abs=1e-5)
    assert values["recall_tail"] == 1 and values["f1"] == values["f1_tuned"]


def runs_of(gain: float) -> pd.DataFrame:
    """Six seeds of an arm without CRL, and with it better by about `gain`."""
    rows = []
    for seed in range(6):
        for crl, extra in (("none", 0.0), ("CRL", gain + 0.001 * seed)):
            values = dict.fromkeys(compare_stats.MEASURES, 0.3 + 0.02 * seed + extra)
            labels = {"label_count": "100 5", "label_ap": f"0.5 {0.2 + extra}", "label_recall": f"0.5 {0.1 + extra}"}
            key = dict(zip(compare_stats.ARM, ("features", "toy", "bce", "uniform", crl), strict=True))
            rows.append(key | {"seed": str(seed)} | values | labels)
    return pd.DataFrame(rows)


def test_differences_are_paired_by_seed():
    found = compare_stats.effects(runs_of(0.05))
    assert found["mean"].tolist() == pytest.approx([0.0525] * 4) and set(found["verdict"]) == {"better"}
    assert (found["low"] > 0.0499).all() and (found["high"] < 0.0551).all()  # seeds differ by .1, pairs by .005
    assert set(compare_stats.effects(runs_of(-0.05))["verdict"]) == {"worse"}
    assert set(compare_stats.effects(runs_of(-0.0025))["verdict"]) == {"level"}


def test_gains_by_label():
    found = compare_stats.gains(runs_of(0.05), "toy", "bce", "label_ap", "CRL")
    assert found["count"].tolist() == [100, 5] and found["gain"].tolist() == pytest.approx([0, 0.0525])


# ---- the whole ----
def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    bank, calls = toy_bank(), []

    def once(data, config, seed, final):
        calls.append((config.lr, seed, final))
        return {"map": config.lr, "f1": 0.0}

    monkeypatch.setattr(compare, "run", once)
    for _ in range(2):
        runs = compare.Runs(tmp_path / "runs.csv")
        compare.run_arm(
            lambda seed: compare_tasks.split(bank, seed),
            {},
            ("features", "toy", "bce", "uniform", "none"),
            [0.1, 0.2],
            2,
            1,
            runs,
        )
    tuned = [(lr, compare.FIRST_TUNING_SEED, False) for lr in (0.1, 0.2)]
    assert calls == [*tuned, (0.2, 0, True), (0.2, 1, True)]  # the better learning rate; the second time nothing
    assert len(runs.rows) == 4


def test_rows_of_other_options_are_not_taken_for_these(tmp_path):
    for _ in range(2):
        compare.keep_options(tmp_path / "options.json", {"epochs": 2, "terms": [["CRL", [0.5, {"k": 3}]]]})
    with pytest.raises(ValueError, match=r"'epochs': 2.*choose another --out"):
        compare.keep_options(tmp_path / "options.json", {"epochs": 3, "terms": [["CRL", [0.5, {"k": 3}]]]})


def test_arms():
    found = compare.arms(True, None, ["uniform", "memory"])
    assert found[:4] == [("ce", "uniform", c) for c in ("none", "CRL", "paper")] + [("ce", "memory", "paper")]
    assert found[4:6] == [("class_balanced", "uniform", "none"), ("class_balanced", "uniform", "CRL")]
    assert len(found) == 4 + 2 * 3 and compare.arms(False, "ce", ["uniform"]) == []
    with pytest.raises(ValueError, match="bcee"):
        compare.check_names("asl,bcee", compare.MULTI)


@pytest.mark.slow
def test_a_tiny_comparison_from_the_command_line(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    bank = toy_bank()
    np.savez(cache / "synthetic_features.npz", x=bank.x, y=bank.y, test=bank.test)
    command = [sys.executable, str(FOLDER / "compare.py"), "--out", str(tmp_path), "--cache", str(cache)]
    command += ["--data", str(tmp_path / "nothing"), "--bases", "bce", "--samplers", "uniform,memory"]
    command += ["--seeds", "2", "--tuning", "1", "--lrs", "0.01", "--epochs", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for task in ("cells", "digits", "cifar"):
        assert f"{task}: skipped" in done.stdout
    with open(tmp_path / "runs.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    arms = [("uniform", "none"), ("uniform", "CRL"), ("uniform", "paper"), ("memory", "paper")]
    assert [(r["sampler"], r["crl"]) for r in rows] == [arm for arm in arms for _ in range(3)]
    assert [r["stage"] for r in rows[:3]] == ["tune", "test", "test"]
    table = (tmp_path / "table.md").read_text()
    assert "synthetic" in table and "better" in table and str(tmp_path) not in table
    assert (tmp_path / "gains.png").stat().st_size > 10_000


def test_the_real_cells_are_split_by_montage(shared):
    bank = compare_tasks._cells(shared, Path(), 8)
    assert bank.x.shape == (809, 4, 8, 8) and np.bincount(bank.y).tolist() == [324, 314, 90, 45, 36]
    assert not set(bank.group[bank.test]) & set(bank.group[~bank.test])
    assert set(bank.y[bank.test]) == set(bank.y[~bank.test]) == set(range(5))
