"""Proof that an export is the model: cosines against the JAX towers on noise and on real examples.

Letters: N examples, C concepts, S image size, W text positions, D embedding.
"""
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightclip_jax import storage
from lightclip_jax.data import datasets, manifest, pipeline, transforms
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import labelled
from lightclip_jax.export.towers import Towers

MIN_COSINE = 0.9999
EXAMPLES = 32
MOST_QUESTIONS = 5000
PREFERRED = 'heldout_style'   # the split that tells most, where there is one

Inputs = Mapping[str, np.ndarray]   # TOWER/KIND -> examples: 'image/noise' uint8 [N, S, S, 3], 'text/noise' int32 [N, W], …


class Questions(NamedTuple):
  """Images, each of which shows one of the concepts."""
  images_NxSxSx3: np.ndarray
  concepts: Sequence[str]
  labels_N: np.ndarray


def noise(towers: Towers, seed: int = 0) -> Inputs:
  """Random pixels, and texts of random words and lengths."""
  rng = np.random.default_rng(seed)
  tokenizer, context = towers.loaded.tokenizer, towers.text_item.shape[0]
  words = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
  tokens_NxW = np.full((EXAMPLES, context), tokenizer.pad_id, np.int32)
  for row_W, length in zip(tokens_NxW, rng.integers(2, context + 1, EXAMPLES), strict=True):
    row_W[:length] = [tokenizer.start_id, *rng.choice(words, length - 2), tokenizer.end_id]
  return {'image/noise': rng.integers(0, 256, (EXAMPLES, *towers.image_item.shape), np.uint8), 'text/noise': tokens_NxW}


def real(towers: Towers, folder: storage.Path) -> Inputs:
  """The first examples of the split that `questions` are of."""
  records = _records(towers, folder, EXAMPLES)
  return {'image/real': _images(towers, records),
          'text/real': towers.loaded.tokenizer.encode([r.captions[0] for r in records], towers.text_item.shape[0])}


def prepared_folder(name: str) -> pathlib.Path | None:
  """The prepared folder of a config's data set, if it is on this machine: an export fetches no data."""
  folder = datasets.folder_of(name) if name in datasets.BUILT_IN else pathlib.Path(name)
  return folder if (folder / manifest.FILE_NAME).is_file() else None


def embed(sides: Mapping[str, Callable], inputs: Inputs) -> dict[str, np.ndarray]:
  """What the towers give for the inputs, by the same names."""
  return {name: np.asarray(sides[name.split('/')[0]](examples)) for name, examples in inputs.items()}


def cosines(reference: Mapping[str, np.ndarray], exported: Mapping[str, np.ndarray]) -> dict[str, float]:
  """The lowest cosine of the embeddings [N, D] under each name: {'image/noise': 1.0, …}. NaN counts as -1."""
  out = {}
  for name, rows_NxD in reference.items():
    a, b = (np.asarray(rows, np.float64) for rows in (rows_NxD, exported[name]))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    out[name] = float(np.nan_to_num(cosine, nan=-1.0).min())
  return out


def check(lowest: Mapping[str, float]) -> None:
  """Raises UserError where a cosine is below `MIN_COSINE`."""
  for name, value in lowest.items():
    if value < MIN_COSINE:
      raise UserError(f'the export is not the model: cosine {value:.6f} on {name}; it must be at least {MIN_COSINE}')


def questions(towers: Towers, folder: storage.Path) -> Questions | None:
  """The held-out style (else the config's first split, else one that is there) and all concepts of the data; None where they
  have none."""
  concepts = manifest.load(folder).concepts
  if not concepts:
    return None
  records = _records(towers, folder, MOST_QUESTIONS)
  return Questions(_images(towers, records), concepts, labelled.labels(records, 'concept', concepts))


def accuracy(images_NxD: np.ndarray, concepts_CxD: np.ndarray, labels_N: np.ndarray) -> float:
  """Zero-shot top-1, in [0, 1]."""
  return float(np.mean((images_NxD @ concepts_CxD.T).argmax(axis=1) == labels_N))


def latency(tower: Callable, example: np.ndarray, runs: int = 30) -> float:
  """Median milliseconds of one example."""
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    np.asarray(tower(example))
    seconds.append(time.perf_counter() - start)
  return 1000 * statistics.median(seconds[2:])


def _records(towers: Towers, folder: storage.Path, most: int) -> Sequence:
  """The first ones of the split that tells most; of a set that was prepared without held-out records those trained on."""
  config, there = towers.loaded.config, manifest.load(folder).splits
  wanted = config.evaluation.splits
  split = next(name for name in (*[PREFERRED] * (PREFERRED in wanted), *wanted, *reversed(there)) if name in there)
  return pipeline.evaluation_records(folder, split, config.data.max_pixels, most)


def _images(towers: Towers, records: Sequence) -> np.ndarray:
  size = towers.image_item.shape[0]
  return np.stack([transforms.evaluation_transform(transforms.decode(record.image, None), size) for record in records])
