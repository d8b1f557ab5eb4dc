"""The keywords of `from_csv`: its signature shows them all, and those of a call are checked."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import pandas as pd
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastcore.meta import delegates

from fastai_crl._checks import misspelt
from fastai_crl.images.image_set import ImageSet
from fastai_crl.samplers import takes

from .annotations import Annotations
from .splits import split_by

_MAKERS = {"images": (ImageSet, "folder"), "annotations": (Annotations.from_csv, "csv_fname"), "split": (split_by,)}
# Of which keywords each value is made where it is not given.
KEYWORDS = {
    value: (*own, *(name for name, p in signature(makes).parameters.items() if p.default is not Parameter.empty))
    for value, (makes, *own) in _MAKERS.items()
}
# Fastai passes these to its loaders itself; what is meant by them.
_TAKEN = {"after_item": "item_tfms", "after_batch": "batch_tfms", "do_setup": None}


def check_keywords(from_csv: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `from_csv`: its signature shows all keywords, of what makes the three values and of fastai's loaders.

    Raises:
        TypeError: at a call, a keyword that none of them has.
        ValueError: at a call, a keyword beside the value that has its own.
    """
    for makes in (ImageSet, Annotations.from_csv, split_by, DataLoaders.from_dblock, Datasets.dataloaders):
        delegates(makes, keep=True)(from_csv)
    delegates(TfmdDL, but=list(_TAKEN))(from_csv)
    known = tuple(signature(from_csv).parameters)

    @wraps(from_csv)
    def checked(*args: Any, **kwargs: Any) -> Any:
        kind = kwargs.get("dl_type") or TfmdDL  # most pass on to their bases what they do not know
        makes = [c.__init__ for c in kind.__mro__] if isinstance(kind, type) else [kind, TfmdDL]
        of_loader = {name for make in makes for name in signature(make).parameters}
        taken = {*known, *of_loader} - _TAKEN.keys()
        if unknown := sorted(kwargs.keys() - taken - {f"val_{name}" for name in of_loader}):
            said = misspelt(unknown, taken, _TAKEN)
            raise TypeError(f"from_csv has no keyword {said}: see help() of it for those it has.")
        given = dict(zip(known, args, strict=False)) | kwargs
        if tables := [f"{name}=" for name, value in given.items() if isinstance(value, pd.DataFrame)]:
            raise ValueError(f"{tables[0]} is given a DataFrame: call from_df(table, path), with the other keywords.")
        for value, keywords in KEYWORDS.items():
            both = [f"{k}=" for k in keywords if k in given]
            if "seed=" in both and (sampler := given.get("sampler")) is not None and takes(sampler, "seed"):
                both.remove("seed=")  # it is the sampler's
            if given.get(value) is not None and both:
                raise ValueError(f"{value}= is given, and so is {', '.join(both)}: it has its own, leave one out.")
        return from_csv(*args, **kwargs)

    return checked
