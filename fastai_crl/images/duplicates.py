"""Images that occur twice: fingerprints of their pixels, exact and perceptual, and the groups these make."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import pandas as pd
from imagehash import phash
from PIL import Image
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors

from .image_set import ImageSet, check_images, in_threads

# A digest of the pixels and a perceptual hash, per image: n digests, hashes (n, 64 per channel) bool.
Fingerprints = tuple[list[bytes], np.ndarray]


def check_distance(max_distance: float) -> None:
    """Raise ValueError unless `max_distance` is a share of the bits of a hash at which images can still be alike."""
    if not 0 <= max_distance < 0.5:
        raise ValueError(
            f"max_distance={max_distance} must be the share of the hash's bits that may differ, at least 0 and below "
            "0.5, where unrelated images lie: the default is 0.03."
        )


def fingerprint(planes: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return the digest of an image's pixels, and its perceptual hash: ImageHash's `phash`, 64 bits per channel.

    Args:
        planes: uint8 (C,H,W).

    Returns:
        16 bytes, and bool (64 C,).
    """
    digest = blake2b(repr(planes.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(planes))
    return digest.digest(), np.concatenate([phash(Image.fromarray(p)).hash.ravel() for p in planes])


def fingerprints(images: ImageSet, ids: Iterable[str], progress: bool = True) -> Fingerprints:
    """Read the images `ids`, at the size of their files, and return their fingerprints, in the order of the ids.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an unreadable one.
    """
    ids, images = list(ids), images.with_(size=None)
    found = list(in_threads(lambda i: fingerprint(images.open(i).numpy()), ids, progress))
    return [d for d, _ in found], np.array([b for _, b in found], bool).reshape(len(ids), 64 * len(images.channels))


def _alike(hashes: np.ndarray, max_distance: float) -> NearestNeighbors:
    """Return the index of `hashes` (n,bits) by which scikit-learn finds those of which at most such a share differs."""
    # Between rows of ±1 the square of the distance is four times the number of bits that differ.
    most = np.floor(max_distance * hashes.shape[1]) + 0.5
    return NearestNeighbors(n_neighbors=1, radius=2 * most**0.5, algorithm="brute").fit(_signs(hashes))


def _signs(hashes: np.ndarray) -> np.ndarray:
    return np.where(hashes, np.float32(1), np.float32(-1))


def cluster(prints: Fingerprints, max_distance: float = 0.03) -> np.ndarray:
    """Return a group number (n,) per image; alike images, and those linked by a chain of alike ones, share theirs.

    Args:
        prints: what `fingerprints` returned.
        max_distance: images are alike if they have equal pixels or at most this share of their hash's bits differs.
    """
    codes = pd.factorize(np.array(prints[0], dtype=object))[0]
    if len(codes) == 0:
        return codes
    first = np.unique(codes, return_index=True)[1]
    graph = _alike(prints[1][first], max_distance).radius_neighbors_graph()
    return connected_components(graph, directed=False)[1][codes]


def nearest(prints: Fingerprints, among: Fingerprints) -> tuple[np.ndarray, np.ndarray]:
    """Return, per image, the position of the image most like it in `among`, and the share of bits that differ, (n,).

    Equal pixels always win, with distance −1, so that they can be told from different pixels with an equal hash.
    """
    best = _alike(among[1], 0).kneighbors(_signs(prints[1]), return_distance=False)[:, 0]
    distance = (prints[1] != among[1][best]).mean(1)
    where = {d: i for i, d in reversed(list(enumerate(among[0])))}
    for i, d in enumerate(prints[0]):
        if d in where:
            best[i], distance[i] = where[d], -1
    return best, distance


def duplicate_groups(
    images: ImageSet, ids: Iterable[str] | None = None, max_distance: float = 0.03, progress: bool = True
) -> pd.Series:
    """Return a group number for each image, indexed by id: those with equal or nearly equal pixels share theirs.

    Every file is read. The perceptual hash (ImageHash's `phash`, per channel) sees through noise, compression, mild
    changes of brightness and size; not through turns, flips, or crops.

    Args:
        images: where they lie and how they are read, at the size of their files.
        ids: of the images to compare; by default all in the folder.
        max_distance: largest share of the hash's bits that differ, 0 to below 0.5. 0.03 is 7 of the 256 bits of four
            channels; different single cells of the Human Protein Atlas differ in 22 or more, the same one compressed
            or with noise in up to 6.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an unreadable one, what is no `ImageSet`, or max_distance out of range.
    """
    check_distance(max_distance)
    ids = list(check_images(images).ids() if ids is None else ids)
    groups = cluster(fingerprints(images, ids, progress), max_distance)
    return pd.Series(groups, index=pd.Index(ids, name="id"), name="group")
