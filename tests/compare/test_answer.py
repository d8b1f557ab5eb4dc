"""Tables, pictures and advice of measures that are made up."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from fastai_crl.compare.answer import Comparison
from fastai_crl.compare.stats import MEASURES, Measured, difference


def made_up(gains: dict[str, float], seeds: int = 5, spread: float = 0.002, of_images: float = 0.0) -> Comparison:
    """Runs of plain and of arms that are better by some gain, in mAP and by label."""
    rng = np.random.default_rng(0)
    measured, rows = {}, []
    images = of_images * rng.normal(size=(2, 40)) / 40
    for seed in range(seeds):
        base = 0.5 + 0.05 * rng.normal()
        for k, (arm, gain) in enumerate({"plain": 0.0, **gains}.items()):
            worth = base + gain + spread * rng.normal()
            influence = dict.fromkeys(MEASURES, images[min(k, 1)] - images[min(k, 1)].mean())
            values = {**dict.fromkeys(MEASURES, worth), "calibration error": 0.1}
            measured[arm, seed] = Measured(values, influence, np.array([worth, worth - 0.1]), np.zeros((40, 2)))
            rows.append({"arm": arm, "seed": seed, "lr": "own", "seconds": 30.0, **values})
    arms = {arm: f"learn = {arm}(dls)" for arm in ("plain", *gains)}
    return Comparison(pd.DataFrame(rows), measured, arms, {"a": 90, "b": 5}, ["c"])


def test_the_frame_has_means_and_paired_differences():
    found = made_up({"good": 0.05, "bad": -0.05})
    frame = found.frame
    assert frame.index.tolist() == ["plain", "good", "bad"] and frame["runs", "seeds"].tolist() == [5, 5, 5]
    values = [found.measured["good", s].values["mAP"] - found.measured["plain", s].values["mAP"] for s in range(5)]
    expected = difference(values, np.zeros((5, 40)), n_compared=2)  # wider: two arms are compared
    assert frame.loc["good", "mAP"].tolist()[1:] == pytest.approx(list(expected))
    assert frame.loc["bad", ("mAP", "high")] < 0 and np.isnan(frame.loc["plain", ("mAP", "low")])
    by_label = found.by_label
    assert by_label["", "training images"].tolist() == [90, 5] and by_label.index.tolist() == ["a", "b"]
    assert by_label["good", "difference"].tolist() == pytest.approx([expected.mean] * 2)
    narrow = difference(values, np.zeros((5, 40)))
    assert by_label["good", "low"].tolist() == pytest.approx([narrow.low] * 2)


def test_images_widen_what_seeds_do_not():
    narrow, wide = (made_up({"good": 0.05}, of_images=v).difference("good") for v in (0, 1))
    assert narrow.verdict == "higher" and wide.verdict == "level" and narrow.mean == wide.mean


def test_advice_says_when_it_is_noise():
    found = made_up({"good": 0.05, "bad": -0.05}).advice
    assert found.startswith("Best in mAP is good, +0.0") and found.endswith("Train with: learn = good(dls)")
    assert "5 seeds): more than noise." in found
    level = made_up({"same": 0.0, "bad": -0.05}).advice
    assert level.startswith("No arm is ahead of plain in mAP by more than noise: keep plain, and fit the decision.")
    assert "Behind it: bad (-0.05" in level and level.endswith("Train with: learn = plain(dls)")
    assert "Not to be told from it: good." in made_up({"good": 0.05, "twin": 0.0501}).advice
    few = made_up({"good": 0.05}, seeds=2)
    assert "fewer than three no winner is named" in few.advice and "good" not in few.advice
    assert few.difference("good").verdict == "higher"  # over images alone, of which there is no noise here
    gone = made_up({"good": 0.05})
    gone.measured["good", 1].values.update(dict.fromkeys(MEASURES, np.nan))
    assert gone.advice.startswith("Diverged: good;") and "keep plain" in gone.advice


def test_what_it_costs_is_said():
    found = made_up({"good": 0.05})
    for (arm, seed), run in found.measured.items():
        run.values["recall, rarest third"] = 0.5 - 0.1 * (arm == "good") + 0.001 * (seed % 2)
    assert "It costs recall, rarest third -0.100." in found.advice
    level = made_up({"rare": 0.0})
    for (arm, _), run in level.measured.items():
        run.values["mAP, rarest third"] = 0.1 + 0.1 * (arm == "rare")
    assert "Ahead in mAP, rarest third: rare (+0.100)." in level.advice


def test_pages_and_pictures(tmp_path):
    found = made_up({"good": 0.05, "<b>": 0.0})
    page = found.save(tmp_path / "a.html").read_text()
    assert found.advice in page and "&lt;b&gt;" in page and "<b></td>" not in page and "data:image/png;base64," in page
    assert "Left out, too few images to measure: c." in page and page.count("<table") == 2
    assert image.imread(found.save(tmp_path / "a.png")).shape[1] > 800
    with pytest.raises(ValueError, match=r"ends in .html or .png"):
        found.save(tmp_path / "a.pdf")
    axes = found.plot().axes
    assert [ax.get_title().split("\n")[0] for ax in axes][:2] == list(MEASURES[:2]) and len(axes) == 6
    colors = [{line.get_color() for line in ax.lines[:2]} for ax in axes]
    assert all(c == colors[0] and len(c) == 1 for c in colors)  # of an arm the same in every panel
    text = str(found)
    assert text.splitlines()[0].split()[0] == "seeds" and len(text.splitlines()) == 4
