"""One process of a distributed test: MODE-LEVEL (or sampled-SAMPLER, predicted-WHEN) ... OUT.

Rank 0 writes what it saw to OUT.
"""

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.distributed import setup_distrib  # noqa: F401  (adds distrib_ctx to Learner)
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastai_crl.callback import CRLCallback
from fastai_crl.data import HPADataLoaders
from fastai_crl.distributed import gather_rows, scale_gradient
from fastai_crl.evaluate import CRLInterpretation, EpochPreds, MacroF1, predict_probabilities
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.learner import CRLLearner
from fastai_crl.losses.crl_loss import CRL
from fastai_crl.predict import d4_tta, write_submission
from fastai_crl.samplers import with_sampler


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))


def make_data(n):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=generator)
    return x, (torch.rand(n, 6, generator=generator) < 0.15).float()


class Spy(Callback):
    """Keeps every training step's whole batch and its gradients, after they were averaged over the processes."""

    run_valid = False

    def before_fit(self):
        self.steps = []

    def before_step(self):
        if not self.steps:
            x, y = gather_rows(self.learn.xb[0], self.learn.yb[0])
            self.steps.append((x, y, [p.grad.clone() for p in self.learn.model.parameters()]))


def fastai_run(gather, level):
    """A fastai learner in `distrib_ctx`, at learning rate 0."""
    data = torch.utils.data.TensorDataset(*make_data(48))
    dls = DataLoaders.from_dsets(data, data, bs=48 // dist.get_world_size() // 2, num_workers=0, device="cpu")
    crl = CRLCallback(alpha=0.4, schedule=lambda pct: 1.0, gather=gather, k=5, level=level)
    learn = Learner(dls, make_model(), loss_func=BCEWithLogitsLossFlat(), cbs=[crl, Spy()])
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar():
        learn.fit(1, lr=0.0)
    return {"step": learn.spy.steps[0], "counts": crl.history[0][2], "columns": list(learn.recorder.metric_names)}


def sampled_run(sampler):
    """Two epochs in `distrib_ctx`: the samples of the k-th batches of all processes together."""
    x, y = make_data(96)
    data = torch.utils.data.TensorDataset(torch.cat([torch.arange(96.0)[:, None], x[:, 1:]], 1), y)
    dls = DataLoaders.from_dsets(data, data, bs=16 // dist.get_world_size(), num_workers=0, device="cpu")
    drawn = []

    class Drawn(Callback):
        run_valid = False

        def after_batch(self):
            drawn.append(gather_rows(self.learn.xb[0])[0][:, 0].long().tolist())

    cbs = [CRLCallback(alpha=0.4, k=5), Drawn()]
    learn = Learner(with_sampler(dls, sampler, y), make_model(), loss_func=BCEWithLogitsLossFlat(), cbs=cbs)
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar():
        learn.fit(2, lr=0.0)
    return {"drawn": drawn, "validated": len(learn.recorder.values)}


def predicted_run(context):
    """Predictions of every kind after, or within, distributed training: each process has them all, the first writes."""
    x, y = torch.randn(23, 4, 6, 6, generator=torch.Generator().manual_seed(2)), make_data(23)[1]
    valid = torch.utils.data.TensorDataset(x[:9], y[:9])  # nine images are no multiple of the processes
    dls = DataLoaders.from_dsets(torch.utils.data.TensorDataset(x[9:], y[9:]), valid, bs=2, num_workers=0, device="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6))
    epochs = EpochPreds()
    learn = CRLLearner(dls, model, BCEWithLogitsLossFlat(), metrics=MacroF1(), cbs=[CRLCallback(alpha=0.4), epochs])
    with learn.no_bar(), learn.no_logging():
        with learn.distrib_ctx(sync_bn=False, cpu=True):
            learn.fit(1, lr=0.1)
            found = predictions_of(learn) if context == "within" else None
        found = found or predictions_of(learn)
        with torch.no_grad():
            truth = learn.model.eval()(x[:9]).sigmoid()
    found["off"] = [float((p - truth).abs().max()) for p in (found["plain"], found["interp"], epochs.epochs[-1])]
    whole = [None] * dist.get_world_size()
    dist.all_gather_object(whole, {**found, "submission": submission_run(context)})
    return whole


def predictions_of(learn):
    return {
        "plain": predict_probabilities(learn)[0],
        "training": predict_probabilities(learn, 0)[0].shape[0],
        "turned": d4_tta(learn)[0],
        "interp": torch.from_numpy(CRLInterpretation.from_learner(learn).probs),
        "thresholds": learn.fit_thresholds(folds=2).thresholds,
    }


def submission_run(context):
    """How far the rows of a submission are from what the model makes of their images; None where nothing is written."""
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        (home / "train").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 8, 8), np.uint8)
        for i, image in enumerate(pixels):
            for channel, plane in zip(HPA_CHANNELS, image, strict=True):
                Image.fromarray(plane).save(home / "train" / f"{i}_{channel}.png")
        pd.DataFrame({"Id": range(10), "Target": ["a", "b"] * 5}).to_csv(home / "train.csv", index=False)
        dls = HPADataLoaders.from_csv(home, size=8, bs=4, num_workers=0, batch_tfms=[], stats=None, device="cpu")
        torch.manual_seed(0)
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), BCEWithLogitsLossFlat())
        with learn.distrib_ctx(sync_bn=False, cpu=True) if context == "within" else nullcontext():
            table = write_submission(learn, home / "train", home / "s.csv", progress=False)
        if table is None:
            return None
        probs = pd.read_csv(home / "s_probs.csv")[["a", "b"]].to_numpy()
        truth = learn.model(torch.from_numpy(pixels).float() / 255).sigmoid().detach().numpy()
        return float(np.abs(probs - truth).max())


def uneven_run(level):
    """Processes with different numbers of rows, one with none: the term alone, through DistributedDataParallel."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = make_data(40)
    cuts = [0, 0, 25, 33, 40] if size == 4 else [0, 29, 40]
    own = slice(cuts[rank], cuts[rank + 1])
    model = DistributedDataParallel(make_model())
    features = model.module[:2](x[own]) if level == "instance" else None
    logits, targets, *features = gather_rows(model(x[own]), y[own], *([] if features is None else [features]))
    term, counts = CRL(k=5, level=level).loss_and_triplets(logits, targets, *features)
    term = scale_gradient(term, size)
    (term + 0 * logits.sum()).backward()  # all parameters take part, as they do beside a base loss
    return {"value": term.detach(), "counts": counts, "grads": [p.grad for p in model.parameters()]}


if __name__ == "__main__":
    *runs, out = sys.argv[1:]
    # fastai 2.8's DistributedDL sends its indices through the GPU, whatever the backend; these processes have none.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    results = {}
    for name in runs:
        mode, level = name.split("-")
        if mode in ("sampled", "predicted"):
            results[name] = (sampled_run if mode == "sampled" else predicted_run)(level)
        else:
            results[name] = uneven_run(level) if mode == "uneven" else fastai_run(mode == "gather", level)
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
