"""The report, the console table and the curves."""
import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import PIL.Image
import pytest

from lightclip_jax import config, evaluate
from lightclip_jax.evaluation import calibration, curves, insight, metrics, report
from lightclip_jax.evaluation.gallery import Guessed, Picture
from lightclip_jax.evaluation.matching import Matching
from lightclip_jax.evaluation.metrics import Metric

EVIL = '<script>alert("x")</script> & \'co\''


class Page(html.parser.HTMLParser):
  """Tags, their attributes, the visible text, and whether tags are closed in order."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.open = [], '', []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.text += data

  def count(self, tag, **attributes):
    return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def picture(name, *guesses):
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  return Guessed(image, name, EVIL, 'CC-BY-4.0', tuple((g, 0.5 / (i + 1)) for i, g in enumerate(guesses)))


def write_log(folder, steps=range(10, 210, 10)):
  lines = []
  for step in steps:
    row = {'step': step, 'train/loss': 9 - step / 50, 'train/loss_contrastive': 5 - step / 100,
           'train/loss_token_matching': 2.0, 'train/loss_masked_lm': float('nan') if step == 50 else 3.0,
           'train/logit_scale': 14.0, 'train/examples_per_second': 321.0}
    if step % 100 == 0:
      row |= {f'eval/{split}/concept_top1': step / 4000 for split in ('heldout_images', 'heldout_style')}
    lines.append(json.dumps(row))
  (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')


RESULTS = [
  Metric('eval/heldout_style/concept_top1', 0.019, 1914, 1 / 1914, (('raw-pixel 1-NN', 0.073),)),
  Metric('eval/heldout_style/image_to_text_median_rank', 240, 1914),
  Metric('eval/heldout_images/concept_top1', 0.091, 1320, 1 / 1914),
]


@pytest.fixture
def page(tmp_path):
  write_log(tmp_path)
  gallery = [picture(EVIL, EVIL, 'a', 'b', 'c', 'd'), picture('cat', 'dog', 'cow', 'cat', EVIL, 'e')]
  matchings = [Matching(gallery[0].image, 'noto', 'Apache-2.0', (EVIL, 'face'), (np.eye(4), np.zeros((4, 4))))]
  drawn = Picture(gallery[0].image, EVIL, 'twemoji', 'MIT')
  looked = insight.Insight((insight.Confused(EVIL, 7, 0.25, ((EVIL, 0.5),)),), (insight.Neighbours(drawn, ((drawn, 0.75),)),),
                           (calibration.Bin(0.25, 0.125, 8), calibration.Bin(0.75, 0.5, 8)), 0.1875)
  path = report.write_report(tmp_path, RESULTS, gallery, matchings, config.replace(config.Config(), name=EVIL), looked)
  assert path == tmp_path / 'report' / 'index.html'
  return Page(path.read_text(encoding='utf-8'))


def test_text_of_the_data_is_escaped(page):
  assert page.count('script') == 0
  assert page.text.count(EVIL) >= 9          # title, picture, guesses, word, style, classes, neighbours: as they are
  assert not page.open                       # every tag was closed


def test_the_page_needs_nothing_else(page):
  for _, attributes in page.tags:
    for name in ('src', 'href'):
      assert attributes.get(name, 'data:').startswith('data:')
  assert page.count('link') == 0


def test_the_parts_are_there(page):
  for title in ('Results', 'Accuracy over time', 'Losses', 'What it sees', 'Where it finds the words', 'What it gets wrong',
                'What it finds similar', 'Configuration'):
    assert page.text.count(title) >= 1
  assert page.count('svg') == 4 + 2 + 1 + 1  # loss terms, scale and speed, one accuracy, calibration
  assert 'off by 18.8 %' in page.text and 'twemoji (MIT)' in page.text
  assert page.count('img', alt='cat') == 1
  for kind in ('card picture', 'card picture missed'):
    assert page.count('article', **{'class': kind}) == 1
  assert page.count('li', **{'class': 'right'}) == 2 and page.count('li', **{'class': 'wrong'}) == 1
  assert 'noto (Apache-2.0)' in page.text and '(CC-BY-4.0)' in page.text
  assert '"learning_rate"' in page.text


def test_the_table_has_values_chance_and_anchors(page):
  assert 'It names 1.9 % of 1,914 drawings in a style it never saw' in page.text and '36 times' in page.text
  for words in ('Held-out style', '0.05 %', 'raw-pixel 1-NN 7.3 %', '9.1 %'):
    assert words in page.text
  bars = [attributes['style'] for _, attributes in page.tags if attributes.get('class') == 'fill']
  widths = [float(re.search(r'width: ([\d.]+)%', style).group(1)) for style in bars]
  assert widths == pytest.approx([100 * 0.019 / 0.1179, 100 * 0.091 / 0.1179], rel=0.01)   # 1.1 × the upper bound


def test_curves_end_with_the_final_results(tmp_path):
  """A run writes its report before the last line of its log, or after it."""
  write_log(tmp_path, range(10, 110, 10))
  page = Page(report.write_report(tmp_path, RESULTS, [], [], config.Config()).read_text())
  assert page.count('circle') == 0                       # evaluated once: no curve
  write_log(tmp_path, range(10, 200, 10))
  page = Page(report.write_report(tmp_path, RESULTS, [], [], config.Config()).read_text())
  assert page.count('circle') == 4 and 'Held-out style, step 190: 1.90 %' in page.text


def test_curves_and_their_key_have_the_same_six_colours(tmp_path):
  rows = [{'step': step, **{f'eval/{name}/concept_top1': 0.1 * step for name in 'abcdefg'}} for step in (1, 2)]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  page = report.write_report(tmp_path, [], [], [], config.Config()).read_text()
  curves = re.findall(r'polyline class="line line-(\d+)"', page)
  assert re.findall(r'--mark: var\(--c(\d)\)">[A-G]<', page) == curves == [*'0123450']


def test_heat_is_pale_where_it_is_even():
  def shown(heat):
    data = base64.b64decode(report._overlay(np.asarray(heat, float)).split(',')[1])
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert('RGBA'))[..., 1]   # green: 255 white, 0 magenta
  np.testing.assert_array_equal(shown(np.full((4, 4), 0.3)), 255)
  np.testing.assert_array_equal(shown(np.zeros((4, 4))), 255)
  one = shown(np.eye(4) * [1, 0, 0, 0])
  assert one[0, 0] == 0 and (one.ravel()[1:] == 255).all()
  assert 100 < shown([[1.5, 1], [1, 0.5]])[0, 0] < 255


def test_a_run_at_chance_says_so(tmp_path):
  results = [Metric('eval/heldout_style/concept_top1', 1 / 1914, 1914, 1 / 1914)]
  assert 'no better than chance' in report.write_report(tmp_path, results, [], [], config.Config()).read_text()


def test_a_run_without_anything_still_has_a_page(tmp_path):
  page = Page(report.write_report(tmp_path, [], [], [], config.Config()).read_text())
  assert 'Configuration' in page.text and page.count('svg') == 0 and 'Losses' not in page.text


def test_log_keeps_the_last_value_of_a_step_and_skips_a_torn_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 20, "a": 1}\n{"step": 10, "a": 2}\n{"step": 20, "a": 3}\n{"step": 20, "b": 4}\n{"step"')
  assert report.read_log(path) == [{'step': 10, 'a': 2}, {'step': 20, 'a': 3, 'b': 4}]
  assert report.read_log(tmp_path / 'none') == []


def test_console_table():
  lines = metrics.format_table(RESULTS).splitlines()
  assert lines[0].split()[:3] == ['metric', 'value', 'chance']
  assert re.search(r'^heldout_style/concept_top1 +1\.9 % +0\.05 % +1\.4 to 2\.6 +1,914 +raw-pixel .*7\.3 %$', lines[2])
  assert re.search(r'median_rank +240 +1,914$', lines[3])
  assert len({line.index('1,') for line in (lines[2], lines[4])}) == 1     # counts are aligned


@pytest.mark.parametrize('right, count', [(0, 10), (10, 10), (1, 7), (37, 1914)])
def test_wilson_solves_its_equation(right, count):
  """The bounds are where a share p lies 1.96 of its own standard errors from what was seen."""
  low, high = metrics.wilson(right / count, count)
  for p in (low, high):
    if 0 < p < 1:
      assert abs(right / count - p) / math.sqrt(p * (1 - p) / count) == pytest.approx(1.959964, rel=1e-6)
  assert 0 <= low <= right / count <= high <= 1 and (low, high) != (0, 1)


@pytest.mark.parametrize('low, high', [(0, 1), (0, 0.019), (2.1, 5.6), (0, 2000), (-3, 3), (99.9, 100.2), (1e-6, 1e-3)])
def test_ticks_are_round_and_inside(low, high):
  ticks = curves.ticks(low, high)
  assert 2 <= len(ticks) <= 6
  assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
  np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
  assert f'{(ticks[1] - ticks[0]):.1e}'[:3] in ('1.0', '2.0', '2.5', '5.0')


def test_smoothing_keeps_lines_and_ends():
  np.testing.assert_allclose(curves.smooth(np.arange(200.0)), np.arange(200.0))
  noise = np.random.default_rng(0).normal(size=1000)
  assert curves.smooth(noise).std() < 0.3 * noise.std()
  np.testing.assert_allclose(curves.smooth([3.0]), [3.0])


@pytest.mark.parametrize('values', [[1.0], [2.0, 2.0], [0.0, 0.0], [1.0, math.nan, 3.0], [1e9] + [1.0] * 400])
def test_charts_of_odd_curves_stay_inside_the_frame(values):
  line, level = curves.Line('a<b', list(range(len(values))), values), curves.Level('<c>', 1.0)
  svg = curves.chart([line], levels=[level], noisy=True)
  assert 'nan' not in svg and '<c>' not in svg
  for points in re.findall(r'points="([^"]*)"', svg):
    xy = np.array([[float(v) for v in p.split(',')] for p in points.split()])
    assert (xy >= 0).all() and (xy[:, 0] <= curves.WIDTH).all() and (xy[:, 1] <= curves.HEIGHT).all()
  assert max(len(p.split()) for p in re.findall(r'points="([^"]*)"', svg)) <= 600


def test_one_spike_does_not_flatten_a_curve():
  values = [1e6] + list(np.linspace(5, 2, 999))
  svg = curves.chart([curves.Line('loss', list(range(1000)), values)])
  heights = [float(p.split(',')[1]) for p in re.search(r'points="([^"]*)"', svg).group(1).split()]
  assert max(heights) - min(heights[1:]) > 100


def test_the_command_lists_the_tasks(capsys):
  args = evaluate.parse(['--checkpoint=nowhere', '--task=heldout_stile', '--out=x.json'])
  with pytest.raises(ValueError, match='unknown task.*heldout_images'):
    evaluate.main(args)
  with pytest.raises(SystemExit):
    evaluate.parse(['--help'])
  assert 'example: python -m lightclip_jax.evaluate' in capsys.readouterr().out
