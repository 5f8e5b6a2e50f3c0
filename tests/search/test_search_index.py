"""The index and its queries: exact, incremental, whole whatever happens, and one clear line for every mistake."""
import dataclasses
import errno
import io
import json
import os
import pathlib
import subprocess
import sys

import colour_export
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightclip_jax.data import transforms
from lightclip_jax import storage
from lightclip_jax.errors import UserError
from lightclip_jax.search import __main__ as command
from lightclip_jax.search import index, pictures, ranking, towers


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 40), st.sampled_from([3, 64, 513]))
def test_nearest_is_the_brute_force_ranking(seed, count, top, dim):
  rng = np.random.default_rng(seed)
  vectors = rng.normal(size=(count, dim)).astype(np.float32)
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  vectors[rng.integers(count, size=count // 2)] = vectors[0]   # ties
  rows, cosines = ranking.nearest(vectors, vectors[-1], top)
  expected = (vectors.astype(np.float64) * vectors[-1].astype(np.float64)).sum(axis=1)
  np.testing.assert_array_equal(rows, np.argsort(-expected, kind='stable')[:top])
  np.testing.assert_array_equal(cosines, expected[rows])


def test_nearest_over_several_chunks_and_nothing(monkeypatch):
  monkeypatch.setattr(ranking, '_CHUNK', 7)
  vectors = np.eye(20, dtype=np.float32)
  rows, cosines = ranking.nearest(vectors, vectors[16], 3)
  assert rows.tolist() == [16, 0, 1] and cosines.tolist() == [1, 0, 0]
  assert all(len(x) == 0 for x in ranking.nearest(vectors[:0], vectors[0], 3))


@pytest.fixture(scope='module')
def made(export_folder, tmp_path_factory):
  """Pictures of which two are bad, and their index."""
  folder = tmp_path_factory.mktemp('made')
  files = colour_export.pictures(folder / 'pictures', 80)
  (folder / 'pictures/2/cut.png').write_bytes(next(iter(files)).read_bytes()[:200])
  (folder / 'pictures/2/text.jpg').write_text('not a picture')
  (folder / 'pictures/.hidden').mkdir()
  for name in ('.hidden/a.png', '._a.png'):
    (folder / 'pictures' / name).write_bytes(next(iter(files)).read_bytes())
  (folder / 'pictures/notes.txt').write_text('no picture, by its name')
  result, embedded = index.update(folder / 'pictures', towers.Export(export_folder), folder / 'index', workers=2)
  assert embedded == 80
  return folder, files, result


def test_every_picture_is_there_with_its_embedding_and_bad_ones_are_named(made, export_folder):
  folder, files, result = made
  assert {folder / 'pictures' / path for path, _, _ in result.files} == set(files)
  assert sorted(pathlib.Path(path).name for path, _, _ in result.bad) == ['cut.png', 'text.jpg']
  assert all('cannot read the picture' in reason and '\n' not in reason for reason in result.bad.values())
  tower = towers.Export(export_folder).image_tower()
  for (path, _, _), vector in list(zip(result.files, result.vectors_NxD, strict=True))[::9]:
    image = transforms.evaluation_transform(np.asarray(PIL.Image.open(folder / 'pictures' / path).convert('RGB')), 32)
    np.testing.assert_allclose(vector, tower(image[None])[0], atol=1e-3)   # JPEG decoders differ by a little
  plain = np.load(next((folder / 'index').glob('*.npy')))
  np.testing.assert_array_equal(plain, result.vectors_NxD)


def test_words_and_pictures_find_their_colour(made, monkeypatch, capsys):
  folder, files, _ = made
  monkeypatch.setenv('HOME', str(folder))
  for colour in ('red', 'cyan', 'black'):
    command.main(['query', str(folder / 'index'), f'a {colour} picture', '--top=10', '--json'])
    answers = json.loads(capsys.readouterr().out)
    assert [files[pathlib.Path(answer['path'])] for answer in answers] == [colour] * 10
    assert answers == sorted(answers, key=lambda answer: -answer['cosine'])
  first = next(iter(files))
  command.main(['query', '~/index', f'--image=~/{first.relative_to(folder)}', '--top=2'])
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 and lines[0] == f'1.0000  {first}'


def test_only_what_is_new_or_changed_is_embedded(export_folder, tmp_path, monkeypatch, capsys):
  files = list(colour_export.pictures(tmp_path / 'pictures', 9))
  export, out = towers.Export(export_folder), tmp_path / 'index'
  (tmp_path / 'pictures/bad.png').write_bytes(b'no')
  seen = []

  def embed(folder, wanted, *_):
    seen.extend(path for path, _, _ in wanted)
    if wanted:
      yield ([file for file in wanted if file[0] != 'bad.png'],
             np.full((sum(file[0] != 'bad.png' for file in wanted), colour_export.DIM), len(seen), np.float32),
             {file: 'bad' for file in wanted if file[0] == 'bad.png'})
  monkeypatch.setattr(index, '_embed', embed)
  assert index.update(tmp_path / 'pictures', export, out)[1] == 9
  before = set(out.iterdir())
  assert index.update(tmp_path / 'pictures', export, out)[1] == 0 and set(out.iterdir()) == before
  assert len(seen) == 11   # the bad one was tried again, since its disk may have been away
  files[0].unlink()
  os.utime(files[1], ns=(1, 1))
  files[2].write_bytes(files[3].read_bytes())
  (tmp_path / 'pictures/bad.png').unlink()
  seen.clear()
  result, embedded = index.update(tmp_path / 'pictures', export, out)
  assert embedded == 2 and sorted(seen) == sorted(os.path.relpath(f, tmp_path / 'pictures') for f in files[1:3])
  assert len(result.files) == 8 and not result.bad and len(set(out.iterdir()) - before) == 1 == len(before - set(out.iterdir()))
  old = [row for row, (path, _, _) in enumerate(result.files) if path not in seen]
  assert (result.vectors_NxD[old] == 10).all() and (np.delete(result.vectors_NxD, old, axis=0) == 2).all()


def test_what_could_not_be_read_is_tried_again_and_a_hidden_folder_keeps_its_pictures(export_folder, tmp_path, monkeypatch):
  files = list(colour_export.pictures(tmp_path / 'pictures', 9))
  whole = files[0].read_bytes()
  files[0].write_bytes(b'no' * (len(whole) // 2) + b'o' * (len(whole) % 2))
  export, out, now = towers.Export(export_folder), tmp_path / 'index', files[0].stat().st_mtime_ns
  monkeypatch.setattr(index, '_start', lambda *_: None)   # in this process
  monkeypatch.setattr(index, '_worker', (tmp_path / 'pictures', 32, export.image_tower(), colour_export.DIM), raising=False)
  threads = lambda *_: index.concurrent.futures.ThreadPoolExecutor(1)  # noqa: E731
  monkeypatch.setattr(index.concurrent.futures, 'ProcessPoolExecutor', threads)
  assert len(index.update(tmp_path / 'pictures', export, out)[0].bad) == 1
  files[0].write_bytes(whole)
  os.utime(files[0], ns=(now, now))   # by size and time the same file, which can be read now
  result, embedded = index.update(tmp_path / 'pictures', export, out)
  assert embedded == 1 and len(result.files) == 9 and not result.bad

  def scandir(folder, scan=os.scandir):
    if os.path.basename(folder) == '1':
      raise PermissionError(errno.EACCES, 'Permission denied', folder)
    return scan(folder)
  monkeypatch.setattr(os, 'scandir', scandir)
  for _ in range(2):
    hidden, embedded = index.update(tmp_path / 'pictures', export, out)
    assert embedded == 0 and sorted(hidden.files) == sorted(result.files)
    assert [*hidden.bad.values()] == [f'cannot read the folder {str(tmp_path / "pictures/1")!r}: Permission denied']
  monkeypatch.undo()
  assert not index.update(tmp_path / 'pictures', export, out)[0].bad


def test_a_folder_has_one_name_however_it_is_given(export_folder, tmp_path, monkeypatch):
  colour_export.pictures(tmp_path / 'pictures', 9)
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  monkeypatch.setattr(index, '_embed', lambda folder, files, *_: [(files, np.ones((len(files), colour_export.DIM)), {})])
  export, out, whole = towers.Export(export_folder), tmp_path / 'index', tmp_path / 'pictures'
  made, embedded = index.update(pathlib.Path('../pictures'), export, out)
  assert embedded == 9 and made.nearest(np.ones(colour_export.DIM), 1)[0]['path'].startswith(f'{whole}{os.sep}')
  monkeypatch.setattr(index, '_embed', lambda folder, files, *_: [])
  about = json.loads((out / 'index.json').read_text())
  (out / 'index.json').write_text(json.dumps({**about, 'folder': str(tmp_path / 'here/../pictures')}))   # an older index
  for same in (whole, pathlib.Path('../here/../pictures/')):
    again, embedded = index.update(same, export, out)
    assert embedded == 0 and again.folder == str(whole) and len(again.files) == 9


def test_a_folder_beside_the_target_of_a_link_is_not_the_one_beside_the_link(export_folder, tmp_path):
  for name in ('pictures', 'elsewhere/pictures', 'elsewhere/target'):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere/target')
  made, _ = index.update(tmp_path / 'link/../pictures', towers.Export(export_folder), tmp_path / 'index')
  assert os.path.samefile(made.folder, tmp_path / 'elsewhere/pictures')
  assert index.update(tmp_path / 'link', towers.Export(export_folder), tmp_path / 'other')[0].folder == str(tmp_path / 'link')


def test_one_run_at_a_time(export_folder, tmp_path):
  (tmp_path / 'pictures').mkdir()
  export, out = towers.Export(export_folder), tmp_path / 'index'
  with storage.alone(out, 'indexes into', '--out'), pytest.raises(
      UserError, match="another process indexes into '.*index'; wait for it, stop it, or use another --out"):
    index.update(tmp_path / 'pictures', export, out)
  index.update(tmp_path / 'pictures', export, out)
  next(out.glob('*.npy')).unlink()
  with pytest.raises(UserError, match='is damaged .*No such file.*; delete it and index again'):
    index.update(tmp_path / 'pictures', export, out)


def test_an_interrupted_run_keeps_what_it_had(export_folder, tmp_path, monkeypatch):
  colour_export.pictures(tmp_path / 'pictures', 9)
  export, out = towers.Export(export_folder), tmp_path / 'index'
  stop = True

  def embed(folder, wanted, *_):
    yield wanted[:4], np.zeros((4, colour_export.DIM), np.float32), {}
    if stop:
      raise KeyboardInterrupt
    yield wanted[4:], np.ones((len(wanted) - 4, colour_export.DIM), np.float32), {}
  monkeypatch.setattr(index, '_embed', embed)
  with pytest.raises(KeyboardInterrupt):
    index.update(tmp_path / 'pictures', export, out)
  assert len(index.load(out).files) == 4
  stop = False
  result, embedded = index.update(tmp_path / 'pictures', export, out)
  assert embedded == 5 and len(result.files) == 9 and result.vectors_NxD.shape == (9, colour_export.DIM)
  (out / 'index.json').unlink()   # killed before the first save
  assert index.update(tmp_path / 'pictures', export, out)[1] == 9


def _ones(folder, files, *_):
  """Instead of a model."""
  return [(files, np.ones((len(files), colour_export.DIM), np.float32), {})] if files else []


def _interrupt(*_):
  raise KeyboardInterrupt


def test_an_update_that_ends_before_it_has_the_old_rows_leaves_the_index_as_it_was(export_folder, tmp_path, monkeypatch):
  class Rows:
    def __getitem__(self, rows):
      if 4 in rows:
        raise KeyboardInterrupt
      return np.ones((len(rows), colour_export.DIM), np.float32)
  files = list(colour_export.pictures(tmp_path / 'pictures', 9))
  export, out = towers.Export(export_folder), tmp_path / 'index'
  monkeypatch.setattr(index, '_embed', _ones)
  index.update(tmp_path / 'pictures', export, out)
  before = {file: file.read_bytes() for file in out.iterdir()}
  files[0].write_bytes(files[3].read_bytes())
  monkeypatch.setattr(index, '_COPIED', 2)
  monkeypatch.setattr(index, '_SAVE_SECONDS', -1)
  with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
    interrupted.setattr(index, '_earlier', lambda *_: dataclasses.replace(index.load(out), vectors_NxD=Rows()))
    index.update(tmp_path / 'pictures', export, out)
  assert {file: file.read_bytes() for file in out.iterdir()} == before
  result, embedded = index.update(tmp_path / 'pictures', export, out)
  assert embedded == 1 and len(result.files) == 9 == len(result.vectors_NxD)


@pytest.mark.parametrize('again', [False, True])
def test_what_a_full_disk_leaves_is_removed_by_the_next_run(export_folder, tmp_path, monkeypatch, again):
  files = list(colour_export.pictures(tmp_path / 'pictures', 9))
  export, out = towers.Export(export_folder), tmp_path / 'index'
  monkeypatch.setattr(index, '_embed', _ones)
  if again:
    index.update(tmp_path / 'pictures', export, out)
    files.pop().unlink()
  before = {*out.glob('*')}

  def full(path, text):
    path.with_name(f'{path.name}.tmp').write_text(text[:10])
    raise OSError(errno.ENOSPC, 'No space left on device')
  with monkeypatch.context() as disk, pytest.raises(OSError, match='No space'):
    disk.setattr(storage, '_write_text', full)
    index.update(tmp_path / 'pictures', export, out)
  assert len({*out.iterdir()} - before) == 2
  with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
    interrupted.setattr(index._Writer, '__enter__', _interrupt)   # they are gone before room is needed
    index.update(tmp_path / 'pictures', export, out)
  assert {*out.iterdir()} == before
  result, embedded = index.update(tmp_path / 'pictures', export, out)
  assert len(result.files) == len(files) and embedded == (0 if again else 9)
  assert {file.name for file in out.iterdir()} == {'index.json', result.embeddings}


def test_an_index_that_is_replaced_while_it_is_opened_is_the_new_one(export_folder, tmp_path, monkeypatch):
  files = list(colour_export.pictures(tmp_path / 'pictures', 9))
  export, out, read = towers.Export(export_folder), tmp_path / 'index', np.load
  monkeypatch.setattr(index, '_embed', _ones)
  index.update(tmp_path / 'pictures', export, out)

  def late(file, **kwargs):
    monkeypatch.setattr(np, 'load', read)
    files[0].unlink()
    index.update(tmp_path / 'pictures', export, out)
    assert not file.exists()
    return read(file, **kwargs)
  monkeypatch.setattr(np, 'load', late)
  result = index.load(out)
  assert len(result.files) == 8 == len(result.vectors_NxD) and not files[0].exists()


def test_a_part_that_is_half_written_is_not_in_the_index(export_folder, tmp_path, monkeypatch):
  class Half(io.BufferedWriter):
    def write(self, data):
      super().write(data[:len(data) // 2] if len(data) == 20 * colour_export.DIM else data)
      if len(data) == 20 * colour_export.DIM:
        raise KeyboardInterrupt

  def opened(path, mode='r', *args, **kwargs):
    return Half(io.FileIO(path, 'w')) if mode == 'wb' else io.open(path, mode, *args, **kwargs)
  colour_export.pictures(tmp_path / 'pictures', 9)
  export, out = towers.Export(export_folder), tmp_path / 'index'
  monkeypatch.setattr(index, '_embed', lambda _, files, *__: [*_ones(_, files[:4]), *_ones(_, files[4:])])
  with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
    interrupted.setattr(pathlib.Path, 'open', opened)
    index.update(tmp_path / 'pictures', export, out)
  [file] = out.glob('*.npy')
  assert len(index.load(out).files) == 4 == len(np.load(file)) and file.stat().st_size == 128 + 16 * colour_export.DIM
  result, embedded = index.update(tmp_path / 'pictures', export, out)
  assert embedded == 5 and (result.vectors_NxD == 1).all() and len(result.files) == 9


def test_photographs_of_an_iphone_are_counted_as_left_out(export_folder, tmp_path, monkeypatch, capsys):
  colour_export.pictures(tmp_path / 'pictures', 3)
  monkeypatch.setattr(index, '_embed', _ones)
  run = ['index', str(tmp_path / 'pictures'), f'--model={export_folder}', f'--out={tmp_path / "index"}']
  command.main(run)
  whole = f'{tmp_path / "index"}: 3 pictures, 3 of them embedded now; 0 could not be read'
  assert capsys.readouterr().out == f'{whole}\n'
  (tmp_path / 'pictures/.hidden').mkdir()
  for name in ('IMG_1.HEIC', '1/b.heif', '2/c.heic', '2/._c.heic', '.hidden/d.heic'):
    (tmp_path / 'pictures' / name).touch()
  command.main(run)
  others = 'left out: 3 .heic or .heif, which must be converted first (to JPEG, for example)'
  assert capsys.readouterr() == (f'{whole.replace(" 3 of", " 0 of")}; {others}\n', '')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
  upright = np.zeros((64, 48, 3), np.uint8)
  upright[:32, :24], upright[32:, 24:] = (255, 0, 0), (0, 0, 255)
  turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
           6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  stored = PIL.Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
  stored.save(tmp_path / 'a.jpg', exif=exif, quality=98, subsampling=0)
  got = pictures.read(tmp_path / 'a.jpg', 16).astype(int)
  assert np.abs(got - transforms.evaluation_transform(upright, 16)).max() < 12


def test_mistakes_are_one_clear_line(made, export_folder, tmp_path):
  folder, files, _ = made
  built = str(folder / 'index')
  other = colour_export.write(tmp_path / 'other', tokens=False)
  (other / 'text.onnx').write_bytes((other / 'text.onnx').read_bytes() + b'\0')
  outside = colour_export.write(tmp_path / 'outside')
  (outside / 'model.json').write_text((outside / 'model.json').read_text().replace('"image.onnx"', '"../other/image.onnx"'))
  linked = colour_export.write(tmp_path / 'linked')
  (linked / 'image.onnx').unlink()
  (linked / 'image.onnx').symlink_to(other / 'image.onnx')
  jax_only = tmp_path / 'jax'
  jax_only.mkdir()
  about = {**json.loads((other / 'model.json').read_text()), 'format': 'stablehlo'}
  (jax_only / 'model.json').write_text(json.dumps(about))
  for name in ('image.onnx', 'text.onnx', 'tokenizer.model'):
    (jax_only / name).touch()
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken/index.json').write_text('{"folder": 1')
  pictures_folder, model = str(folder / 'pictures'), f'--model={export_folder}'
  for arguments, words in (
      (['query', built], 'give one query'), (['query', built, 'a', '--image=b'], 'give one query'),
      (['query', str(tmp_path), 'a'], 'is no index'), (['query', str(tmp_path / 'broken'), 'a'], 'is damaged'),
      (['query', built, 'a', f'--model={other}'], 'is not the model that made'),
      (['index', pictures_folder, model, '--out=gs://a/b'], "'gs://a/b' is in a bucket"),
      (['query', built, '--image=/nowhere.png'], "cannot read the picture '/nowhere.png'"),
      (['index', '/nowhere', model, f'--out={tmp_path}/new'], "'/nowhere' is no folder"),
      (['index', pictures_folder, model, f'--out={tmp_path}'], 'holds something else'),
      (['index', pictures_folder, f'--model={other}', f'--out={built}'], 'is of the model'),
      (['index', str(tmp_path), model, f'--out={built}'], 'is of the pictures'),
      (['index', pictures_folder, f'--model={tmp_path}', '--out=x'], 'is no exported folder.*export --format=onnx'),
      (['index', pictures_folder, f'--model={jax_only}', '--out=x'], 'is an export for stablehlo; this takes one for onnx: '),
      (['serve', f'--model={outside}'], 'lies elsewhere'), (['serve', f'--model={linked}'], 'lies elsewhere')):
    with pytest.raises(UserError, match=words) as error:
      command.main(arguments)
    assert '\n' not in str(error.value)


def test_a_query_starts_no_jax(made):
  folder, _, _ = made
  script = ('import sys\nfrom lightclip_jax.search import __main__ as command\n'
            f'command.main(["query", {str(folder / "index")!r}, "red"])\nassert "jax" not in sys.modules')
  done = subprocess.run([sys.executable, '-W', 'error', '-c', script], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and len(done.stdout.splitlines()) == 10, done.stderr
  done = subprocess.run([sys.executable, '-m', 'lightclip_jax.search', 'query', '/nowhere', 'red'], capture_output=True,
                        text=True, check=False)
  assert done.returncode == 2 and done.stderr.startswith("error: '/nowhere' is no index") and done.stderr.count('\n') == 1
