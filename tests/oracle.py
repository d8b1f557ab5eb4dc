"""The Class Rectification Loss as plain loops over Python numbers, written from the paper's formulas.

Slow and obvious on purpose: what `fastai_crl.mining` and `fastai_crl.losses` compute at once is compared with this.
Scores are lists of lists of numbers, or of scalar tensors where a gradient is wanted.
"""

import math


def profile(targets, rho, scope, least=2):
    """Label -> the samples of its minority side and of the other side, for the labels that are minority."""
    n, n_classes = len(targets), len(targets[0])
    sides = {}
    for c in range(n_classes):
        positives = [i for i in range(n) if targets[i][c] == 1]
        negatives = [i for i in range(n) if targets[i][c] == 0]
        if scope == "attribute" and len(positives) > len(negatives):
            positives, negatives = negatives, positives
        sides[c] = (positives, negatives)
    minority, total = {}, 0
    for c in sorted(sides, key=lambda c: (len(sides[c][0]), c)):
        size = len(sides[c][0])
        total = total + size if scope == "joint" else size
        if total <= rho * n + 1e-6 and size >= least:
            minority[c] = sides[c]
    return minority


def flipped(targets, c, scope):
    return scope == "attribute" and sum(row[c] == 1 for row in targets) > sum(row[c] == 0 for row in targets)


def distance(x, y):
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)))


def triplets(scores, targets, k, rho, scope, level="class", features=None):
    """All (anchor, positive, negative, label)."""
    found = []
    for c, (inside, outside) in sorted(profile(targets, rho, scope).items()):
        sign = -1 if flipped(targets, c, scope) else 1

        def score(i, c=c, sign=sign):
            return sign * float(scores[i][c])

        for a in inside:
            others = [i for i in inside if i != a]
            if level == "class":
                hard_positives = sorted(others, key=lambda i: (score(i), i))[:k]
                hard_negatives = sorted(outside, key=lambda i: (-score(i), i))[:k]
            else:
                hard_positives = sorted(others, key=lambda i: (-distance(features[a], features[i]), i))[:k]
                hard_negatives = sorted(outside, key=lambda i: (distance(features[a], features[i]), i))[:k]
            found += [(a, i, j, c) for i in hard_positives for j in hard_negatives]
    return found


def pair_distances(found, scores, targets, scope, level, features):
    """Distances d(a,+) and d(a,-) of each triplet, and of each distinct pair."""

    def norm(a, i):
        squared = ((features[a] - features[i]) ** 2).sum()
        return squared.sqrt() if float(squared) > 0 else squared

    def to_pos(a, i, c):
        return abs(scores[a][c] - scores[i][c]) if level == "class" else norm(a, i)

    def to_neg(a, j, c):
        if level == "instance":
            return norm(a, j)
        return scores[j][c] - scores[a][c] if flipped(targets, c, scope) else scores[a][c] - scores[j][c]

    each = [(to_pos(a, i, c), to_neg(a, j, c)) for a, i, j, c in found]
    positives = [to_pos(*pair) for pair in sorted({(a, i, c) for a, i, _, c in found})]
    negatives = [to_neg(*pair) for pair in sorted({(a, j, c) for a, _, j, c in found})]
    return each, positives, negatives


def mean(values):
    return sum(values) / len(values)


def average(values, labels, how):
    """Of all values, or of each label's mean."""
    if how == "triplet":
        return mean(values)
    return mean([mean([v for v, c in zip(values, labels, strict=True) if c == label]) for label in sorted(set(labels))])


def relative(each, margin, labels=None):
    hinges = [max(0 * (p + q), margin + p - q, key=float) for p, q in each]
    return mean(hinges) if labels is None else average(hinges, labels, "label")


def ranking(scores, targets, k, rho, scope, margin, how):
    """Hinges of each anchor and its label's highest-scored negatives; None without any. One anchor makes a class."""
    hinges, labels = [], []
    for c, (inside, outside) in profile(targets, rho, scope, least=1).items():
        sign = -1 if flipped(targets, c, scope) else 1
        hardest = sorted(outside, key=lambda j, c=c, sign=sign: (-sign * float(scores[j][c]), j))[:k]
        for a in inside:
            for j in hardest:
                gap = sign * (scores[a][c] - scores[j][c])
                hinges.append(max(0 * gap, margin - gap, key=float))
                labels.append(c)
    return (average(hinges, labels, how) if hinges else None), labels


def absolute(positives, negatives, margin):
    near = sum(d * d for d in positives) / len(positives)
    far = sum(max(0 * d, margin - d, key=float) ** 2 for d in negatives) / len(negatives)
    return (near + far) / 2


def soft_histogram(values, low, high, bins):
    width = (high - low) / (bins - 1)
    h = [0.0] * bins
    for v in values:
        t = min(int((float(v) - low) / width), bins - 2)
        upper = (v - (low + t * width)) / width
        h[t] = h[t] + (1 - upper)
        h[t + 1] = h[t + 1] + upper
    return [x / len(values) for x in h]


def distribution(positives, negatives, low, high, bins):
    h_pos, h_neg = (soft_histogram(x, low, high, bins) for x in (positives, negatives))
    return sum(h_pos[t] * sum(h_neg[: t + 1]) for t in range(bins))


def mean_of_known(each, known):
    "Mean of the entries that are known, of lists of lists; 0 where there are none."
    told = [v for row, marks in zip(each, known, strict=True) for v, mark in zip(row, marks, strict=True) if mark]
    return sum(told) / max(len(told), 1)


def f1_of_known(targets, chosen, known, c):
    "F1 of label c over the items of which it is known; NaN where there are none."
    rows = [i for i in range(len(targets)) if known[i][c]]
    hits = sum(1 for i in rows if targets[i][c] and chosen[i][c])
    named = sum(bool(targets[i][c]) + bool(chosen[i][c]) for i in rows)
    return math.nan if not rows else 2 * hits / named if named else 0.0
