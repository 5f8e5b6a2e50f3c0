"""An ONNX export whose right answers are known without it: a picture is its mean colour (and faint detail), a text the sum
of its words' colours. It has token heads too, of patches and words."""
import json
import pathlib

import numpy as np
import onnx
import PIL.Image
from onnx import TensorProto, helper, numpy_helper

from lightclip_jax.data import tokenizers
from lightclip_jax.export import onnx_graph

SIZE, CONTEXT, DIM, GRID = 32, 16, 24, 4
COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255), 'yellow': (255, 255, 0), 'purple': (255, 0, 255),
           'cyan': (0, 255, 255), 'white': (255, 255, 255), 'black': (0, 0, 0)}
CAPTIONS = [f'a {colour} {shape}' for colour in COLOURS for shape in ('circle', 'square', 'house', 'picture')] + [
  'naïve café', '家族 と 犬', '😀 face', 'семья', 'مرحبا']


def write(folder: pathlib.Path, tokens: bool = True) -> pathlib.Path:
  """`folder`, made as `lightclip_jax.export --format=onnx` makes one."""
  folder.mkdir(parents=True)
  tokenizer = tokenizers.train([*CAPTIONS * 30, *list(COLOURS) * 300], 160)
  (folder / 'tokenizer.model').write_bytes(tokenizer.to_bytes())
  table_VxD = np.zeros((tokenizer.vocab_size, DIM), np.float32)
  for colour, rgb in COLOURS.items():
    [place] = tokenizer.encode([colour], 3)[:, 1]
    assert tokenizer.pieces([place]) == [f'▁{colour}'], 'the colours must be one piece each'
    table_VxD[place, :3] = np.array(rgb) / 255 - 0.5
  rng = np.random.default_rng(0)
  weights = rng.normal(0, 0.05, (SIZE * SIZE * 3, DIM)).astype(np.float32) / 255 / SIZE
  weights[:, :3] = np.tile(np.eye(3, dtype=np.float32), (SIZE * SIZE, 1)) / 255 / SIZE ** 2
  flat, grid = [0, SIZE * SIZE * 3], [0, GRID, SIZE // GRID, GRID, SIZE // GRID, 3]
  image = ('image', TensorProto.UINT8, [SIZE, SIZE, 3])
  text = ('tokens', TensorProto.INT32, [CONTEXT])
  half = np.zeros(DIM, np.float32)
  half[:3] = 0.5
  _save(folder / 'image.onnx', image, [DIM], {'weights': weights, 'half': half, 'shape': np.array(flat)}, [
    ('Cast', ['image'], dict(to=TensorProto.FLOAT)), ('Reshape', ['', 'shape'], {}), ('MatMul', ['', 'weights'], {}),
    ('Sub', ['', 'half'], {})])
  _save(folder / 'text.onnx', text, [DIM], {'table': table_VxD, 'axis': np.array([1])}, [
    ('Gather', ['table', 'tokens'], {}), ('ReduceSum', ['', 'axis'], dict(keepdims=0))])
  about = {'format': 'onnx', 'image': 'image.onnx', 'text': 'text.onnx', 'tokenizer': 'tokenizer.model', 'name': 'colours',
           'preprocessing': {'size': SIZE}, 'context': CONTEXT, 'embed_dim': DIM, 'logit_scale': 20.0,
           'special_ids': {'pad': tokenizer.pad_id, 'start': tokenizer.start_id, 'end': tokenizer.end_id}}
  if tokens:
    _save(folder / 'image_tokens.onnx', image, [GRID * GRID, 3], {
      'shape': np.array(grid), 'axes': np.array([2, 4]), 'out': np.array([0, GRID * GRID, 3]), 'middle': np.float32(127.5)}, [
      ('Cast', ['image'], dict(to=TensorProto.FLOAT)), ('Reshape', ['', 'shape'], {}),
      ('ReduceMean', ['', 'axes'], dict(keepdims=0)), ('Reshape', ['', 'out'], {}), ('Sub', ['', 'middle'], {})])
    _save(folder / 'text_tokens.onnx', text, [CONTEXT, 3], {'table': table_VxD[:, :3]}, [('Gather', ['table', 'tokens'], {})])
    about['tokens'] = {'image': 'image_tokens.onnx', 'text': 'text_tokens.onnx', 'epsilon': 0.05}
  (folder / 'model.json').write_text(json.dumps(about))
  return folder


def pictures(folder: pathlib.Path, count: int, size: int = 96) -> dict[pathlib.Path, str]:
  """`count` noisy pictures of all colours as PNG, JPEG, WebP and with transparency, in folders: file -> its colour."""
  rng, made = np.random.default_rng(1), {}
  for i in range(count):
    name = list(COLOURS)[i % len(COLOURS)]
    height, width = rng.integers(size // 2, 2 * size, 2)
    noise = rng.normal(0, 25, (height // 6 + 1, width // 6 + 1, 3)).repeat(6, 0).repeat(6, 1)[:height, :width]
    image = PIL.Image.fromarray(np.clip(np.array(COLOURS[name]) * 0.8 + 25 + noise, 0, 255).astype(np.uint8))
    file = folder / str(i % 3) / f'{i:03d}-{name}{(".png", ".jpg", ".webp")[i % 3]}'
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **({'quality': 95, 'subsampling': 0} if i % 3 == 1 else {'lossless': True} if i % 3 == 2 else {}))
    made[file] = name
  return made


def _save(file: pathlib.Path, given: tuple, out: list[int], stored: dict[str, np.ndarray], steps: list[tuple]) -> None:
  """A graph of steps, '' standing for the one before, and unit vectors at its end."""
  nodes, last = [], ''
  stored = {**stored, 'last_axis': np.array([-1]), 'tiny': np.float32(1e-6)}
  for i, (op, inputs, attributes) in enumerate([
      *steps, ('ReduceL2', ['', 'last_axis'], dict(keepdims=1)), ('Max', ['', 'tiny'], {})]):
    before, last = last, f'step{i}'
    if op == 'ReduceL2':
      vector = before
    nodes.append(helper.make_node(op, [name or before for name in inputs], [last], **attributes))
  nodes.append(helper.make_node('Div', [vector, last], ['embedding']))
  name, kind, shape = given
  graph = helper.make_graph(
    nodes, 'colours', [helper.make_tensor_value_info(name, kind, ['batch', *shape])],
    [helper.make_tensor_value_info('embedding', TensorProto.FLOAT, ['batch', *out])],
    [numpy_helper.from_array(np.asarray(array), key) for key, array in stored.items()])
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', onnx_graph.OPSET)], ir_version=onnx_graph.IR_VERSION)
  onnx.checker.check_model(model, full_check=True)
  onnx.save(model, file)
