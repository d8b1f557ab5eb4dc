"""Csv files: every value stays text; what does not fit is named by its line."""

from fastai_crl.data.csv_file import read_file


def written(tmp_path, text):
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_every_value_stays_text(tmp_path):
    found = read_file(written(tmp_path, 'a,b,c\n007,NA,1e3\n"x, ""y""",,1.10\n'))
    assert found.frame.to_dict("list") == {"a": ["007", 'x, "y"'], "b": ["NA", ""], "c": ["1e3", "1.10"]}
    assert found.lines == [2, 3] and not found.faults
