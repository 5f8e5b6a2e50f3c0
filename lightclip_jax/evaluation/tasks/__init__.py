"""The evaluation tasks: one file each (or one function for a family), one line here.

A task takes a `Session` and returns its metrics, named `eval/<task>/<metric>`.
"""
import functools
from collections.abc import Callable

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import prepared

Task = Callable[[Session], list[Metric]]

TASKS: dict[str, Task] = {
  'heldout_images': functools.partial(prepared.run, split='heldout_images'),
  'heldout_style': functools.partial(prepared.run, split='heldout_style'),
  'heldout_concepts': functools.partial(prepared.run, split='heldout_concepts'),
}


def find(name: str) -> Task:
  """The task called `name`.

  Raises:
    UserError: for an unknown task, with the list.
  """
  if name not in TASKS:
    raise UserError(f'unknown task {name!r}; there are: {", ".join(TASKS)}')
  return TASKS[name]
