"""An ONNX export run by ONNX Runtime alone: no JAX is imported, since a query should not wait for it.

Letters: N examples, S image size, D embedding.
"""
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightclip_jax.data import tokenizers
from lightclip_jax.errors import UserError
from lightclip_jax.inference import exported


class Export:
  """An exported folder whose towers are opened when they are needed.

  Attributes:
    folder: where it lies.
    about: what its `model.json` says.
    files: its files 'image', 'text' and 'tokenizer', and where it has token heads 'image tokens' and 'text tokens'.
  """

  def __init__(self, folder: pathlib.Path):
    """Raises UserError if the folder is no export with ONNX towers, or names files outside of it."""
    self.folder = folder.absolute()
    self.about, self.files = exported.describe(self.folder, ('onnx',))
    heads = self.about.get('tokens') or {}
    self.files |= {f'{name} tokens': self.folder / heads[name] for name in ('image', 'text') if name in heads}
    for name, file in self.files.items():
      if file.resolve().parent != self.folder.resolve():
        raise UserError(f'the {name} file {file.name!r} of {str(folder)!r} lies elsewhere; it must lie in that folder')

  @property
  def size(self) -> int:
    """S, pixels of the image tower's square input."""
    return self.about['preprocessing']['size']

  def fingerprint(self) -> str:
    """A hash of both towers and the tokenizer: embeddings of two models must not be compared."""
    digest = hashlib.sha256()
    for name in ('image', 'text', 'tokenizer'):
      digest.update(hashlib.sha256(self.files[name].read_bytes()).digest())
    return digest.hexdigest()

  def image_tower(self, threads: int = 1) -> Any:
    """uint8 [N, S, S, 3] -> float32 [N, D], unit norm."""
    return exported.onnx_tower(self.files['image'], threads)

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    """float32 [N, D], unit norm, of N texts."""
    tokenizer = tokenizers.load(self.files['tokenizer'])
    return exported.onnx_tower(self.files['text'])(tokenizer.encode(texts, self.about['context']))
