"""scikit-learn's handwritten digits: 1,797 images of 8×8, from its package; the second half was written by other people."""
import numpy as np

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.labelled import ImageSet, Part


def load() -> ImageSet:
  """Dark ink on white; trained on the first half, tested on the second.

  Raises:
    UserError: if scikit-learn is not installed.
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    raise UserError('the digits lie in scikit-learn, which is not installed: pip install scikit-learn') from error
  images_NxHxW, labels_N = datasets.load_digits(return_X_y=True)
  images = np.rint(255 * (1 - images_NxHxW.reshape(-1, 8, 8) / 16)).astype(np.uint8)[..., None].repeat(3, axis=-1)
  half = len(labels_N) // 2
  return ImageSet('digits', tuple(map(str, range(10))), Part('digits/test', images[half:].__getitem__, labels_N[half:]),
                  lambda: (Part('digits/train', images[:half].__getitem__, labels_N[:half]),), prompts='digit')
