import dataclasses
import json
import pathlib

import pytest

from lightclip_jax import config as config_lib
from lightclip_jax.config import Config, Schedule
from lightclip_jax.errors import UserError

MBV2 = str(pathlib.Path(__file__).parents[1] / 'configs/mbv2.py')


def test_config_survives_json_and_config_dict():
  config = config_lib.replace(Config(), model=dict(image=dict(size=64)), optimizer=dict(learning_rate=3e-4))
  assert config.model.image.size == 64 and config.model.image.name == Config().model.image.name
  assert config_lib.from_dict(config_lib.to_config_dict(config).to_dict()) == config
  assert config_lib.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_number_stands_for_a_constant_schedule():
  config = config_lib.from_dict({'objective': {'contrastive': {'alpha': 0.1}}})
  assert config.objective.contrastive.alpha == Schedule(0.1, 0.1)


@pytest.mark.parametrize('values, parts', [
    ({'optimiser': {}}, ['config.optimiser', "'optimizer'"]),
    ({'model': {'image': {'sise': 64}}}, ['config.model.image.sise', "'size'"]),
    ({'model': {'image': {'size': 64.5}}}, ['config.model.image.size', '64.5', 'int']),
    ({'model': {'image': {'name': 'resnet50'}}}, ['resnet50', 'resnet18']),
    ({'data': {'crop_scale': (0.5,)}}, ['crop_scale', '1 values', '2']),
    ({'train': {'steps': True}}, ['config.train.steps', 'True']),
    ({'model': 3}, ['config.model', '3']),
])
def test_wrong_values_are_named(values, parts):
  with pytest.raises(UserError) as error:
    config_lib.from_dict(values)
  assert all(part in str(error.value) for part in parts) and '\n' not in str(error.value)


def test_unknown_override_suggests_the_nearest_key():
  config_lib.check_key('model.image.size')
  with pytest.raises(UserError, match="config.model.imag; did you mean 'image'"):
    config_lib.check_key('model.imag.size')
  with pytest.raises(UserError, match='config.train.steps.x'):
    config_lib.check_key('train.steps.x')


def test_an_override_of_a_part_beside_one_of_the_whole_is_one_line():
  overrides = {'objective.contrastive.alpha': '0.1', 'objective.contrastive.alpha.end': '0.2'}
  with pytest.raises(UserError, match='^config.objective.contrastive.alpha.end is 0.2, but .* give one of the two$'):
    config_lib.load(MBV2, overrides)


OWN = """
from ml_collections import config_dict
from lightclip_jax import config
def get_config(variant='some'):
  some = config_dict.ConfigDict({'train': {'steps': config_dict.placeholder(int)}})
  some.objective = {'contrastive': {'alpha': 0.2}}
  return {'some': some, 'typed': config.replace(config.Config(), name='typed'), 'none': None}[variant]
"""


def test_a_file_of_ones_own_may_say_what_differs(tmp_path):
  file = tmp_path / 'own.py'
  file.write_text(OWN)
  config = config_lib.load(str(file), {'train.steps': '7', 'train.batch_size': '64'})
  wanted = dict(train=dict(steps=7, batch_size=64), objective=dict(contrastive=dict(alpha=config_lib.constant(0.2))))
  assert config == config_lib.replace(Config(), **wanted)
  assert config_lib.load(f'{file}:typed', {'train.steps': '7'}).name == 'typed'
  with pytest.raises(UserError, match='get_config of .*own.py:none. returns None; it must be a Config or a ConfigDict'):
    config_lib.load(f'{file}:none')
  file.write_text('def get_config():\n  return 3')
  with pytest.raises(UserError, match=r"names the variant 'small', but .* has get_config\(\); it must be get_config\(variant"):
    config_lib.load(f'{file}:small')


def test_a_part_is_not_overridden_as_a_whole():
  for text in ('{}', '3', "{'steps': 5}"):
    with pytest.raises(UserError, match=r'^config.train is .*, but it has parts \(steps, .*one by one, as config.train.steps='):
      config_lib.load(MBV2, {'train': text})
  config = config_lib.load(MBV2, {'objective.contrastive.alpha': '{"end": 0.1}'})
  assert config.objective.contrastive.alpha == Schedule(0.0, 0.1)


def test_replace_rejects_unknown_names():
  with pytest.raises(UserError, match="'sizes'; did you mean 'size'"):
    config_lib.replace(Config(), model=dict(image=dict(sizes=3)))
