"""Drawn (synthetic) sets of images in the layout of the Human Protein Atlas."""

from .make_hpa import make_hpa

__all__ = ["make_hpa"]
