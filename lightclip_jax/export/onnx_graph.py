"""A JAX function of one batch as an ONNX graph: its jaxpr, walked once, one handler a primitive.

The batch size stays symbolic. What does not depend on the input is computed here and stored. A tower that uses a primitive
that is not in HANDLERS says so by name; a handler is one line or a few.

A broadcast is not carried out, since ONNX broadcasts by itself: a value's own `shape` then has 1 where JAX's has more.
"""
import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from lightclip_jax.errors import UserError
from lightclip_jax.inference.exported import optional

OPSET = 18
IR_VERSION = 9   # of the file; later ones are refused by runtimes that know this opset


@dataclasses.dataclass(frozen=True)
class Value:
  """A tensor of the graph. Dimensions are int, or symbolic where they depend on the batch size."""
  name: str
  shape: tuple[Any, ...]


Operand = Value | np.ndarray


def convert(function: Callable[[jax.Array], jax.Array], item: jax.ShapeDtypeStruct, input_name: str, output_name: str) -> Any:
  """The `onnx.ModelProto` of `function`: [batch, *item.shape] -> [batch, ...], for any batch size.

  Raises:
    UserError: if onnx is not installed, or the function uses a primitive without a handler.
  """
  onnx = optional('onnx')
  batch, = jax.export.symbolic_shape('batch')
  closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *item.shape), item.dtype))
  graph = Graph(onnx, Value(input_name, (batch, *item.shape)), batch)
  result, = graph.run(closed.jaxpr, closed.consts, [graph.input])
  graph.node('Identity', [graph.whole(result, closed.out_avals[0].shape)], output=output_name)
  graph.fold_scales()
  return graph.model(item, closed.out_avals[0], output_name)


class Graph:
  """The nodes and stored tensors so far."""

  def __init__(self, onnx: Any, entry: Value, batch: Any) -> None:
    self._onnx, self.input, self._batch = onnx, entry, batch
    self._nodes: list[Any] = []
    self._stored: dict[str, np.ndarray] = {}

  def node(self, op: str, inputs: Sequence[Operand], shape: tuple[Any, ...] = (), *, output: str | None = None,
           **attributes: Any) -> Value:
    """Adds one node; its output has the given shape."""
    name = output or f'{op}_{len(self._nodes)}'
    names = [x.name if isinstance(x, Value) else self._store(x) for x in inputs]
    self._nodes.append(self._onnx.helper.make_node(op, names, [name], name=name, **attributes))
    return Value(name, shape)

  def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Operand]) -> list[Operand]:
    """What the jaxpr's outputs are, given what its inputs are."""
    known: dict[Any, Operand] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Operand:
      return np.asarray(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
      inputs = [read(atom) for atom in equation.invars]
      known.update(zip(equation.outvars, self._apply(equation, inputs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def whole(self, x: Operand, shape: tuple[Any, ...]) -> Operand:
    """x with its broadcasts carried out."""
    if tuple(x.shape) == tuple(shape):
      return x
    if all(isinstance(size, int) for size in shape) and isinstance(x, np.ndarray):
      return np.broadcast_to(x, shape)
    size = self.node('Slice', [self.node('Shape', [self.input]), *_int64([0], [1])])
    parts = [size if dim is self._batch or dim == self._batch else _int64([dim])[0] for dim in shape]
    return self.node('Expand', [x, self.node('Concat', parts, axis=0)], tuple(shape))

  def reshape(self, x: Operand, shape: tuple[Any, ...]) -> Operand:
    """x, already whole, in another shape with at most one dimension that depends on the batch size."""
    if tuple(x.shape) == tuple(shape):
      return x
    if isinstance(x, np.ndarray):
      return x.reshape(shape)
    sizes = [dim if isinstance(dim, int) else -1 for dim in shape]
    return self.node('Reshape', [x, *_int64(sizes)], tuple(shape))

  def transpose(self, x: Operand, axes: Sequence[int]) -> Operand:
    """x with its axes in another order."""
    if list(axes) == sorted(axes):
      return x
    if isinstance(x, np.ndarray):
      return x.transpose(axes)
    return self.node('Transpose', [x], tuple(x.shape[a] for a in axes), perm=list(axes))

  def fold_scales(self) -> None:
    """Multiplies the factors of normalisations into the weights of the products and convolutions before them."""
    maker = {node.output[0]: node for node in self._nodes}
    uses = collections.Counter(name for node in self._nodes for name in node.input)
    renamed: dict[str, str] = {}
    for node in [node for node in self._nodes if node.op_type == 'Mul']:
      factor = next((name for name in node.input if name in self._stored), None)
      before = next((name for name in node.input if name not in self._stored), None)
      before = renamed.get(before, before)
      source = self._scaled_source(maker, uses, before) if factor and before else None
      if source is None or not _is_last_axis(self._stored[factor]):
        continue
      weight, vector = self._stored[source.input[1]], self._stored[factor].reshape(-1)
      if len(vector) not in (1, weight.shape[0 if source.op_type == 'Conv' else 1]):
        continue
      self._stored[source.input[1]] = weight * (vector.reshape(-1, 1, 1, 1) if source.op_type == 'Conv' else vector)
      self._nodes.remove(node)
      renamed[node.output[0]] = before
      uses[before] = uses[node.output[0]]
    for node in self._nodes:
      node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in self._nodes for name in node.input}
    self._stored = {name: array for name, array in self._stored.items() if name in used}

  def _scaled_source(self, maker: dict[str, Any], uses: Any, name: str) -> Any:
    """The product or convolution with stored weights whose output reaches `name` unchanged, and nothing else."""
    while name in maker and uses[name] == 1:
      node = maker[name]
      if node.op_type in ('MatMul', 'Conv'):
        alone = uses[node.input[1]] == 1 and self._stored.get(node.input[1], np.zeros(0)).ndim in (2, 4)
        return node if alone else None
      keeps_channels = node.op_type == 'Reshape' or (node.op_type == 'Transpose' and list(node.attribute[0].ints) == [*_NHWC])
      name = node.input[0] if keeps_channels else ''
    return None

  def kind(self, dtype: Any) -> int:
    """ONNX's number for a dtype."""
    return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

  def model(self, item: jax.ShapeDtypeStruct, result: Any, output: str) -> Any:
    """The finished model, checked."""
    helper, checker = self._onnx.helper, self._onnx.checker
    def info(name: str, shape: Sequence[Any], dtype: Any) -> Any:
      return helper.make_tensor_value_info(name, self.kind(dtype), ['batch', *shape])
    stored = [self._onnx.numpy_helper.from_array(array, name) for name, array in self._stored.items()]
    graph = helper.make_graph(self._nodes, 'tower', [info(self.input.name, item.shape, item.dtype)],
                              [info(output, result.shape[1:], result.dtype)], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], producer_name='lightclip_jax')
    model.ir_version = IR_VERSION
    checker.check_model(model, full_check=True)
    return model

  def _store(self, array: np.ndarray) -> str:
    name = f'tensor_{len(self._stored)}'
    self._stored[name] = np.ascontiguousarray(array).reshape(array.shape)
    return name

  def _apply(self, equation: Any, inputs: list[Operand]) -> list[Operand]:
    name = equation.primitive.name
    if name in INLINED:
      return self.run(*INLINED[name](equation.params, inputs))
    shapes = [var.aval.shape for var in equation.outvars]
    fixed = all(isinstance(dim, int) for shape in shapes for dim in shape)
    if name == 'platform_index':
      return [np.int32(len(equation.params['platforms']) - 1)]   # the branch for no platform in particular
    if fixed and all(isinstance(x, np.ndarray) and x.shape == v.aval.shape
                     for x, v in zip(inputs, equation.invars, strict=True)):
      results = equation.primitive.bind(*inputs, **equation.params)
      return [np.asarray(x) for x in (results if equation.primitive.multiple_results else [results])]
    if name == 'split':
      return _split(self, inputs[0], shapes, equation.params['axis'])
    if name not in HANDLERS:
      raise UserError(f'the ONNX export has no handler for the JAX primitive {name!r}; export stablehlo instead')
    if name not in BROADCASTING:
      inputs = [self.whole(x, v.aval.shape) for x, v in zip(inputs, equation.invars, strict=True)]
    return [HANDLERS[name](self, inputs, equation.outvars[0].aval, equation.params)]


def _elementwise(op: str) -> Callable[..., Operand]:
  def handler(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
    shape = [functools.reduce(lambda a, b: b if isinstance(a, int) and a == 1 else a, dims)
             for dims in zip(*[x.shape for x in inputs if x.shape], strict=True)]
    return graph.node(op, inputs, tuple(shape))
  return handler


def _same(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return inputs[0]


def _square(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.node('Mul', [inputs[0], inputs[0]], inputs[0].shape)


def _rsqrt(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.node('Reciprocal', [graph.node('Sqrt', inputs, inputs[0].shape)], inputs[0].shape)


def _erfc(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.node('Sub', [np.ones((), out.dtype), graph.node('Erf', inputs, inputs[0].shape)], inputs[0].shape)


def _select(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return _elementwise('Where')(graph, [inputs[0], inputs[2], inputs[1]], out, params)


def _cast(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.node('Cast', inputs, inputs[0].shape, to=graph.kind(params['new_dtype']))


def _reduce(op: str) -> Callable[..., Operand]:
  def handler(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
    return graph.node(op, [inputs[0], *_int64(params['axes'])], out.shape, keepdims=0)
  return handler


def _broadcast(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  shape: list[Any] = [1] * len(out.shape)
  for axis, dim in zip(params['broadcast_dimensions'], inputs[0].shape, strict=True):
    shape[axis] = dim
  return graph.reshape(inputs[0], tuple(shape))


def _reshape(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.reshape(inputs[0], out.shape)


def _transpose(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.transpose(inputs[0], params['permutation'])


def _concatenate(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.node('Concat', inputs, out.shape, axis=params['dimension'])


def _slice(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  strides = params['strides'] or (1,) * len(out.shape)
  cut = [axis for axis, dim in enumerate(inputs[0].shape) if isinstance(dim, int)]
  bounds = zip(*[(params['start_indices'][a], params['limit_indices'][a], a, strides[a]) for a in cut], strict=True)
  return graph.node('Slice', [inputs[0], *_int64(*bounds)], out.shape)


def _split(graph: Graph, x: Operand, shapes: Sequence[Any], axis: int) -> list[Operand]:
  ends = np.cumsum([shape[axis] for shape in shapes])
  return [graph.node('Slice', [x, *_int64([end - shape[axis]], [end], [axis])], shape)
          for end, shape in zip(ends, shapes, strict=True)]


def _cumsum(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  return graph.node('CumSum', [inputs[0], np.int64(params['axis'])], out.shape, reverse=int(params['reverse']))


def _dot(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  """Batch axes first, then a product of matrices over one contracted axis."""
  ((left_contract,), (right_contract,)), (left_batch, right_batch) = params['dimension_numbers']
  def free(x: Operand, contract: int, batch: Sequence[int]) -> list[int]:
    return [a for a in range(len(x.shape)) if a != contract and a not in batch]
  left, right = inputs
  left_free, right_free = free(left, left_contract, left_batch), free(right, right_contract, right_batch)
  if len(right.shape) == 2 and not left_batch and left_contract == len(left.shape) - 1:   # ONNX broadcasts the matrix
    return graph.node('MatMul', [left, graph.transpose(right, [right_contract, *right_free])], out.shape)
  if len(left_free) != 1 or len(right_free) != 1:
    raise UserError(f'the ONNX export takes products with one free axis a side, not {left.shape} by {right.shape}')
  left = graph.transpose(left, [*left_batch, *left_free, left_contract])
  right = graph.transpose(right, [*right_batch, right_contract, *right_free])
  return graph.node('MatMul', [left, right], out.shape)


_NCHW, _NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def _conv(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  numbers = params['dimension_numbers']
  if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != (_NCHW, (3, 2, 0, 1), _NCHW):
    raise UserError('the ONNX export takes convolutions of NHWC images by HWIO kernels only')
  x, kernel = graph.transpose(inputs[0], _NCHW), graph.transpose(inputs[1], (3, 2, 0, 1))
  before, after = zip(*params['padding'], strict=True)
  y = graph.node('Conv', [x, kernel], tuple(out.shape[a] for a in _NCHW), strides=list(params['window_strides']),
                 pads=[*before, *after], group=params['feature_group_count'])
  return graph.transpose(y, _NHWC)


def _max_pool(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  before, after = zip(*params['padding'][1:3], strict=True)
  y = graph.node('MaxPool', [graph.transpose(inputs[0], _NCHW)], tuple(out.shape[a] for a in _NCHW),
                 kernel_shape=list(params['window_dimensions'][1:3]), strides=list(params['window_strides'][1:3]),
                 pads=[*before, *after])
  return graph.transpose(y, _NHWC)


def _gather(graph: Graph, inputs: list[Operand], out: Any, params: Any) -> Operand:
  x, indices = inputs
  if isinstance(indices, np.ndarray):
    return _fixed_gather(graph, x, indices, out, params['dimension_numbers'], params['slice_sizes'])
  numbers = params['dimension_numbers']
  if (numbers.operand_batching_dims, numbers.start_index_map, numbers.collapsed_slice_dims) == ((0,), (1,), (1,)):
    indices = graph.node('Cast', [indices], indices.shape, to=graph.kind(np.int64))
    return graph.node('GatherND', [x, indices], out.shape, batch_dims=1)   # jnp.take_along_axis
  if numbers.start_index_map != (0,) or numbers.collapsed_slice_dims != (0,):
    raise UserError(f'the ONNX export takes look-ups of rows only, not {numbers}')
  return graph.node('Gather', [x, graph.reshape(indices, indices.shape[:-1])], out.shape, axis=0)


def _fixed_gather(graph: Graph, x: Operand, indices: np.ndarray, out: Any, numbers: Any, sizes: Sequence[Any]) -> Operand:
  """x[a:b, c, ::d] with constants: JAX writes it as a gather where the batch size is symbolic."""
  axes = numbers.start_index_map
  corner = indices.reshape(-1, len(axes))[0]
  ends, steps = [], []
  for i, axis in enumerate(axes):
    line = np.moveaxis(indices[..., i], i, 0).reshape(indices.shape[i], -1)[:, 0] if indices.ndim > 1 else corner[i:i + 1]
    step = int(line[1] - line[0]) if len(line) > 1 else 1
    if indices.ndim > 1 and not np.array_equal(np.moveaxis(indices[..., i], i, -1), np.broadcast_to(
        corner[i] + step * np.arange(len(line)), np.moveaxis(indices[..., i], i, -1).shape)):
      raise UserError('the ONNX export takes constant look-ups at regular steps only')
    ends.append(int(line[-1]) + sizes[axis])
    steps.append(step)
  return graph.reshape(graph.node('Slice', [x, *_int64(corner, ends, axes, steps)]), out.shape)


def _call(params: Any, inputs: list[Operand], name: str = 'jaxpr') -> tuple[core.Jaxpr, Any, list[Operand]]:
  return params[name].jaxpr, params[name].consts, inputs


def _remat(params: Any, inputs: list[Operand]) -> tuple[core.Jaxpr, Any, list[Operand]]:
  return params['jaxpr'], (), inputs


def _cond(params: Any, inputs: list[Operand]) -> tuple[core.Jaxpr, Any, list[Operand]]:
  if not isinstance(inputs[0], (np.ndarray, np.generic)):
    raise UserError('the ONNX export takes no branch that depends on the input')
  branch = params['branches'][int(inputs[0])]
  return branch.jaxpr, branch.consts, inputs[1:]


INLINED = {'jit': _call, 'custom_jvp_call': functools.partial(_call, name='call_jaxpr'),
           'custom_vjp_call': functools.partial(_call, name='call_jaxpr'), 'cond': _cond,
           primitives.remat_p.name: _remat}   # whose name changes with JAX's versions
_ELEMENTWISE = {'add': 'Add', 'sub': 'Sub', 'mul': 'Mul', 'div': 'Div', 'max': 'Max', 'min': 'Min', 'exp': 'Exp', 'neg': 'Neg',
                'erf': 'Erf', 'sqrt': 'Sqrt', 'tanh': 'Tanh', 'logistic': 'Sigmoid', 'eq': 'Equal', 'lt': 'Less',
                'gt': 'Greater', 'ge': 'GreaterOrEqual', 'le': 'LessOrEqual', 'and': 'And', 'or': 'Or', 'not': 'Not'}
BROADCASTING: dict[str, Callable[..., Operand]] = {
  **{primitive: _elementwise(op) for primitive, op in _ELEMENTWISE.items()},
  'stop_gradient': _same, 'copy': _same, 'square': _square, 'rsqrt': _rsqrt, 'erfc': _erfc, 'select_n': _select,
  'convert_element_type': _cast, 'broadcast_in_dim': _broadcast, 'transpose': _transpose,
}
HANDLERS: dict[str, Callable[..., Operand]] = {
  **BROADCASTING, 'reduce_sum': _reduce('ReduceSum'), 'reduce_max': _reduce('ReduceMax'), 'reshape': _reshape,
  'squeeze': _reshape, 'concatenate': _concatenate, 'slice': _slice, 'cumsum': _cumsum, 'dot_general': _dot,
  'conv_general_dilated': _conv, 'reduce_window_max': _max_pool, 'gather': _gather,
}


def _is_last_axis(array: np.ndarray) -> bool:
  return array.size == array.shape[-1] if array.ndim else False


def _int64(*rows: Sequence[int]) -> list[np.ndarray]:
  return [np.asarray([int(x) for x in row], np.int64) for row in rows]
