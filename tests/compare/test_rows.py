"""Rows and arrays that a kill leaves whole, one writer at a time, and other options refused."""

import numpy as np
import pytest

from fastai_crl.compare.rows import Runs

KEY = ("arm", "seed")


def runs(folder, **options) -> Runs:
    return Runs(folder, KEY, ["map"], ["note"], **options)


def test_a_row_that_was_being_written_is_left_out_and_the_others_stay(tmp_path):
    first = runs(tmp_path / "new")
    first.add(("a", 0), {"map": 0.123456, "note": 'x, "y"'}, {"probs": np.eye(2)})
    first.add(("a", 1), {"map": np.nan})
    with open(first.file, "a") as f:
        f.write("a,2,0.")
    second = runs(tmp_path / "new")
    assert second.get(("a", 0)) == {"arm": "a", "seed": "0", "map": "0.12346", "note": 'x, "y"'}
    assert second.get(("a", 2)) is None and second.frame()["map"].tolist() == pytest.approx(
        [0.12346, np.nan], nan_ok=True
    )
    assert second.finished(("a", 0)) and not second.finished(("a", 1))  # of which the arrays are missing
    assert np.array_equal(second.arrays(("a", 0))["probs"], np.eye(2))
    second.add(("b", 0), {"map": 1.0})
    assert first.file.read_text().splitlines()[-2:] == ["a,1,nan,", "b,0,1.0,"]


def test_names_that_no_file_may_have_get_files_of_their_own(tmp_path):
    found = runs(tmp_path)
    for i, name in enumerate(("a/b", "a:b", "√", "x" * 300)):
        found.add((name, 0), {"map": i}, {"probs": np.array([i])})
    assert [found.arrays((name, 0))["probs"][0] for name in ("a/b", "a:b", "√", "x" * 300)] == [0, 1, 2, 3]


def test_one_process_at_a_time(tmp_path):
    refused = pytest.raises(BlockingIOError, match="wait for it, or give another out=")
    with runs(tmp_path).alone(), refused, runs(tmp_path).alone():
        pass
    with runs(tmp_path).alone():
        pass


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    runs(tmp_path).bind({"all": {"size": 2}, "arm 'a'": {"epochs": 1}})
    for _ in range(2):  # of a folder without runs nothing binds
        runs(tmp_path).bind({"all": {"size": 3}, "arm 'a'": {"epochs": 2, "loss": "bce"}})
    runs(tmp_path).add(("a", 0), {"map": 1.0})
    runs(tmp_path).bind({"all": {"size": 3}, "arm 'b'": {"epochs": 3}})  # another arm may come later
    with pytest.raises(ValueError, match=r"another arm 'a': epochs was 2, and is 3. Choose another out="):
        runs(tmp_path).bind({"arm 'a'": {"epochs": 3, "loss": "bce"}})
    with pytest.raises(ValueError, match="loss was bce, and is None"):
        runs(tmp_path).bind({"arm 'a'": {"epochs": 2}})
    with pytest.raises(ValueError, match="another all: size was 3, and is 4"):
        runs(tmp_path).bind({"all": {"size": 4}})
