"""ONNX: one file a tower. The image graph takes uint8 and normalises inside; the batch size is free."""
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lightclip_jax.export import onnx_graph
from lightclip_jax.export.towers import Towers
from lightclip_jax.inference.exported import optional


def write(towers: Towers, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `image.onnx` (image [batch, S, S, 3] uint8 -> embedding) and `text.onnx` (tokens [batch, W] int32 -> embedding);
  returns what `model.json` says about them.

  Raises:
    UserError: if onnx is not installed, or a tower uses a primitive that has no handler.
  """
  onnx = optional('onnx')
  onnx.save(onnx_graph.convert(towers.image, towers.image_item, 'image', 'embedding'), folder / 'image.onnx')
  onnx.save(onnx_graph.convert(towers.text, towers.text_item, 'tokens', 'embedding'), folder / 'text.onnx')
  return {'format': 'onnx', 'image': 'image.onnx', 'text': 'text.onnx', 'opset': onnx_graph.OPSET,
          'ir_version': onnx_graph.IR_VERSION}


def write_token_heads(towers: Towers, heads: Sequence[Callable], epsilon: float, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `image_tokens.onnx` (-> [batch, P, d]) and `text_tokens.onnx` (-> [batch, W, d]); returns what `model.json` says
  about them. The towers' own files stay as they are. Raises UserError as `write` does."""
  onnx = optional('onnx')
  for head, item, given, name in zip(heads, (towers.image_item, towers.text_item), ('image', 'tokens'), ('image', 'text'),
                                     strict=True):
    onnx.save(onnx_graph.convert(head, item, given, 'embeddings'), folder / f'{name}_tokens.onnx')
  return {'image': 'image_tokens.onnx', 'text': 'text_tokens.onnx', 'epsilon': epsilon}


def quantize(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes both files of `source` again with int8 weights; activations are quantised as they come (dynamically).

  Only products of matrices are: they hold nearly all weights, and convolutions lose accuracy and speed by it.
  """
  quantization = optional('onnxruntime.quantization')
  for name in ('image.onnx', 'text.onnx'):
    quantization.quantize_dynamic(source / name, folder / name, op_types_to_quantize=['MatMul', 'Gather'],
                                  weight_type=quantization.QuantType.QInt8, per_channel=True)
