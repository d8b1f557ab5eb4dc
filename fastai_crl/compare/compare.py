"""`compare_learners`: which of several learners is best for some data, whether that is noise, in the time there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar

from fastai_crl._checks import whole_number
from fastai_crl.learner import CRLLearner
from fastai_crl.task import check_dls

from .answer import Comparison
from .arm import Arm, Fit, as_text
from .data import Data
from .rows import Runs, digest
from .stats import MEASURES, Measured, measure

_TUNING_SEED = 1000
_KEY = ("stage", "arm", "lr", "seed", "digest")


def compare_learners(
    arms: Mapping[str, Callable[[DataLoaders], Learner]],
    dls: DataLoaders,
    minutes: float = 60,
    epochs: int | None = None,
    fit: Fit | None = None,
    seeds: int = 5,
    lrs: float | Sequence[float] | None = None,
    dl: Any = None,
    out: str | Path = "comparison",
) -> Comparison:
    """Train several learners from the same seeds, and tell which is best and what part of the difference is noise.

    Each seed sets weights, order and augmentation of all arms; they are trained in turn, seed by seed. Decisions are
    fitted before arms are compared: each image is decided by thresholds fitted to the others. One epoch is timed
    before, and a table printed after every finished round. Only one learner is held at a time.

    Every finished run is kept in `out`, its row and its predictions. After Ctrl-C or a kill the same call goes on with
    the runs that are missing. Runs of other data, parameters, losses, callbacks or epochs in the same folder are
    refused. A lambda has no text of its own: where you change one, give another arm's name or another `out`.

    Args:
        arms: from a name to a function of `dls` that makes a new learner, of any kind, with its network. The first is
            what the others are compared with.
        dls: training and validation data, of one or several labels per item.
        minutes: time to spend. No run is begun that would end later.
        epochs: of the default `fit`; of a `CRLLearner` by default its own.
        fit: how a learner is trained, `lambda learn: learn.fine_tune(5)`; it goes through `learn.fit`. Default:
            `learn.fit_one_cycle(epochs)`.
        seeds: rounds at the most. With fewer than three no winner is named.
        lrs: one learning rate for all arms, or several, from which each arm gets that of the highest mAP on a
            stratified fifth of the training set, held out. It is set as `learn.lr`, which a `fit` of yours has to use.
            Default: each learner's own. A sampler of `dls` itself is left out of this choice, one of an arm is not.
        dl: a loader with targets to measure on. Default: the validation set.
        out: folder of the runs.

    Returns:
        A `Comparison`: `frame`, `by_label`, `plot()`, `advice`, `save(file)`.

    Raises:
        ValueError: not one round of all arms fits into the time; the message says which arms, epochs or minutes would.
            Fewer than two arms, options out of range; an arm that makes no new learner; a folder with runs of other
            data or options.
        BlockingIOError: another process writes to the folder.

    Example:
        >>> def learner(dls, **options):
        ...     return Learner(dls, nn.Linear(4, 2), loss_func=CrossEntropyLossFlat(**options))  # doctest: +SKIP
        >>> arms = {"plain": learner, "weighted": partial(learner, weight=tensor([1.0, 4.0]))}  # doctest: +SKIP
        >>> found: Comparison = compare_learners(arms, dls, minutes=5, epochs=3)  # doctest: +SKIP
        >>> print(found.advice)  # doctest: +SKIP
    """
    check_dls(dls)
    if len(check_arms(arms)) < 2:
        raise ValueError(f"arms holds {len(arms)}: give two or more, the first is what the others are compared with.")
    whole_number("seeds", seeds, 1, "give a whole number, at least 1")
    if not minutes > 0:
        raise ValueError(f"minutes={minutes}: give the time to spend, above 0.")
    rates = [lrs] if isinstance(lrs, (int, float)) else list(lrs) if lrs is not None else [None]
    if not rates or not all(lr is None or lr > 0 for lr in rates):
        raise ValueError(f"lrs={lrs}: give one learning rate above 0, or several to choose from.")
    fit_text, fit = (f"fit_one_cycle({epochs})", _one_cycle(epochs)) if fit is None else (as_text(fit), fit)
    runs = Runs(Path(out), _KEY, [*MEASURES, "seconds"], ("weights", "measured"))
    with runs.alone():
        return _Rounds(runs, [Arm(*arm) for arm in arms.items()], Data(dls, dl), fit, fit_text, rates, minutes)(seeds)


def check_arms(arms: Any) -> Mapping[str, Any]:
    """Return `arms`; ValueError for what is no mapping from names to functions, or None for one that is left out."""
    if not isinstance(arms, Mapping) or any(
        not (arm is None or callable(arm)) or isinstance(arm, Learner) for arm in arms.values()
    ):
        raise ValueError(
            "arms= takes a dict from a name to a function of data loaders that makes a learner, such as "
            "{'mine': lambda dls: vision_learner(dls, resnet18)}: each run needs a new one."
        )
    return arms


def _one_cycle(epochs: int | None) -> Fit:
    def fit(learn: Any) -> None:
        if epochs is None and not isinstance(learn, CRLLearner):
            raise ValueError(f"A {type(learn).__name__} does not say how long it trains: give epochs= or fit=.")
        learn.fit_one_cycle(*([] if epochs is None else [epochs]))

    return fit


class _Rounds:
    """The runs of a comparison, each once: rates are chosen, then all arms are trained from each seed in turn."""

    def __init__(
        self, runs: Runs, arms: list[Arm], data: Data, fit: Fit, fit_text: str, rates: list[Any], minutes: float
    ):
        self.runs, self.arms, self.data, self.fit, self.minutes = runs, arms, data, fit, minutes
        self.lr, self.rates = rates[0], rates if len(rates) > 1 else []  # those to choose from
        self.measured, self.begun = {}, perf_counter()
        if data.unknown:
            few = f"Fewer than two of the {data.measured}, or all of them, have"
            print(f"{few} {', '.join(data.unknown)}: left out of all measures.")
        for arm in arms:
            arm.look(data.dls, fit)
            arm.facts |= {"fit": fit_text, "epochs": str(arm.epochs), "learning rates": str(rates)}
        runs.bind({"data": data.facts, **{f"arm {arm.name!r}": arm.facts for arm in arms}})
        self.part = data.part() if self.rates else data

    def __call__(self, seeds: int) -> Comparison:
        planned = 0
        try:
            while planned < (fit := self._plan(seeds, self._seconds_of_a_run(), planned)):
                planned = fit
                if not self._train(fit):
                    print(f"{self.minutes:g} minutes are over. The same call goes on where this one stopped.")
                    break
        except KeyboardInterrupt:
            if not any(self._finished(arm, 0, None) for arm in self.arms[1:]):
                raise
            print("Interrupted. The same call goes on where this one stopped.")
        return self.answer()

    def _train(self, rounds: int) -> bool:
        """Run what is missing of the choice of rates and of rounds; False where the time was over before."""
        tuning = [(arm, _TUNING_SEED, lr) for arm in self.arms for lr in self.rates]
        jobs = [*tuning, *((arm, seed, None) for seed in range(rounds) for arm in self.arms)]
        missing = [job for job in jobs if not self._finished(*job)]
        bar, each = progress_bar(missing), 0.0
        for arm, seed, lr in bar if missing else ():
            bar.comment = f"{arm.name}, {'choice of a rate' if lr else f'seed {seed}'}"
            now = perf_counter()
            if now - self.begun + each > 60 * self.minutes:
                return False
            self._run(arm, seed, lr)
            each = perf_counter() - now
            if lr is None and arm is self.arms[-1]:
                print(f"\n{self.answer()}")
        return True

    # ---- the plan ----
    def _seconds_of_a_run(self) -> float:
        """Seconds of a run: of those there are the mean, else from one epoch of the first arm, which is thrown away."""
        if self.runs.rows:
            return float(self.runs.frame()["seconds"].mean())
        with self.arms[0].learner(self.data.dls, 0) as learn:
            learn.unfreeze()
            begun = perf_counter()
            learn.fit(1)
            return (perf_counter() - begun) * max(arm.epochs for arm in self.arms)

    def _plan(self, seeds: int, each: float, planned: int = 0) -> int:
        """Return the rounds that fit into what is left of the time, where they are more than planned with the plan."""
        n, minute, given = len(self.arms), each / 60, self.minutes - (perf_counter() - self.begun) / 60
        tuned = sum(self._finished(arm, _TUNING_SEED, lr) for arm in self.arms for lr in self.rates)
        missing = [sum(not self._finished(arm, seed, None) for arm in self.arms) for seed in range(seeds)]
        spent = (n * len(self.rates) - tuned + np.cumsum(missing)) * minute  # by the end of each round
        left = next((i for i, runs in enumerate(missing) if runs and spent[i] > given), seeds)
        if left and left <= planned:
            return planned
        choice = f"{n} arms x {len(self.rates)} learning rates + " if self.rates else ""
        finished = n * seeds - sum(missing) + tuned
        plan = f"{choice}{n} arms x {seeds} seeds x {minute:.3g} min"
        plan += (f", less {finished} finished runs," if finished else "") + f" = {spent[-1]:.3g} min; "
        if left == seeds:
            print(f"{plan}{self.minutes:g} are given.")
            return left
        runs_left = int(given / minute)
        if not left:
            epochs = int(self.arms[0].epochs * given / spent[0])
            fewer = [arm.name for arm in self.arms[: int(runs_left / (1 + len(self.rates)))]]
            raise ValueError(
                f"{plan}{self.minutes:g} are given: not one round of all arms fits. Give "
                f"minutes={np.ceil(spent[0]):.0f} for one, or {np.ceil(spent[0] + 2 * n * minute):.0f} for three"
                + (f"; or {epochs} epochs in place of {self.arms[0].epochs}" if epochs else "")
                + (f"; or {len(fewer)} arms: {', '.join(fewer)}" if len(fewer) > 1 else "")
                + "."
            )
        fewer = int(runs_left / (3 + len(self.rates)))
        instead = f", or {fewer} arms x 3" if left < 3 and 1 < fewer < n else ""
        print(f"{plan}{self.minutes:g} are given: {left} seed{'s' * (left > 1)}{instead}.")
        if left < 3:
            print("Fewer than three seeds: the intervals are over images alone, and no winner is named.")
        return left

    # ---- runs ----
    def _key(self, arm: Arm, seed: int, lr: float | None) -> tuple[Any, ...] | None:
        """The key of a run: with lr that of the choice, else at the chosen rate, None where that is not chosen yet."""
        stage = "measured" if lr is None else "choice"
        if lr is None:
            rows = [self.runs.get(self._key(arm, _TUNING_SEED, rate)) for rate in self.rates]
            if any(row is None for row in rows):
                return None
            worth = [float(row["mAP"]) for row in rows if row]
            lr = self.lr if np.isnan(worth).all() else self.rates[int(np.nanargmax(worth))]
        facts = digest(*map(str, self.data.facts.values()), *arm.facts.values())
        return stage, arm.name, "own" if lr is None else lr, seed, facts

    def _finished(self, arm: Arm, seed: int, lr: float | None) -> bool:
        key = self._key(arm, seed, lr)
        return key is not None and self.runs.finished(key)

    def _run(self, arm: Arm, seed: int, lr: float | None) -> None:
        key, data = self._key(arm, seed, lr), self.data if lr is None else self.part
        like = self.arms[0] if arm is not self.arms[0] else None
        rate = None if key[2] == "own" else key[2]
        begun = perf_counter()
        probs, targets, weights = arm.run(data.dls, seed, self.fit, data.dl, like, rate)
        seconds = perf_counter() - begun
        if targets is not None:
            data.check(targets)
        probs = np.full(data.true.shape, np.nan, np.float32) if probs is None else probs
        others = [self._key(arm, seed, other) for other in self.rates] if lr is not None else []
        if any(
            np.array_equal(probs, self.runs.arrays(other)["probs"]) for other in others if self.runs.finished(other)
        ):
            raise ValueError(
                f"Two learning rates made the same network of the arm {arm.name!r}: fit does not use learn.lr. Let it, "
                "as in `lambda learn: learn.fine_tune(5, learn.lr)`, or leave lrs= out."
            )
        values = _measure(data, probs).values
        row = {"seconds": seconds, "weights": weights, "measured": data.measured}
        self.runs.add(key, values | row, {"probs": probs})

    def answer(self) -> Comparison:
        """What the finished runs say."""
        for arm in self.arms:
            for seed in range(len(self.runs.rows)):
                if (arm.name, seed) not in self.measured and self._finished(arm, seed, None):
                    kept = self.runs.arrays(self._key(arm, seed, None))
                    self.measured[arm.name, seed] = _measure(self.data, kept["probs"])
        rows = self.runs.frame()
        rows = rows[(rows["stage"] == "measured") & rows["arm"].isin([arm.name for arm in self.arms])]
        names = [name for name, known in zip(self.data.names, self.data.known, strict=True) if known]
        return Comparison(
            runs=rows.reset_index(drop=True),
            measured=self.measured,
            arms={arm.name: arm.code for arm in self.arms},
            labels=dict(zip(names, self.data.counts[self.data.known].tolist(), strict=True)),
            left_out=self.data.unknown,
        )


def _measure(data: Data, probs: np.ndarray) -> Measured:
    return measure(probs, data.true, data.single_label, data.counts, data.n_train)
