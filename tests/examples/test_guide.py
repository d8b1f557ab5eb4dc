"""The guide: the Python of each page runs, block after block, and does what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastai_crl.images import readers
from fastai_crl.samplers import base as samplers
from fastai_crl.synthetic import make_hpa

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"


def run(page: str, **scope) -> dict:
    "What the names of a page's blocks are after running them."
    text = (GUIDE / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, page, "exec"), scope)
    return scope


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    "A small set; what a page registers is forgotten, and one thread is quicker for images so few."
    monkeypatch.setattr(readers, "_READERS", list(readers._READERS))
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
    monkeypatch.chdir(tmp_path)
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_hpa(tmp_path / "data", n=64, size=32, imbalance="mild", progress=False)
    torch.set_num_threads(n)


@pytest.mark.slow
def test_extending(path):
    made = run("extending.md", path=path)
    assert np.isfinite(made["learn"].recorder.values[-1][:2]).all()
    assert made["learn"].crl.term.criterion.name == "ranking"
    few, more = (len(d.train.sampler) for d in (made["dls"], made["more"]))
    assert len(made["dls"].train_ds) < few <= more
    assert made["image"].shape == (2, 20, 30) and made["image"].amax((1, 2)).tolist() == [0, 4]
