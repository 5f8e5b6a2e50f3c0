"""Reads a compiled program's text: which collectives it has, what they carry, how often they run; what goes to main memory.

A loop's body runs as often as the compiler says (`known_trip_count`) or its condition compares with; else it counts as once,
so that runs and bytes of loops are at least what is said.
"""
import collections
import dataclasses
import math
import re

KINDS = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter', 'ragged-all-to-all')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_CALLED = re.compile(r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_CONTROL = re.compile(r' (while|conditional|call)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_MEMORY = re.compile(r'\b[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?')
_MOVES = ('copy-start', 'slice-start')   # from one memory to another, while other instructions run
_MOVE_NOTHING = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call')
_BITS = {'pred': 8, 's4': 4, 'u4': 4}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction. `bytes`: what it leaves on one device each time it runs; a reduce-scatter what it takes, since it sends
  that and leaves a part."""
  kind: str
  bytes: int
  runs: int
  shape: str
  origin: str       # the operation in the source that it comes from
  in_loop: bool


def collectives(text: str) -> list[Collective]:
  """Every collective of an optimised HLO module, those that start and finish apart counted once."""
  computations, entry = _split(text)
  runs, looped = _runs(computations, entry)
  out = []
  for name, lines in computations.items():
    shapes: dict[str, str] = {}
    for line in lines:
      found = _INSTRUCTION.match(line)
      if not found:
        continue
      shapes[found[1]], kind = found[2], found[3].removesuffix('-start')
      if kind in KINDS and name in runs:
        shape = _result_of(found[2]) if found[3] in ('all-gather-start', 'collective-permute-start') else found[2]
        if kind == 'reduce-scatter':
          shape = ', '.join(_operands(line, found, shapes))
        origin = re.search(r'op_name="([^"]*)"', line)
        short = re.sub(r'\{[^}]*\}|\s', '', shape)
        out.append(Collective(kind, shape_bytes(shape), runs[name], short, origin[1] if origin else '', name in looped))
  return out


def shape_bytes(shape: str) -> int:
  """Bytes of "f32[8,4]" or of a tuple of such; what has no size (tokens) counts nothing."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    width = re.search(r'\d+', dtype)
    bits = _BITS.get(dtype) or (int(width[0]) if width else 0)
    total += math.prod(int(d) for d in dims.split(',') if d) * bits // 8
  return total


def main_memory_bytes(text: str) -> int:
  """Bytes that a step reads from and writes to main memory, about: arrays that the compiler keeps in a TPU's fast memory (S(1))
  count only where they come from main memory, or go there. A conditional counts as its dearest branch; caches save nothing."""
  computations, entry = _split(text)
  return _moved(entry, computations)


def _moved(name: str, computations: dict[str, list[str]]) -> int:
  lines = computations.get(name, [])
  total = _main_bytes(lines)
  for line in lines:
    kind = _CONTROL.search(line)
    inside = [_moved(one, computations) for one in _called(line)] if kind else []   # a fusion's insides move nothing
    if inside:
      total += max(inside) if kind[1] == 'conditional' else sum(inside) * _trips(line, computations)
  return total


def _main_bytes(lines: list[str]) -> int:
  shapes, total = {}, 0
  for line in lines:
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    shapes[found[1]], result, operation = found[2], found[2], found[3]
    if operation in _MOVE_NOTHING or operation.endswith('-done'):
      continue
    operands = _operands(line, found, shapes)
    if operation in _MOVES:
      moved = _parts(result)[0 if operation == 'copy-start' else 1]
      total += shape_bytes(moved) * sum(_in_main(shape) > 0 for shape in (moved, operands[0]))
    else:
      result = _parts(result)[0] if ' custom_call_target="__cu' in line else result   # without its scratch memory
      total += sum(map(_in_main, [result, *operands]))
  return total


def _operands(line: str, found: re.Match[str], shapes: dict[str, str]) -> list[str]:
  """The shapes of what an instruction takes, by those of the lines above it; '' where they say nothing."""
  return [shapes.get(name, '') for name in re.findall(r'%([\w.\-]+)', line[found.end():].split('), ')[0])]


def _in_main(shape: str) -> int:
  return sum(shape_bytes(array) for array in _MEMORY.findall(shape) if 'S(1)' not in array)


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
  """By kind, loops apart: instructions, runs a step, and bytes a step on one device."""
  out: dict[str, dict[str, int]] = {}
  for one in found:
    row = out.setdefault(one.kind + (' in loops' if one.in_loop else ''), collections.Counter())
    row.update(instructions=1, runs=one.runs, bytes=one.bytes * one.runs)
  return {kind: dict(row) for kind, row in sorted(out.items())}


def _result_of(shape: str) -> str:
  """The results in the tuple (operands, results, contexts…) of a collective that starts here and finishes elsewhere."""
  parts = _parts(shape)
  return parts[1] if len(parts) > 1 else shape


def _parts(shape: str) -> list[str]:
  """The elements of a tuple shape's outermost level."""
  if not shape.startswith('('):
    return [shape]
  out, depth, start = [], 0, 1
  for i, character in enumerate(shape):
    depth += (character in '({[') - (character in ')}]')
    if depth == 0 or (depth == 1 and character == ','):
      out.append(shape[start:i].strip())
      start = i + 1
  return out


def _split(text: str) -> tuple[dict[str, list[str]], str]:
  computations: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      lines = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], set[str]]:
  """How often each computation that is reached from the entry runs a step, and those that are inside a loop."""
  runs, looped, waiting = {entry: 1}, set(), [entry]
  while waiting:
    caller = waiting.pop()
    for line in computations.get(caller, ()):
      loop = ' while(' in line
      for name in _called(line):
        if name in computations and name not in runs:
          runs[name] = runs[caller] * _trips(line, computations)
          waiting.append(name)
          if loop or caller in looped:
            looped.add(name)
  return runs, looped


def _called(line: str) -> list[str]:
  """The computations that an instruction names."""
  branches = (name.strip().lstrip('%') for names in _BRANCHES.findall(line) for name in names.split(','))
  return [*_CALLED.findall(line), *branches]


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """How often what an instruction calls runs: a loop's body several times; once where that cannot be read."""
  if ' while(' not in line:
    return 1
  known = re.search(r'known_trip_count[^\d}]*(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', line)
  limits = re.findall(r's32\[\]\S* constant\((\d+)\)', '\n'.join(computations.get(condition[1], ())))
  return max(1, int(limits[0])) if len(limits) == 1 else 1
