"""A callback that resamples in one part of training only."""

from __future__ import annotations

from fastai.callback.core import Callback

from fastai_crl._fastai import inner_loader

from .loader import SampledDL


class ResampleCallback(Callback):
    """Resample in one part of training only: `SampledDL` draws with its sampler from `start` to `stop`, else uniformly.

    Rebalanced batches help features and rare labels, but teach the network that rare labels are frequent: its
    probabilities come out too high. A last phase of uniform batches (the default) corrects that. `start=0.8, stop=1` is
    the opposite order, deferred re-balancing (Cao et al., LDAM-DRW, NeurIPS 2019, section 3.3): features from the
    natural distribution first.

    The switch is made between epochs. Epochs of the two kinds differ in length, and fastai's schedules follow.

    Args:
        start, stop: shares of the epochs, 0 <= start < stop <= 1.

    Raises:
        ValueError: shares out of order; when training starts, a training loader that is not a `SampledDL`.
    """

    run_valid = False

    def __init__(self, start: float = 0.0, stop: float = 0.8):
        super().__init__()
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start={start}, stop={stop}: give shares of the epochs with 0 <= start < stop <= 1.")
        self.start, self.stop = start, stop

    def before_train(self) -> None:
        loader = self._loader()
        if loader is None:
            raise ValueError(
                f"The training loader is a {type(self.learn.dls.train).__name__}, which has no sampler to switch: pass "
                'sampler="class_aware" to from_csv, or make the loaders with with_sampler(dls).'
            )
        # With half an epoch's slack: 0.8 of 10 epochs is after the eighth, however 0.8 * 10 is rounded.
        done = self.learn.epoch + 0.5
        loader.resample = self.start * self.learn.n_epoch < done < self.stop * self.learn.n_epoch

    def after_fit(self) -> None:
        if (loader := self._loader()) is not None:
            loader.resample = True

    def _loader(self) -> SampledDL | None:
        train = inner_loader(self.learn.dls.train)
        return train if isinstance(train, SampledDL) else None
