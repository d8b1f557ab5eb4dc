"""Display colours of channels, by the names that stains, dyes and fluorescent proteins have in the field."""

import re
from collections.abc import Sequence

import numpy as np

# Additive display colours; yellow feeds red and green, as in the pictures the Human Protein Atlas publishes.
COLORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "gray": (1.0, 1.0, 1.0),
}

# The first pattern that a name holds, in small letters without blanks and marks, gives its colour and a second choice.
_BLUE, _GREEN, _RED, _FAR_RED = ("blue", "cyan"), ("green", "yellow"), ("red", "orange"), ("magenta", "gray")
_STAINS = (
    (r"farred|deepred|infrared|draq|cy[57]|irfp|mirfp", _FAR_RED),
    (r"dapi|hoechst|bfp|pacificblue|^dna$|^nucle(us|i)$", _BLUE),
    (r"cfp|cerulean|turquoise|aqua$", ("cyan", "blue")),
    (r"yfp|venus|citrine", ("yellow", "green")),
    (r"fitc|gfp|cy2|neongreen|calcein|bodipyfl", _GREEN),
    (r"tritc|rfp|cy3|cherry|scarlet|tomato|dsred|texasred|txred|rhodamine|propidium", _RED),
    (r"^(bf|dic|tl|phase|trans)$|brightfield|phasecontrast|transmitted|transmission", ("gray", "magenta")),
)
# Dyes called by a wavelength in nm, and lasers and filters by theirs; the first band that ends above it.
_DYE = re.compile(
    r"(?:alexa(?:fluor)?|af|atto|dylight|cf|bv|qdot|opal|efluor)(\d{3})(?!\d)|^(?:ch|ex|em)?(\d{3})$|(?<!\d)(\d{3})nm"
)
_BANDS = (
    (430, _BLUE),
    (475, ("cyan", "blue")),
    (530, _GREEN),
    (545, ("yellow", "green")),
    (620, _RED),
    (900, _FAR_RED),
)


def palette(names: Sequence[str]) -> np.ndarray:
    """Return display colours (C,3), in 0..1, of channels of these names, no colour twice while there are free ones.

    A colour's own name, in any case, comes first; then the stains of the field: DAPI and Hoechst blue, FITC and GFP
    green, TRITC, RFP and Cy3 red, Cy5 magenta, brightfield grey, Alexa 488 or "561 nm" by wavelength; then a colour
    that is part of the name ("SYTOX Green"). Others get the first free one of red, green, blue, yellow, magenta, cyan
    and orange; a lone one is grey.

    Example:
        >>> palette(["DAPI", "GFP", "tubulin"]).tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    found: list[str | None] = [name if (name := _plain(n)) in COLORS else None for n in names]
    for i, name in enumerate(names):
        found[i] = found[i] or next((c for c in _of_stain(name) if c not in found), None)
    rest = ["gray"] if len(names) == 1 else [c for c in COLORS if c not in found]
    rest += ["gray"] * len(names)
    return np.array([COLORS[rest.pop(0) if c is None else c] for c in found], dtype=np.float32).reshape(-1, 3)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold()).replace("grey", "gray")


def _of_stain(name: str) -> tuple[str, ...]:
    """Return the colours of a stain, the best first; none of one that is not known."""
    plain = _plain(name)
    if colors := next((colors for pattern, colors in _STAINS if re.search(pattern, plain)), None):
        return colors
    if dye := _DYE.search(plain):
        wavelength = int(next(filter(None, dye.groups())))
        return next((colors for end, colors in _BANDS if 340 <= wavelength < end), ())
    return tuple(c for word in re.findall("[A-Za-z][a-z]*", name) if (c := _plain(word)) in COLORS)
