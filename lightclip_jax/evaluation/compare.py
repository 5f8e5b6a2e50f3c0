"""Several runs side by side: a table for the console and a page, from the results that each of them has written."""
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from lightclip_jax import storage
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import curves, report
from lightclip_jax.evaluation.metrics import Metric, percent


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run has written; `log` is empty where it left no metrics.jsonl."""
  name: str
  step: int
  metrics: dict[str, Metric]
  log: report.Log


@dataclasses.dataclass(frozen=True)
class Cell:
  """One value in the table."""
  text: str = ''
  best: bool = False
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Row:
  """One metric of all runs."""
  title: str
  cells: tuple[Cell, ...]
  chance: str


def read(path: str) -> Run:
  """A workdir with its results.json, or a file that `lightclip_jax.evaluate --out` wrote.

  Raises:
    UserError: if there are no results.
  """
  folder = storage.path(path)
  file = folder / 'results.json' if folder.is_dir() else folder
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
    metrics = [_metric(row) for row in values['metrics']]
    step = int(values['step'])
  except OSError as error:
    raise UserError(f'{path!r} holds no results ({error.strerror}); make them with: '
                    f'python -m lightclip_jax.evaluate --checkpoint={path} --out={file}') from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{str(file)!r} is no file of results ({type(error).__name__}: {error})') from error
  log = report.read_log(folder / 'metrics.jsonl') if folder.is_dir() else []
  return Run(path.rstrip('/'), step, {metric.name: metric for metric in metrics}, log)


def _metric(row: dict[str, Any]) -> Metric:
  return Metric(row['name'], float(row['value']), int(row['count']), row['chance'], tuple(row.get('anchors', {}).items()))


def tables(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
  """(task, its rows) for every metric that a run has, in the order in which they come."""
  found: dict[str, list[Row]] = {}
  for name in dict.fromkeys(name for run in runs for name in run.metrics):
    task, _, end = name.removeprefix('eval/').rpartition('/')
    found.setdefault(report.title(task), []).append(_row(report.ACCURACIES.get(end, end.replace('_', ' ')), name, runs))
  return list(found.items())


def _row(title: str, name: str, runs: Sequence[Run]) -> Row:
  """A metric without chance is no share: whether more of it is better is not known, and none is the best."""
  metrics = [run.metrics.get(name) for run in runs]
  there = [metric for metric in metrics if metric is not None]
  top = max(metric.value for metric in there) if all(m.interval for m in there) else math.inf
  chances = {percent(m.chance) for m in there if m.chance is not None}
  return Row(title, tuple(_cell(metric, top) for metric in metrics), ', '.join(sorted(chances)))


def _cell(metric: Metric | None, top: float) -> Cell:
  if metric is None:
    return Cell('–')
  if metric.interval is None:
    return Cell(f'{metric.value:g}', note=f'of {metric.count:,}')
  low, high = metric.interval
  return Cell(percent(metric.value), high >= top, f'{percent(low)} to {percent(high)}, of {metric.count:,}')


def format_table(runs: Sequence[Run]) -> str:
  """Aligned plain text; * marks the values that the page shows bold."""
  lines = [['', *(run.name for run in runs), 'chance']]
  for task, rows in tables(runs):
    lines.append([task, *[''] * (len(runs) + 1)])
    lines += [[f'  {row.title}', *(cell.text + ' *' * cell.best for cell in row.cells), row.chance] for row in rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines)


def write_page(file: str | storage.Path, runs: Sequence[Run]) -> storage.Path:
  """Writes the page, one file that needs nothing else; names are escaped. Returns its path."""
  path = storage.path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(report.render('compare.html', runs=runs, tables=tables(runs), charts=_charts(runs)), encoding='utf-8')
  return path


def _charts(runs: Sequence[Run]) -> list[tuple[str, Any]]:
  """A chart for each logged share of the evaluations, with a curve for each run that logged it more than once."""
  charts = []
  for name in dict.fromkeys(name for run in runs for row in run.log for name in row if name.startswith('eval/')):
    end, chances = name.split('/')[-1], {m.chance for run in runs if (m := run.metrics.get(name))}
    lines = []
    for number, run in enumerate(runs):
      rows = [row for row in run.log if math.isfinite(row.get(name, math.nan))]
      if len(rows) > 1 and end in report.ACCURACIES:
        lines.append(curves.Line(run.name, [r['step'] for r in rows], [r[name] for r in rows], number % 6))
    levels = [curves.Level('chance', chances.pop())] if len(chances) == 1 and None not in chances else []
    if lines:
      task = report.title(name.split('/')[1])
      charts.append((f'{task}: {report.ACCURACIES[end]}', curves.chart(lines, levels=levels, share=True)))
  return charts
