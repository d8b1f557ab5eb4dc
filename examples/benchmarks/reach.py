"""Which labels does the method reach? Share of batches in which each label is mined, by batch size and sampler.

    python reach.py --csv train.csv          # Id,Target, as in the Human Protein Atlas competition
    python reach.py                          # synthetic: independent labels with the frequencies of HPA 2018

Prints tables and saves a heat map. Nothing is trained: labels are all it takes.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastcore.script import call_parse

from fastai_crl.data.annotations import Annotations
from fastai_crl.hpa import HPA_COUNTS, HPA_N_IDS
from fastai_crl.losses.crl_loss import CRL
from fastai_crl.mining.mine import minority_classes
from fastai_crl.samplers import ClassAwareSampler, RepeatFactorSampler

SAMPLERS = ("uniform", "repeat factor", "class-aware")


def read_labels(csv: str | None) -> tuple[np.ndarray, list[str], str]:
    """Labels (n, C) bool, their names, and what they are."""
    if csv is not None:
        rows = Annotations.from_csv(csv)
        return rows.targets().toarray(), rows.vocab(), Path(csv).name
    rng, y = np.random.default_rng(0), np.zeros((HPA_N_IDS, len(HPA_COUNTS)), bool)
    for c, count in enumerate(HPA_COUNTS):
        y[rng.choice(len(y), count, replace=False), c] = True
    return y, [str(c) for c in range(len(HPA_COUNTS))], "SYNTHETIC labels, independent, frequencies of HPA 2018"


def draw(name: str, y: np.ndarray, bs: int, least: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Batches (T, bs) of whole epochs, T >= least; the epoch's length in data sets; draws per sample and epoch (n,)."""
    n = len(y)
    if name == "uniform":
        rng = np.random.default_rng(0)
        epoch, length = (lambda e: rng.permutation(n)), n
    else:
        sampler = RepeatFactorSampler(y) if name == "repeat factor" else ClassAwareSampler(y)
        epoch, length = sampler.indices, len(sampler)
    whole = max(1, length // bs)
    epochs = [epoch(e) for e in range(-(-least // whole))]
    draws = sum(np.bincount(e, minlength=n) for e in epochs) / len(epochs)
    return np.concatenate([e[: whole * bs].reshape(-1, bs) for e in epochs]), length / n, draws


def mined_share(y: np.ndarray, batches: np.ndarray, rho: float, scope: str, of_set: bool = False) -> np.ndarray:
    """Share of the batches in which each label is mined, (C,); `of_set`: profiled in the order of the set's counts."""
    frequency = torch.from_numpy(y.sum(0)) if of_set else None
    return np.mean(
        [minority_classes(torch.from_numpy(y[b]), rho, scope, frequency=frequency).numpy() for b in batches], 0
    )


def gradient_share(y: np.ndarray, batches: np.ndarray, rho: float, scope: str, n: int = 200) -> np.ndarray:
    """Share of each label in the sum of |gradient| of the CRL term on random normal logits, over n batches, (C,)."""
    torch.manual_seed(0)
    total, term = torch.zeros(y.shape[1]), CRL(rho=rho, scope=scope)
    for b in batches[np.linspace(0, len(batches) - 1, n).astype(int)]:
        logits = torch.randn(len(b), y.shape[1], requires_grad=True)
        total += torch.autograd.grad(term(logits, torch.from_numpy(y[b]).float()), logits)[0].abs().sum(0)
    return (total / total.sum().clamp_min(1e-12)).numpy()


def plot(tables: dict[str, pd.DataFrame], title: str, out: str) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(tables), figsize=(3.1 * len(tables), 8.5), sharey=True, layout="constrained")
    for ax, (name, table) in zip(np.atleast_1d(axes), tables.items(), strict=True):
        image = ax.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        ax.set(title=name, xlabel="batch size", xticks=range(table.shape[1]), xticklabels=table.columns)
        ax.set(yticks=range(len(table)), yticklabels=[" ".join(map(str, i)) for i in table.index])
        for i, row in enumerate(table.to_numpy()):
            for j, v in enumerate(row):
                ax.text(
                    j,
                    i,
                    f"{v:.2f}".removeprefix("0"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="w" if v < 0.6 else "k",
                )
    fig.suptitle(f"Share of batches in which each label is mined\n{title}")
    fig.colorbar(image, ax=axes, shrink=0.4)
    fig.savefig(out, dpi=130)


@call_parse
def main(
    csv: str | None = None,  # csv with a column Target of labels between blanks; none: synthetic labels
    scope: str = "joint",  # "joint" or "attribute"
    rho: float = 0.5,  # largest share of the batch that the minority makes up
    sizes: str = "16,32,64,128,256,512",  # batch sizes
    grad_bs: int = 64,  # batch size of the gradient shares
    least: int = 500,  # batches, at least, behind every figure (whole epochs)
    out: str = "reach.png",  # picture to save
):
    """Share of batches in which each label is mined, by batch size and sampler."""
    pd.set_option("display.width", 250, "display.max_columns", 50, "display.max_rows", 500)
    torch.set_num_threads(1)
    y, names, what = read_labels(csv)
    bs_all, count = [int(s) for s in sizes.split(",")], y.sum(0)
    index = pd.MultiIndex.from_arrays([names, count], names=["label", "images"])
    by_count = np.argsort(-count, kind="stable")
    reach, of_set, price, gradient = {}, {}, {}, {}
    for name in SAMPLERS:
        for bs in bs_all:
            batches, length, draws = draw(name, y, bs, least)
            reach[name, bs] = mined_share(y, batches, rho, scope)
            of_set[name, bs] = mined_share(y, batches, rho, "joint", of_set=True)
            rare = draws[y[:, by_count[-1]]]
            price[name, bs] = {
                "epoch / images": length,
                f"draws of an image of {names[by_count[-1]]}": rare.mean(),
                "least": rare.min(),
                "most": rare.max(),
                "of the commonest label": draws[y[:, by_count[0]]].mean(),
            }
            if bs == grad_bs:
                gradient[name] = gradient_share(y, batches, rho, scope)
    print(f"{what}: {len(y)} images, {y.shape[1]} labels; scope={scope}, rho={rho}\n")
    fits = [min(1.0, int(rho * bs) // 2 / y.shape[1]) if scope == "joint" else 1.0 for bs in bs_all]
    ceiling = pd.DataFrame([fits], [("ceiling", "of an even share")], bs_all)
    tables = {}
    for name in SAMPLERS:
        table = tables[name] = pd.DataFrame({bs: reach[name, bs] for bs in bs_all}, index).iloc[by_count]
        low = pd.DataFrame([(table / fits).min()], [("lowest", "/ ceiling")])
        never = pd.DataFrame([(table == 0).sum().astype(float)], [("labels", "never mined")])
        print(f"Share of batches in which each label is mined: {name}")
        print(pd.concat([ceiling, table, low, never]).to_string(float_format="{:.3f}".format), "\n")
    print("The same, minority by the training set's frequencies instead of the batch's (joint)")
    alternative = pd.DataFrame({(k, bs): v for (k, bs), v in of_set.items()}, index).iloc[by_count]
    print(alternative.to_string(float_format="{:.2f}".format), "\n")
    print(f"Share of each label in the sum of |gradient| of the CRL term, random normal logits, batches of {grad_bs}")
    if gradient:
        print(pd.DataFrame(gradient, index).iloc[by_count].to_string(float_format="{:.4f}".format), "\n")
    print("The price: length of an epoch, and how often it draws images")
    print(pd.DataFrame(price).T.to_string(float_format="{:.2f}".format))
    plot(tables, f"{what}; {scope} scope", out)
    print(f"\nPicture: {out}")
