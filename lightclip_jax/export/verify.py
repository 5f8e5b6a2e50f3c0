"""Proof that an export is the model: cosines against the JAX towers on noise and on real examples.

Letters: N examples, S image size, W text positions, D embedding.
"""
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lightclip_jax.data import datasets, manifest, pipeline, transforms
from lightclip_jax.errors import UserError
from lightclip_jax.export.towers import Towers
from lightclip_jax.inference.model import Model

MIN_COSINE = 0.9999
EXAMPLES = 32
PREFERRED = 'heldout_style'   # the split that tells most, where there is one

Inputs = Mapping[str, np.ndarray]   # 'image' uint8 [N, S, S, 3], 'text' int32 [N, W]


def noise(towers: Towers, seed: int = 0) -> Inputs:
  """Random pixels, and texts of random words and lengths."""
  rng = np.random.default_rng(seed)
  tokenizer, context = towers.loaded.tokenizer, towers.text_item.shape[0]
  words = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
  tokens_NxW = np.full((EXAMPLES, context), tokenizer.pad_id, np.int32)
  for row_W, length in zip(tokens_NxW, rng.integers(2, context + 1, EXAMPLES), strict=True):
    row_W[:length] = [tokenizer.start_id, *rng.choice(words, length - 2), tokenizer.end_id]
  return {'image': rng.integers(0, 256, (EXAMPLES, *towers.image_item.shape), np.uint8), 'text': tokens_NxW}


def real(towers: Towers, folder: pathlib.Path) -> Inputs:
  """The first examples of the split that `accuracy` measures on."""
  records = _records(towers, folder)[:EXAMPLES]
  size, context = towers.image_item.shape[0], towers.text_item.shape[0]
  images = [transforms.evaluation_transform(transforms.decode(record.image), size) for record in records]
  return {'image': np.stack(images), 'text': towers.loaded.tokenizer.encode([r.captions[0] for r in records], context)}


def prepared_folder(name: str) -> pathlib.Path | None:
  """The prepared folder of a config's data set, if it is on this machine: an export fetches no data."""
  folder = datasets.folder_of(name) if name in datasets.BUILT_IN else pathlib.Path(name)
  return folder if (folder / manifest.FILE_NAME).is_file() else None


def cosines(reference: Mapping[str, Callable], exported: Mapping[str, Callable], inputs: Mapping[str, Inputs]
            ) -> dict[str, float]:
  """The lowest cosine of each tower on each kind of input: {'image/noise': 1.0, …}. NaN counts as -1."""
  out = {}
  for kind, batch in inputs.items():
    for tower, examples in batch.items():
      a, b = (np.asarray(side[tower](examples), np.float64) for side in (reference, exported))
      cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
      out[f'{tower}/{kind}'] = float(np.nan_to_num(cosine, nan=-1.0).min())
  return out


def check(lowest: Mapping[str, float]) -> None:
  """Raises UserError where a cosine is below `MIN_COSINE`."""
  for name, value in lowest.items():
    if value < MIN_COSINE:
      raise UserError(f'the export is not the model: cosine {value:.6f} on {name}; it must be at least {MIN_COSINE}')


def accuracy(models: Sequence[Model], towers: Towers, folder: pathlib.Path) -> list[float] | None:
  """Zero-shot top-1 over all concepts of the held-out style (else of the config's first split), in [0, 1], a model; None
  for data without concepts."""
  contents = manifest.load(folder)
  if not contents.concepts:
    return None
  records = _records(towers, folder)
  images = np.stack([transforms.evaluation_transform(transforms.decode(r.image), towers.image_item.shape[0]) for r in records])
  labels = np.array([contents.concepts.index(record.concept) for record in records])
  return [float(np.mean((m.encode_image(images) @ m.encode_text(contents.concepts).T).argmax(axis=1) == labels))
          for m in models]


def latency(tower: Callable, example: np.ndarray, runs: int = 30) -> float:
  """Median milliseconds of one example."""
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    np.asarray(tower(example))
    seconds.append(time.perf_counter() - start)
  return 1000 * statistics.median(seconds[2:])


def _records(towers: Towers, folder: pathlib.Path) -> Sequence:
  splits = [s for s in towers.loaded.config.evaluation.splits if s in manifest.load(folder).splits]
  if not splits:
    raise UserError(f'{str(folder)!r} has none of the splits {", ".join(towers.loaded.config.evaluation.splits)}')
  return pipeline.evaluation_records(folder, PREFERRED if PREFERRED in splits else splits[0])
