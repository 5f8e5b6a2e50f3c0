"""With PyTorch beside (launch/parity_env.sh): real open_clip loads our folders, and real .pth files load here."""
import functools
import itertools
import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest
import small_checkpoint

import lightclip_jax
from lightclip_jax import config as config_lib
from lightclip_jax.data import tokenizers
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.export import export, hugging_face, open_clip, towers
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import image_towers, lightclip, norm, pretrained

TORCH_PYTHON = os.environ.get('LIGHTCLIP_TORCH_PYTHON')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not TORCH_PYTHON, reason='LIGHTCLIP_TORCH_PYTHON names no interpreter with PyTorch (launch/parity_env.sh)')]


@pytest.mark.parametrize('name, causal', [('mobilenet_v2', False), ('resnet18', True), ('swin_nano', False), ('vit_ti', True)])
def test_open_clip_computes_what_the_model_computes(name, causal, tmp_path):
  small = small_checkpoint.config(name, text=dict(causal=causal))
  if name in ('mobilenet_v2', 'resnet18'):
    small = config_lib.replace(small, model=dict(image=dict(width=0.5)))
  tokenizer = tokenizers.train(small_checkpoint.CAPTIONS * 20, 60)
  loaded = checkpoint.Loaded(1, small, small_checkpoint.random_variables(small.model), tokenizer,
                             lightclip.preprocessing(small.model))
  shapes.prepare(tmp_path / 'shapes', size=32)
  said = list(export.export(loaded, 'open_clip', tmp_path / 'out', data=tmp_path / 'shapes'))
  print(*said, sep='\n')
  cosines = json.loads((tmp_path / 'out/model.json').read_text())['cosines']
  assert set(cosines) == {f'{tower}/{kind}' for tower, kind in itertools.product(('image', 'text'), ('noise', 'real'))} | {
      'image/questions', 'text/concepts'} and min(cosines.values()) > 0.99999
  assert said[1].removeprefix('JAX') == said[2].removeprefix('real open_clip') and 'for 36 of 36 names' in said[3]


TEXTS = ['a red circle', 'The  HOUSE by the sea', 'naïve café', '猫と犬', '👩\u200d👧 family', 'a cat, a dog & two "birds"!',
         '', 'the sea ' * 20, "it's 12:30", '[MASK] [SEP] [PAD]', 'x']


def _tokenizer(kind):
  """SentencePiece, a tokenizer.json whose special tokens are the first, or CLIP's own."""
  if kind == 'clip':
    code = "import importlib.util as u; print(u.find_spec('open_clip').submodule_search_locations[0])"
    found = subprocess.run([TORCH_PYTHON, '-I', '-c', code], check=True, capture_output=True, text=True).stdout.strip()
    return tokenizers.load(pathlib.Path(found) / 'bpe_simple_vocab_16e6.txt.gz')
  if kind == 'sentencepiece':
    return tokenizers.train([*small_checkpoint.CAPTIONS, *TEXTS] * 20, 120)
  hf = pytest.importorskip('tokenizers')
  special = ['[UNK]', '[PAD]', '[CLS]', '[SEP]', '[MASK]']
  made = hf.Tokenizer(hf.models.BPE(unk_token='[UNK]'))
  made.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  made.train_from_iterator(TEXTS[:-2], hf.trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False))
  made.post_processor = hf.processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
  made.enable_truncation(4)   # the model's context counts
  return tokenizers.HuggingFaceTokenizer(made.to_str().encode())


@pytest.mark.parametrize('kind', ['sentencepiece', 'hugging_face', 'clip'])
def test_open_clip_and_transformers_give_our_ids(kind, tmp_path):
  tokenizer = _tokenizer(kind)
  small = small_checkpoint.config('vit_ti', text=dict(vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id))
  loaded = checkpoint.Loaded(1, small, small_checkpoint.random_variables(small.model), tokenizer,
                             lightclip.preprocessing(small.model))
  open_clip.write(towers.from_checkpoint(loaded), tmp_path)
  (tmp_path / f'tokenizer{tokenizer.suffix}').write_bytes(tokenizer.to_bytes())
  expected = tokenizer.encode(TEXTS, 12)
  theirs = open_clip.embed(tmp_path, {'texts': np.array(TEXTS)})   # from strings to vectors by its own means
  np.testing.assert_array_equal(theirs['ids/texts'], expected)
  np.testing.assert_allclose(theirs['texts'], lightclip_jax.load(tmp_path).encode_text(TEXTS), atol=1e-4)
  if kind != 'clip':
    code = (f'import transformers; t = transformers.AutoTokenizer.from_pretrained({str(tmp_path)!r}); '
            f'print(t({TEXTS}, padding="max_length", truncation=True, max_length=12).input_ids)')
    done = subprocess.run([TORCH_PYTHON, '-I', '-c', code], check=True, capture_output=True, text=True)
    np.testing.assert_array_equal(json.loads(done.stdout), expected)


@pytest.mark.parametrize('trunk, pool', [('resnet18', 'avg'), ('mobilenetv2_050', 'avg')])
def test_folders_of_open_clip_itself_load_here(trunk, pool, tmp_path):
  tokenizer = tokenizers.train(small_checkpoint.CAPTIONS * 20, 60)
  assert hugging_face.write(tokenizer, 12, tmp_path)
  vision = dict(timm_model_name=trunk, timm_model_pretrained=False, timm_pool=pool, timm_proj='linear', image_size=64)
  text = dict(context_length=12, vocab_size=tokenizer.vocab_size, width=32, heads=2, layers=2, pool_type='eos',
              eos_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
  preprocess = dict(size=64, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], interpolation='bicubic', resize_mode='shortest')
  (tmp_path / 'open_clip_config.json').write_text(json.dumps({
    'model_cfg': dict(embed_dim=16, vision_cfg=vision, text_cfg=text, custom_text=True), 'preprocess_cfg': preprocess}))
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  subprocess.run([TORCH_PYTHON, pathlib.Path(__file__).with_name('torch_files.py'), tmp_path, 'open_clip'], check=True,
                 env=environment)
  images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
  texts = list(small_checkpoint.CAPTIONS)
  np.savez(tmp_path / 'in.npz', image=images, text=tokenizer.encode(texts, 12))
  subprocess.run([TORCH_PYTHON, '-I', pathlib.Path(open_clip.__file__).with_name('open_clip_side.py'), tmp_path,
                  tmp_path / 'in.npz', tmp_path / 'out.npz'], check=True, env=environment)
  model, theirs = lightclip_jax.load(tmp_path), np.load(tmp_path / 'out.npz')
  errors = (np.abs(model.encode_image(images) - theirs['image']).max(), np.abs(model.encode_text(texts) - theirs['text']).max())
  print(f'{trunk}: max difference of unit vectors, image {errors[0]:.2e}, text {errors[1]:.2e}')
  assert max(errors) < 1e-4 and theirs['image'].std(0).max() > 1e-3


def test_pth_files_of_torchvision(tmp_path):
  script = pathlib.Path(__file__).with_name('torch_files.py')
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  subprocess.run([TORCH_PYTHON, script, tmp_path], check=True, env=environment)
  io = np.load(tmp_path / 'io.npz')
  image = config_lib.ImageTower(name='mobilenet_v2', size=64)
  tower = image_towers.build(image, functools.partial(norm.BatchNorm))
  shapes = jax.eval_shape(functools.partial(tower.init, train=False), jax.random.key(0), io['images'])
  fresh = {kind: {'image': jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes[kind])} for kind in shapes}
  fresh['params']['image_projection'] = {'kernel': np.zeros((1280, 8), np.float32)}
  run = jax.jit(functools.partial(tower.apply, train=False))
  for name in ('zip', 'legacy'):
    new, report = pretrained.image_tower(tmp_path / f'{name}.pth', fresh, 'mobilenet_v2')
    assert report.missing == ['params/image_projection/kernel'] and not report.unused
    pooled = np.asarray(run({kind: new[kind]['image'] for kind in new}, io['images']).pooled_BxF)
    error = float(np.abs(pooled - io['features']).max())
    print(f'{name}: max difference {error:.2e} of values up to {np.abs(io["features"]).max():.2f}')
    assert io['features'].std() > 1e-2 and error < 1e-4 * max(1.0, np.abs(io['features']).max())
  with pytest.raises(UserError, match=r'it names torchvision\.models\.mobilenetv2\.MobileNetV2'):
    pretrained.image_tower(tmp_path / 'module.pth', fresh, 'mobilenet_v2')
