"""What a task measures, as a value that knows its count, its chance level and its uncertainty."""
import dataclasses
import math
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Metric:
  """One number of one task. A share lies in [0, 1]; a rank has no chance level."""
  name: str                                   # 'eval/heldout_style/concept_top1'
  value: float
  count: int                                  # queries that it is a share (or median) of
  chance: float | None = None                 # what random answers reach; None: the value is not a share
  anchors: tuple[tuple[str, float], ...] = ()   # (what, what it reaches)

  @property
  def interval(self) -> tuple[float, float] | None:
    """95 % confidence, Wilson's score interval (JASA 22, 1927), for a share."""
    return None if self.chance is None else wilson(self.value, self.count)

  def json(self) -> dict[str, Any]:
    """Plain values, for a JSON file."""
    return {**dataclasses.asdict(self), 'anchors': dict(self.anchors), 'interval_95': self.interval}


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
  """Wilson's score interval for a share of `count` independent trials; it stays inside [0, 1] and holds at 0 and 1."""
  centre = (share + z * z / (2 * count)) / (1 + z * z / count)
  half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
  return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))   # rounding must not leave it out


def scalars(metrics: Iterable[Metric]) -> dict[str, float]:
  """Name -> value, for the training log."""
  return {metric.name: metric.value for metric in metrics}


def percent(share: float) -> str:
  """Two digits where they matter: '0.05 %', '7.3 %', '43.0 %'."""
  return f'{100 * share:.2f} %' if share < 0.01 else f'{100 * share:.1f} %'


def format_table(metrics: Iterable[Metric]) -> str:
  """Aligned plain text for a console: metric, value, chance, 95 % interval, count and known anchors."""
  rows = [('metric', 'value', 'chance', '95 % interval', 'of', 'for comparison')] + [_row(m) for m in metrics]
  widths = [max(len(row[i]) for row in rows) for i in range(5)]
  lines = ['  '.join((row[0].ljust(widths[0]), *map(str.rjust, row[1:5], widths[1:]), row[5])).rstrip() for row in rows]
  return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def _row(metric: Metric) -> tuple[str, ...]:
  name, count = metric.name.removeprefix('eval/'), f'{metric.count:,}'
  if metric.chance is None:
    return name, f'{metric.value:g}', '', '', count, ''
  low, high = (percent(share).removesuffix(' %') for share in metric.interval)
  anchors = ', '.join(f'{what} {percent(value)}' for what, value in metric.anchors)
  return name, percent(metric.value), percent(metric.chance), f'{low} to {high}', count, anchors
