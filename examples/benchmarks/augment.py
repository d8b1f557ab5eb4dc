"""What augmenting a batch costs: `microscopy_transforms` against fastai's `aug_transforms` of the same kinds.

    python augment.py               # 32 images of 4 channels, 256x256
    python augment.py --size 512

Prints the median time per batch and its ratio to fastai's, for training batches (geometry alone, then geometry and
intensity) and for validation batches, which fastai's geometry resamples too. The two are timed in turns, on the GPU
where there is one.
"""

import datetime
import platform
import statistics
import time

import torch
from fastai.vision.augment import aug_transforms
from fastcore.script import call_parse, store_true

from fastai_crl.augment import microscopy_transforms
from fastai_crl.images.tensor import TensorMultiChannel

GEOMETRY = {"flip_vert": True, "max_rotate": 10.0, "max_zoom": 1.1, "max_warp": 0.0}


def seconds(tfms, x, split_idx):
    """Time of one batch; the copy that protects `x` from fastai's in-place lighting is not counted."""
    x = x.clone()
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in tfms:
        x = t(x, split_idx=split_idx)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@call_parse
def main(
    bs: int = 32,  # Images in a batch
    channels: int = 4,  # Channels of an image
    size: int = 256,  # Side of an image
    runs: int = 15,  # Runs of each, interleaved
    threads: int = 0,  # CPU threads; 0: PyTorch's choice
    cpu: store_true = False,  # Stay on the CPU though there is a GPU
):
    """Time per batch; see the head of the file."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {where}, {torch.get_num_threads()} threads; {bs} images "
        f"of {channels}x{size}x{size}, medians of {runs} interleaved runs"
    )
    x = TensorMultiChannel(torch.rand(bs, channels, size, size, device=device))
    rivals = {
        "training, flips, rotation and zoom": (microscopy_transforms(intensity=0), {"max_lighting": 0.0}, 0),
        "training, and intensity": (microscopy_transforms(), {"max_lighting": 0.1}, 0),
        "validation": (microscopy_transforms(), {"max_lighting": 0.1}, 1),
    }
    for name, (ours, lighting, split_idx) in rivals.items():
        both = ours, aug_transforms(**GEOMETRY, **lighting)
        times = [[seconds(tfms, x, split_idx) for tfms in both] for _ in range(runs + 2)][2:]
        mine, fastai = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{name:36} microscopy_transforms {mine:8.2f} ms   aug_transforms {fastai:8.2f} ms   x{mine / fastai:.2f}"
        )
