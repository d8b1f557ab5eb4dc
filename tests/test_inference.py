"""Submissions for a folder without labels."""

import shutil

import pandas as pd
import pytest
import torch
from fastai.learner import Learner, load_learner
from torch import nn

from fastai_crl.inference import write_submission


@pytest.fixture
def learn(hpa_dls, tmp_path):
    return Learner(hpa_dls, nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(hpa_dls.vocab))), path=tmp_path)


def test_submission(learn, hpa, tmp_path):
    table = write_submission(learn, hpa / "test", tmp_path / "submission.csv", thresh=0.6)
    sample = pd.read_csv(hpa / "sample_submission.csv")
    assert sorted(table.Id) == sorted(sample.Id) and list(table.columns) == ["Id", "Predicted"]
    assert pd.read_csv(tmp_path / "submission.csv", dtype=str).equals(table.astype(str))
    for i, predicted in zip(table.Id, table.Predicted, strict=True):
        probs = learn.predict(hpa / "test" / i)[2]
        expected = {learn.dls.vocab[c] for c in (probs > 0.6).nonzero().flatten()} or {learn.dls.vocab[probs.argmax()]}
        assert set(predicted.split()) == expected


def test_loaded_learner_predicts_the_same(learn, hpa, tmp_path):
    expected = write_submission(learn, hpa / "test", tmp_path / "a.csv")
    learn.export("x.pkl")
    assert write_submission(load_learner(tmp_path / "x.pkl"), hpa / "test", tmp_path / "b.csv").equals(expected)


def test_every_image_gets_a_label(learn, hpa, tmp_path):
    table = write_submission(learn, hpa / "test", tmp_path / "a.csv", thresh=1.0)
    assert (table.Predicted.str.split().str.len() == 1).all()


def test_missing_channel_is_named(learn, hpa, tmp_path):
    shutil.copytree(hpa / "test", tmp_path / "test")
    gone = sorted((tmp_path / "test").glob("*_blue.png"))[2]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        write_submission(learn, tmp_path / "test", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
    assert torch.is_tensor(learn.predict(hpa / "test" / "synthetic-000060")[2])
