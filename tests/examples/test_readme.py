"""The README: its commands parse, what it names exists, its Python runs."""

import inspect
import os
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from fastai_crl.callback import CRLCallback
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.learner import crl_learner
from fastai_crl.losses.criteria import Ranking, Relative
from fastai_crl.losses.crl_loss import CRL
from fastai_crl.synthetic.make_hpa import make_hpa

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [text for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
MORE_PYTHON = [text for kind, text in BLOCKS if kind == "py"]


def rows(head: str) -> list[list[str]]:
    """Cells of the table whose first column is called `head`."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


def test_there_are_two_blocks_of_commands_which_parse():
    assert len(COMMANDS) == 2
    for block in COMMANDS:
        assert subprocess.run(["bash", "-n", "-c", block]).returncode == 0
        lines = block.splitlines()
        assert lines[0] == "python -m venv .venv && . .venv/bin/activate"
        assert not any(line.endswith("\\") or line != line.strip() for line in lines)  # .ci/run takes them line by line
    assert "examples/train_hpa.py" in COMMANDS[0] and COMMANDS[1].splitlines()[-1] == "pytest"


def test_ci_runs_the_second_block():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert subprocess.run(["bash", "-n", run]).returncode == 0
    (awk,) = re.findall(r"^awk '(.*?)' README.md", run.read_text(), re.M)
    found = subprocess.run(["awk", awk, ROOT / "README.md"], capture_output=True, text=True, check=True)
    assert found.stdout == COMMANDS[1]


def test_files_it_names_exist():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    named = [word for block in COMMANDS for word in block.split() if word.endswith(".py")]
    assert len(named) > 0 and "examples/crl_hpa.ipynb" in links
    for name in {*links, *named} - {""}:
        assert (ROOT / name).is_file(), name
    for name in links:
        if name.endswith(".png"):
            assert (ROOT / name).stat().st_size < 400_000, name


def test_options_are_those_of_the_code():
    known = {**inspect.signature(CRL).parameters, **inspect.signature(CRLCallback).parameters}
    table = {cells[0].strip("`"): cells[2] for cells in rows("option")}
    assert {"alpha", "schedule", "k", "rho", "margin", "scope", "level", "criterion"} <= set(table) <= set(known)
    for name in ("alpha", "k", "scope", "level", "criterion", "score_space"):
        default = known[name].default
        assert table[name] == (f'`"{default}"`' if isinstance(default, str) else f"{default}"), name
    assert table["rho"] == f"{Relative.rho} (ranking: {Ranking.rho:g})"
    assert table["average"] == f'`"{Relative.average}"` (ranking: `"{Ranking.average}"`)'
    assert inspect.signature(crl_learner).parameters["n_epoch"].default == 10


@pytest.fixture
def one_thread():
    """Quicker for a few small images, above all on busy cores."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.slow
def test_its_python_runs(one_thread, tmp_path, monkeypatch):
    """The blocks in their order, on a few small images, and without downloads."""
    monkeypatch.chdir(tmp_path)
    path = make_hpa(tmp_path / "data", n=12, size=32, progress=False)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 28))
    scope = {"path": path, "model": model}
    for text in PYTHON:
        text = text.replace("size=256", "size=32, vocab='hpa', bs=8").replace(
            'stats="imagenet"', 'stats="imagenet", size=32'
        )
        text = text.replace("pretrained=True", "pretrained=False").replace("fine_tune(10)", "fine_tune(1)")
        exec(compile(text, "README.md", "exec"), scope)
        learn = scope["learn"]
        if "fit" not in text:
            learn.fit(1)
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())
        expected = {cells[0].strip("`") for cells in rows("column")}
        names = set(learn.recorder.metric_names) - {"epoch", "time"}
        assert names == (expected if len(learn.metrics) else expected - {"macro_f1", "mean_ap"})
    assert scope["dls"].one_batch()[0].shape[1] == 3
    plt.close("all")


@pytest.mark.slow
def test_its_shorter_python_runs(one_thread, tmp_path, monkeypatch):
    """The blocks marked `py`, in their order, given a learner on a few small images."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    path = make_hpa(tmp_path / "data", n=60, size=32, imbalance="mild", progress=False)
    scope = {"path": path}
    exec("from fastai.vision.all import *\nfrom fastai_crl.all import *", scope)
    scope["dls"] = dls = HPADataLoaders.from_csv(path, size=32, bs=16, num_workers=0)
    scope["baseline"] = crl_learner(dls, scope["resnet18"], alpha=0)
    assert len(MORE_PYTHON) >= 5
    for text in MORE_PYTHON:
        text = text.replace("size=256", "size=32, num_workers=0").replace("(dls, loss", "(dls, resnet18, loss")
        exec(compile(text, "README.md", "exec"), scope)
        plt.close("all")
    assert (path / "folds.csv").is_file() and len(scope["fitted"].thresholds) == dls.c
    assert scope["probs"].shape == (12, dls.c)
