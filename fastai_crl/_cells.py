"""Drawing of one synthetic four-channel field of cells; `synth` turns such fields into a data set.

Lengths are in units `u` of 1/128 of the picture's side, so a field looks the same, finer or coarser, at every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage as ndi

__all__ = ["PATTERNS", "Field", "draw_field"]

Array = npt.NDArray[np.floating]
_STEP = 0.8  # pixels between two points of a drawn line
_N_ANGLES = 360  # entries of an outline table
_BRIDGE, _SPINDLE, _JUNCTIONS = 16, 17, 22  # the labels that change the cells themselves, not the green channel alone


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Array, Array]:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return x, y


def _entry(a: Array, b: Array) -> npt.NDArray[np.int16]:
    """Table entry of direction (a, b), by a cheap stand-in for the angle; a negative entry counts from the end."""
    part = 1 - a / (np.abs(a) + np.abs(b) + 1e-9)
    return (np.copysign(part, b) * (_N_ANGLES / 4)).astype(np.int16)


def _col(values: Array) -> Array:
    return values[:, None, None]


class Field:
    """Geometry of one field: where the cells, nuclei, nucleoli and centrosomes are, and the tools to draw on them.

    `size`: side in pixels. `labels`: label numbers; three of them need their own cells (a dividing pair, a mitotic
    cell, touching cells). `rng`: every random choice comes from here, in a fixed order.
    Maps of shape (size, size): `owner` (cell index), `free` (pixels to the cell's own outline), `gap` (pixels to the
    border with the next cell), `mem` (the smaller of the two, > 0 inside), `nd` (pixels outside the nucleus), and the
    soft masks `cell`, `nuc`, `cyto`, `nucleoli`.
    """

    def __init__(self, size: int, labels: Iterable[int], rng: np.random.Generator):
        labels = set(labels)
        self.size, self.u, self.rng = size, size / 128, rng
        self.x, self.y = _grid(size)
        self.paired = _BRIDGE in labels or rng.random() < 0.04  # also without the label: the protein decides, not DNA
        self.mitotic = (2 if self.paired else 0) if _SPINDLE in labels or rng.random() < 0.04 else -1
        self._place(crowded=_JUNCTIONS in labels)
        self._outline()
        self._organelles()

    # ---- cells ----
    def _place(self, crowded: bool) -> None:
        rng, u, size = self.rng, self.u, self.size
        self.scale = rng.uniform(0.88, 1.12)
        apart = (36 if crowded else rng.uniform(36, 46)) * self.scale * u
        xy, barred = [rng.uniform(0.32, 0.68, 2) * size], []
        if self.paired:
            turn = rng.uniform(0, 2 * np.pi)
            half = 19 * u * self.scale * np.array([np.cos(turn), np.sin(turn)])
            mid = xy[0]
            xy, barred = [mid - half, mid + half], [mid]
        for dart in rng.uniform(-8 * u, size + 8 * u, (90, 2)):
            if len(xy) == self.mitotic:  # the mitotic cell lies well inside the picture
                dart = dart.clip(16 * u, size - 16 * u)
            if all(math.dist(dart, p) > apart for p in xy) and all(math.dist(dart, p) > 0.7 * apart for p in barred):
                xy.append(dart)
        self.mitotic = self.mitotic if self.mitotic < len(xy) else -1
        self.xy, k = np.array(xy), len(xy)
        self.k, self.ids = k, np.arange(k)
        self.radius = rng.uniform(23, 29, k) * (1.15 if crowded else rng.uniform(0.85, 1.1)) * self.scale * u
        self.turn, self.long = rng.uniform(0, np.pi, k), rng.uniform(1, rng.uniform(1.1, 2.3), k)
        wave = rng.uniform(0.02, rng.uniform(0.06, 0.13), k)
        if self.paired:
            self.radius[:2], self.long[:2] = 13 * self.scale * u, 1.1
        if self.mitotic >= 0:
            self.radius[self.mitotic], self.long[self.mitotic], wave[self.mitotic] = 16 * u, 1.0, 0.0
        self.outer = self._table(self.radius, wave)
        self.nuc_xy = self.xy + rng.normal(0, 2.2, (k, 2)) * u * (self.radius / (26 * u))[:, None]
        nuc_radius = np.minimum(rng.uniform(9, 12, k) * self.scale * u, 0.62 * self.radius)
        self.nuc_turn, self.nuc_long = self.turn + rng.normal(0, 0.3, k), rng.uniform(1, 1.45, k)
        self.inner = self._table(nuc_radius, np.abs(rng.normal(0, 0.02, k)) + 0.01)
        if self.mitotic >= 0:
            self.inner[self.mitotic] = 1e-3  # no nucleus while dividing
            self.nuc_xy[self.mitotic] = self.xy[self.mitotic]
        self.gain = np.exp(rng.normal(0, 0.3, (4, k))).clip(
            0.45, 1.8
        )  # expression and staining differ from cell to cell

    def _table(self, radius: Array, wave: Array) -> Array:
        """Radius by angle, one row per cell: a wavy circle."""
        p, h = np.arange(_N_ANGLES) * (4 / _N_ANGLES), np.arange(2, 7)[:, None, None]
        a = np.abs(p - 2) - 1
        t = np.arctan2(np.where(p < 2, 1, -1) * (1 - np.abs(a)), a)  # the angle of each entry
        phase = self.rng.uniform(0, 2 * np.pi, (5, len(radius), 1))
        waves = (np.cos(h * t + phase) / np.sqrt(h - 1)).sum(0)
        return (radius[:, None] * (1 + wave[:, None] * waves)).astype(np.float32)

    def _outline(self) -> None:
        def polar(x: Array, y: Array, turn: Array, long: Array, table: Array, row: Array) -> tuple[Array, Array]:
            c, s, e = np.cos(turn), np.sin(turn), np.sqrt(long)
            a, b = (x * c + y * s) / e, (y * c - x * s) * e
            return np.sqrt(a * a + b * b), table[row, _entry(a, b)]

        f = np.float32
        args = [_col(v.astype(f)) for v in (self.xy[:, 0], self.xy[:, 1], self.turn, self.long)]
        r, edge = polar(self.x - args[0], self.y - args[1], *args[2:], self.outer, _col(self.ids))
        d = r / edge
        self.owner = d.argmin(0)
        at = self.owner[None]
        mine, edge = np.take_along_axis(d, at, 0)[0], np.take_along_axis(edge, at, 0)[0]
        np.put_along_axis(d, at, np.inf, 0)
        free = (1 - mine) * edge
        self.gap = np.minimum((d.min(0) - mine) * edge / 2, self.size)
        self.mem = np.minimum(free, self.gap)
        self.free = free
        o = self.owner
        vals = [v.astype(f)[o] for v in (self.nuc_xy[:, 0], self.nuc_xy[:, 1], self.nuc_turn, self.nuc_long)]
        r, edge = polar(self.x - vals[0], self.y - vals[1], *vals[2:], self.inner, o)
        self.nd = r - edge
        self.cell = (self.mem + 0.5).clip(0, 1)
        self.nuc = (0.5 - self.nd).clip(0, 1) * self.cell
        self.cyto = self.cell - self.nuc

    def _organelles(self) -> None:
        rng, u = self.rng, self.u
        self.side = rng.uniform(0, 2 * np.pi, self.k)  # angle at which the centrosome lies
        self.centre = self.beside(self.ids, self.side, rng.uniform(2, 3.5, self.k) * u)
        per_cell = rng.integers(1, 4, self.k)
        self.nucleolus_of = np.repeat(self.ids, per_cell)
        n = len(self.nucleolus_of)
        self.nucleolus = self.beside(self.nucleolus_of, rng.uniform(0, 2 * np.pi, n), inside=rng.uniform(0.15, 0.6, n))
        body = self.dots(self.nucleolus, 2.2, rng.uniform(0.8, 1.3, n)) * (1 + 0.2 * self.noise(1.2))
        self.nucleoli = (4 * (body - 0.42)).clip(0, 1) * (self.nd < -1)
        self._microtubules()
        self.mesh = 0.85 * np.exp(-((self.noise(1.3) / 0.6) ** 2)) + 0.15  # the net of the endoplasmic reticulum
        self.mesh = self.mesh * self.cyto * (0.2 + np.exp(-self.nd.clip(0) / (7 * u)))

    def _microtubules(self) -> None:
        rng, u, per_cell = self.rng, self.u, 44
        k = np.repeat(self.ids, per_cell)
        n = len(k)
        start = self.beside(k, rng.uniform(0, 2 * np.pi, n), rng.uniform(0, 6, n) * u)  # half from around the nucleus,
        start = np.where(rng.random((n, 1)) < 0.5, start, self.centre[k] + rng.normal(0, 1.5, (n, 2)) * u)
        path = self.walk(start, rng.uniform(0, 2 * np.pi, n), 42 * u * self.scale, 0.12)  # half from the centrosome
        reach = rng.uniform(0.3, 1.1, len(k)) * path.shape[1]
        alive = np.logical_and.accumulate(
            self.within(path, k[:, None]) & (np.arange(path.shape[1]) < reach[:, None]), 1
        )
        alive &= (k != self.mitotic)[:, None]
        self.tubes = 0.55 * self.lines(path, 0.55, alive) * (1 - 0.75 * self.nuc)
        tips = alive & ~np.roll(alive, -max(2, round(3.5 * u / _STEP)), 1)  # the last 3.5 u of each
        self.tips = self.lines(path[::2], 0.75, tips[::2])
        self.spindle, self.plate = np.zeros_like(self.cell), np.zeros_like(self.cell)
        if self.mitotic >= 0:
            c, turn, fibres = self.xy[self.mitotic], rng.uniform(0, np.pi), 11
            along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
            ends = c + np.linspace(-6.5, 6.5, fibres)[:, None] * u * across
            lines = [self.segment(c + pole * along * u, ends) for pole in (-10, 10)]
            poles = self.dots(np.array([c - 10 * u * along, c + 10 * u * along]), 1.3)
            self.spindle = (0.7 * self.lines(np.concatenate(lines), 0.7)).clip(0, 1) + poles
            a, b = ((self.x - c[0]) * v[0] + (self.y - c[1]) * v[1] for v in (along, across))
            thick = np.hypot(a / 2.6, b / 8.5) / u + 0.12 * self.noise(1.5)
            self.plate = (3 * (1.1 - thick)).clip(0, 1)
        self.bridge = np.zeros_like(self.cell)
        if self.paired:
            a, b = self.xy[:2]
            path = self.segment(a + 0.22 * (b - a), (a + 0.78 * (b - a))[None])[0]
            t = np.linspace(-1, 1, len(path))
            bow = rng.normal(0, 2) * u * (1 - t**2)[:, None] * (b - a)[::-1] * [1, -1] / np.hypot(*(b - a))
            self.bridge = self.lines(path + bow, 1.0, np.where(np.abs(t) < 0.12, 0.15, 1.0))

    # ---- tools ----
    def noise(self, scale: float) -> Array:
        """Smooth noise, mean 0 and deviation 1, with grains of `scale` units."""
        s = max(scale * self.u, 0.4)
        white = self.rng.standard_normal((self.size, self.size), dtype=np.float32)
        return ndi.gaussian_filter(white, s, mode="wrap", truncate=3) * (2 * np.sqrt(np.pi) * s)

    def _splat(self, xy: Array, weight: Array | float, sigma: float) -> Array:
        """Points shared among their four pixels, then blurred by `sigma` pixels."""
        n = self.size
        weight = np.broadcast_to(np.asarray(weight, np.float32), xy.shape[:-1]).ravel()
        p = xy.reshape(-1, 2)[weight > 0]
        weight = weight[weight > 0]
        low = np.floor(p).astype(np.intp)
        keep = ((low >= 0) & (low < n - 1)).all(1)
        (x, y), (fx, fy), weight = low[keep].T, (p - low)[keep].T, weight[keep]
        at = y * n + x
        where = np.concatenate([at, at + 1, at + n, at + n + 1])
        share = np.concatenate([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy]) * np.tile(weight, 4)
        image = np.bincount(where, share, n * n).reshape(n, n).astype(np.float32)
        return ndi.gaussian_filter(image, sigma, mode="constant", truncate=3)

    def dots(self, xy: Array, sigma: float, weight: Array | float = 1.0) -> Array:
        """Round spots of deviation `sigma` units and height `weight`."""
        s = max(sigma * self.u, 0.5)
        return self._splat(xy, weight, s) * (2 * np.pi * s * s)

    def lines(self, xy: Array, sigma: float, weight: Array | float = 1.0) -> Array:
        """Lines through points `_STEP` pixels apart, of deviation `sigma` units and height `weight`."""
        s = max(sigma * self.u, 0.5)
        return self._splat(xy, weight, s) * (_STEP * np.sqrt(2 * np.pi) * s)

    def walk(self, start: Array, heading: Array, length: float, wobble: float) -> Array:
        """Paths (n, points, 2) of `length` pixels; the heading drifts by about `wobble` radians a unit."""
        steps = max(2, round(length / _STEP))
        drift = self.rng.normal(0, wobble * np.sqrt(_STEP / self.u), (len(start), steps)).cumsum(1)
        angle = heading[:, None] + drift
        return start[:, None] + _STEP * np.stack([np.cos(angle), np.sin(angle)], -1).cumsum(1)

    def segment(self, start: Array, ends: Array) -> Array:
        """Straight paths (n, points, 2) from one point to each of `ends`."""
        n = max(2, round(float(np.hypot(*(ends - start).T).mean()) / _STEP))
        return start + np.linspace(0, 1, n)[None, :, None] * (ends - start)[:, None]

    def rings(self, xy: Array, radius: Array, sigma: float) -> Array:
        """Circles of `radius` pixels and line deviation `sigma` units."""
        n = max(6, round(2 * np.pi * float(radius.mean()) / _STEP))
        t = np.linspace(0, 2 * np.pi, n, endpoint=False)
        return self.lines(xy[:, None] + radius[:, None, None] * np.stack([np.cos(t), np.sin(t)], -1), sigma)

    def within(self, xy: Array, k: Array) -> npt.NDArray[np.bool_]:
        """Which points lie inside cell `k`."""
        i = np.rint(xy).astype(np.intp)
        seen = ((i >= 0) & (i < self.size)).all(-1)
        x, y = np.moveaxis(i.clip(0, self.size - 1), -1, 0)
        return seen & (self.owner[y, x] == k) & (self.mem[y, x] > 0)

    def beside(self, k: Array, angle: Array, out: Array | float = 0.0, inside: Array | float = 1.0) -> Array:
        """Points at `inside` times the nucleus's radius of cell `k` plus `out` pixels, at `angle` of its frame."""
        edge = self.inner[k, _entry(np.cos(angle), np.sin(angle))] * inside + out
        e, turn = np.sqrt(self.nuc_long[k]), self.nuc_turn[k]
        a, b = edge * np.cos(angle) * e, edge * np.sin(angle) / e
        return self.nuc_xy[k] + np.stack([a * np.cos(turn) - b * np.sin(turn), a * np.sin(turn) + b * np.cos(turn)], -1)

    def sample(self, where: Array, low: int, high: int) -> tuple[Array, npt.NDArray[np.intp]]:
        """`low` to `high` random points per cell where the mask `where` is true, and the cell of each."""
        spots = np.flatnonzero(where)
        owner, picks = self.owner.ravel()[spots], []
        for k in self.ids:
            mine = spots[owner == k]
            n = self.rng.integers(low, high + 1)
            if len(mine) > 20 * self.u**2:
                picks.append(self.rng.choice(mine, n))
        at = np.concatenate([np.empty(0, np.intp), *picks])
        return np.stack([at % self.size, at // self.size], -1) + self.rng.uniform(
            -0.5, 0.5, (len(at), 2)
        ), self.owner.flat[at]


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
    k, points = np.repeat(f.ids, 6), round(22 * f.u / _STEP)
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
    """One synthetic field: channel name (`red`, `green`, `blue`, `yellow`) to an 8-bit picture of `size` pixels square.

    `labels`: label numbers 0 to 27 of the protein in the green channel; their patterns are summed, each with a strength
    of its own. `rng` decides all the rest, so the same labels and an equal generator give the same pictures.
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
