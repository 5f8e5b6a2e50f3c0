"""Exported folders are the model, hold nothing else, and say in one line what is wrong with them."""
import contextlib
import dataclasses
import gzip
import hashlib
import json
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_checkpoint

import lightclip_jax
from lightclip_jax import config as config_lib
from lightclip_jax.data import manifest, tokenizers
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.export import __main__ as command
from lightclip_jax.export import export, open_clip, towers, verify
from lightclip_jax.inference import checkpoint, exported
from lightclip_jax.inference import open_clip as inference_open_clip
from lightclip_jax.models import convert, lightclip

CONFIG = small_checkpoint.config('vit_ti')
TEXTS = ['a red circle', 'the house by the sea', 'two']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('export')
  return small_checkpoint.write(folder, CONFIG, small_checkpoint.random_variables(CONFIG.model))


@pytest.fixture(scope='module')
def model(workdir):
  return lightclip_jax.load(workdir)


def same_embeddings(a, b):
  images = np.random.default_rng(0).integers(0, 256, (9, 40, 30, 3), np.uint8)
  for left, right in ((a.encode_image(images), b.encode_image(images)), (a.encode_text(TEXTS), b.encode_text(TEXTS))):
    np.testing.assert_allclose(left, right, atol=1e-4)
  np.testing.assert_allclose(a.classify(images, TEXTS), b.classify(images, TEXTS), atol=1e-3)


def run(workdir, out, *flags):
  command.main(command.parse([f'--checkpoint={workdir}', f'--out={out}', *flags]))


def test_stablehlo_is_the_model(workdir, model, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HOME', str(tmp_path))
  run(workdir, '~/out', '--format=stablehlo')
  about = json.loads((tmp_path / 'out/model.json').read_text())
  assert min(about['cosines'].values()) > verify.MIN_COSINE and about['platforms'] == ['cpu', 'cuda', 'tpu']
  assert 'lowest cosines' in capsys.readouterr().out
  same_embeddings(lightclip_jax.load(tmp_path / 'out'), model)
  function = jax.export.deserialize(bytearray((tmp_path / 'out/text.stablehlo').read_bytes()))
  assert function.platforms == ('cpu', 'cuda', 'tpu') and str(function.in_avals[0].shape[0]) == 'batch'


def test_onnx_is_the_model_and_int8_nearly(workdir, model, tmp_path, capsys):
  pytest.importorskip('onnx')
  pytest.importorskip('onnxruntime')
  shapes.prepare(tmp_path / 'shapes', size=32)
  run(workdir, tmp_path / 'out', '--format=onnx', '--int8', f'--data={tmp_path / "shapes"}')
  said = capsys.readouterr().out
  assert said.count('zero-shot top-1') == 3 and 'image/real' in said
  about = json.loads((tmp_path / 'out/model.json').read_text())
  assert set(about['cosines']) == {'image/noise', 'text/noise', 'image/real', 'text/real'} and about['opset'] == 18
  same_embeddings(lightclip_jax.load(tmp_path / 'out'), model)
  small, large = ((tmp_path / f / 'image.onnx').stat().st_size for f in ('out/int8', 'out'))
  assert small < 0.5 * large
  assert min(json.loads((tmp_path / 'out/int8/model.json').read_text())['cosines'].values()) > 0.9


@pytest.mark.parametrize('name', ['mobilenet_v2', 'resnet18', 'swin_nano', 'vit_ti'])
def test_restore_is_the_inverse_of_convert(name):
  model = small_checkpoint.config(name).model
  variables = jax.eval_shape(lambda: lightclip.init_variables(model, jax.random.key(0)))
  numbers = iter(range(10**6))
  variables = jax.tree.map(lambda leaf: np.full(leaf.shape, next(numbers), np.float32), variables)
  for tower, rules in (('image', convert.IMAGE_RULES[name]), ('text', convert.OPEN_CLIP_TEXT)):
    tree = {'params': variables['params'][tower], 'batch_stats': variables['batch_stats'].get(tower, {})}
    there = convert.restore(tree, rules)
    assert len(there) == len(jax.tree.leaves(tree))
    jax.tree.map(np.testing.assert_array_equal, convert.convert(there, rules), tree)
  with pytest.raises(UserError, match='no rule for the variable'):
    convert.restore({'params': {'nonsense': np.zeros(3)}}, convert.RESNET18)


@pytest.mark.parametrize('heads', [1, 4])   # two channels a head, and one
def test_wider_text_tower_without_a_mask_ignores_padding(heads):
  """A numpy Transformer without any mask, as open_clip runs this config, against our tower with its mask."""
  small = config_lib.replace(CONFIG, model=dict(text=dict(heads=heads)))
  variables = small_checkpoint.random_variables(small.model)
  loaded = checkpoint.Loaded(1, small, variables, _tokenizer(), {})
  exporting = towers.from_checkpoint(loaded)
  weights, config = open_clip.text_weights(exporting)
  assert config['width'] % heads == 0 and config['no_causal_mask']
  tokens = verify.noise(exporting)['text/noise']
  got = _open_clip_text({k.removeprefix('text.'): v.astype(np.float64) for k, v in weights.items()}, config, tokens)
  np.testing.assert_allclose(got, np.asarray(jax.jit(exporting.text)(tokens)), atol=1e-5)


def _tokenizer():
  return tokenizers.train(small_checkpoint.CAPTIONS * 20, 60)


def _open_clip_text(w, config, tokens):
  from scipy.special import erf, softmax

  def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred ** 2).mean(-1, keepdims=True) + config['norm_kwargs']['eps'])
    return centred / scale * w[f'{name}.weight'] + w[f'{name}.bias']

  heads = config['heads']
  x = w['token_embedding.weight'][tokens] + w['positional_embedding']
  for i in range(config['layers']):
    block = f'transformer.resblocks.{i}.'
    y = norm(x, f'{block}ln_1') @ w[f'{block}attn.in_proj_weight'].T + w[f'{block}attn.in_proj_bias']
    q, k, v = y.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
    y = softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1) @ v
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + y @ w[f'{block}attn.out_proj.weight'].T + w[f'{block}attn.out_proj.bias']
    y = norm(x, f'{block}ln_2') @ w[f'{block}mlp.c_fc.weight'].T + w[f'{block}mlp.c_fc.bias']
    y = y * (1 + erf(y / 2 ** 0.5)) / 2
    x = x + y @ w[f'{block}mlp.c_proj.weight'].T + w[f'{block}mlp.c_proj.bias']
  end = (tokens == config['eos_id']).argmax(axis=1)
  out = norm(x, 'ln_final')[np.arange(len(tokens)), end] @ w['text_projection']
  return out / np.linalg.norm(out, axis=-1, keepdims=True)


def test_open_clip_folder(workdir, model, tmp_path, monkeypatch, capsys):
  pytest.importorskip('safetensors')
  pytest.importorskip('tokenizers')
  from safetensors.numpy import load_file
  monkeypatch.delenv(open_clip.TORCH_PYTHON, raising=False)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/model.json').write_text('{"format": "open_clip"}')
  (tmp_path / 'out/tokenizer.gz').write_bytes(b'of an earlier export')   # it would go before tokenizer.json
  run(workdir, tmp_path / 'out', '--format=open_clip')
  assert sorted(file.name for file in (tmp_path / 'out').glob('tokenizer*')) == [
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json']
  assert 'not verified' in capsys.readouterr().out
  names = set(load_file(tmp_path / 'out/open_clip_model.safetensors'))
  assert {n.split('.')[0] for n in names} == {'visual', 'text', 'logit_scale'}
  assert load_file(tmp_path / 'out/open_clip_model.safetensors')['logit_scale'].shape == ()
  config = json.loads((tmp_path / 'out/open_clip_config.json').read_text())
  assert config['model_cfg']['vision_cfg']['timm_pool'] == 'token' and config['preprocess_cfg']['size'] == 32
  assert json.loads((tmp_path / 'out/model.json').read_text())['hugging_face_tokenizer']
  about = json.loads((tmp_path / 'out/trunk/config.json').read_text())
  assert about['architecture'] == 'vit_tiny_patch16_224' and about['model_args']['img_size'] == 32
  assert config['model_cfg']['vision_cfg']['timm_model_name'] == f'local-dir:{tmp_path / "out/trunk"}'
  moved = (tmp_path / 'out').rename(tmp_path / 'moved')
  same_embeddings(lightclip_jax.load(moved), model)
  (moved / 'tokenizer.model').unlink()   # with its Hugging Face form alone, as in folders of others
  np.testing.assert_allclose(lightclip_jax.load(moved).encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-4)
  _refuses_what_it_does_not_know(moved, config)


@contextlib.contextmanager
def _changed(folder, config, section, changes):
  """The folder with other options in a section of its config, or in trunk/config.json (None: without that file)."""
  trunk, model_cfg = (folder / 'trunk/config.json').read_text(), config['model_cfg']
  if section == 'trunk':
    (folder / 'trunk/config.json').unlink()
    if changes:
      (folder / 'trunk/config.json').write_text(json.dumps(json.loads(trunk) | changes))
  else:
    model_cfg = model_cfg | (changes if section == 'model_cfg' else {section: model_cfg[section] | changes})
  (folder / 'open_clip_config.json').write_text(json.dumps(config | {'model_cfg': model_cfg}))
  yield
  (folder / 'open_clip_config.json').write_text(json.dumps(config))
  (folder / 'trunk/config.json').write_text(trunk)


def _refuses_what_it_does_not_know(folder, config):
  for section, changes, words in (
      ('vision_cfg', dict(timm_model_name='resnet50'), "image tower is 'resnet50'; known are"),
      ('vision_cfg', dict(timm_proj='mlp'), "timm_proj is 'mlp'; only 'linear'"),
      ('vision_cfg', dict(image_size=64), 'makes images of 32, the tower wants 64'),
      ('text_cfg', dict(hf_model_name='roberta-base'), 'hf_model_name is'),
      ('text_cfg', dict(pool_type='last'), "pool_type is 'last'"),
      ('text_cfg', dict(eos_id=7), 'ends with 3, its text tower 60 and 7'),
      ('text_cfg', dict(layers=3), 'has shape none, the tower needs'),
      ('text_cfg', dict(mlp_ratio=3.7), 'mlp_ratio is 3.7; only 4.0 is known'),
      ('text_cfg', dict(act_kwargs={'approximate': 'tanh'}), 'act_kwargs is .*tanh.*; our towers have no such option'),
      ('text_cfg', dict(norm_kwargs={'eps': 1e-5, 'bias': True}), 'bias is True'),
      ('text_cfg', dict(tokenizer_kwargs={'clean': 'canonicalize'}), "clean is 'canonicalize'; our towers have no such"),
      ('text_cfg', dict(final_ln_after_pool=True), 'final_ln_after_pool is True'),
      ('vision_cfg', dict(timm_proj_bias=True), 'timm_proj_bias is True'),
      ('model_cfg', dict(quick_gelu=True), 'quick_gelu is True'),
      ('model_cfg', dict(init_logit_bias=-10), 'init_logit_bias is -10'),
      ('trunk', dict(model_args={'img_size': 32, 'reg_tokens': 4}), 'reg_tokens is 4'),
      ('trunk', None, "image tower is 'local-dir:.*', but it has no trunk/config.json")):
    with _changed(folder, config, section, changes), pytest.raises(UserError, match=words) as error:
      lightclip_jax.load(folder)
    assert '\n' not in str(error.value) and str(folder) in str(error.value)
  usual = dict(timm_drop=0.0, timm_drop_path=0.1, timm_model_pretrained=True, patch_dropout=0.5)   # of training alone
  with _changed(folder, config, 'vision_cfg', usual):
    lightclip_jax.load(folder)
  for name, words in (('tokenizer.json', 'has no tokenizer file'), ('open_clip_model.safetensors', 'there is no weight file')):
    (folder / name).unlink()
    with pytest.raises(UserError, match=words):
      lightclip_jax.load(folder)
  (folder / 'open_clip_config.json').write_text('{}')
  with pytest.raises(UserError, match='does not describe a model of open_clip'):
    lightclip_jax.load(folder)


def test_hugging_face_tokenizer_gives_the_same_ids(tmp_path):
  pytest.importorskip('tokenizers')
  from lightclip_jax.export import hugging_face
  tokenizer = _tokenizer()
  converted = hugging_face.convert(tokenizer)
  texts = [*small_checkpoint.CAPTIONS, 'A  RED house', ' sea ', 'zebra-crossing', '', 'ｔｗｏ', 'a\tcat\nand\u00a0dog',
           'É\u0301', '猫と犬', '👩\u200d👧', 'the sea ' * 50, 'ﬁne', '½ İ ß', '\u200b', '▁a']
  for text in texts:
    assert converted.encode(text).ids == [i for i in tokenizer.encode([text], 400)[0] if i != tokenizer.pad_id], text
  assert hugging_face.write(tokenizer, 12, tmp_path)
  again = tokenizers.load(tmp_path / 'tokenizer.json')
  np.testing.assert_array_equal(again.encode(texts, 12), tokenizer.encode(texts, 12))
  for name in ('vocab_size', 'pad_id', 'start_id', 'end_id', 'mask_id'):
    assert getattr(again, name) == getattr(tokenizer, name), name
  ids = tokenizer.encode(['a red circle'], 12)[0]
  np.testing.assert_array_equal(again.word_mask(ids), tokenizer.word_mask(ids))
  assert again.decode(ids) == tokenizer.decode(ids) == 'a red circle' and again.pieces(ids) == tokenizer.pieces(ids)
  copy = pickle.loads(pickle.dumps(tokenizers.from_bytes(again.to_bytes(), '.json')))
  np.testing.assert_array_equal(copy.encode(texts, 12), again.encode(texts, 12))
  for junk, words in ((b'{}', 'is not a Hugging Face'), (_without_ends(again), 'empty text 0 tokens')):
    with pytest.raises(UserError, match=words):
      tokenizers.from_bytes(junk, '.json')


def test_open_clip_is_told_which_tokenizer(tmp_path, monkeypatch):
  """Nothing for CLIP's byte pairs, which it has; another file of such pairs by its path; a tokenizer.json for all others."""
  pytest.importorskip('ftfy')
  pytest.importorskip('tokenizers')
  pairs = tokenizers.ClipTokenizer(gzip.compress(b'#version\nc a\nca t</w>', mtime=0))
  text = dict(vocab_size=pairs.vocab_size, end_id=pairs.end_id)
  small = config_lib.replace(CONFIG, model=dict(text=text))
  loaded = checkpoint.Loaded(1, small, small_checkpoint.random_variables(small.model), pairs,
                             lightclip.preprocessing(small.model))
  (tmp_path / 'tokenizer.gz').write_bytes(pairs.to_bytes())
  open_clip.write(towers.from_checkpoint(loaded), tmp_path)
  text = json.loads((tmp_path / 'open_clip_config.json').read_text())['model_cfg']['text_cfg']
  assert text['tokenizer_kwargs'] == {'bpe_path': str(tmp_path / 'tokenizer.gz')} and 'hf_tokenizer_name' not in text
  assert not (tmp_path / 'tokenizer.json').exists()
  np.testing.assert_array_equal(lightclip_jax.load(tmp_path).tokenizer.encode(TEXTS, 12), pairs.encode(TEXTS, 12))
  monkeypatch.setattr(open_clip, 'CLIP_BYTE_PAIRS', hashlib.sha256(gzip.decompress(pairs.to_bytes())).hexdigest())
  assert open_clip.tokenizer_config(pairs, tmp_path) == {}
  assert open_clip.tokenizer_config(_tokenizer(), tmp_path) == {'hf_tokenizer_name': 'tokenizer.json'}


def _without_ends(tokenizer):
  return json.dumps(json.loads(tokenizer.to_bytes()) | {'post_processor': None}).encode()


def test_a_tower_that_is_not_the_model_fails():
  verify.check({'image/noise': 0.99995})
  for wrong in (0.9998, -1.0):
    with pytest.raises(UserError, match='the export is not the model: cosine'):
      verify.check({'image/noise': 1.0, 'text/noise': wrong})
  ones, nans = np.ones((2, 4)), np.full((2, 4), np.nan)
  assert verify.cosines({'image/noise': ones}, {'image/noise': nans}) == {'image/noise': -1.0}


@pytest.mark.parametrize('changes, words', [
  (dict(image=dict(name='resnet18', stem_stride=1)), 'no resnet18 with model.image.stem_stride=1'),
  (dict(image=dict(name='mobilenet_v2', width=0.6)), 'no MobileNetV2 of width 0.6'),
])
def test_towers_that_timm_lacks(changes, words):
  with pytest.raises(UserError, match=words):
    open_clip.timm_model(config_lib.replace(config_lib.Model(), **changes).image)


def test_a_resnets_channels_are_its_width(tmp_path):
  vision = dict(timm_model_name='local-dir:x', image_size=64, timm_proj='linear', timm_pool='avg', timm_proj_bias=False)
  (tmp_path / 'trunk').mkdir()

  def read(channels):
    trunk = {'architecture': 'resnet18', 'model_args': {'channels': channels}}
    (tmp_path / 'trunk/config.json').write_text(json.dumps(trunk))
    return inference_open_clip._image(tmp_path, vision)
  for width in (0.25, 0.5, 2.0):
    written = open_clip.timm_model(config_lib.ImageTower('resnet18', width=width))[1]['channels']
    assert read(written) == config_lib.ImageTower('resnet18', size=64, width=width)
  for channels in ([64, 64, 64, 64], [30, 60, 120, 240], []):
    with pytest.raises(UserError, match='stages of .* channels; each must have twice'):
      read(channels)


def test_pooling_that_is_not_said_is_open_clips_own(tmp_path):
  for trunk, tower in (('resnet18', 'resnet18'), ('mobilenetv2_100', 'mobilenet_v2'),
                       ('swin_tiny_patch4_window7_224', 'swin_nano')):
    assert inference_open_clip._image(tmp_path, dict(timm_model_name=trunk, image_size=224)).name == tower
  vision = dict(timm_model_name='vit_tiny_patch16_224', image_size=224)
  with pytest.raises(UserError, match="its timm_pool is 'avg'; only 'token' is known"):
    inference_open_clip._image(tmp_path, vision)
  assert inference_open_clip._image(tmp_path, {**vision, 'timm_pool': 'token'}).name == 'vit_ti'


def test_an_export_that_fails_leaves_the_folder_as_it_was(workdir, model, tmp_path, monkeypatch):
  def write(towers, folder):   # instead of towers, which take seconds
    (folder / 'image.stablehlo').write_text('new')
    if refused:
      raise UserError('timm has no such tower')
    return {'format': 'stablehlo'}
  out, loaded = tmp_path / 'out', checkpoint.load(workdir)
  monkeypatch.setitem(export.FORMATS, 'stablehlo', write)
  monkeypatch.setattr(export.model_lib, 'load', lambda folder: model)
  monkeypatch.setattr(verify, 'embed', lambda *_: {'text/noise': np.ones((1, 2))})

  def files():
    return {str(file.relative_to(out)): file.read_text('latin1') for file in out.rglob('*.*')}
  for refused, least, words in ((True, 0.9, 'timm has no'), (False, 2, 'is not the model')):
    monkeypatch.setattr(verify, 'MIN_COSINE', least)
    with pytest.raises(UserError, match=words):
      list(export.export(loaded, 'stablehlo', out))
    assert not out.exists()
  (out / export.PARTIAL).mkdir(parents=True)   # of one that was killed
  monkeypatch.setattr(verify, 'MIN_COSINE', 0.9)
  list(export.export(loaded, 'stablehlo', out))
  first = files()
  assert set(first) == {'image.stablehlo', 'model.json', 'tokenizer.model'}
  others = {'int8/mine.txt': 'old', 'README.md': 'old'}
  for name in ('int8/model.json', 'text_tokens.onnx', *others):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text('old')
  before, refused = files(), True
  with pytest.raises(UserError, match='timm has no'):
    list(export.export(loaded, 'stablehlo', out))
  assert files() == before and len(before) == 7
  refused = False
  list(export.export(loaded, 'stablehlo', out))
  assert files() == first | others


def test_open_clip_runs_only_where_all_that_it_needs_is(tmp_path, monkeypatch):
  monkeypatch.delenv(open_clip.TORCH_PYTHON, raising=False)
  monkeypatch.setattr(open_clip.importlib.util, 'find_spec', lambda name: name == 'open_clip' or None)   # pip --no-deps
  assert open_clip.embed(tmp_path, {}) is None
  (silent := tmp_path / 'python').write_text('#!/bin/sh\nexit 7\n')
  silent.chmod(0o755)
  monkeypatch.setenv(open_clip.TORCH_PYTHON, str(silent))
  with pytest.raises(UserError, match='open_clip cannot load .* ended with exit code 7 and said nothing'):
    open_clip.embed(tmp_path, {})


def test_a_set_without_held_out_records_is_verified_on_what_it_has(workdir, tmp_path):
  """As `prepare` makes one, whose run holds records out as it trains: its export was refused."""
  shapes.prepare(folder := tmp_path / 'shapes', size=24)
  made = manifest.load(folder)
  dataclasses.replace(made, splits={'train': made.splits['train']}).save(folder)
  inputs = verify.real(towers.from_checkpoint(checkpoint.load(workdir)), folder)
  assert inputs['image/real'].shape == (verify.EXAMPLES, 32, 32, 3) and inputs['text/real'].shape == (verify.EXAMPLES, 12)


def test_mistakes_are_one_line(workdir, tmp_path, monkeypatch):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full/thesis.txt').write_text('x')
  loaded = checkpoint.load(workdir)
  (tmp_path / 'earlier').mkdir()
  (tmp_path / 'earlier/model.json').write_text(json.dumps({'format': 'onnx'}, indent=2))
  for kind, out, int8, words in (('onnx', 'full', False, 'holds something else'),
                                 ('open_clip', 'earlier', False, 'holds an export for onnx, not for open_clip; give a new'),
                                 ('stablehlo', 'new', True, 'is for --format=onnx')):
    with pytest.raises(UserError, match=words):
      list(export.export(loaded, kind, tmp_path / out, int8=int8))
  with pytest.raises(UserError, match="'gs://bucket/out' is in a bucket; this needs a folder on a disk"):
    run(workdir, 'gs://bucket/out', '--format=onnx')
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(UserError, match=r'needs the package onnx, which is not installed: pip install onnx'):
    exported.optional('onnx')
  (tmp_path / 'model.json').write_text('{"format": "onnx"}')
  with pytest.raises(UserError, match='does not describe an exported model'):
    lightclip_jax.load(tmp_path)
  about = dict(format='stablehlo', image='i', text='t', tokenizer='tokenizer.model', preprocessing={}, context=1, embed_dim=1,
               logit_scale=1.0)
  (tmp_path / 'model.json').write_text(json.dumps(about))
  with pytest.raises(UserError, match="lacks its image file 'i'"):
    lightclip_jax.load(tmp_path)
  for name in ('i', 't', 'tokenizer.model'):
    (tmp_path / name).write_bytes(b'junk')
  with pytest.raises(UserError, match='is not a SentencePiece model|no serialised JAX function'):
    lightclip_jax.load(tmp_path)


def test_the_command_says_what_is_wrong_and_exits_with_2():
  done = subprocess.run([sys.executable, '-m', 'lightclip_jax.export', '--checkpoint=/nowhere', '--format=onnx', '--out=x'],
                        capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr == "error: '/nowhere' holds no checkpoint; give the workdir of a training run\n"
