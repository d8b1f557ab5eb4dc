"""What class rectification costs: forward and backward of the loss term, against other ways to compute it.

    python mining.py            # everything; on two CPU cores some minutes
    python mining.py --quick    # small sizes, few runs

Prints, in one run:

1. time and peak memory over the batch size, with labels as frequent as in HPA 2018, of `CRL` as published and ranking,
   eager and compiled; the whole loss, `CRLLoss`; the published term as a Python loop over anchors, in the steps of a
   2019 article on it but correct (all positives and negatives of the batch in two lists, of which each anchor takes its
   label's, sorts them and lays out the grid of its triplets), and as a *lean loop* that does no more than it must; the
   same as dense tensor operations over all anchors x κ x κ triplets; pytorch-metric-learning's all-triplets and
   batch-hard miners with its triplet loss, label by label on the scores (*another loss*: what one would reach for
   instead); binary cross entropy;
2. `CRL` over κ;
3. 10,000 labels, of which each sample has five;
4. the six variants, and ranking;
5. with a GPU: that nothing synchronises, beside all of the above on it.

Time is the median over runs, the rivals in turns so that a busy machine treats them alike, and each once before it is
timed in its turn, so that none pays for the caches that another filled. Memory is the
most that was allocated beyond the inputs during one forward and backward: on a GPU the allocator's own peak, on a CPU
the peak of the running balance of the profiler's allocation events.

The article: https://gdmacmillan.github.io/2019/01/22/Imbalanced_Class_Deep_Learning_Building_Loss_Function
"""

import csv
import datetime
import math
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter

import torch
from fastcore.script import call_parse, store_true
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.profiler import ProfilerActivity, profile

from fastai_crl.hpa import HPA_COUNTS, HPA_N_IDS
from fastai_crl.losses import CRL, CRLLoss
from fastai_crl.losses.criteria import CRITERIA

MOST_BYTES = 4 * 2**30  # a rival is skipped where one of its tensors alone would take more
PATIENCE = 20.0  # seconds: a rival that takes longer than this for one run is not run at larger sizes


def batch(n, device, seed=0):
    """Logits and multi-label targets as frequent as those of HPA 2018."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.tensor(HPA_COUNTS) / HPA_N_IDS
    targets = (torch.rand(n, len(HPA_COUNTS), generator=generator) < frequency).float()
    return (torch.randn(n, len(HPA_COUNTS), generator=generator) - 2).to(device), targets.to(device)


def minority(targets, rho=0.5):
    """Minority labels of a batch, by a loop."""
    h, total = targets.sum(0).tolist(), 0
    for c in sorted(range(len(h)), key=lambda c: (h[c], c)):
        total += h[c]
        if total > rho * len(targets):
            return
        if h[c] >= 2:
            yield c


def loop(logits, targets, k, margin=0.5):
    """The term, one anchor after the other, as the article goes about it."""
    labels = torch.tensor(list(minority(targets)), dtype=torch.long, device=logits.device)
    scores, member = logits.sigmoid()[:, labels], targets[:, labels] == 1
    positives, negatives, own = member.nonzero(), (~member).nonzero(), scores[member]
    triplets = []
    for a, (_, label) in enumerate(positives):
        is_other = positives[:, 1] == label
        is_other[a] = False
        near, far = positives[is_other], negatives[negatives[:, 1] == label]
        near = scores[near[:, 0], near[:, 1]].sort().values[:k]
        far = scores[far[:, 0], far[:, 1]].sort(descending=True).values[:k]
        grid = torch.cartesian_prod(*(torch.arange(len(x), device=far.device) for x in (near, far)))
        triplets.append(torch.stack([own[a].expand(len(grid)), near[grid[:, 0]], far[grid[:, 1]]], 1))
    if not triplets:
        return logits.sum() * 0
    p_anchor, p_near, p_far = torch.cat(triplets).unbind(1)
    return (margin + (p_anchor - p_near).abs() - (p_anchor - p_far)).clamp_min(0).mean()


def lean_loop(logits, targets, k, margin=0.5):
    """The same with only what it takes."""
    scores, total, triplets = logits.sigmoid(), 0.0, 0
    for c in minority(targets):
        positives, negatives = (targets[:, c] == 1).nonzero().flatten(), (targets[:, c] == 0).nonzero().flatten()
        p = scores[:, c]
        for a in positives:
            others = positives[positives != a]
            hard_pos = p[others].topk(min(k, len(others)), largest=False).values
            hard_neg = p[negatives].topk(min(k, len(negatives))).values
            to_pos, to_neg = (p[a] - hard_pos).abs(), p[a] - hard_neg
            total = total + (margin + to_pos[:, None] - to_neg[None]).clamp_min(0).sum()
            triplets += len(hard_pos) * len(hard_neg)
    return total / max(triplets, 1)


def dense(logits, targets, k, margin=0.5):
    """The loss, all anchors of a label at once: anchors x κ x κ."""
    scores, total, triplets = logits.sigmoid(), 0.0, 0
    for c in minority(targets):
        p, member = scores[:, c], targets[:, c] == 1
        inside, outside = p[member], p[~member]
        m = len(inside)
        others = inside.expand(m, m).masked_fill(torch.eye(m, dtype=torch.bool, device=p.device), math.inf)
        hard_pos = others.topk(min(k, m - 1), largest=False).values
        hard_neg = outside.topk(min(k, len(outside))).values
        to_pos, to_neg = (inside[:, None] - hard_pos).abs(), inside[:, None] - hard_neg
        hinge = (margin + to_pos[:, :, None] - to_neg[:, None, :]).clamp_min(0)
        total, triplets = total + hinge.sum(), triplets + hinge.numel()
    return total / max(triplets, 1)


def dense_bytes(targets, k):
    return max((4 * h * min(h, k) * k for h in targets[:, list(minority(targets))].sum(0).tolist()), default=0)


def metric_learning(miner):
    """pytorch-metric-learning: a miner and its triplet loss, on each minority label's scores as 1-d embeddings."""
    from pytorch_metric_learning import distances, losses, miners

    distance = distances.LpDistance(normalize_embeddings=False)
    find = (
        miners.TripletMarginMiner(margin=0.5, type_of_triplets="all", distance=distance)
        if miner == "all triplets"
        else miners.BatchHardMiner(distance=distance)
    )
    compare = losses.TripletMarginLoss(margin=0.5, distance=distance)

    def loss(logits, targets):
        scores, total = logits.sigmoid(), logits.sum() * 0
        for c in minority(targets):
            embeddings, labels = scores[:, c : c + 1], targets[:, c].long()
            total = total + compare(embeddings, labels, find(embeddings, labels))
        return total

    return loss


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def step(loss, logits, targets):
    """Forward and backward; the loss."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, targets)
    if value.requires_grad:
        value.backward()
    return value.detach()


def timed(loss, logits, targets):
    """Seconds of one step."""
    device = logits.device.type
    synchronize(device)
    start = time.perf_counter()
    step(loss, logits, targets)
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(loss, logits, targets):
    """The most that one step allocates beyond its inputs."""
    if logits.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, logits, targets)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(loss, logits, targets)
    balance = peak = 0
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        balance += event.nbytes()
        peak = max(peak, balance)
    return peak


def compare(rivals, logits, targets, runs):
    """Median seconds and peak bytes of each rival, {name: (s, B)}; runs are interleaved.

    A rival that takes long gets fewer runs: as many as fit in about `PATIENCE` seconds, but one at least.
    """
    cost, times = {}, {name: [] for name in rivals}
    for name, loss in rivals.items():
        cost[name] = timed(loss, logits, targets)  # the first run may compile
    for i in range(runs):
        for name, loss in rivals.items():
            if i == 0 or 2 * i * cost[name] < PATIENCE / 2:
                timed(loss, logits, targets)
                times[name].append(timed(loss, logits, targets))
                cost[name] = statistics.median(times[name])
    return {name: (statistics.median(times[name]), peak_bytes(loss, logits, targets)) for name, loss in rivals.items()}


def milliseconds(seconds):
    return f"{seconds * 1e3:,.2f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def mebibytes(size):
    return f"{size / 2**20:,.1f}"


TABLES = []


def table(title, header, rows):
    """Print and keep a markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * w for w in widths], *rows]
    text = "\n".join("| " + " | ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines)
    print(f"\n{title}\n\n{text}", flush=True)
    TABLES.append((title, header, rows, text))


def compiled(loss):
    return torch.compile(loss, fullgraph=True)


def by_size(sizes, k, runs, device, use_compiler):
    """Table 1."""
    names = ["loop", "lean loop", "dense", "pml all triplets", "pml batch hard"]
    rows, compile_seconds, tired = [], {}, set()
    for n in sizes:
        logits, targets = batch(n, device)
        loss = CRLLoss(torch.nn.BCEWithLogitsLoss(), alpha=0.5, k=k)
        ours = {"CRL": CRL(k), "CRL, ranking": CRL(k, criterion="ranking"), "CRLLoss": loss}
        if use_compiler:
            torch._dynamo.reset()
            start = time.perf_counter()
            ours |= {f"{name}, compiled": compiled(term) for name, term in list(ours.items())}
            step(ours["CRL, compiled"], logits, targets)
            compile_seconds[n] = time.perf_counter() - start
        others = {
            "loop": lambda x, y: loop(x, y, k),
            "lean loop": lambda x, y: lean_loop(x, y, k),
            "dense": lambda x, y: dense(x, y, k),
            "pml all triplets": metric_learning("all triplets"),
            "pml batch hard": metric_learning("batch hard"),
        }
        largest = {"dense": dense_bytes(targets, k), "pml all triplets": 15 * n**3}  # measured at 128 to 384
        too_large = {name for name, size in largest.items() if size > MOST_BYTES}
        rivals = {"bce": bce} | ours | {name: f for name, f in others.items() if name not in tired | too_large}
        value = step(ours["CRL"], logits, targets)
        same = {"CRL, compiled", "loop", "lean loop", "dense"}
        for name in same & set(rivals):
            torch.testing.assert_close(step(rivals[name], logits, targets), value, rtol=1e-3, atol=1e-4)
        result = compare(rivals, logits, targets, runs)
        tired |= {name for name in names if name in result and result[name][0] > PATIENCE / 4}
        for name in [*ours, *names, "bce"]:
            if name in result:
                seconds, size = result[name]
                relative = (
                    f"{result[base][0] / seconds:.1f}" if base in result else "" for base in ("loop", "lean loop")
                )
                rows.append(
                    [n, name, milliseconds(seconds), mebibytes(size), *relative, f"{seconds / result['bce'][0]:.1f}"]
                )
            else:
                rows.append([n, name, "n/a: memory" if name in too_large else "n/a: time", "", "", "", ""])
    title = (
        f"1. Forward + backward over the batch size, {len(HPA_COUNTS)} labels as frequent as in HPA, k={k}. "
        "'loop x', 'lean x': how many times as long those loops take. pml (pytorch-metric-learning) is another loss."
    )
    if use_compiler:
        title += "\n   Compiling the published term took " + ", ".join(
            f"{s:.0f} s (n={n})" for n, s in compile_seconds.items()
        )
    table(title, ["n", "what", "ms", "peak MiB", "loop x", "lean x", "x bce"], rows)


def by_k(n, ks, runs, device, use_compiler):
    """Table 2."""
    logits, targets = batch(n, device)
    rivals = {("CRL", k): CRL(k) for k in ks} | {("CRL, ranking", k): CRL(k, criterion="ranking") for k in ks}
    if use_compiler:
        torch._dynamo.reset()
        rivals |= {("CRL, compiled", k): compiled(CRL(k)) for k in (ks[0], ks[-1])}
    result = compare(rivals, logits, targets, runs)
    rows = [
        [kind, k, milliseconds(s), mebibytes(size), f"{s / result[kind, ks[0]][0]:.2f}"]
        for (kind, k), (s, size) in result.items()
    ]
    table(f"2. Over k, n={n}.", ["what", "k", "ms", "peak MiB", f"x k={ks[0]}"], rows)


def sparse(n, n_classes, runs, device):
    """Table 3."""
    logits, targets, slot = torch.randn(n, n_classes), torch.zeros(n, n_classes), torch.arange(5 * n)
    targets[slot % n, slot // 3 % n_classes] = 1
    logits, targets = logits.to(device), targets.to(device)
    rivals = {"bce": bce}
    for scope in ("joint", "attribute"):
        rivals |= {f"CRL, {name}, {scope} scope": CRL(scope=scope, criterion=name) for name in ("relative", "ranking")}
    result = compare(rivals, logits, targets, min(runs, 5))
    rows = [[name, milliseconds(seconds), mebibytes(size)] for name, (seconds, size) in result.items()]
    title = f"3. {n_classes:,} labels, five a sample and three samples each, n={n}, k=25."
    table(title, ["what", "ms", "peak MiB"], rows)


def variants(n, runs, device):
    """Table 4."""
    logits, targets = batch(n, device)
    features = torch.randn(n, 512, generator=torch.Generator().manual_seed(0)).to(device)
    rivals = {"bce": bce}
    for level in ("class", "instance"):
        for criterion in (name for name, c in CRITERIA.items() if level in c.levels):
            crl = CRL(level=level, criterion=criterion)
            rivals[f"{level} {criterion}"] = lambda x, y, crl=crl: crl(x, y, features.detach().requires_grad_())
    result = compare(rivals, logits, targets, runs)
    rows = [[name, milliseconds(s), mebibytes(b), f"{s / result['bce'][0]:.1f}"] for name, (s, b) in result.items()]
    table(
        f"4. The six variants and ranking, eager, n={n}, k=25, features of 512.",
        ["what", "ms", "peak MiB", "x bce"],
        rows,
    )


def synchronisation(n):
    """Line 5."""
    logits, targets = batch(n, "cuda")
    features = torch.randn(n, 64, device="cuda", requires_grad=True)
    for level in ("class", "instance"):
        for criterion in (name for name, c in CRITERIA.items() if level in c.levels):
            crl = CRL(level=level, criterion=criterion)
            step(lambda x, y, crl=crl: crl(x, y, features), logits, targets)
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(lambda x, y, crl=crl: crl(x, y, features), logits, targets)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    print("\n5. No variant synchronises with the host (torch.cuda.set_sync_debug_mode).")


@call_parse
def main(
    sizes: str = "32,64,128,256,512,1024,2048,4096",  # Batch sizes, comma separated
    k: int = 25,  # Hard samples per anchor
    runs: int = 15,  # Runs of each, interleaved
    threads: int = 0,  # CPU threads; 0: PyTorch's choice
    no_compile: store_true = False,  # Leave torch.compile out
    quick: store_true = False,  # Sizes 64 and 512, 5 runs, 2,000 labels in table 3
    cpu: store_true = False,  # Stay on the CPU though there is a GPU
    out: str = "",  # Write the tables to this .md or .csv file as well
):
    """Time and memory of the rectification term; see the head of the file."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    sizes, runs = ([64, 512], min(runs, 5)) if quick else ([int(n) for n in sizes.split(",")], runs)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    head = (
        f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, {where}, "
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads; medians of up to {runs} interleaved runs"
    )
    print(head)
    by_size(sizes, k, runs, device, not no_compile)
    by_k(512 if quick else 2048, [5, 25, 100, 200], runs, device, not no_compile and not quick)
    sparse(1024, 2_000 if quick else 10_000, runs, device)
    variants(512, runs, device)
    if device == "cuda":
        synchronisation(512)
    if out.endswith(".csv"):
        with open(out, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow([head])
            for title, header, rows, _ in TABLES:
                writer.writerows([[title], header, *rows])
    elif out:
        Path(out).write_text("\n\n".join([head, *(f"{title}\n\n{text}" for title, _, _, text in TABLES)]) + "\n")
