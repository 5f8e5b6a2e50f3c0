"""Any model that `lightclip_jax.load` reads, as the teacher of a prepared folder."""
import pathlib
from collections.abc import Iterator

import numpy as np
import tqdm

from lightclip_jax import config as config_lib
from lightclip_jax.data import datasets, manifest, teacher
from lightclip_jax.data.records import Record
from lightclip_jax.errors import UserError
from lightclip_jax.inference import images as images_lib
from lightclip_jax.inference import model as model_lib


def prepare(path: pathlib.Path, name: str) -> tuple[manifest.Teacher, float]:
  """Embeds every training image, preprocessed as in evaluation (no augmentation), and every caption.

  Args:
    path: a run of training or an exported folder.
    name: the data, as `config.data.dataset` names them: a prepared folder, or several, each of which gets its files.

  Returns:
    The manifest's entry (that of the last folder), and the temperature of the teacher's own softmax.

  Raises:
    UserError: for a model or a folder that cannot be read, data that are not prepared, or a folder that cannot be written.
  """
  model = model_lib.load(path)
  size = model.preprocessing['size']
  parts = datasets.about(name, config_lib.Data())['parts']
  for part in parts:
    if part['kind'] != 'array_record':
      raise UserError(f'{part["kind"]}:{part["path"]} has no place for embeddings; prepare it first: '
                      f'python -m lightclip_jax.prepare {part["kind"]} {part["path"]} --out=FOLDER')

  def encode_images(images: list[np.ndarray]) -> np.ndarray:
    return model.encode_image(np.concatenate([images_lib.prepare(image[None], size) for image in images]))

  def progress(records: Iterator[list[Record]], total: int) -> Iterator[list[Record]]:
    return tqdm.tqdm(records, 'teacher', total, unit=f'×{teacher.RECORDS_AT_A_TIME} records', disable=None)

  for part in parts:
    entry = teacher.write(part['path'], path.absolute().name, (encode_images, model.encode_text), progress)
  return entry, 1 / model.logit_scale
