"""Fingerprints of images, and groups of duplicates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastai_crl.images.duplicates import cluster, duplicate_groups, fingerprint, nearest
from fastai_crl.images.image_set import ImageSet
from fastai_crl.images.open import open_channels


def prints(rows: list[tuple[int, int]]) -> tuple[list[bytes], np.ndarray]:
    """Fingerprints of 8 bits: of each row the number of the pixels' content and the byte of its hash."""
    bits = [np.unpackbits(np.uint8(h)).astype(bool) for _, h in rows]
    return [bytes([c]) for c, _ in rows], np.array(bits).reshape(-1, 8)


content = st.integers(0, 5).flatmap(lambda c: st.tuples(st.just(c), st.just(37 * c % 256)))
other = st.tuples(st.integers(6, 255), st.integers(0, 255))


def differing(a: tuple[int, int], b: tuple[int, int]) -> float:
    return bin(a[1] ^ b[1]).count("1") / 8


@settings(max_examples=100, deadline=None)
@given(
    st.lists(content | other, min_size=1, max_size=14, unique_by=lambda r: r if r[0] > 5 else object()),
    st.sampled_from([0, 0.125, 0.3]),
)
def test_clusters_equal_a_plain_search(rows, limit):
    rows = list({c if c > 5 else (c, i): (c, h) for i, (c, h) in enumerate(rows)}.values())  # one hash per content
    got = cluster(prints(rows), limit)
    want = list(range(len(rows)))
    for _ in rows:
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if a[0] == b[0] or differing(a, b) <= limit:
                    want[i] = want[j] = min(want[i], want[j])
    assert [[a == b for b in got] for a in got] == [[a == b for b in want] for a in want]


@settings(max_examples=60, deadline=None)
@given(st.lists(content | other, min_size=1, max_size=9), st.lists(content | other, min_size=1, max_size=9))
def test_nearest_equals_a_plain_search(rows, among):
    where, distance = nearest(prints(rows), prints(among))
    for row, i, d in zip(rows, where, distance, strict=True):
        equal = [j for j, other_row in enumerate(among) if other_row[0] == row[0]]
        if equal:
            assert (i, d) == (equal[0], -1)
        else:
            assert d == min(differing(row, o) for o in among) == differing(row, among[i])


def test_fingerprint_knows_equal_pixels_and_shapes():
    a = np.random.default_rng(0).integers(0, 255, (2, 16, 24), dtype=np.uint8)
    digest, bits = fingerprint(a)
    assert len(digest) == 16 and bits.shape == (128,) and bits.dtype == bool
    assert fingerprint(a.copy())[0] == digest and fingerprint(a.reshape(2, 24, 16))[0] != digest
    b = a.copy()
    b[1, 3, 3] ^= 1
    assert fingerprint(b)[0] != digest and (fingerprint(b)[1] != bits).mean() < 0.03


def test_groups_of_files(hpa, tmp_path):
    ids = [f"synthetic-{i:06}" for i in range(12)]
    for i in ids:
        for c, plane in zip(("red", "green"), open_channels(hpa / "train" / i).numpy(), strict=False):
            Image.fromarray(plane).save(tmp_path / f"{i}_{c}.png")
            if i in ids[:2]:
                Image.fromarray(plane).resize((64, 64)).save(tmp_path / f"big{i[-1]}_{c}.png")
    groups = duplicate_groups(ImageSet(tmp_path, ("red", "green")), [*ids, "big0", "big1"], 0.06, progress=False)
    assert groups["big0"] == groups[ids[0]] != groups["big1"] == groups[ids[1]]
    assert groups[ids].nunique() == 12 and list(groups.index) == [*ids, "big0", "big1"]
    assert duplicate_groups(ImageSet(tmp_path), [], progress=False).empty
    with pytest.raises(FileNotFoundError, match=r"ghost_red\.png"):
        duplicate_groups(ImageSet(tmp_path), ["ghost"], progress=False)
    with pytest.raises(ValueError, match=r"max_distance=0\.5"):
        duplicate_groups(ImageSet(tmp_path), ids, max_distance=0.5)


def test_real_cells_differ_and_their_noisy_copies_do_not(shared):
    folder = shared / "hpa_cells" / "train"
    ids = sorted({f.name.rsplit("_", 1)[0] for f in folder.glob("*.png")})[::8]
    rng = np.random.default_rng(0)
    found, noisy = [], []
    for i in ids:
        a = open_channels(folder / i).numpy()
        found.append(fingerprint(a))
        noisy.append(fingerprint((a + rng.normal(0, 2, a.shape)).clip(0, 255).astype(np.uint8)))
    a, b = (([d for d, _ in p], np.stack([h for _, h in p])) for p in (found, noisy))
    assert len(set(cluster(a))) == len(ids)
    where, distance = nearest(b, a)
    assert where.tolist() == list(range(len(ids))) and (distance <= 0.03).all() and (distance >= 0).all()
