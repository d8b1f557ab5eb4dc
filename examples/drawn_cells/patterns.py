"""The four channels of one synthetic field, and where in it the protein of each label is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage as ndi

from .cells import STEP, Array, Field


# ---- one drawer per label, in label order: the protein's place in the cells, about 0 to 1 ----
def _nucleoplasm(f: Field) -> Array:
    return f.nuc * (0.8 + 0.12 * f.noise(1.0)) * (1 - 0.7 * f.nucleoli)


def _nuclear_membrane(f: Field) -> Array:
    return f.cell * (np.exp(-((f.nd / (1.1 * f.u)) ** 2)) + 0.12 * f.nuc)


def _nucleoli(f: Field) -> Array:
    return f.nucleoli + 0.1 * f.nuc


def _fibrillar_center(f: Field) -> Array:
    k = np.repeat(np.arange(len(f.nucleolus)), f.rng.integers(2, 5, len(f.nucleolus)))
    return f.dots(f.nucleolus[k] + f.rng.normal(0, 1.4 * f.u, (len(k), 2)), 0.6) * (f.nd < 0) + 0.18 * f.nucleoli


def _speckles(f: Field) -> Array:
    return (1.6 * (f.noise(0.9) - 0.75)).clip(0, 1) * (f.nd < -f.u) * (1 - f.nucleoli) + 0.12 * f.nuc


def _nuclear_bodies(f: Field) -> Array:
    xy, _ = f.sample((f.nd < -2 * f.u) & (f.nucleoli < 0.2), 2, 5)
    return f.dots(xy, 1.0, f.rng.uniform(0.7, 1.1, len(xy)))


def _reticulum(f: Field) -> Array:
    return f.mesh


def _golgi(f: Field) -> Array:
    k, points = np.repeat(f.ids, 6), round(22 * f.u / STEP)
    t = np.linspace(-1, 1, points) * f.rng.uniform(0.4, 0.8, (len(k), 1))
    wave = np.sin(t * f.rng.uniform(4, 9, (len(k), 1)) + f.rng.uniform(0, 6.3, (len(k), 1)))
    out = (np.tile(np.linspace(1.5, 7, 6), f.k)[:, None] + 1.2 * wave) * f.u
    xy = f.beside(k[:, None], f.side[k][:, None] + t, out)
    return f.lines(xy, 0.75, 0.8 * (k != f.mitotic)[:, None]) * f.cyto


def _spots(where: str, low: int, high: int, sigma: float, vary: float) -> Callable[[Field], Array]:
    """Spots in a part of the cytoplasm: anywhere, `far` from the nucleus or `near` one side of it."""

    def draw(f: Field) -> Array:
        part = f.mem > f.u
        if where == "far":
            part &= f.nd > 2.5 * f.u
        elif where == "near":
            c = f.centre[f.owner]
            part &= (f.nd > f.u) & (np.hypot(f.x - c[..., 0], f.y - c[..., 1]) < 12 * f.u)
        else:
            part &= f.nd > f.u
        xy, _ = f.sample(part, low, high)
        return f.dots(xy, sigma, f.rng.uniform(1 - vary, 1, len(xy)))

    return draw


def _intermediate_filaments(f: Field) -> Array:
    xy, k = f.sample((f.nd > f.u) & (f.nd < 8 * f.u) & (f.mem > f.u), 9, 13)
    away = xy - f.nuc_xy[k]
    path = f.walk(xy, np.arctan2(away[:, 1], away[:, 0]) + f.rng.choice([-1.3, 1.3], len(k)), 24 * f.u, 0.16)
    return (0.75 * f.lines(path, 0.95, f.within(path, k[:, None]))).clip(0, 1.2) * (1 - 0.7 * f.nuc)


def _actin(f: Field) -> Array:
    k = np.repeat(f.ids, 8)
    heading = f.turn[k] + f.rng.normal(0, 0.04, len(k))
    across = np.tile(np.linspace(-0.8, 0.8, 8), f.k) * f.radius[k] + f.rng.normal(0, 1.3, len(k)) * f.u
    along = np.stack([np.cos(heading), np.sin(heading)], -1)
    start = f.xy[k] + across[:, None] * along[:, ::-1] * [-1, 1] - 1.5 * f.radius[k][:, None] * along
    path = f.walk(start, heading, 3 * float(f.radius.max()), 0.004)
    edge = np.exp(-((f.mem / (1.2 * f.u)) ** 2)) * f.cell
    return f.lines(path, 0.6, f.within(path, k[:, None])) * 0.9 + 0.35 * edge


def _focal_adhesion(f: Field) -> Array:
    xy, k = f.sample((f.mem > 0.5 * f.u) & (f.mem < 3 * f.u), 13, 20)
    home = f.xy[k] - xy
    path = f.walk(xy, np.arctan2(home[:, 1], home[:, 0]) + f.rng.normal(0, 0.25, len(k)), 5.5 * f.u, 0.0)
    return f.lines(path, 0.9) * f.cell


def _microtubules(f: Field) -> Array:
    return 1.2 * f.tubes + f.spindle


def _tube_ends(f: Field) -> Array:
    return f.tips + 0.15 * f.tubes


def _bridge(f: Field) -> Array:
    return 1.4 * f.bridge + 0.06 * f.cell


def _spindle(f: Field) -> Array:
    return f.spindle + 0.06 * f.cell


def _mtoc(f: Field) -> Array:
    return f.dots(f.centre, 1.5) + 0.3 * f.dots(f.centre, 3.5)


def _centrosome(f: Field) -> Array:
    t = f.rng.uniform(0, 2 * np.pi, f.k)
    apart = 1.7 * f.u * np.stack([np.cos(t), np.sin(t)], -1)
    return f.dots(np.concatenate([f.centre + apart, f.centre - apart]), 0.7)


def _droplets(f: Field) -> Array:
    xy, _ = f.sample((f.nd > 2 * f.u) & (f.mem > 2 * f.u), 7, 12)
    return f.rings(xy, f.rng.uniform(1.9, 3.2, len(xy)) * f.u, 0.55) * f.cyto


def _plasma_membrane(f: Field) -> Array:
    return f.cell * (np.exp(-((f.mem / (1.4 * f.u)) ** 2)) * (0.85 + 0.15 * f.noise(1.0)) + 0.1)


def _junctions(f: Field) -> Array:
    touch = (0.5 + (f.free - f.gap) / (2 * f.u)).clip(0, 1)  # where the neighbour is nearer than the open edge
    return f.cell * touch * np.exp(-((f.gap / (1.2 * f.u)) ** 2)) * (0.9 + 0.25 * f.noise(0.9))


def _mitochondria(f: Field) -> Array:
    xy, k = f.sample((f.nd > f.u) & (f.nd < 13 * f.u) & (f.mem > f.u), 20, 28)
    path = f.walk(xy, f.rng.uniform(0, 2 * np.pi, len(k)), 8 * f.u, 0.22)
    return f.lines(path, 0.75, 0.8 * f.within(path, k[:, None])).clip(0, 1.1) * f.cyto


def _aggresome(f: Field) -> Array:
    c = f.beside(f.ids, f.side, 4.0 * f.u)[f.owner]
    size = f.rng.uniform(3.2, 4.6, f.k)[f.owner] * f.u
    shown = (f.rng.random(f.k) < 0.85)[f.owner]
    return (
        (size - np.hypot(f.x - c[..., 0], f.y - c[..., 1]) + 0.5).clip(0, 1) * f.cell * shown * (0.9 + 0.1 * f.noise(1))
    )


def _cytosol(f: Field) -> Array:
    return f.cyto * (0.62 + 0.07 * f.noise(1.0)) * (0.55 + 0.45 * (f.mem / (8 * f.u)).clip(0, 1)) + 0.12 * f.nuc


def _rods_rings(f: Field) -> Array:
    part = (f.nd > 2 * f.u) & (f.mem > 3 * f.u)
    xy, _ = f.sample(part, 1, 2)
    rods = f.walk(xy, f.rng.uniform(0, 2 * np.pi, len(xy)), 9 * f.u, 0.02)
    xy, _ = f.sample(part, 1, 1)
    return f.lines(rods, 0.9) + f.rings(xy, f.rng.uniform(3.4, 4.4, len(xy)) * f.u, 0.9)


PATTERNS: tuple[Callable[[Field], Array], ...] = (
    _nucleoplasm, _nuclear_membrane, _nucleoli, _fibrillar_center, _speckles, _nuclear_bodies, _reticulum, _golgi,
    _spots("any", 26, 38, 0.6, 0.4),  # peroxisomes: many, tiny, everywhere
    _spots("far", 7, 12, 1.1, 0.5),  # endosomes: some, uneven, away from the nucleus
    _spots("near", 11, 17, 1.4, 0.3),  # lysosomes: large, crowded on one side of the nucleus
    _intermediate_filaments, _actin, _focal_adhesion, _microtubules, _tube_ends, _bridge, _spindle, _mtoc, _centrosome,
    _droplets, _plasma_membrane, _junctions, _mitochondria, _aggresome, _cytosol,
    _spots("any", 2, 4, 1.5, 0.2),  # cytoplasmic bodies: a few, medium
    _rods_rings,
)  # fmt: skip


def _camera(f: Field, image: Array, gain: Array, peak: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Staining that differs from cell to cell, blur, exposure, shot and read noise, 8 bits."""
    image = ndi.gaussian_filter((image * gain[f.owner]).clip(0), max(rng.uniform(0.35, 0.65) * f.u, 0.3), truncate=3)
    photons, read = rng.uniform(80, 300), rng.uniform(0.004, 0.012)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image = peak * (image + noise * np.sqrt(image / photons + read * read)) + rng.uniform(0, 3)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def draw_field(size: int, labels: Sequence[int], rng: np.random.Generator) -> dict[str, npt.NDArray[np.uint8]]:
    """Draw one synthetic field: channel name (`red`, `green`, `blue`, `yellow`) to an 8-bit picture.

    Args:
        size: side of the pictures in pixels.
        labels: label numbers 0 to 27 of the protein in the green channel; their patterns are summed, each with a
            strength of its own.
        rng: decides all the rest: the same labels and an equal generator give the same pictures.
    """
    f = Field(size, labels, rng)
    haze = rng.uniform(0.0, 0.07) * f.cell + rng.uniform(0.0, 0.04) * f.nuc  # unspecific staining
    green = haze + sum(rng.uniform(0.6, 1.0) * PATTERNS[label](f) for label in sorted(set(labels)))
    dna = f.nuc * (0.75 + 0.12 * f.noise(1.1)) * (1 - 0.55 * f.nucleoli) + 1.3 * f.plate
    red = f.tubes + rng.uniform(0.06, 0.16) * f.cyto + 0.9 * f.spindle + 0.7 * f.bridge
    yellow = f.mesh + rng.uniform(0.04, 0.12) * f.cyto + 0.35 * np.exp(-((f.nd / (1.3 * f.u)) ** 2)) * f.cell
    peaks = np.exp(rng.uniform(np.log([110, 100, 130, 110]), np.log([190, 235, 235, 220])))
    stains = {"red": red, "green": green, "blue": dna, "yellow": yellow}
    return {name: _camera(f, image, f.gain[i], peaks[i], rng) for i, (name, image) in enumerate(stains.items())}
