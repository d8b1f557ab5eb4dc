"""A learner on one page: an HTML file that needs no Python, no network and no other file to be read."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import pandas as pd
from fastai.learner import Learner
from fastai.torch_core import TensorImageBase
from fastai.vision.core import PILBase
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastai_crl._files import replace_file
from fastai_crl.evaluate.interpret import CRLInterpretation
from fastai_crl.labels import shown_names

_PACKAGES = ("fastai_crl", "fastai", "torch", "torchvision", "numpy", "pandas", "scikit-learn")
_COLUMNS = (
    "Support: measured images with the label; train: training images; precision, recall, F1, balanced accuracy: of the "
    "decisions; AP: average precision; AUROC: area under the ROC curve; ECE: calibration error; triplets: mined by CRL."
)
_STYLE = """body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em;line-height:1.4}
table{border-collapse:collapse;display:block;overflow-x:auto} td,th{padding:3px 9px;text-align:right}
td,tbody th{border-bottom:1px solid #ddd} tbody th,.facts td{text-align:left} img{max-width:100%}"""


def write_report(
    learn: Learner, fname: str | Path = "report.html", dl: Any = None, about: Mapping[str, str] | None = None
) -> Path:
    """Write what a learner was trained on, how it decides and how well, as one HTML file for readers without Python.

    Data and split, thresholds, a table by label, precision against recall of each label, the hardest images of the six
    labels of lowest average precision, what CRL mined, arguments, versions. Pictures are in the file.

    Args:
        learn: multi-label or single-label, before or after thresholds are fitted.
        fname: the file, written at once or not at all; its folder is made if need be.
        dl: a loader with targets, to measure on. Default: the validation set; a learner from an export has none.
        about: what no program knows, the fields of a model card: {"Intended use": "...", "Licence": "..."}.

    Raises:
        ValueError: nothing to measure on, or no targets.
        OSError: the file cannot be written.
    """
    interp = CRLInterpretation.from_learner(learn, dl=dl)
    interp.names = shown_names(learn.dls, len(interp.names))
    n_train = interp.n_train if interp.counted else 0
    table = interp.report() if n_train else interp.report().drop(columns=["train", "group"])
    order = np.argsort(table.get("train", table.support), kind="stable").tolist()  # from rare to common
    measured = f"{len(interp.probs)} images of the {'validation set' if dl is None else 'loader that was given'}"
    sections = {
        "About": _facts(about or {}),
        "Data": _data(learn, interp, n_train, measured),
        "Decisions": _paragraph(_decisions(interp, measured)),
        "By label, from rare to common": _paragraph(_COLUMNS) + _table(table.iloc[order]),
        "Precision and recall": _precision_recall(interp, table, order),
        "Hardest images": _hardest(interp, np.argsort(table.AP, kind="stable")[: min(6, table.AP.count())].tolist()),
        "What CRL mined": _mined(learn, interp),
        "Training": _training(learn),
        "Versions": _facts({"Python": python_version(), **{name: version(name) for name in _PACKAGES}}),
    }
    means = f"Macro-F1 {table.F1.mean():.3f} and mean average precision {table.AP.mean():.3f} on {measured}"
    kind = "one label" if interp.single_label else "any number of labels"
    head = _paragraph(f"{means}. {len(table)} labels, {kind} per image. {date.today()}.")
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in sections.items() if text)
    page = f'<meta charset="utf-8"><title>Model report</title><style>{_STYLE}</style></head>'
    page = f'<!doctype html><html lang="en"><head>{page}<body><h1>Model report</h1>{head}{body}</body></html>\n'
    fname = Path(fname)
    fname.parent.mkdir(parents=True, exist_ok=True)
    replace_file(fname, lambda f: f.write(page.encode()))
    return fname


def inline_image(figure: Figure, alt: str) -> str:
    """Return a figure as an HTML image that holds its own PNG, and close it."""
    for text in figure.findobj(Text):
        if "$" in text.get_text() and "mathdefault" not in text.get_text():  # a label; powers of ten on axes are math
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'


def _data(learn: Learner, interp: CRLInterpretation, n_train: int, measured: str) -> str:
    batch = next(iter(interp.dl))
    facts = {
        "Training images": n_train or "not known: an export holds none, and some data sets do not tell their labels",
        "Measured on": measured,
        "Channels": ", ".join(map(str, getattr(learn.dls, "channels", ()))),
        "Input": " x ".join(map(str, getattr(batch[0], "shape", ())[1:])),
        "Labels that no measured image has": ", ".join(np.array(interp.names)[~interp.targets.any(0)]),
    }
    picture = inline_image(interp.plot_distribution().figure, "Training images of each label") if n_train else ""
    return _facts(facts) + picture


def _decisions(interp: CRLInterpretation, measured: str) -> str:
    if not interp.thresh.ndim:
        rule = f"A probability above {interp.thresh:g} is a yes, for every label."
        rule = "Each image gets its likeliest class." if interp.single_label else rule
        return f"{rule} No thresholds have been fitted, as learn.fit_thresholds() does: rare labels may be missed."
    rule = "Each label has a threshold of its own, in the next table. A probability above it is a yes."
    if interp.single_label:
        cuts = ", ".join(f"{name} {cut:.3g}" for name, cut in zip(interp.names, interp.thresh, strict=True))
        rule = f"Each image gets the class of the highest probability / threshold. Thresholds: {cuts}."
    return f"{rule} If they were fitted on these {measured}, precision, recall and F1 flatter."


def _precision_recall(interp: CRLInterpretation, table: pd.DataFrame, order: list[int]) -> str:
    columns = [c for c in order if interp.targets[:, c].any()]
    if not columns:
        return _paragraph("No measured image has a label.")
    n = min(7, len(columns))
    shape, size = (math.ceil(len(columns) / n), n), (1.7 * n, 1.8 * math.ceil(len(columns) / n) + 0.3)
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for ax in axes.flat[len(columns) :]:
        ax.set_axis_off()
    for c, ax in zip(columns, axes.flat, strict=False):
        curve, row = interp.curve(c), table.iloc[c]
        ax.plot(curve.recall, curve.precision, drawstyle="steps-post", color="#0067a5")
        ax.plot(row.recall, row.precision, "o", color="#c26a00", clip_on=False)
        name = textwrap.shorten(interp.names[c], 24, placeholder="…")
        ax.set_title(f"{name}\n{row.support} images, AP {row.AP:.2f}", fontsize=7)
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return _paragraph("A dot is where the decisions are.") + inline_image(figure, "Precision against recall by label")


def _hardest(interp: CRLInterpretation, columns: list[int]) -> str:
    text = _paragraph("Lowest probability with the label, highest without it. Wrong labels gather here.")
    dataset = getattr(interp.dl, "dataset", None)
    drawable = hasattr(dataset, "__getitem__") and isinstance(dataset[0][0], TensorImageBase | PILBase)
    for c in columns:
        kinds = {"with it": interp.hardest(c, "positive", 5), "without": interp.hardest(c, "negative", 5)}
        frame = pd.concat(kinds).droplevel(1).drop(columns="index")
        text += f"<h3>{html.escape(interp.names[c])}</h3>"
        if drawable:
            text += inline_image(interp.plot_hardest(c)[0, 0].figure, "Its hardest images, those of the table")
        text += _table(frame.assign(labels=frame.labels.map(", ".join)))
    return text


def _mined(learn: Learner, interp: CRLInterpretation) -> str:
    if interp.triplets is None:
        return _paragraph("Nothing: no CRLCallback, no training with it, or alpha=0.")
    return inline_image(learn.crl.plot_counts().figure, "Mined triplets or pairs of each label, by epoch")


def _training(learn: Learner) -> str:
    # No epoch table: each prediction, that of a report too, has fastai's recorder forget it.
    arch, crl = getattr(learn, "arch", type(learn.model)), getattr(learn, "crl", None)
    facts = {
        "Network": getattr(arch, "__name__", arch),
        "Parameters": f"{sum(p.numel() for p in learn.model.parameters()):,}",
        "Pretrained": getattr(learn, "pretrained", ""),
        "Loss": learn.loss_func,
        "CRL": "" if crl is None else f"alpha={crl.alpha!r}, schedule={crl.schedule}, {crl.term}",
        "Optimizer": getattr(learn.opt_func, "__name__", learn.opt_func),
        "Batch size": getattr(learn.dls.train, "bs", getattr(learn.dls.train, "batch_size", "")),
        "Callbacks": ", ".join(type(cb).__name__ for cb in learn.cbs),
    }
    return _facts(facts)


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _facts(facts: Mapping[str, Any]) -> str:
    told = {name: str(value) for name, value in facts.items() if str(value)}
    with pd.option_context("display.max_colwidth", None):
        return pd.Series(told).to_frame().to_html(header=False, border=0, classes="facts") if told else ""


def _table(frame: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):
        return frame.to_html(float_format="{:.3f}".format, na_rep="–", border=0)
