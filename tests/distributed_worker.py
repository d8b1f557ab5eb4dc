"""One process of a distributed test: MODE-LEVEL (or sampled-SAMPLER) ... OUT. Rank 0 writes what it saw to OUT."""

import sys

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.distributed import setup_distrib  # noqa: F401  (adds distrib_ctx to Learner)
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastai_crl.callback import CRLCallback
from fastai_crl.distributed import gather_rows, scale_gradient
from fastai_crl.losses.crl_loss import CRL
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


def uneven_run(level):
    """Processes with different numbers of rows, one with none: the term alone, through DistributedDataParallel."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = make_data(40)
    cuts = [0, 0, 25, 33, 40] if size == 4 else [0, 29, 40]
    own = slice(cuts[rank], cuts[rank + 1])
    model = DistributedDataParallel(make_model())
    features = model.module[:2](x[own]) if level == "instance" else None
    logits, targets, *features = gather_rows(model(x[own]), y[own], *([] if features is None else [features]))
    term, counts = CRL(k=5, level=level).loss_and_counts(logits, targets, *features)
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
        if mode == "sampled":
            results[name] = sampled_run(level)
        else:
            results[name] = uneven_run(level) if mode == "uneven" else fastai_run(mode == "gather", level)
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
