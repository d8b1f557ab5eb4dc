"""`python -m fastai_crl.compare DIR`: which loss for a folder of images. Options are keywords of two functions."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torchvision.models
from fastcore.script import call_parse

from fastai_crl.data import HPADataLoaders, MultiChannelDataLoaders
from fastai_crl.data.keywords import KEYWORDS
from fastai_crl.learner import crl_learner

from .answer import Comparison
from .compare import compare_learners
from .losses import compare_losses

# Objects, which a word cannot say.
_OBJECTS = {*KEYWORDS, "path", "item_tfms", "batch_tfms", "dls", "fit", "dl", "arms", "metrics", "cbs"}
_WORDS = {"num_workers", *(name for names in KEYWORDS.values() for name in names)} - _OBJECTS
_NONE = object()  # said, where None itself is what was not


def value(text: str) -> Any:
    """Return what a word of the command line means: a Python literal, names between commas, or itself."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.split(",") if "," in text else text
    return _NONE if found is None else found


def _options(function: Callable[..., Any], *documented: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keywords of a function that a command can say, each with a line of what docstrings say on it."""
    docs, found = "\n".join(inspect.getdoc(f) or "" for f in (function, *documented)), {}
    for name, p in inspect.signature(function).parameters.items():
        said = [line for line in re.findall(rf"^ +{name}: (.*)$", docs, re.M) if not line.startswith(("see ", "as "))]
        if name not in _OBJECTS and p.default is not p.empty and (said or name in _WORDS):
            kind = bool if isinstance(p.default, bool) and name != "cache" else value
            default = p.default if kind is bool else None
            annotation = Annotated[kind, {"help": (said or [""])[0]}]
            found[name] = p.replace(default=default, kind=p.KEYWORD_ONLY, annotation=annotation)
    return found


_DATA = _options(HPADataLoaders.from_csv, MultiChannelDataLoaders.from_csv)
_RUNS = _options(compare_losses, compare_learners, crl_learner)


def main(path: str, **kwargs: Any) -> Comparison:
    """Compare losses on the images of a folder, DIR/train.csv and DIR/train; the answer goes to comparison.html too."""
    known = {**_DATA, **_RUNS}
    given = {k: None if v is _NONE else v for k, v in kwargs.items() if v is not None and v != known[k].default}
    data, runs = ({k: v for k, v in given.items() if k in names} for names in (_DATA, _RUNS))
    if isinstance(arch := runs.get("arch"), str):  # of torchvision, else of timm
        runs["arch"] = getattr(torchvision.models, arch, arch)
    kind = MultiChannelDataLoaders if "channels" in data else HPADataLoaders
    found = compare_losses(kind.from_csv(path, **data), **runs)
    print(f"{found}\n\n{found.advice}")
    print(f"Tables and picture: {found.save(Path(runs.get('out', 'comparison')) / 'comparison.html')}")
    return found


_PATH = inspect.Parameter("path", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
main.__signature__ = inspect.Signature([_PATH, *{**_DATA, **_RUNS}.values()])  # type: ignore[attr-defined]

if __name__ == "__main__":
    call_parse(main)
