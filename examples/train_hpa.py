"""Train a classifier of four-channel cell images with the Class Rectification Loss, and show what came of it.

Without arguments it draws a SYNTHETIC set (28 labels, uneven) under data/, with drawn_cells/ beside this file, and
trains on that; with --path it trains on a folder in the layout of the Kaggle competition: train.csv (Id,Target),
train/{Id}_{channel}.png and perhaps test/.
The same command with --alpha 0 trains without the rectification beside it; whichever run is second compares the two.
"""

import shlex
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

with warnings.catch_warnings():  # fastai's import calls it, which is to be replaced one day
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from fastai.vision import all as fastai_vision
    from fastai.vision.all import *
from fastcore.script import call_parse

from drawn_cells import make_hpa
from fastai_crl.all import *
from fastai_crl.images.show import FOUND, MISSED, draw_images
from fastai_crl.labels import shown_names

PICTURES = {
    "batch": "images of a training batch, as the network gets them",
    "results": "validation images with the labels found, missed and falsely given",
    "training": "losses, scores and alpha over training; images and triplets of each label",
    "gain": "average precision of each label against the run without rectification, rare labels first",
    "found": "rare labels found with the rectification and missed without it, an image of each",
}


def small_resnet(pretrained=False):
    """A ResNet of one block per stage: an epoch of a thousand small images takes seconds on a CPU."""
    return XResNet(ResBlock, 1, [1, 1, 1, 1])


def print_row(learn, row):
    """Print a row of the epoch table where there is no terminal to draw it."""
    if row[0] == 0:
        print("  ".join(f"{name:>12}" for name in learn.recorder.metric_names))
    print("  ".join(f"{v:>12.4f}" if isinstance(v, float) else f"{v:>12}" for v in row), flush=True)


def read_history(file):
    """Read the epochs that fastai's `CSVLogger` wrote, numbered through where training had two phases."""
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *(row for row in rows if row != header)]))
    history = pd.read_csv(file).assign(epoch=lambda table: range(len(table)))
    history.to_csv(file, index=False)
    return history


def save(file):
    """Save the current figure."""
    plt.savefig(file, dpi=90, bbox_inches="tight")
    plt.close()


def draw_training(learn, history, before, report, note):
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


def other_run(here, folder, out):
    """The interpretations with and without rectification, of which `here`, saved in `out`, is one; None if it is alone.

    Both runs are known by `folder`, that of the one with it.
    """
    plain = folder.with_name(folder.name + "_plain")
    saved = (plain if out == folder else folder) / "validation.npz"
    if not saved.is_file():
        return None
    with np.load(saved) as other:
        options = {"counts": other["counts"], "n_train": int(other["n_train"]), "thresh": other["thresholds"]}
        there = CRLInterpretation(other["probs"], other["targets"], other["names"].tolist(), **options)
    if here.names != there.names or not np.array_equal(here.targets, there.targets):
        print(f"\n{saved.parent} is a run on other images or labels, so it is not compared.")
        return None
    return (here, there) if out == folder else (there, here)


def compare(with_crl, without, out):
    """Print the labels that gained and lost most by the rectification, and draw all into the folder `out`."""
    gain = with_crl.gain(without).dropna().sort_values("AP_gain", ascending=False, kind="stable")
    n = min(5, len(gain) // 2)
    print("\nLabels gained most and lost most against the run with --alpha 0, by average precision; one seed:")
    print(pd.concat([gain[:n], gain[len(gain) - n :]]).round(3).to_string(index_names=False))
    ap, f1 = gain["AP_gain"].mean(), gain["F1_gain"].mean()
    print(f"Mean of all: AP {ap:+.3f}, F1 {f1:+.3f} (thresholds fitted on these images)")
    with_crl.plot_gain(without)
    save(out / "gain.png")


def draw_found(dls, with_crl, without, note, n=6):
    """Draw images whose rare label one run finds and the other misses, decided by thresholds fitted in each run."""
    rare = np.argsort(with_crl.counts, kind="stable")[: len(with_crl.names) // 2]
    more, less = ((a.chosen & ~b.chosen & a.targets)[:, rare] for a, b in ((with_crl, without), (without, with_crl)))
    shown = [(int(rare[j]), int(np.flatnonzero(more[:, j])[0])) for j in np.flatnonzero(more.any(0))[:n]]
    captions = [
        [
            (f"{with_crl.names[c]}, {with_crl.counts[c]:.0f} training images", "black"),
            (f"\N{CHECK MARK} found with CRL {with_crl.probs[i, c]:.2f}", FOUND),
            (f"\N{BALLOT X} missed without {without.probs[i, c]:.2f}", MISSED),
        ]
        for c, i in shown
    ]
    print(
        f"Images of the {len(rare)} rarest labels found by one run alone, with those thresholds: {more.sum()} with the "
        f"rectification, {less.sum()} without"
    )
    if shown:
        images = [dls.valid_ds[i][0] for _, i in shown]
        title = f"Rare labels, one validation image of each{note}"
        draw_images(images, captions, ncols=3, stretch=99.5, title=title)
    return bool(shown)


if __name__ == "__main__":  # options may be written with _ as well as with -
    sys.argv[1:] = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in sys.argv[1:]]


@call_parse
def main(
    path: Path | None = None,  # a folder in Kaggle's layout; without it a SYNTHETIC set is drawn
    out: Path = "runs/hpa",  # folder to save to; with --alpha 0 the same name with _plain
    label_names: str = "hpa",  # names of the labels: hpa (2018), hpa2021, or none, which shows them as written
    group_col: str | None = None,  # column of train.csv whose groups stay on one side of the split, such as Montage
    valid_pct: float = 0.2,  # share of the images (or groups) to validate on
    size: int = 64,  # side in pixels that images are resized to
    epochs: int = 14,  # epochs of training
    bs: int = 32,  # batch size
    lr: float = 4e-3,  # largest learning rate
    arch: str = "small",  # architecture: small (for a CPU), or a name of fastai, torchvision or timm
    pretrained: bool = False,  # start from ImageNet weights: downloads them, and trains one epoch more, frozen
    alpha: str = "auto",  # share of the rectification in the loss, 0 to 1; 0 switches it off, better with --pretrained
    criterion: str = "ranking",  # of the rectification: ranking (crl_learner's default), or the paper's relative
    seed: int = 42,  # of the split, the weights and the batches
    n: int = 1200,  # SYNTHETIC set: images to train and validate on; a tenth as many to test on
    imbalance: str = "mild",  # SYNTHETIC set: mild (20:1) or real (1171:1, as the Human Protein Atlas)
):
    """Train on four-channel images with the Class Rectification Loss."""
    quick = arch == "small"  # a few minutes only: a simple head, and little dropout and augmentation
    if pretrained and quick:
        sys.exit("--pretrained needs an --arch that has weights, such as resnet34: there are none of small.")
    plt.switch_backend("Agg")
    terminal, note = sys.stdout.isatty(), ""
    alpha = alpha if alpha == "auto" else float(alpha)
    folder = out = Path(out)
    if alpha == 0:
        out = folder.with_name(folder.name + "_plain")
    out.mkdir(parents=True, exist_ok=True)
    if path is None:
        drawn, note = max(size, 96), " (SYNTHETIC)"
        path = Path("data/synthetic_hpa") / f"{imbalance}_{n}_{drawn}px"
        print(f"SYNTHETIC data, drawn and not photographed: {path}", flush=True)
        make_hpa(path, n=n, n_test=n // 10, size=drawn, imbalance=imbalance, progress=terminal)
    path = Path(path)

    set_seed(seed, reproducible=True)
    split = {"valid_pct": valid_pct, "seed": seed, "group_col": group_col}
    tfms = [Dihedral()] if quick else None  # cells have no up or down
    names = None if label_names == "none" else label_names
    dls = HPADataLoaders.from_csv(path, size=size, bs=bs, batch_tfms=tfms, label_names=names, **split)
    counts = label_counts(dls)
    print(
        f"{len(dls.train_ds)} images to train on, {len(dls.valid_ds)} to validate on, {dls.c} labels; "
        f"the commonest is in {counts.max()} training images, the rarest in {counts.min()}"
    )

    set_seed(seed, reproducible=True)
    network = small_resnet if quick else getattr(fastai_vision, arch, arch)
    head = {"lin_ftrs": [], "ps": 0.1} if quick else {}
    learn = crl_learner(dls, network, alpha=alpha, pretrained=pretrained, n_epoch=epochs, criterion=criterion, **head)
    learn.path, learn.logger = out, partial(print_row, learn)
    (out / "history.csv").unlink(missing_ok=True)
    log = CSVLogger(append=True)  # fine-tuning is two fits
    with ExitStack() as quiet:
        if not terminal:  # no progress bar in a log
            quiet.enter_context(learn.no_bar())
        with learn.no_logging():
            before = dict(zip(["loss", "macro_f1", "mean_ap"], learn.validate(), strict=True))
        if pretrained:
            learn.fine_tune(epochs, lr, cbs=log)
        else:
            learn.fit_one_cycle(lr_max=lr, cbs=log)
        fitted = learn.fit_thresholds().report.mean()  # all that follows decides by a threshold of each label's own
        interp = CRLInterpretation.from_learner(learn)
        if (path / "test").is_dir():
            write_submission(learn, path / "test", out / "submission.csv", progress=terminal)
        else:
            chosen = interp.chosen.copy()
            chosen[np.arange(len(chosen)), interp.probs.argmax(1)] = True
            picked = [" ".join(np.array(dls.vocab)[row]) for row in chosen]
            submission = pd.DataFrame({"Id": dls.valid_ds.items["Id"], "Predicted": picked})
            submission.to_csv(out / "submission.csv", index=False)
        interp.names = shown_names(dls, dls.c)
        history, report = read_history(out / "history.csv"), interp.report()
        report["triplets"] = report.get("triplets", 0)  # none with --alpha 0
        report = report.sort_values("train", ascending=False, kind="stable")

        set_seed(seed)
        protein = "green" in dls.channels and len(dls.channels) > 1  # alone beside the whole
        shown = {"max_n": 12, "ncols": 3, "figsize": (12.4, 11), "stretch": 99.5, "split": protein and "green"}
        dls.show_batch(title=f"Images of a training batch{note}", **shown)
        save(out / "batch.png")
        legend = "labels \N{CHECK MARK} found   \N{BALLOT X} missed   + false"
        learn.show_results(title=f"Random validation images{note}: {legend}", **shown)
        save(out / "results.png")
        draw_training(learn, history, before, report, note)
        save(out / "training.png")

    print(f"\nLabels, commonest first; train: images trained on, support: images validated on{note}")
    print(report.round(3).to_string(index_names=False))
    known = report[report["support"] > 0]
    print(f"\nBefore: macro F1 {before['macro_f1']:.3f}, mean AP {before['mean_ap']:.3f} (validation)")
    print(
        f"After:  macro F1 {fitted['fixed']:.3f}, and {fitted['cross_fitted']:.3f} with a threshold for each label "
        f"(cross-fitted), mean AP {known['AP'].mean():.3f}, {(known['F1'] > 0).sum()} of the {len(known)} labels in "
        "validation found at least once\nAll tables and pictures, and the submission, decide by these thresholds."
    )
    report.to_csv(out / "labels.csv")
    arrays = {"probs": interp.probs, "targets": interp.targets, "names": interp.names, "thresholds": interp.thresh}
    np.savez(out / "validation.npz", **arrays, counts=interp.counts, n_train=interp.n_train)
    learn.export("learner.pkl")
    made = set(PICTURES) - {"gain", "found"}
    if (both := other_run(interp, folder, out)) is not None:
        compare(*both, folder)
        made.add("gain")
        if draw_found(dls, *both, note):
            save(folder / "found.png")
            made.add("found")

    files = {file.name for file in out.iterdir() if file.is_file()}
    print(f"\nSaved in {out}: {', '.join(sorted(f for f in files if not f.endswith('.png')))}")
    print("Pictures:")
    for name, what in PICTURES.items():
        if name in made:
            print(f"  {(folder if name in ('gain', 'found') else out) / name}.png  {what}")
    if "gain" not in made and alpha != 0:
        command = shlex.join([*sys.argv, "--alpha", "0"])
        print(f"Next, the same without rectification, and what that changes: python {command}")
    else:
        print(f"Next, your own images: python {sys.argv[0]} --path DIR")
