"""Labels of a data set in fastai's transforms: from the rows of a csv to targets, and back to names in pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.data.block import TransformBlock
from fastai.data.transforms import Categorize, MultiCategorize, OneHotEncode
from fasttransform import Transform

from fastai_crl._checks import offenders
from fastai_crl.hpa import LABEL_SETS

from .csv_file import as_text
from .label_parser import LabelParser


class RowPrefix(Transform):
    """From a row of the csv to folder/id; a path (of an image without labels) passes as it is."""

    input_types = (pd.Series, str, Path)

    def __init__(self, folder: Path, id_col: str):
        super().__init__()
        self.folder, self.id_col = str(folder), id_col

    def encodes(self, o: pd.Series):
        return Path(self.folder) / as_text(o[self.id_col])

    def of_rows(self, rows: pd.DataFrame) -> list[Path]:
        """Return what it makes of each row, at once."""
        folder = Path(self.folder)
        return [folder / as_text(o) for o in rows[self.id_col]]


class RowLabels(Transform):
    """From a row of the csv to its list of labels, or to its one label where each row has exactly one."""

    def __init__(self, parser: LabelParser):
        super().__init__()
        self.parser = parser

    def encodes(self, o: pd.Series):
        labels = self.parser(o)
        return labels[0] if self.parser.delim is None else labels

    def of_rows(self, rows: pd.DataFrame) -> list[Any]:
        """Return what it makes of each row, at once."""
        labels = self.parser.all(rows)
        return [one for one, *_ in labels] if self.parser.delim is None else labels


class _Named:
    """Of `Categorize` and its like: has the decoded label, which is that of the vocab, bring what pictures show."""

    names: dict[str, str]

    def decode(self, x: Any, **kwargs: Any) -> Any:
        label = super().decode(x, **kwargs)
        label.names = self.names
        return label


class _NamedCategorize(_Named, Categorize):
    pass


class _NamedMultiCategorize(_Named, MultiCategorize):
    pass


def target_block(vocab: list[str], names: dict[str, str], multi: bool) -> TransformBlock:
    """Return the block of targets for labels of these names: several per item, or exactly one."""
    encode = _NamedMultiCategorize(vocab) if multi else _NamedCategorize(vocab, sort=False)
    encode.names = names
    return TransformBlock(type_tfms=[encode, OneHotEncode] if multi else encode)


def make_names(label_names: Any, vocab: list[str]) -> dict[str, str]:
    """Return the name to show by label: of a mapping, a list in the order of `vocab`, or nothing for None.

    "hpa" and "hpa2021" name the labels "0".."27" and "0".."18" of the two competitions. "auto" is "hpa" where `vocab`
    is the whole of it, else nothing: fewer numbers may be those of anything.

    Raises:
        ValueError: other text, a label of `vocab` that a competition has not, a list of another length than `vocab`.
    """
    if isinstance(label_names, str) and label_names == "auto":
        label_names = "hpa" if set(vocab) == LABEL_SETS["hpa"].keys() else None
    if label_names is None:
        return {}
    if isinstance(label_names, str):
        if label_names not in LABEL_SETS:
            known = " nor ".join(map(repr, LABEL_SETS))
            raise ValueError(f"label_names={label_names!r} is neither {known} nor a mapping or list of names.")
        if unknown := [v for v in vocab if v not in LABEL_SETS[label_names]]:
            fix = "Give a mapping from label to name, or None to show labels as written."
            raise ValueError(offenders(f"Labels without a name in label_names={label_names!r}", unknown, fix))
        return LABEL_SETS[label_names]
    if isinstance(label_names, Mapping):
        return {str(k): str(v) for k, v in label_names.items()}
    if len(label_names) != len(vocab):
        raise ValueError(f"label_names has {len(label_names)} names for the {len(vocab)} labels of the vocab.")
    return dict(zip(vocab, map(str, label_names), strict=True))
