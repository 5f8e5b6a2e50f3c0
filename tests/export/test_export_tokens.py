"""The token heads that an ONNX export can bring along are training's own, and the towers do not change."""
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import small_checkpoint

from lightclip_jax import config as config_lib
from lightclip_jax.errors import UserError
from lightclip_jax.export import export, onnx_files, towers, verify
from lightclip_jax.inference import checkpoint, exported
from lightclip_jax.models import lightclip


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  pytest.importorskip('onnx')
  pytest.importorskip('onnxruntime')
  config = small_checkpoint.config('vit_ti')
  return checkpoint.load(small_checkpoint.write(tmp_path_factory.mktemp('tokens'), config,
                                                small_checkpoint.random_variables(config.model)))


def test_heads_are_the_matchings_vectors(loaded, tmp_path):
  made = towers.from_checkpoint(loaded)
  written = onnx_files.write_token_heads(made, towers.token_heads(loaded), 0.05, tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  texts = loaded.tokenizer.encode(['a red circle', 'two', ''], 12)
  clip = lightclip.LightCLIP(loaded.config.model)
  expected = jax.jit(functools.partial(clip.apply, method='encode_tokens'))(loaded.variables, images, texts)
  for name, batch, vectors in zip(('image', 'text'), (images, texts), expected, strict=True):
    got = exported.onnx_tower(tmp_path / written[name])(batch)
    assert got.shape == vectors.shape and got.shape[-1] == loaded.config.model.token_dim
    np.testing.assert_allclose(got, vectors, atol=1e-4)


def test_an_export_names_them_only_when_asked_to(loaded, tmp_path, monkeypatch):
  monkeypatch.setattr(export, '_comparison', lambda *_: iter(()))   # both are tested elsewhere, and compile much
  monkeypatch.setattr(verify, 'cosines', lambda *_: {'image/noise': 1.0})
  said = list(export.export(loaded, 'onnx', tmp_path / 'with', tokens=True))
  assert any(line.startswith('token heads: lowest cosines') for line in said)
  about = json.loads((tmp_path / 'with/model.json').read_text())
  assert about['tokens'] == {'image': 'image_tokens.onnx', 'text': 'text_tokens.onnx',
                             'epsilon': loaded.config.objective.token_matching.epsilon}
  plain = onnx_files.write(towers.from_checkpoint(loaded), tmp_path)
  for name in ('image', 'text'):
    assert (tmp_path / plain[name]).read_bytes() == (tmp_path / 'with' / plain[name]).read_bytes()
  with pytest.raises(UserError, match='--tokens is for --format=onnx, not for stablehlo'):
    next(export.export(loaded, 'stablehlo', tmp_path / 'other', tokens=True))
  without = config_lib.replace(loaded.config, objective=dict(token_matching=dict(weight=config_lib.constant(0.0))))
  with pytest.raises(UserError, match='token_matching.weight of this run is 0, so its token heads learnt nothing'):
    next(export.export(dataclasses.replace(loaded, config=without), 'onnx', tmp_path / 'other', tokens=True))
