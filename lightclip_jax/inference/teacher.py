"""Any model that `lightclip_jax.load` reads, as the teacher of a prepared folder."""
import pathlib
from collections.abc import Iterator

import numpy as np
import tqdm

from lightclip_jax.data import manifest, teacher
from lightclip_jax.data.records import Record
from lightclip_jax.inference import images as images_lib
from lightclip_jax.inference import model as model_lib


def prepare(path: pathlib.Path, folder: pathlib.Path) -> tuple[manifest.Teacher, float]:
  """Embeds every training image, preprocessed as in evaluation (no augmentation), and every caption.

  Args:
    path: a run of training or an exported folder.
    folder: the prepared folder whose files are filled.

  Returns:
    The manifest's entry, and the temperature of the teacher's own softmax.

  Raises:
    UserError: for a model or a folder that cannot be read, or a folder that cannot be written.
  """
  model = model_lib.load(path)
  size = model.preprocessing['size']

  def encode_images(images: list[np.ndarray]) -> np.ndarray:
    return model.encode_image(np.concatenate([images_lib.prepare(image[None], size) for image in images]))

  def progress(parts: Iterator[list[Record]], total: int) -> Iterator[list[Record]]:
    return tqdm.tqdm(parts, 'teacher', total, unit=f'×{teacher.RECORDS_AT_A_TIME} records', disable=None)

  entry = teacher.write(folder, path.absolute().name, (encode_images, model.encode_text), progress)
  return entry, 1 / model.logit_scale
