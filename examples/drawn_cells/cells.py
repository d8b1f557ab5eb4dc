"""Geometry of one synthetic field of cells, and the tools to draw on it; `patterns` draws the channels.

Lengths are in units `u` of 1/128 of the picture's side, so a field looks the same, finer or coarser, at every size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage as ndi

Array = npt.NDArray[np.floating]
STEP = 0.8  # pixels between two points of a drawn line
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

    Args:
        size: side in pixels.
        labels: label numbers; three of them need cells of their own (a dividing pair, a mitotic cell, touching cells).
        rng: every random choice comes from here, in a fixed order.

    Attributes:
        owner: the cell of each pixel, (size, size) like the other maps.
        free, gap, mem: pixels to the cell's own outline, to the border with the next cell, and the smaller of the two.
        nd: pixels to the outline of the nucleus, > 0 outside.
        cell, nuc, cyto, nucleoli: soft masks.
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
        # Expression and staining differ from cell to cell.
        self.gain = np.exp(rng.normal(0, 0.3, (4, k))).clip(0.45, 1.8)

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
        tips = alive & ~np.roll(alive, -max(2, round(3.5 * u / STEP)), 1)  # the last 3.5 u of each
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
        """Lines through points `STEP` pixels apart, of deviation `sigma` units and height `weight`."""
        s = max(sigma * self.u, 0.5)
        return self._splat(xy, weight, s) * (STEP * np.sqrt(2 * np.pi) * s)

    def walk(self, start: Array, heading: Array, length: float, wobble: float) -> Array:
        """Paths (n, points, 2) of `length` pixels; the heading drifts by about `wobble` radians a unit."""
        steps = max(2, round(length / STEP))
        drift = self.rng.normal(0, wobble * np.sqrt(STEP / self.u), (len(start), steps)).cumsum(1)
        angle = heading[:, None] + drift
        return start[:, None] + STEP * np.stack([np.cos(angle), np.sin(angle)], -1).cumsum(1)

    def segment(self, start: Array, ends: Array) -> Array:
        """Straight paths (n, points, 2) from one point to each of `ends`."""
        n = max(2, round(float(np.hypot(*(ends - start).T).mean()) / STEP))
        return start + np.linspace(0, 1, n)[None, :, None] * (ends - start)[:, None]

    def rings(self, xy: Array, radius: Array, sigma: float) -> Array:
        """Circles of `radius` pixels and line deviation `sigma` units."""
        n = max(6, round(2 * np.pi * float(radius.mean()) / STEP))
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
        xy = np.stack([at % self.size, at // self.size], -1)
        return xy + self.rng.uniform(-0.5, 0.5, (len(at), 2)), self.owner.flat[at]
