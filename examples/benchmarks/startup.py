"""What it takes to start: the package's import beside fastai's, and a large csv to the first training step.

The set has as many images as the Human Protein Atlas, drawn labels of its frequencies, and files of a few pixels:
`python examples/benchmarks/startup.py`. With `--csv` the labels are those of a csv (Id,Target). Images are a few
tiny files, linked under the name of each id and channel: all the work on names, files and labels is done, and next to
none on pixels.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from fastcore.script import call_parse
from PIL import Image

IMPORT = """
import time
from fastai.vision.all import *
start = time.perf_counter()
from fastai_crl.all import *
print(time.perf_counter() - start)
"""


def import_seconds(times: int = 5) -> list[float]:
    """Seconds that importing the package adds to fastai's import, in fresh processes, in order."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT]
    return sorted(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(times)
    )


def draw_csv(n: int) -> pd.DataFrame:
    """Ids and labels of the frequencies of the Human Protein Atlas, drawn for each label alone."""
    from fastai_crl.hpa import HPA_COUNTS, HPA_N_IDS

    drawn = np.random.default_rng(0).random((n, len(HPA_COUNTS))) < np.array(HPA_COUNTS) / HPA_N_IDS
    return pd.DataFrame(
        {"Id": [f"{i:08x}" for i in range(n)], "Target": [" ".join(map(str, np.flatnonzero(r))) for r in drawn]}
    )


def write_set(folder: Path, table: pd.DataFrame) -> None:
    """Write the csv and, for each id and channel, a link to one file of 8 x 8 pixels."""
    from fastai_crl.hpa import HPA_CHANNELS

    table.to_csv(folder / "train.csv", index=False)
    (folder / "train").mkdir()
    for start in range(0, len(table), 10_000):  # some file systems allow no more links to a file
        source = folder / f"{start}.png"
        Image.fromarray(np.full((8, 8), 99, np.uint8)).save(source)
        for i in table["Id"].iloc[start : start + 10_000]:
            for channel in HPA_CHANNELS:
                (folder / "train" / f"{i}_{channel}.png").hardlink_to(source)


@call_parse
def main(
    n: int = 31_072,  # images
    csv: Path | None = None,  # labels of this csv, Id and Target
    stats: str = "hpa",  # of from_csv
):
    """Measure imports, and the stages from `from_csv` to the first training step."""
    seconds = import_seconds()
    low, median, high = seconds[0], np.median(seconds), seconds[-1]
    print(f"import of fastai_crl.all after fastai's: {median:.2f} s (of {len(seconds)}: {low:.2f} to {high:.2f})")

    from fastai.vision.all import Callback, CancelFitException, resnet18

    from fastai_crl.all import HPADataLoaders, crl_learner

    class FirstStep(Callback):
        """Stops training after one step."""

        order = 100

        def after_batch(self):
            raise CancelFitException

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        table = draw_csv(n) if csv is None else pd.read_csv(csv, dtype=str, keep_default_na=False)
        write_set(folder, table)
        at = [time.perf_counter()]
        dls = HPADataLoaders.from_csv(folder, size=32, bs=32, num_workers=0, stats=stats)
        at.append(time.perf_counter())
        learn = crl_learner(dls, resnet18)
        at.append(time.perf_counter())
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=FirstStep())
        at.append(time.perf_counter())
        print(f"{len(table)} images, {dls.c} labels, {len(dls.train_ds)} to train on")
        for stage, took in zip(
            ("from_csv", "crl_learner", "fit to the end of the first step"), np.diff(at), strict=True
        ):
            print(f"{stage}: {took:.2f} s")
        print(f"together: {at[-1] - at[0]:.2f} s")
