"""The keywords of `from_csv`: which of them belongs to which value, and what is wrong with those of a call."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any

from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastcore.meta import delegates

from fastai_crl.images.image_set import ImageSet
from fastai_crl.samplers import takes

from .annotations import Annotations
from .splits import split_by


def _optional(makes: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name, p in signature(makes).parameters.items() if p.default is not Parameter.empty)


# Of which keywords each value is made where it is not given.
KEYWORDS = {
    "images": ("folder", *_optional(ImageSet)),
    "annotations": ("csv_fname", *_optional(Annotations.from_csv)),
    "split": _optional(split_by),
}
_OWNERS = {"images": "the ImageSet", "annotations": "the Annotations", "split": "the split"}
_TYPES = {
    "images": (ImageSet, "ImageSet(folder), or folder= in place of images="),
    "annotations": (Annotations, "Annotations.from_csv(file) or Annotations.from_frame(table)"),
}
# Fastai passes these to its loaders itself; what is meant by them.
_TAKEN = {"after_item": "item_tfms", "after_batch": "batch_tfms", "do_setup": None}


def check_keywords(from_csv: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `from_csv`: its signature shows all keywords, and those of a call are checked.

    They are those of the function, of what makes the three values, and of fastai's loaders.

    Raises:
        TypeError: at a call, a keyword that none of them has.
        ValueError: at a call, a value of another type, or a keyword beside the value that has its own.
    """
    for makes in (ImageSet, Annotations.from_csv, split_by, DataLoaders.from_dblock, Datasets.dataloaders):
        delegates(makes, keep=True)(from_csv)
    delegates(TfmdDL, but=list(_TAKEN))(from_csv)
    known = tuple(signature(from_csv).parameters)

    @wraps(from_csv)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _require_known(kwargs, known)
        _require_one_owner({**dict(zip(known, args, strict=False)), **kwargs})
        return from_csv(*args, **kwargs)

    return checked


def _require_known(kwargs: Mapping[str, Any], known: Sequence[str]) -> None:
    of_loader = _of_loader(kwargs.get("dl_type") or TfmdDL)
    of_valid = {f"val_{name}" for name in of_loader}  # fastai's way to give them to the validation loader alone
    taken = {*known, *of_loader} - _TAKEN.keys()
    unknown = []
    for name in kwargs.keys() - taken - of_valid:
        near = _TAKEN[name] if name in _TAKEN else next(iter(get_close_matches(name, taken, n=1)), None)
        unknown.append(f"{name}= (did you mean {near}=?)" if near else f"{name}=")
    if unknown:
        raise TypeError(f"from_csv has no keyword {', '.join(sorted(unknown))}: see help() of it for those it has.")


def _of_loader(dl_type: Callable[..., Any]) -> set[str]:
    """Return the parameters of a loader's type, its bases' too: most pass `**kwargs` on to them."""
    makes = [c.__init__ for c in dl_type.__mro__] if isinstance(dl_type, type) else [dl_type, TfmdDL]
    parameters = [p for make in makes for p in signature(make).parameters.values()]
    return {p.name for p in parameters if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}


def _require_one_owner(given: Mapping[str, Any]) -> None:
    for name, keywords in KEYWORDS.items():
        if (value := given.get(name)) is None:
            continue
        wanted, fix = _TYPES.get(name, (object, ""))
        if not isinstance(value, wanted):
            raise ValueError(f"{name}= takes an {wanted.__name__}, not a {type(value).__name__}: pass {fix}.")
        both = [f"{k}=" for k in keywords if k in given]
        if "seed=" in both and (sampler := given.get("sampler")) is not None and takes(sampler, "seed"):
            both.remove("seed=")  # it is the sampler's
        if both:
            fix = f"give it there, or leave {name}= out"
            raise ValueError(f"{name}= is given, and so is {', '.join(both)}: {_OWNERS[name]} has its own, {fix}.")
