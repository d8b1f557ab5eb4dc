"""Multi-channel images: their files, the tensor, a packed cache, duplicates, pictures of them."""

from .cache import Packed, pack
from .duplicates import duplicate_groups
from .layout import check_folder, image_ids
from .tensor import OpenMultiChannel, TensorMultiChannel, open_channels

__all__ = [
    "OpenMultiChannel",
    "Packed",
    "TensorMultiChannel",
    "check_folder",
    "duplicate_groups",
    "image_ids",
    "open_channels",
    "pack",
]
