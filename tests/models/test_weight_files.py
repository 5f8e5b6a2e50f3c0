"""safetensors and .pth files without their libraries. The files are written here byte by byte, as the formats say."""
import collections
import io
import json
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from lightclip_jax.errors import UserError
from lightclip_jax.models import weight_files

ARRAYS = {'a.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4), 'b': np.arange(5, dtype=np.int64),
          'c': np.float16(2.5).reshape(()), 'd': np.zeros((0, 3), np.float32), 'e': np.array([True, False])}


class Stored:
  """Pickles as PyTorch's tensors do: a call of `_rebuild_tensor_v2` on a persistent storage."""

  def __init__(self, array, transposed=False, offset=0):
    self.array, self.transposed, self.offset = array, transposed, offset

  def __reduce__(self):
    torch = sys.modules['torch']
    strides = tuple(s // self.array.itemsize for s in self.array.strides)
    shape = self.array.shape[::-1] if self.transposed else self.array.shape
    strides = strides[::-1] if self.transposed else strides
    return torch._utils._rebuild_tensor_v2, (Storage(self.array), self.offset, shape, strides, False,
                                             collections.OrderedDict())


class Storage:
  def __init__(self, array):
    self.array = array


@pytest.fixture
def torch(monkeypatch):
  """Modules with PyTorch's names, so that pickle can refer to what is in them."""
  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')

  def _rebuild_tensor_v2(*_):
    raise AssertionError('the reader must not call what the file names')
  _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = 'torch._utils', '_rebuild_tensor_v2'
  utils._rebuild_tensor_v2, torch._utils = _rebuild_tensor_v2, utils
  for name in ('FloatStorage', 'LongStorage', 'HalfStorage', 'BoolStorage'):
    setattr(torch, name, type(name, (), {'__module__': 'torch'}))
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'torch._utils', utils)
  return torch


KINDS = {'float32': 'FloatStorage', 'int64': 'LongStorage', 'float16': 'HalfStorage', 'bool': 'BoolStorage'}


def dump(content, legacy):
  """(pickle, {key: storage}) of `content`."""
  storages = {}

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if not isinstance(value, Storage):
        return None
      key = str(len(storages))
      storages[key] = value.array
      kind = getattr(sys.modules['torch'], KINDS[value.array.dtype.name])
      return ('storage', kind, key, 'cpu', value.array.size, *([None] if legacy else []))

  file = io.BytesIO()
  Pickler(file, protocol=2).dump(content)
  return file.getvalue(), storages


def write(path, content, legacy):
  data, storages = dump(content, legacy)
  if legacy:
    head = b''.join(pickle.dumps(x, 2) for x in (weight_files.LEGACY_MAGIC, 1001, {'little_endian': True}))
    body = b''.join(len(a.ravel()).to_bytes(8, 'little') + a.tobytes() for a in storages.values())
    path.write_bytes(head + data + pickle.dumps(list(storages), 2) + body)
    return path
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', data)
    archive.writestr('archive/byteorder', 'little')
    for key, array in storages.items():
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return path


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: {'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in d.items()}},
                                  lambda d: collections.OrderedDict(d)], ids=['plain', 'wrapped', 'ordered'])
def test_pth_files_give_back_their_arrays(tmp_path, torch, legacy, wrap):
  content = {name: Stored(array) for name, array in ARRAYS.items()}
  got = weight_files.read(write(tmp_path / 'w.pth', wrap(content), legacy))
  assert got.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(got[name], array)
    assert got[name].dtype == array.dtype


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('name', ['state_dict', 'model_state_dict', 'model'])
def test_tensors_beside_the_weights_are_left_out(tmp_path, torch, name, legacy):
  moments = {'state': {0: {'exp_avg': Stored(np.ones(5, np.float16))}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
  content = {'best_acc1': Stored(np.float32(71).reshape(())), 'optimizer': moments,
             name: {key: Stored(array) for key, array in ARRAYS.items()}, 'epoch': Stored(np.zeros((), np.int64))}
  got = weight_files.read(write(tmp_path / 'w.pth', content, legacy))
  assert got.keys() == ARRAYS.keys()
  for key, array in ARRAYS.items():
    np.testing.assert_array_equal(got[key], array)
  content[name] = {'architecture': 'resnet18'}   # no weights: those outside are
  assert weight_files.read(write(tmp_path / 'w.pth', content, legacy)).keys() == {'best_acc1', 'epoch'}


def test_views_and_safetensors(tmp_path, torch):
  array = ARRAYS['a.weight']
  got = weight_files.read(write(tmp_path / 'w.pth', {'t': Stored(array, transposed=True)}, False))
  np.testing.assert_array_equal(got['t'], array.T)
  header = {'__metadata__': {'format': 'pt'}, 'x': {'dtype': 'F32', 'shape': [2, 3, 4], 'data_offsets': [0, 96]},
            'h': {'dtype': 'BF16', 'shape': [2], 'data_offsets': [96, 100]}}
  encoded = json.dumps(header).encode()
  tail = array.tobytes() + (np.array([1.5, -2], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
  (tmp_path / 'w.safetensors').write_bytes(len(encoded).to_bytes(8, 'little') + encoded + tail)
  got = weight_files.read(tmp_path / 'w.safetensors')
  np.testing.assert_array_equal(got['x'], array)
  np.testing.assert_array_equal(got['h'].astype(np.float32), [1.5, -2])


class Evil:
  def __reduce__(self):
    return os.system, ('touch /tmp/should_not_exist',)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('content, words', [
  (lambda: {'a': Evil()}, r'it names (posix|nt)\.system'), (lambda: {'a': eval}, r'it names (builtins|__builtin__)\.eval'),
  (lambda: {'a': Stored(ARRAYS['b']), 'b': collections.Counter()}, r'it names collections\.Counter'),
  (lambda: {'a': 1}, 'holds no tensors'), (lambda: [1], 'holds a list'),
  (lambda: {'a': Stored(ARRAYS['b'], offset=3)}, 'beyond its storage'),
])
def test_anything_but_tensors_is_refused_by_name(tmp_path, torch, content, legacy, words):
  with pytest.raises(UserError, match=words) as error:
    weight_files.read(write(tmp_path / 'w.pth', content(), legacy))
  assert str(tmp_path / 'w.pth') in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('name, data, words', [
  ('w.pth', b'not a pickle', 'no whole'), ('w.safetensors', b'\x05', 'no whole'), ('w.pth', pickle.dumps(7), 'no whole')])
def test_damaged_files_are_one_clear_line(tmp_path, name, data, words):
  with pytest.raises(UserError, match='there is no weight file'):
    weight_files.read(tmp_path / name)
  (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError, match=words) as error:
    weight_files.read(tmp_path / name)
  assert '\n' not in str(error.value)
