"""The evaluation tasks: one file each (or one function for a family), one line here.

A task takes a `Session` and returns its metrics by their short names; in logs and results they are
`eval/<task>/<metric>`. A family makes a task of an argument: `zero_shot:digits`.
"""
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

from lightclip_jax.data import sources
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import image_sets
from lightclip_jax.evaluation.labelled import ImageSet
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import few_shot, karpathy, knn, linear_probe, pointing, prepared, within_group, zero_shot

Task = Callable[[Session], list[Metric]]

TASKS: dict[str, Task] = {
  'heldout_images': functools.partial(prepared.run, split='heldout_images'),
  'heldout_style': functools.partial(prepared.run, split='heldout_style'),
  'heldout_concepts': functools.partial(prepared.run, split='heldout_concepts'),
  'flags': functools.partial(within_group.run, group='flags'),
  'pointing': pointing.run,
  sources.HELDOUT: functools.partial(prepared.run, split=sources.HELDOUT),
}
ON_IMAGE_SETS: dict[str, Callable[[Session, ImageSet], list[Metric]]] = {
  'zero_shot': zero_shot.run,
  'linear_probe': linear_probe.run,
  'knn': knn.run,
  'few_shot': few_shot.run,
}
ON_FILES: dict[str, Callable[[Session, str], list[Metric]]] = {
  'retrieval': karpathy.run,
}
# What `--task=all` runs: all that needs no data but the package's own.
BUILT_IN = (*(name for name in TASKS if name != sources.HELDOUT), *(f'{kind}:digits' for kind in ON_IMAGE_SETS),
            'knn:concepts', 'knn:groups', 'linear_probe:groups')


def find(name: str) -> Task:
  """The task called `name`.

  Raises:
    UserError: for an unknown task, with the list.
  """
  kind, _, argument = name.partition(':')
  if name in TASKS:
    return TASKS[name]
  if kind in ON_FILES and argument:
    return functools.partial(ON_FILES[kind], file=argument)
  if kind in ON_IMAGE_SETS and argument:
    load, run = image_sets.find(argument), ON_IMAGE_SETS[kind]
    return lambda session: run(session, load(session))
  families = [*(f'{kind}:SET' for kind in ON_IMAGE_SETS), *(f'{kind}:FILE.json' for kind in ON_FILES)]
  raise UserError(f'unknown task {name!r}; there are: {", ".join([*TASKS, *families])}; '
                  f'SET can be {", ".join(image_sets.SETS)}, or a folder with one folder a class')


def choose(names: Sequence[str]) -> dict[str, Task]:
  """Tasks by name, each once, in the order given; 'all' stands for all that need no further data.

  Raises:
    UserError: for an unknown one, or for two whose metrics would have the same names.
  """
  flat = [each for name in names for each in (BUILT_IN if name == 'all' else (name,))]
  shorts: dict[str, str] = {}
  for name in dict.fromkeys(flat):
    if (other := shorts.setdefault(short(name), name)) != name:
      raise UserError(f'the tasks {other!r} and {name!r} would both be {short(name)!r} in the results; evaluate them one by '
                      'one, or call one of them otherwise (by a link)')
  return {name: find(name) for name in shorts.values()}


def prompted(names: Iterable[str]) -> set[str]:
  """The image sets whose prompts the tasks use, as files of prompts name them: a folder by its last part."""
  parted = [name.partition(':') for name in names]
  return {pathlib.PurePath(argument).name for kind, _, argument in parted if kind == 'zero_shot'}


def short(task: str) -> str:
  """The task's name as it stands in metrics. A folder or file is named by its last part, since "/" parts the names."""
  kind, colon, argument = task.partition(':')
  return f'{kind}{colon}{pathlib.PurePath(argument).stem if argument else ""}'
