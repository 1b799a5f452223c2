"""The losses as in their papers, written independently of the package: one row at a time, angles by acos, no shortcuts.

Each entry maps an angle, and what the paper uses of the row, to the target logit, and non-target cosines to non-target logits, both before
the bias. The reference backend is tested against them, away from cos = +-1, where acos has no derivative.
"""

import math

import torch


def cosines(x, w):
    return (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T


def cross_entropy(logits, labels, *, reduction="mean", ignore_index=-100, smoothing=0.0, gamma=0.0):
    """Focal cross-entropy with smoothing, row by row."""
    rows = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        if y == ignore_index:
            rows.append(z.sum() * 0)
            continue
        p = torch.exp(z - z.max())
        p = p / p.sum()
        goal = torch.full_like(z, smoothing / len(z))
        goal[y] += 1 - smoothing
        others = sum(p[j] for j in range(len(z)) if j != y)
        rows.append(-(goal * p.log()).sum() * (others**gamma if gamma else 1))
    rows = torch.stack(rows)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / max(1, int((labels != ignore_index).sum()))


def assemble(c, labels, target, other, ignore_index=-100):
    """Logits from ``target(i, theta_y)`` and ``other(i, c_row, c_y)``."""
    out = []
    for i, y in enumerate(labels.tolist()):
        if y == ignore_index:
            out.append(c[i])
            continue
        row = other(i, c[i], c[i, y])
        chosen = torch.zeros(len(row), dtype=torch.bool)
        chosen[y] = True
        out.append(torch.where(chosen, target(i, torch.acos(c[i, y])), row))
    return torch.stack(out)


def softmax(x, w, y):
    return x @ w.T


def w_norm_softmax(x, w, y):
    return x @ (w / w.norm(dim=1, keepdim=True)).T


def normface(s):
    return lambda x, w, y: s * cosines(x, w)


def l2_softmax(alpha):
    return lambda x, w, y: alpha * (x / x.norm(dim=1, keepdim=True)) @ w.T


def l2_bound(c, p=0.9):
    return math.log(p * (c - 2) / (1 - p))


def psi(theta, m):
    """(-1)^k cos(m theta) - 2k on [k pi/m, (k+1) pi/m]."""
    k = min(m - 1, int(theta.item() * m / math.pi))
    return (-1) ** k * torch.cos(m * theta) - 2 * k


def sphereface(m, s=None, lam=0.0):
    def logits(x, w, y):
        norm = x.norm(dim=1) if s is None else torch.full((len(x),), float(s), dtype=x.dtype)
        return assemble(
            cosines(x, w),
            y,
            lambda i, th: norm[i] * (lam * torch.cos(th) + psi(th, m)) / (1 + lam),
            lambda i, row, cy: norm[i] * row,
        )

    return logits


def annealing(step, base=1000.0, gamma=0.12, power=1.0, minimum=5.0):
    return max(minimum, base * (1 + gamma * step) ** -power)


def cosface(s, m):
    return lambda x, w, y: assemble(cosines(x, w), y, lambda i, th: s * (torch.cos(th) - m), lambda i, row, cy: s * row)


def arc_target(th, m, beyond="linear"):
    if beyond == "easy":
        return torch.cos(th + m) if torch.cos(th) > 0 else torch.cos(th)
    if beyond == "none" or th + m <= math.pi:
        return torch.cos(th + m)
    return {
        "linear": lambda: torch.cos(th) - m * math.sin(m),
        "continuous": lambda: torch.cos(th) - (1 + math.cos(math.pi - m)),
        "clip": lambda: th * 0 + math.cos(math.pi),
    }[beyond]()


def arcface(s, m, beyond="linear", detached=False):
    def target(i, th):
        value = arc_target(th, m, beyond)
        if detached:
            value = torch.cos(th) + (value - torch.cos(th)).detach()
        return s * value

    return lambda x, w, y: assemble(cosines(x, w), y, target, lambda i, row, cy: s * row)


def combined(s, m1, m2, m3):
    """Within m1 theta + m2 <= pi."""

    def target(i, th):
        assert m1 * th + m2 <= math.pi
        return s * (torch.cos(m1 * th + m2) - m3)

    return lambda x, w, y: assemble(cosines(x, w), y, target, lambda i, row, cy: s * row)


def adacos_fixed(c):
    return math.sqrt(2) * math.log(c - 1)


def adacos_step(s, x, w, y, ignore_index=-100):
    """One update of the dynamic scale."""
    with torch.no_grad():
        c = cosines(x, w)
        kept = [(i, j) for i, j in enumerate(y.tolist()) if j != ignore_index]
        b = sum(torch.exp(s * c[i, j]) for i, yi in kept for j in range(len(w)) if j != yi) / len(kept)
        theta = sorted(float(torch.acos(c[i, yi])) for i, yi in kept)
        median = theta[(len(theta) - 1) // 2]
        return float(torch.log(b)) / math.cos(min(math.pi / 4, median))


def mv_softmax(kind, s, m, t):
    def value(th):
        return torch.cos(th + m) if kind == "arc" else torch.cos(th) - m

    def other(i, row, cy):
        hard = row > value(torch.acos(cy)).detach()
        return s * torch.where(hard, (1 + t) * row + t, row)

    return lambda x, w, y: assemble(cosines(x, w), y, lambda i, th: s * value(th), other)


def curricularface(s, m, t):
    def other(i, row, cy):
        hard = row > torch.cos(torch.acos(cy) + m).detach()
        return s * torch.where(hard, row * (t + row), row)

    return lambda x, w, y: assemble(cosines(x, w), y, lambda i, th: s * arc_target(th, m), other)


def curricular_step(t, x, w, y, momentum=0.99, ignore_index=-100):
    with torch.no_grad():
        c = cosines(x, w)
        kept = [float(c[i, j]) for i, j in enumerate(y.tolist()) if j != ignore_index]
        return (1 - momentum) * sum(kept) / len(kept) + momentum * t
