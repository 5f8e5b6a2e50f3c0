"""The model as its users see it: images and texts in, embeddings and probabilities out. No training code is imported.

Letters: N examples, b examples that a tower gets at a time, S image size, W text positions, D embedding, C classes.
"""
import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lightclip_jax import storage
from lightclip_jax.data.tokenizers import Tokenizer
from lightclip_jax.errors import UserError
from lightclip_jax.inference import checkpoint, exported, open_clip
from lightclip_jax.inference import class_names as class_names_lib
from lightclip_jax.inference import images as images_lib
from lightclip_jax.models import lightclip

# A tower is compiled once for each of these batch sizes at most; what does not fill one is padded.
BUCKETS = (1, 8, 64)

Tower = Callable[[np.ndarray], Any]   # uint8 [b, S, S, 3] or int32 [b, W] -> float32 [b, D], unit norm


@dataclasses.dataclass(frozen=True)
class Model:
  """Two towers with their tokenizer and preprocessing.

  Attributes:
    image_tower, text_tower: what embeds one bucket.
    tokenizer: texts to ids.
    preprocessing: 'size', 'mean', 'std', 'interpolation', 'resize_mode', in open_clip's terms.
    context: W.
    embed_dim: D.
    logit_scale: what multiplies cosines before the softmax.
  """
  image_tower: Tower
  text_tower: Tower
  tokenizer: Tokenizer
  preprocessing: dict[str, Any]
  context: int
  embed_dim: int
  logit_scale: float

  def encode_image(self, images: Iterable[images_lib.Image] | np.ndarray) -> np.ndarray:
    """float32 [N, D], unit norm, of N PIL images or paths, or of uint8 [N, H, W, 3] in RGB.

    Photos stand upright by their EXIF orientation, opened or not; an array is taken as it lies.

    Raises:
      UserError: for an image that cannot be read, or an array of another type or shape.
    """
    images = images_lib.check(images)
    size = self.preprocessing['size']
    return self._embed(self.image_tower, (images_lib.prepare(part, size) for part in _parts(images)))

  def encode_text(self, texts: Iterable[str]) -> np.ndarray:
    """float32 [N, D], unit norm, of N texts.

    Raises:
      UserError: for what is not a list of str, or another row of them.
    """
    texts = _strings('texts', texts)
    return self._embed(self.text_tower, (self.tokenizer.encode(part, self.context) for part in _parts(texts)))

  def classify(self, images: Iterable[images_lib.Image] | np.ndarray, class_names: Iterable[str],
               templates: Iterable[str] = ('{}',)) -> np.ndarray:
    """Probabilities, float32 [N, C], of each class for each image: zero-shot, as CLIP does it.

    Args:
      images: as for `encode_image`.
      class_names: the C names.
      templates: texts with one `{}` each, where the name goes; a class is the mean of its texts' embeddings.

    Raises:
      UserError: without classes, for an empty name, what is no str, or a template without exactly one `{}`.
    """
    class_names, templates = _strings('class_names', class_names, 1), _strings('templates', templates, 1)
    classes_CxD = class_names_lib.class_embeddings(self.encode_text, class_names, templates)
    logits_NxC = self.logit_scale * self.encode_image(images) @ classes_CxD.T
    weights_NxC = np.exp(logits_NxC - logits_NxC.max(axis=1, keepdims=True))
    return weights_NxC / weights_NxC.sum(axis=1, keepdims=True)

  def _embed(self, tower: Tower, parts: Iterable[np.ndarray]) -> np.ndarray:
    """What is made of each part is read two parts later: the tower never waits, and few parts are there at once."""
    rows, running = [np.zeros((0, self.embed_dim), np.float32)], collections.deque()
    for part in parts:
      running.append((tower(_padded(part)), len(part)))
      if len(running) > 2:
        rows.append(_read(*running.popleft()))
    return np.concatenate([*rows, *(_read(*last) for last in running)])


def _read(embeddings: Any, count: int) -> np.ndarray:
  return np.asarray(embeddings, np.float32)[:count]


def load(path: str | os.PathLike[str], step: str | int = 'last') -> Model:
  """A checkpoint of a training run, an exported folder, or a folder of open_clip whose towers we have.

  Args:
    path: the folder.
    step: of a run: 'last', 'best' or a number.

  Raises:
    UserError: for a path that is none of these, or one that is damaged; for a step that is not there.
  """
  path, chosen = storage.path(path), checkpoint.which(step)
  for file, read in ((open_clip.CONFIG_FILE, open_clip.load), (exported.MODEL_FILE, exported.load)):
    if (path / file).is_file():
      if chosen is not None:
        raise UserError(f'step is {step!r}, but {str(path)!r} is an exported folder, which holds one model')
      return Model(**read(path))
  return from_checkpoint(checkpoint.load(path, chosen))


def from_checkpoint(loaded: checkpoint.Loaded) -> Model:
  """The model of a checkpoint, without the parameters that only training needs."""
  config = loaded.config.model
  image_tower, text_tower = towers(loaded)
  scale = float(lightclip.clipped_scale(loaded.variables['params']['logit_scale']))
  return Model(image_tower, text_tower, loaded.tokenizer, loaded.preprocessing, config.text.context, config.embed_dim, scale)


def towers(loaded: checkpoint.Loaded) -> tuple[Tower, Tower]:
  """The image and the text tower as compiled functions of a batch."""
  clip = lightclip.LightCLIP(loaded.config.model)
  variables = {**loaded.variables, 'params': lightclip.inference_parameters(loaded.variables['params'])}

  def tower(method: str) -> Tower:
    run = jax.jit(functools.partial(clip.apply, method=method))
    return lambda batch: run(variables, batch)

  return tower('encode_image'), tower('encode_text')


def _strings(name: str, value: Iterable[str], least: int = 0) -> list[str]:
  """Raises UserError for what holds another thing than str, or fewer than `least`."""
  strings = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [None]
  if len(strings) < least or not all(isinstance(string, str) for string in strings):
    raise UserError(f'{name} is {str(value)[:60]!r}; it must be a list of {"at least one " * bool(least)}str')
  return strings


def _parts(batch: Sequence[Any] | np.ndarray) -> list[Any]:
  """Runs of at most the largest bucket."""
  return [batch[i:i + BUCKETS[-1]] for i in range(0, len(batch), BUCKETS[-1])]


def _padded(rows: np.ndarray) -> np.ndarray:
  """With zeros to the next bucket."""
  bucket = next(size for size in BUCKETS if size >= len(rows))
  return np.pad(rows, [(0, bucket - len(rows))] + [(0, 0)] * (rows.ndim - 1))
