"""The compiled loops against the tensor operations that they stand in for; `test_losses` holds both to the oracle."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_crl.losses import crl as rectification
from fastai_crl.losses.crl_loss import CRL
from fastai_crl.losses.hinge import loops as _hinge_cpu

needs_numba = pytest.mark.skipif(not _hinge_cpu.NUMBA, reason="numba is not installed")


def both(monkeypatch, crl, logits, targets):
    """Loss, gradient and counts of either engine."""
    for numba in (True, False):
        monkeypatch.setattr(rectification, "NUMBA", numba)
        x = logits.clone().requires_grad_()
        loss = crl(x, targets)
        yield loss.detach(), torch.autograd.grad(loss, x)[0], crl.counts


@needs_numba
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_the_tensor_operations(data):
    """Batches full of ties, lone positives, fractions, labels that all or none have, k > n."""
    n, n_classes = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(n, n_classes, generator=generator)
    if data.draw(st.booleans()):
        logits = logits.round()
    targets = (
        torch.rand(n, n_classes, generator=generator) < data.draw(st.sampled_from([0, 0.05, 0.3, 0.9, 1]))
    ).float()
    if data.draw(st.booleans()):
        targets[torch.rand(n, n_classes, generator=generator) < 0.2] = 0.5
    crl = CRL(
        k=data.draw(st.integers(1, 50)),
        rho=data.draw(st.sampled_from([0.1, 0.5, 1.0])),
        margin=data.draw(st.sampled_from([None, 0.3])),
        scope=data.draw(st.sampled_from(["joint", "attribute"])),
        criterion=data.draw(st.sampled_from(["relative", "ranking"])),
        score_space=data.draw(st.sampled_from(["probability", "logit"])),
        average=data.draw(st.sampled_from(["triplet", "label"])),
        frequency=data.draw(st.sampled_from([None, [3, 1, 2, 2, 9, 0][:n_classes]])),
    )
    with pytest.MonkeyPatch.context() as patch:
        for found, expected in zip(*both(patch, crl, logits, targets), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@needs_numba
@pytest.mark.parametrize("criterion", ["relative", "ranking"])
@pytest.mark.parametrize("k", [5, 25, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_large_batches(monkeypatch, ties, k, criterion):
    logits, targets = torch.randn(1024, 28, dtype=torch.float64), (torch.rand(1024, 28) < 0.04).double()
    if ties:  # among more samples than a sort that is not stable leaves in order
        logits, targets[:, 0] = logits.round(), torch.arange(1024) % 6 == 0
    for found, expected in zip(*both(monkeypatch, CRL(k, criterion=criterion), logits, targets), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@needs_numba
@pytest.mark.parametrize("fraction", [1e-30, 1 - 2**-24])
def test_the_smallest_fractions_are_on_neither_side(monkeypatch, fraction):
    """1 - 1e-30 is 1, but nobody's label."""
    targets = torch.ones(12, 2)
    targets[:3] = 0
    targets[3:5] = fraction
    crl = CRL(4, scope="attribute")
    for found, expected in zip(*both(monkeypatch, crl, torch.randn(12, 2), targets), strict=True):
        torch.testing.assert_close(found, expected)
    assert crl.counts.tolist() == [3 * 2 * 4] * 2


@needs_numba
def test_inputs_in_any_memory_order(monkeypatch):
    logits, targets = torch.randn(6, 64).T, (torch.rand(6, 64) < 0.1).float().T
    assert not logits.is_contiguous()
    for found, expected in zip(*both(monkeypatch, CRL(4), logits, targets), strict=True):
        torch.testing.assert_close(found, expected)
    assert expected.any()


@needs_numba
def test_operator_is_well_behaved():
    """Schema, fake tensors and tracing, as `torch.compile` relies on them."""
    p, y = torch.rand(12, 3), (torch.rand(12, 3) < 0.4).float()
    for frequency in (None, torch.tensor([1.0, 2.0, 3.0])):
        torch.library.opcheck(_hinge_cpu.hinge_weights, (p, y, frequency, 6, 4, 0.5, False, False, True))


WITHOUT = """
import sys
sys.modules["numba"] = None  # what `import numba` finds where it is not installed
import torch
from fastai_crl.losses.hinge import loops as _hinge_cpu
from fastai_crl.losses.crl_loss import CRL
torch.manual_seed(0)
logits, targets = torch.randn(32, 4, requires_grad=True), (torch.rand(32, 4) < 0.2).float()
print(_hinge_cpu.NUMBA, CRL(4)(logits, targets).item())
"""


@needs_numba
def test_does_without_numba():
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    numba, loss = out.stdout.split()
    logits, targets = torch.randn(32, 4, requires_grad=True), (torch.rand(32, 4) < 0.2).float()
    assert numba == "False" and float(loss) == pytest.approx(CRL(4)(logits, targets).item(), rel=1e-6)


UNWRITABLE = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []  # no folder of any kind can be written
import torch
from fastai_crl.losses.hinge import loops as _hinge_cpu
p, y = torch.rand(8, 2), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).repeat(2, 1)
print(_hinge_cpu.hinge_weights(p, y, None, 8, 3, 0.5, False, False, False)[2].tolist())
"""


@needs_numba
@pytest.mark.slow
def test_compiles_where_nothing_can_be_written():
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    out = subprocess.run([sys.executable, "-c", UNWRITABLE], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[36, 36]"
