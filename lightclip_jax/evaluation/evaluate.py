"""Evaluation of a model by tasks, in training and alone."""
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence

from lightclip_jax import storage
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import tasks
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import prepared


@dataclasses.dataclass(frozen=True)
class TaskResult:
  """What became of one task; `error` is one line where it failed."""
  task: str
  metrics: tuple[Metric, ...]
  prompts: dict[str, str]          # template set -> hash of its templates, of those that it used
  seconds: float
  error: str = ''


def evaluate_all(embedder: Embedder, folder: str | storage.Path, splits: Sequence[str]) -> list[Metric]:
  """Every metric of the named splits of any prepared folder. Class texts are embedded once for all splits.

  Raises:
    UserError: for a folder that is not prepared, or a split that it lacks.
  """
  return evaluate_splits(Session(embedder, folder), splits)


def evaluate_splits(session: Session, splits: Sequence[str]) -> list[Metric]:
  """The same in a session that has more to do, such as the report's gallery, with the embeddings it already has."""
  return run(session, of_splits(splits))


def of_splits(splits: Sequence[str]) -> dict[str, tasks.Task]:
  """A task for each split of a prepared folder."""
  return {split: functools.partial(prepared.run, split=split) for split in splits}


def run(session: Session, chosen: Mapping[str, tasks.Task]) -> list[Metric]:
  """The metrics of the tasks, in their order; the first failure ends it."""
  return [metric for name, task in chosen.items() for metric in _named(name, task(session))]


def run_each(session: Session, chosen: Mapping[str, tasks.Task], debug: bool = False) -> list[TaskResult]:
  """The results of the tasks, in their order; one that fails does not keep the others from running.

  With several processes the tasks run in all of them, and a failure must be one of all of them. With `debug` the first
  failure is raised.
  """
  results = []
  for name, task in chosen.items():
    start, session.prompts = time.perf_counter(), {}
    metrics, error = (), ''
    try:
      metrics = _named(name, task(session))
    except Exception as failure:   # whatever is wrong with one task's data or libraries, the other tasks can still run
      if debug:
        raise
      first_line = next(iter(str(failure).strip().splitlines()), '')
      error = first_line if isinstance(failure, UserError) else f'{type(failure).__name__}: {first_line}'
    results.append(TaskResult(name, metrics, session.prompts, time.perf_counter() - start, error))
  return results


def _named(task: str, metrics: Sequence[Metric]) -> tuple[Metric, ...]:
  return tuple(dataclasses.replace(metric, name=f'eval/{tasks.short(task)}/{metric.name}') for metric in metrics)
