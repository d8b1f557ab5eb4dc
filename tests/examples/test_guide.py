"""The guide: the Python of each page runs, block after block, and does what the page says."""

import gc
import inspect
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from drawn_cells import make_hpa
from fastai_crl.all import CRL, CRLCallback, HPADataLoaders, crl_learner
from fastai_crl.images import readers
from fastai_crl.losses.criteria import Ranking, Relative
from fastai_crl.samplers import base as samplers

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"


PAGES = sorted(p.name for p in GUIDE.glob("*.md"))
WITH_CODE = [page for page in PAGES if "```py" in (GUIDE / page).read_text(encoding="utf-8")]
SMALL = {  # small images, little work, no downloads
    "size=256": "size=32, num_workers=0",
    'stats="imagenet"': 'stats="imagenet", size=32',
    "pretrained=True": "pretrained=False",
    "fine_tune(10)": "fine_tune(1)",
    "(dls, loss": "(dls, resnet18, loss",
    "crl_learner(dls, metrics": "crl_learner(dls, resnet18, metrics",
    "crl_learner(more": "crl_learner(more, resnet18",
    "compare_losses(dls, ": "compare_losses(dls, resnet18, epochs=1, seeds=1, ",
    "epochs=10, out": "epochs=1, seeds=1, out",
    '/ "test", tta=': '/ "train", tta=',
    "lr_find(num_it=100)": "lr_find(num_it=10, show_plot=False)",
}
NEEDS = {"backbones.md": ["timm"], "explain.md": ["captum"], "inference.md": ["onnxruntime", "onnxscript"]}
NEEDS["training.md"] = ["tensorboard"]


@pytest.fixture(autouse=True)
def nothing_left():
    "What a page made goes now: a session of onnxruntime that a forked worker collects waits there for ever."
    yield
    gc.collect()


def run(page: str, **scope) -> dict:
    "What the names of a page's blocks are after running them."
    text = (GUIDE / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.M | re.S):
        for large, small in SMALL.items():
            block = block.replace(large, small)
        exec(compile(block, page, "exec"), scope)
    return scope


def rows(page: str, head: str) -> list[list[str]]:
    "Cells of the table of a page whose first column is called `head`."
    lines = (GUIDE / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (GUIDE / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            assert (GUIDE / link.split("#")[0]).is_file(), link


def test_the_site_has_every_page_and_notebook():
    nav = (GUIDE.parents[1] / ".ci" / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[-1]
    books = [f.name for f in GUIDE.parent.glob("*.ipynb")]
    assert sorted(re.findall(r"examples/(.*)", nav)) == sorted([*(f"guide/{page}" for page in PAGES), *books])


def test_options_are_those_of_the_code():
    known = {**inspect.signature(CRL).parameters, **inspect.signature(CRLCallback).parameters}
    table = {cells[0].strip("`"): cells[2] for cells in rows("loss.md", "option")}
    assert {"alpha", "schedule", "k", "rho", "margin", "scope", "level", "criterion"} <= set(table) <= set(known)
    for name in ("alpha", "k", "scope", "level", "criterion", "score_space"):
        default = known[name].default
        assert table[name] == (f'`"{default}"`' if isinstance(default, str) else f"{default}"), name
    assert table["rho"] == f"{Relative.rho} (ranking: {Ranking.rho:g})"
    assert table["average"] == f'`"{Relative.average}"` (ranking: `"{Ranking.average}"`)'
    assert inspect.signature(crl_learner).parameters["n_epoch"].default == 10


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


@pytest.fixture
def scope(path) -> dict:
    "What the shorter blocks take as given: fastai, this package, loaders, and a learner to compare with."
    made = {"path": path}
    exec("from fastai.vision.all import *\nfrom fastai_crl.all import *", made)
    made["dls"] = dls = HPADataLoaders.from_csv(path, size=32, bs=16, num_workers=0)
    made["learn"] = crl_learner(dls, made["resnet18"])
    made["model"] = made["learn"].model
    made["baseline"] = crl_learner(dls, made["resnet18"], alpha=0)
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Labels whose recall")  # the pictures of the tests are few
@pytest.mark.parametrize("page", [p for p in WITH_CODE if p != "extending.md"])
def test_the_other_pages(page, scope):
    for name in NEEDS.get(page, ["timm"]):
        pytest.importorskip(name, reason=f"{page} shows {name}, which is not installed")
    made = run(page, **scope)
    plt.close("all")
    if page == "export.md":
        assert len(made["probs"]) == len(made["dls"].vocab)
    elif page == "explain.md":
        assert made["heat"].shape == (4, 1, 32, 32) and made["falls"].shape == made["x"].shape
    elif page == "inference.md":
        assert made["yes"].shape == (64, len(made["dls"].vocab)) and made["found"].shape == (3, len(made["dls"].vocab))
    elif page == "training.md":
        assert [set(row) for row in made["rows"]] == [set(made["learn"].recorder.metric_names[1:-1])]
    elif page == "tutorial.md":
        assert made["missing"] == {"P2/W03"} and len(made["found"]) == 47
        assert set(made["dls"].vocab) == {"round", "bright"} and len(made["dls"].valid_ds) in (11, 12)


def test_columns_are_those_of_a_fit(scope):
    learn = scope["learn"]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    of_crl = {cells[0].strip("`") for cells in rows("loss.md", "column")}
    shown = set(learn.recorder.metric_names) - {"epoch", "time"}
    assert of_crl == {name for name in shown if name.startswith("crl_")}
    page = (GUIDE / "loss.md").read_text()
    assert not [name for name in shown if f"`{name}`" not in page]
