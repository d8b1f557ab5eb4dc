"""Shared fixtures."""

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from fastai.torch_core import default_device

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
# Tests, and the processes that they start, import `drawn_cells` from the examples.
sys.path.insert(0, str(ROOT / "examples"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests and their fixtures run on the CPU, on a machine with a GPU too, unless they are marked `gpu`."""
    default_device(None if "gpu" in item.keywords else False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data kept beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED.name}/ beside the project")
    return SHARED


@pytest.fixture(scope="session")
def hpa(tmp_path_factory) -> Path:
    """A small synthetic set in the Kaggle layout: 60 + 6 fields of 32 pixels, of all 28 labels."""
    from drawn_cells import make_hpa

    return make_hpa(tmp_path_factory.mktemp("hpa"), n=60, size=32, n_test=6, imbalance="mild", progress=False)


@pytest.fixture
def hpa_dls(hpa):
    from fastai_crl.data.loaders import HPADataLoaders

    return HPADataLoaders.from_csv(hpa, size=32, bs=16, num_workers=0, batch_tfms=[], valid_pct=0.3)


@pytest.fixture
def single_label_dls(hpa):
    """The fields of `hpa` with one of three made-up classes each."""
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import IndexSplitter

    from fastai_crl.data.loaders import MultiChannelBlock
    from fastai_crl.images.image_set import ImageSet

    ids = sorted({p.name.rsplit("_", 1)[0] for p in (hpa / "train").iterdir()})
    block = DataBlock(
        (MultiChannelBlock(ImageSet(".", size=32)), CategoryBlock),
        get_items=lambda _: [hpa / "train" / i for i in ids],
        get_y=lambda p: "abc"[len(p.name + p.name[-1]) % 2 + (p.name[-1] == "7")],
        splitter=IndexSplitter(list(range(20))),
    )
    return block.dataloaders(hpa, bs=16, num_workers=0)
