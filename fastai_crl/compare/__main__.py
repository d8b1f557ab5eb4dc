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

from .answer import Comparison
from .compare import compare_learners
from .losses import compare_losses

_OBJECTS = (
    "self",
    "path",
    "args",
    "kwargs",
    "images",
    "annotations",
    "split",
    "dls",
    "fit",
    "dl",
    "arms",
    "metrics",
    "cbs",
)


def value(text: str) -> Any:
    """Return what a word of the command line means: a Python literal, names between commas, or itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.split(",") if "," in text else text


def _options(*functions: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keywords of functions that can be said in a command, with the first line on each in their docstrings."""
    found: dict[str, inspect.Parameter] = {}
    docs = "".join(inspect.getdoc(f) or "" for f in (*functions, MultiChannelDataLoaders.from_csv, compare_learners))
    for name, p in [item for f in functions for item in inspect.signature(f).parameters.items()]:
        if name not in _OBJECTS and p.default is not p.empty:
            help = next((d for d in re.findall(rf"^ +{name}: (.*)$", docs, re.M) if not d.startswith("see ")), "")
            kind = bool if isinstance(p.default, bool) and name != "cache" else value
            default = p.default if kind is bool else None
            found[name] = p.replace(default=default, kind=p.KEYWORD_ONLY, annotation=Annotated[kind, {"help": help}])
    return found


_DATA, _RUNS = _options(HPADataLoaders.from_csv), _options(compare_losses)


def main(path: str, **kwargs: Any) -> Comparison:
    """Compare losses on the images of a folder, DIR/train.csv and DIR/train; the answer goes to comparison.html too."""
    given = {k: v for k, v in kwargs.items() if v is not None and v != {**_DATA, **_RUNS}[k].default}
    data, runs = ({k: v for k, v in given.items() if k in known} for known in (_DATA, _RUNS))
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
