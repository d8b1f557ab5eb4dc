"""Batch augmentation against plain loops over images, channels and pixels."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from fasttransform import Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_crl.augment import (
    BatchTransform,
    ChannelIntensity,
    Cutout,
    GaussianNoise,
    RandomAffine,
    RandomCropBatch,
    RandomD4,
    d4,
    microscopy_transforms,
)
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.images.tensor import TensorMultiChannel

ALL = {
    "affine": RandomAffine(30, 1.3),
    "crop": RandomCropBatch((5, 6)),
    "d4": RandomD4(),
    "intensity": ChannelIntensity(0.3, 0.3),
    "noise": GaussianNoise(0.1),
    "cutout": Cutout(0.4),
}
SHAPES = [(1, 4, 8, 8), (5, 1, 8, 11), (3, 7, 9, 6)]


@pytest.fixture(params=ALL)
def tfm(request):
    return copy.deepcopy(ALL[request.param])


def batch(*shape: int) -> TensorMultiChannel:
    return TensorMultiChannel(torch.rand(shape), channels=tuple(f"c{i}" for i in range(shape[1])))


def train(t, x):
    return t(x, split_idx=0)


def smooth(n: int, c: int, h: int, w: int) -> torch.Tensor:
    """Images without sharp edges, so that a place off by rounding changes a value by as little."""
    x = ndimage.gaussian_filter(np.random.default_rng(0).random((n, c, h, w)), (0, 0, 2, 2), mode="nearest")
    return torch.from_numpy((x - x.min()) / np.ptp(x)).float()


# ---------------------------------------------------------------- of every transform


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_channels_dtype_and_range_are_kept_and_the_input_is_not_touched(tfm, shape, dtype):
    x = batch(*shape).to(dtype)
    before = x.clone()
    y = train(tfm, x)
    assert type(y) is TensorMultiChannel and y.channels == x.channels and y.dtype == dtype
    assert y.shape[:2] == x.shape[:2] and y.isfinite().all() and y.min() >= 0 and y.max() <= 1
    assert torch.equal(x, before)


@pytest.mark.parametrize("part", ["image", "channel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_and_a_channel_depend_on_the_same_alone(tfm, shape, part):
    x = batch(*shape)
    torch.manual_seed(1)
    y = train(tfm, x)
    for i in range(shape[part == "channel"]):
        own = (slice(None), i) if part == "channel" else i
        alone = torch.zeros_like(x)
        alone[own] = x[own]
        torch.manual_seed(1)
        assert torch.equal(train(tfm, alone)[own], y[own])


def test_the_same_seed_gives_the_same_batch_and_another_call_another(tfm):
    x = batch(8, 4, 12, 12)
    set_seed(3)
    first, second = train(tfm, x), train(tfm, x)
    set_seed(3)
    assert torch.equal(train(tfm, x), first) and not torch.equal(first, second)


def test_each_image_draws_its_own(tfm):
    x = batch(1, 4, 12, 12).expand(64, -1, -1, -1)
    y = train(tfm, x.as_subclass(TensorMultiChannel))
    assert len({image.numpy().tobytes() for image in y}) > 6


def test_validation_batches_are_the_same_object(tfm):
    x = batch(2, 4, 8, 8)
    for split_idx in (1, None):
        y = tfm(x, split_idx=split_idx)
        assert torch.equal(y, x[..., 1:6, 1:7]) if isinstance(tfm, RandomCropBatch) else y is x


def test_targets_pass_and_whole_numbers_or_single_images_are_refused(tfm):
    x, y = batch(2, 4, 8, 8), torch.tensor([0.5, 2.0])
    assert train(tfm, (x, y))[1] is y
    with pytest.raises(ValueError, match=r"torch.uint8 images of shape \(2, 4, 8, 8\).*IntToFloatTensor"):
        train(tfm, TensorMultiChannel((x * 255).byte()))
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\).*\(B,C,H,W\)"):
        train(tfm, x[0])


def test_nothing_reads_the_pixels_back(tfm):
    """Tensors on the meta device have no values: waiting for one, as `.item()` does, would raise."""
    x = TensorMultiChannel(torch.empty(3, 4, 8, 8, device="meta"))
    assert train(tfm, x).device.type == "meta"


class Operations(TorchDispatchMode):
    """Counts what is computed, where an operation on a device would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [12, 13])
def test_the_operations_are_those_of_a_batch_not_of_its_images(tfm, side):
    counts = []
    for n in (2, 64):
        x = batch(n, 4, 12, side).as_subclass(torch.Tensor)
        drawn = tfm.draw(tuple(x.shape))
        with Operations() as operations:
            tfm.apply(x, drawn)
        counts.append(operations.count)
    assert counts[0] == counts[1] < 50


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_the_same_comes_out_and_nothing_synchronises(tfm, shape):
    x = batch(*shape)
    torch.manual_seed(1)
    want = train(tfm, x)
    on_gpu = x.cuda()
    torch.manual_seed(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = train(tfm, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert type(got) is TensorMultiChannel and got.is_cuda and got.shape == want.shape
    if not isinstance(tfm, GaussianNoise):
        assert torch.allclose(got.cpu(), want, atol=1e-4)


def test_pickle_and_repr(tfm):
    x = batch(3, 4, 8, 8)
    torch.manual_seed(0)
    y = train(tfm, x)
    torch.manual_seed(0)
    assert torch.equal(train(pickle.loads(pickle.dumps(tfm)), x), y)
    assert type(tfm).__name__ in tfm.name


@pytest.mark.parametrize("make", [RandomAffine, ChannelIntensity, GaussianNoise, Cutout])
def test_p_is_the_probability_of_each_image(make):
    x = batch(400, 1, 6, 6)
    assert torch.allclose(train(make(p=0), x), x, atol=1e-4)
    changed = (train(make(p=0.3), x) - x).abs().amax((1, 2, 3)) > 1e-4
    assert 0.2 < changed.float().mean() < 0.4


# ---------------------------------------------------------------- against plain loops


def test_d4_is_the_eight_rotations_and_flips_of_torch():
    x = torch.rand(2, 3, 5, 5)
    want = [f(torch.rot90(x, k, (-2, -1))) for k in range(4) for f in (lambda v: v, lambda v: v.flip(-1))]
    got = [d4(x, k) for k in range(8)]
    assert torch.equal(got[0], x) and len({g.numpy().tobytes() for g in got}) == 8
    assert {g.numpy().tobytes() for g in got} == {w.numpy().tobytes() for w in want}
    assert d4(torch.rand(2, 3, 5, 7), 5).shape == (2, 3, 7, 5)


@pytest.mark.parametrize("side, n", [(6, 8), (5, 4)])
def test_random_d4_is_exact_and_all_are_equally_likely(side, n):
    x = batch(800, 2, 6, side)
    torch.manual_seed(0)
    y = train(RandomD4(), x)
    torch.manual_seed(0)
    drawn = RandomD4().draw(tuple(x.shape))
    for got, image, k in zip(y, x, drawn.tolist(), strict=True):
        assert torch.equal(got, d4(image, k))
    counts = np.bincount(drawn, minlength=n)
    assert len(counts) == n and counts.min() > 0.7 * 800 / n


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 20), st.integers(6, 20), st.floats(-180, 180), st.floats(0.8, 1.5))
def test_affine_against_scipy(h, w, degrees, zoom):
    x = smooth(1, 2, h, w)
    angle = math.radians(degrees)
    got = RandomAffine().apply(x, torch.tensor([[angle], [math.log(zoom)]]))
    # scipy maps a place (row, column) of the result to its source: turn back, shrink.
    back = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
    centre = np.array([(h - 1) / 2, (w - 1) / 2])
    offset = centre - back @ centre
    for c in range(2):
        want = ndimage.affine_transform(x[0, c].numpy(), back, offset, order=1, mode="reflect")
        assert np.abs(got[0, c].numpy() - want).max() < 2e-3


def test_affine_turns_and_zooms_the_way_it_says():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 6] = 1  # right of the centre

    def brightest(angle=0.0, zoom=1.0):
        y = RandomAffine().apply(x, torch.tensor([[math.radians(angle)], [math.log(zoom)]]))
        return divmod(int(y.argmax()), 9)

    assert brightest() == (4, 6) and brightest(zoom=2.0) == (4, 8) and brightest(angle=90) in ((2, 4), (6, 4))


def test_affine_draws_within_its_limits():
    drawn = RandomAffine(20, 1.25, p=1).draw((4000, 1, 8, 8))
    for row, reach in zip(drawn, (math.radians(20), math.log(1.25)), strict=True):
        assert row.abs().max() <= reach and row.max() > 0.95 * reach and row.min() < -0.95 * reach


def test_crop_cuts_whole_pixels_anywhere():
    x = batch(300, 2, 7, 9)
    y = train(RandomCropBatch((5, 6)), x)
    places = set()
    for image, cut in zip(x, y, strict=True):
        found = [(t, s) for t in range(3) for s in range(4) if torch.equal(image[:, t : t + 5, s : s + 6], cut)]
        assert len(found) == 1
        places.update(found)
    assert len(places) == 12
    assert torch.equal(train(RandomCropBatch((7, 9)), x), x)


@pytest.mark.parametrize("split_idx", [0, 1])
def test_crop_against_a_loop(split_idx):
    x, t = batch(9, 2, 7, 9), RandomCropBatch((5, 6))
    torch.manual_seed(0)
    got = t(x, split_idx=split_idx)
    torch.manual_seed(0)
    places = zip(*(torch.randint(s, (9,)).tolist() for s in (3, 4)), strict=True) if split_idx == 0 else [(1, 1)] * 9
    for image, cut, (top, left) in zip(x, got, places, strict=True):
        assert torch.equal(cut, image[:, top : top + 5, left : left + 6])


def test_intensity_against_a_loop():
    x, t = batch(6, 3, 5, 4), ChannelIntensity(0.5, 0.4, p=1)
    torch.manual_seed(0)
    got = train(t, x)
    torch.manual_seed(0)
    gain, gamma = t.draw(tuple(x.shape)).numpy()
    for i in range(6):
        for c in range(3):
            want = np.clip(gain[i, c] * x[i, c].numpy() ** gamma[i, c], 0, 1)
            assert np.abs(got[i, c].numpy() - want).max() < 1e-6
    drawn = t.draw((2000, 4, 8, 8))
    for values, low, high in zip(drawn, (1 / 1.5, 1 / 1.4), (1.5, 1.4), strict=True):
        assert low - 1e-5 <= values.min() < low + 0.02 and high - 0.02 < values.max() <= high + 1e-5
    assert not torch.equal(drawn[0, :, 0], drawn[0, :, 1])  # every channel its own


def test_noise_has_the_drawn_deviation_and_keeps_to_the_range():
    x, t = TensorMultiChannel(torch.full((50, 2, 64, 64), 0.5)), GaussianNoise(0.08, p=1)
    torch.manual_seed(0)
    y = train(t, x)
    torch.manual_seed(0)
    std = t.draw(tuple(x.shape))
    assert torch.allclose(y.std((1, 2, 3)).as_subclass(torch.Tensor), std, rtol=0.1, atol=1e-4)
    assert std.max() <= 0.08 and std.max() > 0.07 and std.min() < 0.01
    correlation = np.corrcoef((y - x)[:, 0].flatten(), (y - x)[:, 1].flatten())[0, 1]
    assert abs(correlation) < 0.01  # no channel repeats another's


def test_cutout_against_a_loop():
    x, t = batch(60, 2, 10, 14), Cutout(0.6, p=0.8)
    torch.manual_seed(0)
    got = train(t, x)
    torch.manual_seed(0)
    top, left, height, width = t.draw(tuple(x.shape)).numpy()
    black = 0
    for i in range(60):
        for y in range(10):
            for z in range(14):
                inside = top[i] < y + 0.5 < top[i] + height[i] and left[i] < z + 0.5 < left[i] + width[i]
                assert torch.equal(got[i, :, y, z], torch.zeros(2) if inside else x[i, :, y, z])
                black += inside
    assert black > 0
    assert (top >= 0).all() and (top + height <= 10.001).all() and (left + width <= 14.001).all()
    drawn = Cutout(0.3, p=1).draw((4000, 1, 10, 14))
    share = drawn[2] * drawn[3] / 140
    assert share.max() <= 0.301 and share.mean() == pytest.approx(0.15, abs=0.01)


# ---------------------------------------------------------------- the factory


def test_microscopy_transforms_leaves_out_what_is_zero():
    def kinds(**kwargs):
        return [type(t) for t in microscopy_transforms(**kwargs)]

    assert kinds() == [RandomAffine, RandomD4, ChannelIntensity]
    assert kinds(size=8, noise=0.01, cutout=0.2) == [
        RandomAffine,
        RandomCropBatch,
        RandomD4,
        ChannelIntensity,
        GaussianNoise,
        Cutout,
    ]
    assert kinds(flips=False, rotate=0, zoom=1, intensity=0) == []


def test_microscopy_transforms_hands_its_values_on_and_orders_them():
    affine, crop, _, intensity, noise, cutout = microscopy_transforms((6, 8), True, 20, 1.2, 0.3, 0.04, 0.25, 0.6)
    assert (affine.rotate, affine.zoom, affine.p, crop.size) == (20, 1.2, 0.6, (6, 8))
    assert (intensity.gain, intensity.gamma, intensity.p) == (0.3, 0.3, 0.6)
    assert (noise.std, noise.p, cutout.area, cutout.p) == (0.04, 0.6, 0.25, 0.6)
    tfms = microscopy_transforms(6, noise=0.1, cutout=0.1)
    assert list(Pipeline(tfms[::-1]).fs) == tfms and tfms[0].order > 10 and tfms[-1].order < 99


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomAffine(rotate=200), r"rotate=200 must be in 0\.\.180"),
        (lambda: RandomAffine(zoom=0.9), r"zoom=0.9 must be in 1\.\.10"),
        (lambda: RandomAffine(p=1.5), r"p=1.5 must be in 0\.\.1"),
        (lambda: ChannelIntensity(gain=-1), "gain=-1"),
        (lambda: GaussianNoise(std=float("nan")), "std=nan"),
        (lambda: Cutout(area=2), "area=2"),
        (lambda: RandomCropBatch(0), "size=0: give a whole number of pixels above 0"),
        (lambda: microscopy_transforms(zoom=0), "zoom=0"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_smaller_than_the_crop_are_named():
    with pytest.raises(ValueError, match="cut 5x12 pixels out of images of 8x8"):
        train(RandomCropBatch((5, 12)), batch(2, 1, 8, 8))


# ---------------------------------------------------------------- in fastai's data loaders


def test_in_a_data_loader_training_is_augmented_and_validation_exact(hpa):
    def load(tfms):
        return HPADataLoaders.from_csv(hpa, size=32, bs=16, batch_tfms=tfms, shuffle=False, num_workers=0, stats=None)

    plain, dls = load([]), load(microscopy_transforms(noise=0.02, cutout=0.2))
    for got, want in zip(dls.valid, plain.valid, strict=True):
        assert torch.equal(got[0], want[0])
    got, want = dls.train.one_batch(), plain.train.one_batch()
    assert type(got[0]) is TensorMultiChannel and got[0].channels == dls.channels
    assert torch.equal(got[1], want[1]) and got[0].shape == want[0].shape and not torch.allclose(got[0], want[0])
    default = HPADataLoaders.from_csv(hpa, size=32, num_workers=0)
    assert [type(t) for t in microscopy_transforms()] == [
        type(t) for t in default.train.after_batch.fs if isinstance(t, BatchTransform)
    ]


def test_same_seed_same_augmented_training_batches(hpa):
    def batches():
        set_seed(5)
        dls = HPADataLoaders.from_csv(hpa, size=32, bs=16, num_workers=0)
        return [x for x, _ in dls.train]

    for a, b in zip(batches(), batches(), strict=True):
        assert torch.equal(a, b)
