"""The ablation's rows are configs, its record is continued, and its report is made of the record."""
import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import ablation
from lightclip_jax import config as config_lib
from lightclip_jax.errors import UserError
from lightclip_jax.models import lightclip


def flags(**changes):
  return argparse.Namespace(**{'size': 'cpu', 'study': 'rows', 'rows': None, 'towers': ['mbv2'], 'seeds': 3, **changes})


@pytest.mark.parametrize('study', ablation.STUDIES)
@pytest.mark.parametrize('size', ablation.SIZES)
def test_every_row_is_a_config_of_its_own(study, size):
  found = list(ablation.runs(flags(study=study, size=size, towers=['mbv2', 'rn18', 'swin_nano'], seeds=2)))
  configs = {}
  for key, options in found:
    configs[tuple(key.values())] = config_lib.load(options.pop('config'), {name: str(value) for name, value in options.items()})
  assert len(configs) == 6 * len(ablation.STUDIES[study])
  if size in ('cpu', 'quickstart'):   # of which the rows are; the GPU recipe has other ways of fusion and matching
    assert len({(key[2], config) for key, config in configs.items()}) == len(configs)
  assert {config.train.seed for config in configs.values()} == {0, 1}
  data = {(key[2], key[4], config.train.steps, config.train.batch_size) for key, config in configs.items()}
  assert len(data) == 6, 'rows of a tower and seed see equal batches'


def test_rows_switch_parts_on():
  rows = {key['row']: options for key, options in ablation.runs(flags(seeds=1))}
  for row, parts in {'CLIP': (), '+ softened': ('s',), '+ matching': ('m',), '+ masked LM': ('l',),
                     '+ matching + masked LM': ('m', 'l'), 'all three': ('s', 'm', 'l')}.items():
    options = rows.pop(row)
    objective = config_lib.load(options.pop('config'), {name: str(value) for name, value in options.items()}).objective
    on = {'s': not objective.contrastive.alpha.is_zero, 'm': not objective.token_matching.weight.is_zero,
          'l': not objective.masked_lm.weight.is_zero}
    assert tuple(part for part in on if on[part]) == parts, row
  assert not rows


def test_rows_are_one_program_at_inference():
  programs = set()
  for _, options in ablation.runs(flags(size='test', seeds=1)):
    model = config_lib.load(options.pop('config'), {name: str(value) for name, value in options.items()}).model
    variables = jax.eval_shape(functools.partial(lightclip.init_variables, model), jax.random.key(0))
    variables['params'] = lightclip.inference_parameters(variables['params'])
    inputs = {'encode_image': jnp.zeros((1, model.image.size, model.image.size, 3), jnp.uint8),
              'encode_text': jnp.zeros((1, model.text.context), jnp.int32)}
    apply = lightclip.LightCLIP(model).apply
    programs.add(tuple(jax.jit(functools.partial(apply, method=method)).lower(variables, given).as_text()
                       for method, given in inputs.items()))
  assert len(programs) == 1


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch):
  made = []
  def run(key, options, folder, cores):
    made.append(key)
    return {**key, 'options': options, 'machine': ablation.machine(1), 'metrics': {}}
  monkeypatch.setattr(ablation, 'run', run)
  monkeypatch.setattr('os.sched_getaffinity', lambda process: {5})
  out = tmp_path / 'a.jsonl'
  monkeypatch.setattr('sys.argv', ['ablation', f'--out={out}', f'--runs={tmp_path / "runs"}', '--seeds=1'])
  ablation.main()
  lines = out.read_text().splitlines(keepends=True)
  out.write_text(''.join(lines[:-2]))
  ablation.main()
  assert len(made) == 8 and sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)
  monkeypatch.setattr('sys.argv', [*sys.argv, '--study=matching', '--rows', 'CLIP', '+ matching', 'kind max'])
  ablation.main()
  assert [key['row'] for key in made[8:]] == ['kind max'], 'another study has those runs'
  monkeypatch.setattr('os.sched_getaffinity', lambda process: {5, 6})
  ablation.main()
  assert len(made) == 9 + 3, 'two cores are another machine'


def test_mistakes_do_and_overwrite_nothing(tmp_path, monkeypatch):
  page = tmp_path / 'RESULTS.md'
  page.write_text('## Tables\nof many runs')
  for mistake, said in ((f'--report={page}', 'has no runs to report'), ('--rows=CLP', "--rows has 'CLP'; .*CLIP, ")):
    monkeypatch.setattr('sys.argv', ['ablation', f'--out={tmp_path / "none.jsonl"}', f'--runs={tmp_path / "runs"}', mistake])
    with pytest.raises(UserError, match=said):
      ablation.main()
  assert page.read_text() == '## Tables\nof many runs'


def test_a_run_that_fails_ends_those_that_wait(tmp_path, monkeypatch):
  def run(key, options, folder, cores):
    begun.append(cores)
    raise SystemExit('exit code 1')
  begun = []
  monkeypatch.setattr(ablation, 'run', run)
  with pytest.raises(SystemExit, match='exit code 1'):
    list(ablation.side_by_side([({'row': number}, {}) for number in range(100)], tmp_path, jobs=1))
  assert begun == [()]


def test_the_report_has_mean_and_deviation(tmp_path):
  page, lines = tmp_path / 'RESULTS.md', []
  wanted = {'all three': (0.5, 0.5, 0.8), 'CLIP': (0.1, 0.2, 0.3), 'depth 4': (0.4,)}
  for study in ('rows', 'text'):
    for key, options in ablation.runs(flags(study=study)):
      if key['row'] in wanted and (study, key['row']) != ('text', 'CLIP') and key['seed'] < len(wanted[key['row']]):
        lines.append({**key, 'options': options, 'examples_per_second': 100.0, 'peak_gigabytes': 1.5, 'parameters': '1 M',
                      'commit': 'abc', 'machine': 'm', 'curve': [(1, 3.0), (2, 2.0)],
                      'metrics': {'eval/heldout_style/concept_top1': wanted[key['row']][key['seed']]}})
  page.write_text('# Results\n\nwords\n\n## Tables\nold\n')
  lines.append(lines[0] | {'machine': 'another'})
  ablation.report([json.loads(json.dumps(line)) for line in reversed(lines)], page)
  text = page.read_text()
  assert 'words' in text and 'old' not in text and (tmp_path / 'ablation.svg').exists()
  rows, row_of_another = text.split('### text, mbv2, cpu, m\n')
  assert '| CLIP | 3 | 20.0 ± 10.0 | 100 | 1.5 |' in rows and '| all three | 3 | 60.0 ± 17.3 | 100 | 1.5 |' in rows
  assert '| all three | +40.0 ± 10.0 |' in rows, 'differences of equal seeds: 40, 30 and 50'
  assert '| CLIP | 3 | 20.0 ± 10.0 |' in row_of_another and '| depth 4 | +30.0 |' in row_of_another, 'the same runs'
  assert text.count('### ') == 3, 'studies without a run of their own are left out'
  assert text.count(f'| {lines[-1]["row"]} | 1 |') == 1, 'what ran on another machine has a table of its own'
