"""Train a classifier of four-channel cell images with the Class Rectification Loss, and keep what came of it.

Without arguments it draws a SYNTHETIC set (28 labels, uneven) under data/ and trains on that; with --path it trains on
a folder in the layout of the Kaggle competition: train.csv (Id,Target), train/{Id}_{channel}.png and perhaps test/.
"""

import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fastai's import calls torch functions that are to be replaced one day
    from fastai.vision import all as fastai_vision
    from fastai.vision.all import *
from fastcore.script import call_parse

from fastai_crl.all import *

FOUND, MISSED, FALSE = "#0067a5", "#c26a00", "#a1006b"  # blue, orange, purple: colours most eyes tell apart


def small_resnet(pretrained=False):
    """A ResNet of one block per stage: an epoch of a thousand small images takes seconds on a CPU."""
    return XResNet(ResBlock, 1, [1, 1, 1, 1])


class EpochTable(Callback):
    """Keep the rows of fastai's epoch table; print them too where there is no terminal to show it."""

    order = 70  # after the recorder

    def __init__(self, echo):
        self.echo, self.rows = echo, []

    def before_fit(self):
        if self.echo:
            print("  ".join(f"{name:>12}" for name in self.recorder.metric_names), flush=True)

    def after_epoch(self):
        self.rows.append(dict(zip(self.recorder.metric_names, self.recorder.log, strict=True)))
        if self.echo:
            cells = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in self.recorder.log)
            print("  ".join(f"{cell:>12}" for cell in cells), flush=True)

    def history(self):
        """One row per epoch, numbered through where training had two phases."""
        table = pd.DataFrame(self.rows)
        table["epoch"] = range(len(table))
        return table


def readable(vocab):
    """Names of the labels: those of the Human Protein Atlas for its numbers, else the labels as they are."""
    return [HPA_LABELS[int(v)] if str(v).isdecimal() and int(v) < len(HPA_LABELS) else str(v) for v in vocab]


def choose(probs, thresh=0.5):
    """Which labels to hand in: those above `thresh`, and the likeliest where there is none."""
    chosen = np.asarray(probs) > thresh
    chosen[np.arange(len(chosen)), np.asarray(probs).argmax(1)] = True
    return chosen


def gallery(images, captions, fname, title, ncols=6, most=7):
    """Save images with a caption of coloured lines above each, [(text, colour), ...]; `most` lines at the most.

    Every image is there twice: all channels together, and below it the protein of interest (green) alone.
    """
    protein = "green" in (images[0].channels or ()) and len(images[0].channels) > 1
    captions = [
        c if len(c) <= most else [*c[: most - 1], (f"and {len(c) - most + 1} more", c[-1][1])] for c in captions
    ]
    ncols = min(ncols, len(images))
    side, gap, line = 1.9, 0.1, 0.155  # inches
    rows = [range(i, min(i + ncols, len(images))) for i in range(0, len(images), ncols)]
    heights = [line * max(len(captions[i]) for i in row) + (side + gap) * (1 + protein) + gap for row in rows]
    width, height = max(6, ncols * (side + gap) + gap), sum(heights) + 0.4
    fig, top = plt.figure(figsize=(width, height)), height - 0.4
    fig.text(gap / width, 1 - 0.2 / height, title, fontsize=11, va="center")
    for row, tall in zip(rows, heights, strict=True):
        low, top = top - tall + gap, top - tall  # of the lowest picture of the row, and of the next row's upper edge
        for col, i in enumerate(row):
            left = (gap + col * (side + gap)) / width
            for level, channels in enumerate((["green"], None) if protein else (None,)):
                at = (left, (low + level * (side + gap)) / height, side / width, side / height)
                images[i].show(ctx=fig.add_axes(at), channels=channels, stretch=99.5)
            above = low + (side + gap) * (1 + protein) - gap + 0.04
            for j, (text, colour) in enumerate(reversed(captions[i])):
                fig.text(left, (above + j * line) / height, text, color=colour, fontsize=8)
    fig.savefig(fname, dpi=90)
    plt.close(fig)


def picture_batch(dls, names, fname, note):
    """Images of one training batch, augmented, as the network gets them."""
    xb, yb = dls.train.one_batch()
    images = [image for image, *_ in dls.train.decode_batch((xb, yb), max_n=12)]
    captions = [[(n, "black") for n, y in zip(names, ys, strict=True) if y] or [("no label", "gray")] for ys in yb[:12]]
    shown = "; below each image its green channel, the protein" if "green" in dls.channels else ""
    gallery(images, captions, fname, f"Images of a training batch{note}{shown}")


def picture_results(dls, probs, targets, names, fname, note):
    """Validation images with the labels that were found, missed and falsely given."""
    some = np.random.default_rng(0).permutation(len(targets))[:12]
    images = [dls.valid_ds[int(i)][0] for i in some]
    captions = []
    for wanted, given in zip(np.asarray(targets)[some] > 0.5, choose(probs)[some], strict=True):
        kinds = (("✓", FOUND, wanted & given), ("○", MISSED, wanted & ~given), ("✗", FALSE, given & ~wanted))
        captions.append(
            [(f"{mark} {names[c]}", colour) for mark, colour, which in kinds for c in np.flatnonzero(which)]
        )
    gallery(images, captions, fname, f"Random validation images{note}: ✓ found   ○ missed   ✗ false")


def picture_training(learn, history, before, report, fname, note):
    """Losses, scores and alpha over training; of each label its training images and the triplets mined."""
    fig = plt.figure(figsize=(12, max(6.5, 1.5 + 0.24 * len(report))), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.5))
    losses, scores, alphas = left.subplots(3, 1, sharex=True)
    epochs = np.arange(1, len(history) + 1)
    losses.plot(epochs, history["train_loss"], ".-", label="training (with rectification)")
    losses.plot(epochs, history["valid_loss"], ".-", label="validation (base loss alone)")
    losses.plot(epochs, history["crl_loss"].where(history["crl_triplets"] > 0), ".-", label="rectification term")
    losses.set(ylabel="loss", ylim=(0, None))
    for name, label in (("macro_f1", "macro F1"), ("mean_ap", "mean AP")):
        scores.plot([0, *epochs], [before[name], *history[name]], ".-", label=label)
    scores.set(ylabel="validation score", ylim=(0, None))
    batches, last = np.array(learn.crl.alphas), learn.default_epochs  # epochs of the last fit
    alphas.plot(len(history) + last * (np.arange(1, len(batches) + 1) / len(batches) - 1), batches)
    alphas.set(ylabel="alpha, share of\nthe rectification", ylim=(0, None), xlabel="epochs of training")
    alphas.xaxis.get_major_locator().set_params(integer=True)
    for ax in (losses, scores):
        ax.legend(fontsize=8)
    counts, mined = right.subplots(1, 2, sharey=True)
    table = report.sort_values("train")
    for ax, column, colour, title in (
        (counts, "train", "0.55", "training images\nwith the label"),
        (mined, "triplets", FOUND, "mined for the rectification,\nwhole training"),
    ):
        ax.barh(table.index, table[column], color=colour)
        ax.bar_label(ax.containers[0], [f"{v:,.0f}" for v in table[column]], fontsize=7, padding=2)
        ax.set_xlim(0, 1.25 * max(1, table[column].max()))
        ax.set_title(title, fontsize=10)
        ax.xaxis.set_visible(False)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.margins(y=0.01)
    counts.tick_params(labelsize=8)
    fig.suptitle(f"Training{note}", fontsize=11)
    fig.savefig(fname, dpi=90)
    plt.close(fig)


def scores_line(report):
    """The two scores and how many labels the network knows at all."""
    known = report[report["support"] > 0]
    return (
        f"macro F1 {report['F1'].mean():.3f}, mean AP {known['AP'].mean():.3f}, "
        f"{(known['F1'] > 0).sum()} of the {len(known)} labels in validation found at least once"
    )


if __name__ == "__main__":  # options may be written with _ as well as with -
    sys.argv[1:] = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in sys.argv[1:]]


@call_parse
def main(
    path: Path | None = None,  # a folder in Kaggle's layout; without it a SYNTHETIC set is drawn
    out: Path = "runs/hpa",  # folder to save to
    group_col: str | None = None,  # column of train.csv whose groups stay on one side of the split, such as Montage
    valid_pct: float = 0.2,  # share of the images (or groups) to validate on
    size: int = 64,  # side in pixels that images are resized to
    epochs: int = 14,  # epochs of training
    bs: int = 32,  # batch size
    lr: float = 4e-3,  # largest learning rate
    arch: str = "small",  # architecture: small (for a CPU), or a name of fastai, torchvision or timm
    pretrained: bool = False,  # start from ImageNet weights: downloads them, and trains one epoch more, frozen
    alpha: str = "auto",  # share of the rectification in the loss, 0 to 1; 0 switches it off
    criterion: str = "ranking",  # of the rectification: ranking (crl_learner's default), or the paper's relative
    seed: int = 42,  # of the split, the weights and the batches
    n: int = 1200,  # SYNTHETIC set: images to train and validate on; a tenth as many to test on
    imbalance: str = "mild",  # SYNTHETIC set: mild (20:1) or real (1171:1, as the Human Protein Atlas)
):
    """Train on four-channel images with the Class Rectification Loss."""
    quick = arch == "small"  # a few minutes only: a simple head, and little dropout and augmentation
    if pretrained and quick:
        sys.exit("--pretrained needs an --arch that has weights, such as resnet34: there are none of small.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    terminal, note = sys.stdout.isatty(), ""
    if path is None:
        drawn, note = max(size, 96), " (SYNTHETIC)"
        path = Path("data/synthetic_hpa") / f"{imbalance}_{n}_{drawn}px"
        print(f"SYNTHETIC data, drawn and not photographed: {path}", flush=True)
        make_hpa(path, n=n, n_test=n // 10, size=drawn, imbalance=imbalance, progress=terminal)
    path = Path(path)

    set_seed(seed, reproducible=True)
    split = {"valid_pct": valid_pct, "seed": seed, "group_col": group_col}
    tfms = [Dihedral()] if quick else None  # cells have no up or down
    dls = HPADataLoaders.from_csv(path, size=size, bs=bs, batch_tfms=tfms, label_names="hpa", **split)
    names, labels = readable(dls.vocab), dls.train_ds.items["Target"].str.split()
    train = np.array([sum(v in row for row in labels) for v in dls.vocab])
    print(
        f"{len(dls.train_ds)} images to train on, {len(dls.valid_ds)} to validate on, {dls.c} labels; "
        f"the commonest is in {train.max()} training images, the rarest in {train.min()}"
    )

    alpha = alpha if alpha == "auto" else float(alpha)
    set_seed(seed, reproducible=True)
    network = small_resnet if quick else getattr(fastai_vision, arch, arch)
    head = {"lin_ftrs": [], "ps": 0.1} if quick else {}
    learn = crl_learner(dls, network, alpha=alpha, pretrained=pretrained, n_epoch=epochs, criterion=criterion, **head)
    learn.path = out
    table = EpochTable(echo=not terminal)
    with ExitStack() as quiet:
        if not terminal:  # no progress bar in a log
            quiet.enter_context(learn.no_bar())
            quiet.enter_context(learn.no_logging())
        before = dict(zip(["loss", "macro_f1", "mean_ap"], learn.validate(), strict=True))
        if pretrained:
            learn.fine_tune(epochs, lr, cbs=table)
        else:
            learn.fit_one_cycle(lr_max=lr, cbs=table)
        probs, targets = learn.get_preds()
        probs, targets = probs.numpy(), targets.numpy()
        if (path / "test").is_dir():
            write_submission(learn, path / "test", out / "submission.csv", progress=terminal)
        else:
            picked = [" ".join(np.array(dls.vocab)[row]) for row in choose(probs)]
            submission = pd.DataFrame({"Id": dls.valid_ds.items["Id"], "Predicted": picked})
            submission.to_csv(out / "submission.csv", index=False)

    history, mined = table.history(), learn.crl.counts_frame().sum()
    report = label_report(probs, targets, names, triplets=mined if len(mined) else np.zeros(dls.c, int))
    report.insert(0, "train", train)
    report = report.sort_values("train", ascending=False, kind="stable")
    print(f"\nLabels, commonest first; train: images trained on, support: images validated on{note}")
    print(report.round(3).to_string(index_names=False))
    print(f"\nBefore: macro F1 {before['macro_f1']:.3f}, mean AP {before['mean_ap']:.3f} (validation)")
    print(f"After:  {scores_line(report)}")

    history.to_csv(out / "history.csv", index=False)
    report.to_csv(out / "labels.csv")
    picture_batch(dls, names, out / "batch.png", note)
    picture_results(dls, probs, targets, names, out / "results.png", note)
    picture_training(learn, history, before, report, out / "training.png", note)
    learn.export("learner.pkl")
    print(f"Saved in {out}: {', '.join(sorted(f.name for f in out.iterdir() if f.is_file()))}")
