"""Image sets of TensorFlow Datasets by name, read through `tfds.data_source`: TensorFlow is not needed.

They must have been prepared before (`tfds build NAME --file_format=array_record`), in TFDS's data folder ($TFDS_DATA_DIR).
"""
import ast
import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from lightclip_jax.data import transforms
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.image_sets import class_names
from lightclip_jax.evaluation.labelled import ImageSet, Part

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a set lies in TFDS."""
  builder: str
  test: str = 'test'
  train: str = 'train'            # '': none
  validation: str = ''
  prompts: str = 'photo'
  occurring: bool = False         # only the classes that the test images have are asked for


SETS = {
  'imagenet': Source('imagenet2012', test='validation'),
  'imagenet_v2': Source('imagenet_v2', train=''),
  'imagenet_a': Source('imagenet_a', train='', occurring=True),
  'imagenet_r': Source('imagenet_r', train='', occurring=True),
  'imagenet_sketch': Source('imagenet_sketch', train=''),
  'cifar10': Source('cifar10'),
  'cifar100': Source('cifar100'),
  'food101': Source('food101', test='validation'),
  'pets': Source('oxford_iiit_pet'),
  'flowers102': Source('oxford_flowers102', validation='validation'),
  'sun397': Source('sun397', validation='validation'),
  'cars': Source('cars196'),
  'dtd': Source('dtd', validation='validation', prompts='texture'),
  'caltech101': Source('caltech101'),
  'eurosat': Source('eurosat/rgb', test='train[80%:]', train='train[:80%]', prompts='satellite'),
  'svhn': Source('svhn_cropped', prompts='digit'),
  'mnist': Source('mnist', prompts='digit'),
}


def load(name: str) -> ImageSet:
  """The image set called `name` in `SETS`.

  Raises:
    UserError: if tensorflow-datasets is not installed, the set is not prepared, or the names of ImageNet are missing.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f'{name} needs the package tensorflow-datasets: pip install tensorflow-datasets') from error
  source, encoded = SETS[name], {'image': tfds.decode.SkipDecoding()}   # labels are read without decoding the images
  builder = _prepared(name, lambda: tfds.builder(source.builder, file_format='array_record', try_gcs=False))
  open_split = lambda split: _prepared(name, lambda: builder.as_data_source(split, decoders=encoded))  # noqa: E731
  return from_sources(name, source, builder.info.features['label'].names, open_split)


def _prepared(name: str, read: Callable[[], T]) -> T:
  try:
    return read()
  except Exception as error:   # TFDS raises a dozen kinds for data that are not there
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise UserError(f'{name} cannot be read from TFDS ({first_line[:160]}); prepare it with: '
                    f'tfds build {SETS[name].builder} --file_format=array_record') from error


def from_sources(name: str, source: Source, own_names: list[str], open_split: Callable[[str], Any]) -> ImageSet:
  """The image set of random-access sources, which `open_split` gives: examples with `image`, encoded, and `label`.

  Training images are opened when a task asks for them: only their labels would be 1.28 million whole records of ImageNet.
  """
  names = imagenet_names() if name.startswith('imagenet') else class_names.clean(name, own_names)
  test = _part(name, open_split, source.test)
  if source.occurring:
    present, labels_N = np.unique(test.labels_N, return_inverse=True)
    names, test = [names[i] for i in present], dataclasses.replace(test, labels_N=labels_N)
  find = lambda split: (_part(name, open_split, split),) if split else ()  # noqa: E731
  return ImageSet(name, tuple(names), test, functools.partial(find, source.train), functools.partial(find, source.validation),
                  source.prompts)


def _part(name: str, open_split: Callable[[str], Any], split: str) -> Part:
  examples = open_split(split)
  labels_N = np.array([int(example['label']) for example in examples])
  return Part(f'{name}/{split}', functools.partial(_decode, examples), labels_N)


def imagenet_names() -> list[str]:
  """The 1,000 names in the order of the WordNet ids, from the installed package open_clip, whose code is not run.

  Raises:
    UserError: if it is not installed.
  """
  spec = importlib.util.find_spec('open_clip')
  file = pathlib.Path(spec.origin).with_name('zero_shot_metadata.py') if spec else None
  for node in ast.parse(file.read_text(encoding='utf-8')).body if file and file.is_file() else ():
    if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'IMAGENET_CLASSNAMES':
      return list(ast.literal_eval(node.value))
  raise UserError("ImageNet's class names lie in open_clip, which is not installed: pip install --no-deps open_clip_torch")


def _decode(examples: Any, index: int) -> np.ndarray:
  return transforms.decode(examples[index]['image'])
