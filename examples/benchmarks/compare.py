"""Compare losses and CRL on long-tailed tasks, fairly, over several seeds.

Each arm is a task x base loss x sampler x what is added to the loss (`compare_terms.TERMS`): nothing, CRL ranking on
the network's logits or on those that the base loss adjusts, with the paper's weight or at most a quarter, CRL as
published, CRL as published at instance level. `bce_prior` is binary cross entropy of a network that starts at the
frequencies of the labels, `weighted_bce_prior` √pos_weight of one that starts at its own best constant. All arms of a
task train the same network for the same number of steps. The learning rate is chosen from three for each base loss, by
validation mAP with a seed of its own, and shared by the arms of that loss. Decisions are fitted on validation before
losses are compared. Then each seed is trained and its test images are looked at once. Differences are paired by seed,
with 95 % intervals of Student's t.

Two regimes: `pixels` trains a ResNet-8 end to end, in minutes; `features` trains a head of one hidden layer on features
of a frozen ImageNet network, in seconds. See `compare_tasks` for the tasks, `compare_train` for a run,
`compare_measures` for what it is worth.

    python examples/benchmarks/compare.py --out runs/compare
    pip install -e '.[rivals,study]'
    python examples/benchmarks/compare.py --regime features --out runs/compare_features

On your own data, a folder as the README describes: few arms, each at its chosen rate alone, as many seeds as fit in the
time, and advice.

    python examples/benchmarks/compare.py --path DIR --minutes 60 --out runs/mine

Every finished run is a row of `runs.csv`; started again, it goes on where it was, after a kill too. What informs most
comes first: choices of learning rates, then one seed of the main arms on all tasks, and so on. `table.md`,
`differences.png` and `gains.png` are made of the rows there are (`--report`: without running more). `outputs/`
holds each run's logits and embeddings, for measures thought of later; `traces/` the embedding's geometry, epoch by
epoch, of each arm's first seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from compare_measures import evaluate, evaluate_valid, geometry
from compare_own import advise, own_task
from compare_plots import plot_differences, plot_gains, plot_traces
from compare_rows import Runs, alone, keep_options
from compare_stats import DEFAULT, tables
from compare_tasks import TASKS, Split, Task, load, split
from compare_terms import TERMS
from compare_train import PRIOR, Config, outputs, train
from fastcore.script import call_parse, store_true
from fastprogress import progress_bar

from fastai_crl._checks import check_choice
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.losses import MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES

MULTI, SINGLE = "bce,bce_prior,logit_adjusted,weighted_bce", "ce,logit_adjusted,class_balanced"
MAIN = ("bce", "bce_prior", "ce", "logit_adjusted")
AT_ALL_LRS = {False: ("bce_prior", "weighted_bce", "weighted_bce_prior"), True: ("logit_adjusted",)}  # by single-label
DEFAULT_TERMS = "none,ranking_quarter,ranking_adjusted_quarter,ranking,ranking_adjusted,published,instance"
OWN_TERMS = "none,ranking_quarter,ranking_adjusted_quarter"
REGIMES = ("pixels", "features")
SAMPLERS = ("uniform", "class_aware", "repeat_factor")
TUNING_SEED = 1000


# ---- what is run, in which order ----
class Job(NamedTuple):
    """One run: `lr` None is the one chosen for the base loss. Jobs run by `order`, then arm by arm over the tasks."""

    order: float
    arm: int
    task: str
    base: str
    sampler: str
    crl: str
    stage: str
    seed: int
    lr: float | None = None


def plan(
    tasks: dict[str, bool],
    bases: dict[bool, list[str]],
    terms: list[str],
    samplers: list[str],
    lrs: list[float],
    seeds: int,
    fewer: int,
    at_all_lrs: bool = True,
) -> list[Job]:
    """All jobs, what informs most first.

    Args:
        tasks: whether each is single-label.
        bases: base losses of single-label (True) and multi-label tasks.
        terms: what is added to each.
        samplers: the first goes with all arms, the others with the first base loss.
        lrs: learning rates to choose from.
        seeds: of the main arms: the losses of `MAIN` with what is added by default at class level.
        fewer: seeds of the others, and of the losses of `AT_ALL_LRS` at the rates that were not chosen.
        at_all_lrs: whether those are run at them at all.
    """
    jobs = []
    for task, single in tasks.items():
        for i, base in enumerate(bases[single]):
            if base in MAIN:
                jobs += [Job(-1, i, task, base, samplers[0], "none", "tune", TUNING_SEED, lr) for lr in lrs]
            for j, (sampler, crl) in enumerate((s, c) for s in (samplers if i == 0 else samplers[:1]) for c in terms):
                if TERMS[crl] and TERMS[crl].adjusted and base != "logit_adjusted":
                    continue  # nothing to adjust: the same as without
                main = base in MAIN and crl in DEFAULT_TERMS.split(",") and crl != "instance" and sampler == samplers[0]
                later = 0 if main else 0.3 if crl == "instance" and base in MAIN else 0.6
                key = (100 * i + j, task, base, sampler, crl)
                jobs += [Job(seed + later, *key, "test", seed) for seed in range(seeds if main else fewer)]
                shown = base in AT_ALL_LRS[single] and crl in ("none", DEFAULT[single][1])
                if at_all_lrs and shown and len(lrs) > 1:
                    jobs += [Job(seed + 0.8, *key, "lr", seed, lr) for seed in range(fewer) for lr in lrs]
    return sorted(jobs, key=lambda job: job[:2])


# ---- runs ----
def run(data: Split, config: Config, seed: int, stage: str, out: Path | None = None, name: str = "") -> dict[str, Any]:
    """Measures of one run: for "tune" on validation alone; else on test, its outputs and trace kept in `out`."""
    start, y, counts, trace = time.perf_counter(), {k: v.numpy() for k, v in data.y.items()}, data.counts().numpy(), []

    def look(epoch: int, model: torch.nn.Sequential) -> None:
        found = outputs(model, data.x["valid"], config.bf16)
        trace.append({"epoch": epoch, **geometry(found.embedding, y["valid"], counts)})

    traced = stage == "test" and seed == 0 and out is not None
    model = train(data, config, seed, look if traced else None)
    if stage == "tune":
        values = evaluate_valid(outputs(model, data.x["valid"], config.bf16), y["valid"], counts, len(y["train"]))
    else:
        found = {side: outputs(model, x, config.bf16) for side, x in data.x.items()}
        values = evaluate(found, y, counts)
        if out is not None:
            kept = {f"{side}_{k}": v.astype(np.float16) for side, o in found.items() for k, v in o._asdict().items()}
            (out / "outputs").mkdir(exist_ok=True)
            np.savez(out / "outputs" / f"{name}.npz", **kept)
    if traced:
        (out / "traces").mkdir(exist_ok=True)
        pd.DataFrame(trace).to_csv(out / "traces" / f"{name}.csv", index=False)
    return values | {"seconds": time.perf_counter() - start}


@dataclass(frozen=True)
class Comparison:
    """Runs jobs, each once.

    Attributes:
        runs: the rows there are, to which it adds.
        out: where outputs and traces are kept.
        regime: "pixels" or "features".
        cut: from a seed, the images of each task.
        lrs: learning rates to choose from.
        tasks: how each is trained.
        epochs, bs: of all tasks; 0: each task's own.
        width, bf16: see `Config`.
    """

    runs: Runs
    out: Path
    regime: str
    cut: dict[str, Callable[[int], Split]]
    lrs: list[float]
    tasks: dict[str, Task] = field(default_factory=lambda: TASKS)
    epochs: int = 0
    bs: int = 0
    width: int = 16
    bf16: bool = False

    def chosen_lr(self, job: Job) -> float:
        """The learning rate of the highest validation mAP of the base loss alone, which is run if it has not been."""
        tuning = job._replace(sampler="uniform", crl="none", stage="tune", seed=TUNING_SEED)
        worth = [float(self(tuning._replace(lr=lr))["valid_map"]) for lr in self.lrs]
        return self.lrs[int(np.argmax(worth))]

    def __call__(self, job: Job) -> dict[str, Any]:
        """Return the row of a job, which is run if it has not been."""
        if job.stage != "tune":
            chosen = self.chosen_lr(job)
            job = job._replace(lr=job.lr or chosen, stage="test" if job.lr in (None, chosen) else job.stage)
        key = (self.regime, job.task, job.base, job.sampler, job.crl, job.lr, job.stage, job.seed)
        if (found := self.runs.get(key)) is not None:
            return found
        task = self.tasks[job.task]
        config = Config(
            base=job.base,
            term=job.crl,
            sampler=job.sampler,
            lr=job.lr,
            epochs=self.epochs or task.epochs[self.regime],
            bs=self.bs or task.bs,
            flips=task.flips,
            width=self.width,
            bf16=self.bf16,
        )
        name = "-".join(map(str, key[1:]))
        return self.runs.add(key, run(self.cut[job.task](job.seed), config, job.seed, job.stage, self.out, name))


def write_report(runs: Runs, out: Path) -> None:
    """Write the tables and the pictures of the rows there are."""
    frame = runs.frame()
    if not (frame["stage"] == "test").any():
        return
    (out / "table.md").write_text(tables(frame))
    tested = frame[frame["stage"] == "test"]
    plot_gains(tested, out / "gains.png")
    plot_differences(tested, out / "differences.png")
    plot_traces(out / "traces", out / "geometry.png")


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
    terms: str = "",  # what is added to them, of compare_terms.TERMS; default: seven, of your own data three
    samplers: str = "uniform",  # uniform, class_aware, repeat_factor: the first goes with all losses
    seeds: int = 5,  # of the main arms
    fewer: int = 3,  # seeds of the other arms, and of the main ones at other rates
    lrs: str = "0.01,0.03,0.1",  # learning rates to choose from
    epochs: int = 0,  # of every task; 0: its own number
    bs: int = 0,  # size of a batch; 0: the task's own
    width: int = 16,  # channels of the network's first stage
    bf16: store_true = False,  # train in bfloat16, where the processor is faster in it
    report: store_true = False,  # only make the tables again
    path: str | None = None,  # your own data, DIR/train.csv and DIR/train, in place of the four tasks
    channels: str = ",".join(HPA_CHANNELS),  # of your own images
    size: int = 64,  # side in pixels that your own images are resized to
    minutes: float = 0,  # no run is begun that would not end in time; 0: all runs
):
    """Compare losses and CRL on long-tailed tasks, or on your own data."""
    torch.set_num_threads(1)
    check_choice("regime", regime, REGIMES)
    if path and regime != "pixels":
        raise ValueError(f"regime={regime!r} is for the four tasks: with --path leave it out, it trains end to end.")
    default = OWN_TERMS if path else DEFAULT_TERMS
    names, added, drawn_by = _names(tasks, TASKS), _names(terms or default, TERMS), _names(samplers, SAMPLERS)
    losses = {False: bases or MULTI, True: bases or SINGLE}
    known = {False: (*MULTI_LABEL_LOSSES, "bce" + PRIOR, "weighted_bce" + PRIOR), True: SINGLE_LABEL_LOSSES}
    _names(bases or MULTI, {*known[False], *known[True]})
    losses = {single: [b for b in text.split(",") if b in known[single]] for single, text in losses.items()}
    if path and not bases:
        losses = {single: names[:2] for single, names in losses.items()}
    root = Path(__file__).resolve().parents[2]
    folder, out_dir = Path(data) if data else root.parent / "shared" / "data", Path(out)
    out_dir.mkdir(parents=True, exist_ok=True)
    if report:
        return write_report(Runs(out_dir / "runs.csv"), out_dir)
    rates = [float(lr) for lr in lrs.split(",")]
    common = {"epochs": epochs, "bs": bs, "width": width, "bf16": bf16}
    own = own_task(Path(path), channels.split(","), size) if path else None
    given = {"path": str(Path(path).resolve()), "channels": channels, "size": size} if path else {}
    with alone(out_dir):
        keep_options(out_dir / "options.json", {"regime": regime, "lrs": rates, **common, **given})
        runs, banks = Runs(out_dir / "runs.csv"), {"own": own[0]} if own else {}
        for name in () if own else names:
            try:
                banks[name] = load(name, folder, Path(cache), regime == "pixels")
            except FileNotFoundError as e:
                print(f"{name}: skipped, {e}")
        cut = {name: lru_cache(2)(partial(split, bank)) for name, bank in banks.items()}
        once = Comparison(runs, out_dir, regime, cut, rates, {"own": own[1]} if own else TASKS, **common)
        kinds = {name: bank.single_label for name, bank in banks.items()}
        start, longest = time.perf_counter(), 0.0
        progress = progress_bar(plan(kinds, losses, added, drawn_by, rates, seeds, fewer, not own))
        for job in progress:
            begun = time.perf_counter()
            if minutes and begun - start + longest > 60 * minutes:
                break
            progress.comment = f"{job.task} {job.base} {job.crl} {job.stage} {job.seed}"
            once(job)
            longest = max(longest, time.perf_counter() - begun)
        write_report(runs, out_dir)
        if own:
            print(advise(runs.frame()))
