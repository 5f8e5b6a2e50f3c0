"""A checkpoint in, a folder out: towers, tokenizer, `model.json`, and the proof that they are the model."""
import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax import storage
from lightclip_jax.errors import UserError
from lightclip_jax.export import onnx_files, open_clip, stablehlo, verify
from lightclip_jax.export import towers as towers_lib
from lightclip_jax.inference import checkpoint, exported
from lightclip_jax.inference import model as model_lib

# format -> write(towers, folder): makes the tower files, returns what model.json says about them.
FORMATS: dict[str, Callable[[towers_lib.Towers, pathlib.Path], dict[str, Any]]] = {
  'onnx': onnx_files.write, 'stablehlo': stablehlo.write, 'open_clip': open_clip.write}
# All that an export and its int8 can hold; `model.json` first: without it a folder does not look whole.
FILES = (exported.MODEL_FILE, 'tokenizer.model', 'tokenizer.gz', 'tokenizer.json', 'tokenizer_config.json', 'image.onnx',
         'text.onnx', 'image_tokens.onnx', 'text_tokens.onnx', 'image.stablehlo', 'text.stablehlo',
         'open_clip_model.safetensors', 'open_clip_config.json', 'trunk/config.json')
PARTIAL = '.partial'   # in the folder itself: that may be a mount, into which nothing can be renamed from elsewhere


def export(loaded: checkpoint.Loaded, kind: str, out: pathlib.Path, *, data: storage.Path | None = None,
           int8: bool = False, tokens: bool = False) -> Iterator[str]:
  """Writes and verifies the folder, and yields lines that say what was measured. What fails leaves the folder as it was.

  Args:
    loaded: the checkpoint.
    kind: one of `FORMATS`.
    out: the folder; it is made, or must be empty or an earlier export.
    data: a prepared folder to verify on; None: the config's data set, if it is on this machine.
    int8: for onnx: writes `out/int8` too.
    tokens: for onnx: writes the token heads of training too, beside the towers, which stay as they are.

  Raises:
    UserError: for a folder with something else in it, a missing package, or an export that is not the model.
  """
  _check_flags(kind, int8, tokens, loaded.config)
  _check_folder(out, kind)
  towers = towers_lib.from_checkpoint(loaded)
  inputs = verify.noise(towers)
  data, asked = data or verify.prepared_folder(loaded.config.data.dataset), None
  if data:
    asked = verify.questions(towers, data)
    inputs = {**inputs, **verify.real(towers, data)}
  else:
    yield f'the data set {loaded.config.data.dataset!r} is not here: verified on noise alone (--data names a prepared folder)'
  with _in_place_of_the_earlier(out) as partial:
    tokenizer_file = f'tokenizer{loaded.tokenizer.suffix}'
    (partial / tokenizer_file).write_bytes(loaded.tokenizer.to_bytes())
    about = {**FORMATS[kind](towers, partial), **towers.description(), 'tokenizer': tokenizer_file}
    if kind == 'open_clip':
      yield from _in_open_clip(partial, about, model_lib.from_checkpoint(towers.loaded), inputs, asked)
      open_clip.move(partial, out)
    else:
      yield from _read_back(partial, about, towers, inputs, asked, int8)
      if tokens:
        yield from _token_heads(partial, about, loaded, towers, inputs)


@contextlib.contextmanager
def _in_place_of_the_earlier(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder whose files take the place of an earlier export's when the block ends well; nobody sees half of them before."""
  made, partial = not out.exists(), out / PARTIAL
  shutil.rmtree(partial, ignore_errors=True)   # of an export that was killed
  partial.mkdir(parents=True)
  try:
    yield partial
    names = [*FILES, *(f'int8/{name}' for name in FILES)]
    for name in names:
      (out / name).unlink(missing_ok=True)
    for name in reversed(names):
      if (partial / name).exists():
        (out / name).parent.mkdir(exist_ok=True)
        (partial / name).rename(out / name)
  finally:
    shutil.rmtree(partial)
    for folder in (out / 'int8', out / 'trunk', *([out] if made else [])):
      with contextlib.suppress(OSError):   # it is not there, or not empty
        folder.rmdir()


def _read_back(out: pathlib.Path, about: dict[str, Any], towers: towers_lib.Towers, inputs: verify.Inputs,
               asked: verify.Questions | None, int8: bool) -> Iterator[str]:
  """What the folder's own towers give, and how they compare."""
  models = [model_lib.from_checkpoint(towers.loaded)]
  _finish(out, about)
  models.append(model_lib.load(out))
  about['cosines'] = verify.cosines(*(verify.embed(_sides(model), inputs) for model in models))
  _finish(out, about)
  yield _cosine_line(about['cosines'])
  verify.check(about['cosines'])
  if int8:
    models.append(_quantized(out, about, models[0], inputs))
    yield 'int8: ' + _cosine_line(models[-1][1])
    models[-1] = models[-1][0]
  if about['format'] == 'onnx':
    yield from _comparison(models, out, asked)


def _check_flags(kind: str, int8: bool, tokens: bool, config: config_lib.Config) -> None:
  for flag, given in (('--int8', int8), ('--tokens', tokens)):
    if given and kind != 'onnx':
      raise UserError(f'{flag} is for --format=onnx, not for {kind}')
  if tokens and config.objective.token_matching.weight.is_zero:
    raise UserError('objective.token_matching.weight of this run is 0, so its token heads learnt nothing; leave --tokens out')


def _check_folder(out: pathlib.Path, kind: str) -> None:
  """Raises UserError for a folder that is neither new, nor empty, nor an earlier export for the same."""
  if not out.exists() or out.is_dir() and all(file.name == PARTIAL for file in out.iterdir()):
    return
  if not (out / exported.MODEL_FILE).is_file():
    raise UserError(f'{str(out)!r} holds something else; give a new folder')
  if (earlier := exported.format_of(out)) != kind:
    raise UserError(f'{str(out)!r} holds an export for {earlier}, not for {kind}; give a new folder')


def _in_open_clip(out: pathlib.Path, about: dict[str, Any], model: model_lib.Model, inputs: verify.Inputs,
                  asked: verify.Questions | None) -> Iterator[str]:
  """What real open_clip makes of the folder, where it is installed."""
  ours, asking = verify.embed(_sides(model), inputs), dict(inputs)
  if asked:
    ids_CxW = model.tokenizer.encode(asked.concepts, model.context)
    ours |= {'image/questions': model.encode_image(asked.images_NxSxSx3), 'text/concepts': model.encode_text(asked.concepts)}
    asking |= {'image/questions': asked.images_NxSxSx3, 'text/concepts': ids_CxW, 'names': np.array(asked.concepts)}
  theirs = open_clip.embed(out, asking)
  if not theirs:
    _finish(out, {**about, 'cosines': None})
    yield open_clip.UNVERIFIED
    return
  lowest = verify.cosines(ours, theirs)
  _finish(out, {**about, 'cosines': lowest})
  yield _cosine_line(lowest)
  verify.check(lowest)
  if asked:
    for name, images_NxD, names_CxD in (('JAX', ours['image/questions'], ours['text/concepts']),
                                        ('real open_clip', theirs['image/questions'], theirs['names'])):
      yield f'{name}: zero-shot top-1 {100 * verify.accuracy(images_NxD, names_CxD, asked.labels_N):.2f} %'
    same = (ids_CxW == theirs['ids/names']).all(axis=1).sum()
    yield f"open_clip's tokenizer gives the same ids for {same:,} of {len(ids_CxW):,} names"


def _token_heads(out: pathlib.Path, about: dict[str, Any], loaded: checkpoint.Loaded, towers: towers_lib.Towers,
                 inputs: Any) -> Iterator[str]:
  heads = towers_lib.token_heads(loaded)
  written = onnx_files.write_token_heads(towers, heads, loaded.config.objective.token_matching.epsilon, out)
  ours = {name: jax.jit(head) for name, head in zip(('image', 'text'), heads, strict=True)}
  theirs = {name: exported.onnx_tower(out / written[name]) for name in ours}
  cosines = verify.cosines(verify.embed(ours, inputs), verify.embed(theirs, inputs))
  yield 'token heads: ' + _cosine_line(cosines)
  verify.check(cosines)
  _finish(out, {**about, 'tokens': written})


def _quantized(out: pathlib.Path, about: dict[str, Any], reference: model_lib.Model, inputs: Any) -> tuple[Any, Any]:
  folder = out / 'int8'
  folder.mkdir(exist_ok=True)
  onnx_files.quantize(out, folder)
  (folder / about['tokenizer']).write_bytes((out / about['tokenizer']).read_bytes())
  _finish(folder, about)
  model = model_lib.load(folder)
  cosines = verify.cosines(*(verify.embed(_sides(side), inputs) for side in (reference, model)))
  _finish(folder, {**about, 'cosines': cosines})
  return model, cosines


def _comparison(models: list[model_lib.Model], out: pathlib.Path, asked: verify.Questions | None) -> Iterator[str]:
  """Accuracy, size and latency, a line a model."""
  folders = [None, out, out / 'int8'][:len(models)]
  example = np.zeros((1, models[0].preprocessing['size'], models[0].preprocessing['size'], 3), np.uint8)
  for i, (model, folder) in enumerate(zip(models, folders, strict=True)):
    tower = exported.onnx_tower(folder / 'image.onnx', threads=1) if folder else model.image_tower
    name = ('JAX, all threads', 'ONNX, one thread', 'int8, one thread')[i]
    line = f'{name}: {verify.latency(tower, example):.2f} ms an image'
    if folder:
      line += ''.join(f', {name} {(folder / name).stat().st_size / 1e6:.2f} MB' for name in ('image.onnx', 'text.onnx'))
    if asked:
      accuracy = verify.accuracy(model.encode_image(asked.images_NxSxSx3), model.encode_text(asked.concepts), asked.labels_N)
      line += f', zero-shot top-1 {100 * accuracy:.2f} %'
    yield line


def _sides(model: model_lib.Model) -> dict[str, Callable]:
  return {'image': model.image_tower, 'text': model.text_tower}


def _cosine_line(cosines: dict[str, float]) -> str:
  return 'lowest cosines with the JAX model: ' + ', '.join(f'{name} {value:.6f}' for name, value in cosines.items())


def _finish(folder: pathlib.Path, about: dict[str, Any]) -> None:
  (folder / exported.MODEL_FILE).write_text(json.dumps(about, indent=2) + '\n', encoding='utf-8')
