"""Annotations: ids, labels, vocabulary, targets; what is wrong with them is named."""

import unicodedata

import numpy as np
import pandas as pd
import pytest

from fastai_crl.data.annotations import Annotations
from fastai_crl.data.label_parser import doubtful_labels
from fastai_crl.hpa import HPA_COUNTS

ROWS = "Id,Target\na,1 2\nb,\nc,10 2\n"


def of(tmp_path, text=ROWS, **options):
    (tmp_path / "t.csv").write_text(text)
    return Annotations.from_csv(tmp_path / "t.csv", **options)


def test_what_it_holds(tmp_path):
    rows = of(tmp_path)
    assert rows.ids == ["a", "b", "c"] and rows.labels == [["1", "2"], [], ["10", "2"]] and len(rows) == 3
    assert rows.vocab() == ["1", "2", "10"] and rows.counts() == {"1": 1, "2": 2, "10": 1}
    assert rows.targets().toarray().tolist() == [[True, True, False], [False] * 3, [False, True, True]]
    assert rows.targets(["10", "2", "1", "x"]).toarray().astype(int).tolist() == [[0, 1, 1, 0], [0] * 4, [1, 1, 0, 0]]


@pytest.mark.parametrize("label_col", ["Target", 1, -1, np.int64(1)])
def test_columns_by_name_or_place(tmp_path, label_col):
    assert of(tmp_path, label_col=label_col).vocab() == ["1", "2", "10"]


HOT = "Id,0,1,2\na,1,0,1\nb,0,0,0\nc,0,1,1\n"


@pytest.mark.parametrize(
    "text",
    [
        HOT,
        HOT.replace(",0", ",0.0").replace("Id,0.0", "Id,0"),
        HOT.replace(",1\n", ",True\n"),
        HOT.replace(",1\n", ", 1\n"),
    ],
)
@pytest.mark.parametrize("columns", [["0", "1", "2"], [1, 2, 3], ("0", 2, -1)])
def test_one_column_per_label(tmp_path, text, columns):
    rows = of(tmp_path, text, label_col=columns)
    assert rows.vocab() == ["0", "1", "2"] and rows.labels == [["0", "2"], [], ["1", "2"]]
    assert rows.targets().toarray().astype(int).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert [rows.parser(rows.frame.iloc[i]) for i in range(3)] == rows.labels


def test_one_column_per_label_and_one_label_per_row(tmp_path):
    text = "Id,x,y\na,1,0\nb,0,1\n"
    assert of(tmp_path, text, label_col=["x", "y"], label_delim=None).labels == [["x"], ["y"]]
    with pytest.raises(ValueError, match=r"Several labels .*\(1 in all\): a"):
        of(tmp_path, "Id,x,y\na,1,1\nb,0,1\n", label_col=["x", "y"], label_delim=None)


@pytest.mark.parametrize("value", ["-1", "2", "", "0.5", "yes", "nan"])
def test_columns_of_labels_hold_0_and_1(tmp_path, value):
    with pytest.raises(ValueError, match=r"Values of column 'x' .*holds 0 and 1"):
        of(tmp_path, f"Id,x\na,1\nb,{value}\nc,0\n", label_col=["x"])


@pytest.mark.parametrize(
    "frame",
    [
        {"Id": ["1", "2", "3"], "Target": ["0 1", None, "2"]},
        {"Id": ["1", "2", "3"], "Target": ["0 1", np.nan, "2"]},
        {"Id": [1, 2, 3], "Target": ["0 1", "", "2"]},
        {"Id": [1.0, 2.0, 3.0], "Target": ["0 1", pd.NA, 2]},
        {"Id": np.array([1, 2, 3], np.int16), "Target": pd.Series(["0 1", None, "2"], dtype="string")},
        {"Id": [1, 2, 3], "Target": pd.Categorical(["0 1", None, "2"])},
    ],
)
def test_rows_of_a_plain_frame(frame):
    rows = Annotations.from_frame(pd.DataFrame(frame))
    assert rows.ids == ["1", "2", "3"] and rows.labels == [["0", "1"], [], ["2"]]


@pytest.mark.parametrize("labels", ["0,2,1", "0,,1", "3,2,", ",,5"])
def test_a_plain_frame_as_the_csv(tmp_path, labels):
    text = "Id,Target\n" + "".join(f"{i},{o}\n" for i, o in enumerate(labels.split(",")))
    rows = of(tmp_path, text)
    plain = Annotations.from_frame(pd.read_csv(tmp_path / "t.csv"))
    assert plain.ids == rows.ids and plain.labels == rows.labels and plain.vocab() == rows.vocab()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Id;Target\na;1\n", "separated by semicolons"),
        ("Id\tTarget\na\t1\n", "separated by tabs"),
        ("Id|Target\na|1\n", "separated by bars"),
        ("Id, Target\na,1\n", "' Target' differs in spaces or case.*label_col=' Target'"),
        ("id,target\na,1\n", "'id' differs in spaces or case.*id_col='id'"),
        (" ID ,Target\na,1\n", "' ID ' differs"),
        ("# plate 7\nId,Target\n", "first line is a comment"),
        ("name,Target\na,1\n", "rename it or pass id_col="),
        ("Id,x,y\na,1,0\n", "label_col=, or a list with one column"),
        ("Id,Target\n", "a header but no rows"),
        ("Id,Target,Target\na,1,2\n", "Columns that .* has twice"),
        ("Id,Target\na,1\n ,2\n", "Empty Id .*: row 3"),
        ("Id,Target\na,1\n\n,2\n", "Empty Id .*: row 4"),
        ("Id,Target\na,1\na,2\n", "Duplicate Id .*: a"),
        ("Id,Target\na\n", "fields of the header .*: line 2 has 1"),
    ],
)
def test_files_that_are_refused(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        of(tmp_path, text)


@pytest.mark.parametrize("row", ['"b\nc",1,x', 'b,"1\n2",x', '"b,1\nc",2,x', 'b,"1\r2",x'])
@pytest.mark.parametrize("delim", [" ", None])
def test_line_breaks_in_ids_and_labels(tmp_path, row, delim):
    text = f"Id,Target,note\na,1,x\n{row}\n"
    with pytest.raises(ValueError, match=r"Ids or labels with a line break .*\(1 in all\): .* \(row 3\).*stray quote"):
        of(tmp_path, text, label_delim=delim)


def test_line_breaks_between_labels_if_meant(tmp_path):
    assert of(tmp_path, 'Id,Target,note\na,"1\n2","x\ny"\n', label_delim="\n").labels == [["1", "2"]]


@pytest.mark.parametrize("delim", ["", 0, b" "])
def test_a_delimiter_that_separates_nothing(tmp_path, delim):
    with pytest.raises(ValueError, match="separates nothing"):
        of(tmp_path, label_delim=delim)


def test_vocabulary(tmp_path):
    rows = of(tmp_path)
    with pytest.raises(ValueError, match=r"not in the vocab \(1 in all\): '10' \(id c\)"):
        rows.vocab([1, 2])
    with pytest.raises(ValueError, match=r"hold the delimiter \(1 in all\): 'x y'"):
        rows.vocab(["1", "2", "10", "x y"])
    assert rows.vocab([10, 2.0, np.int64(1)]) == ["10", "2", "1"]
    with pytest.raises(ValueError, match="is a set, which has no order"):
        rows.vocab({"1", "2", "10"})


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "pair",
    [("a", "./a"), ("a", "../train/a"), ("p/a", "p//a"), ("p/a", "p/../p/a"), (NFC, NFD), ("q/" + NFC, "q/" + NFD)],
)
def test_ids_that_name_one_file(tmp_path, pair):
    rows = of(tmp_path, f"Id,Target\n{pair[0]},1\nx,1\n{pair[1]},2\n")
    with pytest.raises(ValueError, match=r"name one file \(1 in all\)"):
        rows.require(tmp_path / "train")


@pytest.mark.parametrize("pair", [("a", "A"), ("a", "p/a"), ("a", "a."), ("a", "a ")])
def test_ids_of_two_files(tmp_path, pair):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").touch()
    of(tmp_path, f"Id,Target\n{pair[0]},1\n{pair[1]},2\n").require(tmp_path / "train")


@pytest.mark.parametrize("id_", ["../a", "p/../../a", "/etc/a", "../train2/a", "./../a"])
def test_ids_that_lead_out(tmp_path, id_):
    rows = of(tmp_path, f"Id,Target\n{id_},1\nx,1\n")
    with pytest.raises(ValueError, match=r"lead out of .*\(1 in all\).*pass as folder= the one"):
        rows.require(tmp_path / "train")


@pytest.mark.parametrize(
    ("labels", "problems"),
    [
        (["0,1", "1", "2,0"], {"label made of others"}),
        (["0;1", "1", "2;0"], {"label made of others"}),
        (["a|b", "b|c", "c"], {"label made of others"}),
        (["a/b", "b"], {"label made of others"}),
        (["0 25", "25", "0"], {"label made of others"}),
        (["red cell", "red", "cell"], {"label made of others"}),
        (["Plasma membrane", "Nuclear membrane", "Nuclear bodies"], set()),
        (["[0,", "1]", "[2]"], {"label with brackets or quotes"}),
        (["'a'", "b"], {"label with brackets or quotes"}),
        (["0", "0.0"], {"labels alike"}),
        (["1", "01"], {"labels alike"}),
        (["a", "A"], {"labels alike"}),
        (["1", "1\u200b"], {"labels alike"}),
        ([NFC, NFD], {"labels alike"}),
        (["0", "1", "10", "a-b", "a"], set()),
        (["IgG/A", "plasma, cell"], set()),
    ],
)
def test_labels_that_look_as_if_meant_otherwise(labels, problems):
    assert {kind for kind, _, _ in doubtful_labels([[o] for o in labels])} == problems


def test_counts_by_a_column(tmp_path):
    table = of(tmp_path, "Id,Target,fold\na,1 2,0\nb,,0\nc,10 2,1\n").table(by="fold")
    assert table.index.tolist() == ["1", "2", "10"] and table.to_numpy().tolist() == [[1, 0], [1, 1], [0, 1]]


def test_real_labels(shared):
    rows = Annotations.from_csv(shared / "hpa2018" / "train.csv")
    y = rows.targets()
    rows.require(shared / "hpa2018")
    assert y.sum(0).A1.tolist() == list(HPA_COUNTS) and y.shape == (31072, 28)
    assert not list(doubtful_labels(rows.labels))
