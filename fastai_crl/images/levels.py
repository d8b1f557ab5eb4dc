"""Whether the grey levels of 16-bit files are lost as they become 8 bits: what a sample of the images says."""

from collections.abc import Sequence

import numpy as np

from .image_set import ImageSet
from .readers import read_values

_SAMPLE = 32  # images that are read
_FEWEST = 64  # grey levels, of 255, that the values of a channel should become


def lost_levels(images: ImageSet, ids: Sequence[str]) -> dict[str, str]:
    """Return, by channel, what is lost and how to keep it, where values become fewer than 64 grey levels, of more.

    A channel's values are those between the lowest 0.1st and the highest 99.9th percentile of the sample: a few hot
    pixels do not make the range. Files of 8 bits, and images that are stretched one by one, lose nothing.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: one that cannot be read.
    """
    found: dict[str, list[tuple[float, float, int, int]]] = {}
    if images.stretch is not None:
        return {}
    for i in [ids[k] for k in np.linspace(0, len(ids) - 1, min(len(ids), _SAMPLE)).astype(int)]:
        planes = []
        for file in images.files(i):
            a, white = read_values(file, images.per_file, images.full)
            planes += [(p, white) for p in a]
        for channel, (p, white) in zip(images.channels, planes, strict=True):
            if p.dtype == np.uint8:
                continue
            low, high = np.percentile(p[::2, ::2], (0.1, 99.9))
            found.setdefault(channel, []).append((low, high, int(p.max()), white))
    top = max((seen[2] for every in found.values() for seen in every), default=0)
    lost = {}
    for channel, every in found.items():
        low, high, white = min(s[0] for s in every), max(s[1] for s in every), every[0][3]
        kept = round((high - low) * 255 / white)
        if kept < min(_FEWEST, high - low):
            fix = (
                f"pass bits={max(9, top.bit_length())}, white={top} (the largest of a sample), or "
                if top <= white // 4
                else "pass "
            )
            fix += "stretch=99.5 to stretch each channel of each image"
            lost[channel] = f"values from {low:.0f} to {high:.0f} of {white} become {kept + 1} grey levels: {fix}"
    return lost
