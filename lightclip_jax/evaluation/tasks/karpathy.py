"""Retrieval on Flickr30k or COCO with Karpathy's split file: the images of its test split, the first five captions each.

Equal captions of two images are one text, with both images for right answers, so that the texts are fewer than in the
literature by the few captions that occur twice.
"""
import functools
import json
from typing import Any

import numpy as np

from lightclip_jax import storage
from lightclip_jax.data import transforms
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import retrieval
from lightclip_jax.evaluation.labelled import Part
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session

CAPTIONS = 5   # some images of COCO have six or seven; results in the literature are over 25,000 captions
FOLDERS = ('', 'images', 'flickr30k-images', 'flickr30k_images')


def run(session: Session, file: str) -> list[Metric]:
  """R@k both ways for the images beside `file` (in its folder, or in one called images).

  Raises:
    UserError: if the file is no such file, or an image is missing.
  """
  rows = read(file)
  path = storage.path(file)
  images = [_find(path.parent, row) for row in rows]
  part = Part(str(storage.absolute(path)), functools.partial(_read, images), np.zeros(len(images), int))
  captions = [[sentence['raw'].strip() for sentence in row['sentences'][:CAPTIONS]] for row in rows]
  texts, right_IxT = retrieval.distinct(captions)
  return retrieval.metrics(retrieval.retrieval(session.embed(part), session.texts(texts), right_IxT))


def read(file: str) -> list[dict[str, Any]]:
  """The rows of the test split. Raises UserError for a file that is not Karpathy's."""
  try:
    rows = json.loads(storage.path(file).read_text(encoding='utf-8'))['images']
    test = [row for row in rows if row['split'] == 'test' and row['sentences'] and row['filename']]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file!r} is not one of Karpathy's split files ({type(error).__name__}: {error})") from error
  if not test:
    raise UserError(f'{file!r} has no image in its split test')
  return test


def _find(folder: storage.Path, row: dict[str, Any]) -> storage.Path:
  """COCO's rows name a folder (val2014) in `filepath`."""
  for below in FOLDERS:
    for path in (folder / below / row.get('filepath', '') / row['filename'], folder / below / row['filename']):
      if path.is_file():
        return path
  raise UserError(f'the image {row["filename"]!r} is not in {str(folder)!r}, nor in its folder images')


def _read(files: list[storage.Path], index: int) -> np.ndarray:
  try:
    return transforms.decode(files[index].read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read the image {str(files[index])!r}: {error}') from error
