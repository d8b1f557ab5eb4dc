"""Mining over the batches of several real processes: gradients equal those of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastai_crl.distributed import n_processes, scale_gradient
from fastai_crl.losses.crl_loss import CRL
from fastai_crl.samplers import SAMPLERS

pytest.importorskip("accelerate", reason="fastai trains distributed with accelerate")
pytest.importorskip("fastai.distributed")

from .distributed_worker import make_data, make_model

WORKER = Path(__file__).with_name("distributed_worker.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"),
)  # its multi-process launcher is the one called "gpu"; the processes themselves choose the CPU


RUNS = {  # launcher, processes, what they run
    "torchrun-2": (
        *(TORCHRUN, 2),
        ("gather-class", "gather-instance", "alone-class", "uneven-class", "sampled-class_aware", "predicted-within"),
    ),
    "torchrun-4": (
        TORCHRUN,
        4,
        ("gather-class", "uneven-class", "uneven-instance", "sampled-repeat_factor", "predicted-after"),
    ),
    "accelerate-2": (ACCELERATE, 2, ("gather-class",)),
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Start the processes of one of RUNS, once, and return what one of its parts saw."""
    results = {}

    def result(name, part):
        if name not in results:
            launcher, size, parts = RUNS[name]
            out = tmp_path_factory.mktemp("distributed") / "result.pt"
            command = [sys.executable, "-W", "ignore", "-m", *launcher, str(size), str(WORKER), *parts, str(out)]
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
            results[name] = torch.load(out, weights_only=False)
        return results[name][part]

    return result


def check_step(result, level):
    x, y, grads = result["step"]
    model = make_model()
    features = model[:2](x)
    logits = model[2](features)
    crl = CRL(k=5, level=level)
    loss = 0.4 * crl(logits, y, features) + 0.6 * nn.functional.binary_cross_entropy_with_logits(logits, y)
    for ours, theirs in zip(grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "level"),
    [("torchrun-2", "class"), ("torchrun-2", "instance"), ("torchrun-4", "class"), ("accelerate-2", "class")],
)
def test_gradients_are_those_of_the_whole_batch(launch, name, level):
    result = launch(name, f"gather-{level}")
    assert result["step"][0].shape[0] == 24
    check_step(result, level)
    # Both batches of the epoch, at learning rate 0: the counts are those of the whole batches, once.
    x, _ = make_data(48)
    seen = result["step"][0]
    rest = torch.stack([row for row in x if not (row == seen).all(1).any()])
    assert len(rest) == 24
    crl, total = CRL(k=5, level=level), 0
    lookup = {tuple(a.tolist()): b for a, b in zip(*make_data(48), strict=True)}
    for part in (seen, rest):
        y = torch.stack([lookup[tuple(a.tolist())] for a in part])
        features = make_model()[:2](part)
        total = total + crl.loss_and_triplets(make_model()[2](features), y, features).triplets
    assert result["counts"].tolist() == total.tolist()


@pytest.mark.slow
def test_each_process_alone(launch):
    """gather=False: every process mines its own rows, and the counts are summed over them."""
    result = launch("torchrun-2", "alone-class")
    x, y, grads = result["step"]
    model, crl, loss = make_model(), CRL(k=5), 0
    for part in (slice(0, 12), slice(12, 24)):
        z = model(x[part])
        base = nn.functional.binary_cross_entropy_with_logits(z, y[part])
        mined, counts = crl.loss_and_triplets(z, y[part])
        loss = loss + (0.4 * mined + 0.6 * base if counts.any() else base) / 2
    for ours, theirs in zip(grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "level"), [("torchrun-2", "class"), ("torchrun-4", "class"), ("torchrun-4", "instance")]
)
def test_uneven_batches(launch, name, level):
    result = launch(name, f"uneven-{level}")
    x, y = make_data(40)
    model, crl = make_model(), CRL(k=5, level=level)
    features = model[:2](x)
    term, counts = crl.loss_and_triplets(model[2](features), y, features)
    torch.testing.assert_close(result["value"], term.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(result["counts"], counts) and counts.any()
    expected = torch.autograd.grad(term, list(model.parameters()), allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(result["grads"], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sampler"), [("torchrun-2", "class_aware"), ("torchrun-4", "repeat_factor")])
def test_samplers_over_processes(launch, name, sampler):
    """The k-th batches of all processes together are the sampler's k-th batch, in each epoch."""
    drawn = launch(name, f"sampled-{sampler}")["drawn"]
    made, expected = SAMPLERS[sampler](make_data(96)[1]), []
    for epoch in range(2):
        order = made.indices(epoch)
        expected += np.sort(order[: len(order) // 16 * 16].reshape(-1, 16), 1).tolist()
    assert [sorted(b) for b in drawn] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("torchrun-2", "predicted-within"), ("torchrun-4", "predicted-after")])
def test_every_process_predicts_all_and_the_first_writes(launch, name, part):
    found = launch(name, part)
    assert len(found) == int(name[-1])
    for result in found:
        assert max(result["off"][:2]) < 1e-6 and result["off"][2] < 1e-3  # kept in half precision
        assert result["training"] == 14 and result["turned"].shape == (9, 6)
        assert torch.equal(result["turned"], found[0]["turned"])
        assert result["thresholds"].tolist() == found[0]["thresholds"].tolist()
    assert found[0]["submission"] < 1e-6 and {result["submission"] for result in found[1:]} == {None}


def test_one_process():
    assert n_processes() == 1
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = scale_gradient(x, 3.0)
    y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.full((2,), 3.0))
