"""How fast images reach the trainer: decoders, pipelines, the packed cache, against others and against bare memory.

    python data.py                  # draws 32 fields of 512 pixels first; on two CPU cores some minutes
    python data.py --quick          # small and short
    python data.py --path hpa       # on a real set in the Kaggle layout (its train.csv and train/)

Prints, in one run:

1. decoders of 8-bit grey PNG, one thread, and whether their pixels are the same;
2. samples per second of each pipeline to batches of uint8 or float, in one process: *article*, the way published
   code for these images does it (a PyTorch `Dataset`: scikit-image reads each channel, floats, stack, torchvision's
   `Resize`); *DataBlock*, plain fastai with scikit-image reading and resizing; ours by decoding; ours from the packed
   cache; as trained, that is with the conversion to float and the normalisation; and a bare copy of the same bytes out
   of the memory map, shuffled and in whole batches, into one buffer and into new memory as any loader must;
3. the same over the number of workers, and with the page cache emptied before (as well as `posix_fadvise` can);
4. `pack` beside bare decoding and decoding with resizing, on all cores;
5. the most memory that each pipeline added.

A small set is gone through several times in one pass from the cache, so that starting a pass, and its workers, does not
count more than with a large one. Everything runs with one thread for arithmetic. Each figure is the median over rounds,
in which all rivals are run one after the other so that a busy machine treats them alike. `per core` is per second of
CPU time.
"""

import datetime
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import imageio.v3
import numpy as np
import pandas as pd
import skimage.io
import skimage.transform
import torch
import torchvision
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage
from fastcore.script import call_parse, store_true
from PIL import Image

from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.cache import pack
from fastai_crl.images.image_set import ImageSet
from fastai_crl.images.open import open_channels
from fastai_crl.samplers import with_sampler

sys.path.append(str(Path(__file__).resolve().parents[1]))
from drawn_cells import make_hpa


def table(title, header, rows):
    """Print a markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * w for w in widths], *rows]
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) + " |", flush=True)


# ---------------------------------------------------------------- rivals


class Article(torch.utils.data.Dataset):
    """One sample at a time: scikit-image, floats, stack, torchvision."""

    def __init__(self, folder, ids, size):
        self.folder, self.ids, self.resize = folder, ids, torchvision.transforms.Resize((size, size), antialias=True)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        planes = [
            skimage.io.imread(self.folder / f"{self.ids[i]}_{c}.png").astype(np.float32) / 255 for c in HPA_CHANNELS
        ]
        return self.resize(torch.from_numpy(np.stack(planes)))


def article(folder, ids, size, bs, workers):
    data = Article(folder, ids, size)
    more = {"persistent_workers": True} if workers else {}
    return torch.utils.data.DataLoader(data, bs, shuffle=True, num_workers=workers, drop_last=True, **more)


def data_block(folder, ids, size, bs, workers):
    def read(i):
        planes = np.stack([skimage.io.imread(folder / f"{i}_{c}.png") for c in HPA_CHANNELS], -1)
        resized = skimage.transform.resize(planes, (size, size), anti_aliasing=True, preserve_range=True)
        return TensorImage(torch.from_numpy(resized.astype(np.uint8).transpose(2, 0, 1).copy()))

    block = DataBlock(
        TransformBlock(type_tfms=read, batch_tfms=IntToFloatTensor), splitter=lambda o: (list(range(len(o))), [])
    )
    return block.dataloaders(ids, bs=bs, num_workers=workers, persistent_workers=bool(workers)).train


def ours(root, size, bs, workers, cache, trained=False, times=1):
    """One pass goes through the images `times` times, as it is starting a pass that costs with a small set."""
    stats = "hpa" if trained else None
    dls = HPADataLoaders.from_csv(
        root, size=size, bs=bs, valid_pct=0, cache=cache, check=False, batch_tfms=[], stats=stats,
        num_workers=workers, persistent_workers=bool(workers),
    )  # fmt: skip
    if times > 1:
        dls = with_sampler(dls, np.random.default_rng(0).permutation(len(dls.train_ds) * times) % len(dls.train_ds))
    if not trained:
        dls.train.after_batch.fs.clear()
    return dls.train


def bare(packed, bs, new, times):
    """Batches copied out of the memory map, and nothing else."""
    order = np.random.default_rng(0).permutation(len(packed) * times) % len(packed)
    images, buffer = np.load(packed.path / "images.npy", mmap_mode="r"), np.empty((bs, *packed.shape[1:]), np.uint8)
    for i in range(0, len(order) - bs + 1, bs):
        out = np.empty_like(buffer) if new else buffer
        yield np.take(images, order[i : i + bs], axis=0, out=out, mode="clip")


# ---------------------------------------------------------------- measuring


def forget(files):
    """Drop files from the page cache."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(make, files, seconds, send):
    """Send samples per second, per CPU second, and added memory of one pipeline.

    One pass with its start, the `files` forgotten before it if any; without files, from the second batch on until
    `seconds` are over.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loader = make()
    one_pass = files is not None
    forget(files or [])
    n, start, cpu, warm = 0, time.perf_counter(), time.process_time(), one_pass
    while True:
        for batch in loader() if callable(loader) else loader:
            n += len(batch[0] if isinstance(batch, (tuple, list)) else batch)
            if not warm:
                n, start, cpu, warm = 0, time.perf_counter(), time.process_time(), True
            if not one_pass and n and time.perf_counter() - start > seconds:
                break
        wall = time.perf_counter() - start
        if one_pass or wall > seconds:
            break
    cpu = time.process_time() - cpu
    send.send((n / wall, n / cpu, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    os._exit(0)


def compare(rivals, rounds, seconds):
    """Medians of what `measure` gives, {name: (per second, per core, MiB)}, each run in a process of its own."""
    results = {name: [] for name in rivals}
    fork = multiprocessing.get_context("fork")
    for _ in range(rounds):
        for name, (make, files) in rivals.items():
            receive, send = fork.Pipe(False)
            process = fork.Process(target=measure, args=(make, files, seconds, send))
            process.start()
            send.close()
            results[name].append(receive.recv())
            process.join()
    return {name: [statistics.median(column) for column in zip(*r, strict=True)] for name, r in results.items()}


# ---------------------------------------------------------------- tables


def pillow(file):
    with Image.open(file) as im:
        return np.asarray(im)


DECODERS = {
    "imagecodecs": lambda f: imagecodecs.png_decode(Path(f).read_bytes()),
    "torchvision.io": lambda f: torchvision.io.decode_image(torchvision.io.read_file(str(f)))[0].numpy(),
    "Pillow": pillow,
    "imageio": imageio.v3.imread,
    "scikit-image": skimage.io.imread,
}


def decoders(files, rounds):
    times = {name: [] for name in DECODERS}
    want = [pillow(f) for f in files]
    for _ in range(rounds + 1):
        for name, decode in DECODERS.items():
            start = time.perf_counter()
            for f in files:
                decode(f)
            times[name].append((time.perf_counter() - start) / len(files))
    best = statistics.median(times["imagecodecs"][1:])
    rows = []
    for name, decode in DECODERS.items():
        same = all(np.array_equal(decode(f), a) for f, a in zip(files, want, strict=True))
        s = statistics.median(times[name][1:])
        rows.append([name, f"{s * 1e3:.3f}", f"{s / best:.2f}", "same" if same else "DIFFER"])
    h, w = want[0].shape
    table(f"1. Decoding one 8-bit grey PNG of {h}x{w}.", ["decoder", "ms", "x ours", "pixels"], rows)


def rate(calls, workers):
    """Calls per second in threads."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda call: call(), calls):
            pass
    return len(calls) / (time.perf_counter() - start)


def packing(root, ids, size, scratch, rounds):
    folder, cores = root / "train", os.cpu_count()
    results = {"bare decoding": [], "decoding and resizing": [], "pack": []}
    for i in range(rounds):

        def decode(k):
            for c in HPA_CHANNELS:
                DECODERS["imagecodecs"](folder / f"{k}_{c}.png")

        results["bare decoding"].append(rate([lambda k=k: decode(k) for k in ids], cores))
        results["decoding and resizing"].append(
            rate([lambda k=k: open_channels(folder / k, size=size) for k in ids], cores)
        )
        start = time.perf_counter()
        pack(ImageSet(folder, size=size), ids, scratch / f"pack{i}", progress=False)
        results["pack"].append(len(ids) / (time.perf_counter() - start))
        shutil.rmtree(scratch / f"pack{i}")
    medians = {name: statistics.median(r) for name, r in results.items()}
    rows = [[name, f"{r:,.0f}", f"{medians['pack'] / r:.2f}"] for name, r in medians.items()]
    table(f"4. First pass on {cores} cores, checks of the files included.", ["what", "samples/s", "pack is x"], rows)


@call_parse
def main(
    path: str = "",  # Data set in the Kaggle layout; by default one is drawn
    n: int = 256,  # Samples (of a drawn set: copies of 32 fields)
    source: int = 512,  # Side of the drawn fields in pixels
    size: int = 256,  # Side of the images in the batches
    bs: int = 32,  # Batch size
    rounds: int = 5,  # Rounds, interleaved
    seconds: float = 1.0,  # Least time of each measurement
    workers: str = "",  # Numbers of workers, comma separated; by default 0, 1, 2, 4 up to the number of cores
    quick: store_true = False,  # 64 samples of 8 fields, 2 rounds
):
    """Speed of the ways to the images; see the head of the file."""
    torch.set_num_threads(1)
    if quick:
        n, rounds, seconds = min(n, 64), 2, 0.3
    cores = os.cpu_count()
    counts = [int(w) for w in workers.split(",")] if workers else [w for w in (0, 1, 2, 4, 8, 16) if w <= cores]
    with tempfile.TemporaryDirectory(dir=".") as d:
        scratch = Path(d)
        root = scratch / "data"
        real = (
            Path(path) / "train.csv"
            if path
            else make_hpa(root, 8 if quick else 32, source, progress=False) / "train.csv"
        )
        df = pd.read_csv(real, dtype=str, keep_default_na=False)[:n]
        if not path:  # files of their own, so that each is read from the disk
            copies = [df.assign(Id=[f"copy{k}-{i}" for i in df["Id"]]) for k in range(-(-n // len(df)))]
            for k in range(len(copies)):
                for i in df["Id"]:
                    for c in HPA_CHANNELS:
                        shutil.copy(root / "train" / f"{i}_{c}.png", root / "train" / f"copy{k}-{i}_{c}.png")
            df = pd.concat(copies)[:n]
        else:
            root.mkdir()
            (root / "train").symlink_to((Path(path) / "train").resolve())
        df.to_csv(root / "train.csv", index=False)
        ids, folder, bs = list(df["Id"]), root / "train", min(bs, len(df))
        files = [folder / f"{i}_{c}.png" for i in ids for c in HPA_CHANNELS]
        packed = pack(ImageSet(folder, size=size), ids, progress=False)
        pixels = [packed.path / "images.npy"]
        shape = "x".join(map(str, packed.shape[1:]))
        print(
            f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"{platform.machine()}, {cores} CPUs; {len(ids)} samples in {'real' if path else 'drawn'} files of "
            f"{sum(f.stat().st_size for f in files) / len(files) / 1024:.0f} KiB, to {shape}, batches of {bs}; "
            f"medians of {rounds} rounds"
        )
        decoders(files[: 16 if quick else 64], rounds)

        times = max(1, 4096 // n)

        def rivals(w, times):
            return {
                "article": (lambda: article(folder, ids, size, bs, w), files),
                "DataBlock": (lambda: data_block(folder, ids, size, bs, w), files),
                "ours, decoding": (lambda: ours(root, size, bs, w, False), files),
                "ours, cache": (lambda: ours(root, size, bs, w, True, times=times), pixels),
            }

        warm = {name: (make, None) for name, (make, _) in rivals(0, times).items()}
        warm["ours, cache, as trained"] = (lambda: ours(root, size, bs, 0, True, trained=True), None)
        warm["copy into one buffer"] = (lambda: lambda: bare(packed, bs, False, times), None)
        warm["copy into new memory"] = (lambda: lambda: bare(packed, bs, True, times), None)
        result = compare(warm, rounds, seconds)
        base, copy = result["article"][1], result["copy into new memory"][1]
        one = result["copy into one buffer"][1]
        rows = [
            [name, f"{wall:,.0f}", f"{core:,.0f}", f"{core / base:.1f}", f"{core / copy:.2f}", f"{core / one:.2f}"]
            for name, (wall, core, _) in result.items()
        ]
        header = ["what", "samples/s", "per core", "x article", "x copy, new", "x copy, buffer"]
        table("2. Warm, in one process.", header, rows)

        for title, cold in (("3a. Warm, one pass", False), ("3b. Page cache emptied, one pass", True)):
            rows = []
            for w in counts:
                got = compare(
                    {k: (m, f if cold else None) for k, (m, f) in rivals(w, 1 if cold else times).items()},
                    max(2, rounds // 2),
                    seconds,
                )
                rows.append([w, *(f"{v[0]:,.0f}" for v in got.values())])
            table(f"{title}: samples per second over the number of workers.", ["workers", *rivals(0, 1)], rows)

        packing(root, ids, size, scratch, max(2, rounds // 2))
        rows = [[name, f"{mib:,.0f}"] for name, (_, _, mib) in result.items()]
        table("5. Memory added (of the cache, the pages of the file that were touched count).", ["what", "MiB"], rows)
