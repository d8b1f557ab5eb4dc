"""Csv files: every value stays text; what does not fit is named by its line."""

import os
import stat

import pandas as pd
import pytest

from fastai_crl.data.csv_file import as_text, read_file, require_none
from fastai_crl.data.stratify import add_folds


def written(tmp_path, text):
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_every_value_stays_text(tmp_path):
    found = read_file(written(tmp_path, 'a,b,c\n007,NA,1e3\n"x, ""y""",,1.10\n'))
    assert found.frame.to_dict("list") == {"a": ["007", 'x, "y"'], "b": ["NA", ""], "c": ["1e3", "1.10"]}
    assert found.lines == [2, 3] and not found.faults


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_byte_order_marks_and_blank_lines(tmp_path, end, bom, last):
    text = end.join(["Id,Target", "a,1", "", "b,2"]) + end * last
    found = read_file(written(tmp_path, bom + text.encode()))
    assert found.frame.to_numpy().tolist() == [["a", "1"], ["b", "2"]] and found.lines == [2, 4] and not found.faults


FAULTS = {
    "too few": ("Id,T\na,1\nb\nc,3\n", "fields do not fit", "line 3 has 1", ["a", "c"]),
    "too many": ("Id,T\na,1\nb,2,3\nc,3\n", "fields do not fit", "line 3 has 3", ["a", "c"]),
    "too many in each row": ("Id,T\na,1,x\n", "fields do not fit", "line 2 has 3", []),
    "labels between commas": ("Id,T\na,1,2\nb,1\n", "fields do not fit", "line 2 has 3", ["b"]),
    "rows swallowed": ('Id,T\na,1\nb,"1 2\nc,3\nd,1\ne,1 2"\nf,3\n', "stray quote", "lines 3 to 6 are", ["a", "f"]),
    "one row swallowed": ('Id,T\nb,"1\nc,3"\nd,1\n', "stray quote", "lines 2 to 3 are one row", ["d"]),
    "swallowed in another column": ('Id,T,n\na,1,"x\nb,2,y"\nc,3,z\n', "stray quote", "lines 2 to 3 are", ["c"]),
    "never closed": ('Id,T\na,1\nb,"1\nc,3\nd,1\n', "stray quote", "lines 3 to 5", ["a"]),
    "a quote after a space": ('Id,T\na, "1 2"\nb,1\n', "stray quote", "line 2 has it after a space", ["b"]),
    "text after a quote": ('Id,T\na,"1"2\nb,1\n', "stray quote", "line 2", ["b"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_their_lines(tmp_path, fault):
    text, problem, detail, left = FAULTS[fault]
    found = read_file(written(tmp_path, text))
    assert [f.problem for f in found.faults] == [problem] and found.faults[0].detail.startswith(detail)
    assert found.frame["Id"].tolist() == left
    with pytest.raises(ValueError, match=rf"\(1 in all\): {detail}"):
        require_none(found)


def test_a_comment_over_lines_is_a_value(tmp_path):
    found = read_file(written(tmp_path, 'Id,T,note\na,1,"first\nsecond"\nb,2,""\n'))
    assert not found.faults and found.frame["note"].tolist() == ["first\nsecond", ""] and found.lines == [2, 4]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a header"),
        ("\n\n", "needs a header"),
        ("Id,T,T\n", "Columns that .* has twice.*'T'"),
        ("Id,T\ncafé,1\n".encode("cp1252"), r"line 2 holds the byte 0xe9\), but in cp1252"),
        ("Id,T\na,é\n".encode("latin-1"), "but in cp1252"),
        ("Id,T\na,1\n".encode("utf-16"), "but in UTF-16"),
        ("Id,T\na,1\n".encode("utf-16-le"), "but in UTF-16"),
        ("Id,T\na,1\n".encode("utf-16-be"), "but in UTF-16"),
        ("Id,T\na,é\n".encode("utf-16"), "but in UTF-16"),
        (b"Id,T\na,1\nb,1\nc,1\n\0\0\0\0", "damaged: it holds zero bytes in line 5"),
        (b"Id,T\n" + b"a,1\n" * 2000 + b"\0" * 9000, "damaged: it holds zero bytes in line 2002"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_file(written(tmp_path, text))


@pytest.mark.parametrize(
    ("value", "text"),
    [("007", "007"), ("1e3", "1e3"), (7, "7"), (7.0, "7"), (7.5, "7.5"), (float("nan"), ""), (None, ""), (pd.NA, "")],
)
def test_values_of_a_frame_as_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", ["", "{end}", "{end}{end}"])
def test_folds_leave_every_other_byte(tmp_path, end, bom, last):
    rows = ["Id,Target,plate,well,dose,note"] + [f'i{k},{k % 2},00{k},1e{k},1.10,"a ""b"", c"' for k in range(4)]
    file = written(tmp_path, bom + (end.join(rows) + last.format(end=end)).encode())
    file.chmod(0o640)
    folds = add_folds(file, 2, fname=file)["fold"].tolist()
    wanted = end.join(f"{row},{f}" for row, f in zip(rows, ["fold", *folds], strict=True)) + last.format(end=end)
    assert file.read_bytes() == bom + wanted.encode() and stat.S_IMODE(os.stat(file).st_mode) == 0o640
    assert sorted(folds) == [0, 0, 1, 1] and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_folds_of_values_over_lines(tmp_path):
    file = written(tmp_path, 'Id,Target,note\na,1,"x\ny"\n\nb,1,z\n')
    out = tmp_path / "out.csv"
    folds = add_folds(file, 2, fname=out, fold_col="my,fold")["my,fold"].tolist()
    assert out.read_text() == f'Id,Target,note,"my,fold"\na,1,"x\ny",{folds[0]}\n\nb,1,z,{folds[1]}\n'
