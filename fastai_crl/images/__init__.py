"""Multi-channel images: their files, the tensor, a packed cache, duplicates, pictures of them."""

from .cache import Packed, pack
from .duplicates import duplicate_groups
from .image_set import ImageSet, check_folder, image_ids
from .layout import CHANNELS, PATTERN
from .open import OpenMultiChannel, open_channels
from .readers import Input, Reader, Source, register_reader
from .tensor import TensorMultiChannel

__all__ = [
    "CHANNELS",
    "PATTERN",
    "ImageSet",
    "Input",
    "OpenMultiChannel",
    "Packed",
    "Reader",
    "Source",
    "TensorMultiChannel",
    "check_folder",
    "duplicate_groups",
    "image_ids",
    "open_channels",
    "pack",
    "register_reader",
]
