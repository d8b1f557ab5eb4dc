"""The comparison of losses in examples/benchmarks: its arithmetic, its splits, and tiny runs of the whole."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from PIL import Image
from sklearn.linear_model import LogisticRegression

from drawn_cells import make_hpa
from fastai_crl.callback import CRLCallback
from fastai_crl.evaluate.metrics import mean_ap
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.losses import CRL, make_loss

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import compare_measures  # noqa: E402
import compare_own  # noqa: E402
import compare_plots  # noqa: E402
import compare_rows  # noqa: E402
import compare_stats  # noqa: E402
import compare_tasks  # noqa: E402
import compare_terms  # noqa: E402
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
    order = compare_train.batches("uniform", data.y["train"], 16, 5)
    dls = DataLoaders(Recorded(data, order, steps), Recorded(data, order, 0))
    callback = CRLCallback(criterion="ranking")
    learn = Learner(dls, model, BCEWithLogitsLossFlat(), opt_func=lambda p, lr: _sgd(p, lr), cbs=callback)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
    torch.testing.assert_close(plain.weight, model.weight, atol=1e-6, rtol=1e-5)
    alone = compare_train.train(data, compare_train.Config(lr=1e-2, epochs=2, bs=16), seed=5)[-1]
    assert (alone.weight - plain.weight).abs().max() > 1e-3  # the term does train


def _sgd(params, lr):
    from fastai.optimizer import SGD

    return SGD(params, lr)


@pytest.mark.slow
@pytest.mark.parametrize("single_label", [False, True])
def test_every_arm_trains_and_tells_the_labels(single_label):
    data = compare_tasks.split(toy_bank(single_label=single_label), 0)
    bases = compare.SINGLE if single_label else compare.MULTI
    for base in bases.split(","):
        for term in compare_terms.TERMS:
            config = compare_train.Config(base, term, epochs=4, bs=32)
            values = compare.run(data, config, 0, "test")
            assert values["map"] > 0.6 and values["probe"] > 0.6 and values["knn"] > 0.6, (base, term, values)
            missing = set(compare_rows.VALUES) - {k for k in compare_rows.VALUES if np.isfinite(values.get(k, np.nan))}
            assert missing == ({"f1_tuned"} if single_label else set()), (base, term)


def test_samplers_train():
    data = compare_tasks.split(toy_bank(), 0)
    for sampler in compare.SAMPLERS:
        config = compare_train.Config(term="ranking", sampler=sampler, epochs=4, bs=32)
        assert compare.run(data, config, 0, "test")["map"] > 0.6, sampler


def test_adjusted_logits_are_what_the_term_sees(monkeypatch):
    data, made, make = compare_tasks.split(toy_bank(), 0), [], compare_terms.CRL
    monkeypatch.setattr(compare_terms, "CRL", lambda **options: made.append(options) or make(**options))
    for term in ("ranking", "ranking_adjusted"):
        compare_train.train(data, compare_train.Config("logit_adjusted", term, epochs=1, bs=64), 0)
    shift = make_loss("logit_adjusted", data.counts(), len(data.y["train"])).shift
    assert made[0]["shift"] is None and torch.equal(made[1]["shift"], shift)


def test_a_network_that_starts_at_the_frequencies_keeps_its_start():
    data = compare_tasks.split(toy_bank(), 0)
    n, epochs = len(data.y["train"]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: epochs.append(self.param_groups))
        model = compare_train.train(data, compare_train.Config("bce_prior", epochs=1, bs=32), 0)
    torch.testing.assert_close(model[-1].bias.detach(), (data.counts() / n).logit())
    decayed, kept = epochs[0]
    assert kept["params"][0] is model[-1].bias and kept["weight_decay"] == 0 < decayed["weight_decay"]
    assert len(decayed["params"]) + 1 == len(list(model.parameters()))


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
    found = {k: [compare_terms.TERMS[k].alpha(0.4, done) for done in (0.0, 0.4, 0.5, 0.9)] for k in names}
    assert found["ranking"] == [0, 0.4, 0.4, 0.4] and found["ranking_half"] == [0, 0.2, 0.2, 0.2]
    assert found["ranking_quarter"] == [0, 0.25, 0.25, 0.25] and found["ranking_early"] == [0, 0.25, 0, 0]
    assert found["ranking_late"] == [0, 0, 0, 0.25]
    assert compare_terms.TERMS["ranking_quarter"].alpha(0.1, 0.9) == 0.1  # a smaller Ω stays


@pytest.mark.parametrize("single_label", [False, True])
def test_easy_anchors_are_those_of_the_published_term_that_are_sure(single_label):
    rng = torch.Generator().manual_seed(0)
    logits, targets = 2 * torch.randn(40, 6, generator=rng), torch.rand(40, 6, generator=rng).lt(0.15).float()
    targets = targets.argmax(1) if single_label else targets
    logits.requires_grad_()
    every = compare_terms.easy_anchors(logits, targets, 0.0, k=3)
    published = CRL(k=3).loss_and_triplets(logits, targets)
    torch.testing.assert_close(every.loss, published.loss)
    assert every.triplets.sum() == published.triplets.sum() > 0
    torch.testing.assert_close(*(torch.autograd.grad(found.loss, logits)[0] for found in (every, published)))
    sure = compare_terms.easy_anchors(logits, targets, 0.4, k=3)
    assert 0 < sure.triplets.sum() < every.triplets.sum()
    none = compare_terms.easy_anchors(logits, targets, 1.0)
    assert none.loss == 0 == none.triplets.sum()


def test_easy_anchors_by_hand():
    p = torch.tensor([[0.95], [0.2], [0.4], [0.1], [0.3], [0.3]])
    targets = torch.tensor([[1.0], [1], [0], [0], [0], [0]])
    found = compare_terms.easy_anchors(p.logit(), targets, 0.9, k=2)
    # one anchor, .95; its hard positive .2, hard negatives .4 and .3: it drops out, m - (.2 - .4) and m - (.2 - .3)
    torch.testing.assert_close(found.loss, torch.tensor((0.7 + 0.6) / 2))


@pytest.mark.parametrize("bf16", [False, True])
def test_pixels_train_too(tmp_path, bf16):
    rng = np.random.default_rng(0)
    y = (rng.random((160, 3)) < 0.4).astype(np.float32)
    x = rng.integers(0, 60, (160, 3, 32, 32), dtype=np.uint8) + (150 * y[:, :, None, None]).astype(np.uint8)
    data = compare_tasks.split(compare_tasks.Bank("toy", x, y, np.arange(160) >= 120), 0)
    config = compare_train.Config(term="ranking", epochs=8, bs=16, width=8, flips="hv", bf16=bf16)
    assert compare.run(data, config, 0, "test", tmp_path, "toy-bce-uniform-ranking")["map"] > 0.9
    with np.load(tmp_path / "outputs" / "toy-bce-uniform-ranking.npz") as kept:
        assert kept["test_logits"].shape == (40, 3) and kept["train_embedding"].shape == (90, 32)
        last = compare_measures.geometry(
            kept["valid_embedding"].astype(float), data.y["valid"].numpy(), data.counts().numpy()
        )
    trace = pd.read_csv(tmp_path / "traces" / "toy-bce-uniform-ranking.csv")
    assert trace["epoch"].tolist() == list(range(1, 9))
    assert trace.iloc[-1][["within", "outside"]].to_dict() == pytest.approx(last, abs=2e-3)
    assert last["outside"] > 1.5 * last["within"]  # the label's images have come together


def test_images_are_shifted_and_flipped_whole():
    x = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)
    plain, seen = x[0, 0], set()
    for image in compare_train.augment(x, "hv", np.random.default_rng(0))[:, 0]:
        options = {}
        for flips in ((), (1,), (0,), (0, 1)):
            for top in (-1, 0, 1):
                for left in (-1, 0, 1):
                    moved = torch.zeros(10, 10, dtype=torch.uint8)
                    moved[1:9, 1:9] = plain
                    moved = moved[1 + top : 9 + top, 1 + left : 9 + left]
                    options[(flips, top, left)] = moved.flip(flips) if flips else moved
        found = [k for k, v in options.items() if torch.equal(v, image)]
        assert len(found) == 1
        seen.add(found[0])
    assert {flips for flips, *_ in seen} == {(), (0,), (1,), (0, 1)} and len({k[1:] for k in seen}) == 9


def test_samplers_are_given_the_same_number_of_steps():
    y = torch.from_numpy(toy_bank().y)
    for sampler in ("uniform", "class_aware", "repeat_factor"):
        order = compare_train.batches(sampler, y, 32, 0)
        assert [len(next(order)) for _ in range(40)] == [32] * 40


# ---- measures and tables ----
def plain_ap(scores: np.ndarray, true: np.ndarray) -> float:
    """Mean, over the positives, of the precision at their rank."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    hits, precisions = 0, []
    for rank, i in enumerate(order, 1):
        if true[i]:
            hits += 1
            precisions.append(hits / rank)
    return sum(precisions) / len(precisions)


def plain_f1(chosen: np.ndarray, true: np.ndarray) -> float:
    scores = []
    for c in range(true.shape[1]):
        tp = sum(bool(a and b) for a, b in zip(chosen[:, c], true[:, c], strict=True))
        wrong = sum(bool(a) != bool(b) for a, b in zip(chosen[:, c], true[:, c], strict=True))
        scores.append(2 * tp / (2 * tp + wrong))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("single_label", [False, True])
def test_columns_are_what_plain_computation_gives(single_label):
    data = compare_tasks.split(toy_bank(single_label=single_label), 0)
    y, counts, n = {k: v.numpy() for k, v in data.y.items()}, data.counts().numpy(), len(data.y["train"])
    has = {k: np.eye(6)[v] if single_label else v for k, v in y.items()}
    rng = np.random.default_rng(1)
    common = np.log(counts / n) if single_label else np.log(counts / (n - counts))
    found = {
        k: compare_train.Outputs(3 * v - 1.5 - 0.8 * common + rng.normal(0, 1.5, v.shape), data.x[k].numpy())
        for k, v in has.items()
    }
    values = compare_measures.evaluate(found, y, counts)

    def decided(logits: np.ndarray) -> np.ndarray:
        return np.eye(6)[logits.argmax(1)] > 0 if single_label else logits > 0

    logits, true = found["test"].logits, has["test"] > 0.5
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if single_label else logits
    aps = [plain_ap(scores[:, c], true[:, c]) for c in range(6)]
    assert values["map"] == pytest.approx(np.mean(aps)) and values["map_tail"] == pytest.approx(np.mean(aps[4:]))
    assert counts.argsort().tolist()[:2] in ([4, 5], [5, 4])
    assert values["f1"] == pytest.approx(plain_f1(decided(logits), true))
    on_valid = [
        (plain_f1(decided(found["valid"].logits + s * common), has["valid"] > 0.5), -abs(s), s)
        for s in np.linspace(-3, 3, 121)
    ]
    best, _, shift = max((round(f1, 9), a, s) for f1, a, s in on_valid)
    assert values["shift"] == pytest.approx(shift) and values["valid_f1_shift"] == pytest.approx(best)
    assert shift > 0.3  # the logits were made as if labels were nearly as common as each other
    chosen = decided(logits + shift * common)
    assert values["f1_shift"] == pytest.approx(plain_f1(chosen, true)) and values["f1_shift"] != values["f1"]
    recalls = [(chosen[:, c] & true[:, c]).sum() / true[:, c].sum() for c in (4, 5)]
    assert values["tail_recall"] == pytest.approx(np.mean(recalls))
    if not single_label:
        assert values["f1_tuned"] > values["f1"]


def test_the_probe_is_one_balanced_classifier_for_each_label():
    data = compare_tasks.split(toy_bank(), 0)
    (train_x, test_x), (train_y, test_y) = ([v[k].numpy() for k in ("train", "test")] for v in (data.x, data.y))
    mean, std = train_x.mean(0), train_x.std(0)
    aps = []
    for c in range(6):
        model = LogisticRegression(class_weight="balanced", max_iter=300).fit((train_x - mean) / std, train_y[:, c])
        aps.append(plain_ap(model.decision_function((test_x - mean) / std), test_y[:, c]))
    assert compare_measures.probe(train_x, train_y, test_x, test_y) == pytest.approx(np.mean(aps), abs=2e-3)


@pytest.mark.parametrize("single_label", [False, True])
def test_neighbours_weigh_as_much_as_they_are_similar(single_label):
    data = compare_tasks.split(toy_bank(single_label=single_label), 0)
    (train_x, test_x), (train_y, test_y) = ([v[k].numpy() for k in ("train", "test")] for v in (data.x, data.y))
    has = np.eye(6)[train_y] if single_label else train_y
    scores = np.zeros((len(test_x), 6))
    for i, x in enumerate(test_x):
        cosine = [float(x @ t / np.linalg.norm(x) / np.linalg.norm(t)) for t in train_x]
        for j in sorted(range(len(train_x)), key=lambda j: -cosine[j])[:10]:
            scores[i] += max(cosine[j], 0) * has[j]
        scores[i] /= sum(max(c, 0) for c in sorted(cosine)[-10:])
    if single_label:
        expected = np.mean([(scores[test_y == c].argmax(1) == c).mean() for c in np.unique(test_y)])
    else:
        expected = mean_ap(scores.round(6), test_y)
    assert compare_measures.knn(train_x, train_y, test_x, test_y) == pytest.approx(expected, abs=1e-3)


def test_geometry_of_a_worked_example():
    embedding = np.array([[1.0, 0], [0, 2], [3, 0], [-1, 0]])
    y = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]])
    found = compare_measures.geometry(embedding, y, np.array([30, 20, 2]))  # the third label is the tail
    assert found["within"] == pytest.approx(2) and found["outside"] == pytest.approx((0 + 1 + 2 + 1) / 4)
    y[3, 2] = 0  # one sample alone has no distance to its own
    assert np.isnan(compare_measures.geometry(embedding, y, np.array([30, 20, 2]))["within"])


def runs_of(gain: float) -> pd.DataFrame:
    """Six seeds of an arm without CRL, and with it better by about `gain`."""
    rows = []
    for seed in range(6):
        for crl, extra in (("none", 0.0), ("ranking", gain + 0.001 * seed)):
            values = dict.fromkeys(compare_stats.MEASURES, 0.3 + 0.02 * seed + extra)
            labels = {"label_count": "100 5", "label_ap": f"0.5 {0.2 + extra}", "label_recall": f"0.5 {0.1 + extra}"}
            key = dict(zip(compare_stats.ARM, ("features", "toy", "bce", "uniform", crl), strict=True))
            rows.append(key | {"seed": str(seed)} | values | labels)
    return pd.DataFrame(rows)


def test_differences_are_paired_by_seed():
    found = compare_stats.effects(runs_of(0.05))
    assert found["mean"].tolist() == pytest.approx([0.0525] * len(compare_stats.MEASURES)) and set(
        found["verdict"]
    ) == {"better"}
    assert (found["low"] > 0.0499).all() and (found["high"] < 0.0551).all()  # seeds differ by .1, pairs by .005
    assert set(compare_stats.effects(runs_of(-0.05))["verdict"]) == {"worse"}
    assert set(compare_stats.effects(runs_of(-0.0025))["verdict"]) == {"level"}


def test_against_the_default_of_the_learner():
    runs = runs_of(0.05)
    started = runs[runs["crl"] == "ranking"].assign(base="bce_prior", crl="ranking_quarter")  # of several labels
    found = compare_stats.effects(pd.concat([runs, started]), "default").set_index("crl")["verdict"]
    assert set(found["none"]) == {"worse"} and set(found["ranking"]) == {"level"}


def test_the_choice_is_made_on_seeds_and_tasks_that_all_arms_have():
    runs = runs_of(0.05).assign(stage="test", lr="0.1")
    runs = pd.concat([runs, runs.assign(task="other")])
    runs["valid_map"] = 0.5 + 0.1 * (runs["crl"] == "ranking") + 0.2 * (runs["task"] == "other")
    runs["valid_f1_shift"] = 0.25
    runs.loc[runs["seed"] == "5", "valid_map"] = 0.0
    lacking = (runs["seed"] == "5") & (runs["crl"] == "none")  # of that seed one arm has not run
    elsewhere = runs[runs["task"] == "toy"].assign(base="asl", valid_map=0.9)  # not trained on the other task
    table = compare_stats.tables(pd.concat([runs[~lacking], elsewhere]))
    chosen = table.split("by which a default is chosen")[1]
    assert "| bce | none | 0.600 | 0.250 | 0.500 / 0.250 | 0.700 / 0.250 |" in chosen
    assert "| bce | ranking | 0.700 | 0.250 | 0.600 / 0.250 | 0.800 / 0.250 |" in chosen and "asl" not in chosen


def test_means_over_tasks_and_rates_are_of_arms_and_seeds_that_have_all():
    cell = runs_of(0.05).assign(stage="test", lr="0.1")
    cell["valid_map"], cell["valid_f1_shift"] = 0.5 + 0.1 * (cell["crl"] == "ranking"), 0.25
    everywhere = [
        cell.assign(task=task, lr=lr, stage=stage, valid_map=cell["valid_map"] + extra, map=cell["map"] + extra)
        for task, extra in (("toy", 0.0), ("other", 0.2))
        for lr, stage in (("0.1", "test"), ("0.01", "lr"))
    ]
    runs = pd.concat(everywhere)
    lacking = (runs["seed"] == "5") & (runs["lr"] == "0.01") & (runs["task"] == "other") & (runs["crl"] == "none")
    elsewhere = everywhere[0].assign(base="asl"), everywhere[1].assign(base="asl")  # not on the other task
    table = compare_stats.tables(pd.concat([runs[~lacking], *elsewhere]))
    over = table.split("## Over tasks and learning rates")[1].split("## On validation")[0]
    assert "Tasks of several labels: toy, other; rates 0.01, 0.1." in over and "asl" not in over
    assert "| bce | uniform | none | 5 | 0.600 |" in over and "| bce | uniform | ranking | 5 | **0.700** |" in over
    assert "| bce | uniform | ranking | 5 | **+0.100** (+0.100 to +0.100) |" in over
    # gains of .05 to .054, one value a seed whatever the number of tasks and rates: the interval is that of five
    assert "**+0.052** (+0.050 to +0.054)" in over


def test_intervals_are_those_of_a_t_test():
    values = [0.01, 0.03, 0.02, 0.05]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert compare_stats.difference(values) == pytest.approx((0.0275, expected.low, expected.high))


def test_gains_by_label():
    found = compare_plots.gains(runs_of(0.05), "toy", "bce", "label_ap", "ranking")
    assert found["count"].tolist() == [100, 5] and found["gain"].tolist() == pytest.approx([0, 0.0525])


# ---- which runs, in which order ----
def planned(**changes) -> list[compare.Job]:
    losses = {single: text.split(",") for single, text in ((False, compare.MULTI), (True, compare.SINGLE))}
    options = {"terms": compare.DEFAULT_TERMS.split(","), "samplers": ["uniform"], "lrs": [1.0, 2.0, 3.0]}
    return compare.plan({"a": False, "b": True}, losses, **(options | {"seeds": 5, "fewer": 3} | changes))


def test_main_arms_have_five_seeds_and_the_others_three():
    found = pd.DataFrame(planned())
    tested = found[(found["stage"] == "test") & (found["task"] == "a")].groupby(["base", "crl"]).size().to_dict()
    main, terms = ("bce", "bce_prior", "logit_adjusted"), ("none", "ranking_quarter", "ranking", "published")
    five = [(base, crl) for base in main for crl in terms]
    five += [("logit_adjusted", crl) for crl in ("ranking_adjusted_quarter", "ranking_adjusted")]
    three = [(base, "instance") for base in main] + [("weighted_bce", crl) for crl in (*terms, "instance")]
    assert tested == {**dict.fromkeys(five, 5), **dict.fromkeys(three, 3)}
    shown = found[found["stage"] == "lr"]
    arms = set(zip(shown["task"], shown["base"], shown["crl"], strict=True))
    multi = {("a", base, crl) for base in ("bce_prior", "weighted_bce") for crl in ("none", "ranking_quarter")}
    assert arms == multi | {("b", "logit_adjusted", crl) for crl in ("none", "ranking_adjusted_quarter")}
    assert shown.groupby(["task", "base", "crl"])["lr"].value_counts().tolist() == [3] * 18


def test_what_informs_most_comes_first():
    found = planned()
    first = [job.stage for job in found[:15]]
    assert first == ["tune"] * 15  # three losses of one task, two of the other, three rates
    zero = found[15 : 15 + 24]
    assert {job.seed for job in zero} == {0} and {job.task for job in zero[:2]} == {"a", "b"}
    assert len(set(found)) == len(found)
    assert max(i for i, job in enumerate(found) if job.seed == 0) < min(
        i for i, job in enumerate(found) if job.seed == 2
    )


def test_the_learning_rate_is_the_one_of_the_highest_validation_map(tmp_path, monkeypatch):
    calls = []

    def once(data, config, seed, stage, out, name):
        calls.append((config.term, config.lr, seed, stage))
        return {"valid_map": {0.1: 0.2, 0.2: 0.4, 0.3: 0.3}[config.lr]}

    monkeypatch.setattr(compare, "run", once)
    cut = {"drawn": lambda seed: None}
    job = compare.Job(0, 0, "drawn", "bce", "uniform", "ranking", "test", 0)
    for _ in range(2):
        runs = compare_rows.Runs(tmp_path / "runs.csv")
        go = compare.Comparison(runs, tmp_path, "features", cut, [0.1, 0.2, 0.3])
        go(job)
        go(job._replace(stage="lr", lr=0.2))  # the chosen one: no other run
        go(job._replace(stage="lr", lr=0.3))
    tuned = [("none", lr, compare.TUNING_SEED, "tune") for lr in (0.1, 0.2, 0.3)]
    assert calls == [*tuned, ("ranking", 0.2, 0, "test"), ("ranking", 0.3, 0, "lr")]  # the second time nothing


# ---- the whole ----
def test_rows_of_other_options_are_not_taken_for_these(tmp_path):
    for _ in range(2):
        compare_rows.keep_options(tmp_path / "options.json", {"epochs": 2, "lrs": [0.1]})
    with pytest.raises(ValueError, match=r"'epochs': 2.*choose another --out"):
        compare_rows.keep_options(tmp_path / "options.json", {"epochs": 3, "lrs": [0.1]})


def test_names_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="bcee"):
        compare._names("asl,bcee", compare.MULTI_LABEL_LOSSES)


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def test_a_killed_comparison_goes_on_without_a_row_twice(tmp_path, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    bank = toy_bank()
    np.savez(cache / "drawn_features.npz", x=bank.x, y=bank.y, test=bank.test)
    options = {"data": str(tmp_path / "nothing"), "cache": str(cache), "regime": "features", "seeds": 2, "epochs": 2}
    options |= {"bases": "bce,bce_prior", "lrs": "0.01,0.03", "fewer": 1, "terms": "none,ranking_quarter,published"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(FOLDER / "compare.py"), "--out", str(killed)]
    command += [part for k, v in options.items() for part in (f"--{k}", str(v))]
    threads = torch.get_num_threads()
    with open(tmp_path / "log", "w") as log:
        env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            if (killed / "runs.csv").exists() and len((killed / "runs.csv").read_text().splitlines()) > 2:
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        with pytest.raises(BlockingIOError, match=f"{killed}: wait for it"):
            compare.main(out=str(killed), **options)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
    done = rows_of(killed / "runs.csv")
    with open(killed / "runs.csv", "a") as f:
        f.write("features,drawn,bce,uni")  # as if it had been writing
    compare.main(out=str(killed), report=True)  # looks, and leaves what another process may be writing
    assert (killed / "runs.csv").read_text().endswith(",uni")
    for out in (killed, whole):
        compare.main(out=str(out), **options)
    torch.set_num_threads(threads)
    assert "cells: skipped, hpa_cells/train.csv is not in the data folder" in capsys.readouterr().out
    found, expected = rows_of(killed / "runs.csv"), rows_of(whole / "runs.csv")
    assert 2 <= len(done) < len(found) and found[: len(done)] == done  # kept, not run again
    keys = [tuple(row[k] for k in compare_rows.KEY) for row in found]
    assert len(set(keys)) == len(keys) == 4 + 2 * 6 + 2  # rates; two seeds of six arms; two arms at the other rate
    assert keys == [tuple(row[k] for k in compare_rows.KEY) for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    table = (killed / "table.md").read_text()
    assert "## drawn (features)" in table and "At each learning rate" in table
    assert str(tmp_path) not in table
    for name in ("gains.png", "differences.png", "geometry.png"):
        assert (killed / name).stat().st_size > 5_000


# ---- one's own data ----
def test_a_folder_of_ones_own_in_one_command(tmp_path, capsys):
    data = make_hpa(tmp_path / "data", 80, 32, n_test=4, progress=False)
    options = {"path": str(data), "size": 32, "epochs": 3, "seeds": 1, "fewer": 1, "lrs": "0.01,0.03", "width": 8}
    threads = torch.get_num_threads()
    compare.main(out=str(tmp_path / "out"), **options)
    torch.set_num_threads(threads)
    rows = rows_of(tmp_path / "out" / "runs.csv")
    arms = [(row["base"], row["crl"]) for row in rows if row["stage"] == "test"]
    assert arms == [(base, crl) for base in ("bce", "bce_prior") for crl in ("none", "ranking_quarter")]
    assert {row["task"] for row in rows} == {"own"}
    assert {row["stage"] for row in rows} == {
        "tune",
        "test",
    }  # the time is for seeds, not for rates that were not chosen
    said = capsys.readouterr().out
    assert "Highest validation mAP, over 1 seeds" in said
    compare.main(out=str(tmp_path / "short"), **{**options, "seeds": 50}, minutes=0.001)
    torch.set_num_threads(threads)
    assert len(rows_of(tmp_path / "short" / "runs.csv")) == 1  # the first run tells how long one takes
    with pytest.raises(ValueError, match="regime='features' is for the four tasks"):
        compare.main(out=str(tmp_path / "out"), regime="features", **options)


def test_images_of_ones_own_are_those_of_the_files(tmp_path):
    data = make_hpa(tmp_path / "data", 60, 32, n_test=4, progress=False)
    bank, task = compare_own.own_task(data, HPA_CHANNELS, 32)
    table = pd.read_csv(data / "train.csv", dtype=str)
    assert bank.x.shape == (len(table), 4, 32, 32) and bank.x.dtype == np.uint8 and not bank.single_label
    for i in (0, len(table) - 1):
        planes = [Image.open(data / "train" / f"{table['Id'][i]}_{c}.png") for c in HPA_CHANNELS]
        assert np.array_equal(bank.x[i], np.stack([np.asarray(p) for p in planes]))
        labels = sorted(set(" ".join(table["Target"]).split()), key=int)
        assert [labels[c] for c in np.flatnonzero(bank.y[i])] == sorted(table["Target"][i].split(), key=int)
    assert 0.15 < bank.test.mean() < 0.35 and task.epochs["pixels"] * len(table) > 900
    table.assign(Target=table["Target"].str.split().str[0]).to_csv(data / "train.csv", index=False)
    assert compare_own.own_task(data, HPA_CHANNELS, 32)[0].single_label
    table.assign(Target="7").to_csv(data / "train.csv", index=False)
    with pytest.raises(ValueError, match="has the label '7' alone"):
        compare_own.own_task(data, HPA_CHANNELS, 32)


def advised(gain: float, seeds: int = 6, spread: float = 0.001) -> str:
    rows = runs_of(0).assign(stage="test", valid_map=0.3, task="own")
    better = rows["crl"] == "ranking"
    seed = rows["seed"].astype(int)
    rows.loc[better, "valid_map"] = 0.31
    for measure in compare_own.COMPARED:
        rows.loc[better, measure] = 0.3 + 0.02 * seed + gain + spread * (seed - 2.5)
    return compare_own.advise(rows[seed < seeds])


def test_advice_says_when_the_difference_is_noise():
    assert "Take bce + ranking." in advised(0.05)
    assert "mAP +0.050 (+0.048 to +0.052)" in advised(0.05)
    assert "The difference is noise: keep plain" in advised(0.001)
    assert "It costs" in advised(-0.05)
    assert "too few to tell it from noise" in advised(0.05, seeds=2)
    plain = runs_of(0).assign(stage="test", valid_map=0.3)
    assert "Plain cross entropy is as good as any" in compare_own.advise(plain[plain["crl"] == "none"])
    assert "No run has finished" in compare_own.advise(plain[:0])


def test_the_real_cells_are_split_by_montage(shared):
    bank = compare_tasks._cells(shared, Path(), 8)
    assert bank.x.shape == (809, 4, 8, 8) and np.bincount(bank.y).tolist() == [324, 314, 90, 45, 36]
    assert not set(bank.group[bank.test]) & set(bank.group[~bank.test])
    assert set(bank.y[bank.test]) == set(bank.y[~bank.test]) == set(range(5))
