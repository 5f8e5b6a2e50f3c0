"""Zero-shot classification inside one group of the held-out style, such as the flags: only its names are asked for."""
import numpy as np

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.image_sets.heldout import TEST
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.zero_shot import zero_shot


def run(session: Session, group: str) -> list[Metric]:
  """Top-1 and top-5.

  Raises:
    UserError: for data without such a group.
  """
  records = session.records(TEST)
  mine = [i for i, record in enumerate(records) if record.group == group]
  if not mine:
    raise UserError(f'{session.manifest.name!r} has no group {group!r}; it has: {", ".join(session.manifest.groups)}')
  names = sorted({records[i].concept for i in mine})
  result = zero_shot(session.images(TEST)[mine], session.classes(names, 'name'),
                     np.array([names.index(records[i].concept) for i in mine]))
  return [Metric(f'top{k}', share, result.count, min(1.0, k / len(names))) for k, share in result.top.items()]
