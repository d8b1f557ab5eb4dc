"""`compare_learners`, `compare_losses`: their plan, their order, resuming, rates, and the command."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_crl.compare import Comparison, compare_learners, compare_losses
from fastai_crl.compare.compare import _Rounds
from fastai_crl.compare.data import Data
from fastai_crl.compare.losses import LossArm, loss_arms
from fastai_crl.evaluate.metrics import mean_ap
from fastai_crl.learner import crl_learner

from .toy import toy_dls, toy_learner

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "plain": toy_learner,
    "weighted": partial(toy_learner, loss_func=BCEWithLogitsLossFlat(pos_weight=torch.ones(4))),
}


def compared(out, arms=ARMS, dls=None, **options) -> Comparison:
    options = {"epochs": 1, "seeds": 2} | options
    return compare_learners(arms, toy_dls() if dls is None else dls, out=out, **options)


def test_arms_are_trained_in_turn_from_the_same_seeds(tmp_path, capsys):
    order = []

    def arm(name, dls):
        order.append(name)
        return toy_learner(dls)

    found = compared(tmp_path, {name: partial(arm, name) for name in "abc"}, seeds=3)
    assert order == [*"aabbcc", "a", *"abc" * 3]  # looked at twice, one timed, then seed by seed
    printed = capsys.readouterr().out
    assert "3 arms x 3 seeds x" in printed and "60 are given" in printed and printed.count("macro-F1, fitted") == 3
    assert found.runs["seed"].tolist() == list("000111222") and set(found.runs["weights"]) == {"shared"}
    assert set(found.runs["measured"]) == {"validation set, 54 images"}
    assert found.frame["mAP"]["difference"].tolist()[1:] == [0, 0]  # the same weights, order and dropout


def test_a_row_is_what_a_learner_of_that_seed_is_worth(tmp_path):
    found = compared(tmp_path, seeds=1)
    probs = np.load(next((tmp_path / "outputs").glob("measured-weighted-own-0*")))["probs"]
    y = Data(toy_dls()).true
    assert found.runs["mAP"][1] == pytest.approx(mean_ap(probs, y), abs=1e-5)
    assert found.frame.loc["weighted", ("mAP", "mean")] == pytest.approx(mean_ap(probs, y))


def test_another_loader_may_be_measured(tmp_path):
    dls = toy_dls()
    found = compared(tmp_path, dls=dls, dl=dls.train.new(shuffle=False, drop_last=False), seeds=1)
    assert set(found.runs["measured"]) == {"dl=, 106 images"}
    data = Data(dls)
    data.check(data.true)
    with pytest.raises(ValueError, match="differ from one pass to the next"):
        data.check(data.true[::-1])


@pytest.mark.parametrize("single_label", [False, True])
def test_rates_are_chosen_for_each_arm_on_a_part_of_the_training_set(tmp_path, single_label):
    dls, seen = toy_dls(240, single_label), []

    def fit(learn):
        seen.append((len(learn.dls.train_ds), len(learn.dls.valid_ds), learn.lr))
        learn.fit(2)

    loss = CrossEntropyLossFlat if single_label else BCEWithLogitsLossFlat
    arms = {"plain": toy_learner, "slow": lambda dls: toy_learner(dls, loss(reduction="mean"))}
    found = compared(tmp_path, arms, dls, fit=fit, lrs=[1e-6, 0.05], seeds=1)
    trained = seen[2:]  # without those that are counted
    sizes = [sum(size[:2]) for size in trained]
    assert sizes == [160] * 4 + [240] * 2 and 25 < trained[0][1] < 40
    assert [lr for *_, lr in trained] == [1e-6, 0.05, 1e-6, 0.05, 0.05, 0.05]
    assert set(found.runs["lr"]) == {"0.05"} and len(pd.read_csv(tmp_path / "runs.csv")) == 6
    part = Data(dls).part()
    assert set(part.dls.train_ds.items) | set(part.dls.valid_ds.items) == set(dls.train_ds.items)
    shares = part.true.sum(0) / Data(dls).train.sum(0)
    assert (abs(shares - 0.2) < 0.08).all()
    with pytest.raises(ValueError, match=r"'plain': fit does not use learn.lr"):
        compared(tmp_path / "fixed", arms, dls, fit=lambda learn: learn.fit(1, 0.01), lrs=[0.1, 0.2])


def rounds(tmp_path, each, seeds, minutes, n_rates=0, n_arms=4):
    """The plan of rounds of runs of `each` minutes."""
    made = object.__new__(_Rounds)
    arms = [type("A", (), {"name": name, "epochs": 10})() for name in "abcdef"[:n_arms]]
    made.arms, made.rates, made.minutes, made.begun = arms, [0.1] * n_rates, minutes, time.perf_counter()
    made._finished = lambda *job: False
    return made._plan(seeds, 60 * each)


def test_the_plan_says_what_fits(tmp_path, capsys):
    assert rounds(tmp_path, 1, 3, 60) == 3
    assert capsys.readouterr().out == "4 arms x 3 seeds x 1 min = 12 min; 60 are given.\n"
    assert rounds(tmp_path, 4, 3, 60, n_arms=6) == 2
    told = "6 arms x 3 seeds x 4 min = 72 min; 60 are given: 2 seeds, or 4 arms x 3.\n"
    assert capsys.readouterr().out.startswith(told + "Fewer than three seeds")
    assert rounds(tmp_path, 1, 5, 12.5, n_rates=2) == 1
    assert capsys.readouterr().out.startswith("4 arms x 2 learning rates + 4 arms x 5 seeds x 1 min = 28 min; 12.5 are")


def test_where_no_round_fits_nothing_is_trained(tmp_path):
    expected = (
        r"4 arms x 3 seeds x 5 min = 60 min; 10.5 are given: not one round .* minutes=20 for one, or 60 for three; "
    )
    with pytest.raises(ValueError, match=expected + "or 5 epochs in place of 10; or 2 arms: a, b."):
        rounds(tmp_path, 5, 3, 10.5)
    with pytest.raises(ValueError, match="not one round"):
        compared(tmp_path, minutes=1e-6, epochs=9)
    assert not (tmp_path / "runs.csv").exists()
    assert len(compared(tmp_path, seeds=1).runs) == 2  # with fewer epochs, as it said


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that have passed, as the plan sees them."""
    passed = [0.0]
    monkeypatch.setattr("fastai_crl.compare.compare.perf_counter", lambda: passed[0])
    return passed


def test_time_that_is_over_ends_the_runs_and_they_go_on_later(tmp_path, capsys, clock):
    def fit(learn):
        clock[0] += 60 * len(seen)  # each run takes a minute more
        seen.append(learn.fit(1))

    seen = []
    found = compared(tmp_path, fit=fit, seeds=3, minutes=12)
    assert "12 minutes are over" in capsys.readouterr().out and 2 <= len(found.runs) < 6
    assert len(compared(tmp_path, fit=fit, seeds=3, minutes=1000).runs) == 6


def test_time_that_is_left_goes_into_more_rounds(tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setattr(_Rounds, "_seconds_of_a_run", lambda self: 60.0 if self.runs.rows else 120.0)
    assert len(compared(tmp_path, seeds=5, minutes=9).runs) == 10  # no second has passed
    printed = capsys.readouterr().out
    assert "2 arms x 5 seeds x 2 min = 20 min; 9 are given: 2 seeds" in printed
    assert "2 arms x 5 seeds x 1 min, less 4 finished runs, = 6 min; 9 are given.\n" in printed


def test_what_was_run_otherwise_is_refused_with_the_difference(tmp_path):
    compared(tmp_path, seeds=1)
    before = (tmp_path / "runs.csv").read_bytes()
    for change, named in (
        ({"epochs": 2}, r"arm 'plain': fit was fit_one_cycle\(1\), and is fit_one_cycle\(2\)"),
        ({"dls": toy_dls(170)}, "data: training items was 106, "),
        ({"arms": ARMS | {"plain": partial(toy_learner, hidden=9)}}, "arm 'plain': parameters was"),
        ({"arms": ARMS | {"weighted": toy_learner}}, "arm 'weighted': loss was BCEWith"),
        ({"lrs": 0.1}, r"learning rates was \[None\], and is \[0.1\]"),
    ):
        with pytest.raises(ValueError, match=named):
            compared(tmp_path, **{"seeds": 1, **change})
    assert (tmp_path / "runs.csv").read_bytes() == before
    more = compared(tmp_path, ARMS | {"other": partial(toy_learner, hidden=9)}, seeds=1)  # the others are not run again
    assert (tmp_path / "runs.csv").read_bytes().startswith(before) and len(more.runs) == 3
    assert more.runs["weights"].tolist()[2].startswith("own")


def test_an_interrupt_leaves_the_answer_of_what_has_run(tmp_path, capsys):
    calls = []

    def fit(learn):
        calls.append(learn.fit(1))
        if len(calls) == 6:  # two that are counted, two of seed 0, one of seed 1
            raise KeyboardInterrupt

    assert len(compared(tmp_path, fit=fit).runs) == 3
    assert "Interrupted. The same call goes on" in capsys.readouterr().out
    assert len(compared(tmp_path, fit=fit).runs) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": {"plain": toy_learner}}, "arms holds 1: give two or more"),
        ({"minutes": 0}, "minutes=0"),
        ({"seeds": 0}, "seeds"),
        ({"lrs": [0.1, -1]}, "lrs="),
        ({"lrs": []}, "lrs="),
        ({"epochs": None}, "A Learner does not say how long it trains"),
    ],
)
def test_options_that_make_no_sense_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, **options)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.compare.test_compare import ARMS, compared
compared({out!r}, seeds=3, epochs=40)
"""


@pytest.mark.slow
def test_a_comparison_that_is_killed_twice_ends_with_the_same_rows(tmp_path):
    killed, rows = tmp_path / "killed", tmp_path / "killed" / "runs.csv"
    for at_least in (1, 3):
        code = SCRIPT.format(root=str(ROOT), out=str(killed))
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
        while not rows.exists() or len(rows.read_text().splitlines()) <= at_least:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
    begun = rows.read_text().splitlines()
    first, whole = (compared(out, seeds=3, epochs=40) for out in (killed, tmp_path / "whole"))
    assert rows.read_text().splitlines()[: len(begun)] == begun and len(first.runs) == 6 > len(begun) - 1 >= 3
    pd.testing.assert_frame_equal(first.runs.drop(columns="seconds"), whole.runs.drop(columns="seconds"))
    pd.testing.assert_frame_equal(first.frame.drop(columns="runs"), whole.frame.drop(columns="runs"))


# ---- other data ----
def test_a_table_and_its_learner(tmp_path):
    rng = np.random.default_rng(0)
    y = np.r_[[0, 0, 1, 1, 2, 2] * 2, rng.choice(3, 108, p=[0.6, 0.3, 0.1])]
    table = pd.DataFrame({"a": y + rng.normal(size=120), "b": rng.choice(["u", "v"], 120), "y": [f"c{i}" for i in y]})
    options = {"cat_names": ["b"], "cont_names": ["a"], "y_names": "y", "valid_idx": list(range(0, 120, 3)), "bs": 16}
    options["procs"] = [Categorify, Normalize]
    dls = TabularDataLoaders.from_df(table, **options)
    weighted = CrossEntropyLossFlat(weight=torch.tensor([1.0, 2.0, 4.0]))
    arms = {
        "plain": partial(tabular_learner, layers=[8]),
        "weighted": partial(tabular_learner, layers=[8], loss_func=weighted),
    }
    found = compared(tmp_path, arms, dls, lrs=[0.01, 0.1])
    assert list(found.labels) == ["c0", "c1", "c2"] and sum(found.labels.values()) == 80
    assert len(found.runs) == 4 and found.frame["mAP"]["mean"].between(0.3, 1).all()


def test_loaders_of_torch(tmp_path):
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.random((90, 2)) < [0.5, 0.2]).float()
    x = torch.cat([y, torch.from_numpy(rng.normal(size=(90, 6)))], 1).float()
    train, valid = TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])
    dls = DataLoaders(DataLoader(train, 16, shuffle=True), DataLoader(valid, 16))
    net = partial(nn.Linear, 8, 2)
    arms = {n: lambda dls, n=n: _learner(dls, net(), n) for n in (1.0, 2.0)}
    arms = {str(k): v for k, v in arms.items()}
    found = compared(tmp_path, arms, dls, lrs=0.1)
    assert len(found.runs) == 4 and list(found.labels) == ["0", "1"] and set(found.runs["lr"]) == {"0.1"}
    with pytest.raises(ValueError, match="loaders of torch: give one"):
        compared(tmp_path / "rates", arms, dls, lrs=[0.01, 0.1])


def _learner(dls, net, weight):
    from fastai.learner import Learner

    return Learner(dls, net, BCEWithLogitsLossFlat(pos_weight=torch.tensor(weight)))


# ---- losses ----
def small(pretrained=False):
    """An architecture that trains in a moment."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_losses_of_several_labels(hpa_dls, tmp_path):
    found = compare_losses(hpa_dls, small, epochs=1, seeds=1, out=tmp_path, concat_pool=False, lin_ftrs=[])
    names = ["cross entropy", "started", "√pos_weight", "logit-adjusted", "CRL", "CRL on √pos_weight"]
    assert found.runs["arm"].tolist() == list(found.arms) == names and set(found.runs["weights"]) == {"shared"}
    assert set(found.labels) | set(found.left_out) == set(hpa_dls.vocab)


def test_losses_of_one_label_and_arms_of_ones_own(single_label_dls, tmp_path):
    own = {"CRL": None, "logit-adjusted": partial(crl_learner, arch=small, loss_func="focal"), "asl": LossArm(small)}
    found = compare_losses(single_label_dls, small, epochs=1, seeds=1, out=tmp_path, arms=own)
    assert list(found.arms) == ["cross entropy", "class-balanced", "logit-adjusted", "asl"]
    assert (
        found.arms["asl"] == "learn = crl_learner(dls, small)"
        and "arms['logit-adjusted']" in found.arms["logit-adjusted"]
    )


def test_the_code_of_an_arm_makes_its_learner(hpa_dls):
    for single_label, names in ((False, 6), (True, 4)):
        arms = loss_arms(small, single_label, metrics=[])
        assert len(arms) == names
        for arm in arms.values() if not single_label else ():
            scope = {"crl_learner": crl_learner, "small": small, "dls": hpa_dls}
            exec("from fastai_crl.losses import start_at_frequency", scope)
            exec(arm.code, scope)
            expected, found = arm(hpa_dls), scope["learn"]
            assert type(found.loss_func) is type(expected.loss_func)
            biases = [list(learn.model.parameters())[-1] for learn in (expected, found)]
            assert arm.start == (biases[0].ndim == 1 and "pos_weight" in arm.code)
            assert found.opt is None or not arm.start


def test_a_pretrained_network_is_fine_tuned(single_label_dls, tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr("fastai_crl.compare.losses.compare_learners", lambda *args: fits.append(args))
    compare_losses(single_label_dls, small, pretrained=True, epochs=3, out=tmp_path)
    compare_losses(single_label_dls, small, out=tmp_path)
    with pytest.raises(ValueError, match="alpha, loss_func: each arm has its own"):
        compare_losses(single_label_dls, small, out=tmp_path, loss_func="focal", alpha=0.5)
    assert [(str(args[4]), args[3]) for args in fits] == [("FineTune(epochs=3, at_lr=False)", 3), ("None", 10)]


def test_what_is_no_comparison_of_losses_is_refused(single_label_dls, tmp_path):
    def compare(dls=single_label_dls, **options):
        compare_losses(dls, small, out=tmp_path / "never", **options)

    with pytest.raises(ValueError, match=r"arms=\['crl'\] are None.*'cross entropy'.*'CRL'"):
        compare(arms={"crl": None})
    with pytest.raises(TypeError, match=r"compare_losses has no keyword epoch= \(did you mean epochs=\?\)"):
        compare(epoch=1)
    with pytest.raises(ValueError, match="arms= takes a dict"):
        compare(arms=["CRL"])
    learn = crl_learner(single_label_dls, small)
    with pytest.raises(ValueError, match=r"dls is a CRLLearner: give DataLoaders.*learn\.dls"):
        compare(learn)
    with pytest.raises(ValueError, match="each run needs a new one"):
        compare_learners({"a": learn, "b": learn}, single_label_dls, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


# ---- the command ----
def test_the_command_has_the_keywords_of_both_functions(hpa, tmp_path, monkeypatch, capsys):
    from fastai_crl.compare import __main__ as command

    made = {}
    monkeypatch.setattr(command, "compare_losses", lambda dls, **options: made.update(dls=dls, **options) or _Saved())
    words = (
        f"{hpa} --size 16 --bs 8 --valid-pct 0.3 --num-workers 0 --arch resnet18 --minutes 5 --lrs 0.1,0.2 --pretrained"
    )
    monkeypatch.setattr(sys, "argv", ["compare", *words.split(), "--label-delim", "None", "--no-check"])
    _call(command)
    assert made["dls"].one_batch()[1].ndim == 1
    monkeypatch.setattr(sys, "argv", ["compare", *words.split(), "--out", str(tmp_path)])
    _call(command)
    assert made["dls"].one_batch()[0].shape == (8, 4, 16, 16) and made["arch"].__name__ == "resnet18"
    rest = {k: v for k, v in made.items() if k not in ("dls", "arch")}
    assert rest == {"minutes": 5, "lrs": (0.1, 0.2), "pretrained": True, "out": str(tmp_path)}
    assert f"Tables and picture: {tmp_path}" in capsys.readouterr().out


class _Saved:
    advice = "advice"

    def save(self, file):
        return file


def _call(command):
    from fastcore.script import anno_parser

    arguments = vars(anno_parser(command.main).parse_args(sys.argv[1:]))
    return command.main(**{k: v for k, v in arguments.items() if k not in ("pdb", "xtra")})


@pytest.mark.parametrize(
    ("word", "meant"), [("3", 3), ("a,b", ["a", "b"]), ("hpa", "hpa"), ("(1, 2)", (1, 2)), ("0.1,0.2", (0.1, 0.2))]
)
def test_words_mean_literals_or_names(word, meant):
    from fastai_crl.compare.__main__ import value

    assert value(word) == meant
