"""`prepare` of other formats: what is kept, what is left out and counted, and that it goes on where it was stopped."""
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import time

import numpy as np
import PIL.Image
import pytest
import source_files

from lightclip_jax import prepare
from lightclip_jax.data import captions, convert, datasets, manifest, pipeline, sources, teacher, tokenizers, transforms, writer
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.records import Record
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.session import Session


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LIGHTCLIP_DATA', str(tmp_path / 'cache'))
  monkeypatch.setattr(writer, 'RECORDS_PER_SHARD', 8)
  (tmp_path / 'in').mkdir()


def _rows():
  rows = [(key, image, f'a  thing &amp;amp; {key}\u0007') for key, image, _ in source_files.pairs(20)]
  return [*rows, ('copy', rows[3][1], 'a copy'), ('broken', rows[4][1][:300], 'broken'), ('silent', rows[5][1], ' ')]


def _prepare(tmp_path, *flags, kind='webdataset', out='out'):
  path = source_files.WRITERS[kind](tmp_path / 'in', _rows()).partition(':')[2]
  prepare.main(prepare.parse([kind, path, f'--out={tmp_path / out}', '--vocab_size=80', *flags]))
  return tmp_path / out


def test_what_was_let_through_is_evaluated_and_seen_by_a_teacher(tmp_path, monkeypatch):
  # Pictures of more than 67 million pixels were mistakes, and ended `prepare teacher`, whatever --max_pixels had been.
  out = _prepare(tmp_path, '--holdout_every=4', '--processes=1', '--max_pixels=30000')
  monkeypatch.setattr(transforms, 'MAX_PIXELS', 100)
  encoders = [lambda rows: np.ones((len(rows), 3))] * 2
  teacher.write(out, 'tutor', encoders, lambda parts, total: parts)
  session = Session(None, out, max_pixels=100)
  assert session.part('heldout').read(0).size > 300
  twice = datasets.resolve(f'{out} + {out}', prepare.configs.Data())   # and is so as the first part of a mixture
  assert all(record.image != transforms.BLACK for record in Session(None, twice, max_pixels=100).records('heldout'))
  dataclasses.replace(manifest.load(out), asked={}).save(out)   # as others make it
  for limit, black in ((30000, False), (100, True)):
    records = Session(None, out, max_pixels=limit).records('heldout')
    assert all((record.image == transforms.BLACK) == black for record in records)
  with pytest.raises(UserError, match='the image has more pixels than'):
    teacher.write(out, 'tutor', encoders, lambda parts, total: parts)


def test_records_of_a_set_that_has_none_to_evaluate_are_held_out_when_it_is_trained_on(tmp_path, capsys):
  out = _prepare(tmp_path, '--processes=1')
  said = capsys.readouterr().out.splitlines()[-1]
  assert "--config.data.holdout_every=10 '--config.evaluation.splits=(\"heldout\",)'" in said
  splits = manifest.load(datasets.resolve(str(out), prepare.configs.Data(holdout_every=10))).splits
  assert (splits['train'].count, splits['heldout'].count) == (18, 2) and manifest.load(out).splits['train'].count == 20
  with pytest.raises(UserError, match='data.holdout_every is 10, but .*other. has held-out splits already; leave it at 0'):
    datasets.resolve(str(_prepare(tmp_path, '--processes=1', '--holdout_every=4', out='other')),
                     prepare.configs.Data(holdout_every=10))


def test_the_home_folder_is_not_a_folder_named_tilde(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert prepare.parse(['shapes', '--out=~/x']).out == tmp_path / 'x'
  assert prepare.parse(['teacher', '--model=~/m', '--data=x']).model == tmp_path / 'm'
  with pytest.raises(SystemExit):
    prepare.parse(['shapes', '--out=gs://bucket/x'])
  assert "'gs://bucket/x' is in a bucket; this needs a folder on a disk" in capsys.readouterr().err


def test_what_is_kept_and_what_is_counted(tmp_path, capsys):
  out = _prepare(tmp_path, '--holdout_every=4', '--size=16', '--processes=1')
  made = manifest.load(out)
  assert sum(split.count for split in made.splits.values()) == 20 and made.splits['heldout'].count >= 5
  records = [r for split in made.splits for r in pipeline.evaluation_records(out, split)]
  assert {r.captions[0] for r in records} >= {f'a thing & {i:04d}' for i in range(20) if i != 3}
  assert {min(transforms.decode(r.image).shape[:2]) for r in records} == {16}
  said = capsys.readouterr().out
  for line in ('1 truncated', '1 no_caption', '1 duplicate (another record has the same key or image)'):
    assert line in said and line in (out / 'summary.txt').read_text()
  words = pipeline.load_tokenizer(out).vocab_size   # 80 were asked for
  assert words < 80
  assert said.endswith(f"\ntrain with --config.data.dataset={out} --config.model.text.vocab_size={words} "
                       "'--config.evaluation.splits=(\"heldout\",)'\n")
  assert transforms.decode((out / 'contact_sheet.jpg').read_bytes()).shape == (768, 768, 3)
  assert sorted(file.suffix for file in out.iterdir()) == sorted(
      ['.json', '.model', '.txt', '.jpg', *['.array_record'] * sum(len(s.shards) for s in made.splits.values())])
  options = dataclasses.replace(prepare.configs.Data(), workers=0)
  next(batches := pipeline.train_batches(out, options, image_size=8, context=8, batch_size=4, seed=0))
  batches.close()


def test_a_picture_that_is_too_long_for_a_jpeg_stays_as_it_is(tmp_path):
  # It ended the preparation with a traceback, at every start anew.
  rows = [(f'{width}', io.BytesIO(), f'{width} wide') for width in (90_000, 70_000)]
  for width, file, _ in rows:
    PIL.Image.new('RGB', (int(width), 30), (int(width) % 256, 0, 0)).save(file, 'PNG')
  rows = [(key, file.getvalue(), text) for key, file, text in rows]
  path = source_files.write_tars(tmp_path / 'in', [*rows, *source_files.pairs(3)]).partition(':')[2]
  flags = [f'--out={tmp_path / "out"}', '--size=24', '--vocab_size=64', '--processes=1']
  prepare.main(prepare.parse(['webdataset', path, *flags]))
  images = {record.captions[0]: record.image for record in pipeline.evaluation_records(tmp_path / 'out', 'train')}
  assert len(images) == 5 and images['90000 wide'] == rows[0][1]
  assert transforms.image_shape(images['70000 wide']) == (24, 56_000)


@pytest.mark.parametrize('old', [False, True])
def test_a_folder_that_was_prepared_otherwise_is_said(tmp_path, capsys, old):
  out = _prepare(tmp_path, '--processes=1', '--size=16', '--holdout_every=4')
  if old:   # a manifest of a version that did not remember
    values = json.loads((out / 'manifest.json').read_text())
    del values['asked']
    (out / 'manifest.json').write_text(json.dumps(values))
  before, said = (out / 'manifest.json').read_bytes(), capsys.readouterr().out
  same = ['webdataset', str(tmp_path / 'in'), f'--out={out}', '--vocab_size=80', '--size=16', '--holdout_every=4']
  (tmp_path / 'in').rename(tmp_path / 'gone')   # the source is not needed any more
  prepare.main(prepare.parse([*same, '--processes=2']))
  assert capsys.readouterr().out == said
  errors = {'--size=8': r'size=16 \(not 8\)', '--holdout_every=0': r"holdout_every=(4|'\?') \(not 0\)"}
  if not old:
    errors |= {'--quality=80': r'quality=90 \(not 80\)', '--caption_column=x': r"caption_column='' \(not 'x'\)"}
  for flag, error in errors.items():
    with pytest.raises(UserError, match=f'{error}; delete it or give another --out'):
      prepare.main(prepare.parse([*same, flag]))
  with pytest.raises(UserError, match=f"'{out}' holds 'webdataset:.*/in'.*/other"):
    prepare.main(prepare.parse([same[0], str(tmp_path / 'other'), *same[2:]]))
  assert (out / 'manifest.json').read_bytes() == before


@pytest.mark.parametrize('old', [False, True])
def test_a_source_that_has_changed_since_is_said(tmp_path, capsys, old):
  path = source_files.write_folder(tmp_path / 'in', source_files.pairs(5)).partition(':')[2]
  command = prepare.parse(['folder', path, f'--out={tmp_path / "out"}', '--vocab_size=64', '--processes=1'])
  prepare.main(command)
  said = capsys.readouterr().out
  prepare.main(command)
  assert capsys.readouterr().out == said
  if old:   # a manifest of a version that did not remember
    values = json.loads((tmp_path / 'out/manifest.json').read_text())
    del values['asked']['fingerprint']
    (tmp_path / 'out/manifest.json').write_text(json.dumps(values))
  (tmp_path / 'in/images/new.jpg').write_bytes(source_files.jpeg(9))
  with contextlib.nullcontext() if old else pytest.raises(UserError, match="out' was prepared before 'folder:.*in' changed"):
    prepare.main(command)


def test_several_processes_make_the_same_files(tmp_path):
  one, two = _prepare(tmp_path, '--processes=1'), None
  (tmp_path / 'in').rename(tmp_path / 'before')
  (tmp_path / 'in').mkdir()
  two = _prepare(tmp_path, '--processes=2', out='two')
  assert manifest.load(one).sha256 == manifest.load(two).sha256


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch):
  real, made = convert._part, []

  def stops(source, folder, options, item):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append(item)
    return real(source, folder, options, item)

  monkeypatch.setattr(convert, '_part', stops)
  with pytest.raises(KeyboardInterrupt):
    _prepare(tmp_path, '--processes=1')
  assert not (tmp_path / 'out').exists()
  again = []
  monkeypatch.setattr(convert, '_part', lambda *args: again.append(args[-1]) or real(*args))
  (tmp_path / 'in').rename(tmp_path / 'kept')
  (tmp_path / 'in').mkdir()
  for file in (tmp_path / 'kept').iterdir():
    file.rename(tmp_path / 'in' / file.name)
  prepare.main(prepare.parse(['webdataset', str(tmp_path / 'in'), f'--out={tmp_path / "out"}', '--vocab_size=80',
                              '--processes=1']))
  assert len(again) == 1 and again[0] not in made and manifest.load(tmp_path / 'out').splits['train'].count == 20


def test_a_process_that_is_killed_is_one_line():
  with pytest.raises(UserError, match='a process that prepares was killed.*; start the same command again'):
    list(convert._each(os._exit, [1, 1], 2))


def test_a_stop_does_not_wait_for_the_parts():
  parts = convert._each(time.sleep, [0, 600, 600, 600], 2)   # it waited for those that had begun
  next(parts)
  with pytest.raises(KeyboardInterrupt):
    parts.throw(KeyboardInterrupt)
  assert not multiprocessing.active_children()


def test_a_full_disk_is_one_line(tmp_path):
  rows = [(key, source_files.jpeg(i, (500, 500)), text) for i, (key, _, text) in enumerate(source_files.pairs(20))]
  path = source_files.write_tars(tmp_path / 'in', rows).partition(':')[2]
  command = prepare.parse(['webdataset', path, f'--out={tmp_path / "out"}', '--vocab_size=80', '--processes=1'])
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
  try:
    with pytest.raises(UserError, match=f"^cannot write '{tmp_path}/out': File too large$"):
      prepare.main(command)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  prepare.main(command)
  assert manifest.load(tmp_path / 'out').splits['train'].count == 20


@pytest.mark.parametrize('kind', ['folder', 'webdataset'])
def test_a_name_that_is_not_utf8(tmp_path, kind):
  rows = [('\udcff' + key, *rest) for key, *rest in source_files.pairs(3)]
  name = source_files.WRITERS[kind](tmp_path / 'in', rows)
  source = sources.open_parts(datasets.about(name, prepare.configs.Data()), 'train')
  assert all(source[i].key.encode() for i in range(3))   # the report orders pictures by a hash of it
  prepare.main(prepare.parse([kind, name.partition(':')[2], f'--out={tmp_path / "out"}', '--vocab_size=80', '--processes=1']))
  records = pipeline.evaluation_records(tmp_path / 'out', 'train')
  assert sorted(record.image for record in records) == sorted(image for _, image, _ in rows)
  assert all(r'\udcff' in record.key for record in records)


def test_a_mistake_in_the_tokenizer_costs_no_work(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(convert, '_part', lambda *args, real=convert._part: made.append(args[-1]) or real(*args))
  rows = [(key, image, f'{text} {chr(0x4e00 + number)}') for number, (key, image, text) in enumerate(source_files.pairs(80))]
  path = source_files.write_tars(tmp_path / 'in', rows).partition(':')[2]
  command = ['webdataset', path, f'--out={tmp_path / "out"}', '--processes=1']
  for wrong, said, parts in ((f'--tokenizer={tmp_path / "nix.model"}', 'no tokenizer file', 0),
                             ('--vocab_size=64', 'cannot train a tokenizer of 64 pieces', 10)):
    with pytest.raises(UserError, match=said):
      prepare.main(prepare.parse([*command, wrong]))
    assert len(made) == parts
  prepare.main(prepare.parse([*command, '--vocab_size=200']))
  assert len(made) == 10 and manifest.load(tmp_path / 'out').asked['vocab_size'] == 200


def test_the_tokenizer_learns_from_all_over_a_part(tmp_path, monkeypatch):
  # Classes lie in order in many folders, and the last ones were words that the tokenizer did not know.
  monkeypatch.setattr(writer, 'RECORDS_PER_SHARD', 40)
  monkeypatch.setattr(convert, '_SAMPLE_A_PART', 8)
  rows = [(key, image, f'cat {i}\n{"abcdЖ"[i // 8]}') for i, (key, image, _) in enumerate(source_files.pairs(40))]
  learnt = []
  monkeypatch.setattr(tokenizers, 'train', lambda texts, size, real=tokenizers.train: learnt.extend(texts) or real(texts, size))
  path = source_files.write_folder(tmp_path / 'in', rows).partition(':')[2]
  prepare.main(prepare.parse(['folder', path, f'--out={tmp_path / "out"}', '--vocab_size=80', '--processes=1']))
  assert learnt == [text for i in range(0, 40, 5) for text in rows[i][2].split('\n')]


@pytest.mark.parametrize('tokenizer', [False, True])
def test_nothing_to_train_on_is_said_and_looked_at_anew(tmp_path, tokenizer):
  # The fingerprint of a folder is its images' names, so captions that are put there later do not change it.
  source_files.write_folder(tmp_path / 'in', source_files.pairs(3))
  made = tokenizers.train([f'a thing {i}' for i in range(9)], 80)
  (tmp_path / 't.model').write_bytes(made.to_bytes())
  command = prepare.parse(['folder', str(tmp_path / 'in'), f'--out={tmp_path / "out"}', '--vocab_size=80', '--processes=1',
                           *[f'--tokenizer={tmp_path / "t.model"}'] * tokenizer])
  texts = {file: file.read_text() for file in (tmp_path / 'in').rglob('*.txt')}
  for file in texts:
    file.unlink()
  with pytest.raises(UserError, match=r"no record of 'folder:.*3 no_caption \(there is no caption\)$"):
    prepare.main(command)
  for file, text in texts.items():
    file.write_text(text)
  prepare.main(command)
  assert manifest.load(tmp_path / 'out').splits['train'].count == 3


def test_killed_between_a_shortened_shard_and_its_note(tmp_path, monkeypatch):
  real, shortened = convert._write_whole, []

  def killed(file, text):
    if 'duplicate' in json.loads(text)['left_out']:
      shortened.append(file)
      raise KeyboardInterrupt
    real(file, text)

  rows = source_files.pairs(20)
  rows[10] = ('copy', rows[3][1], 'a copy')   # others come after it in its shard
  path = source_files.write_tars(tmp_path / 'in', rows, shards=1).partition(':')[2]
  start = prepare.parse(['webdataset', path, f'--out={tmp_path / "out"}', '--vocab_size=80', '--processes=1'])
  monkeypatch.setattr(convert, '_write_whole', killed)
  with pytest.raises(KeyboardInterrupt):
    prepare.main(start)
  assert shortened
  monkeypatch.setattr(convert, '_write_whole', real)
  prepare.main(start)
  assert manifest.load(tmp_path / 'out').splits['train'].count == 19
  records = pipeline.evaluation_records(tmp_path / 'out', 'train')
  assert {record.image for record in records} == {image for _, image, _ in rows}


@pytest.mark.parametrize('how', ['exact', 'similar'])
def test_a_record_takes_over_the_captions_of_its_copies(tmp_path, monkeypatch, how):
  # COCO's tables have five rows an image; four of five captions were lost. A part ends in the midst of an image.
  monkeypatch.setattr(convert, '_MOST_CAPTIONS', 3)
  rows = [(f'{i // 5}', source_files.jpeg(i // 5), f'caption {i % 4} of {i // 5}') for i in range(20)]
  path = source_files.write_table(tmp_path / 'in', rows, 'csv').partition(':')[2]
  command = prepare.parse(['csv', path, f'--out={tmp_path / "out"}', '--vocab_size=64', '--processes=1', f'--duplicates={how}'])
  real, notes = convert._write_whole, []
  for deadly in (4, 2, 1):   # killed between a part's new shard and its note
    def killed(file, text, deadly=deadly):
      notes.append(file)
      if len(notes) == deadly:
        raise KeyboardInterrupt
      real(file, text)

    notes.clear()
    monkeypatch.setattr(convert, '_write_whole', killed)
    with pytest.raises(KeyboardInterrupt):
      prepare.main(command)
  monkeypatch.setattr(convert, '_write_whole', real)
  prepare.main(command)
  records = pipeline.evaluation_records(tmp_path / 'out', 'train')
  first = [5 * i for i in range(4)]
  assert [record.captions for record in records] == [tuple(rows[i + j][2] for j in range(3)) for i in first]
  assert '16 duplicate' in (tmp_path / 'out/summary.txt').read_text()


def test_comparing_is_shown(tmp_path, capsys):
  # It took minutes, of millions of similar pictures hours, in silence.
  path = source_files.write_tars(tmp_path / 'in', source_files.pairs(4), shards=1).partition(':')[2]
  for how, shown in (('similar', True), ('exact', True), ('keep', False)):
    prepare.main(prepare.parse(['webdataset', path, f'--out={tmp_path / how}', '--vocab_size=64', f'--duplicates={how}']))
    said = capsys.readouterr().err
    assert all((f'{what}: 100%' in said) == shown for what in ('comparing', 'leaving out copies'))


def test_a_held_out_split_of_copies_alone_is_said(tmp_path):
  rows = [(f'{i}', source_files.jpeg(i // 2), f'caption {i}') for i in range(20)]
  path = source_files.write_tars(tmp_path / 'in', rows, shards=1).partition(':')[2]
  command = ['webdataset', path, f'--out={tmp_path / "out"}', '--vocab_size=64', '--processes=1']
  with pytest.raises(UserError, match=r"no record of 'webdataset:.*held out: 10 duplicate .*; give another --holdout_every"):
    prepare.main(prepare.parse([*command, '--holdout_every=2']))
  assert not (tmp_path / 'out').exists()
  prepare.main(prepare.parse([*command, '--holdout_every=20', '--duplicates=keep']))


def test_similar_pictures_keep_their_captions_to_themselves(tmp_path):
  image = transforms.decode(source_files.jpeg(1, (200, 150)))
  rows = [(str(quality), convert.simplejpeg.encode_jpeg(image, quality), f'quality {quality}') for quality in (95, 90)]
  path = source_files.write_table(tmp_path / 'in', rows, 'csv').partition(':')[2]
  prepare.main(prepare.parse(['csv', path, f'--out={tmp_path / "out"}', '--vocab_size=64', '--duplicates=similar']))
  assert [r.captions for r in pipeline.evaluation_records(tmp_path / 'out', 'train')] == [('quality 95',)]


@pytest.mark.parametrize('count', [3, 64, 70])
def test_the_contact_sheet_shows_each_picture_once(tmp_path, count):
  records = [Record(str(i), source_files.jpeg(i, (96, 96)), ('x',)) for i in range(count)]
  convert._contact_sheet(records, tmp_path / 'sheet.jpg', 96 * 96)
  sheet = transforms.decode((tmp_path / 'sheet.jpg').read_bytes())
  tiles = sheet.reshape(8, 96, 8, 96, 3).swapaxes(1, 2).reshape(64, -1).astype(np.int16)
  images = np.stack([transforms.decode(record.image).reshape(-1) for record in records]).astype(np.int16)
  shown = [int(np.abs(images - tile).mean(1).argmin()) for tile in tiles[:count]]
  assert len(set(shown)) == min(count, 64) and shown[0] == 0 and shown[-1] == count - 1
  assert (tiles[count:] == 255).all()


def test_the_contact_sheet_is_made_with_the_limit_of_pixels_that_was_asked_for(tmp_path, monkeypatch):
  real = transforms.decode
  monkeypatch.setattr(transforms, 'decode', lambda data, max_pixels=100: real(data, max_pixels))
  out = _prepare(tmp_path, '--processes=1', '--max_pixels=2000')
  assert real((out / 'contact_sheet.jpg').read_bytes()).shape == (768, 768, 3)


def test_the_notes_stay_until_the_contact_sheet_is_made(tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(convert, '_contact_sheet', killed)
  with pytest.raises(KeyboardInterrupt):
    _prepare(tmp_path, '--processes=1')
  left = {file.name for file in (tmp_path / '.out.partial').iterdir()}
  assert left >= {'plan.json', *(f'train-0000{i}.array_record.note.json' for i in range(3))}


def test_similar_pictures_are_one():
  image = transforms.decode(source_files.jpeg(1, (200, 150)))
  other = transforms.decode(source_files.jpeg(2, (200, 150)))
  small = transforms.decode(source_files.jpeg(1, (100, 75)))
  seen = convert.Seen()
  assert [seen.add(convert.difference_hash(i)) for i in (image, other, small, image)] == [True, True, False, False]
  white, black = (np.full((9, 9, 3), value, np.uint8) for value in (255, 0))
  assert [seen.add(convert.difference_hash(i)) for i in (white, black, white)] == [True, True, False]


@pytest.mark.parametrize('bits', [3, 4])
def test_seen_tells_three_bits_from_four(bits):
  random = np.random.default_rng(0)
  for _ in range(100):
    value, flips = int(random.integers(1 << 62)), random.choice(62, bits, replace=False)
    seen = convert.Seen()
    assert seen.add(f'{value:016x}')
    assert seen.add(f'{value ^ sum(1 << int(bit) for bit in flips):016x}') == (bits == 4)


def test_seen_is_exact_and_quick_where_all_share_a_band():
  # Ten thousand pictures with a white top took 8 s, and a hundred times as long where they were ten times as many.
  random = np.random.default_rng(0)
  numbers = random.integers(1 << 16, size=300) << random.choice(48, size=300)
  kept = []
  for number in map(int, numbers):
    if all((number ^ other).bit_count() > 3 for other in kept):
      kept.append(number)
  seen = convert.Seen()
  assert [int(n) for n in numbers if seen.add(f'{n:016x}')] == kept and 10 < len(kept) < 290
  start = time.process_time()
  seen = convert.Seen()
  assert sum(seen.add(f'{number:016x}') for number in random.integers(1 << 48, size=10_000)) > 9990
  assert time.process_time() - start < 3


def test_a_tokenizer_of_a_source(tmp_path, capsys):
  name = source_files.write_tars(tmp_path / 'in', _rows())
  prepare.main(prepare.parse(['tokenizer', name, f'--out={tmp_path / "t.model"}', '--vocab_size=80']))
  tokenizer = tokenizers.load(tmp_path / 't.model')
  assert f'vocab_size={tokenizer.vocab_size}' in capsys.readouterr().out
  assert tokenizer.decode(tokenizer.encode(['a thing & 0001'], 40)[0]) == 'a thing & 0001'
  with pytest.raises(UserError, match='ends with .model'):
    prepare.main(prepare.parse(['tokenizer', name, '--out=x']))


def test_a_tokenizer_needs_no_images_and_says_why_there_are_no_captions(tmp_path):
  # Rows whose images were not there yet gave 'a tokenizer needs captions to learn from; there are none', and no reason.
  (tmp_path / 'x.csv').write_text('filepath,title\na.jpg,a red apple\nb.jpg,\nc.jpg,&nbsp;\nd.jpg\n')
  command = prepare.parse(['tokenizer', f'csv:{tmp_path}/x.csv', f'--out={tmp_path / "t.model"}', '--vocab_size=64'])
  prepare.main(command)
  assert tokenizers.load(tmp_path / 't.model').vocab_size > 5
  for text, said in (('filepath,title\nb.jpg,\nc.jpg,&nbsp;\nd.jpg\n', '2 no_caption .there is no caption., 1 damaged .*'),
                     ('filepath,title\n', 'no record at all')):
    (tmp_path / 'x.csv').write_text(text)
    with pytest.raises(UserError, match=f'^a tokenizer needs captions to learn from; there are none: {said}$'):
      prepare.main(command)


@pytest.mark.parametrize(('value', 'said'), [(['a', None, ' '], ('a',)), ('  x ', ('x',)), (b'\xff', 'bad_caption'),
                                             (3, 'bad_caption'), ([], 'no_caption'), (None, 'no_caption')])
def test_captions_of_values(value, said):
  try:
    assert captions.of_value(value) == said
  except BadRecord as error:
    assert error.reason == said


def test_every_kind_of_source_can_be_prepared():
  assert set(sources.SOURCES) - {'array_record'} <= set(prepare.KINDS)
  assert json.dumps(sources.Spec('csv', 'x').json())
