"""The image sets for classification and probes: one file for each kind, one line here for each set.

A set is made for a `Session`, since some are parts of the session's own prepared folder.
"""
import functools
from collections.abc import Callable

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.image_sets import digits, folder, heldout, tfds_sets
from lightclip_jax.evaluation.labelled import ImageSet, check
from lightclip_jax.evaluation.session import Session

Load = Callable[[Session], ImageSet]

SETS: dict[str, Load] = {
  'digits': lambda session: digits.load(),
  'concepts': functools.partial(heldout.load, kind='concept'),
  'groups': functools.partial(heldout.load, kind='group'),
  **{name: lambda session, name=name: tfds_sets.load(name) for name in tfds_sets.SETS},
}


def find(name: str) -> Load:
  """What loads the set called `name`; a name with a slash is a folder with one folder a class.

  Raises:
    UserError: for an unknown set, with the list.
  """
  if '/' not in name and name not in SETS:
    raise UserError(f'unknown image set {name!r}; there are: {", ".join(SETS)}, or a folder such as ./{name}')
  return functools.partial(_load, name)


def _load(name: str, session: Session) -> ImageSet:
  """Once in a session: each probe would read the labels again."""
  if name not in session.image_sets:
    session.image_sets[name] = check(folder.load(name) if '/' in name else SETS[name](session))
  return session.image_sets[name]
