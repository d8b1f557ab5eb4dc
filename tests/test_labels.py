"""Names and counts of labels."""

import pandas as pd
import torch
from fastai.data.core import DataLoaders

from fastai_crl.labels import label_counts, label_names


def test_counts_and_names_of_a_csv(hpa, hpa_dls):
    counts = label_counts(hpa_dls.train, len(hpa_dls.vocab))
    table = pd.read_csv(hpa / "train.csv", dtype=str, keep_default_na=False)
    rows = table[table.Id.isin(hpa_dls.train_ds.items.Id)].Target.str.split()
    assert counts.tolist() == [int(rows.map(lambda r, v=v: v in r).sum()) for v in hpa_dls.vocab]
    assert label_names(hpa_dls, len(hpa_dls.vocab)) == list(hpa_dls.vocab)
    assert label_names(hpa_dls, 3) == ["0", "1", "2"]


def test_data_without_a_label_pipeline():
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, 2))
    dls = DataLoaders.from_dsets(data, data, bs=2, num_workers=0, device="cpu")
    assert label_counts(dls.train, 2) is None
    assert label_names(dls, 2) == ["0", "1"]
