"""Every format gives the same records, in an order that only the seed decides, and goes on where it stopped."""
import dataclasses
import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import tarfile
import threading

import grain
import numpy as np
import pyarrow.parquet
import pytest
import source_files

from lightclip_jax import config
from lightclip_jax.data import captions, convert, datasets, files, manifest, pipeline, sources, tokenizers
from lightclip_jax.data.datasets import shapes
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.errors import UserError

COUNT = 23


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """kind -> its name as `data.dataset`, and the options to open it with."""
  root = tmp_path_factory.mktemp('sources')
  tokenizer = tokenizers.train([text for _, _, text in source_files.pairs(COUNT)], 60)
  (root / 'tokenizer.model').write_bytes(tokenizer.to_bytes())
  names = {}
  for kind, write in source_files.WRITERS.items():
    (root / kind).mkdir()
    names[kind] = write(root / kind, source_files.pairs(COUNT))
  options = config.replace(config.Data(), tokenizer=str(root / 'tokenizer.model'), workers=0, max_masked=3)
  before, os.environ['LIGHTCLIP_DATA'] = os.environ['LIGHTCLIP_DATA'], str(root / 'cache')
  yield names, options
  os.environ['LIGHTCLIP_DATA'] = before


def _options(made, kind):
  names, options = made
  tokenizer = pathlib.Path(options.tokenizer)
  return config.replace(options, image_root=str(tokenizer.parent / kind)) if kind == 'tfds' else options


def _batches(made, kind, workers=0, batch_size=8, seed=1, options=None, **more):
  names, own = made
  own = config.replace(options or _options(made, kind), workers=workers)
  folder = datasets.resolve(names.get(kind, kind), own)
  return pipeline.train_batches(folder, own, image_size=16, context=20, batch_size=batch_size, seed=seed, **more)


def _take(batches, count):
  out = list(itertools.islice(batches, count))
  batches.close()
  return out


def _assert_equal(got, expected):
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('kind', source_files.WRITERS)
def test_records_are_what_was_written(made, kind):
  names, options = made[0], _options(made, kind)
  source = sources.open_split(datasets.resolve(names[kind], options), 'train')
  got = {(record.image, record.captions) for record in map(source.__getitem__, range(len(source)))}
  assert got == {(image, (text,)) for _, image, text in source_files.pairs(COUNT)} and len(source) == COUNT
  assert len({source.name(i) for i in range(COUNT)}) == COUNT
  again = pickle.loads(pickle.dumps(source))
  assert again.fingerprint == source.fingerprint and again[COUNT - 1] == source[COUNT - 1]


@pytest.mark.parametrize('kind', [*source_files.WRITERS, 'mixture'])
def test_captions_alone_are_the_records(made, kind):
  names, options = made[0], config.replace(_options(made, kind), holdout_every=5)
  name = f'{names["csv"]} + {names["array_record"]} + {names["webdataset"]}' if kind == 'mixture' else names[kind]
  for split in ('train', sources.HELDOUT)[:1 if 'array_record' in name else 2]:
    source = sources.open_parts(datasets.about(name, options), split)
    for again in (source, pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(source))))):
      assert [captions.at(again, i) for i in range(len(source))] == [source[i].captions for i in range(len(source))]


@pytest.mark.parametrize('kind', ['webdataset', 'csv', 'jsonl', 'folder', 'parquet'])
def test_captions_are_read_without_images(tmp_path, kind, monkeypatch):
  # The tokenizer of twelve million pairs read a million whole images, and had to have them.
  rows = source_files.pairs(3)
  name = source_files.WRITERS[kind](tmp_path, rows)
  source = sources.open_parts(datasets.about(name, config.Data()), 'train')
  order = [source[i].captions for i in range(3)]
  read, row_group = [], pyarrow.parquet.ParquetFile.read_row_group
  monkeypatch.setattr(pyarrow.parquet.ParquetFile, 'read_row_group',
                      lambda *args, columns, **more: read.extend(columns) or row_group(*args, columns=columns, **more))
  part = sources.webdataset._part
  monkeypatch.setattr(sources.webdataset, '_part', lambda *args: read.append(part(*args)) or read[-1])
  for file in tmp_path.glob('images/*.jpg'):
    file.unlink()
  assert [captions.at(source, i) for i in range(3)] == order
  assert read == {'parquet': ['caption'] * 2, 'webdataset': [text.encode() for text, in order]}.get(kind, [])


def _recaptioned(folder, kind):
  """Pictures with alt texts, of which one has a better caption in its JSON, one none there, and one no JSON."""
  texts = {f'{key}.txt': f'alt {key}'.encode() for key in 'abc'}
  texts |= {'a.json': b'{"caption": "alt a", "better": ["a red fox", "a fox"]}', 'b.json': b'{"caption": "alt b"}'}
  data = {**texts, **{f'{key}.jpg': source_files.jpeg(number) for number, key in enumerate('abc')}}
  if kind == 'folder':
    for name, value in data.items():
      (folder / name).write_bytes(value)
  else:
    with tarfile.open(folder / 'x.tar', 'w') as tar:
      for name, value in sorted(data.items()):
        source_files.add(tar, name, value)


def _captions_or_reason(source, index):
  try:
    assert captions.at(source, index) == source[index].captions
    return source[index].captions
  except BadRecord as error:
    return error.reason


@pytest.mark.parametrize('kind', ['folder', 'webdataset'])
def test_the_caption_column_of_json_beside_images(tmp_path, kind):
  # It was ignored, and so were the better captions of recaptioned tars: the run learnt from the alt texts.
  (tmp_path / 'in').mkdir()
  _recaptioned(tmp_path / 'in', kind)
  spec = sources.Spec(kind, str(tmp_path / 'in'), index=str(tmp_path / 'index'))
  better = dataclasses.replace(spec, caption_column='better')   # an older version's index lies there then
  plain, source = (sources.SOURCES[kind](about) for about in (spec, better))
  for opened, said in ((plain, [('alt a',), ('alt b',), ('alt c',)]),
                       (source, [('a red fox', 'a fox'), 'no_caption', ('alt c',)])):
    for again in (opened, pickle.loads(pickle.dumps(opened))):
      assert [_captions_or_reason(again, i) for i in range(3)] == said
  assert plain.fingerprint != source.fingerprint
  with pytest.raises(UserError, match="data.caption_column is 'x', but '/.*' has no JSON beside its images; leave it at ''"):
    (tmp_path / 'texts').mkdir()
    source_files.WRITERS[kind](tmp_path / 'texts', source_files.pairs(2))
    sources.SOURCES[kind](dataclasses.replace(better, path=str(tmp_path / 'texts'), caption_column='x'))


@pytest.mark.parametrize(('kind', 'option'), [(kind, name) for kind, names in sources.IGNORED.items() for name in names])
def test_options_that_a_kind_would_ignore_are_refused(made, kind, option):
  names, options = made[0], config.replace(made[1], **{option: 'here'})
  with pytest.raises(UserError, match=f"^data.{option} is 'here', which {kind} would ignore; leave it at '' .it is for csv, "):
    datasets.resolve(names[kind], options)
  assert len(datasets.about(f'{names["csv"]} + {names[kind]}', options)['parts']) == 2   # which needs it


def test_a_worker_of_a_folder_whose_list_is_gone(tmp_path):
  images = tmp_path / 'in'
  images.mkdir()
  source_files.write_folder(images, source_files.pairs(3))
  spec = sources.Spec('folder', str(images), index=str(tmp_path / 'index'))
  first = sources.SOURCES['folder'](spec)
  worker = pickle.dumps(first)
  shutil.rmtree(tmp_path / 'index')
  assert len(pickle.loads(worker)) == 3
  (images / 'new.jpg').write_bytes(source_files.jpeg(9))
  assert len(sources.SOURCES['folder'](spec)) == 4   # deletes the older list
  with pytest.raises(UserError, match=f"'{images}' has changed while it was read; start again"):
    len(pickle.loads(worker))
  (images / 'new.jpg').unlink()
  assert len(sources.SOURCES['folder'](spec)) == 3


@pytest.mark.parametrize('kind', ['webdataset', 'csv', 'tsv', 'jsonl', 'parquet'])
def test_a_worker_of_a_source_that_has_changed(tmp_path, kind):
  # It read other records under the same numbers, and said nothing.
  for name, count in (('before', 5), ('after', 9)):
    (tmp_path / name).mkdir()
    source_files.WRITERS[kind](tmp_path / name, source_files.pairs(count))
  before = tmp_path / 'before'
  path = str(before if kind in ('webdataset', 'parquet') else before / f'pairs.{kind}')
  source = sources.SOURCES[kind](sources.Spec(kind, path, index=str(tmp_path / 'index')))
  worker = pickle.dumps(pickle.loads(pickle.dumps(source)))
  assert [pickle.loads(worker)[i] for i in range(5)] == [source[i] for i in range(5)]
  shutil.rmtree(before)
  (tmp_path / 'after').rename(before)
  for read in (len, lambda again: again[0], lambda again: again.name(0)):
    with pytest.raises(UserError, match=f"^'{path}' has changed while it was read; start again$"):
      read(pickle.loads(worker))


@pytest.mark.parametrize('kind', [*source_files.WRITERS, 'mixture'])
def test_order_resume_hosts_and_epochs(made, kind):
  names, options = made[0], _options(made, kind)
  if kind == 'mixture':
    kind, options = f'{names["csv"]} + {names["webdataset"]}', config.replace(options, weights=(3.0, 1.0))
  whole = _take(_batches(made, kind, options=options), 12)
  ids = np.concatenate([batch['example_id'] for batch in whole])
  if ' + ' not in kind:
    for epoch in range(4):
      np.testing.assert_array_equal(np.sort(ids[epoch * COUNT:(epoch + 1) * COUNT]), np.arange(COUNT))
  else:
    assert abs(np.mean(ids < COUNT) - 0.75) < 0.02
    np.testing.assert_array_equal(np.sort(ids[ids < COUNT][:COUNT]), np.arange(COUNT))   # its own epochs
    np.testing.assert_array_equal(np.sort(ids[ids >= COUNT][:COUNT]), np.arange(COUNT, 2 * COUNT))
  first = _batches(made, kind, options=options)
  for _ in range(5):
    next(first)
  state = json.loads(json.dumps(first.state()))
  first.close()
  halves = []
  for host in range(2):
    half = _batches(made, kind, options=options, process_index=host, process_count=2)
    half.restore(state)
    halves.append(_take(half, 4))
  joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
  _assert_equal(joined, whole[5:9])


@pytest.mark.parametrize('kinds', [('webdataset',), ('array_record', 'jsonl'), ('csv', 'parquet', 'folder')])
@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_hosts_together_see_each_record_once_an_epoch(made, kinds, hosts):
  count = COUNT * len(kinds)
  assert count % 8   # epochs end inside batches
  name = ' + '.join(made[0][kind] for kind in kinds)
  shares = [_take(_batches(made, name, process_index=h, process_count=hosts), 2 * count // 8 + 1) for h in range(hosts)]
  ids = np.concatenate([share['example_id'] for step in zip(*shares, strict=True) for share in step])
  for epoch in range(2):
    np.testing.assert_array_equal(np.sort(ids[epoch * count:(epoch + 1) * count]), np.arange(count))


class _Few(grain.MapDataset):

  def __len__(self):
    return 3

  def __getitem__(self, index):
    return self._parent[index]


@pytest.mark.parametrize('kind', [*source_files.WRITERS, 'mixture'])
def test_grain_checkpoints(made, kind):
  names, options = made[0], _options(made, kind)
  if kind == 'mixture':
    kind, options = f'{names["jsonl"]} + {names["folder"]}', config.replace(options, weights=(1.0, 2.0))
  folder = datasets.resolve(names.get(kind, kind), options)
  source = sources.open_split(folder, 'train')
  example = pipeline._Example(source, pipeline.load_tokenizer(folder), options, 16, 20, 1)
  dataset = _Few(pipeline._order(source, 1).map(example).batch(4)).to_iter_dataset(grain.ReadOptions(num_threads=2))
  grain.experimental.assert_equal_output_after_checkpoint(dataset)


def test_workers_do_not_matter(made):
  kinds = [kind for kind in source_files.WRITERS if kind != 'tfds']   # it needs another `image_root`
  name = ' + '.join(made[0][kind] for kind in kinds)                  # all of them cross the border to a process
  whole = _take(_batches(made, name), 6)
  for workers in (1, 2, 4):
    _assert_equal(_take(_batches(made, name, workers=workers), 6), whole)
  assert {int(i) // COUNT for batch in whole for i in batch['example_id']} == set(range(len(kinds)))
  _assert_equal(_take(_batches(made, 'tfds', workers=1), 2), _take(_batches(made, 'tfds'), 2))


def test_a_mixture_is_evaluated_on_its_first_prepared_folder(made, tmp_path):
  names, options = made
  for name, size in (('small', 16), ('large', 24)):
    shapes.prepare(tmp_path / name, size=size)
  mixed = datasets.resolve(f'{names["csv"]} + {tmp_path / "small"} + {tmp_path / "large"}', options)
  contents, first = manifest.load(mixed), manifest.load(tmp_path / 'small')
  assert (contents.concepts, contents.groups) == (first.concepts, first.groups) and len(first.concepts) > 1
  assert {name: split.count for name, split in contents.splits.items()} == {
      name: COUNT + 2 * split.count if name == 'train' else split.count for name, split in first.splits.items()}
  for split in set(first.splits) - {'train'}:
    got, expected = sources.open_split(mixed, split), sources.open_split(tmp_path / 'small', split)
    assert list(map(got.__getitem__, range(len(got)))) == list(map(expected.__getitem__, range(len(expected))))


def test_a_prepared_folder_with_another_tokenizer(tmp_path, monkeypatch):
  # It was not looked at, so that a vocabulary of the same size was another without a word.
  monkeypatch.setenv('LIGHTCLIP_DATA', str(tmp_path / 'cache'))
  shapes.prepare(tmp_path / 'folder', size=16)
  other = tokenizers.train(['a cat', 'a dog', 'two houses and a tree'], 80)
  (tmp_path / 'other.model').write_bytes(other.to_bytes())
  options = config.replace(config.Data(), tokenizer=str(tmp_path / 'other.model'))
  folder = datasets.resolve(str(tmp_path / 'folder'), options)
  assert pipeline.load_tokenizer(folder).to_bytes() == other.to_bytes()
  own, now = manifest.load(tmp_path / 'folder'), manifest.load(folder)
  assert (now.concepts, now.groups, now.splits.keys()) == (own.concepts, own.groups, own.splits.keys())
  for split in own.splits:
    got, expected = sources.open_split(folder, split), sources.open_split(tmp_path / 'folder', split)
    assert list(map(got.__getitem__, range(len(got)))) == list(map(expected.__getitem__, range(len(expected))))
  with pytest.raises(UserError, match='there is no tokenizer file'):
    datasets.resolve(str(tmp_path / 'folder'), config.replace(options, tokenizer=str(tmp_path / 'nix.model')))


@pytest.mark.parametrize('every', [0, 5])
def test_what_a_folder_holds_out_is_not_what_a_mixture_trains_on(made, tmp_path, every):
  names, options = made
  shapes.prepare(tmp_path / 'folder', size=16)
  contents = manifest.load(tmp_path / 'folder')
  splits = {**contents.splits, sources.HELDOUT: contents.splits['heldout_style']}   # as `prepare KIND --holdout_every` names it
  dataclasses.replace(contents, splits=splits).save(tmp_path / 'folder')
  mixed = datasets.resolve(f'{tmp_path / "folder"} + {names["csv"]}', config.replace(options, holdout_every=every))
  train, heldout = (sources.open_split(mixed, split) for split in ('train', sources.HELDOUT))
  assert {train.name(i) for i in range(len(train))}.isdisjoint(heldout.name(i) for i in range(len(heldout)))
  assert manifest.load(mixed).split(sources.HELDOUT).count == len(heldout)
  if not every:
    assert len(heldout) == contents.splits['heldout_style'].count


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl'])
def test_an_image_of_several_rows_is_in_one_part_only(made, tmp_path, kind):
  # Of COCO's five rows an image each tenth was held out: all of them showed what was trained on.
  options = config.replace(made[1], holdout_every=3)
  rows = [(f'{i // 4 if i < 40 else i % 10}', b'', f'caption {i}') for i in range(50)]   # also those far apart
  about = datasets.about(source_files.write_table(tmp_path, rows, kind), options)
  with (tmp_path / f'pairs.{kind}').open('a') as file:
    file.write('"\n')   # a row that cannot be read is one of its own
  train, heldout = (sources.open_parts(about, split) for split in ('train', sources.HELDOUT))
  assert [heldout.place(i) for i in range(len(heldout))] == [i for i in range(50) if int(rows[i][0]) % 3 == 0]
  assert sorted(part.place(i) for part in (train, heldout) for i in range(len(part))) == list(range(51))
  for part in (train, heldout):   # each worker's Nth row was one of all rows: it trained on what is held out
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(part))))
    assert again.fingerprint == part.fingerprint and len(again) == len(part)
    assert [again.place(i) for i in range(len(part))] == [part.place(i) for i in range(len(part))]
  assert train.fingerprint != heldout.fingerprint


def test_preparing_processes_hold_out_whole_images_too(tmp_path, monkeypatch):
  rows = [(f'{i // 5}', source_files.jpeg(i // 5), f'caption {i}') for i in range(60)]
  path = source_files.write_table(tmp_path, rows, 'csv').partition(':')[2]
  about = datasets.about(f'csv:{path}', config.replace(config.Data(), holdout_every=4))
  monkeypatch.setattr(convert.writer, 'RECORDS_PER_SHARD', 25)
  convert.convert(about, tmp_path / 'out', convert.Options(vocab_size=64), 2)
  images = {split: {record.image for record in pipeline.evaluation_records(tmp_path / 'out', split)}
            for split in ('train', 'heldout')}
  assert images['heldout'] == {rows[5 * i][1] for i in (0, 4, 8)} and len(images['train']) == 9


def test_holdout_and_evaluation(made):
  names, options = made
  options = config.replace(options, holdout_every=5)
  folder = datasets.resolve(names['webdataset'], options)
  splits = {split: [r.key for r in map(sources.open_split(folder, split).__getitem__, range(count.count))]
            for split, count in manifest.load(folder).splits.items()}
  assert len(splits['heldout']) == 5 and len(splits['train']) == COUNT - 5
  assert len(set(splits['heldout'] + splits['train'])) == COUNT
  batches = list(pipeline.evaluation_batches(folder, 'heldout', image_size=16, batch_size=4))
  np.testing.assert_array_equal(np.concatenate([b['index'] for b in batches]), [0, 1, 2, 3, 4, -1, -1, -1])
  with pytest.raises(UserError, match='holdout_every is 1'):
    datasets.resolve(names['webdataset'], config.replace(options, holdout_every=1))


def test_fewer_records_than_workers_hosts_and_batch(tmp_path, made):
  name = source_files.write_tars(tmp_path, source_files.pairs(2), shards=1)
  _, options = made
  got = _take(_batches((dict(one=name), options), 'one', workers=2, batch_size=12), 1)[0]['example_id']
  parts = [_take(_batches((dict(one=name), options), 'one', batch_size=12, process_index=h, process_count=4), 1)[0]
           for h in range(4)]
  np.testing.assert_array_equal(np.concatenate([part['example_id'] for part in parts]), got)
  assert np.bincount(got).tolist() == [6, 6]


def test_a_changed_tar_is_indexed_anew_and_the_others_are_not(tmp_path, made, monkeypatch):
  _, options = made
  name, rows = source_files.write_tars(tmp_path, source_files.pairs(9)), source_files.pairs(12)
  walked = []
  walk = sources.webdataset.walk
  monkeypatch.setattr(sources.webdataset, 'walk', lambda file, size: walked.append(size) or walk(file, size))
  before = sources.open_split(datasets.resolve(name, options), 'train')
  assert len(before) == 9 and len(walked) == 3
  assert len(sources.open_split(datasets.resolve(name, options), 'train')) == 9 and len(walked) == 3
  with tarfile.open(tmp_path / '00001.tar', 'a') as tar:
    source_files.add(tar, 'new.jpg', rows[10][1])
    source_files.add(tar, 'new.json', b'{"caption": ["one", " ", "two"]}')
  after = sources.open_split(datasets.resolve(name, options), 'train')
  assert len(after) == 10 and len(walked) == 4 and after.fingerprint != before.fingerprint
  assert {r.captions for r in map(after.__getitem__, range(10))} >= {('one', 'two')}


@pytest.mark.parametrize('how', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_all_kinds_are_walked_as_tarfile_does(tmp_path, how):
  names = ['a.jpg', 'folder/b.jpg', 'd' * 90 + '/' + 'e' * 90 + '.txt'] + ['ü' * 120 + '.txt'] * (how != tarfile.USTAR_FORMAT)
  with tarfile.open(tmp_path / 'x.tar', 'w', format=how) as tar:
    for number, name in enumerate(names):
      source_files.add(tar, name, bytes(number * 700), mtime=1.5)
    tar.addfile(tarfile.TarInfo('folder'))
  with (tmp_path / 'x.tar').open('rb') as file, tarfile.open(tmp_path / 'x.tar') as tar:
    got = list(sources.webdataset.walk(file, os.path.getsize(tmp_path / 'x.tar')))
    assert [(m.name, m.at, m.size) for m in got] == [(m.name, m.offset_data, m.size) for m in tar]


def test_buckets_are_read_through_fsspec(made):
  import fsspec
  names, options = made
  memory = fsspec.filesystem('memory')
  for path in (os.path.join(names['webdataset'].partition(':')[2], f'{i:05d}.tar') for i in range(3)):
    with open(path, 'rb') as file:
      memory.pipe(f'/bucket/{os.path.basename(path)}', file.read())
  _assert_equal(_take(_batches(({'bucket': 'webdataset:memory://bucket'}, options), 'bucket'), 2),
                _take(_batches(made, 'webdataset'), 2))


@pytest.mark.parametrize(('kind', 'suffix'), [('parquet', 'parquet'), ('webdataset', 'tar')])
@pytest.mark.parametrize('bucket', [False, True])
def test_a_folder_that_is_named_as_a_file(tmp_path, kind, suffix, bucket):
  # What Spark writes, a folder x.parquet, was "no whole Parquet file (the file is not there)".
  import fsspec
  rows, folder = source_files.pairs(4), tmp_path / f'x.{suffix}'
  folder.mkdir()
  source_files.WRITERS[kind](folder, rows)
  (folder / '_SUCCESS').touch()
  path = str(folder)
  if bucket:
    path = f'memory://folders/x.{suffix}'
    fsspec.filesystem('memory').put(str(folder), f'/folders/x.{suffix}', recursive=True)
  for name in (path, f'{path}/'):
    source = sources.open_parts(datasets.about(f'{kind}:{name}', config.Data()), 'train')
    assert {source[i].image for i in range(4)} == {image for _, image, _ in rows}
  one = f'{path}/{"00000.tar" if kind == "webdataset" else "train-00000.parquet"}'
  assert len(sources.open_parts(datasets.about(f'{kind}:{one}', config.Data()), 'train')) == 2


@pytest.mark.parametrize('name', ['../secret.jpg', '/etc/passwd', 'link.jpg', 'folder/../../secret.jpg', 'linked/secret.jpg'])
def test_nothing_outside_the_folder_is_opened(tmp_path, name, monkeypatch):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'secret.jpg').write_bytes(source_files.jpeg(0))
  (tmp_path / 'data/link.jpg').symlink_to(tmp_path / 'secret.jpg')
  (tmp_path / 'data/linked').symlink_to(tmp_path)
  (tmp_path / 'data/x.csv').write_text(f'filepath,title\n{name},a secret\n')
  source = sources.SOURCES['csv'](sources.Spec('csv', str(tmp_path / 'data/x.csv'), index=str(tmp_path / 'index')))
  opened = []
  real, own = os.open, threading.get_ident()

  def watched(path, *rest, **more):
    if threading.get_ident() == own:   # threads of pipelines that other tests closed may still end their reading
      opened.append(path)
    return real(path, *rest, **more)

  monkeypatch.setattr(os, 'open', watched)
  with pytest.raises(BadRecord) as error:
    source[0]
  assert error.value.reason == 'outside' and [os.path.basename(path) for path in opened] == ['x.csv']


def test_captions_beside_pictures_in_capitals(tmp_path):
  # IMG_0.JPG was an image and IMG_0.TXT no caption of it.
  for name, text in {'0.TXT': 'zero', '1.JSON': '{"text": "one"}', '2.txt': 'two', '2.TXT': 'not this'}.items():
    (tmp_path / name).write_text(text)
    (tmp_path / f'{name[0]}.JPG').write_bytes(source_files.jpeg(0))
  source = sources.SOURCES['folder'](sources.Spec('folder', str(tmp_path), index=str(tmp_path / 'index')))
  assert [source[i].captions for i in range(len(source))] == [('zero',), ('one',), ('two',)]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  # It was skipped, so that its pictures were missing from the data set.
  source_files.write_folder(tmp_path, source_files.pairs(2))
  real = os.scandir

  def scandir(path):   # root, as whom tests may run, reads folders of mode 000 too
    if os.path.basename(path) == 'images':
      raise PermissionError(13, 'Permission denied', path)
    return real(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  said = f"^cannot read the folder '{tmp_path}/images': Permission denied; make it readable, or"
  for kind in ('folder', 'webdataset', 'parquet'):
    with pytest.raises(UserError, match=said):
      sources.SOURCES[kind](sources.Spec(kind, str(tmp_path), index=str(tmp_path / 'index')))


def test_what_a_mac_leaves_beside_each_file_is_no_record(tmp_path):
  for number, (name, image, text) in enumerate(source_files.pairs(4)):
    folder = tmp_path / ('.thumbnails' if number == 3 else 'of dogs')
    folder.mkdir(exist_ok=True)
    (folder / f'{name}.jpg').write_bytes(image)
    (folder / f'{name}.txt').write_text(text)
    (folder / f'._{name}.jpg').write_bytes(b'\0\x05\x16\x07')
  found = [f'of dogs/{name}.jpg' for name, _, _ in source_files.pairs(3)]
  assert files.Folder(tmp_path).files('.jpg') == found == files.Folder(f'file://{tmp_path}').files('.jpg')


def test_links_are_named_once(tmp_path, capsys):
  # A folder made of links to the classes of another was an empty one, and a single link just missing.
  for name in ('data', 'elsewhere'):
    (tmp_path / name).mkdir()
    source_files.write_folder(tmp_path / name, source_files.pairs(2))
  (tmp_path / 'data/linked').symlink_to(tmp_path / 'elsewhere/images')
  (tmp_path / 'data/x.jpg').symlink_to(tmp_path / 'elsewhere/images/0000.jpg')
  (tmp_path / 'data/x.md').symlink_to(tmp_path / 'elsewhere')   # no picture, but a folder
  (tmp_path / 'data/notes.md').symlink_to(tmp_path / 'elsewhere/images/0000.txt')
  folder = files.Folder(tmp_path / 'data')
  assert [folder.files('.jpg') for _ in range(2)] == [['images/0000.jpg', 'images/0001.jpg']] * 2
  said = capsys.readouterr().err
  assert said.startswith(f"{tmp_path}/data: links are not followed, such as '{tmp_path}/data/linked' (3 in all); ")
  assert said.count('\n') == 1


@pytest.mark.parametrize('labels', [False, True])
def test_tfds_without_tensorflow(tmp_path, made, labels):
  import tensorflow_datasets as tfds
  pairs = source_files.pairs(6)
  image = tfds.features.Image(encoding_format='jpeg')
  if labels:
    features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(names=['red_fox', 'dog'])})
    rows = [{'image': data, 'label': i % 2} for i, (_, data, _) in enumerate(pairs)]
    expected = [(data, (('red fox', 'dog')[i % 2],)) for i, (_, data, _) in enumerate(pairs)]
  else:
    features = tfds.features.FeaturesDict({'image': image, 'caption': tfds.features.Text()})
    rows = [{'image': data, 'caption': text.encode()} for _, data, text in pairs]
    expected = [(data, (text,)) for _, data, text in pairs]
  source_files.write_tfds(tmp_path, rows, features)
  names, options = {'t': 'tfds:tiny_pairs@train'}, config.replace(made[1], image_root=str(tmp_path))
  source = sources.open_split(datasets.resolve(names['t'], options), 'train')
  assert [(record.image, record.captions) for record in map(source.__getitem__, range(6))] == expected
  assert pickle.loads(pickle.dumps(source))[5] == source[5]
  assert len(_take(_batches((names, options), 't', options=options), 2)) == 2


def _tfds_labels(folder, feature, value):
  import tensorflow_datasets as tfds
  features = tfds.features.FeaturesDict({'image': tfds.features.Image(encoding_format='jpeg'), 'kind': feature})
  source_files.write_tfds(folder, [{'image': source_files.jpeg(0), 'kind': value}], features)
  return sources.SOURCES['tfds'](sources.Spec('tfds', 'tiny_pairs', caption_column='kind', image_root=str(folder)))


def test_tfds_labels_of_another_name_without_one_and_without_names(tmp_path):
  # -1, which means no label, got the last class's name, and labels under another name were "not UTF-8 text".
  import tensorflow_datasets as tfds
  named = tfds.features.ClassLabel(names=['red_fox', 'dog'])
  assert _tfds_labels(tmp_path / 'named', named, 0)[0].concept == 'red fox'
  for number in (-1, 2):
    with pytest.raises(BadRecord, match=f'there is no caption .label {number}.'):
      _tfds_labels(tmp_path / str(number), named, number)[0]
  with pytest.raises(UserError, match="^'kind' of the TFDS set 'tiny_pairs' is int64 without names; captions must be"):
    _tfds_labels(tmp_path / 'number', tfds.features.Scalar(np.int64), 0)


@pytest.mark.parametrize(('name', 'said'), [
    ('tar:x', 'neither a folder nor a built-in name'), ('webdataset:nowhere', 'is not there'),
    ('csv:nowhere/x.csv', 'is not there'),
    ('webdataset:', 'no KIND:PATH'), ('tfds:no_such_set', 'cannot read the TFDS set')])
def test_wrong_names_are_one_line(made, name, said):
  with pytest.raises(UserError, match=said) as error:
    datasets.resolve(name, made[1])
  assert '\n' not in str(error.value)


def test_parquet_is_read_by_the_thread_that_asks(tmp_path, monkeypatch):
  # One of Arrow's own aborted the process, with exit code 134, where that ended at the same time.
  readers = set()

  class Watched(io.FileIO):
    def read(self, size=-1):
      readers.add(threading.get_ident())
      return super().read(size)

  source_files.write_parquet(tmp_path, source_files.pairs(4))
  source = sources.open_parts(datasets.about(f'parquet:{tmp_path}', config.Data()), 'train')
  monkeypatch.setattr(files.Folder, 'open', lambda self, name: Watched(tmp_path / name))
  assert [source[i].image for i in (0, 1)] == [image for _, image, _ in source_files.pairs(4)[::2]]
  assert readers == {threading.get_ident()}


def test_what_does_not_fit_is_one_line(made, tmp_path):
  names, options = made
  with pytest.raises(UserError, match='brings no tokenizer; set data.tokenizer'):
    datasets.resolve(names['csv'])
  with pytest.raises(UserError, match='needs 2 numbers above 0'):
    datasets.resolve(f'{names["csv"]} + {names["csv"]}', config.replace(options, weights=(1.0,)))
  (tmp_path / 'empty.csv').write_text('filepath,title\n')
  with pytest.raises(UserError, match=f'^csv:{tmp_path}/empty.csv has no training records to draw; leave it and'):
    datasets.resolve(f'{names["csv"]} + csv:{tmp_path}/empty.csv', config.replace(options, weights=(1.0, 1.0)))
  with pytest.raises(UserError, match="data.holdout_every is 10, but 'shapes' has held-out splits already; leave it at 0"):
    datasets.resolve('shapes', config.Data(holdout_every=10))
  for option, value in (('weights', (3.0, 1.0)), ('image_column', 'x'), ('image_root', 'y')):
    with pytest.raises(UserError, match=f"data.{option} is .*'shapes' is one prepared set, where it changes nothing"):
      datasets.resolve('shapes', config.replace(config.Data(), **{option: value}))
  with pytest.raises(UserError, match="data.caption_column is 'x', but 'shapes' is one prepared set"):
    datasets.resolve('shapes', config.replace(options, caption_column='x'))
  with pytest.raises(UserError, match='has no column words; it has: filepath, title'):
    datasets.resolve(names['csv'], config.replace(options, caption_column='words'))
  with pytest.raises(UserError, match='has no .tar files'):
    datasets.resolve(f'webdataset:{tmp_path}', options)
  (tmp_path / 'wide.csv').write_text('filepath,title\na.jpg,a\n', encoding='utf-16')
  (tmp_path / 'wide.jsonl').write_text('{"filepath": "a.jpg", "title": "a"}\n', encoding='utf-16-le')
  for name in ('csv', 'jsonl'):
    with pytest.raises(UserError, match=f'wide.{name}. is no UTF-8 text .UTF-16, perhaps.*; save it as UTF-8$'):
      datasets.resolve(f'{name}:{tmp_path}/wide.{name}', options)
  (tmp_path / 'x.csv').write_text('"filepath,title\na.jpg,a ""quoted"" line break"')
  with pytest.raises(UserError, match='has no column filepath or .*; it has: filepath,title a.jpg'):
    datasets.resolve(f'csv:{tmp_path}/x.csv', options)
  for kind in ('folder', 'webdataset', 'parquet'):   # as of an archive that should be unpacked
    with pytest.raises(UserError, match='x.csv. is a file, not a folder'):
      datasets.resolve(f'{kind}:{tmp_path}/x.csv', options)
  (tmp_path / 'x.parquet').write_bytes(b'PAR1 and more')
  with pytest.raises(UserError, match='no whole Parquet file'):
    datasets.resolve(f'parquet:{tmp_path}', options)
