"""The README: its commands parse, what it names exists, its Python runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from drawn_cells import make_hpa

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [text for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def test_there_are_two_commands_of_one_line_which_parse():
    assert len(COMMANDS) == 2
    for block in COMMANDS:
        assert subprocess.run(["bash", "-n", "-c", block]).returncode == 0
        assert len(block.splitlines()) == 1 and block.startswith("python -m venv .venv && . .venv/bin/activate && pip ")
    assert COMMANDS[0].endswith("&& python examples/train_hpa.py\n") and COMMANDS[1].endswith("&& pytest\n")


def test_ci_runs_the_second_block():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert subprocess.run(["bash", "-n", run]).returncode == 0
    (awk,) = re.findall(r"^awk '(.*?)' README.md", run.read_text(), re.M)
    found = subprocess.run(["awk", awk, ROOT / "README.md"], capture_output=True, text=True, check=True)
    assert found.stdout == COMMANDS[1]
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_links_of_contributing_lead_somewhere():
    page = ROOT / ".github" / "CONTRIBUTING.md"
    links = re.findall(
        r"\]\(([^)\s]+)\)|`((?:data|losses|evaluate|images)/[^`]+|labels\.py)`", page.read_text(encoding="utf-8")
    )
    assert len(links) > 10
    for link, name in links:
        assert (page.parent / link if link else ROOT / "fastai_crl" / name).exists(), link or name


def test_files_it_names_exist():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    named = [word for block in COMMANDS for word in block.split() if word.endswith(".py")]
    assert len(named) > 0 and "examples/crl_hpa.ipynb" in links
    for name in {*links, *named} - {""}:
        assert (ROOT / name).is_file(), name
    for name in links:
        if name.endswith(".png"):
            assert (ROOT / name).stat().st_size < 400_000, name


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
    path = make_hpa(tmp_path / "data", n=60, size=32, progress=False)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 28))
    scope = {"path": path, "model": model}
    assert len(PYTHON) == 2
    for text in PYTHON:
        exec(compile(text.replace("size=256", "size=32, vocab='hpa', bs=8"), "README.md", "exec"), scope)
        learn = scope["learn"]
        if "fit" not in text:
            learn.fit(1)
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_it_can_be_read_in_a_minute():
    assert len(README.splitlines()) < 130
