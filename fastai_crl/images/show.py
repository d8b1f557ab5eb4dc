"""Pictures of batches and predictions: composites or single channels, with what was found, missed and falsely given."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastai.data.core import show_batch, show_results
from fastai.torch_core import TensorCategory, TensorMultiCategory
from fastcore.foundation import L
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.textpath import TextPath
from numpy.typing import ArrayLike
from plum import dispatch

from .tensor import Color, TensorMultiChannel, channel_names, positions

# Blue, orange and purple: most eyes, colour-blind ones too, tell them apart.
FOUND, MISSED, FALSE = "#0067a5", "#c26a00", "#a1006b"

Lines = list[tuple[str, str]]

# Inches: width of a picture, height of a line of text and of a figure's title, space between pictures.
_SIDE, _LINE, _TITLE, _GAP = 2.5, 0.155, 0.35, 0.06
_FONT, _TITLE_FONT = 8, 11


# ---------------------------------------------------------------- drawing


def _panels(
    image: TensorMultiChannel, channels: Any, split: Any, colors: Sequence[Color] | None
) -> list[tuple[list[str], Sequence[Color] | None, str]]:
    """Return the panels of one image: `channels` together, and of `split` each alone, in the colour that it has there.

    A panel is what `TensorMultiChannel.show` draws, channels and their colours where they are given, and the channel's
    name. By name: a position may be the name of another channel.
    """
    names = channel_names(image.channels, len(image))
    drawn = positions(channels, names)
    alone = [] if not split else drawn if split is True else positions(split, names)
    own = {} if colors is None else dict(zip(drawn, colors, strict=False))
    named = len(L(image.channels)) == len(image)
    return [
        ([names[c] for c in drawn], colors, ""),
        *(([names[c]], [own[c]] if c in own else None, names[c] if named else str(c)) for c in alone),
    ]


def draw_images(
    images: Sequence[TensorMultiChannel],
    captions: Sequence[Lines],
    ctxs: Sequence[Axes] | None = None,
    channels: Sequence[str | int] | None = None,
    split: bool | str | Sequence[str | int] = False,
    stretch: float | tuple[float, float] | None = None,
    colors: Sequence[Color] | None = None,
    title: str | None = None,
    nrows: int | None = None,
    ncols: int | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> list[Axes]:
    """Draw images with coloured lines of text above each; return the axes, one per panel, image after image.

    Args:
        images: (C,H,W) each.
        captions: per image its lines, (text, colour) each, from the top.
        ctxs: axes to draw on, one per panel; by default a new figure, as large as pictures and captions need.
        channels: names or positions of the channels to draw; all by default. One name is one channel.
        split: one panel with all `channels` together, then one per channel with its name, or per channel that `split`
            names; one image to a row by default.
        stretch: percentiles that become black and full brightness in each channel of each image, for dim ones (see
            `TensorMultiChannel.composite`). Default: true brightness, so that images can be compared.
        colors: one for each channel that is drawn, also in its own panel, see `TensorMultiChannel.composite`.
        title: of the new figure.
        nrows: rows of images in it.
        ncols: columns of images in it.
        figsize: its size in inches.
        **kwargs: for matplotlib's `imshow`.

    Raises:
        ValueError: too few `ctxs`; an unknown channel, percentiles out of range, or colours that do not fit.
    """
    panels = [_panels(image, channels, split, colors) for image in images]
    if ctxs is None:
        ctxs = _grid(images, captions, len(panels[0]), nrows, ncols or (1 if split else None), figsize, title)
    if len(ctxs) < len(panels) * len(panels[0]):
        raise ValueError(
            f"{len(ctxs)} axes for {len(panels)} images of {len(panels[0])} panels: pass ctxs, one per panel, or none."
        )
    axes = iter(ctxs)
    drawn = []
    for image, lines, parts in zip(images, captions, panels, strict=True):
        for i, (own, paints, name) in enumerate(parts):
            ax = image.show(next(axes), own, stretch, paints, **kwargs)
            if i == 0:
                _write(ax, lines, len(parts))
            else:
                ax.text(0.03, 0.97, name, color="white", fontsize=_FONT, va="top", transform=ax.transAxes)
            drawn.append(ax)
    return drawn


def _write(ax: Axes, lines: Lines, n_panels: int) -> None:
    """Write `lines` above a picture: as its title where they have one colour (a title has no more), else one by one.

    Lines that are wider than the image's panels are written smaller.
    """
    room = 72 * ax.figure.get_figwidth() * ax.get_position().width * n_panels
    widest = max((TextPath((0, 0), text, size=_FONT).get_extents().width for text, _ in lines if text), default=0)
    size = _FONT * min(1, room / max(widest, 1))
    if len({color for _, color in lines}) == 1:
        title = "\n".join(text for text, _ in lines)
        ax.set_title(title, color=lines[0][1], fontsize=size, pad=3, x=0, ha="left")
        return
    for i, (text, color) in enumerate(reversed(lines)):
        at = {"xytext": (0, 3 + 72 * _LINE * i), "textcoords": "offset points", "xycoords": "axes fraction"}
        ax.annotate(text, (0, 1), color=color, fontsize=size, **at)


def _grid(
    images: Sequence[TensorMultiChannel],
    captions: Sequence[Lines],
    panels: int,
    nrows: int | None,
    ncols: int | None,
    figsize: tuple[float, float] | None,
    title: str | None,
) -> list[Axes]:
    """Return the axes of a new figure, `panels` for each image, with room for the captions and the title."""
    n = len(images)
    ncols = min(n, ncols or math.ceil(n / nrows if nrows else math.sqrt(n)))
    rows = [range(i, min(i + ncols, n)) for i in range(0, n, ncols)]
    texts = [_LINE * max(len(captions[i]) for i in row) + 2 * _GAP for row in rows]
    head = 0 if title is None else _TITLE
    aspect = max(image.shape[-2] / image.shape[-1] for image in images)
    if figsize is None:
        side = _SIDE
    else:
        side = min(figsize[0] / (ncols * panels) - _GAP, (figsize[1] - head - sum(texts)) / (len(rows) * aspect))
    width, height = figsize or (ncols * panels * (side + _GAP) + _GAP, len(rows) * side * aspect + sum(texts) + head)
    fig, axes, top = plt.figure(figsize=(width, height)), [], height - head
    if title is not None:
        fig.text(_GAP / width, 1 - head / height / 2, title, fontsize=_TITLE_FONT, va="center")
    for row, text in zip(rows, texts, strict=True):
        top -= text + side * aspect
        for k in range(len(row) * panels):
            left = _GAP + k * (side + _GAP)
            axes.append(fig.add_axes((left / width, top / height, side / width, side * aspect / height)))
    return axes


# ---------------------------------------------------------------- what is written above


def prediction_lines(
    probs: ArrayLike | None, chosen: ArrayLike, target: ArrayLike | None, names: Sequence[str], most: int = 8
) -> Lines:
    """Return the lines above one image: labels found, missed and falsely given, each with its probability.

    Args:
        probs: (C,), or None to leave the numbers out.
        chosen: (C,) bool, the decisions.
        target: (C,) of 0 and 1, or None where it is unknown: the chosen labels are then listed as they are.
        names: of the labels, C.
        most: lines at most; the last then says how many labels are left out.
    """
    chosen = np.asarray(chosen, dtype=bool)
    order = np.arange(len(chosen)) if probs is None else np.argsort(-np.asarray(probs), kind="stable")
    if target is None:
        kinds = [("", "black", chosen)]
    else:
        wanted = np.asarray(target) > 0.5
        kinds = [
            ("✓ ", FOUND, wanted & chosen),
            ("✗ missed ", MISSED, wanted & ~chosen),
            ("+ false ", FALSE, chosen & ~wanted),
        ]
    lines = [
        (mark + names[c] + ("" if probs is None else " " + f"{float(probs[c]):.2f}".removeprefix("0")), color)
        for mark, color, which in kinds
        for c in order[which[order]]
    ]
    if not lines:
        return [("no label", "gray") if target is None else ("✓ no label", FOUND)]
    return lines if len(lines) <= most else [*lines[: most - 1], (f"and {len(lines) - most + 1} more", "gray")]


# ---------------------------------------------------------------- fastai's show_batch and show_results


def _shown(o: Any) -> list[str]:
    """Return the names of the decoded label or labels of one image, as pictures show them."""
    names = getattr(o, "names", {})
    return [str(names.get(v, v)) for v in ([o] if isinstance(o, str) else o)]


@dispatch
def show_batch(  # noqa: F811
    x: TensorMultiChannel, y: TensorCategory | TensorMultiCategory, samples, ctxs=None, max_n=9, **kwargs
):
    """`dls.show_batch()` of multi-channel images, label names above each; options as for `draw_images`."""
    names = [_shown(o) for o in samples.itemgot(1)[:max_n]]
    captions = [[(n + ";", "black") for n in some[:-1]] + [(n, "black") for n in some[-1:]] for some in names]
    return draw_images(samples.itemgot(0)[:max_n], captions, ctxs, **kwargs)


@dispatch
def show_results(  # noqa: F811
    x: TensorMultiChannel, y: TensorCategory | TensorMultiCategory, samples, outs, ctxs=None, max_n=9, **kwargs
):
    """`learn.show_results()`: labels found, missed and falsely given; options as for `draw_images`.

    With one label per image, that label, and below it the predicted one, coloured by whether they agree. What fastai
    hands over are decisions, not probabilities: `show_predictions` has those.
    """
    captions = []
    for target, output in zip(samples.itemgot(1)[:max_n], outs.itemgot(0), strict=False):
        wanted, given = _shown(target), _shown(output)
        if isinstance(y, TensorMultiCategory):
            names = list(dict.fromkeys([*wanted, *given]))
            captions.append(prediction_lines(None, [n in given for n in names], [n in wanted for n in names], names))
        else:
            color = FOUND if target == output else FALSE
            captions.append([(name, color) for name in (*wanted, *given)])
    return draw_images(samples.itemgot(0)[:max_n], captions, ctxs, **kwargs)
