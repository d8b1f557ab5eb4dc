"""Splits: shares of labels, groups kept whole, folds, leaks."""

import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from fastai_crl.data.annotations import Annotations
from fastai_crl.data.label_parser import split_labels
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.data.splits import ColumnSplit, FoldSplit, split_by, validation_rows
from fastai_crl.data.stratify import make_folds, stratify
from fastai_crl.hpa import HPA_COUNTS

LABELS = ("0", "1", "2", "10")


def rows(n: int = 400, groups: int = 80) -> pd.DataFrame:
    """Four labels with odds 1/2, 1/8, 1/20, 1/50, in groups of 1 to about 20 images; some rows have none."""
    rng = np.random.default_rng(0)
    odds = rng.random((n, 4)) < [1 / 2, 1 / 8, 1 / 20, 1 / 50]
    target = [" ".join(np.array(LABELS)[o]) for o in odds]
    group = (groups * rng.random(n) ** 2).astype(int)
    return pd.DataFrame({"Id": [f"i{i}" for i in range(n)], "Target": target, "Group": [f"g{g}" for g in group]})


def read_csv(file):
    return Annotations.from_csv(file).frame


def folded(df, n_folds=5, group_col=None, seed=42, label_delim=" "):
    """The rows with the folds that `make_folds` gives them in a column."""
    annotations = Annotations.from_frame(df, label_delim=label_delim)
    return df.assign(fold=make_folds(annotations, n_folds, group_col=group_col, seed=seed)["fold"].to_numpy())


def label_counts(df, by="fold", label_delim=" "):
    return Annotations.from_frame(df, label_delim=label_delim).table(by)


def valid_rows(df, share, seed, group_col=None, valid_col=None, fold_col=None, fold=None, stratify=False):
    """Positions of the validation rows, by the keywords of `from_csv`."""
    return validation_rows(
        split_by(share, seed, group_col, valid_col, stratify, fold_col, fold), Annotations.from_frame(df)
    )


def lists(df: pd.DataFrame) -> list[list[str]]:
    return [split_labels(t, " ") for t in df["Target"]]


def shares(df: pd.DataFrame, valid: list[int]) -> dict[str, float]:
    """Share of each label's images that is in validation, in a plain loop."""
    total, inside = dict.fromkeys(LABELS, 0), dict.fromkeys(LABELS, 0)
    for i, labels in enumerate(lists(df)):
        for label in labels:
            total[label] += 1
            inside[label] += i in set(valid)
    return {k: inside[k] / total[k] for k in LABELS if total[k]}


# ---------------------------------------------------------------- training and validation


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_stratified_share_of_every_label(share):
    df = rows()
    valid = valid_rows(df, share, 42, stratify=True)
    assert len(set(valid)) == len(valid) == pytest.approx(share * len(df), abs=4)
    counts = label_counts(df.assign(side=np.isin(range(len(df)), valid)), "side")
    for label, got in shares(df, valid).items():
        n = counts.loc[label].sum()
        assert abs(got * n - share * n) <= 1, f"label {label}: {got:.3f} of {n} instead of {share}"
        assert counts.loc[label, True] == round(got * n)
    # What it is for: drawn at random, the shares are off.
    drawn = shares(df, valid_rows(df, share, 42))
    assert max(abs(v - share) for v in drawn.values()) > 2 * max(abs(v - share) for v in shares(df, valid).values())


def test_a_drawn_split_is_stratified_unless_it_is_refused():
    df = rows()
    annotations = Annotations.from_frame(df)
    assert split_by(None, 7).rows(annotations) == valid_rows(df, 0.2, 7, stratify=True) != valid_rows(df, 0.2, 7)
    assert split_by(0.3, 7, "Group").rows(annotations) == valid_rows(df, 0.3, 7, "Group", stratify=True)
    assert isinstance(split_by(valid_col="v"), ColumnSplit) and isinstance(split_by(fold_col="f"), FoldSplit)


def test_seed():
    df = rows()
    a, b, c = (valid_rows(df, 0.2, seed, stratify=True) for seed in (1, 1, 2))
    assert a == b != c


def test_stratified_by_whole_groups():
    df = rows()
    assert df["Group"].value_counts().max() > 30 and df["Group"].value_counts().min() == 1
    valid = valid_rows(df, 0.2, 42, "Group", stratify=True)
    train = df.drop(index=valid)
    assert set(df["Group"].iloc[valid]).isdisjoint(train["Group"])
    got, approx = shares(df, valid), pytest.approx(0.2, abs=0.02)
    assert got == {"0": approx, "1": approx, "2": pytest.approx(0.2, abs=0.1), "10": pytest.approx(0.2, abs=0.1)}
    assert len(valid) == pytest.approx(80, abs=2)


def test_a_label_of_two_images_is_on_both_sides():
    df = pd.DataFrame({"Id": [f"i{i}" for i in range(50)], "Target": ["7", "7", "8 9", "8 9", "5"] + ["1"] * 45})
    for seed in range(5):
        valid = valid_rows(df, 0.2, seed, stratify=True)
        assert len({0, 1} & set(valid)) == 1 and len({2, 3} & set(valid)) == 1 and 4 not in valid
        assert len(valid) == pytest.approx(10, abs=2)


def test_a_label_is_not_brought_to_validation_at_the_price_of_another_in_training():
    rows = [("7 5", "a"), ("7", "b"), *[("1", "b")] * 3, *[("1", f"c{i}") for i in range(45)]]
    df = pd.DataFrame(rows, columns=["Target", "Group"]).assign(Id=[f"i{i}" for i in range(len(rows))])
    for seed in range(5):  # group b must move, though a is smaller
        valid = valid_rows(df, 0.2, seed, "Group", stratify=True)
        assert 0 not in valid and {1, 2, 3, 4} <= set(valid)


def test_no_plate_is_moved_for_the_sake_of_a_rare_label():
    rare = [f"|r{i // 2 % 12}" if i % 5 == 0 else "" for i in range(100)]
    df = pd.DataFrame({"Id": [f"i{i}" for i in range(100)], "Target": [f"{i % 7 % 3}{r}" for i, r in enumerate(rare)]})
    annotations = Annotations.from_frame(df.assign(plate=np.arange(100) // 20), label_delim="|")
    for share, n in ((0.1, 20), (0.2, 20), (0.25, 20)):
        with pytest.warns(UserWarning, match=r"Labels that no validation image has \(\d in all\): r"):
            assert len(split_by(share, 42, "plate").rows(annotations)) == n


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from("abcd")), st.integers(0, 7)), min_size=2), st.integers(0, 3))
def test_no_label_is_on_one_side_only_if_moving_one_group_could_help(items, seed):
    labels = [sorted(s) for s, _ in items]
    groups = pd.factorize(np.array([g for _, g in items]))[0]
    if len(set(groups)) < 2:
        return
    sides = stratify(labels, groups, [0.8, 0.2], seed)
    assert all(len(set(sides[groups == g])) == 1 for g in set(groups))

    def one_sided(side: np.ndarray) -> set[str]:
        where = {c: {(g, s) for row, g, s in zip(labels, groups, side, strict=True) if c in row} for c in "abcd"}
        return {c for c, w in where.items() if len(w) >= 2 and len({s for _, s in w}) == 1}

    def present(side: np.ndarray) -> set[tuple[str, int]]:
        return {(c, s) for row, s in zip(labels, side, strict=True) for c in row}

    for g in set(groups):
        moved = np.where(groups == g, 1 - sides, sides)
        if moved.sum() > max(0.3 * len(items), sides.sum() and sides.sum() + 1):
            continue  # too much of the whole
        assert not (one_sided(moved) < one_sided(sides) and present(sides) <= present(moved)), (
            labels,
            groups,
            sides,
            g,
        )


def test_split_columns(hpa):
    df = read_csv(hpa / "train.csv")
    df = folded(df, 4).assign(Group=[f"g{i % 6}" for i in range(len(df))])
    assert valid_rows(df, None, 1, fold_col="fold", fold=2) == np.flatnonzero(df["fold"] == 2).tolist()
    assert valid_rows(df.astype(str), None, 1, fold_col="fold", fold="2") == np.flatnonzero(df["fold"] == 2).tolist()
    with pytest.raises(ValueError, match=r"fold=4 does not occur in column 'fold', which holds 0, 1, 2, 3"):
        valid_rows(df, None, 1, fold_col="fold", fold=4)
    with pytest.raises(ValueError, match=r"Ids without a fold \(1 in all\): synthetic-000003"):
        valid_rows(df.assign(fold=["0", "1", "0", "", *["1"] * (len(df) - 4)]), None, 1, fold_col="fold")
    with pytest.raises(ValueError, match=r"valid_col or folds \(fold_col\), not both"):
        valid_rows(df, None, 1, fold_col="fold", valid_col="fold")
    with pytest.raises(
        ValueError, match=r"valid_pct=0\.2 is of a drawn split, but column 'fold' fixes it: leave it out"
    ):
        valid_rows(df, 0.2, 1, valid_col="fold")
    with pytest.raises(ValueError, match="fold=1 needs folds="):
        valid_rows(df, 0.2, 1, fold=1)
    with pytest.raises(ValueError, match="stratify=True draws a split, but column 'fold' fixes it"):
        valid_rows(df, None, 1, fold_col="fold", stratify=True)
    # A group on both sides of a fixed split is a leak.
    with pytest.raises(
        ValueError, match=r"Groups of 'Group' on both sides of the split by 'fold' \(6 in all\): g0, g1"
    ):
        valid_rows(df, None, 1, "Group", fold_col="fold")
    halves = df.assign(half=[i % 6 < 3 for i in range(len(df))])
    assert valid_rows(halves, None, 1, "Group", "half") == np.flatnonzero(halves["half"]).tolist()


def test_from_csv(hpa, tmp_path):
    shutil.copytree(hpa, tmp_path / "set")
    path, options = tmp_path / "set", {"size": 32, "bs": 8, "num_workers": 0, "batch_tfms": []}
    before = (path / "train.csv").read_bytes()
    folds = make_folds(Annotations.from_csv(path / "train.csv"), 3, path / "folds.csv")
    assert list(folds) == ["Id", "fold"] and (path / "train.csv").read_bytes() == before
    assert pd.read_csv(path / "folds.csv", dtype={"Id": str}).equals(folds) and not list(path.glob("*.part"))
    df = read_csv(path / "train.csv")
    df.assign(fold=folds["fold"]).to_csv(path / "own.csv", index=False)
    for k in range(3):
        dls = HPADataLoaders.from_csv(path, folds="folds.csv", fold=k, **options)
        assert list(dls.valid_ds.items["Id"]) == list(folds["Id"][folds["fold"] == k])
        assert len(dls.train_ds) + len(dls.valid_ds) == len(df)
        own = HPADataLoaders.from_csv(path, "own.csv", fold_col="fold", fold=k, **options)
        assert own.valid_ds.items["Id"].equals(dls.valid_ds.items["Id"])
    dls = HPADataLoaders.from_csv(path, stratify=True, valid_pct=0.25, **options)
    assert len(dls.valid_ds) == pytest.approx(15, abs=3)
    train, valid = (ds.items["Target"].str.split() for ds in (dls.train_ds, dls.valid_ds))
    once = train.explode().value_counts()
    for label, n in df["Target"].str.split().explode().value_counts().items():
        if n > 1 and label not in set(valid.explode()):  # moving any of its images would take a label out of training
            assert all(any(once[o] == 1 for o in row) for row in train if label in row)


# ---------------------------------------------------------------- folds


def test_folds_hold_equal_shares():
    df = rows()
    table = label_counts(folded(df))
    assert list(table.index) == list(LABELS) and list(table.columns) == [0, 1, 2, 3, 4]
    assert "fold" not in df
    wanted = {label: sum(label in row for row in lists(df)) / 5 for label in LABELS}
    for label in LABELS:
        assert (abs(table.loc[label] - wanted[label]) <= 1).all()
    assert folded(df)["fold"].value_counts().between(76, 84).all()


def spread(df: pd.DataFrame, fold: np.ndarray) -> float:
    """Mean relative difference of a label's count in a fold from a fifth of its images."""
    counts = label_counts(df.assign(fold=fold)).to_numpy()
    return float(abs(counts / counts.mean(1, keepdims=True) - 1).mean())


def mean_spread(df: pd.DataFrame, splitter, *args) -> float:
    """Mean over three seeds of the spread of a splitter in the manner of scikit-learn."""
    found, fold = [], np.empty(len(df), int)
    for seed in range(3):
        for k, (_, i) in enumerate(splitter(5, shuffle=True, random_state=seed).split(df, *args)):
            fold[i] = k
        found.append(spread(df, fold))
    return np.mean(found)


def test_folds_are_as_even_as_those_of_iterative_stratification():
    iterstrat = pytest.importorskip("iterstrat.ml_stratifiers")
    df = rows(2000)
    y = np.array([[label in row for label in LABELS] for row in lists(df)])
    ours = np.mean([spread(df, folded(df, seed=seed)["fold"].to_numpy()) for seed in range(3)])
    assert ours <= 1.03 * mean_spread(df, iterstrat.MultilabelStratifiedKFold, y)


def test_folds_of_one_label_in_groups_are_as_even_as_scikit_learns():
    df = rows()
    df["Target"] = [row[-1] if row else "none" for row in lists(df)]
    ours = np.mean([spread(df, folded(df, group_col="Group", seed=seed)["fold"].to_numpy()) for seed in range(3)])
    assert ours <= 1.05 * mean_spread(df, StratifiedGroupKFold, df["Target"], df["Group"])


def test_folds_of_one_label_per_row():
    df = pd.DataFrame({"Id": [str(i) for i in range(50)], "Target": ["a b"] * 35 + ["c"] * 10 + ["d"] * 5})
    table = label_counts(folded(df, label_delim=None), label_delim=None)
    assert table.to_numpy().tolist() == [[7] * 5, [2] * 5, [1] * 5] and list(table.index) == ["a b", "c", "d"]


def test_folds_of_whole_groups():
    df = folded(rows(), group_col="Group")
    assert (df.groupby("Group")["fold"].nunique() == 1).all()
    table = label_counts(df)
    assert (table.sub(table.mean(1), axis=0).abs().max(1) < 2).all()
    assert df["fold"].value_counts().between(78, 82).all()


def test_bad_folds():
    df = rows(20, 5)
    with pytest.raises(ValueError, match="n_folds=1 must be"):
        folded(df, 1)
    with pytest.raises(ValueError, match=r"n_folds=6 .* at most the groups: there are 20 images in . groups"):
        folded(df, 6, "Group")
    with pytest.raises(ValueError, match=r"no column 'Plate', only .*Group.*group_col="):
        folded(df, group_col="Plate")
    with pytest.raises(ValueError, match=r"Ids without a Group \(1 in all\): i0"):
        folded(df.assign(Group=["", *df["Group"][1:]]), group_col="Group")


def test_folds_are_joined_by_id(tmp_path):
    df, file = rows(20), tmp_path / "folds.csv"
    folds = make_folds(Annotations.from_frame(df), 4, file).set_index("Id")["fold"]

    def valid(**kwargs):
        return validation_rows(split_by(folds=file, **kwargs), Annotations.from_frame(df[::-1]))

    ids = list(df["Id"][::-1])
    for k in range(4):  # the order of the rows, and ids that only the folds have, do not matter
        assert [ids[i] for i in valid(fold=k)] == [i for i in ids if folds[i] == k]
    assert valid() == valid(fold=0)
    text = file.read_text()
    for changed, message in (
        (text.replace("i7,", "x7,"), r"Ids of the table of rows that csv file .*folds.csv lacks \(1 in all\): i7"),
        (text + "i7,0\n", r"Ids that csv file .*folds.csv has twice \(1 in all\): i7"),
        (text.replace("Id,", "Name,"), r"no column 'Id', only Name, fold"),
        (text.replace("fold\n", "part\n"), r"no column 'fold', only Id, part"),
        (text + "i99\n", r"fields of the header"),
    ):
        file.write_text(changed)
        with pytest.raises(ValueError, match=message):
            valid()
    file.write_text(text.replace("fold\n", "part\n"))
    assert valid(fold_col="part", fold=3)
    with pytest.raises(ValueError, match="Column 'Group' is in the table of rows and in csv file"):
        file.write_text(text.replace("fold\n", "Group\n"))
        valid(fold_col="Group")
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        validation_rows(split_by(folds=tmp_path / "none.csv"), Annotations.from_frame(df))
    with pytest.raises(ValueError, match=r"valid_pct=0\.2 is of a drawn split"):
        valid(valid_pct=0.2)


def test_folds_do_not_take_the_place_of_other_data(tmp_path):
    df, file = rows(20), tmp_path / "train.csv"
    df.to_csv(file, index=False)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"is a csv of Id, Target, Group, which would be lost.*such as folds\.csv"):
        make_folds(Annotations.from_csv(file), 2, file)
    assert file.read_bytes() == before
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    for name in ("link.csv", "link.csv"):  # a link is followed, the file that it leads to is replaced
        folds = make_folds(Annotations.from_csv(file), 2, tmp_path / name)
    assert (tmp_path / "link.csv").is_symlink() and len(pd.read_csv(tmp_path / "real.csv")) == len(folds) == 20


def test_real_labels_in_five_folds(shared):
    df = folded(read_csv(shared / "hpa2018" / "train.csv"))
    table = label_counts(df)
    assert table.loc["27"].tolist() == pytest.approx([2.2] * 5, abs=0.81) and table.loc["27"].sum() == 11
    for label, total in enumerate(HPA_COUNTS):
        assert table.loc[str(label)].sum() == total
        assert (abs(table.loc[str(label)] - total / 5) <= 1).all(), f"label {label}: {table.loc[str(label)].tolist()}"
    assert df["fold"].value_counts().between(6100, 6330).all()


def test_real_labels_in_validation(shared):
    df = read_csv(shared / "hpa2018" / "train.csv")
    valid = valid_rows(df, 0.15, 42, stratify=True)
    table = label_counts(df.assign(side=np.isin(range(len(df)), valid)), "side")
    for label, total in enumerate(HPA_COUNTS):
        assert abs(table.loc[str(label), True] - 0.15 * total) <= 1
    assert len(valid) == pytest.approx(0.15 * len(df), rel=0.02)


def test_real_cells_by_montage(shared):
    path = shared / "hpa_cells"
    df = folded(read_csv(path / "train.csv"), group_col="Montage")
    assert (df.groupby("Montage")["fold"].nunique() == 1).all()
    table = label_counts(df)
    # Label 23 has 36 cells in four montages: one of the five folds must go without.
    assert sorted(table.loc["23"]) == [0, 9, 9, 9, 9]
    assert (table.loc["2"] == 9).all() and (table.loc["21"] == 18).all()
    assert table.loc["0"].between(53, 73).all() and table.loc["25"].between(54, 73).all()
    dls = HPADataLoaders.from_csv(path, size=32, group_col="Montage", stratify=True, num_workers=0)
    sides = [ds.items for ds in (dls.train_ds, dls.valid_ds)]
    assert not set(sides[0]["Montage"]) & set(sides[1]["Montage"])
    assert sides[1]["Target"].value_counts().to_dict() == {
        "25": pytest.approx(65, abs=9),
        "0": pytest.approx(63, abs=9),
        "21": 18,
        "2": 9,
        "23": 9,
    }
