"""The rectification term against plain loops, in value and gradient, and in all that a batch can throw at it."""

import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from fastai.torch_core import TensorImage, TensorMultiCategory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_crl.losses import CRL
from fastai_crl.losses import crl as rectification
from fastai_crl.losses.criteria import CRITERIA, Distribution
from fastai_crl.losses.hinge import joint, weights
from tests import oracle

VARIANTS = [
    (level, criterion)
    for level in ("class", "instance")
    for criterion in CRITERIA
    if (level, criterion) != ("instance", "ranking")
]


@pytest.fixture(scope="module", params=["read", "static"], autouse=True)
def shapes(request):
    """On a CPU lists are as long as the batch needs, which is read; elsewhere as long as they can be: both are held."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "static":
            for module in (weights, joint):
                patch.setattr(module, "readable", lambda _: False)
        yield


def expected_loss(logits, targets, features, crl):
    """The oracle's loss for the options of `crl`, differentiable in logits and features."""
    n_classes = logits.shape[1]
    if targets.ndim == 1:
        rows = nn.functional.one_hot(targets, n_classes).tolist()
        p = logits.softmax(1)
    else:
        rows, p = targets.tolist(), logits.sigmoid()
    if crl.score_space == "logit":
        others = logits.unsqueeze(1).masked_fill(torch.eye(n_classes, dtype=torch.bool), -math.inf)
        p = logits if targets.ndim == 2 else logits - others.logsumexp(2).clamp_min(-1e9)
    scores = p
    if crl.criterion.name == "ranking":
        margin = {"probability": 1.0, "logit": 2.0}[crl.score_space] if crl.margin is None else crl.margin
        return oracle.ranking(scores, rows, crl.k, crl.rho, crl.scope, margin, crl.average)[0]
    found = oracle.triplets(scores.tolist(), rows, crl.k, crl.rho, crl.scope, crl.level, features.tolist())
    if not found:
        return None
    each, positives, negatives = oracle.pair_distances(found, scores, rows, crl.scope, crl.level, features)
    margin = 0.5 if crl.score_space == "probability" else 2.0
    if crl.level == "instance":
        margin = 2 * math.pi / (n_classes if crl.scope == "joint" else 2)
    margin = margin if crl.margin is None else crl.margin
    if crl.criterion.name == "relative":
        return oracle.relative(each, margin, [c for *_, c in found] if crl.average == "label" else None)
    if crl.criterion.name == "absolute":
        return oracle.absolute(positives, negatives, margin)
    if crl.level == "instance":
        low, high = 0.0, max(oracle.distance(x, y) for x in features.tolist() for y in features.tolist())
    elif crl.score_space == "probability":
        low, high = -1.0, 1.0
    else:
        high = float(scores.max() - scores.min())
        low = -high
    return oracle.distribution(positives, negatives, low, high, crl.criterion.bins)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize(("level", "criterion"), VARIANTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_value_and_gradient_equal_plain_loop(data, level, criterion, scope, space):
    n, n_classes = data.draw(st.integers(2, 14)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64) * data.draw(st.sampled_from([1, 5]))
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if data.draw(st.booleans()):
        targets = torch.randint(0, n_classes, (n,), generator=generator)
    else:
        targets = (torch.rand(n, n_classes, generator=generator) < data.draw(st.sampled_from([0.2, 0.4, 0.8]))).double()
        if data.draw(st.booleans()):
            targets[torch.rand(n, n_classes, generator=generator) < 0.2] = 0.3
    crl = CRL(
        k=data.draw(st.integers(1, 16)),
        rho=data.draw(st.sampled_from([0.3, 0.5, 1.0])),
        margin=data.draw(st.sampled_from([None, 0.0, 0.7])),
        scope=scope,
        level=level,
        criterion=Distribution(data.draw(st.sampled_from([2, 17, 100]))) if criterion == "distribution" else criterion,
        score_space=space,
        average=data.draw(
            st.sampled_from(["triplet", "label"] if criterion in ("relative", "ranking") else ["triplet"])
        ),
    )
    inputs = (logits.requires_grad_(), features.requires_grad_())
    expected = expected_loss(logits, targets, features, crl)
    found, counts = crl.loss_and_triplets(logits, targets, features)
    if expected is None:
        assert found.item() == 0 and not counts.any() and not any(g.any() for g in gradients(found, *inputs))
        return
    tolerance = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(found, torch.as_tensor(expected), **tolerance)
    if expected.requires_grad:
        for ours, theirs in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


def batch(n=40, n_classes=6, rate=0.12, dtype=torch.float32):
    logits, features = torch.randn(n, n_classes, dtype=dtype), torch.randn(n, 4, dtype=dtype)
    return logits.requires_grad_(), (torch.rand(n, n_classes) < rate).float(), features.requires_grad_()


def run(crl, logits, targets, features):
    """Loss, gradients in logits and features, triplets per label."""
    loss, counts = (crl.loss_and_triplets if isinstance(crl, nn.Module) else crl)(logits, targets, features)
    return loss.detach(), *gradients(loss, logits, features), counts


def each_variant(**options):
    variants = [CRL(level=level, criterion=criterion, **options) for level, criterion in VARIANTS]
    by_label = [(v.level, v.criterion.name) for v in variants if v.criterion.name in ("relative", "ranking")]
    return variants + [CRL(level=level, criterion=c, average="label", **options) for level, c in by_label]


@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize(("level", "criterion"), VARIANTS)
def test_gradcheck(level, criterion, scope, monkeypatch):
    logits, targets, features = batch(12, 3, 0.3, torch.float64)
    # Without the batch's own range: the histogram's last node moves with it, and is no part of the gradient.
    space = "logit" if criterion != "distribution" else "probability"
    crl = CRL(
        3,
        scope=scope,
        level=level,
        criterion=Distribution(5) if criterion == "distribution" else criterion,
        score_space=space,
    )
    compared = logits if level == "class" else features
    other = (lambda x: crl(x, targets)) if level == "class" else (lambda x: crl(logits.detach(), targets, x))
    if level == "instance" and criterion == "distribution":
        fixed = torch.tensor(20.0, dtype=torch.float64)
        monkeypatch.setattr(rectification, "span_of", lambda *_: fixed)
    assert crl(logits, targets, features).item() > 0
    assert gradcheck(other, (compared,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", ["joint", "attribute"])
def test_extreme_batches_stay_finite(scope, dtype):
    n, n_classes = 24, 5
    rare = (torch.rand(n, n_classes) < 0.15).float()
    logits = torch.randn(n, n_classes)
    cases = {
        "huge": (logits.sign() * 1e4, rare),
        "equal": (torch.zeros(n, n_classes), rare),
        "all positive": (logits, torch.ones(n, n_classes)),
        "all negative": (logits, torch.zeros(n, n_classes)),
        "neither": (logits, torch.full((n, n_classes), 0.5)),
        "zeros": (torch.zeros(n, n_classes), torch.zeros(n, n_classes)),
        "one sample": (logits[:1], rare[:1]),
        "no sample": (logits[:0], rare[:0]),
        "one label": (logits[:, :1], rare[:, :1]),
        "indices": (logits * 1e4, torch.arange(n) % n_classes),
        "one label, indices": (logits[:, :1], torch.zeros(n, dtype=torch.long)),
    }
    for space in ("probability", "logit"):
        for crl in each_variant(k=100, scope=scope, score_space=space):
            for name, (x, targets) in cases.items():
                x = x.to(dtype, copy=True).requires_grad_()
                features = torch.randn(len(x), 3).to(dtype).round().requires_grad_()  # rounded: duplicates
                loss, *grads, counts = run(crl, x, targets, features)
                found = (name, crl)
                assert loss.dtype == torch.float32 and loss.isfinite() and counts.shape == x.shape[1:], found
                assert all(g.isfinite().all() and g.dtype == dtype for g in grads), found
                if not counts.any():
                    assert loss == 0 and not any(g.any() for g in grads), found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_equal_float32(dtype):
    logits, targets, features = (x.detach() for x in batch())
    logits, features = logits.to(dtype), features.to(dtype)
    for crl in each_variant(k=5):
        expected = crl(logits.float(), targets, features.float())
        assert crl(logits, targets, features).dtype == torch.float32
        assert torch.equal(crl(logits, targets.to(dtype), features), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(crl(logits, targets, features), expected)


@pytest.mark.parametrize("scope", ["joint", "attribute"])
def test_float32_agrees_with_float64(scope):
    inputs = batch(200, 8, 0.05)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    for crl in each_variant(scope=scope):
        for ours, exact in zip(run(crl, *inputs), run(crl, *doubles), strict=True):
            torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["joint", "attribute"])
def test_order_of_the_batch_does_not_matter(scope):
    logits, targets, features = batch(64, 6, 0.1, torch.float64)
    order = torch.randperm(64)
    moved = [x.detach()[order].requires_grad_(x.requires_grad) for x in (logits, targets, features)]
    for crl in each_variant(k=4, scope=scope):
        there, here = run(crl, logits, targets, features), run(crl, *moved)
        for x, y in zip((there[0], *(g[order] for g in there[1:3]), there[3]), here, strict=True):
            torch.testing.assert_close(x, y)


def test_other_labels_get_no_gradient():
    logits, targets, _ = batch(64, 6, 0.1)
    targets[:, 1:] = 0
    for criterion in CRITERIA:
        (grad,) = gradients(CRL(4, criterion=criterion)(logits, targets), logits)
        assert grad[:, 0].any() and not grad[:, 1:].any()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scope", ["joint", "attribute"])
def test_ties_equal_plain_loop(scope, criterion):
    """Scores of a few values only: value, gradient and who is chosen are those of the loop, every time."""
    for trial in range(20):
        generator = torch.Generator().manual_seed(trial)
        logits = torch.randint(-1, 2, (16, 3), generator=generator).double().requires_grad_()
        targets = (torch.rand(16, 3, generator=generator) < 0.35).double()
        crl = CRL(3, scope=scope, criterion=Distribution(7) if criterion == "distribution" else criterion)
        features = torch.zeros(16, 1)
        expected = expected_loss(logits, targets, features, crl)
        if expected is None:
            continue
        loss = crl(logits, targets)
        torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-9, atol=1e-10)
        grads = [gradients(x, logits)[0] for x in (loss, expected)]
        if criterion != "distribution":  # a distance on a node has two slopes
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
        assert torch.equal(gradients(crl(logits, targets), logits)[0], grads[0])


@pytest.mark.parametrize(("level", "criterion"), VARIANTS)
def test_slices_of_the_labels_equal_the_whole(monkeypatch, level, criterion):
    inputs = batch(30, 9, 0.3, torch.float64)
    crl = CRL(4, scope="attribute", level=level, criterion=criterion)
    whole = run(crl, *inputs)
    for entries in (1, 800):
        monkeypatch.setattr(rectification, "_SLICE", entries)
        assert crl._slice_width(30, 9) < 9
        for part, expected in zip(run(crl, *inputs), whole, strict=True):
            torch.testing.assert_close(part, expected)


def test_ranking_counts_pairs_and_takes_lone_positives():
    targets = torch.zeros(10, 3)
    targets[0, 0] = targets[1, 1] = targets[2, 1] = 1
    targets[3:, 2] = 1
    logits = torch.randn(10, 3, requires_grad=True)
    crl = CRL(4, 0.5, criterion="ranking", average="triplet")
    value, counts = crl.loss_and_triplets(logits, targets)
    expected, labels = oracle.ranking(logits.sigmoid(), targets.tolist(), 4, 0.5, "joint", 1.0, "triplet")
    assert counts.tolist() == [labels.count(c) for c in range(3)] == [4, 8, 0]
    torch.testing.assert_close(value, expected)
    assert CRL(4).loss_and_triplets(logits, targets).triplets.tolist() == [0, 2 * 4, 0]


def test_unused_labels_change_nothing():
    """A sparse label space and its dense core: same loss, same gradient."""
    targets = torch.zeros(16, 300, dtype=torch.float64)
    targets[torch.arange(16), torch.arange(16) // 2 * 37] = 1
    logits, used = torch.randn(16, 300, dtype=torch.float64, requires_grad=True), targets.any(0)
    for criterion in CRITERIA:
        crl = CRL(3, criterion=criterion)
        sparse, dense = crl(logits, targets), crl(logits[:, used], targets[:, used])
        torch.testing.assert_close(sparse, dense)
        torch.testing.assert_close(*(gradients(x, logits)[0] for x in (sparse, dense)))
        assert sparse.item() > 0


class NoSync(TorchDispatchMode):
    """Forbids what would make a GPU wait for the host, or give a result of unknown shape."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, name
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
            assert not any(torch.is_tensor(t) and t.dtype == torch.bool for t in indices), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shapes", ["static"], indirect=True)
@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_nothing_waits_for_the_host(scope, space):
    logits, targets, features = batch()
    for crl in each_variant(scope=scope, score_space=space):
        for y in (targets, targets.argmax(1)):
            with NoSync():
                crl(logits, y, features).backward()


class Launched(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU: all but views and allocations."""

    free = re.compile(
        r"_?(unsafe_view|reshape_alias)|view|as_strided|expand|select|slice|transpose|t|permute|detach|alias|diagonal|"
        r"(un)?squeeze|split(_with_sizes)?|(new_)?empty(_like|_strided)?"
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.free.fullmatch(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "most"), [({"criterion": "ranking"}, 60), ({"criterion": "ranking", "margin": 0.7}, 80), ({}, 95)]
)
def test_operations_of_the_term(options, most):
    """Forward and backward, with the checks of the batch; none depends on the size of the batch."""
    for n in (16, 256):
        logits, targets, _ = batch(n, 28)
        with Launched() as launched:
            CRL(**options)(logits, targets).backward()
        assert launched.count <= most


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["joint", "attribute"])
def test_compiles_as_one_graph(scope):
    inputs = batch()
    for crl in each_variant(k=5, scope=scope):
        torch._dynamo.reset()
        compiled = torch.compile(crl.loss_and_triplets, fullgraph=True, backend="aot_eager")
        for found, expected in zip(run(compiled, *inputs), run(crl, *inputs), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiled_code_agrees():
    inputs, crl = batch(), CRL(5)
    torch._dynamo.reset()
    try:
        found = run(torch.compile(crl.loss_and_triplets, fullgraph=True), *inputs)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no compiler here: {error}")
    for x, expected in zip(found, run(crl, *inputs), strict=True):
        torch.testing.assert_close(x, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("level", "criterion"), VARIANTS)
def test_gpu_never_synchronises_and_captures(level, criterion):
    logits, targets, features = (x.detach().cuda() for x in batch(128, 8))
    logits.requires_grad_(), features.requires_grad_()
    crl = CRL(5, level=level, criterion=criterion)
    compared = logits if level == "class" else features

    def step():
        loss = crl(logits, targets, features)
        return loss, *gradients(loss, compared)

    on_cpu = [x.detach().cpu().requires_grad_(x.requires_grad) for x in (logits, targets, features)]
    expected = run(CRL(5, level=level, criterion=criterion), *on_cpu)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    graph.replay()
    torch.testing.assert_close(loss.detach().cpu(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.cpu(), expected[1 if level == "class" else 2], rtol=1e-3, atol=1e-5)


SPARSE = """
import resource, sys, torch
from fastai_crl.losses import CRL
torch.set_num_threads(2)
n, n_classes = 1024, 10_000
logits, targets = torch.randn(n, n_classes, requires_grad=True), torch.zeros(n, n_classes)
slot = torch.arange(5 * n)
targets[slot % n, slot // 3] = 1  # five labels a sample, three samples a label
CRL()(torch.randn(4, 2, requires_grad=True), torch.eye(2).repeat(2, 1)).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
logits.grad, before = torch.zeros_like(logits), peak()
crl = CRL(scope=sys.argv[1])
loss, counts = crl.loss_and_triplets(logits, targets)
loss.backward()
print(peak() - before, int(counts.sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["joint", "attribute"])
def test_ten_thousand_labels_in_a_gigabyte(scope):
    pytest.importorskip("resource")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", SPARSE, scope], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    peak, triplets = map(int, out.stdout.split())
    assert triplets and peak < 2**30


def test_fastai_tensors():
    """fastai passes subclasses that refuse to meet each other in an operation."""
    logits, targets, features = batch()
    for crl in each_variant():
        expected = crl(logits, targets, features)
        found = crl(TensorImage(logits), TensorMultiCategory(targets), TensorImage(features))
        assert torch.equal(found, expected) and type(found) is torch.Tensor


def test_a_whole_number_of_any_type_will_do_for_k():
    logits, targets, features = batch()
    for found, expected in zip(each_variant(k=3.0), each_variant(k=3), strict=True):
        assert torch.equal(found(logits, targets, features), expected(logits, targets, features))


def test_pickles():
    logits, targets, _ = batch()
    crl = CRL(7, criterion="absolute")
    expected = crl(logits, targets)
    copy = pickle.loads(pickle.dumps(crl))
    assert torch.equal(copy(logits, targets), expected) and repr(copy) == repr(crl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"rho": 2}, "rho=2"),
        ({"margin": -1}, "margin=-1"),
        ({"margin": math.nan}, "margin=nan"),
        ({"scope": "both"}, "scope='both'"),
        ({"level": "pixel"}, "level='pixel'"),
        ({"criterion": "cosine"}, "criterion='cosine'.*'relative', 'absolute', 'distribution'"),
        ({"score_space": "odds"}, "score_space='odds'"),
        ({"average": "anchor"}, "average='anchor'"),
        ({"average": "label", "criterion": "absolute"}, r'average="label" needs criterion=.*not .absolute.'),
        ({"criterion": "ranking", "level": "instance"}, "no level='instance'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CRL(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.full((4, 3), torch.nan)}, "logits must be finite"),
        ({"logits": torch.full((4, 3), torch.inf)}, "logits must be finite"),
        ({"logits": torch.full((4, 3), -torch.inf, dtype=torch.float16)}, "logits must be finite"),
        ({"logits": torch.zeros(4)}, r"logits must be .* \(n, C\)"),
        ({"logits": torch.zeros(4, 3, dtype=torch.long)}, "floating-point"),
        ({"targets": torch.zeros(3, 3)}, "do not fit logits"),
        ({"targets": torch.full((4, 3), math.nan)}, r"targets must be in \[0, 1\]"),
        ({"targets": torch.full((4, 3), 2)}, r"targets must be in \[0, 1\]"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, r"targets must be in \[0, 2\]"),
        ({"features": None}, "pass features"),
        ({"features": torch.zeros(3, 2)}, "n = 4"),
        ({"features": torch.full((4, 2), torch.nan)}, "features must be finite"),
    ],
)
def test_inputs_are_checked(change, message):
    inputs = {"logits": torch.zeros(4, 3), "targets": torch.zeros(4, 3), "features": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        CRL(level="instance")(**inputs)


@pytest.mark.parametrize("single_label", [False, True])
def test_shift_is_what_is_added_to_the_logits(single_label):
    logits, targets, _ = batch(dtype=torch.float64)
    targets = targets.argmax(1) if single_label else targets
    shift = torch.randn(6)
    for criterion in CRITERIA:
        found, expected = CRL(5, criterion=criterion, shift=shift)(logits, targets), CRL(5, criterion=criterion)
        assert torch.equal(found, expected(logits + shift, targets)) and not torch.equal(
            found, expected(logits, targets)
        )


@pytest.mark.parametrize("options", [{"shift": [1.0, math.nan]}, {"frequency": [1, -1]}, {"shift": [[1.0]]}])
def test_numbers_per_label_are_checked(options):
    with pytest.raises(ValueError, match="finite number"):
        CRL(**options)


@pytest.mark.parametrize("name", ["shift", "frequency"])
def test_numbers_per_label_are_as_many_as_labels(name):
    with pytest.raises(ValueError, match=f"{name} has 2 values, but logits 3"):
        CRL(**{name: [1.0, 2.0]})(torch.zeros(4, 3), torch.zeros(4, 3))


def test_one_logit_per_item_is_one_binary_label():
    logits, targets = torch.randn(20, 1, dtype=torch.float64), (torch.rand(20, 1) < 0.3).double()
    expected = CRL(3)(logits, targets)
    assert expected > 0
    for x in (logits, logits[:, 0]):
        for y in (targets, targets[:, 0], targets[:, 0].long(), targets[:, 0].bool()):
            assert torch.equal(CRL(3)(x, y), expected)
    with pytest.raises(ValueError, match=r"class indices \(targets.squeeze\(1\)\)"):
        CRL(3)(torch.zeros(4, 3), torch.zeros(4, 1))


def test_logits_too_large_for_the_arithmetic_are_an_error():
    logits, targets, _ = batch()
    with torch.no_grad():
        logits[0, 0] = 1e30
    assert CRL()(logits, targets).isfinite()
    with pytest.raises(ValueError, match=r"within ±1e\+20"):
        CRL(score_space="logit")(logits, targets)


def test_buffers_are_saved_and_moved():
    logits, targets, _ = batch()
    crl = CRL(4, frequency=range(1, 7), shift=torch.full((6,), 0.5, dtype=torch.float64))
    saved = crl.state_dict()
    assert {name: x.dtype for name, x in saved.items()} == dict.fromkeys(("frequency", "shift"), torch.float32)
    fresh = CRL(4, frequency=range(6, 0, -1), shift=[0.0] * 6)
    bare = CRL(4)
    for other in (fresh, bare):
        other.load_state_dict(saved)
        assert torch.equal(other(logits, targets), crl(logits, targets))
    moved = crl.to("meta")
    assert moved.frequency.is_meta and moved.shift.is_meta
