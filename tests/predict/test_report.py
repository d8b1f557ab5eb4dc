"""The report: a well-formed page with everything in it, of any learner; names from data are escaped."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.vision.models import resnet18
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_crl import __version__
from fastai_crl.callback import CRLCallback
from fastai_crl.evaluate.interpret import CRLInterpretation
from fastai_crl.learner import crl_learner
from fastai_crl.predict import write_report
from fastai_crl.predict.report import inline_image
from fastai_crl.unknown import UnknownTargets

SECTIONS = ["Data", "Decisions", "By label, from rare to common", "Precision and recall", "Hardest images"]
SECTIONS += ["What CRL mined", "Training", "Versions"]
HOSTILE = r"</td><script>alert('$\frac$')</script>"


@pytest.fixture(autouse=True)
def no_figures():
    """Those that other tests have left are closed."""
    plt.close("all")


class Page(HTMLParser):
    """What a page holds: its tags, which must close in order, its headings, texts and the addresses it refers to."""

    def __init__(self, file):
        super().__init__()
        self.open, self.tags, self.headings, self.addresses, self.texts = [], [], [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(file) -> Page:
    page = Page(file)
    assert "script" not in page.tags and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not plt.get_fignums()  # what was drawn is closed
    return page


@pytest.mark.slow
def test_of_several_labels(hpa_dls, tmp_path):
    learn = crl_learner(hpa_dls, resnet18)
    with learn.no_bar(), learn.no_logging():
        page = page_of(learn.report(tmp_path / "new" / "before.html"))
        assert page.headings == SECTIONS and "Nothing: no CRLCallback" in page.text
        assert "above 0.5 is a yes" in page.text and "No thresholds have been fitted" in page.text
        learn.fit(1)
        learn.fit_thresholds()
        page = page_of(learn.report(tmp_path / "after.html", about={"Intended use": "<b>tests</b> & more"}))
        assert page.headings == ["About", *SECTIONS] and "<b>tests</b> & more" in page.text
        assert "threshold of its own" in page.text and "Nothing" not in page.text
        assert len(page.addresses) == 3 + 6  # the labels, curves, mined, and the hardest of six labels
        assert (
            f"fastai_crl {__version__}" in page.text and "criterion='ranking'" in page.text and "resnet18" in page.text
        )
        for value in CRLInterpretation.from_learner(learn).report().AP.dropna():
            assert f"{value:.3f}" in page.text


@pytest.mark.slow
def test_of_one_label_per_image_and_of_an_export(single_label_dls, tmp_path):
    learn = crl_learner(single_label_dls, resnet18)
    with learn.no_bar(), learn.no_logging():
        assert "its likeliest class. No thresholds" in page_of(learn.report(tmp_path / "a.html")).text
        names = single_label_dls.vocab
        learn.thresholds = [2.0**-i for i in range(len(names))]
        assert f"Thresholds: {names[0]} 1, {names[1]} 0.5" in page_of(learn.report(tmp_path / "b.html")).text
        learn.export(tmp_path / "learner.pkl")
        again = load_learner(tmp_path / "learner.pkl")
    items = single_label_dls.valid_ds.items
    with again.no_bar():
        with pytest.raises(ValueError, match="pass dl= of images"):
            again.report(tmp_path / "c.html")
        assert not (tmp_path / "c.html").exists()
        page = page_of(again.report(tmp_path / "d.html", dl=again.dls.test_dl(items, with_labels=True)))
    assert "Training images not known" in page.text and "20 images of the loader that was given" in page.text


@pytest.fixture
def plain():
    "A fastai learner on loaders of torch, whose images have no names and cannot be drawn."
    x, y = torch.randn(40, 3, 8, 8), (torch.rand(40, 3) < 0.4).float()
    data = TensorDataset(x, y)
    dls = DataLoaders(DataLoader(data, 8, shuffle=True), DataLoader(data, 16))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return Learner(dls, model, loss_func=BCEWithLogitsLossFlat(), cbs=CRLCallback())


def test_of_a_learner_that_is_not_ours(plain, tmp_path):
    with plain.no_bar(), plain.no_logging():
        page = page_of(write_report(plain, tmp_path / "report.html"))
    assert page.headings == SECTIONS and len(page.addresses) == 2 and "Input 3 x 8 x 8" in page.text


def test_names_from_the_data_are_text(plain, tmp_path):
    plain.dls.vocab = [HOSTILE, "$a$", "<!--"]
    with plain.no_bar(), plain.no_logging():
        page = page_of(write_report(plain, tmp_path / "report.html", about={HOSTILE: HOSTILE}))
    assert page.text.count(HOSTILE) >= 4 and "<!--" in page.text


def test_labels_that_no_image_has_are_named(plain, tmp_path):
    plain.dls.vocab = ["often", "never", "seldom"]
    y = plain.dls.valid.dataset.tensors[1]
    y[:, 1] = 0
    with plain.no_bar(), plain.no_logging():
        assert "Labels that no measured image has never" in page_of(write_report(plain, tmp_path / "a.html")).text
        y[:] = 0
        assert "No measured image has a label." in page_of(write_report(plain, tmp_path / "b.html")).text


def test_training_images_are_told_where_some_targets_are_unknown(plain, tmp_path):
    plain.dls.train.dataset.tensors[1][:9, 1] = -1
    plain.add_cb(UnknownTargets(-1))
    with plain.no_bar(), plain.no_logging():
        page = page_of(write_report(plain, tmp_path / "report.html"))
    assert "Training images 40 " in page.text and "group" in page.texts


def test_an_image_in_the_page():
    figure = plt.figure()
    figure.suptitle(r"$\frac$")
    text = inline_image(figure, '"a" < b')
    assert 'alt="&quot;a&quot; &lt; b"' in text and not plt.get_fignums()
    assert np.char.startswith(re.findall(r'src="([^"]+)"', text), "data:image/png;base64,iVBOR").all()
