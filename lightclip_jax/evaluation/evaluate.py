"""Evaluation of a model on the splits of a prepared folder, in training and alone."""
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightclip_jax import storage
from lightclip_jax.evaluation import tasks
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import prepared


def evaluate_all(embedder: Embedder, folder: str | storage.Path, splits: Sequence[str]) -> list[Metric]:
  """Every metric of the named splits of any prepared folder. Class texts are embedded once for all splits.

  Raises:
    UserError: for a folder that is not prepared, or a split that it lacks.
  """
  return evaluate_splits(Session(embedder, folder), splits)


def evaluate_splits(session: Session, splits: Sequence[str]) -> list[Metric]:
  """The same in a session that has more to do, such as the report's gallery, with the embeddings it already has."""
  return run(session, {split: functools.partial(prepared.run, split=split) for split in splits})


def evaluate_tasks(embedder: Embedder, folder: str | storage.Path, names: Sequence[str]) -> list[Metric]:
  """Every metric of the named registered tasks.

  Raises:
    UserError: for an unknown task, with the list; before any of them runs.
  """
  chosen = {name: tasks.find(name) for name in names}
  return run(Session(embedder, folder), chosen)


def run(session: Session, chosen: Mapping[str, tasks.Task]) -> list[Metric]:
  """The metrics of the tasks, in their order."""
  return [metric for task in chosen.values() for metric in task(session)]


def write_json(file: str | storage.Path, metrics: Sequence[Metric], **about: Any) -> None:
  """Results as JSON: `about` (checkpoint, step, …) and, per metric, value, count, chance, 95 % interval and anchors."""
  path = storage.path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps({**about, 'metrics': [metric.json() for metric in metrics]}, indent=2)
  path.write_text(text + '\n', encoding='utf-8')
