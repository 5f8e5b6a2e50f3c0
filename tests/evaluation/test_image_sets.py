"""Image sets, tasks on them and on Karpathy's split file, with a model that sees pixels; and tasks that fail."""
import json
import shutil
import sys
import types

import cv2
import numpy as np
import pytest
from sklearn import datasets, neighbors

from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import evaluate, image_sets, labelled, metrics, prompts, tasks
from lightclip_jax.evaluation.image_sets import class_names, folder, tfds_sets
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import training_part


class Pixels:
  """Embeds an image as its pixels, and a text as the colour that it names."""
  image_size, batch_size, context, logit_scale, share, shares = 8, 100, 8, 5.0, 0, 1

  def images(self, batches):
    batches = list(batches)
    rows, index = (np.concatenate([batch[name][batch['index'] != -1] for batch in batches]) for name in ('image', 'index'))
    flat = (255 - rows.reshape(len(rows), -1).astype(np.float32)) * (index >= 0)[:, None]   # as an Embedder
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)

  def texts(self, texts):
    words = [text.replace('.', '').split() for text in texts]
    colours = [next((shapes.COLOURS[word] for word in of_text if word in shapes.COLOURS), (0, 0, 0)) for of_text in words]
    images = np.array([np.full((8, 8, 3), colour, np.uint8) for colour in colours])
    return self.images([{'image': images, 'index': np.arange(len(texts))}])


def picture(colour, rng):
  image = np.full((12, 12, 3), 255, np.uint8)
  image[rng.integers(0, 3):, rng.integers(0, 3):] = shapes.COLOURS[colour]
  return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


@pytest.fixture(scope='module')
def colours(tmp_path_factory):
  """DIR/{train,test}/{red,green,blue}/*.png"""
  root, rng = tmp_path_factory.mktemp('sets') / 'colours', np.random.default_rng(0)
  for part, count in (('train', 12), ('test', 5)):
    for colour in ('red', 'green', 'blue'):
      (root / part / colour).mkdir(parents=True)
      for i in range(count):
        (root / part / colour / f'{i}.png').write_bytes(picture(colour, rng))
  return root


def test_every_family_on_a_folder_of_classes(colours):
  chosen = tasks.choose([f'{kind}:{colours}' for kind in tasks.ON_IMAGE_SETS])
  got = {m.name: m for m in evaluate.run(Session(Pixels(), colours), chosen)}
  for name in ('zero_shot:colours/top1', 'linear_probe:colours/top1', 'knn:colours/top1_1_neighbours',
               'few_shot:colours/top1_1_shots'):
    assert got[f'eval/{name}'].value == 1.0 and got[f'eval/{name}'].count == 15
    assert got[f'eval/{name}'].chance == pytest.approx(1 / 3)
  assert 'eval/zero_shot:colours/top5' not in got     # there are three classes


def test_digits_by_neighbours_are_scikit_learns(colours):
  session = Session(Pixels(), colours)
  got = metrics.scalars(evaluate.run(session, tasks.choose(['knn:digits', 'few_shot:digits'])))
  x, y = datasets.load_digits(return_X_y=True)
  x = 255 - np.rint(255 * (1 - x / 16))   # as uint8 holds it
  reference = neighbors.KNeighborsClassifier(1, metric='cosine', algorithm='brute').fit(x[:898], y[:898])
  assert got['eval/knn:digits/top1_1_neighbours'] == pytest.approx(reference.score(x[898:], y[898:]), abs=1e-9)
  shots = [got[f'eval/few_shot:digits/top1_{n}_shots'] for n in (1, 5, 10)]
  assert shots == sorted(shots) and shots[0] > 0.4


def test_prompts_of_a_file_are_used_and_hashed(colours, tmp_path):
  (tmp_path / 'mine.json').write_text(json.dumps({'colours': ['a {} thing'], 'digits': ['the {}']}))
  own, mine = (Session(Pixels(), colours, templates=prompts.choose(name)) for name in (None, str(tmp_path / 'mine.json')))
  results = [evaluate.run_each(session, tasks.choose([f'zero_shot:{colours}']))[0] for session in (own, mine)]
  assert list(results[0].prompts) == ['photo'] and list(results[1].prompts) == ['mine:colours']
  assert results[0].prompts['photo'] != results[1].prompts['mine:colours']
  assert mine._texts.keys() == {'a red thing', 'a green thing', 'a blue thing'}
  assert prompts.choose('name').resolve('photo', 'x') == ('name', ('{}',))


def test_karpathys_file(colours, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  rng, rows = np.random.default_rng(1), []
  (tmp_path / 'images' / 'val2014').mkdir(parents=True)
  for i, colour in enumerate(shapes.COLOURS):
    (tmp_path / 'images' / 'val2014' / f'{i}.png').write_bytes(picture(colour, rng))
    rows.append({'filename': f'{i}.png', 'filepath': 'val2014', 'split': 'test' if i else 'train',
                 'sentences': [{'raw': f'{colour} thing number {n}'} for n in range(7)]})
  (tmp_path / 'dataset.json').write_text(json.dumps({'images': rows, 'dataset': 'coco'}))
  got = {m.name: m for m in evaluate.run(Session(Pixels(), colours), tasks.choose(['retrieval:~/dataset.json']))}
  assert got['eval/retrieval:dataset/image_to_text_r1'].count == 5         # the training image is left out
  assert got['eval/retrieval:dataset/text_to_image_r1'].count == 25        # five captions each
  assert got['eval/retrieval:dataset/text_to_image_r1'].value >= 0.8       # black on white is no colour's direction
  rows[2]['sentences'][0] = rows[1]['sentences'][0]
  (tmp_path / 'dataset.json').write_text(json.dumps({'images': rows}))
  got = {m.name: m for m in evaluate.run(Session(Pixels(), colours), tasks.choose([f'retrieval:{tmp_path / "dataset.json"}']))}
  assert got['eval/retrieval:dataset/text_to_image_r1'].count == 24        # a text of two images is one text
  (tmp_path / 'images' / 'val2014' / '3.png').unlink()
  failed = evaluate.run_each(Session(Pixels(), colours), tasks.choose([f'retrieval:{tmp_path / "dataset.json"}']))
  assert "'3.png' is not in" in failed[0].error


def test_a_failing_task_is_one_line_and_the_others_run(colours, monkeypatch):
  monkeypatch.setitem(tasks.TASKS, 'broken', lambda session: {}['a\nb'])
  (colours.parent / 'none' / 'test').mkdir(parents=True)
  names = ['broken', f'zero_shot:{colours.parent}/none', f'zero_shot:{colours}']
  results = evaluate.run_each(Session(Pixels(), colours), tasks.choose(names))
  assert results[0].error.startswith('KeyError: ') and 'has no folders' in results[1].error
  assert not results[2].error and results[2].metrics and all('\n' not in r.error for r in results)
  with pytest.raises(KeyError):
    evaluate.run_each(Session(Pixels(), colours), tasks.choose(['broken']), debug=True)


def test_tfds_sources_become_image_sets():
  rng = np.random.default_rng(0)
  examples = [{'image': picture('red', rng), 'label': label} for label in (3, 7, 7, 3)]
  source = tfds_sets.Source('x', test='test', train='', occurring=True)
  got = tfds_sets.from_sources('cifar10', source, [str(i) for i in range(10)], {'test': examples}.get)
  assert got.classes == ('cat', 'horse') and got.test.labels_N.tolist() == [0, 1, 1, 0] and not got.train
  assert got.test.read(1).shape == (12, 12, 3)


def test_zero_shot_reads_no_training_record_and_probes_read_them_once(monkeypatch):
  opened, rng = [], np.random.default_rng(0)

  def as_data_source(split, decoders):
    opened.append(split)
    if split == 'train' and not prepared:
      raise ValueError('no split\ntrain')
    return [{'image': picture(name, rng), 'label': label} for label, name in enumerate(('red', 'green') * 5)]
  info = types.SimpleNamespace(features={'label': types.SimpleNamespace(names=['?'] * 10)})
  builder = types.SimpleNamespace(as_data_source=as_data_source, info=info)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', types.SimpleNamespace(
    builder=lambda *_, **__: builder, decode=types.SimpleNamespace(SkipDecoding=lambda: None)))
  prepared, session = False, Session(Pixels(), 'none')
  results = evaluate.run_each(session, tasks.choose(['zero_shot:cifar10', 'knn:cifar10']))
  assert results[0].metrics and opened == ['test', 'train']   # which only the probe missed
  assert results[1].error == ('cifar10 cannot be read from TFDS (no split); prepare it with: '
                              'tfds build cifar10 --file_format=array_record')
  prepared = True
  opened.clear()
  results = evaluate.run_each(session, tasks.choose(['knn:cifar10', 'linear_probe:cifar10', 'few_shot:cifar10']))
  assert not any(result.error for result in results) and opened == ['train']


@pytest.mark.parametrize('data, own, clean', [
  ('sun397', '/a/airplane_cabin', 'airplane cabin'), ('sun397', '/c/church/indoor', 'indoor church'),
  ('food101', 'apple_pie', 'apple pie'), ('eurosat', 'SeaLake', 'sea or lake'), ('caltech101', 'faces', 'off-center face'),
])
def test_names_are_cleaned(data, own, clean):
  assert class_names.clean(data, [own]) == [clean]


def test_whole_tables_fit_their_sets():
  for data, count in (('cifar10', 10), ('cifar100', 100)):
    names = class_names.clean(data, [str(i) for i in range(count)])
    assert len(set(names)) == count and all(name == name.strip() for name in names)
  with pytest.raises(UserError, match='9 classes; the table of cleaned names has 10'):
    class_names.clean('cifar10', ['x'] * 9)


@pytest.mark.parametrize('call, words', [
  (lambda p: tasks.find('zero_sot:digits'), "unknown task 'zero_sot:digits'; there are: heldout_images.*zero_shot:SET"),
  (lambda p: tasks.find('knn:digit'), "unknown image set 'digit'; there are: digits.*cifar10"),
  (lambda p: tasks.choose(['knn:./a/x', 'knn:./b/x', 'zero_shot:./b/x']), "'knn:./a/x' and 'knn:./b/x' would both be 'knn:x'"),
  (lambda p: folder.load(f'{p}/missing'), 'there is no folder'),
  (lambda p: prompts.choose(f'{p}/none.json'), 'cannot read the prompts'),
  (lambda p: prompts.choose(str(file(p, '["a photo"]'))), 'texts with {} once each'),
  (lambda p: tasks.find(f'retrieval:{file(p, "{}")}')(None), "not one of Karpathy's"),
  (lambda p: labelled.check(images_of(('a', 'b'), 0)), "class 'b' of 'x' has no test image"),
  (lambda p: labelled.check(images_of(('a',), 1)), 'label outside 0 to 0'),
  (lambda p: images_of(('a',), 0, train=(1,)).train, "'t' has a label outside 0 to 0, the classes of 'x'"),
  (lambda p: images_of(('a',), 0, train=()).train, "'x' has no images in 't'"),
  (lambda p: training_part.needs_training(images_of(('a',), 0)), "'x' has no training images.*train/CLASS/"),
])
def test_errors(tmp_path, call, words):
  with pytest.raises(UserError, match=words) as caught:
    call(tmp_path)
  assert '\n' not in str(caught.value)


def images_of(classes, *labels, train=None):
  part = lambda labels: labelled.Part('t', None, np.array(labels))  # noqa: E731
  return labelled.ImageSet('x', classes, part(labels), lambda: () if train is None else (part(train),))


def file(folder, text):
  (folder / 'given.json').write_text(text)
  return folder / 'given.json'


def test_a_class_may_be_called_train(tmp_path):
  for name in ('car', 'train', 'plane'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'x.png').touch()
  assert folder.load(str(tmp_path)).classes == ('car', 'plane', 'train')
  for name in ('train', 'test'):
    (tmp_path / 'parts' / name / 'car').mkdir(parents=True)
    (tmp_path / 'parts' / name / 'car/x.png').touch()
  (tmp_path / 'parts/notes').mkdir()
  assert folder.load(str(tmp_path / 'parts')).classes == ('car',) and len(folder.load(str(tmp_path / 'parts')).train) == 1


def test_hidden_files_are_no_images_and_an_empty_class_is_named(tmp_path):
  for name in ('cat', 'dog/.thumbnails'):
    (tmp_path / name).mkdir(parents=True)
  for name in ('cat/x.png', 'cat/._x.png', 'dog/._y.png', 'dog/.thumbnails/y.png'):
    (tmp_path / name).touch()
  with pytest.raises(UserError, match="class 'dog' in .* has no image"):
    folder.load(str(tmp_path))
  (tmp_path / 'dog/y.png').touch()
  assert folder.load(str(tmp_path)).test.labels_N.tolist() == [0, 1]


def test_an_image_that_cannot_be_read_is_a_mistake_or_left_out(colours, tmp_path, capsys):
  root = tmp_path / 'colours'
  shutil.copytree(colours, root)
  shutil.copytree(colours / 'test', root / 'val')
  bad = [root / name for name in ('test/blue/0.png', 'train/red/3.png', 'val/green/1.png')]   # blue is the first class
  bad[0].write_bytes(bad[0].read_bytes()[:60])
  bad[1].write_bytes(b'no image')
  bad[2].unlink()
  bad[2].symlink_to('nowhere')
  (root / 'train/blue/more.png').write_bytes(bad[0].with_name('1.png').read_bytes())   # blue has most neighbours
  got = {m.name: m for m in evaluate.run(Session(Pixels(), root), tasks.choose([f'{f}:{root}' for f in tasks.ON_IMAGE_SETS]))}
  for name, metric in got.items():
    if 'top1' in name:
      assert metric.value == pytest.approx(14 / 15) and metric.count == 15, name
    if 'mean_per_class' in name:
      assert metric.value == pytest.approx((4 / 5 + 1 + 1) / 3)
  assert got['eval/linear_probe:colours/strength'].count == 36
  said = capsys.readouterr().err.splitlines()
  assert [line.split(': ')[0] for line in sorted(said)] == [
    f'evaluation counts {str(bad[0])!r} as a mistake', f'evaluation leaves {str(bad[1])!r} out',
    f'evaluation leaves {str(bad[2])!r} out'] and said[-1].endswith(': No such file or directory')


def test_the_guess_for_an_image_that_cannot_be_read_is_not_right_by_chance(tmp_path):
  for name in ('blue', 'red'):
    (tmp_path / 'x' / name).mkdir(parents=True)
    (tmp_path / 'x' / name / '1.png').write_bytes(b'no image')
  got = metrics.scalars(evaluate.run(Session(Pixels(), tmp_path), tasks.choose([f'zero_shot:{tmp_path}/x'])))
  assert got['eval/zero_shot:x/top1'] == 0 and got['eval/zero_shot:x/calibration_error'] == pytest.approx(0.5)
  session, images = Session(Pixels(), tmp_path), folder.load(str(tmp_path / 'x'))
  with pytest.raises(UserError, match='none of the 2 images of .*x. can be read'):
    session.features([images.test])


def test_flags_and_groups_of_a_prepared_folder(tmp_path):
  shapes.prepare(tmp_path / 'shapes', size=16)
  session = Session(Pixels(), tmp_path / 'shapes')
  with pytest.raises(UserError, match="'shapes' has no group 'flags'; it has: bar, circle"):
    tasks.find('flags')(session)
  groups = image_sets.find('groups')(session)
  assert groups.classes == tuple(sorted(shapes.SHAPES)) and len(groups.test.labels_N) == 108
  assert sum(len(part.labels_N) for part in groups.train) == 36 * 9      # all in other styles
  assert image_sets.find('concepts')(session).classes == session.manifest.concepts
  fake = types.SimpleNamespace(records=lambda split: [types.SimpleNamespace(group='flags', concept=c) for c in 'ab'],
                               images=lambda split: np.eye(2, dtype=np.float32),
                               classes=lambda names, own: np.eye(2, dtype=np.float32))
  assert metrics.scalars(tasks.find('flags')(fake)) == {'top1': 1.0, 'top5': 1.0}
