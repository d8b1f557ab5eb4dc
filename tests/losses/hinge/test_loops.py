"""The compiled loops against the tensor operations that they stand in for; `test_losses` holds both to the oracle."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_crl.losses.crl_loss import CRL
from fastai_crl.losses.hinge import loops

needs_numba = pytest.mark.skipif(not loops.AVAILABLE, reason="numba is not installed")


def both(options, logits, targets):
    """Loss, gradient and counts of either engine."""
    for engine in ("loops", "tensors"):
        x = logits.clone().requires_grad_()
        loss, counts = CRL(**options, engine=engine).loss_and_counts(x, targets)
        yield loss.detach(), torch.autograd.grad(loss, x)[0], counts


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
    options = {
        "k": data.draw(st.integers(1, 50)),
        "rho": data.draw(st.sampled_from([0.1, 0.5, 1.0])),
        "margin": data.draw(st.sampled_from([None, 0.3])),
        "scope": data.draw(st.sampled_from(["joint", "attribute"])),
        "criterion": data.draw(st.sampled_from(["relative", "ranking"])),
        "score_space": data.draw(st.sampled_from(["probability", "logit"])),
        "average": data.draw(st.sampled_from(["triplet", "label"])),
        "frequency": data.draw(st.sampled_from([None, [3, 1, 2, 2, 9, 0][:n_classes]])),
    }
    for found, expected in zip(*both(options, logits, targets), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@needs_numba
@pytest.mark.parametrize("criterion", ["relative", "ranking"])
@pytest.mark.parametrize("k", [5, 25, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_large_batches(ties, k, criterion):
    logits, targets = torch.randn(1024, 28, dtype=torch.float64), (torch.rand(1024, 28) < 0.04).double()
    if ties:  # among more samples than a sort that is not stable leaves in order
        logits, targets[:, 0] = logits.round(), torch.arange(1024) % 6 == 0
    for found, expected in zip(*both({"k": k, "criterion": criterion}, logits, targets), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@needs_numba
@pytest.mark.parametrize("fraction", [1e-30, 1 - 2**-24])
def test_the_smallest_fractions_are_on_neither_side(fraction):
    """1 - 1e-30 is 1, but nobody's label."""
    targets = torch.ones(12, 2)
    targets[:3] = 0
    targets[3:5] = fraction
    for found, expected in zip(*both({"k": 4, "scope": "attribute"}, torch.randn(12, 2), targets), strict=True):
        torch.testing.assert_close(found, expected)
    assert expected.tolist() == [3 * 2 * 4] * 2


@needs_numba
def test_inputs_in_any_memory_order():
    logits, targets = torch.randn(6, 64).T, (torch.rand(6, 64) < 0.1).float().T
    assert not logits.is_contiguous()
    for found, expected in zip(*both({"k": 4}, logits, targets), strict=True):
        torch.testing.assert_close(found, expected)
    assert expected.any()


@needs_numba
def test_operator_is_well_behaved():
    """Schema, fake tensors and tracing, as `torch.compile` relies on them."""
    p, y = torch.rand(12, 3), (torch.rand(12, 3) < 0.4).float()
    past, valid = torch.rand(3, 5), torch.rand(3, 5) < 0.5
    for frequency in (None, torch.tensor([1.0, 2.0, 3.0])):
        for memory in ((None, None), (past, valid)):
            torch.library.opcheck(loops.operator, (p, y, frequency, *memory, 0.5, 4, 0.5, False, False, True))


WITHOUT = """
import sys
sys.modules["numba"] = None  # what `import numba` finds where it is not installed
import torch
from fastai_crl.losses.hinge import loops
from fastai_crl.losses.crl_loss import CRL
torch.manual_seed(0)
logits, targets = torch.randn(32, 4, requires_grad=True), (torch.rand(32, 4) < 0.2).float()
print(loops.AVAILABLE, CRL(4)(logits, targets).item())
"""


@needs_numba
def test_does_without_numba():
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    numba, loss = out.stdout.split()
    logits, targets = torch.randn(32, 4, requires_grad=True), (torch.rand(32, 4) < 0.2).float()
    assert numba == "False" and float(loss) == pytest.approx(CRL(4)(logits, targets).item(), rel=1e-6)


BATCH = """
import torch
from fastai_crl.losses import CRL
p, y = torch.linspace(-1, 1, 16).view(8, 2), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).repeat(2, 1)
print(CRL(3, engine="loops", rho=1).loss_and_counts(p, y))
"""
UNWRITABLE = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []  # no folder of any kind can be written
"""
FULL = """
import numba.core.caching
def full(*args): raise OSError(28, "No space left on device")
numba.core.caching.IndexDataCacheFile._dump = full
numba.core.caching.IndexDataCacheFile.save = full
"""
NO_COMPILER = """
import numba
def broken(*args, **kwargs): raise ImportError("no LLVM")
from fastai_crl.losses.hinge import loops
numba.njit = broken
"""


def run_with_cache(folder, code=""):
    """Loss, counts and the warnings of the loops in a process whose cache is `folder`."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    out = subprocess.run([sys.executable, "-c", code + BATCH], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    return out.stdout, [line for line in out.stderr.splitlines() if "RuntimeWarning: numba" in line]


@needs_numba
@pytest.mark.slow
def test_a_cache_that_fails_is_done_without(tmp_path):
    """Cut short, of other content, full, nowhere to be: the same loss, and one warning."""
    expected, warned = run_with_cache(tmp_path)
    assert not warned and len(list(tmp_path.rglob("*.nbi"))) == 1
    assert run_with_cache(tmp_path) == (expected, [])
    for suffix, content in (("*.nbi", b""), ("*.nbc", b""), ("*.nbc", b"something else")):
        (file,) = tmp_path.rglob(suffix)
        whole = file.read_bytes()
        file.write_bytes(content)
        found, warned = run_with_cache(tmp_path)
        assert found == expected and len(warned) == 1 and "NUMBA_CACHE_DIR" in warned[0]
        file.write_bytes(whole)
    for code in (UNWRITABLE, FULL):
        found, warned = run_with_cache(tmp_path / "none", code)
        assert found == expected and len(warned) == 1 and "NUMBA_CACHE_DIR" in warned[0]


@needs_numba
@pytest.mark.slow
def test_without_a_compiler_tensors_are_used(tmp_path):
    expected, _ = run_with_cache(tmp_path)
    found, warned = run_with_cache(tmp_path, NO_COMPILER)
    assert found == expected and "tensor operations are used" in warned[-1]
