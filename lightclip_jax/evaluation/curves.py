"""Line charts as inline SVG that takes its colours from the page, so that they follow light and dark."""
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 210, 46, 12, 10, 26


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve. Its colour is the page's `.line-<colour>`."""
  label: str
  steps: Sequence[float]
  values: Sequence[float]
  colour: int = 0


@dataclasses.dataclass(frozen=True)
class Level:
  """A dashed horizontal line with a name, such as chance."""
  label: str
  value: float


@dataclasses.dataclass(frozen=True)
class _Frame:
  """Where values lie in the picture."""
  low: float
  high: float
  last: float                  # step

  def x(self, step: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last

  def y(self, value: float) -> float:
    share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

  def across(self, kind: str, value: float) -> str:
    """A horizontal line."""
    y = f'{self.y(value):.1f}'
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'


def smooth(values: Sequence[float], fraction: float = 0.03) -> np.ndarray:
  """Centred moving average over a share of the curve; the window shrinks at the ends, so as to invent nothing there."""
  half = max(1, round(fraction * len(values) / 2))
  total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
  at = np.arange(len(values))
  reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
  return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def chart(lines: Sequence[Line], *, levels: Sequence[Level] = (), noisy: bool = False, share: bool = False) -> Markup:
  """An SVG of the curves over training steps.

  Args:
    lines: the curves; each needs a finite value.
    levels: references; one outside the range of the curves widens it, unless it would flatten them.
    noisy: draws the raw values faintly and their moving average over them.
    share: values are in [0, 1], the axis begins at 0 and is in per cent; points are marked.
  """
  lines = [_finite(line) for line in lines]
  frame = _Frame(*_range(lines, levels, share), max(line.steps[-1] for line in lines) or 1)
  parts = _axes(frame, share)
  for level in levels:
    parts += _level(level, frame)
  for line in lines:
    parts += _curve(line, frame, noisy, share)
  return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Round numbers in [low, high], about `count` apart."""
  rough = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _finite(line: Line) -> Line:
  keep = [i for i, value in enumerate(line.values) if math.isfinite(value)]
  return dataclasses.replace(line, steps=[line.steps[i] for i in keep], values=[line.values[i] for i in keep])


def _range(lines, levels, share) -> tuple[float, float]:
  """From the curves without their rarest spikes, so that one bad step does not flatten the rest."""
  values = np.concatenate([line.values for line in lines])
  low, high = (0.0, values.max()) if share else np.percentile(values, [0, 99.5])
  span = (high - low) or abs(high) or 1.0
  for level in levels:
    if low - span < level.value < high + span:
      low, high = min(low, level.value), max(high, level.value)
  margin = 0.06 * ((high - low) or span)
  return (0.0 if share or 0 <= low < margin else low - margin), high + 2 * margin


def _axes(frame: _Frame, share: bool) -> list[str]:
  parts = []
  for value in ticks(frame.low, frame.high):
    label = f'{100 * value:.4g} %' if share else f'{value:.4g}'
    parts += [frame.across('grid', value), _text(LEFT - 6, frame.y(value) + 4, 'end', label)]
  for step in ticks(0, frame.last):
    anchor = 'end' if frame.x(step) > WIDTH - RIGHT - 14 else 'middle'
    parts.append(_text(frame.x(step), HEIGHT - 8, anchor, f'{step:,.0f}'))
  return parts


def _level(level: Level, frame: _Frame) -> list[str]:
  if not frame.low <= level.value <= frame.high:
    return []
  return [frame.across('level', level.value), _text(WIDTH - RIGHT, frame.y(level.value) - 4, 'end', level.label)]


def _text(x: float, y: float, anchor: str, text: str) -> str:
  return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _curve(line: Line, frame: _Frame, noisy: bool, marked: bool) -> list[str]:
  colour = f'line-{line.colour}'
  shown = smooth(line.values) if noisy else line.values
  parts = [f'<polyline class="raw {colour}" points="{_points(line.steps, line.values, frame)}"/>'] if noisy else []
  parts.append(f'<polyline class="line {colour}" points="{_points(line.steps, shown, frame)}"/>')
  for step, value in zip(line.steps, line.values, strict=True) if marked else ():
    parts.append(f'<circle class="dot {colour}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="2.6">'
                 f'<title>{escape(line.label)}, step {step:,}: {100 * value:.2f} %</title></circle>')
  return parts


def _points(steps: Sequence[float], values: Sequence[float], frame: _Frame, limit: int = 600) -> str:
  """At most `limit` points: a long run must not make a page of megabytes."""
  keep = np.unique(np.linspace(0, len(values) - 1, min(limit, len(values))).round().astype(int))
  return ' '.join(f'{frame.x(steps[i]):.1f},{frame.y(values[i]):.1f}' for i in keep)
