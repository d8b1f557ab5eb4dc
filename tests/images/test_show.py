"""What pictures show: pixels, marks, names, probabilities and colours."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives learners their no_bar)
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from matplotlib.colors import to_rgb
from torch import nn
from torch.utils.data import TensorDataset

from fastai_crl.data.loaders import HPADataLoaders, MultiChannelBlock
from fastai_crl.hpa import HPA_LABELS
from fastai_crl.images.image_set import ImageSet
from fastai_crl.images.show import FALSE, FOUND, MISSED, draw_images, prediction_lines
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.labels import shown_names
from fastai_crl.predict import show_predictions

NAMES = ["Nucleoplasm", "Golgi", "Cytosol", "Nucleoli"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


class Fixed(nn.Module):
    """Answers the same logits for every image, those of the probabilities it is given."""

    def __init__(self, probs, single: bool = False):
        super().__init__()
        probs = torch.as_tensor(probs)
        self.logits = nn.Parameter(probs.log() if single else probs.logit())

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def lines(ax) -> list[tuple[str, str]]:
    """The lines above a picture, from the top, with their colours."""
    if ax.get_title():
        return [(text, ax.title.get_color()) for text in ax.get_title().split("\n")]
    notes = sorted((t for t in ax.texts if hasattr(t, "xyann")), key=lambda t: -t.xyann[1])
    return [(t.get_text(), t.get_color()) for t in notes]


def picture(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def image(c: int = 4, h: int = 6, w: int = 8) -> TensorMultiChannel:
    return TensorMultiChannel(torch.rand(c, h, w), channels=("red", "green", "blue", "yellow")[:c])


def inside(fig) -> None:
    """Assert that nothing written sticks out of the figure, and no caption lies on a picture, another or the title."""
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in fig.texts]
    assert all(box.y1 <= fig.bbox.height and box.x1 <= fig.bbox.width for box in boxes)
    width, height = fig.bbox.width, fig.bbox.height
    pictures = [ax.get_window_extent() for ax in fig.axes]
    for ax in fig.axes:
        for text in [ax.title, *ax.texts]:
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
                if text not in ax.texts or hasattr(text, "xyann"):
                    assert not any(box.overlaps(other) for other in boxes), text
                    boxes.append(box)
                    assert not any(box.overlaps(p) and box.y0 + 1 < p.y1 for p in pictures), text


# ---------------------------------------------------------------- lines


def test_found_missed_and_false_labels_with_their_probabilities():
    got = prediction_lines([0.93, 0.12, 0.71, 0.05], [1, 0, 1, 0], [1, 1, 0, 0], NAMES)
    assert got == [("✓ Nucleoplasm .93", FOUND), ("✗ missed Golgi .12", MISSED), ("+ false Cytosol .71", FALSE)]
    assert len({FOUND, MISSED, FALSE}) == 3


def test_likeliest_first_within_a_kind():
    got = prediction_lines([0.6, 0.999, 0.2, 0.3], [1, 1, 0, 0], [1, 1, 1, 1], NAMES)
    assert [t for t, _ in got] == ["✓ Golgi 1.00", "✓ Nucleoplasm .60", "✗ missed Nucleoli .30", "✗ missed Cytosol .20"]


def test_lines_without_labels_without_targets_and_without_probabilities():
    assert prediction_lines([0.1] * 4, [0] * 4, [0] * 4, NAMES) == [("✓ no label", FOUND)]
    assert prediction_lines([0.1] * 4, [0] * 4, None, NAMES) == [("no label", "gray")]
    assert prediction_lines([0.1, 0.8, 0.9, 0], [0, 1, 1, 0], None, NAMES) == [
        ("Cytosol .90", "black"),
        ("Golgi .80", "black"),
    ]
    assert prediction_lines(None, [1, 0, 0, 1], [1, 1, 0, 0], NAMES) == [
        ("✓ Nucleoplasm", FOUND),
        ("✗ missed Golgi", MISSED),
        ("+ false Nucleoli", FALSE),
    ]


def test_too_many_lines_are_counted():
    got = prediction_lines(None, [1] * 12, [1] * 12, [str(i) for i in range(12)], most=5)
    assert [t for t, _ in got] == ["✓ 0", "✓ 1", "✓ 2", "✓ 3", "and 8 more"]
    assert len(prediction_lines(None, [1] * 5, [1] * 5, list("abcde"), most=5)) == 5


# ---------------------------------------------------------------- drawing


def test_composites_with_captions():
    images = [image() for _ in range(5)]
    captions = [[("one", "black")], [("a", FOUND), ("b", FALSE), ("c", MISSED)], [], [("d", "gray")] * 2, []]
    axes = draw_images(images, captions)
    assert len(axes) == 5 and all(len(ax.images) == 1 for ax in axes)
    for ax, img, caption in zip(axes, images, captions, strict=True):
        assert np.array_equal(picture(ax), img.composite()) and lines(ax) == caption
    inside(plt.gcf())


def test_single_channels_and_stretch():
    images = [image() * 0.3 for _ in range(2)]
    for channels in ("green", ("green",), 1):
        axes = draw_images(images, [[], []], channels=channels)
        assert np.array_equal(picture(axes[0]), images[0].composite(["green"])) and not picture(axes[0])[..., 0].any()
    axes = draw_images(images, [[], []], channels=("red", "blue"), stretch=99)
    assert np.array_equal(picture(axes[1]), images[1].composite(["red", "blue"], stretch=99))
    axes = draw_images(images, [[], []], channels=np.int64(1))
    assert np.array_equal(picture(axes[0]), images[0].composite(np.int64(1)))
    assert np.array_equal(picture(axes[0]), images[0].composite("green"))
    with pytest.raises(ValueError, match="no channel 'violet'"):
        draw_images(images, [[], []], channels="violet")


@pytest.mark.parametrize("channels", [None, ("blue", "green")])
def test_split_draws_the_composite_and_each_channel_with_its_name(channels):
    images, names = [image() for _ in range(3)], channels or ("red", "green", "blue", "yellow")
    axes = draw_images(images, [[("label", "black")]] * 3, channels=channels, split=True)
    n = 1 + len(names)
    assert len(axes) == 3 * n
    for i, img in enumerate(images):
        row = axes[i * n : (i + 1) * n]
        assert lines(row[0]) == [("label", "black")] and np.array_equal(picture(row[0]), img.composite(channels))
        for ax, name in zip(row[1:], names, strict=True):
            assert np.array_equal(picture(ax), img.composite([name])) and [t.get_text() for t in ax.texts] == [name]
        assert len({round(ax.get_position().y0, 6) for ax in row}) == 1  # one image to a row
    inside(plt.gcf())


@pytest.mark.parametrize("split", ["green", ("blue", 1)])
def test_split_into_some_channels_two_images_to_a_row(split):
    images, names = [image() for _ in range(4)], ["green"] if split == "green" else ["blue", "green"]
    axes = draw_images(images, [[("label", "black")]] * 4, split=split, ncols=2)
    n = 1 + len(names)
    assert len(axes) == 4 * n and len({round(ax.get_position().y0, 6) for ax in axes}) == 2
    for i, ax in enumerate(axes):
        drawn = [names[i % n - 1]] if i % n else None
        assert np.array_equal(picture(ax), images[i // n].composite(drawn))
    inside(plt.gcf())


@pytest.mark.parametrize("channels", [None, ("yellow", "red"), "red"])
def test_colours_are_those_of_the_composite_in_panels_too(channels):
    x = image()
    drawn = channels or x.channels
    drawn = (drawn,) if isinstance(drawn, str) else drawn
    colors = ["cyan", (1.0, 0.2, 0.4), "gray", "orange"][: len(drawn)]
    first, *panels = draw_images([x], [[]], channels=channels, split=True, colors=colors)
    assert np.array_equal(picture(first), x.composite(drawn, colors=colors))
    for ax, name, color in zip(panels, drawn, colors, strict=True):
        assert np.array_equal(picture(ax), x.composite(name, colors=[color]))
    panels = draw_images([x], [[]], channels=channels, split=(drawn[-1], "green"), colors=colors)[1:]
    wanted = [colors[-1], colors[1] if channels is None else "lime"]  # one that is not drawn has its usual colour
    for ax, name, color in zip(panels, (drawn[-1], "green"), wanted, strict=True):
        assert np.array_equal(picture(ax), x.composite(name, colors=[color]))
    for wrong in (colors[1:], [*colors, "red"]):
        with pytest.raises(ValueError, match=f"one for each of the {len(drawn)} channels"):
            draw_images([x], [[]], channels=channels, split=True, colors=wrong)


def test_a_title_has_room_of_its_own():
    captions = [[(f"line {i}", "black") for i in range(n)] for n in (0, 8, 1)]
    heights = []
    for title in (None, "All of them"):
        draw_images([image() for _ in captions], captions, title=title)
        heights.append(plt.gcf().get_figheight())
        assert [t.get_text() for t in plt.gcf().texts] == [title] * (title is not None)
        inside(plt.gcf())
    assert heights[1] > heights[0]
    draw_images([image()], [[("x", "black")]], title="Small", figsize=(3, 3))
    assert tuple(plt.gcf().get_size_inches()) == (3, 3)
    inside(plt.gcf())


def test_wide_lines_are_written_smaller_and_never_into_the_next_picture():
    wide = [(f"✗ missed Microtubule organizing center, {tail} .42", MISSED) for tail in ("", "and its neighbours")]
    for lines_ in (wide, [*wide, ("✓ short", FOUND)]):
        for options in ({}, {"split": True, "ncols": 2}):
            draw_images([image() for _ in range(4)], [lines_] * 4, **options)
            inside(plt.gcf())
    sizes = [ax.title.get_fontsize() for ax in draw_images([image()] * 2, [wide, [("short", "black")]])]
    assert sizes[0] < 8 and sizes[1] == 8


def test_an_image_without_names_of_channels_can_be_split():
    plain = TensorMultiChannel(torch.rand(2, 5, 5))
    axes = draw_images([plain], [[]], split=True)
    assert [t.get_text() for ax in axes[1:] for t in ax.texts] == ["0", "1"]


def test_rows_columns_size_and_given_axes():
    images, captions = [image() for _ in range(6)], [[("x", "black")]] * 6
    axes = draw_images(images, captions, ncols=3)
    assert len({round(ax.get_position().x0, 6) for ax in axes}) == 3
    axes = draw_images(images, captions, nrows=1)
    assert len({round(ax.get_position().x0, 6) for ax in axes}) == 6
    axes = draw_images(images, captions, figsize=(6, 4))
    assert tuple(plt.gcf().get_size_inches()) == (6, 4)
    inside(plt.gcf())
    given = list(plt.subplots(2, 3)[1].flat)
    assert draw_images(images, captions, given) == given and lines(given[5]) == [("x", "black")]
    with pytest.raises(ValueError, match="5 axes for 6 images of 1 panels"):
        draw_images(images, captions, given[:5])


def test_tall_images_and_long_captions_do_not_overlap():
    long = [(f"+ false {name}", FALSE) for name in HPA_LABELS[:7]] + [("✓ end", FOUND)]
    draw_images([image(h=12, w=6) for _ in range(4)], [long, long, long[:1], []])
    inside(plt.gcf())
    draw_images([image(h=6, w=12) for _ in range(4)], [long, [], long[:3], long], ncols=2)
    inside(plt.gcf())


# ---------------------------------------------------------------- fastai's calls


def load(hpa, **kwargs) -> HPADataLoaders:
    return HPADataLoaders.from_csv(hpa, size=32, bs=16, batch_tfms=[], num_workers=0, shuffle=False, **kwargs)


def wanted(dls) -> list[list[str]]:
    return [[HPA_LABELS[int(v)] for v in row.split()] for row in dls.valid_ds.items["Target"]]


def test_show_batch_names_the_labels_and_takes_the_options(hpa):
    dls = load(hpa, vocab="hpa", label_names="hpa")
    dls.valid.show_batch(max_n=4, channels="green")
    axes = plt.gcf().axes
    assert len(axes) == 4
    for ax, names, (img, _) in zip(axes, wanted(dls), dls.valid_ds, strict=False):
        assert sorted(ax.get_title().split(";\n")) == sorted(names)
        assert np.abs(picture(ax) - img.composite(["green"])).max() < 0.01
    inside(plt.gcf())
    dls.valid.show_batch(max_n=2, split=True, stretch=99)
    assert len(plt.gcf().axes) == 10


def test_show_results_marks_every_label(hpa):
    dls = load(hpa, vocab="hpa", label_names="hpa")
    probs = np.full(28, 0.1, dtype=np.float32)
    probs[[0, 25]] = 0.9
    learn = Learner(dls, Fixed(probs), loss_func=BCEWithLogitsLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.show_results(max_n=6, shuffle=False)
    axes = plt.gcf().axes
    assert len(axes) == 6
    given = {"Nucleoplasm", "Cytosol"}
    for ax, names in zip(axes, wanted(dls), strict=False):
        want = {("✓ " + n, FOUND) for n in given & set(names)}
        want |= {("✗ missed " + n, MISSED) for n in set(names) - given}
        assert set(lines(ax)) == want | {("+ false " + n, FALSE) for n in given - set(names)}


def predictions(learn, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return show_predictions(learn, shuffle=False, **kwargs)


def test_show_predictions_multi_label(hpa):
    dls = load(hpa, vocab="hpa", label_names="hpa")
    probs = np.linspace(0.01, 0.55, 28, dtype=np.float32)  # above 0.5: labels 26 and 27
    learn = Learner(dls, Fixed(probs), loss_func=BCEWithLogitsLossFlat())

    def check(axes, thresh, n=5):
        assert len(axes) == n
        for ax, names in zip(axes, wanted(dls), strict=False):
            want = set()
            for name, p, t in zip(HPA_LABELS, probs, np.broadcast_to(thresh, 28), strict=True):
                text = f"{name} {p:.2f}".replace(" 0.", " .")
                if p > t or name in names:
                    kind = (
                        ("✓ ", FOUND)
                        if p > t and name in names
                        else ("+ false ", FALSE)
                        if p > t
                        else ("✗ missed ", MISSED)
                    )
                    want.add((kind[0] + text, kind[1]))
            assert set(lines(ax)) == want

    check(predictions(learn, max_n=5), 0.5)
    learn.loss_func.thresh = 0.52
    check(predictions(learn, max_n=5), 0.52)
    own = np.where(np.arange(28) % 9 == 3, 0.0, 0.99)
    learn.loss_func.thresh = torch.tensor(own)
    check(predictions(learn, max_n=5), own)
    assert len(predictions(learn, max_n=2, split=True)) == 10
    inside(plt.gcf())
    learn.loss_func.thresh = torch.tensor([0.5] * 3)
    with pytest.raises(ValueError, match="one per label"):
        predictions(learn)


def test_every_image_gets_its_own_predictions(hpa):
    dls = load(hpa, vocab="hpa", label_names="hpa")
    model = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 28))
    nn.init.normal_(model[-1].weight)
    learn = Learner(dls, model, loss_func=BCEWithLogitsLossFlat())
    axes = predictions(learn, max_n=6)
    with learn.no_bar(), learn.no_logging():
        probs, targets = (o.numpy() for o in learn.get_preds())
        learn.show_results(max_n=6, shuffle=False)
    assert len({(p > 0.5).tobytes() for p in probs[:6]}) > 3
    for i in range(6):
        arguments = probs[i] > 0.5, targets[i], HPA_LABELS
        assert lines(axes[i]) == prediction_lines(probs[i], *arguments)
        found, missed, false = (
            {t for t, c in lines(plt.gcf().axes[i]) if c == color} for color in (FOUND, MISSED, FALSE)
        )
        want = prediction_lines(None, *arguments, most=28)
        assert found | missed <= {t for t, _ in want} and false <= {t for t, c in want if c == FALSE}


class SigmoidOnly(nn.BCEWithLogitsLoss):
    """A loss that turns logits into probabilities, but makes no decisions."""

    def activation(self, x):
        return x.sigmoid()


def test_losses_without_decisions_or_probabilities(hpa):
    dls = load(hpa, vocab="hpa", label_names="hpa")
    learn = Learner(dls, Fixed([0.7] + [0.2] * 27), loss_func=SigmoidOnly())
    ax = predictions(learn, dl=dls.test_dl(dls.valid_ds.items), max_n=1)[0]
    assert lines(ax) == [("Nucleoplasm .70", "black")]
    learn.loss_func = nn.BCEWithLogitsLoss()  # no activation: a loss of logits
    assert lines(predictions(learn, dl=dls.test_dl(dls.valid_ds.items), max_n=1)[0]) == [("Nucleoplasm .70", "black")]
    learn.loss_func = nn.MSELoss()  # a loss of the outputs themselves
    with pytest.raises(ValueError, match=r"\(MSELoss\) run from -1\.39 to 0\.847: give probabilities"):
        predictions(learn)


def test_show_predictions_without_labels(hpa):
    dls = load(hpa, vocab="hpa", label_names="hpa")
    probs = np.full(28, 0.1, dtype=np.float32)
    probs[7] = 0.84
    learn = Learner(dls, Fixed(probs), loss_func=BCEWithLogitsLossFlat())
    axes = predictions(learn, dl=dls.test_dl(dls.valid_ds.items), max_n=3)
    assert [lines(ax) for ax in axes] == [[("Golgi apparatus .84", "black")]] * 3


@pytest.fixture
def single(hpa, tmp_path) -> HPADataLoaders:
    """The same images with one label each: a, b or c."""
    df = pd.read_csv(hpa / "train.csv", dtype=str)
    df["Target"] = [("a", "b", "c")[i % 3] for i in range(len(df))]
    df.to_csv(hpa / "single.csv", index=False)
    return load(hpa, csv_fname="single.csv", label_delim=None, label_names={"a": "Alpha", "b": "Beta"})


def test_single_label(single):
    learn = Learner(single, Fixed([0.2, 0.7, 0.1], single=True), loss_func=CrossEntropyLossFlat())
    targets = list(single.valid_ds.items["Target"])[:6]
    assert set(targets) == {"a", "b", "c"}
    want = {
        "a": [("✗ missed Alpha .20", MISSED), ("+ false Beta .70", FALSE)],
        "b": [("✓ Beta .70", FOUND)],
        "c": [("✗ missed c .10", MISSED), ("+ false Beta .70", FALSE)],
    }
    assert [lines(ax) for ax in predictions(learn, max_n=6)] == [want[t] for t in targets]
    with learn.no_bar(), learn.no_logging():
        learn.show_results(max_n=6, shuffle=False)
    names = {"a": "Alpha", "b": "Beta", "c": "c"}
    for ax, t in zip(plt.gcf().axes, targets, strict=True):
        assert lines(ax) == [(n, FOUND if t == "b" else FALSE) for n in (names[t], "Beta")]
    single.valid.show_batch(max_n=6)
    assert [lines(ax) for ax in plt.gcf().axes] == [[(names[t], "black")] for t in targets]


@pytest.mark.parametrize("block", [MultiCategoryBlock, CategoryBlock])
def test_a_plain_data_block(hpa, block):
    ids = sorted({f.name.rsplit("_", 1)[0] for f in (hpa / "train").iterdir()})[:12]
    label = {i: "ab"[k % 2] for k, i in enumerate(ids)}
    db = DataBlock(
        blocks=(MultiChannelBlock(ImageSet(".", size=16)), block),
        get_x=lambda i: hpa / "train" / i,
        get_y=lambda i: label[i] if block is CategoryBlock else [label[i]],
    )
    dls = db.dataloaders(ids, bs=4, num_workers=0)
    dls.show_batch(max_n=2)
    assert {ax.get_title() for ax in plt.gcf().axes} <= {"a", "b"} and len(plt.gcf().axes) == 2
    loss = CrossEntropyLossFlat() if block is CategoryBlock else BCEWithLogitsLossFlat()
    learn = Learner(dls, Fixed([0.9, 0.1], single=block is CategoryBlock), loss_func=loss)
    for ax in predictions(learn, max_n=2):
        assert lines(ax) in ([("✓ a .90", FOUND)], [("✗ missed b .10", MISSED), ("+ false a .90", FALSE)])


def test_shown_names(hpa):
    assert shown_names(load(hpa, vocab="hpa"), 28) == list(HPA_LABELS)
    assert shown_names(load(hpa, vocab="hpa", label_names=None), 28) == [str(i) for i in range(28)]
    assert shown_names(None, 3) == ["0", "1", "2"]


def test_colours_are_far_apart_in_brightness_or_hue():
    colors = [np.array(to_rgb(c)) for c in (FOUND, MISSED, FALSE)]
    assert min(np.abs(a - b).sum() for i, a in enumerate(colors) for b in colors[:i]) > 0.5


def test_real_fields(shared):
    dls = HPADataLoaders.from_csv(
        shared / "hpa_fields", vocab="hpa", label_names="hpa", size=64, num_workers=0, shuffle=False
    )
    learn = Learner(dls, Fixed([0.6] * 4 + [0.2] * 24), loss_func=BCEWithLogitsLossFlat())
    axes = predictions(learn, dl=dls.test_dl(dls.train_ds.items, with_labels=True), split=True)
    assert len(axes) == 5 * len(dls.train_ds)
    for ax, row in zip(axes[::5], dls.train_ds.items["Target"], strict=True):
        names = {HPA_LABELS[int(v)] for v in row.split()}
        marks = {t.split(" ", 1)[0] for t, _ in lines(ax)}
        assert {
            t.rsplit(" ", 1)[0].removeprefix("✓ ").removeprefix("✗ missed ") for t, _ in lines(ax) if t[0] != "+"
        } == names
        assert "+" in marks
    inside(plt.gcf())


def test_channels_named_by_numbers_are_drawn_by_name():
    x = TensorMultiChannel(
        torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 4, 4) * 100, channels=("2", "1", "0")
    )
    axes = draw_images([x], [[("a", "black")]], split=True)
    assert [ax.texts[-1].get_text() for ax in axes[1:]] == ["2", "1", "0"]
    shown = [float(ax.images[0].get_array().max()) for ax in axes[1:]]
    assert shown == pytest.approx([0, 100 / 255, 200 / 255])
    assert len(draw_images([x], [[("a", "black")]], channels="1")) == 1


def test_show_predictions_says_what_draws_other_images(tmp_path):
    images = TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 2)
    dls = DataLoaders.from_dsets(images, images, bs=4, num_workers=0, device="cpu")
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), CrossEntropyLossFlat(), path=tmp_path)
    with pytest.raises(ValueError, match=r"draws TensorMultiChannel images.*learn\.show_results\(\) draws those"):
        predictions(learn)
