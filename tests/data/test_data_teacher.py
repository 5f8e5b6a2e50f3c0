"""A teacher's embeddings beside the records: each example gets those of its own image and caption, or one clear line."""
import dataclasses
import itertools
import json
import pickle
import types
import zlib

import numpy as np
import pytest

from lightclip_jax import config, prepare
from lightclip_jax.data import datasets, manifest, pipeline, sources, teacher, transforms, writer
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError

OPTIONS = config.replace(config.Data(), workers=0, max_masked=4)


def of_image(image):
  return [image.mean() / 256, image.std() / 256, 1]


def of_text(text):
  return [zlib.crc32(text.encode()) % 1000 / 1000, len(text) / 100, -1]


def fill(folder, name='tutor'):
  encoders = [lambda rows, of=of: np.array([of(row) for row in rows]) for of in (of_image, of_text)]
  return teacher.write(folder, name, encoders, lambda parts, total: parts)


@pytest.fixture
def folder(tmp_path):
  shapes.prepare(tmp_path / 'shapes', size=16)
  return tmp_path / 'shapes'


def batches(folder, workers=0, **more):
  return pipeline.train_batches(folder, config.replace(OPTIONS, workers=workers), image_size=16, context=20, batch_size=16,
                                seed=1, **{'with_teacher': True, **more})


def take(folder, count=3, **more):
  made = batches(folder, **more)
  out = list(itertools.islice(made, count))
  made.close()
  return out


def test_each_example_gets_the_embeddings_of_its_image_and_its_caption(folder, monkeypatch):
  monkeypatch.setattr(teacher, 'RECORDS_AT_A_TIME', 50)   # some parts, and a last one that is not full
  entry = fill(folder)
  assert (entry.name, entry.dim) == ('tutor', 3) and manifest.load(folder).teacher == entry
  assert len(check(folder, take(folder))) > 1


def check(folder, made):
  """Every example's embeddings are those of what the source gives under its id; returns the captions' numbers."""
  tokenizer, source = pipeline.load_tokenizer(folder), sources.open_split(folder, 'train')
  numbers = set()
  for batch in made:
    assert {batch[name].dtype.name for name in ('teacher_image', 'teacher_text')} == {'float16'}
    for i, record in enumerate(source[n] for n in batch['example_id']):
      caption = record.captions[batch['caption_number'][i]]
      np.testing.assert_array_equal(tokenizer.encode([caption], 20)[0], batch['tokens'][i])
      np.testing.assert_array_equal(batch['teacher_text'][i], np.float16(of_text(caption)))
      np.testing.assert_array_equal(batch['teacher_image'][i], np.float16(of_image(transforms.decode(record.image))))
    numbers |= set(batch['caption_number'].tolist())
  return numbers


@pytest.mark.parametrize('options', [dict(weights=(2.0, 1.0)), dict(holdout_every=5)])
def test_a_mixture_reads_what_lies_beside_the_records_of_each(options, tmp_path, monkeypatch):
  monkeypatch.setenv('LIGHTCLIP_DATA', str(tmp_path / 'cache'))
  folders = [tmp_path / name for name in ('small', 'large')]
  for folder, size in zip(folders, (16, 24), strict=True):
    shapes.prepare(folder, size=size)
  mixed = datasets.resolve(' + '.join(map(str, folders)), config.replace(OPTIONS, **options))
  fill(folders[0])
  with pytest.raises(UserError, match=r"large' has no embeddings of a teacher; make them with: .*--data=\S*/large$"):
    batches(mixed)
  fill(folders[1])
  made, first = take(mixed), len(sources.open_split(mixed, 'train').parts[0])
  check(mixed, made)
  assert {bool(n < first) for batch in made for n in batch['example_id']} == {True, False}
  assert pickle.loads(pickle.dumps(teacher.Teacher(mixed))).sha256 == teacher.Teacher(mixed).sha256
  state = batches(mixed).state()
  teacher.write(folders[1], 'tutor', [lambda rows: np.ones((len(rows), 3))] * 2, lambda parts, total: parts)
  with pytest.raises(UserError, match='was made with data'):
    batches(mixed).restore(state)
  fill(folders[1], 'another')
  with pytest.raises(UserError, match="are of several teachers: 'tutor' of dimension 3, 'another' of dimension 3; make"):
    batches(mixed)


def test_the_command_fills_every_folder_of_a_mixture(tmp_path, monkeypatch, capsys):
  from lightclip_jax.inference import model as model_lib

  stands_in = types.SimpleNamespace(
      preprocessing={'size': 8}, logit_scale=25.0, encode_image=lambda rows: np.array([of_image(row) for row in rows]),
      encode_text=lambda texts: np.array([of_text(text) for text in texts]))
  monkeypatch.setattr(model_lib, 'load', lambda path: stands_in)
  folders = [tmp_path / name for name in ('a', 'b')]
  for folder in folders:
    shapes.prepare(folder, size=16)
  prepare.main(prepare.parse(['teacher', '--model=wise', f'--data={folders[0]} + {folders[1]}']))
  assert 'teacher_dim=3 ' in (said := capsys.readouterr().out) and 'temperature=0.0400 ' in said
  assert [manifest.load(folder).teacher.name for folder in folders] == ['wise', 'wise']
  with pytest.raises(UserError, match=r'csv:\S* has no place for embeddings; prepare it first: .*prepare csv \S* --out'):
    prepare.main(prepare.parse(['teacher', '--model=wise', f'--data={folders[0]} + csv:{tmp_path}/pairs.csv']))


def test_the_rest_of_a_batch_does_not_depend_on_the_teacher_and_workers_do_not_matter(folder):
  fill(folder)
  with_it, without, by_workers = take(folder), take(folder, with_teacher=False), take(folder, workers=2)
  for a, b, c in zip(with_it, without, by_workers, strict=True):
    assert set(a) - set(b) == {'teacher_image', 'teacher_text'}
    for name in a:
      np.testing.assert_array_equal(a[name], c[name])
      np.testing.assert_array_equal(a[name], b.get(name, a[name]))
  assert len(pickle.dumps(teacher.Teacher(folder))) < 1000   # the files are mapped again, not sent


def test_a_run_does_not_continue_with_another_teacher(folder):
  fill(folder)
  state = json.loads(json.dumps(batches(folder).state()))
  batches(folder).restore(state)
  other = batches(folder, with_teacher=False)
  with pytest.raises(UserError, match='was made with data'):
    other.restore(state)
  texts = teacher.write(folder, 'other', [lambda rows: np.ones((len(rows), 5))] * 2, lambda parts, total: parts)
  assert texts.dim == 5 and take(folder, 1)[0]['teacher_text'].shape == (16, 5)
  with pytest.raises(UserError, match='was made with data'):
    batches(folder).restore(state)


def test_an_interrupted_preparation_leaves_the_old_embeddings(folder):
  before = fill(folder)
  expected = take(folder, 1)[0]['teacher_text']

  def stops(parts, total):
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    teacher.write(folder, 'other', [None, None], stops)
  assert manifest.load(folder).teacher == before and not list(folder.glob('.*'))
  np.testing.assert_array_equal(take(folder, 1)[0]['teacher_text'], expected)


@pytest.mark.parametrize('broken', [dict(captions=(' ',)), dict(image=b'no image')])
def test_a_record_that_cannot_be_used_is_named(folder, broken):
  records = pipeline.evaluation_records(folder, 'train')
  records[5] = dataclasses.replace(records[5], **broken)
  writer._write_split(folder, 'train', records, [])
  with pytest.raises(UserError, match='train 5 cannot be used: .*; prepare'):
    fill(folder)


def test_what_is_missing_or_does_not_fit_is_one_line(folder):
  with pytest.raises(UserError, match='has no embeddings of a teacher; make them with: .*prepare teacher') as error:
    batches(folder)
  assert '\n' not in str(error.value)
  entry = fill(folder)
  dataclasses.replace(manifest.load(folder), teacher=dataclasses.replace(entry, dim=4)).save(folder)
  with pytest.raises(UserError, match='are not those of its .* records; make them'):
    batches(folder)
  fill(folder)
  data = (folder / teacher.CAPTIONS).read_bytes()
  (folder / teacher.CAPTIONS).write_bytes(data[:-6])
  with pytest.raises(UserError, match='are not those of its'):
    batches(folder)
  (folder / teacher.CAPTIONS).write_bytes(b'')
  with pytest.raises(UserError, match='are not those of its'):
    batches(folder)
  (folder / teacher.CAPTIONS).unlink()
  with pytest.raises(UserError, match=r"teacher-captions.f16' is missing"):
    batches(folder)
  with pytest.raises(UserError, match='is not a folder'):
    fill(folder / 'nowhere')
