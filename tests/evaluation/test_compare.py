"""Results as files, and runs side by side."""
import csv
import json

import numpy as np
import pytest
from test_report import EVIL, Page, write_log

from lightclip_jax import evaluate
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import compare, insight, results
from lightclip_jax.evaluation.evaluate import TaskResult
from lightclip_jax.evaluation.metrics import Metric

SUBJECT = results.Subject('runs/a', 7, {'name': 'a', 'train': {'steps': 7}, 'evaluation': {}}, {'size': 32})
SHARE = Metric('eval/heldout_style/concept_top1', 0.25, 400, 0.05)
RANK = Metric('eval/heldout_style/image_to_text_median_rank', 12.5, 400)


def write_run(folder, metrics, log=False):
  folder.mkdir()
  results.write(folder / 'results.json', SUBJECT, [TaskResult('heldout_style', tuple(metrics), {'name': 'abc'}, 0.5)])
  if log:
    write_log(folder)
    with (folder / 'metrics.jsonl').open('a') as out:
      for step in (100, 200):
        out.write(json.dumps({'step': step, SHARE.name: step / 1000}) + '\n')
  return folder


def test_json_says_what_was_measured_on_what(tmp_path):
  failed = TaskResult('zero_shot:cars', (), {}, 0.1, 'cars is not there')
  done = TaskResult('heldout_style', (SHARE, RANK), {'name': 'abc'}, 1.5)
  results.write(tmp_path / 'new' / 'r.json', SUBJECT, [done, failed])
  read = json.loads((tmp_path / 'new' / 'r.json').read_text())
  assert (read['checkpoint'], read['step'], read['preprocessing']) == ('runs/a', 7, {'size': 32})
  assert read['tasks']['heldout_style'] == {'metrics': [SHARE.name, RANK.name], 'prompts': {'name': 'abc'}, 'seconds': 1.5,
                                            'error': ''}
  assert read['tasks']['zero_shot:cars']['error'] == 'cars is not there'
  low, high = read['metrics'][0]['interval_95']
  assert low < 0.25 < high and read['metrics'][1]['interval_95'] is None


def test_the_config_hash_is_of_what_was_learnt():
  other = lambda **changes: results.Subject('x', 9, {**SUBJECT.config, **changes}, {}).config_hash  # noqa: E731
  assert other(name='b', evaluation={'batch_size': 3}) == SUBJECT.config_hash != other(train={'steps': 8})


def test_csv_grows_below_one_head(tmp_path):
  for _ in range(2):
    results.append_csv(tmp_path / 'all.csv', SUBJECT, [TaskResult('heldout_style', (SHARE, RANK), {'name': 'abc'}, 1.0)])
  rows = list(csv.DictReader((tmp_path / 'all.csv').read_text().splitlines()))
  assert len(rows) == 4 and tuple(rows[0]) == results.COLUMNS
  assert (rows[2]['metric'], rows[2]['value'], rows[2]['prompts']) == (SHARE.name, '0.25', 'name=abc')
  assert float(rows[0]['low_95']) < 0.25 < float(rows[0]['high_95']) and rows[1]['chance'] == rows[1]['low_95'] == ''


def test_the_page_marks_the_best_and_all_that_it_cannot_be_told_from(tmp_path, capsys):
  values = {'a': 0.25, 'b': 0.27, 'c': 0.10}
  runs = [write_run(tmp_path / name, [Metric(SHARE.name, value, 400, 0.05), RANK], log=name != 'c')
          for name, value in values.items()]
  out = tmp_path / 'page.html'
  assert evaluate.main(evaluate.parse(['--compare', *map(str, runs), f'--out={out}'])) == 0
  printed = capsys.readouterr().out
  line = next(line for line in printed.splitlines() if 'Concept, top-1' in line)
  assert line.split()[2:] == ['25.0', '%', '*', '27.0', '%', '*', '10.0', '%', '5.0', '%']
  page = Page(out.read_text())
  assert not page.open and page.count('td', **{'class': 'best'}) == 2
  charts = page.count('figure', **{'class': 'card chart'})
  assert charts >= 1 and page.count('polyline') == 2 * charts and '12.5' in page.text   # a curve for each run that logged


def test_names_are_escaped_and_a_missing_value_is_a_dash(tmp_path):
  one = write_run(tmp_path / 'one', [SHARE])
  two = write_run(tmp_path / 'two', [Metric(f'eval/zero_shot:{EVIL.replace("/", "")}/top1', 0.5, 10, 0.1)])
  page = compare.write_page(tmp_path / 'p.html', [compare.read(str(one)), compare.read(str(two))]).read_text()
  assert '<script' not in page and page.count('>–<') == 2


@pytest.mark.parametrize('text, words', [(None, 'holds no results'), ('[]', 'no file of results'), ('{', 'no file of results')])
def test_runs_without_results_are_one_line(tmp_path, text, words):
  (tmp_path / 'run').mkdir()
  if text:
    (tmp_path / 'run' / 'results.json').write_text(text)
  with pytest.raises(UserError, match=words) as caught:
    compare.read(str(tmp_path / 'run'))
  assert '\n' not in str(caught.value)


def test_the_worst_classes_come_first_with_what_they_are_taken_for():
  labels, guesses = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 2, 2, 1, 1, 1, 0])
  rows = insight.worst(labels, guesses, ['a', 'b', 'c'], count=2)
  assert [(row.name, row.count, row.accuracy) for row in rows] == [('c', 1, 0.0), ('a', 4, 0.25)]
  assert rows[0].taken_for == (('a', 1.0),) and rows[1].taken_for == (('c', 0.5), ('b', 0.25))
