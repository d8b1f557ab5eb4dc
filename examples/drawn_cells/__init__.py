"""Drawn (synthetic) fields of cells in the layout of the Human Protein Atlas: `make_hpa(path)` writes a data set.

Not part of the package: the examples, the benchmarks and the tests import it from this folder, where no real data is.
Nothing here is a photograph. The pictures are drawn, the labels sampled. Results on them say that code works and how
methods compare on *this* data, never how well a network reads real cells.
"""

from .write import make_hpa

__all__ = ["make_hpa"]
