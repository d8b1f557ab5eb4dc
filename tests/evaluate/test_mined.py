"""What the rectification mined: sums over batches, the table and the picture."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from fastai_crl.evaluate.mined import NOTHING, Mined, counts_frame, plot_counts


def test_sums_of_an_epoch():
    batches = [((2, 0, 1), 0.5), ((0, 0, 0), 0.0), ((4, 0, 0), 0.25)]
    found = None
    for counts, term in batches:
        found = Mined.of(torch.tensor(counts), torch.tensor(term, requires_grad=True)).plus(found)
    assert found.counts.tolist() == [6, 0, 1] and not found.terms.requires_grad
    assert found.columns() == {"loss": 0.375, "triplets": 7, "labels": 2}  # the mean of the two that had a triplet


def test_an_epoch_without_a_triplet():
    found = Mined.of(torch.zeros(3, dtype=torch.long), torch.tensor(0.0)).columns()
    assert math.isnan(found.pop("loss")) and found == {"triplets": 0, "labels": 0}
    assert NOTHING.keys() == {"loss", *found} and math.isnan(NOTHING["loss"])


def test_the_table_and_the_picture():
    history = [(0, 0, torch.tensor([3, 0])), (0, 1, torch.tensor([1, 5])), (1, 0, torch.tensor([0, 9]))]
    frame = counts_frame(history, ["a", "b"])
    assert frame.index.tolist() == [(0, 0), (0, 1), (1, 0)] and frame["b"].tolist() == [0, 5, 9]
    ax = plot_counts(frame, top=1)
    assert [line.get_label() for line in ax.lines] == ["b"] and ax.lines[0].get_ydata().tolist() == [0, 5, 9]
    plt.close("all")
    with pytest.raises(ValueError, match="Nothing has been mined yet"):
        plot_counts(counts_frame([], []))
