"""A plan as text."""
from collections.abc import Iterator
from typing import Any

from lightclip_jax.planning import chips


def format_plan(plan: dict[str, Any]) -> str:
  """The table that a person reads; the JSON holds more digits."""
  return '\n'.join(f'{name:<24} {value}'.rstrip() for name, value in _rows(plan))


def _rows(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
  mesh = ' × '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
  yield f'{plan["config"]}', f'on {plan["topology"]}: {plan["devices"]} devices, {mesh}, global batch {plan["batch_size"]:,}'
  if plan['formula_only']:
    yield '', ('BY FORMULA: nothing was compiled; memory of activations, traffic and fusions are not known. The compiler, '
               f'which needs no GPU: {chips.how_to_get_the_gpu_compiler()}')
  yield 'parameters', (f'{plan["parameters_inference"]:,} at inference, {plan["parameters_training_only"]:,} more in training '
                       f'({", ".join(f"{name} {count:,}" for name, count in plan["parameters"].items())})')
  yield 'state, a device', ', '.join(f'{name} {_size(size)}' for name, size in plan['bytes'].items())
  if plan['memory']:
    yield 'memory, a device', ', '.join(f'{name} {_size(size)}' for name, size in plan['memory'].items())
  yield 'verdict', plan['verdict']['text']
  if plan['flops'] is not None:   # else the compiler has refused, and counted nothing
    yield 'work, a step and device', f'{plan["flops"] / 1e12:.3f} TFLOP' + _traffic(plan)
    if plan['accumulate'] > 1:
      yield '', (f'AT LEAST: of the {plan["accumulate"]} micro-batches the work of one is counted, here and in the roofline; '
                 '--config.train.accumulate=1 counts all')
  yield from _roofline_rows(plan)
  for kind, row in plan['collectives'].items():
    yield kind, f'{row["instructions"]} instructions, {row["runs"]} runs and {_size(row["bytes"])} a step'
  if plan.get('collectives_unread'):
    yield 'collectives', (f'NOT READ, and not in the roofline, which takes fast memory for main memory: jaxlib cannot print '
                          f'this program ({plan["collectives_unread"]})')
  for one in plan.get('largest_collectives', ()):
    yield '', f'{one["kind"]} × {one["runs"]} of {_size(one["bytes"])}: {one["shape"][:60]} {one["origin"][-80:]}'
  for leaf in plan['largest']:
    yield 'large array', f'{leaf["name"]} {tuple(leaf["shape"])} {leaf["sharding"]}, {_size(leaf["bytes"])} a device'
  if 'compile_seconds' in plan:
    yield 'compiled in', f'{plan["compile_seconds"]} s'


def _traffic(plan: dict[str, Any]) -> str:
  amounts = {'moved': plan['bytes_moved'], 'of it to and from main memory': plan['main_memory_bytes']}
  return ''.join(f', {size / 1e9:.1f} GB {what}' for what, size in amounts.items() if size)


def _roofline_rows(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
  best, chip = plan['roofline'], plan['chip']
  if not best:
    return
  yield 'peaks', (f'{chip["name"]}: {chip["flops"] / 1e12:.0f} TFLOP/s, {chip["bandwidth"] / 1e9:.0f} GB/s, links '
                  f'{chip["links"] / 1e9:.0f} GB/s ({chip["source"]})')
  parts = ', '.join(f'{name} {1e3 * best[name]:.2f} ms' for name in ('arithmetic', 'memory', 'links'))
  yield 'roofline', (f'a step takes at least {1e3 * best["step"]:.2f} ms ({parts}); at most '
                     f'{best["examples_per_second_per_chip"]:,.0f} examples/s/chip, MFU {best["mfu"]:.0%}')


def _size(size: int) -> str:
  """Bytes as B, KiB, MiB or GiB."""
  value, unit = float(size), 'B'
  for larger in ('KiB', 'MiB', 'GiB'):
    if value < 1024:
      break
    value, unit = value / 1024, larger
  return f'{value:.0f} {unit}' if unit == 'B' else f'{value:.2f} {unit}'
