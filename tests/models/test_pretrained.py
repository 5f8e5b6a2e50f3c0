"""Towers from other people's weights: what matches, what is resized, what is left out, and that the report says so."""
import numpy as np
import pytest

from lightclip_jax.errors import UserError
from lightclip_jax.models import convert, pretrained, weight_files

RNG = np.random.default_rng(0)


def vit(side=2, width=3):
  """Variables of a toy tower, whole model; only names and shapes matter here."""
  image = {'class_token': RNG.normal(size=(1, 1, width)), 'position_embedding': RNG.normal(size=(1, 1 + side * side, width)),
           'final_norm': {'scale': RNG.normal(size=(width,)), 'bias': RNG.normal(size=(width,))}}
  text = {'token_embedding': {'embedding': RNG.normal(size=(5, 4))}, 'position_embedding': RNG.normal(size=(6, 4)),
          'final_norm': {'scale': RNG.normal(size=(4,)), 'bias': RNG.normal(size=(4,))}}
  projections = {f'{name}_projection': {'kernel': RNG.normal(size=(rows, 8))} for name, rows in (('image', 3), ('text', 4))}
  return {'params': {'image': image, 'text': text, **projections}, 'batch_stats': {}}


def file_of(monkeypatch, weights):
  monkeypatch.setattr(weight_files, 'read', lambda path: weights)
  return 'w.pth'


def test_an_image_tower_is_placed_and_the_rest_stays(monkeypatch):
  ours, theirs = vit(), vit()
  weights = convert.restore({'params': theirs['params']['image']}, convert.VIT)
  weights['head.weight'] = np.zeros((10, 3))   # a classifier: no feature, dropped
  new, report = pretrained.image_tower(file_of(monkeypatch, weights), ours, 'vit_ti')
  np.testing.assert_allclose(new['params']['image']['position_embedding'], theirs['params']['image']['position_embedding'],
                             rtol=1e-6)
  assert new['params']['text'] == ours['params']['text'] and len(report.matched) == 4
  assert report.missing == ['params/image_projection/kernel'] and not report.resized + report.unused
  assert report.lines()[0] == '4 tensors matched' and 'missing: params/image_projection/kernel' in report.lines()[1]
  assert ours['params']['image']['class_token'] is not new['params']['image']['class_token']


def test_open_clip_files_bring_their_projection(monkeypatch):
  ours, theirs = vit(), vit()
  weights = {f'visual.trunk.{k}': v for k, v in convert.restore({'params': theirs['params']['image']}, convert.VIT).items()}
  weights |= {'visual.head.proj.weight': theirs['params']['image_projection']['kernel'].T, 'logit_scale': np.zeros(())}
  weights |= {f'text.{k}': v for k, v in convert.restore({'params': theirs['params']['text']}, convert.OPEN_CLIP_TEXT).items()}
  weights['text.text_projection'] = theirs['params']['text_projection']['kernel']
  path = file_of(monkeypatch, weights)
  new, report = pretrained.image_tower(path, ours, 'vit_ti')
  new, second = pretrained.text_tower(path, new)
  assert not report.missing + second.missing
  for name in ('image_projection', 'text_projection'):
    np.testing.assert_allclose(new['params'][name]['kernel'], theirs['params'][name]['kernel'], rtol=1e-6)


def test_positions_are_interpolated(monkeypatch):
  ours, theirs = vit(side=4), vit(side=2)
  theirs['params']['image']['position_embedding'][:, 1:] = 7   # constant over the grid: must stay constant
  weights = convert.restore({'params': theirs['params']['image']}, convert.VIT)
  new, report = pretrained.image_tower(file_of(monkeypatch, weights), ours, 'vit_ti')
  got = new['params']['image']['position_embedding']
  assert got.shape == (1, 17, 3) and report.resized == ['params/image/position_embedding (1, 5, 3) -> (1, 17, 3)']
  np.testing.assert_allclose(got[:, 1:], 7, rtol=1e-5)
  np.testing.assert_allclose(got[:, 0], theirs['params']['image']['position_embedding'][:, 0], rtol=1e-5)


@pytest.mark.parametrize('before, after', [(12, 6), (9, 16)])   # texts are a line, also where both are squares
def test_positions_of_texts_are_a_line(before, after):
  ours, theirs = vit(), vit()
  ramp = np.broadcast_to(np.arange(before, dtype=np.float64)[:, None], (before, 4))
  ours['params']['text']['position_embedding'] = np.zeros((after, 4))
  theirs['params']['text']['position_embedding'] = ramp
  new, _ = pretrained.restore_partially(theirs, ours, '^params/text')
  line = new['params']['text']['position_embedding']
  assert line.shape == (after, 4) and (np.diff(line[:, 0]) >= 0).all() and abs(line.mean() - ramp.mean()) < 0.1


@pytest.mark.parametrize('policy', ['skip', 'rows'])
def test_vocabulary_policies(monkeypatch, policy):
  ours, theirs = vit(), vit()
  theirs['params']['text']['token_embedding']['embedding'] = RNG.normal(size=(3, 4))
  weights = convert.restore({'params': theirs['params']['text']}, convert.OPEN_CLIP_TEXT)
  path = file_of(monkeypatch, weights)
  with pytest.raises(UserError, match=r"has shape \(3, 4\), the model needs \(5, 4\); the policy 'skip'"):
    pretrained.text_tower(path, ours)
  new, report = pretrained.text_tower(path, ours, policy)
  got, mine = (v['params']['text']['token_embedding']['embedding'] for v in (new, ours))
  np.testing.assert_allclose(got[3:], mine[3:])
  np.testing.assert_allclose(got[:3], mine[:3] if policy == 'skip' else weights['token_embedding.weight'], rtol=1e-6)
  assert len(report.skipped) == (policy == 'skip') and len(report.resized) == (policy == 'rows')


def test_parts_of_our_own_checkpoints():
  ours, theirs = vit(), vit()
  theirs['params']['text']['block7'] = theirs['params']['image']['block7'] = {'bias': np.zeros(3)}
  new, report = pretrained.restore_partially(theirs, ours, '^params/text')
  assert len(report.matched) == 5 and report.lines()[1:] == ['1 unused: params/text/block7/bias']
  np.testing.assert_allclose(new['params']['text']['position_embedding'], theirs['params']['text']['position_embedding'],
                             rtol=1e-6)
  assert new['params']['image'] == ours['params']['image']
  with pytest.raises(UserError, match="no parameter of the checkpoint matches 'nothing'"):
    pretrained.restore_partially(theirs, ours, 'nothing')
  with pytest.raises(UserError, match=r"checkpoint_pattern '\(' is no regular expression"):
    pretrained.restore_partially(theirs, ours, '(')


@pytest.mark.parametrize('pattern, image', [('^params/image/', 3), ('/image/', 3), ('^batch_stats/', 3), ('^params/text/', 0)])
def test_running_statistics_go_with_their_parameters(pattern, image):
  def variables(number):
    layer = {'norm': {'scale': np.full(2, number)}}
    return {'params': {'image': layer, 'text': layer}, 'batch_stats': {'image': {'norm': {'mean': np.full(2, number)}}}}
  new, report = pretrained.restore_partially(variables(3), variables(0), pattern)
  assert new['batch_stats']['image']['norm']['mean'].tolist() == [image] * 2 and not report.missing


def test_a_checkpoint_of_another_vocabulary():
  ours, theirs = vit(), vit()
  theirs['params']['text']['token_embedding']['embedding'] = RNG.normal(size=(3, 4))
  for variables, rows in ((ours, 5), (theirs, 3)):
    variables['params']['training_only'] = {'masked_lm': {'bias': np.full(rows, float(rows))}}
  said = r"has shape \(3, 4\), the model needs \(5, 4\); the policy 'skip'.*; config.init.checkpoint_pattern can leave it out"
  with pytest.raises(UserError, match=said):
    pretrained.restore_partially(theirs, ours, '.*')
  new, report = pretrained.restore_partially(theirs, ours, '.*', 'rows')
  assert new['params']['training_only']['masked_lm']['bias'].tolist() == [3, 3, 3, 5, 5] and len(report.resized) == 2
  new, report = pretrained.restore_partially(theirs, ours, '.*', 'skip')
  assert new['params']['text']['token_embedding'] == ours['params']['text']['token_embedding'] and len(report.skipped) == 2


@pytest.mark.parametrize('weights, words', [
  ({'cls_token': np.zeros((1, 1, 9))}, r"'w.pth' does not fit: params/image/class_token has shape \(1, 1, 9\)"),
  ({'pos_embed': np.zeros((1, 16, 3))}, r'has shape \(1, 16, 3\), the model needs \(1, 5, 3\); only a square grid'),
  ({'pos_embed': np.zeros((16, 3))}, r'has shape \(16, 3\), the model needs \(1, 5, 3\)'),
  ({'layer1.0.conv1.weight': np.zeros((3, 3, 1, 1))}, "no rule for the weight 'layer1.0.conv1.weight'"),
  ({'head.weight': np.zeros((3, 3))}, 'no tensor of this image tower'),
])
def test_files_that_do_not_fit(monkeypatch, weights, words):
  with pytest.raises(UserError, match=words):
    pretrained.image_tower(file_of(monkeypatch, weights), vit(), 'vit_ti')
