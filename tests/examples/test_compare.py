"""The comparison of losses in examples/benchmarks: its splits, its training, its measures, and its committed tables.

Rows, intervals and pictures are those of the package, and tested there.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import SGD

from fastai_crl.callback import CRLCallback
from fastai_crl.losses import CRL, make_loss

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import compare_measures  # noqa: E402
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
    config = compare_train.Config(term="ranking_quarter", lr=1e-2, epochs=2, bs=16)
    # Without dropout and with plain gradient descent at a fixed rate, both are the same sum of gradients.
    monkeypatch.setattr(compare_train, "head", lambda d, c: torch.nn.Sequential(torch.nn.Linear(d, c)))
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr))
    monkeypatch.setattr(
        torch.optim.lr_scheduler, "OneCycleLR", lambda o, *args, **kwargs: torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    )
    plain = compare_train.train(data, config, seed=5)[-1]
    torch.manual_seed(5)
    model, steps = torch.nn.Linear(16, 6), len(data.y["train"]) // 16
    order = compare_train.batches(len(data.y["train"]), 16, 5)
    dls = DataLoaders(Recorded(data, order, steps), Recorded(data, order, 0))
    callback = CRLCallback(criterion="ranking")
    learn = Learner(dls, model, BCEWithLogitsLossFlat(), opt_func=lambda p, lr: SGD(p, lr), cbs=callback)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
    torch.testing.assert_close(plain.weight, model.weight, atol=1e-6, rtol=1e-5)
    alone = compare_train.train(data, compare_train.Config(lr=1e-2, epochs=2, bs=16), seed=5)[-1]
    assert (alone.weight - plain.weight).abs().max() > 1e-3  # the term does train


def test_weighted_bce_starts_at_the_constant_that_costs_it_the_least(monkeypatch):
    data = compare_tasks.split(toy_bank(), 0)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    start = compare_train.train(data, compare_train.Config("weighted_bce_prior", epochs=1, bs=32), 0)[-1].bias.detach()
    constant = start.clone().requires_grad_()
    loss = make_loss("weighted_bce", data.counts(), len(data.y["train"]))
    loss(constant.expand(len(data.y["train"]), -1), data.y["train"]).backward()
    torch.testing.assert_close(constant.grad, torch.zeros_like(start), atol=1e-6, rtol=0)


def test_terms_start_and_stop():
    names = ("ranking", "ranking_half", "ranking_quarter", "ranking_early", "ranking_late")
    found = {k: [compare_train.TERMS[k].alpha(0.4, done) for done in (0.0, 0.4, 0.5, 0.9)] for k in names}
    assert found["ranking"] == [0, 0.4, 0.4, 0.4] and found["ranking_half"] == [0, 0.2, 0.2, 0.2]
    assert found["ranking_quarter"] == [0, 0.25, 0.25, 0.25] and found["ranking_early"] == [0, 0.25, 0, 0]
    assert found["ranking_late"] == [0, 0, 0, 0.25]
    assert compare_train.TERMS["ranking_quarter"].alpha(0.1, 0.9) == 0.1  # a smaller Ω stays


@pytest.mark.parametrize("single_label", [False, True])
def test_easy_anchors_are_those_of_the_published_term_that_are_sure(single_label):
    rng = torch.Generator().manual_seed(0)
    logits, targets = 2 * torch.randn(40, 6, generator=rng), torch.rand(40, 6, generator=rng).lt(0.15).float()
    targets = targets.argmax(1) if single_label else targets
    logits.requires_grad_()
    every = compare_train.easy_anchors(logits, targets, 0.0, k=3)
    published = CRL(k=3).loss_and_triplets(logits, targets)
    torch.testing.assert_close(every.loss, published.loss)
    assert every.triplets.sum() == published.triplets.sum() > 0
    torch.testing.assert_close(*(torch.autograd.grad(found.loss, logits)[0] for found in (every, published)))
    sure = compare_train.easy_anchors(logits, targets, 0.4, k=3)
    assert 0 < sure.triplets.sum() < every.triplets.sum()
    none = compare_train.easy_anchors(logits, targets, 1.0)
    assert none.loss == 0 == none.triplets.sum()


def test_geometry_of_a_worked_example():
    embedding = np.array([[1.0, 0], [0, 2], [3, 0], [-1, 0]])
    y = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]])
    found = compare_measures.geometry(embedding, y, np.array([30, 20, 2]))  # the third label is the tail
    assert found["within"] == pytest.approx(2) and found["outside"] == pytest.approx((0 + 1 + 2 + 1) / 4)
    y[3, 2] = 0  # one sample alone has no distance to its own
    assert np.isnan(compare_measures.geometry(embedding, y, np.array([30, 20, 2]))["within"])


@pytest.mark.parametrize("single_label", [False, True])
def test_a_network_tells_the_labels_and_every_measure_says_so(single_label, tmp_path):
    data = compare_tasks.split(toy_bank(single_label=single_label), 0)
    config = compare_train.Config("logit_adjusted", "ranking_adjusted_quarter", epochs=4, bs=32)
    values, kept = compare.run(data, config, 0, "test", tmp_path, "a")
    missing = {k for k in compare.VALUES if not np.isfinite(values.get(k, np.nan))}
    assert missing == ({"f1_tuned"} if single_label else set())
    assert min(values[k] for k in ("map", "probe", "knn")) > 0.6 and kept["test_logits"].shape == (100, 6)
    trace = pd.read_csv(tmp_path / "traces.csv")
    assert (
        set(trace["run"]) == {"a"}
        and trace["epoch"].tolist() == [1, 2, 3, 4]
        and (trace["outside"] > trace["within"]).all()
    )


# ---- the whole ----
def test_what_informs_most_comes_first():
    losses = {single: text.split(",") for single, text in ((False, compare.MULTI), (True, compare.SINGLE))}
    found = compare.plan({"a": False, "b": True}, losses, compare.DEFAULT_TERMS.split(","), [1.0, 2.0, 3.0], 5, 3)
    assert [job.stage for job in found[:16]] == ["tune"] * 15 + ["test"]  # three losses of one task, two of the other
    assert {job.seed for job in found[15:39]} == {0} and len(set(found)) == len(found)
    table = pd.DataFrame(found)
    counts = table[(table["stage"] == "test") & (table["task"] == "a")].groupby(["base", "crl"]).size()
    assert counts["bce", "ranking"] == 5 and counts["weighted_bce", "none"] == counts["bce", "instance"] == 3
    assert ("bce", "ranking_adjusted") not in counts.index  # nothing to adjust


def test_it_goes_on_with_what_is_missing_and_makes_tables_and_pictures(tmp_path, capsys):
    bank, cache, out = toy_bank(), tmp_path / "cache", tmp_path / "out"
    cache.mkdir()
    np.savez(cache / "drawn_features.npz", x=bank.x, y=bank.y, test=bank.test)
    options = {"data": str(tmp_path / "nothing"), "cache": str(cache), "out": str(out), "regime": "features"}
    options |= {"epochs": 2, "bases": "bce,bce_prior", "lrs": "0.01,0.03", "terms": "none,ranking_quarter", "fewer": 1}
    threads = torch.get_num_threads()
    for seeds in (1, 3):
        compare.main(seeds=seeds, **options)
    torch.set_num_threads(threads)
    assert "cells: skipped, hpa_cells/train.csv is not in the data folder" in capsys.readouterr().out
    rows = pd.read_csv(out / "runs.csv")
    assert len(rows) == 4 + 3 * 4 + 2 and not rows.duplicated(list(compare.KEY)).any()  # two arms at the other rate
    chosen = rows[rows["stage"] == "tune"].sort_values("valid_map").groupby("base")["lr"].last()
    assert (rows[rows["stage"] == "test"].groupby("base")["lr"].unique().str[0] == chosen).all()
    assert "## drawn (features)" in (out / "table.md").read_text()
    assert all((out / f"{name}.png").stat().st_size > 5_000 for name in ("differences", "geometry"))
    with pytest.raises(ValueError, match="epochs was 2, and is 3"):
        compare.main(**(options | {"epochs": 3}))
    with pytest.raises(ValueError, match="bcee"):
        compare.main(**(options | {"bases": "bcee"}))


@pytest.mark.parametrize("name", ["features", "pixels", "pixels_256"])
def test_committed_tables_are_made_of_committed_rows(name):
    folder = FOLDER / "results" / name
    table = compare.tables(compare.runs_in(folder).frame())
    assert table == (folder / "table.md").read_text(encoding="utf-8")
    assert re.search(r"^\| bce_prior \| uniform \| ranking_quarter \|", table, re.M)
