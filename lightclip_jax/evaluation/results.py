"""Results as files: one JSON file an evaluation, and a CSV file that grows by a line for each metric."""
import csv
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lightclip_jax import storage
from lightclip_jax.evaluation.evaluate import TaskResult
from lightclip_jax.evaluation.metrics import Metric

COLUMNS = ('checkpoint', 'step', 'config_hash', 'preprocessing', 'task', 'metric', 'value', 'count', 'chance', 'low_95',
           'high_95', 'prompts')


@dataclasses.dataclass(frozen=True)
class Subject:
  """What was evaluated."""
  checkpoint: str
  step: int
  config: dict[str, Any]
  preprocessing: dict[str, Any]

  @property
  def config_hash(self) -> str:
    """Of what was learnt and how; where data and results lie does not enter."""
    return _hash({name: value for name, value in self.config.items() if name not in ('name', 'checkpoint', 'evaluation')})


def write_json(file: str | storage.Path, metrics: Sequence[Metric], **about: Any) -> None:
  """Results as JSON: `about` (checkpoint, step, …) and, per metric, value, count, chance, 95 % interval and anchors."""
  path = storage.path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps({**about, 'metrics': [metric.json() for metric in metrics]}, indent=2)
  path.write_text(text + '\n', encoding='utf-8')


def write(file: str | storage.Path, subject: Subject, results: Sequence[TaskResult]) -> None:
  """The results of all tasks: under `tasks` each one's metrics, prompts' hashes, seconds and error; under `metrics` all."""
  tasks = {r.task: {'metrics': [m.name for m in r.metrics], 'prompts': r.prompts, 'seconds': round(r.seconds, 2),
                    'error': r.error} for r in results}
  write_json(file, [metric for result in results for metric in result.metrics], checkpoint=subject.checkpoint,
             step=subject.step, config_hash=subject.config_hash, preprocessing=subject.preprocessing, tasks=tasks)


def append_csv(file: str | storage.Path, subject: Subject, results: Sequence[TaskResult]) -> None:
  """One line a metric, below a line of `COLUMNS` in a new file."""
  path = storage.path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  new = not path.exists()
  with path.open('a', newline='', encoding='utf-8') as out:
    writer = csv.writer(out)
    if new:
      writer.writerow(COLUMNS)
    for result in results:
      prompts = ' '.join(f'{name}={value}' for name, value in result.prompts.items())
      for metric in result.metrics:
        writer.writerow([subject.checkpoint, subject.step, subject.config_hash, _hash(subject.preprocessing), result.task,
                         metric.name, metric.value, metric.count, metric.chance, *(metric.interval or ('', '')), prompts])


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
