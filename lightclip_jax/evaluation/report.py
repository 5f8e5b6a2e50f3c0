"""The page `report/index.html` of a run: one file that needs nothing else, for any browser.

Letters: S pixels, G patches along one side of the grid.
"""
import base64
import collections
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import PIL.Image
from markupsafe import Markup

from lightclip_jax import storage
from lightclip_jax.config import Config
from lightclip_jax.evaluation import curves
from lightclip_jax.evaluation.gallery import Guessed
from lightclip_jax.evaluation.insight import Insight
from lightclip_jax.evaluation.matching import Matching
from lightclip_jax.evaluation.metrics import Metric, percent, scalars

Log = list[dict[str, float]]

# The charts: log name -> title. What a run did not log is left out.
LOSSES = {'train/loss': 'Total', 'train/loss_contrastive': 'Contrastive', 'train/loss_token_matching': 'Token matching',
          'train/loss_masked_lm': 'Masked words', 'train/loss_distillation': 'Distillation'}
VITALS = {'train/top1_image_to_text': 'In-batch top-1', 'train/logit_scale': 'Logit scale',
          'train/gradient_norm': 'Gradient norm', 'train/learning_rate': 'Learning rate',
          'train/examples_per_second': 'Examples per second', 'train/data_wait': 'Time spent waiting for data'}
# The accuracies: end of a metric's name -> title, in the order of the page; also the names in the table.
ACCURACIES = {'concept_top1': 'Concept, top-1', 'concept_top5': 'Concept, top-5', 'group_top1': 'Group, top-1',
              'image_to_text_r1': 'Image → text, R@1', 'image_to_text_r5': 'Image → text, R@5',
              'image_to_text_r10': 'Image → text, R@10', 'text_to_image_r1': 'Text → image, R@1',
              'text_to_image_r5': 'Text → image, R@5', 'text_to_image_r10': 'Text → image, R@10',
              'top1': 'Top-1', 'top5': 'Top-5', 'mean_per_class': 'Mean over classes', 'plan': 'By the matching',
              'max_similarity': 'By maximal similarity', 'top1_1_neighbours': 'Nearest neighbour',
              'top1_20_neighbours': '20 neighbours', 'top1_1_shots': '1 image a class', 'top1_5_shots': '5 images a class',
              'top1_10_shots': '10 images a class'}
CHARTED = ('concept_top1', 'concept_top5', 'group_top1', 'image_to_text_r10')
HEADLINES = {'eval/heldout_style/concept_top1': 'drawings in a style it never saw',
             'eval/heldout_images/concept_top1': 'held-out images'}


def write_report(workdir: str | storage.Path, results: Sequence[Metric], gallery: Sequence[Guessed],
                 matchings: Sequence[Matching], config: Config, insight: Insight = Insight()) -> storage.Path:  # noqa: B008
  """Writes `workdir/report/index.html` from `workdir/metrics.jsonl` and the final results; returns its path.

  All text of the data (names, captions, styles) is escaped. With several processes, call it in one.
  """
  log = read_log(storage.path(workdir) / 'metrics.jsonl')
  if log:
    log[-1] |= scalars(results)   # the curves end with the final results, whether these are in the file yet or not
  near = [drawn for row in insight.neighbours for drawn in (row.query, *(drawn for drawn, _ in row.nearest))]
  page = render(
    'report.html',
    title=config.name, headline=_headline(results), facts=_facts(log, config), tables=_tables(results),
    losses=_train_charts(log, LOSSES, config), vitals=_train_charts(log, VITALS, config),
    accuracies=_accuracy_charts(log, results), splits=_splits(log), gallery=gallery, matchings=matchings,
    insight=insight, reliability=_reliability(insight),
    credits=sorted({(drawn.style, drawn.licence) for drawn in [*gallery, *matchings, *near] if drawn.style}),
    config=json.dumps(dataclasses.asdict(config), indent=2))
  path = storage.path(workdir) / 'report' / 'index.html'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  return path


def render(template: str, **values: Any) -> str:
  """A page of `templates/`; all values are escaped unless they are `Markup`."""
  environment = jinja2.Environment(loader=jinja2.PackageLoader('lightclip_jax.evaluation'), autoescape=True,
                                   trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters.update(percent=percent, data_url=_data_url, overlay=_overlay)
  return environment.get_template(template).render(**values)


def read_log(path: storage.Path) -> Log:
  """The lines of a metrics file by step; a step logged again (after a resume) counts as logged last.

  A half-written last line, left by a killed run, is passed over.
  """
  rows: dict[int, dict[str, float]] = collections.defaultdict(dict)
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
      rows[int(row['step'])].update(row)
    except (json.JSONDecodeError, KeyError, TypeError):
      continue
  return [rows[step] for step in sorted(rows)]


def _headline(results: Sequence[Metric]) -> str:
  by_name = {metric.name: metric for metric in results}
  for name, what in HEADLINES.items():
    if name in by_name:
      metric = by_name[name]
      times = metric.value / metric.chance
      compared = f'{times:,.0f} times as often as chance' if times >= 2 else 'no better than chance yet'
      return (f'It names {percent(metric.value)} of {metric.count:,} {what} at the first guess among '
              f'{round(1 / metric.chance):,} names, {compared}.')
  return ''


def _facts(log: Log, config: Config) -> list[tuple[str, str]]:
  steps = int(log[-1]['step']) if log else 0
  speeds = [row['train/examples_per_second'] for row in log if 'train/examples_per_second' in row]
  image = config.model.image
  width = f' ×{image.width:g}' if image.width != 1 else ''
  facts = [('image tower', f'{image.name}{width}, {image.size} px'),
           ('text tower', f'{config.model.text.depth} layers of {config.model.text.width}'), ('steps', f'{steps:,}'),
           ('batch', f'{config.train.batch_size:,}'), ('pairs seen', f'{steps * config.train.batch_size:,}')]
  return facts + ([('pairs per second', f'{np.median(speeds):,.0f}')] if speeds else [])


def _tables(results: Sequence[Metric]) -> list[dict[str, Any]]:
  """One table a split. A row's bar and marks are in per cent of the bar; a metric has the same scale in all tables."""
  shown = [(*metric.name.split('/')[-2:], metric) for metric in results if metric.name.split('/')[-1] in ACCURACIES]
  top: dict[str, float] = collections.defaultdict(float)
  for _, name, metric in shown:
    top[name] = max(top[name], 1.1 * max(metric.interval[1], metric.chance, *(value for _, value in metric.anchors), 0))
  tables: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
  for split, name, metric in shown:
    marks = {'value': metric.value, 'low': metric.interval[0], 'high': metric.interval[1], 'chance': metric.chance}
    tables[split].append({
      'metric': metric, 'title': ACCURACIES[name], 'at': {key: 100 * mark / top[name] for key, mark in marks.items()},
      'anchors': [(what, value, 100 * value / top[name]) for what, value in metric.anchors]})
  return [{'title': title(split), 'rows': rows} for split, rows in tables.items()]


def _train_charts(log: Log, names: dict[str, str], config: Config) -> list[tuple[str, str, Markup]]:
  """(title, last smoothed value, chart) for each name that was logged."""
  charts = []
  for name, title in names.items():
    rows = [row for row in log if math.isfinite(row.get(name, math.nan))]
    if not rows:
      continue
    line = curves.Line(title, [row['step'] for row in rows], [row[name] for row in rows])
    svg = curves.chart([line], levels=_chance_levels(name, config), noisy=True)
    charts.append((title, f'{curves.smooth(line.values)[-1]:.4g}', svg))
  return charts


def _reliability(insight: Insight) -> Markup | str:
  """Accuracy over confidence, beside what it should be."""
  if len(insight.bins) < 2:
    return ''
  sure = [100 * b.confidence for b in insight.bins]
  right = curves.Line('right', sure, [b.accuracy for b in insight.bins])
  return curves.chart([right, curves.Line('as often as it says', sure, [x / 100 for x in sure], 5)], share=True)


def _chance_levels(name: str, config: Config) -> list[curves.Level]:
  """The loss of random answers: the log of how many there are to choose from."""
  if name == 'train/loss_contrastive' and config.objective.contrastive.kind == 'softmax':
    return [curves.Level('chance: log B', math.log(config.train.batch_size))]
  if name == 'train/loss_token_matching':
    return [curves.Level('chance: log of the group', math.log(config.objective.token_matching.group_size))]
  return []


def _accuracy_charts(log: Log, results: Sequence[Metric]) -> list[tuple[str, Markup]]:
  """A chart a metric, with a curve a split."""
  chance = {metric.name: metric.chance for metric in results}
  charts = []
  for end in CHARTED:
    lines, names = [], [f'eval/{split}/{end}' for split in _splits(log)]
    for colour, name in enumerate(names):
      rows = [row for row in log if math.isfinite(row.get(name, math.nan))]
      if len(rows) > 1:
        steps, values = [row['step'] for row in rows], [row[name] for row in rows]
        lines.append(curves.Line(title(name.split('/')[1]), steps, values, colour % 6))   # style.css has six
    known = {chance[name] for name in names if chance.get(name)}
    levels = [curves.Level('chance', known.pop())] if len(known) == 1 else []   # else it differs by split
    if lines:
      charts.append((ACCURACIES[end], curves.chart(lines, levels=levels, share=True)))
  return charts


def _splits(log: Log) -> dict[str, str]:
  """Name -> title of every split with a curve, in the order of the log."""
  names = [name.split('/')[1] for row in log for name in row if name.startswith('eval/') and name.endswith(CHARTED)]
  return {name: title(name) for name in dict.fromkeys(names)}


def title(split: str) -> str:
  """A split or task as a person writes it: `knn:digits` is "Knn, digits"."""
  kind, _, data = split.replace('heldout', 'held-out').replace('_', ' ').partition(':')
  return kind.capitalize() + (f', {data}' if data else '')


def _data_url(image: np.ndarray) -> str:
  """uint8 [S, S, 3 or 4] as an inline picture."""
  out = io.BytesIO()
  PIL.Image.fromarray(image).save(out, 'webp', lossless=image.shape[2] == 4, quality=85)
  return 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()


def _overlay(heat_GxG: np.ndarray) -> str:
  """White where the heat is average or less, magenta where it is highest: one pixel a patch, enlarged by the browser.

  Full colour needs three times the average, so that an even spread does not look like a finding.
  """
  mean, most = float(heat_GxG.mean()), float(heat_GxG.max())
  share = np.clip((heat_GxG - mean) / max(most - mean, 2 * mean, 1e-12), 0, 1)[..., None]
  colour = np.array([255, 255, 255]) * (1 - share) + np.array([208, 0, 120]) * share
  return _data_url(np.concatenate([colour, 110 + 90 * share], axis=2).round().astype(np.uint8))
