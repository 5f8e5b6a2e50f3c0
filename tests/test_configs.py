"""Every config builds, and every tower's quick start trains."""
import pathlib

import jax
import pytest

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.data import sources
from lightclip_jax.errors import UserError
from lightclip_jax.models import resnet, swin, vit
from lightclip_jax.training import checks, loop
from lightclip_jax.training.step import Trainer

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
TOWERS = ('mbv2', 'rn18', 'swin_nano', 'vit_ti')
# Blocks of every kind, but fewer, which compile in less time; of the README's own quick start all.
FEWER_BLOCKS = {'mbv2': {}, 'rn18': {(resnet, 'BLOCKS'): 1}, 'swin_nano': {(swin, 'DEPTHS'): (2, 2, 2, 2)},
                'vit_ti': {(vit, 'DEPTH'): 4, (vit, 'MAPS_AFTER'): (1, 2, 3, 4)}}
VARIANTS = ('quickstart', 'laptop', 'emoji', 'icons', 'cc3m', 'yfcc15m')


@pytest.mark.parametrize('tower', TOWERS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_fits_together(tower, variant):
  config = config_lib.load(f'{CONFIGS / tower}.py:{variant}')
  checks.check_steps(config)
  checks.check_batch(config, 1)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  assert Trainer.create(config, mesh).abstract_state().step.shape == ()
  assert variant in config.name
  assert f'{variant} ' in (CONFIGS / f'{tower}.py').read_text().split('"""')[1], 'the docstring names every variant'


def test_a_pod_divides_the_yfcc_batch():
  config = config_lib.load(f'{CONFIGS / "mbv2.py"}:yfcc15m')
  checks.check_batch(config, 256)


@pytest.mark.parametrize('variant', ('cc3m', 'yfcc15m'))
def test_prepared_folders_are_evaluated_on_what_they_hold_out(variant):
  assert config_lib.load(f'{CONFIGS / "mbv2.py"}:{variant}').evaluation.splits == (sources.HELDOUT,)


def test_the_default_variant_is_emoji():
  assert config_lib.load(f'{CONFIGS / "mbv2.py"}') == config_lib.load(f'{CONFIGS / "mbv2.py"}:emoji')


def test_errors_name_what_there_is(tmp_path):
  with pytest.raises(UserError, match="'quick'; there are: quickstart"):
    config_lib.load(f'{CONFIGS / "mbv2.py"}:quick')
  with pytest.raises(UserError, match="did you mean 'rn18.py'"):
    config_lib.load(str(CONFIGS / 'r18.py'))
  (tmp_path / 'empty.py').write_text('x = 1\n')
  with pytest.raises(UserError, match='get_config'):
    config_lib.load(str(tmp_path / 'empty.py'))
  for name in ('README.md', 'config.json'):
    (tmp_path / name).write_text('{}\n')
    with pytest.raises(UserError, match=f'{name}.* is no Python file.*get_config'):
      config_lib.load(str(tmp_path / name))


@pytest.mark.parametrize('key, text', [
    ('optimizer.learning_rate', '1e999'), ('optimizer.learning_rate', '-1e999'),
    ('data.crop_scale', '(0.5, 1e999)'), ('objective.contrastive.alpha', '1e999')])
def test_numbers_are_finite(key, text):
  with pytest.raises(UserError, match=f'^config.{key}.* is -?inf; it must be a finite number$'):
    config_lib.load(f'{CONFIGS / "mbv2.py"}', {key: text})


@pytest.mark.parametrize('value', [float('nan'), 10**400])
def test_numbers_of_files_are_finite(value):
  with pytest.raises(UserError, match=f'learning_rate is {value}; it must be a finite number'):
    config_lib.from_dict({'optimizer': {'learning_rate': value}})


def test_overrides_are_literals_and_nothing_is_evaluated(tmp_path):
  load = lambda **o: config_lib.load(f'{CONFIGS / "mbv2.py"}', {k.replace('__', '.'): v for k, v in o.items()})  # noqa: E731
  assert load(optimizer__learning_rate='1e-2').optimizer.learning_rate == 0.01
  assert load(data__crop_scale='(0.5, 1)').data.crop_scale == (0.5, 1.0)
  assert load(objective__contrastive__alpha='0.3').objective.contrastive.alpha.end == 0.3
  marker = tmp_path / 'evaluated'
  with pytest.raises(UserError, match='train.steps is'):
    load(train__steps=f'open({str(marker)!r}, "w")')
  assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize('tower', TOWERS)
def test_every_quick_start_trains(tower, tmp_path, monkeypatch):
  for name, value in FEWER_BLOCKS[tower].items():
    monkeypatch.setattr(*name, value)
  overrides = {'data.dataset': 'shapes', 'model.text.vocab_size': '45', 'train.steps': '2', 'train.log_every': '1',
               'train.batch_size': '32', 'model.batch_norm': 'group:4', 'objective.token_matching.group_size': '4',
               'evaluation.splits': "('heldout_style',)"}
  config = config_lib.load(f'{CONFIGS / tower}.py:quickstart', overrides)
  assert loop.train(config, tmp_path) == 0
  assert (tmp_path / 'report' / 'index.html').exists() and len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3
