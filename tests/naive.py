"""The losses once more, sample by sample and in plain loops, as slowly as their papers read."""

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor


def mimic(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist()):
        gaps = [s - t for s, t in zip(z_s, z_t)]
        total += sum((gap - sum(gaps) / len(gaps)) ** 2 for gap in gaps) / len(gaps)
    return total / len(student)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> float:
    target = rest = 0.0
    for z_s, z_t, label in zip(student, teacher, labels.tolist()):
        p_s, p_t = (torch.softmax(z / temperature, 0).tolist() for z in (z_s, z_t))
        for s, t in ((p_s[label], p_t[label]), (1 - p_s[label], 1 - p_t[label])):
            target += t * math.log(t / s)
        for c in range(len(p_s)):
            if c != label:
                s, t = p_s[c] / (1 - p_s[label]), p_t[c] / (1 - p_t[label])
                rest += t * math.log(t / s)
    return temperature**2 * (alpha * target + beta * rest) / len(student)


def pearson(one: list[float], other: list[float]) -> float:
    a, b = ([value - sum(part) / len(part) for value in part] for part in (one, other))
    dot = sum(x * y for x, y in zip(a, b))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)) + 1e-8)


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    p_s, p_t = ((z / temperature).softmax(1) for z in (student, teacher))
    rows = [1 - pearson(s, t) for s, t in zip(p_s.tolist(), p_t.tolist())]
    columns = [1 - pearson(s, t) for s, t in zip(p_s.T.tolist(), p_t.T.tolist())]
    return temperature**2 * (beta * sum(rows) / len(rows) + gamma * sum(columns) / len(columns))


def at(student: Tensor, teacher: Tensor) -> float:
    """For maps of one size."""
    total = 0.0
    for f_s, f_t in zip(student, teacher):
        q_s, q_t = (sum(channel**2 for channel in f).flatten() / len(f) for f in (f_s, f_t))
        total += ((q_s / q_s.norm() - q_t / q_t.norm()) ** 2).sum().item() / len(q_s)
    return total / len(student)


def sp(student: Tensor, teacher: Tensor) -> float:
    b, grams = len(student), []
    for f in (student, teacher):
        gram = [[(f[i] * f[j]).sum().item() for j in range(b)] for i in range(b)]
        grams.append([[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in gram])
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(b) for j in range(b)) / b**2


def nst(student: Tensor, teacher: Tensor) -> float:
    """For maps of one size."""
    total = 0.0
    for f_s, f_t in zip(student, teacher):
        s, t = ([channel.flatten() / channel.norm() for channel in f] for f in (f_s, f_t))
        for sign, one, other in ((1, s, s), (1, t, t), (-2, s, t)):
            total += sign * sum((x @ y).item() ** 2 for x in one for y in other) / (len(one) * len(other))
    return total / len(student)


def pkt(student: Tensor, teacher: Tensor) -> float:
    b, parts = len(student), []
    for f in (student, teacher):
        similar = [[(F.cosine_similarity(f[i], f[j], 0).item() + 1) / 2 for j in range(b)] for i in range(b)]
        parts.append([[value / sum(row) for value in row] for row in similar])
    s, t = parts
    return sum(t[i][j] * math.log(t[i][j] / s[i][j]) for i in range(b) for j in range(b)) / b**2


def huber(gap: float) -> float:
    return gap**2 / 2 if abs(gap) < 1 else abs(gap) - 0.5


def rkd(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> float:
    b, distances, angles = len(student), [], []
    for f in (student, teacher):
        away = [[(f[i] - f[j]).norm().item() for j in range(b)] for i in range(b)]
        mean = sum(map(sum, away)) / (b * (b - 1))
        distances.append([value / mean for row in away for value in row])
        unit = lambda i, j: F.normalize(f[i] - f[j], dim=0)  # noqa: E731, B023
        angles.append([(unit(i, j) @ unit(k, j)).item() for j in range(b) for i in range(b) for k in range(b)])
    distance = sum(huber(s - t) for s, t in zip(*distances)) / b**2
    return distance_weight * distance + angle_weight * sum(huber(s - t) for s, t in zip(*angles)) / b**3


def correlation_congruence(student: Tensor, teacher: Tensor) -> float:
    b, total, (s, t) = len(student), 0.0, (F.normalize(part) for part in (student, teacher))
    series = lambda dot: math.exp(-0.8) * (1 + 0.8 * dot + 0.32 * dot**2)  # noqa: E731  gamma 0.4, order 2
    for i in range(b):
        for j in range(b):
            total += (series((s[i] @ s[j]).item()) - series((t[i] @ t[j]).item())) ** 2
    return total / b**2


def vid(predicted: Tensor, teacher: Tensor, variance: Tensor) -> float:
    total = 0.0
    for mu, f in zip(predicted, teacher):
        for c, spread in enumerate(variance.tolist()):
            total += ((mu[c] - f[c]) ** 2 / spread + math.log(spread)).sum().item() / 2
    return total / predicted.numel()


def contrastive(scores: Tensor, normalizer: Tensor, samples: int) -> float:
    noise, total = (scores.shape[1] - 1) / samples, 0.0
    for row in scores.tolist():
        p = [math.exp(score) / normalizer.item() for score in row]
        total -= math.log(p[0] / (p[0] + noise)) + sum(math.log(noise / (negative + noise)) for negative in p[1:])
    return total / len(scores)


def tfkd(student: Tensor, labels: Tensor, correct: float, temperature: float) -> float:
    total, k = 0.0, student.shape[1]
    for z, label in zip(student, labels.tolist()):
        virtual = torch.tensor([correct if c == label else (1 - correct) / (k - 1) for c in range(k)]).double()
        p, log_q = torch.softmax(virtual / temperature, 0), torch.log_softmax(z, 0)
        total += (p * (p.log() - log_q)).sum().item()
    return total / len(student)


def softmax(logits: Tensor, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits.tolist()]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float) -> float:
    total = 0.0
    for z_s, z_t, label in zip(student, teacher, labels.tolist()):
        total -= softmax(z_t)[label] * math.log(softmax(z_s)[label])
        others = [c for c in range(len(z_s)) if c != label]
        p, q = softmax(z_t[others], temperature), softmax(z_s[others], temperature)
        total -= gamma * temperature**2 * sum(a * math.log(b) for a, b in zip(p, q))
    return total / len(student)


def wttm(student: Tensor, teacher: Tensor, exponent: float, weighted: bool) -> float:
    total = 0.0
    for z_s, z_t in zip(student, teacher):
        powers = [p**exponent for p in softmax(z_t)]
        each = divergence([power / sum(powers) for power in powers], softmax(z_s))
        total += sum(powers) * each if weighted else each
    return total / len(student)


def rld(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, t: float, t1: float) -> float:
    total = 0.0
    for z_s, z_t, label in zip(student, teacher, labels.tolist()):
        p, q = max(softmax(z_t, t1)), softmax(z_s, t1)[label]
        total += alpha * t1**2 * divergence([p, 1 - p], [q, 1 - q])
        below = [c for c in range(len(z_s)) if z_t[c] < z_t[label]]
        total += beta * t**2 * divergence(softmax(z_t[below], t), softmax(z_s[below], t))
    return total / len(student)


def pld(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> float:
    total = 0.0
    for z_s, z_t, label in zip(student.tolist(), teacher, labels.tolist()):
        weight, left = softmax(z_t, temperature), list(range(len(z_s)))
        order = sorted(left, key=lambda c: (c != label, -z_t[c].item()))
        for chosen in order:
            total -= weight[chosen] * math.log(math.exp(z_s[chosen]) / sum(math.exp(z_s[c]) for c in left))
            left.remove(chosen)
    return total / len(student)


def skd(student: Tensor, teacher: Tensor, ridge: float) -> float:
    b, k = student.shape
    cosine = lambda z, i, j: (z[i] @ z[j] / z[i].norm() / z[j].norm()).item() / k  # noqa: E731
    rows = torch.tensor([[cosine(student, i, j) - cosine(teacher, i, j) for j in range(b)] for i in range(b)]).double()
    inverse = torch.linalg.inv(torch.cov(rows.T) + ridge * torch.eye(b).double())
    return sum(math.sqrt((row @ inverse @ row).item()) for row in rows) / b


def mlkd(
    student: Tensor, student_strong: Tensor, teacher: Tensor, teacher_strong: Tensor, temperatures: tuple[float, ...]
) -> dict[str, float]:
    """With masks that mask, and both strong views in every strong term."""
    (b, k), total = student.shape, {"instance": 0.0, "batch": 0.0, "class": 0.0}
    sure = [max(softmax(z)) for z in teacher]
    mass = [sum(softmax(z)[c] for z in teacher) for c in range(k)]
    unsure, rare = ([value <= statistics.median(values) for value in values] for values in (sure, mass))
    for t in temperatures:
        p, q = ([softmax(z, t) for z in logits] for logits in (teacher, student))
        strong = [(softmax(z_t, t), softmax(z_s, t)) for z_t, z_s in zip(teacher_strong, student_strong)]
        total["instance"] += t**2 * sum(divergence(p[i], q[i]) for i in range(b) if unsure[i]) / b
        total["instance"] += t**2 * sum(divergence(*pair) for pair in strong) / b
        for i in range(b):
            for j in range(b):
                gap = sum(x * y for x, y in zip(p[i], p[j])) - sum(x * y for x, y in zip(q[i], q[j]))
                total["batch"] += unsure[j] * gap**2 / b
        for c in range(k):
            for d in range(k):
                gap = sum(row[c] * row[d] for row in p) - sum(row[c] * row[d] for row in q)
                total["class"] += rare[d] * gap**2 / k
    return total


def embedding_queue(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher):
        shares = []
        for one in (s, t):
            powers = [math.exp(F.cosine_similarity(one, other, 0).item() / temperature) for other in queue]
            shares.append([power / sum(powers) for power in powers])
        total += sum(b * math.log(b / a) for a, b in zip(*shares))
    return total / len(student)
