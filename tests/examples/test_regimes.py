"""The tables and the picture of the results page, from rows on disk."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import regimes  # noqa: E402


def rows(**values: list[float]) -> pd.DataFrame:
    """Rows of two tasks, one for each seed, in which all measures are alike."""
    return pd.DataFrame(
        {"task": task, "arm": arm, "seed": seed, **dict.fromkeys(regimes.MEASURES, value)}
        for arm, of_arm in values.items()
        for task in ("digits", "photos")
        for seed, value in enumerate(of_arm)
    )


def test_a_table_has_means_and_pooled_pairs():
    text = regimes.table(rows(plain=[0.5, 0.6, 0.7], started=[0.52, 0.61, 0.73], weighted=[0.9]))
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines()}
    assert lines["plain cross entropy"][1:3] == [".600 / .600", ".600 / .600"]
    gains = np.tile([0.02, 0.01, 0.03], 2)
    half = scipy.stats.t.ppf(0.975, 5) * scipy.stats.sem(gains)
    assert lines["started at the frequencies"][3] == f"**+{gains.mean():.3f} ± {half:.3f}**".replace("0.", ".")
    assert "√pos_weight" not in lines  # one seed is too few


def test_the_stored_rows_make_the_tables_and_the_picture(tmp_path, capsys):
    results = FOLDER / "results"
    for name in ("pixels", "finetune"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.csv").write_bytes((results / name / "runs.csv").read_bytes())
    regimes.main(str(tmp_path))
    shown = capsys.readouterr().out
    assert shown.count("| plain cross entropy |") == 3 and "nan" not in shown
    assert (tmp_path / "regimes.png").stat().st_size > 20_000


def test_rows_of_compare_are_those_of_its_table():
    found = regimes.from_nothing(FOLDER / "results" / "pixels" / "runs.csv")
    digits = found[(found["task"] == "digits") & (found["arm"] == "started_crl")]
    assert len(digits) == 10 and digits["map"].mean() == pytest.approx(0.791, abs=5e-4)
    assert digits["f1"].mean() == pytest.approx(0.746, abs=5e-4)
