"""Bad records are left out, counted by reason, named and replaced; nothing that anyone may have written ends a run."""
import io
import itertools
import json
import os
import struct
import tarfile
import zlib

import fuzz
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import source_files

from lightclip_jax import config
from lightclip_jax.data import captions, datasets, faults, pipeline, sources, tokenizers, transforms
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.errors import UserError

GOOD = 20


def _bomb(width=60_000, height=60_000):
  """A PNG whose header promises more pixels than anyone wants."""
  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'0')) + chunk(b'IEND', b'')


def _png(number):
  out = io.BytesIO()
  PIL.Image.open(io.BytesIO(source_files.jpeg(number))).save(out, 'PNG')
  return out.getvalue()


def bad_pairs():
  """(reason, image, caption as bytes): 40 of them."""
  good, text = source_files.jpeg(0), b'a caption'
  return ([('empty', b'', text)] * 5
          + [('not_image', data, text) for data in (b'hello', b'<html></html>', b'%PDF-1.4', bytes(100), b'RIFF....WAVE')]
          + [('truncated', good[:len(good) * part // 10], text) for part in range(2, 10)]
          + [('truncated', _png(1)[:-part], text) for part in (40, 60, 100, 200)]
          + [('oversized', _bomb(), text)] * 5
          + [('no_caption', good, caption) for caption in (b'', b' ', b'\n', b'\n \t\n', b'\xef\xbb\xbf')]
          + [('bad_caption', good, bytes([60 + i, 0xff, 0xfe])) for i in range(8)])


def _tar(folder, rows):
  with tarfile.open(folder / 'x.tar', 'w') as tar:
    for number, (_, image, caption) in enumerate(rows):
      source_files.add(tar, f'{number:04d}.jpg', image)
      source_files.add(tar, f'{number:04d}.txt', caption)
  return f'webdataset:{folder}'


def _folder(folder, rows):
  for number, (_, image, caption) in enumerate(rows):
    (folder / f'{number:04d}.jpg').write_bytes(image)
    (folder / f'{number:04d}.txt').write_bytes(caption)
  return f'folder:{folder}'


def _csv(folder, rows, kind='csv', separator=b','):
  lines = [b'filepath' + separator + b'title']
  for number, (_, image, caption) in enumerate(rows):
    (folder / f'{number:04d}.jpg').write_bytes(image)
    caption = caption.replace(b'\xef\xbb\xbf', b'').replace(b'"', b'""')
    lines.append(b'%04d.jpg%s"%s"' % (number, separator, caption))
  (folder / f'x.{kind}').write_bytes(b'\n'.join(lines))
  return f'{kind}:{folder}/x.{kind}'


def _tsv(folder, rows):
  # A line of a caption that has as many tabs as the header would be a row.
  return _csv(folder, [(reason, image, caption.replace(b'\t', b' ')) for reason, image, caption in rows], 'tsv', b'\t')


def _jsonl(folder, rows):
  lines = []
  for number, (_, image, caption) in enumerate(rows):
    (folder / f'{number:04d}.jpg').write_bytes(image)
    for plain, escaped in ((b'\xef\xbb\xbf', b''), (b'\n', b'\\n'), (b'\t', b'\\t'), (b'"', b'\\"')):
      caption = caption.replace(plain, escaped)
    lines.append(b'{"filepath": "%04d.jpg", "title": "%s"}' % (number, caption))
  (folder / 'x.jsonl').write_bytes(b'\n'.join(lines))
  return f'jsonl:{folder}/x.jsonl'


def _parquet(folder, rows):
  table = pyarrow.table({'image': [{'bytes': image, 'path': None} for _, image, _ in rows],
                         'caption': pyarrow.array([c.replace(b'\xef\xbb\xbf', b'') for _, _, c in rows], pyarrow.binary())})
  pyarrow.parquet.write_table(table, folder / 'x.parquet', row_group_size=16)
  return f'parquet:{folder}/x.parquet'


def _array_record(folder, rows):
  return source_files.write_array_record(folder, [('', image, caption) for _, image, caption in rows])


def _tfds(folder, rows):
  return source_files.write_tfds(folder, [('', image, caption) for _, image, caption in rows])


@pytest.fixture(scope='module')
def options(tmp_path_factory):
  root = tmp_path_factory.mktemp('faults')
  (root / 't.model').write_bytes(tokenizers.train([text for _, _, text in source_files.pairs(GOOD)], 60).to_bytes())
  before, os.environ['LIGHTCLIP_DATA'] = os.environ['LIGHTCLIP_DATA'], str(root / 'cache')
  yield config.replace(config.Data(), tokenizer=str(root / 't.model'), workers=0, max_masked=3, max_faults=1.0)
  os.environ['LIGHTCLIP_DATA'] = before


def _batches(name, options, **more):
  return pipeline.train_batches(datasets.resolve(name, options), options, image_size=16, context=12, seed=0,
                                **{'batch_size': 12, **more})


@pytest.mark.parametrize('write', [_tar, _folder, _csv, _tsv, _jsonl, _parquet, _array_record, _tfds])
def test_training_over_the_corpus_counts_exactly(write, tmp_path, options, capfd):
  bad = bad_pairs()
  rows = [('', image, text.encode()) for _, image, text in source_files.pairs(GOOD)] + bad
  assert len(rows) == 60 and len(bad) == 40
  name = write(tmp_path, rows)
  options = config.replace(options, image_root=str(tmp_path) if write is _tfds else '')
  batches = _batches(name, options)
  ids = []
  for _ in range(5):   # one epoch
    batch = next(batches)
    assert batch['image'].shape == (12, 16, 16, 3) and 'faults' not in batch
    ids.extend(batch['example_id'].tolist())
  assert set(ids) == set(range(GOOD))                       # every good record was seen, and nothing else
  # Each bad record was met once in its own place; those that replacements met too can be told by their places.
  met = {reason: 0 for reason in faults.REASONS}
  dataset = pipeline.train_dataset(datasets.resolve(name, options), options, image_size=16, context=12, batch_size=12, seed=0)
  left_out = np.concatenate([b['faults'] for b in itertools.islice(dataset, 5)])
  assert sorted(left_out[:, 0, 0][left_out[:, 0, 1] > 0].tolist()) == list(range(GOOD, 60))
  for record, _ in left_out[left_out[..., 1] > 0]:
    met[rows[record][0]] += 1
  assert batches.faults() == {reason: count for reason, count in met.items() if count}
  counts_before = batches.faults()
  named = [line for line in capfd.readouterr().err.splitlines() if line.startswith('left out ')]
  assert 30 <= len(named) <= 6 * 7 < sum(counts_before.values())   # five of a reason, then at 10 and 100
  state = json.loads(json.dumps(batches.state()))
  after = list(itertools.islice(batches, 3))
  counts = batches.faults()
  batches.close()
  again = _batches(name, options)
  again.restore(state)
  for one, two in zip(after, itertools.islice(again, 3), strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])
  assert again.faults() == counts
  again.close()


def test_above_the_limit_a_run_stops_with_one_line(tmp_path, options):
  rows = [('', image, text.encode()) for _, image, text in source_files.pairs(GOOD)] + bad_pairs()
  batches = _batches(_tar(tmp_path, rows), config.replace(options, max_faults=0.05))
  with pytest.raises(UserError, match=r'of [\d,]+ records cannot be used \(.*truncated.*data.max_faults is 0.05') as error:
    for _ in range(10):
      next(batches)
  assert '\n' not in str(error.value)
  batches.close()


def test_the_share_of_faults_is_of_all_records_looked_at(capsys):
  rng = np.random.default_rng(0)
  bad = faults.entry(7, faults.BadRecord('truncated'))
  ledger, tried = faults.Ledger(0.5, str), []
  for _ in range(100):
    batch = np.stack([faults.blank()] * 20)
    for example in batch:
      tried.append(min(int(rng.geometric(0.6)) - 1, faults.ATTEMPTS))   # two in five records are bad
      example[:tried[-1]] = bad
    ledger.add(batch)
  assert sum(tried) > len(tried) / 2, 'more than half as many as examples'
  with pytest.raises(UserError) as error:
    ledger.add(np.full((600, faults.ATTEMPTS, 2), bad))
  assert f'{sum(tried) + 9600:,} of {len(tried) + 600 + sum(tried) + 9600:,} records' in str(error.value)


@pytest.mark.parametrize('workers', [0, 1])
def test_nothing_but_bad_records_is_one_line(tmp_path, options, workers):
  batches = _batches(_folder(tmp_path, [('empty', b'', b'x')] * 30), config.replace(options, workers=workers))
  with pytest.raises(UserError, match='16 records in a row cannot be used; the first was 00'):
    next(batches)
  batches.close()


def _reasons(source):
  out = []
  for index in range(len(source)):
    try:
      record = source[index]
      transforms.decode(record.image)
      out.append('good')
    except BadRecord as error:
      assert source.name(index)
      out.append(error.reason)
  return out


def _open(kind, path, tmp_path):
  return sources.SOURCES[kind](sources.Spec(kind, str(path), index=str(tmp_path / 'index')))


def test_what_is_wrong_with_tars(tmp_path):
  with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
    for key, image, text in source_files.pairs(3):
      source_files.add(tar, f'{key}.jpg', image)
      source_files.add(tar, f'{key}.txt', text.encode())
    source_files.add(tar, '0001.jpg', b'again')
    source_files.add(tar, 'alone.png', _png(1))
    source_files.add(tar, 'silent.txt', b'no image')
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
      source_files.add(tar, f'link{kind[0]}.jpg', b'', type=kind, linkname='/etc/passwd')
      source_files.add(tar, f'link{kind[0]}.txt', b'out')
    source_files.add(tar, 'broken.jpg', source_files.jpeg(9))
    source_files.add(tar, 'broken.json', b'{"caption": ')
    source_files.add(tar, 'last.jpg', source_files.jpeg(7) + bytes(60_000))
  expected = ['good'] * 3 + ['no_caption', 'missing', 'outside', 'outside', 'damaged']
  whole = (tmp_path / 'x.tar').read_bytes()
  assert sorted(_reasons(_open('webdataset', tmp_path, tmp_path))) == sorted([*expected, 'duplicate', 'no_caption'])
  (tmp_path / 'x.tar').write_bytes(whole[:-40_000])
  assert sorted(_reasons(_open('webdataset', tmp_path, tmp_path))) == sorted([*expected, 'duplicate', 'damaged'])
  (tmp_path / 'x.tar').write_bytes(b'no tar at all' * 100)
  assert _reasons(_open('webdataset', tmp_path, tmp_path)) == ['damaged']
  (tmp_path / 'x.tar').write_bytes(b'')
  assert _reasons(_open('webdataset', tmp_path, tmp_path)) == []


def test_keys_with_dots(tmp_path, capsys):
  # Samples whose names have a dot, such as photo.1.jpg or www.site.com_7.jpg, were no records, and not counted.
  files = {'photo.1.jpg': b'1', 'photo.1.txt': b'one',
           'a.b/www.site.com_7.JPG': b'2', 'a.b/www.site.com_7.json': b'{"text": "two"}',
           'whole.jpg': b'3', 'whole.mask.png': b'-', 'whole.clip.npy': b'-', 'whole.txt': b'three', 'alone.2.png': b'-',
           '._whole.jpg': b'-', '._whole.txt': b'-', './._photo.1.jpg': b'-', 'no_dot': b'-', 'v1.2/no_dot': b'-'}
  with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
    for name, data in files.items():
      source_files.add(tar, name, data)
  source = _open('webdataset', tmp_path, tmp_path)
  assert [source.name(i).partition('/')[2] for i in range(len(source))] == ['photo.1', 'a.b/www.site.com_7', 'whole', 'alone.2']
  assert [(source[i].image, source[i].captions) for i in range(3)] == [(b'1', ('one',)), (b'2', ('two',)), (b'3', ('three',))]
  with pytest.raises(BadRecord, match='there is no caption'):
    source[3]
  assert capsys.readouterr().err.endswith("of a sample: 3 '.*', 2 '', 1 '.npy', 1 '.mask.png'\n")


def test_what_tars_hold_beside_samples_is_named_once(tmp_path, capsys):
  # A set of .avif and .caption files was an empty one, and nothing said why.
  for number in range(2):
    with tarfile.open(tmp_path / f'{number}.tar', 'w') as tar:
      for name in ('0.AVIF', '0.caption', '1.avif', *(f'2.{kind}' for kind in 'abcde'[:4 + number])):
        source_files.add(tar, name, b'-')
  assert [len(_open('webdataset', tmp_path, tmp_path)) for _ in range(2)] == [0, 0]
  said = f'{tmp_path}: left aside, as neither images (jpg, jpeg, png, webp, gif, bmp, tif, tiff) nor captions (txt, json) of a '
  assert capsys.readouterr().err == said + "sample: 4 '.avif', 2 '.caption', 2 '.a', 2 '.b', 2 '.c', ...\n"


def test_what_is_wrong_with_tables(tmp_path):
  (tmp_path / 'a.jpg').write_bytes(source_files.jpeg(1))
  os.mkfifo(tmp_path / 'pipe.jpg')
  (tmp_path / 'x.csv').write_bytes(b'filepath,title,more\r\na.jpg,"two\r\nlines",1\r\na.jpg\r\nb.jpg,lost,1\r\n'
                                   b'pipe.jpg,never opened,1\r\n\x00,zero,1\r\n,no path,1\r\na.jpg,"open quote,1\r\n')
  source = _open('csv', tmp_path / 'x.csv', tmp_path)
  assert source[0].captions == ('two\r\nlines',)
  assert _reasons(source) == ['good', 'damaged', 'missing', 'missing', 'missing', 'missing', 'damaged']
  (tmp_path / 'x.jsonl').write_bytes(b'{"filepath": "a.jpg", "title": ["x", null, "y"]}\n[]\n{\n\n'
                                     b'{"filepath": 3, "title": "x"}\n'
                                     b'{"filepath": "a.jpg", "title": "\\ud800"}\n{"filepath": "a.jpg", "title": 7}\n'
                                     + b'[' * 100_000)
  assert _open('jsonl', tmp_path / 'x.jsonl', tmp_path)[0].captions == ('x', 'y')
  assert _reasons(_open('jsonl', tmp_path / 'x.jsonl', tmp_path)) == [
      'good', 'damaged', 'damaged', 'missing', 'bad_caption', 'bad_caption', 'damaged']


def test_json_lines_that_are_blank_and_values_that_are_null(tmp_path):
  # Blank lines were damaged records, and a null hid the caption or the path under the next name.
  (tmp_path / 'a.jpg').write_bytes(source_files.jpeg(1))
  rows = [b'', b'{"filepath": "a.jpg", "title": "one"}', b' \t\r', b'',
          b'{"filepath": null, "image": "a.jpg", "title": null, "text": "two"}', b'{"filepath": "a.jpg", "title": null}',
          b'', b' ']
  assert _rows(tmp_path / 'x.jsonl', tmp_path, b'\n'.join(rows)) == ['one', 'two', 'no_caption']
  assert captions.of_json(b'{"caption": null, "text": "real"}') == ('real',)


def test_a_caption_ends_where_a_line_of_a_file_does():
  # 'red\u2028apple' was two captions, "red" and "apple".
  whole = ('red\u2028apple', 'one\x85two', 'three\x0bfour', 'five\x1csix\u2029seven\x0ceight')
  assert captions.of_lines('\ufeff{}\r\n{}\n\n{}\r{}\n'.format(*whole).encode()) == whole


@pytest.mark.parametrize(('value', 'said'), [(7, 'int 7'), ([{'raw': 'a'}], "dict {'raw': 'a'}"), (['a', 0.5], 'float 0.5')])
def test_captions_of_another_type_are_called_by_it(value, said):
  with pytest.raises(BadRecord) as error:
    captions.of_value(value)
  assert str(error.value) == f'the caption is not UTF-8 text, or no text but a number or an object ({said})'


def _rows(path, tmp_path, text):
  """Caption or reason of each row of a table."""
  path.write_bytes(text)
  source = _open(path.suffix[1:], path, tmp_path)
  return [source[i].captions[0] if what == 'good' else what for i, what in enumerate(_reasons(source))]


def test_stray_quotes_of_a_tsv_are_letters(tmp_path):
  # One at the start of a caption took in all rows up to the next one.
  (tmp_path / 'a.jpg').write_bytes(source_files.jpeg(1))
  head = b'filepath\ttitle\n'
  rows = [b'"hello world', b'foo', b'bar 5"', b'"Best" day ever', b'a "b" c', b'"quoted ""well"""',
          b'"two\nlines\n\n""four"""', b'""']
  said = ['"hello world', 'foo', 'bar 5"', '"Best" day ever', 'a "b" c', 'quoted "well"', 'two\nlines\n\n"four"', 'no_caption']
  for line_end in (b'\n', b'\r\n', b'\n\n'):
    assert _rows(tmp_path / 'x.tsv', tmp_path, line_end + head + line_end.join(b'a.jpg\t' + row for row in rows)) == said
  assert _rows(tmp_path / 'x.tsv', tmp_path, head + b'a.jpg\tone\na.jpg\t"never\nclosed\n\n') == ['one', 'damaged']
  assert _rows(tmp_path / 'x.tsv', tmp_path, head + b'a.jpg\tone\ttwo\na.jpg\na.jpg\tb\n') == ['damaged', 'damaged', 'b']


def test_rows_of_another_number_of_columns_are_damaged(tmp_path):
  # A caption with a comma that is not quoted was cut off there.
  (tmp_path / 'a.jpg').write_bytes(source_files.jpeg(1))
  rows = b'a.jpg,"a cat, asleep"\na.jpg,a cat, asleep\n\na.jpg,a cat\na.jpg,a\ra.jpg,b\n'
  assert _rows(tmp_path / 'x.csv', tmp_path, b'filepath,title\n' + rows) == ['a cat, asleep', 'damaged', 'a cat', 'damaged']
  with pytest.raises(BadRecord, match='3 columns, the header has 2'):
    _open('csv', tmp_path / 'x.csv', tmp_path)[1]


@pytest.mark.parametrize('text', [b'filepath,title\ra.jpg,a\r', b'filepath\ttitle\ra.jpg\ta\r'])
def test_lines_that_end_with_cr_alone_are_one_line(tmp_path, text):
  # They were a header alone, of a table without records.
  with pytest.raises(UserError, match='^the lines of .*x.csv. end with CR alone, as on old Macs; save it with LF or CRLF$'):
    _rows(tmp_path / 'x.csv', tmp_path, text)


@pytest.mark.parametrize('kind', fuzz.FORMATS)
def test_mutated_files_are_clean_skips_or_one_line(kind):
  counts = fuzz.run(kind, 60, seed=1)
  assert counts['inputs'] == 60 and counts['good'] >= 3 and len(counts) >= 4   # some survive, and several reasons are met


def test_fuzzing_would_see_a_file_outside_and_an_error(monkeypatch):
  monkeypatch.setattr(sources.table.Folder, '_inside', lambda self, name: os.path.join(self._root, name))
  with pytest.raises(BaseException, match=r"opened \['/.*'\]"):
    fuzz.run('csv', 400, seed=1)
  monkeypatch.setattr(sources.webdataset, '_is_header', lambda header: True)
  monkeypatch.setattr(sources.webdataset, '_number', lambda field: int(field.strip(b' \0') or b'0', 8))
  with pytest.raises(ValueError, match='invalid literal'):
    fuzz.run('webdataset', 400, seed=1)
