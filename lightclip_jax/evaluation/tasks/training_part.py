"""What probes learn from."""
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.labelled import ImageSet, Part


def needs_training(images: ImageSet) -> tuple[Part, ...]:
  """The training parts.

  Raises:
    UserError: for a set that has none.
  """
  if not images.train:
    raise UserError(f'{images.name!r} has no training images, from which a probe would learn; '
                    'a folder needs train/CLASS/ and test/CLASS/')
  return images.train
