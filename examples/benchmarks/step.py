"""Cost of a whole training step with and without `CRLCallback`, side by side in one run.

Prints, per network and image size, the median time of a step (forward, loss, backward, optimiser) of one fastai
`Learner` with its plain loss and of one with the callback added, their ratio, and the callback's own time, eager and
compiled; on CUDA also in mixed precision. Then images per second with 1 and 2 processes on the CPU.

    python examples/benchmarks/step.py --archs resnet18 --sizes 64,128 --bs 32
"""

import platform
import statistics
import subprocess
import sys
import time
from datetime import date

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (adds to_fp16 to Learner)
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastcore.script import call_parse, store_true
from torch import nn
from torchvision import models

from fastai_crl.callback import CRLCallback
from fastai_crl.hpa import HPA_COUNTS, HPA_N_IDS

CHANNELS, LABELS = 4, len(HPA_COUNTS)


def make_model(arch: str) -> nn.Module:
    model = getattr(models, arch)(num_classes=LABELS)
    model.conv1 = nn.Conv2d(CHANNELS, 64, 7, 2, 3, bias=False)
    return model


class Batches:
    """A data loader that gives the same random batch `n` times, so that loading costs nothing."""

    def __init__(self, bs: int, size: int, n: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        rate = torch.tensor(HPA_COUNTS) / HPA_N_IDS
        x = torch.randn(bs, CHANNELS, size, size, generator=generator)
        self.batch = (x.to(device), (torch.rand(bs, LABELS, generator=generator) < rate).float().to(device))
        self.n, self.bs, self.device, self.dataset, self.n_inp = n, bs, device, [], 1

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        return (self.batch for _ in range(self.n))

    def to(self, device: torch.device) -> None:
        pass


class Clock(Callback):
    """Seconds of each training step."""

    order, run_valid = -20, False

    def __init__(self):
        self.seconds = []

    def tick(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before_batch(self):
        self.start = self.tick()

    def after_batch(self):
        self.seconds.append(self.tick() - self.start)


def make_learner(arch: str, size: int, bs: int, steps: int, with_crl: bool, compiled: bool, half: bool) -> Learner:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = Batches(bs, size, steps, device)
    dls = DataLoaders(batches, Batches(bs, size, 0, device), device=device)
    cbs = [Clock(), *([CRLCallback(alpha=0.4, schedule=[1.0])] if with_crl else [])]
    learn = Learner(dls, make_model(arch).to(device), loss_func=BCEWithLogitsLossFlat(), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda log: None
    if compiled:
        learn.model = torch.compile(learn.model)
        if with_crl:
            learn.crl.term.rectify = torch.compile(learn.crl.term.rectify)
    return learn.to_fp16() if half else learn


def measure(learners: dict[str, Learner], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of a step, and on CUDA peak MiB, of each; in turns, so that a noisy machine favours none."""
    peak = dict.fromkeys(learners, float("nan"))
    for learn in learners.values():  # warm-up, compilation
        learn.fit(1)
        learn.clock.seconds.clear()
    for _ in range(rounds):
        for name, learn in learners.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            learn.fit(1)
            if torch.cuda.is_available():
                peak[name] = torch.cuda.max_memory_allocated() / 2**20
    return {name: 1000 * statistics.median(learn.clock.seconds) for name, learn in learners.items()}, peak


def peak_memory(arch: str, size: int, bs: int, with_crl: bool) -> float:
    """Peak resident MiB of a fresh process that trains two steps (CPU)."""
    code = (
        f"import sys; sys.path[:0] = {sys.path[:1]!r}; import step; "
        f"step.make_learner({arch!r}, {size}, {bs}, 2, {with_crl}, False, False).fit(1); "
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def throughput(arch: str, size: int, bs: int, steps: int) -> None:
    """Run by each process of a distributed start: a step with the global batch mined, images per second in all."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(make_model(arch)) if dist.get_world_size() > 1 else make_model(arch)
    results = []
    for with_crl in (False, True):
        dls = DataLoaders(*(Batches(bs, size, n, torch.device("cpu")) for n in (steps, 0)), device=torch.device("cpu"))
        cbs = [Clock(), *([CRLCallback(alpha=0.4, schedule=[1.0])] if with_crl else [])]
        learn = Learner(dls, model, loss_func=BCEWithLogitsLossFlat(), cbs=cbs)
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda log: None
        learn.fit(2)
        results.append(bs * dist.get_world_size() / statistics.median(learn.clock.seconds[1:]))
    if dist.get_rank() == 0:
        print(f"| {dist.get_world_size()} | {results[0]:.1f} | {results[1]:.1f} | {results[1] / results[0]:.3f} |")
    dist.destroy_process_group()


@call_parse
def main(
    archs: str = "resnet18,resnet34",  # Networks, comma separated
    sizes: str = "64,128,256",  # Image sides in pixels, comma separated
    bs: int = 32,  # Batch size
    steps: int = 4,  # Steps per round
    rounds: int = 3,  # Rounds
    no_compile: store_true = False,  # Leave the compiled networks out
    worker: store_true = False,  # Internal: be one process of the throughput table
):
    """Print the tables."""
    archs, sizes = archs.split(","), [int(s) for s in sizes.split(",")]
    if worker:
        return throughput(archs[0], sizes[0], bs, steps)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {date.today()}; batch {bs}, {CHANNELS} channels, {LABELS} labels\n")
    print(
        "Medians of a step in ms; memory in MiB: CUDA peak, or resident peak of a fresh process on the CPU (eager).\n"
    )
    print("| network | pixels | mode | plain | + CRL | ratio | CRL adds | memory | + CRL |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    modes = ["eager"] + ["compiled"] * (not no_compile) + ["mixed precision"] * cuda
    for arch in archs:
        for size in sizes:
            for mode in modes:
                learners = {
                    name: make_learner(
                        arch, size, bs, steps, name == "crl", mode == "compiled", mode.startswith("mixed")
                    )
                    for name in ("plain", "crl")
                }
                ms, peak = measure(learners, rounds)
                if not cuda and mode == "eager":
                    peak = {name: peak_memory(arch, size, bs, name == "crl") for name in learners}
                print(
                    f"| {arch} | {size} | {mode} | {ms['plain']:.1f} | {ms['crl']:.1f} | {ms['crl'] / ms['plain']:.3f} "
                    f"| {ms['crl'] - ms['plain']:.1f} | {peak['plain']:.0f} | {peak['crl']:.0f} |",
                    flush=True,
                )
    print(f"\nImages per second on the CPU, {archs[0]} at {sizes[0]} pixels, one thread a process:\n")
    print("| processes | plain | + CRL, batch of all mined | ratio |\n| --- | --- | --- | --- |", flush=True)
    for n in (1, 2):
        torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        arguments = ["--worker", "--archs", archs[0], "--sizes", str(sizes[0]), "--bs", str(bs), "--steps", str(steps)]
        subprocess.run(
            [*torchrun, "--nproc-per-node", str(n), __file__, *arguments], check=True, stderr=subprocess.PIPE
        )
