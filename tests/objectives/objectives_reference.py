"""Independent float64 numpy forms of the objectives, with gradients derived by hand. No JAX here.

Letters: B batch, N rows, M columns.
"""
import numpy as np


def unit(seed, *shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def direction(logits, similarity, ids, alpha, beta, temperature, mode):
  """Per row: cross-entropy, softmax and targets of OBJECTIVES.md, 1, written as its text reads, row by row."""
  size = len(logits)
  losses, probabilities, targets = np.zeros(size), np.zeros((size, size)), np.zeros((size, size))
  for i in range(size):
    same_caption = ids == ids[i]
    others = np.arange(size) != i
    w_from = others if mode == 'negative' else ~same_caption
    kept = ~(same_caption & others) if mode == 'ignore' else np.ones(size, bool)
    shared = same_caption if mode == 'positive' else ~others
    a = alpha if w_from.any() else 0.0
    targets[i, shared] = (1 - a) / shared.sum()
    if w_from.any():
      q = np.exp((similarity[i, w_from] - similarity[i, w_from].max()) / temperature)
      targets[i, w_from] = a * ((1 - beta) / w_from.sum() + beta * q / q.sum())
    top = logits[i, kept].max()
    log_norm = top + np.log(np.exp(logits[i, kept] - top).sum())
    probabilities[i, kept] = np.exp(logits[i, kept] - log_norm)
    losses[i] = log_norm - targets[i] @ logits[i]
  return losses, probabilities, targets


def softened(image, text, scale, alpha=0.0, beta=0.0, temperature=0.1, source='intra', ids=None, mode='negative'):
  """(loss, d image, d text, d scale)."""
  image, text = image.astype(np.float64), text.astype(np.float64)
  size = len(image)
  ids = np.arange(size) if ids is None else np.asarray(ids)
  cosine = image @ text.T
  forth, back = (cosine, cosine.T) if source == 'cross' else (text @ text.T, image @ image.T)
  loss_i, p_i, y_i = direction(scale * cosine, forth, ids, alpha, beta, temperature, mode)
  loss_t, p_t, y_t = direction(scale * cosine.T, back, ids, alpha, beta, temperature, mode)
  slope = ((p_i - y_i) + (p_t - y_t).T) / (2 * size)
  return (loss_i.mean() + loss_t.mean()) / 2, scale * slope @ text, scale * slope.T @ image, (slope * cosine).sum()


def sigmoid(image, text, scale, bias):
  """(loss, d image, d text, d scale, d bias)."""
  image, text = image.astype(np.float64), text.astype(np.float64)
  cosine = image @ text.T
  sign = 2 * np.eye(len(image)) - 1
  logits = scale * cosine + bias
  slope = -sign / (1 + np.exp(sign * logits)) / len(image)
  loss = np.logaddexp(0, -sign * logits).sum() / len(image)
  return loss, scale * slope @ text, scale * slope.T @ image, (slope * cosine).sum(), slope.sum()


def distillation(image, text, teacher_image, teacher_text, scale, temperature):
  """(loss, d image, d text, d scale): KL(teacher || student) of each row, then of each column, from whole matrices."""
  image, text, teacher_image, teacher_text = (np.asarray(x, np.float64) for x in (image, text, teacher_image, teacher_text))
  cosine, target = image @ text.T, teacher_image @ teacher_text.T / temperature
  losses, slope = [], np.zeros_like(cosine)
  for axis in (1, 0):
    y, p = (np.exp(x - x.max(axis, keepdims=True)) for x in (target, scale * cosine))
    y, p = (x / x.sum(axis, keepdims=True) for x in (y, p))
    losses.append((y * (np.log(np.maximum(y, 1e-300)) - np.log(np.maximum(p, 1e-300)))).sum(axis).mean())
    slope += (p - y) / (2 * len(image))
  return sum(losses) / 2, scale * slope @ text, scale * slope.T @ image, (slope * cosine).sum()


def sinkhorn(cost, epsilon, iterations=20000):
  """(plan [N, M], value) of the converged slack problem, by plain alternation in float64; no masks."""
  cost = np.asarray(cost, np.float64)
  rows, cols = np.ones(cost.shape[0]), np.ones(cost.shape[1])
  n, m = cost.shape
  if n > m:
    cost, cols = np.pad(cost, ((0, 0), (0, 1))), np.append(cols, n - m)
  if m > n:
    cost, rows = np.pad(cost, ((0, 1), (0, 0))), np.append(rows, m - n)
  kernel = np.exp(-cost / epsilon)
  u, v = np.ones(len(rows)), np.ones(len(cols))
  for _ in range(iterations):
    u = rows / (kernel @ v)
    v = cols / (kernel.T @ u)
    if np.abs(u * (kernel @ v) - rows).max() < 1e-13:
      break
  plan = u[:, None] * kernel * v
  value = (plan * cost).sum() + epsilon * (plan * np.log(np.maximum(plan, 1e-300))).sum()
  return plan[:n, :m], value
