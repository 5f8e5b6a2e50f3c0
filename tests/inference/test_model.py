"""`lightclip_jax.load`: any batch, any image mode, the same numbers as the model itself, and no training code."""
import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import small_checkpoint

import lightclip_jax
from lightclip_jax.data import transforms
from lightclip_jax.errors import UserError
from lightclip_jax.inference import checkpoint
from lightclip_jax.inference import images as images_lib
from lightclip_jax.inference import model as model_lib
from lightclip_jax.models import lightclip

CONFIG = small_checkpoint.config('vit_ti')   # the tower that compiles fastest


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('inference')
  return small_checkpoint.write(folder, CONFIG, small_checkpoint.random_variables(CONFIG.model))


@pytest.fixture(scope='module')
def model(workdir):
  return lightclip_jax.load(workdir)


def noise(count, height=40, width=50, channels=3, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def test_embeddings_are_the_models_own_whatever_the_batch(model, workdir):
  pictures = noise(70)
  got = model.encode_image(pictures)
  assert got.shape == (70, 16) and got.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
  loaded = checkpoint.load(workdir)
  cut = np.stack([transforms.evaluation_transform(picture, 32) for picture in pictures[:3]])
  apply = functools.partial(lightclip.LightCLIP(CONFIG.model).apply, method='encode_image')
  expected = jax.jit(apply)(loaded.variables, cut)
  np.testing.assert_allclose(got[:3], expected, atol=1e-5)
  for one in (0, 5, 69):
    np.testing.assert_allclose(model.encode_image(pictures[one:one + 1])[0], got[one], atol=1e-5)
  np.testing.assert_allclose(model.encode_image([PIL.Image.fromarray(p) for p in pictures[:9]]), got[:9], atol=1e-5)


def test_texts_of_any_number_and_length(model):
  texts = ['a red circle', 'house ' * 50, ''] * 5
  got = model.encode_text(texts)
  assert got.shape == (15, 16)
  np.testing.assert_allclose(got[:3], got[12:], atol=1e-6)
  np.testing.assert_allclose(model.encode_text(texts[:1]), got[:1], atol=1e-5)
  assert np.abs(got[0] - got[1]).max() > 1e-3
  for other in ((text for text in texts), dict.fromkeys(texts[:3]).keys(), np.array(texts[:3])):
    np.testing.assert_allclose(model.encode_text(other)[:3], got[:3], atol=1e-5)
  assert model.encode_text([]).shape == model.encode_image([]).shape == (0, 16)


def test_few_pictures_are_there_at_once(model, monkeypatch):
  read, most = [], []

  class Lazy:
    def __array__(self, *_, **__):
      read.append(1)
      return np.ones((64, 16), np.float32)

  def prepare(part, size):
    most.append(len(most) + 1 - len(read))
    return np.zeros((len(part), size, size, 3), np.uint8)

  monkeypatch.setattr(images_lib, 'prepare', prepare)
  lazy = dataclasses.replace(model, image_tower=lambda batch: Lazy())
  assert lazy.encode_image(['x.jpg'] * 64 * 20).shape == (1280, 16)
  assert len(read) == 20 and max(most) == 3


def test_a_bucket_is_compiled_once(model):
  class Counted:
    def __init__(self):
      self.seen = []

    def __call__(self, batch):
      self.seen.append(len(batch))
      return np.zeros((len(batch), 16), np.float32)

  counted = Counted()
  towers = dict(vars(model), text_tower=counted)
  for count in (1, 2, 8, 9, 64, 65, 130):
    assert model_lib.Model(**towers).encode_text(['a'] * count).shape == (count, 16)
  assert counted.seen == [1, 8, 8, 64, 64, 64, 1, 64, 64, 8] and set(counted.seen) <= set(model_lib.BUCKETS)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'I;16'])
def test_every_common_image_mode_is_read_as_the_picture_that_it_shows(mode):
  half = np.zeros((20, 30, 3), np.uint8)
  half[:, 15:] = 255
  image = PIL.Image.fromarray(half)
  if mode in ('I', 'I;16'):
    image = PIL.Image.fromarray(half[..., 0].astype(np.uint16) * 257)
    image = image.convert('I') if mode == 'I' else image
  else:
    image = image.convert('RGBA' if mode == 'PA' else mode)
    image = image.convert('PA') if mode == 'PA' else image
  assert image.mode == mode
  rgb = transforms.to_rgb(image)
  assert rgb.dtype == np.uint8
  np.testing.assert_allclose(rgb.astype(int), half.astype(int), atol=3)


def test_paths_and_transparency(model, tmp_path):
  clear = PIL.Image.new('RGBA', (40, 40), (200, 0, 0, 0))
  clear.save(tmp_path / 'clear.png')
  white = np.full((1, 40, 40, 3), 255, np.uint8)
  for images in ([clear], [tmp_path / 'clear.png'], [str(tmp_path / 'clear.png')]):
    np.testing.assert_allclose(model.encode_image(images), model.encode_image(white), atol=1e-5)


def test_a_photo_is_the_same_from_its_path_and_opened(model, tmp_path):
  exif = PIL.Image.Exif()
  exif[0x112] = 6   # it lies on its side
  picture = np.zeros((40, 60, 3), np.uint8)
  picture[:20] = 255
  PIL.Image.fromarray(picture).save(tmp_path / 'a.png', exif=exif)
  with PIL.Image.open(tmp_path / 'a.png') as opened:
    turned = PIL.Image.fromarray(np.rot90(picture, -1))
    path, pil, upright = (images_lib.prepare([image], 32) for image in (tmp_path / 'a.png', opened, turned))
    np.testing.assert_array_equal(pil, path)
    np.testing.assert_array_equal(pil, upright)
    np.testing.assert_allclose(model.encode_image([opened]), model.encode_image([turned]), atol=1e-5)


def test_classify_is_the_softmax_of_scaled_cosines(model):
  names, pictures = ['circle', 'square', 'cat'], noise(4, seed=1)
  got = model.classify(pictures, names)
  assert got.shape == (4, 3) and got.dtype == np.float32
  np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
  cosines = model.encode_image(pictures).astype(np.float64) @ model.encode_text(names).T
  np.testing.assert_allclose(np.log(got / got[:, :1]), 20 * (cosines - cosines[:, :1]), atol=1e-3)
  both = model.classify(pictures, names, templates=['a {}', 'the {}'])
  means = model.encode_text([f'a {n}' for n in names]) + model.encode_text([f'the {n}' for n in names])
  nearest = (model.encode_image(pictures) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
  np.testing.assert_array_equal(both.argmax(axis=1), nearest)


@pytest.mark.parametrize('call, words', [
  (lambda m: m.encode_image(np.zeros((2, 8, 8, 3), np.float32)), r'float32 \[2, 8, 8, 3\]; it must be uint8'),
  (lambda m: m.encode_image(np.zeros((8, 8, 3), np.uint8)), r'uint8 \[8, 8, 3\]; it must be uint8'),
  (lambda m: m.encode_image('cat.png'), 'give a list'),
  (lambda m: m.encode_image(PIL.Image.new('L', (4, 4))), 'give a list'),
  (lambda m: m.encode_image(['/nowhere/cat.png']), 'cannot read the image'),
  (lambda m: m.encode_image([PIL.Image.new('F', (4, 4))]), "mode 'F'"),
  (lambda m: m.encode_image([np.zeros((8, 8, 3), np.uint8)]), '^images hold one ndarray; each must be a path or a PIL'),
  (lambda m: m.encode_image([b'GIF89a']), 'one bytes; each must be'),
  (lambda m: m.encode_image([PIL.Image.new('RGB', (0, 4))]), 'one of 0 × 4 pixels'),
  (lambda m: m.encode_image(np.zeros((1, 4, 0, 3), np.uint8)), 'one of 0 × 4 pixels'),
  (lambda m: m.encode_text('cat'), "texts is 'cat'"),
  (lambda m: m.encode_text([1]), 'list of str'),
  (lambda m: m.encode_text(None), "texts is 'None'; it must be a list of str"),
  (lambda m: m.encode_text(n for n in (1, 2)), 'list of str'),
  (lambda m: m.encode_text(7), "texts is '7'"),
  (lambda m: m.encode_image(None), "images is 'None'; it must be a list of paths"),
  (lambda m: m.encode_image(path for path in ['/nowhere/cat.png']), 'cannot read the image'),
  (lambda m: m.classify(noise(1), []), 'class_names'),
  (lambda m: m.classify(noise(1), [1, 2]), r"class_names is '\[1, 2\]'; it must be a list of at least one str"),
  (lambda m: m.classify(noise(1), None), "class_names is 'None'"),
  (lambda m: m.classify(noise(1), ['a'], templates=[3]), r"templates is '\[3\]'; it must be a list of at least one str"),
  (lambda m: m.classify(noise(1), ['a'], templates='{}'), "templates is '{}'"),
  (lambda m: m.classify(noise(1), ['a'], templates=['x']), 'must hold {} once'),
])
def test_wrong_input_is_one_clear_line(model, call, words):
  with pytest.raises(UserError, match=words) as error:
    call(model)
  assert '\n' not in str(error.value)


def test_damaged_checkpoints_are_one_clear_line(workdir, tmp_path):
  with pytest.raises(UserError, match='holds no checkpoint'):
    lightclip_jax.load(tmp_path)
  small_checkpoint.write(tmp_path / 'mute', CONFIG, {'params': {'a': np.zeros(2)}}, tokenizer='')
  with pytest.raises(UserError, match='holds no tokenizer'):
    lightclip_jax.load(tmp_path / 'mute')
  small_checkpoint.write(tmp_path / 'half', CONFIG, {'params': {'a': np.zeros(2)}})
  with pytest.raises(UserError, match='lacks .*is it whole') as error:
    lightclip_jax.load(tmp_path / 'half')
  assert '\n' not in str(error.value)


def test_the_best_the_last_and_any_other_step(workdir, tmp_path):
  scales = {}
  for step, score in ((3, 0.1), (5, 0.4), (9, 0.2)):
    variables = small_checkpoint.random_variables(CONFIG.model)
    variables['params']['logit_scale'] = np.float32(np.log(step))
    small_checkpoint.write(tmp_path, CONFIG, variables, step, score)
  for step in ('last', 'best', 3, '3'):
    scales[step] = round(lightclip_jax.load(tmp_path, step=step).logit_scale, 3)
  assert scales == {'last': 9, 'best': 5, 3: 3, '3': 3} and lightclip_jax.load(tmp_path).logit_scale == pytest.approx(9)
  (tmp_path / 'exported').mkdir()
  (tmp_path / 'exported' / 'model.json').write_text('{}')
  for folder, step, words in ((workdir, 'best', 'no scored checkpoint; .*checkpoint.best'),
                              (workdir, 8, r'step 8; it has \[7\]'),
                              (workdir, 'first', "step is 'first'; it can be 'last', 'best' or the number"),
                              (tmp_path / 'exported', 'best', 'exported folder, which holds one model')):
    with pytest.raises(UserError, match=words) as error:
      lightclip_jax.load(folder, step=step)
    assert '\n' not in str(error.value)


def test_no_training_code_is_imported(workdir):
  script = (f'import sys, lightclip_jax\nassert "jax" not in sys.modules\nlightclip_jax.load({str(workdir)!r})\n'
            'print(*(m for m in sys.modules if m.startswith(("lightclip_jax.training", "lightclip_jax.objectives", "optax", '
            '"grain", "lightclip_jax.evaluation"))))')
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == ''
