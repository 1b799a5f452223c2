"""The losses as in their papers, written independently of the package: one row at a time, angles by acos, no shortcuts.

Each entry maps an angle, and what the paper uses of the row, to the target logit, and non-target cosines to non-target logits, both before
the bias. The reference backend is tested against them, away from cos = +-1, where acos has no derivative.
"""

import math
import statistics as stats

import torch


def cosines(x, w):
    return (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T


def cross_entropy(logits, labels, *, reduction="mean", ignore_index=-100, smoothing=0.0, gamma=0.0):
    """Focal cross-entropy with smoothing."""
    kept = labels != ignore_index
    z, y = logits[kept], torch.nn.functional.one_hot(labels[kept], logits.shape[1]).to(logits.dtype)
    p = torch.exp(z - z.detach().amax(1, keepdim=True))
    p = p / p.sum(1, keepdim=True)
    goal = smoothing / logits.shape[1] + (1 - smoothing) * y
    rows = -(goal * p.log()).sum(1)
    if gamma:
        rows = rows * (p * (1 - y)).sum(1) ** gamma
    if reduction == "none":
        return torch.zeros_like(logits[:, 0]).masked_scatter(kept, rows)
    return rows.sum() if reduction == "sum" else rows.sum() / max(1, int(kept.sum()))


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


def lsoftmax(m, s=1.0):
    """Both norms are kept: z_j = s |x| |w_j| cos(theta_j), with psi in the place of the target's cosine."""

    def logits(x, w, y):
        a, b = x.norm(dim=1), w.norm(dim=1)
        return assemble(cosines(x, w), y, lambda i, th: s * a[i] * b[int(y[i])] * psi(th, m), lambda i, row, cy: s * a[i] * b * row)

    return logits


def annealing(step, base=1000.0, gamma=0.12, power=1.0, minimum=5.0):
    return max(minimum, base * (1 + gamma * step) ** -power)


def cosface(s, m):
    return lambda x, w, y: assemble(cosines(x, w), y, lambda i, th: s * (torch.cos(th) - m), lambda i, row, cy: s * row)


def past_pi(m1, m2):
    """The angle theta* from which on ``m1 theta + m2`` is past pi."""
    return (math.pi - m2) / m1


def combined_target(th, m1, m2, m3, beyond="linear"):
    """cos(m1 theta + m2) - m3, and what takes the place of the cosine past theta*, with M = pi - theta*."""
    end = past_pi(m1, m2)
    big = math.pi - end
    if beyond == "easy":
        return (torch.cos(m1 * th + m2) if th < math.pi / 2 else torch.cos(th)) - m3
    if beyond == "none" or th <= end:
        return torch.cos(m1 * th + m2) - m3
    return {
        "linear": lambda: torch.cos(th) - big * math.sin(big),
        "continuous": lambda: torch.cos(th) - (1 + math.cos(math.pi - big)),
        "clip": lambda: th * 0 + math.cos(math.pi),
    }[beyond]() - m3


def combined_slope(theta, m1, m2, beyond="linear"):
    """d/dcos(theta) of :func:`combined_target` at a number ``theta`` within (0, pi): its derivative in theta over -sin(theta)."""
    inside = theta < math.pi / 2 if beyond == "easy" else beyond == "none" or theta <= past_pi(m1, m2)
    if inside:
        return m1 * math.sin(m1 * theta + m2) / math.sin(theta)
    return 0.0 if beyond == "clip" else 1.0


def psi_slope(theta, m):
    """d psi / d cos(theta)."""
    k = min(m - 1, int(theta * m / math.pi))
    return (-1) ** k * m * math.sin(m * theta) / math.sin(theta)


def arc_target(th, m, beyond="linear"):
    return combined_target(th, 1.0, m, 0.0, beyond)


def combined(s, m1, m2, m3, beyond="linear", detached=False):
    def target(i, th):
        value = combined_target(th, m1, m2, m3, beyond)
        if detached:
            value = torch.cos(th) + (value - torch.cos(th)).detach()
        return s * value

    return lambda x, w, y: assemble(cosines(x, w), y, target, lambda i, row, cy: s * row)


def arcface(s, m, beyond="linear", detached=False):
    return combined(s, 1.0, m, 0.0, beyond, detached)


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


def class_margins(counts, power=-0.25, low=0.05, high=0.5):
    """n ** power of each class (none counts as one), moved and stretched to [low, high]."""
    share = [max(n, 1) ** power for n in counts]
    least, most = min(share), max(share)
    return [low + (high - low) * ((v - least) / (most - least) if most > least else 0.5) for v in share]


def cosface_per_class(s, margins):
    def logits(x, w, y):
        return assemble(cosines(x, w), y, lambda i, th: s * (torch.cos(th) - margins[int(y[i])]), lambda i, row, cy: s * row)

    return logits


def arcface_per_class(s, margins, beyond="linear", detached=False):
    def logits(x, w, y):
        def target(i, th):
            value = arc_target(th, margins[int(y[i])], beyond)
            return s * (torch.cos(th) + (value - torch.cos(th)).detach() if detached else value)

        return assemble(cosines(x, w), y, target, lambda i, row, cy: s * row)

    return logits


def adaface_quality(norm, mean, std, h):
    """z^ of one norm, a number."""
    return min(1.0, max(-1.0, (min(100.0, max(1e-3, norm)) - mean) * h / (std + 1e-3)))


def adaface(s, m, mean, std, h=0.333):
    """cos(theta + g_angle) - g_add, with theta + g_angle cut off at 0 and pi."""

    def logits(x, w, y):
        quality = [adaface_quality(norm, mean, std, h) for norm in x.norm(dim=1).tolist()]

        def target(i, th):
            g_angle, g_add = -m * quality[i], m * quality[i] + m
            return s * (torch.cos((th + g_angle).clamp(0, math.pi)) - g_add)

        return assemble(cosines(x, w), y, target, lambda i, row, cy: s * row)

    return logits


def adaface_step(mean, std, x, y, momentum=0.99, ignore_index=-100):
    """One update of the running mean and (unbiased) standard deviation of the norms, which one row alone has none of."""
    norms = [min(100.0, max(1e-3, v)) for v, j in zip(x.norm(dim=1).tolist(), y.tolist(), strict=True) if j != ignore_index]
    if norms:
        mean = (1 - momentum) * sum(norms) / len(norms) + momentum * mean
    if len(norms) > 1:
        std = (1 - momentum) * stats.stdev(norms) + momentum * std
    return mean, std


def magface(s, norms=(10.0, 110.0), margins=(0.45, 0.8), beyond="easy"):
    """cos(theta + m(a)), a the norm cut off at the ends of ``norms``; nothing is detached."""

    def logits(x, w, y):
        a = x.norm(dim=1).clamp(*norms)
        m = margins[0] + (margins[1] - margins[0]) * (a - norms[0]) / (norms[1] - norms[0])
        return assemble(cosines(x, w), y, lambda i, th: s * turned_target(th, m[i], beyond), lambda i, row, cy: s * row)

    return logits


def turned_target(th, m, beyond):
    """cos(theta + m) for a margin m that is a tensor, and what takes its place past theta = pi - m."""
    if beyond == "none" or (th < math.pi / 2 if beyond == "easy" else th + m <= math.pi):
        return torch.cos(th + m)
    return {
        "easy": lambda: torch.cos(th),
        "linear": lambda: torch.cos(th) - m * torch.sin(m),
        "continuous": lambda: torch.cos(th) - (1 - torch.cos(m)),
        "clip": lambda: th * 0 - 1,
    }[beyond]()


def magface_term(x, norms=(10.0, 110.0), weight=35.0):
    """(N,) lambda_g g(a)."""
    a = x.norm(dim=1).clamp(*norms)
    return weight * (1 / a + a / norms[1] ** 2)


def elasticface(kind, s, margins):
    """With the drawn margin of each row, a list."""

    def target(i, th):
        return s * (torch.cos(th + margins[i]) if kind == "arc" else torch.cos(th) - margins[i])

    return lambda x, w, y: assemble(cosines(x, w), y, target, lambda i, row, cy: s * row)


def elastic_order(cos, margins, plus):
    """Which of the rows gets which of the drawn margins: lists of numbers, of the rows that count."""
    ascending = sorted(margins)
    nearest_first = sorted(range(len(cos)), key=lambda i: -cos[i])
    if plus == "paper":  # the k-th nearest row gets the k-th smallest margin
        out = [0.0] * len(cos)
        for k, i in enumerate(nearest_first):
            out[i] = ascending[k]
        return out
    return [ascending[i] for i in nearest_first] if plus == "code" else list(margins)


def mv_softmax(kind, s, m, t):
    def value(th):
        return torch.cos(th + m) if kind == "arc" else torch.cos(th) - m

    def other(i, row, cy):
        hard = row > value(torch.acos(cy)).detach()
        return s * torch.where(hard, (1 + t) * row + t, row)

    return lambda x, w, y: assemble(cosines(x, w), y, lambda i, th: s * value(th), other)


def filtered(logits, s, above):
    """A head with logits ``logits``, of which the cosine of a non-target class above ``above`` counts as 0."""

    def found(x, w, y):
        c, z = cosines(x, w), logits(x, w, y)
        other = torch.arange(len(w)) != y[:, None]
        return torch.where(other & (c > above), s * torch.zeros_like(c), z)

    return found


def circle(s, m):
    """gamma a_p (s_p - D_p) and gamma a_n (s_n - D_n); a_p and a_n are constants to the gradient."""

    def target(i, th):
        c = torch.cos(th)
        return s * torch.relu(1 + m - c).detach() * (c - (1 - m))

    def other(i, row, cy):
        return s * torch.relu(row - (-m)).detach() * (row - m)

    return lambda x, w, y: assemble(cosines(x, w), y, target, other)


def sphereface_r_target(th, version, m):
    """Before the scale."""
    if version == "v0":
        k = math.floor(float(m * th.detach() / math.pi))
        return (-1) ** k * torch.cos(m * th) - 2 * k
    if version == "v1":
        return torch.cos(m * th) if m * th < math.pi else th * 0 - 1
    return torch.cos(th)


def sphereface_r(version, m, s=None, exact=False):
    """``s`` is None where the norm of the embedding is the scale."""

    def passed(c, value):
        return value if exact else c + (value - c).detach()

    def logits(x, w, y):
        norm = x.norm(dim=1) if s is None else torch.full((len(x),), float(s), dtype=x.dtype)

        def target(i, th):
            return norm[i] * passed(torch.cos(th), sphereface_r_target(th, version, m))

        def other(i, row, cy):
            return norm[i] * (passed(row, torch.cos(torch.acos(row) / m)) if version == "v2" else row)

        return assemble(cosines(x, w), y, target, other)

    return logits


def softplus(z):
    """log(1 + exp(z))."""
    return torch.log1p(torch.exp(-z.abs())) + torch.relu(z)


def binary(c, y, target, other, own_weight, other_weight, ignore_index=-100):
    """(N,) losses of a binary classifier for each class: ``target(c_y)`` and ``other(c_j, j)`` are the logits of a row's own class and of
    the other classes ``j``."""
    rows = []
    for i, label in enumerate(y.tolist()):
        if label == ignore_index:
            rows.append(c[i].sum() * 0)
            continue
        others = [j for j in range(c.shape[1]) if j != label]
        rows.append(own_weight * softplus(-target(c[i, label], label)) + other_weight * softplus(other(c[i, others], others)).sum())
    return torch.stack(rows)


def sphereface2_g(z, t):
    return 2 * ((z + 1) / 2) ** t - 1


def sphereface2_turned(theta, m, kind):
    """The angle of the own class with its margin."""
    return {"A": theta + m, "M": m * theta}[kind].clamp(max=math.pi)


def sphereface2(r, m, t, lam, lw, kind, exact=False):
    """(N,) losses of embeddings, class centers, labels, the bias b and biases of the classes, or 0."""

    def passed(c, value):
        return value if exact else c + (value - c).detach()

    def rows(x, w, y, b, of_class):
        def bias(j):
            return b + (of_class[j] if isinstance(of_class, torch.Tensor) else 0)

        def target(c, j):
            at = c if kind == "C" else torch.cos(sphereface2_turned(torch.acos(c), m, kind))
            return r * passed(c, sphereface2_g(at, t) - (m if kind == "C" else 0)) + bias(j)

        def other(c, j):
            return r * passed(c, sphereface2_g(c, t) + (m if kind == "C" else 0)) + bias(j)

        return binary(cosines(x, w), y, target, other, lw / r * lam, lw / r * (1 - lam))

    return rows


def sphereface2_pull(b, classes, r, m, t, lam, kind):
    """The derivative in b of a row's loss, r/lw apart, where all its cosines are 0: plain numbers."""
    right = torch.tensor(math.pi / 2, dtype=torch.float64)
    own = sphereface2_g(0.0, t) - m if kind == "C" else sphereface2_g(math.cos(float(sphereface2_turned(right, m, kind))), t)
    other = sphereface2_g(0.0, t) + (m if kind == "C" else 0.0)
    return (1 - lam) * (classes - 1) / (1 + math.exp(-(r * other + b))) - lam / (1 + math.exp(r * own + b))


def uniface(s, m, weight=1.0, clamp=False):
    """As :func:`sphereface2`; ``clamp`` cuts both exponents off at -s and s, biases of the classes apart."""

    def cut(v):
        return v.clamp(-s, s) if clamp else v

    def rows(x, w, y, b, of_class):
        def bias(j):
            return of_class[j] if isinstance(of_class, torch.Tensor) else 0

        return binary(cosines(x, w), y, lambda c, j: cut(s * (c - m) - b) + bias(j), lambda c, j: cut(s * c - b) + bias(j), 1.0, weight)

    return rows


def curricularface(s, m, t):
    def other(i, row, cy):
        hard = row > torch.cos(torch.acos(cy) + m).detach()
        return s * torch.where(hard, row * (t + row), row)

    return lambda x, w, y: assemble(cosines(x, w), y, lambda i, th: s * arc_target(th, m), other)


def smoothed_loss(z, y, smoothing):
    """Cross-entropy of one row of logits (numbers) with the label's probability lowered to 1 - eps + eps/C: all of it in plain numbers."""
    highest = max(z)
    lse = highest + math.log(sum(math.exp(v - highest) for v in z))
    goal = [smoothing / len(z) + (1 - smoothing if j == y else 0.0) for j in range(len(z))]
    return sum(q * (lse - v) for q, v in zip(goal, z, strict=True))


def statistics(x, w, y, b, scale, normalize_embedding, normalize_weight, ignore_index=-100):
    """Mean cosine and angle to the own center, mean scale, and the share of rows whose own logit (without margin) is above all others: of
    the rows that are not ignored, 0 where there is none. ``scale`` is one number a row."""
    cosine = angle = scales = top = count = 0.0
    length, width = x.norm(dim=1).tolist(), w.norm(dim=1).tolist()
    x, w, b = x.tolist(), w.tolist(), [0.0] * len(w) if b is None else b.tolist()
    for i, own in enumerate(y.tolist()):
        if own == ignore_index:
            continue
        dots = [sum(p * q for p, q in zip(x[i], row, strict=True)) for row in w]
        z = [
            scale[i] * dot / (length[i] if normalize_embedding else 1) / (width[j] if normalize_weight else 1) + b[j]
            for j, dot in enumerate(dots)
        ]
        count += 1
        to_center = dots[own] / length[i] / width[own]
        cosine += to_center
        angle += math.acos(max(-1.0, min(1.0, to_center)))
        scales += scale[i]
        top += all(z[own] > v for j, v in enumerate(z) if j != own)
    means = {"target_cosine": cosine, "target_angle": angle, "scale": scales, "top1": top}
    return {name: total / max(count, 1) for name, total in means.items()}


def beyond_margin(z, x, w, y, normalize_weight, ignore_index=-100):
    """The share of rows that are not ignored whose own logit in ``z`` (N, C), margin included, is above that of the other class whose plain
    similarity is the highest."""
    z, plain = z.tolist(), (x @ (w / w.norm(dim=1, keepdim=True) if normalize_weight else w).T).tolist()
    found = []
    for i, own in enumerate(y.tolist()):
        if own != ignore_index:
            nearest = max((j for j in range(len(w)) if j != own), key=lambda j: plain[i][j])
            found.append(z[i][own] > z[i][nearest])
    return sum(found) / max(len(found), 1)


def curricular_step(t, x, w, y, momentum=0.99, ignore_index=-100):
    with torch.no_grad():
        c = cosines(x, w)
        kept = [float(c[i, j]) for i, j in enumerate(y.tolist()) if j != ignore_index]
        return (1 - momentum) * sum(kept) / len(kept) + momentum * t


def with_sub_centers(formula, k, normalized=True):
    """Deng et al. 2020, equation 3: a row's angle to a class is that to the nearest of its k centers, rows c k to c k + k - 1 of w. So each
    row has class centers of its own."""

    def logits(x, w, y):
        units = w.detach() / w.detach().norm(dim=1, keepdim=True) if normalized else w.detach()
        found = []
        for i in range(len(x)):
            near = [float(x[i].detach() @ u) for u in units]
            best = [max(range(c, c + k), key=near.__getitem__) for c in range(0, len(w), k)]
            found.append(formula(x[i : i + 1], w[best], y[i : i + 1])[0])
        return torch.stack(found)

    return logits
