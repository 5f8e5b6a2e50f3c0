"""Class names as embeddings.

Letters: N texts, C classes, D embedding.
"""
from collections.abc import Callable, Sequence

import numpy as np

from lightclip_jax.errors import UserError


def class_embeddings(
    embed: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
  """One unit vector a class: the mean over templates of the unit text vectors, normalised again (as CLIP does).

  Args:
    embed: list of N texts -> float32 [N, D], unit vectors.
    names: the C class names.
    templates: each with one `{}` for the name.

  Returns:
    float32 [C, D].

  Raises:
    UserError: for an empty class name, or a template without exactly one `{}`.
  """
  for name in names:
    if not name.strip():
      raise UserError(f'class {list(names).index(name)} has no name; zero-shot classification needs one for each class')
  for template in templates:
    if template.count('{}') != 1:
      raise UserError(f'prompt template {template!r} must hold {{}} once, where the class name goes')
  texts = [template.replace('{}', name) for name in names for template in templates]
  means_CxD = embed(texts).reshape(len(names), len(templates), -1).mean(axis=1)
  return means_CxD / np.linalg.norm(means_CxD, axis=1, keepdims=True).clip(1e-12)
