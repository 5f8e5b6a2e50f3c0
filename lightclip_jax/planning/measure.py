"""The plan of a training step: its memory, arithmetic, traffic and collectives, and what a chip needs for them at least."""
import dataclasses
import math
import time
from typing import Any

import jax

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.models import lightclip
from lightclip_jax.planning import hlo
from lightclip_jax.planning.chips import Chip, Topology
from lightclip_jax.training.step import Trainer, abstract_batch

SHOWN = 8          # largest arrays, and collectives, that a plan names


def make_plan(config: config_lib.Config, topology: Topology) -> dict[str, Any]:
  """JSON-able: everything that is known about one step on `topology`. Bytes and FLOPs are one device's.

  Raises:
    UserError: for a batch, mesh or model that does not fit the topology.
  """
  devices = topology.devices()
  mesh = sharding.make_mesh(config.mesh, devices)
  trainer = Trainer.create(config, mesh)
  plan = {'config': config.name, 'topology': topology.name, 'devices': len(devices), 'mesh': dict(mesh.shape),
          'batch_size': config.train.batch_size, 'accumulate': config.train.accumulate,
          'chip': dataclasses.asdict(topology.chip) if topology.chip else None,
          'formula_only': not topology.compiles}
  plan |= _state(trainer)
  plan |= _compiled(trainer) if topology.compiles else _by_formula(trainer, len(devices))
  if 'refused' in plan:
    return plan | {'verdict': {'needed': None, 'fits': False, 'text': f'does not fit: {plan["refused"]} {advice(plan)}'}}
  if plan['flops'] is None:   # GPUs' compiler counts none
    counted = Trainer.create(config, sharding.make_mesh(config.mesh, topology.stand_ins()))
    plan['flops'] = _by_formula(counted, len(devices))['flops']
  plan['roofline'] = roofline(plan, topology.chip) if topology.chip else None
  plan['verdict'] = verdict(plan, topology.chip)
  return plan


def bytes_on_one_device(tree: Any) -> int:
  """Bytes that the shardings of a tree of shapes leave on one device."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _state(trainer: Trainer) -> dict[str, Any]:
  state = trainer.abstract_state()
  inference = lightclip.inference_parameters(state.params)
  parts = {name: sum(leaf.size for leaf in jax.tree.leaves(value)) for name, value in state.params.items()}
  leaves = sorted(jax.tree_util.tree_leaves_with_path(state), key=lambda item: -item[1].size)[:SHOWN]
  return {
      'parameters': parts,
      'parameters_inference': sum(parts[name] for name in inference),
      'parameters_training_only': sum(count for name, count in parts.items() if name not in inference),
      'bytes': {'parameters': bytes_on_one_device(state.params), 'optimizer': bytes_on_one_device(state.optimizer),
                'ema': bytes_on_one_device(state.ema), 'batch_statistics': bytes_on_one_device(state.batch_stats),
                'batch': bytes_on_one_device(abstract_batch(trainer.config, trainer.mesh))},
      'largest': [{'name': sharding.path_name(path), 'shape': list(leaf.shape), 'sharding': str(leaf.sharding.spec),
                   'bytes': bytes_on_one_device(leaf)} for path, leaf in leaves]}


def _compiled(trainer: Trainer) -> dict[str, Any]:
  lowered = trainer.lower_step()
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    said = str(error).split('RESOURCE_EXHAUSTED:')[-1].strip().splitlines()[0]
    return {'refused': said, 'memory': None, 'flops': None, 'bytes_moved': None, 'main_memory_bytes': None, 'roofline': None,
            'collectives': {}}
  seconds, memory, cost = time.perf_counter() - start, compiled.memory_analysis(), compiled.cost_analysis() or {}
  try:
    text, unread = compiled.as_text(), ''
  except jax.errors.JaxRuntimeError as error:   # a libtpu that is newer than this jaxlib writes what it cannot print
    text, unread = '', str(error).splitlines()[0]
  read = hlo.main_memory_bytes(text) if text else None
  found = hlo.collectives(text)
  beside = [one for one in found if not one.in_loop]
  return {
      'compile_seconds': round(seconds, 1),
      'memory': {'arguments': memory.argument_size_in_bytes, 'outputs': memory.output_size_in_bytes,
                 'aliased': memory.alias_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
                 'code': memory.generated_code_size_in_bytes},
      'flops': cost.get('flops'), 'bytes_moved': cost.get('bytes accessed', read),
      'main_memory_bytes': read if cost else None,
      'collectives': hlo.summary(found), 'collectives_beside_loops': None if unread else len(beside),
      'collectives_unread': unread,
      'largest_collectives': [dataclasses.asdict(one) for one in
                              sorted(found, key=lambda one: -one.bytes * one.runs)[:SHOWN]]}


def _by_formula(trainer: Trainer, devices: int) -> dict[str, Any]:
  """Without a compiler: the step's operations counted before any is fused, and one gradient reduction."""
  cost, share = trainer.lower_step().cost_analysis() or {}, 1 / devices
  sizes = _state(trainer)['bytes']
  return {'flops': cost.get('flops', 0.0) * share, 'bytes_moved': None, 'main_memory_bytes': None, 'memory': None,
          'collectives': {'all-reduce': {'instructions': 1, 'runs': 1, 'bytes': sizes['parameters']}}}


def roofline(plan: dict[str, Any], chip: Chip) -> dict[str, float]:
  """The least time a step can take, in seconds: arithmetic, memory and links each at their peak, all at once.

  Memory: what goes to and from main memory; where the program cannot be read all that is moved, fast memory included. A ring
  all-reduce sends every byte about twice, the other collectives about once.
  """
  sent = sum(row['bytes'] * (2 if kind.startswith('all-reduce') else 1) for kind, row in plan['collectives'].items())
  moved = plan['main_memory_bytes'] or plan['bytes_moved'] or 0.0
  times = {'arithmetic': plan['flops'] / chip.flops, 'memory': moved / chip.bandwidth,
           'links': sent / chip.links}
  step = max(times.values())
  return times | {'step': step, 'mfu': times['arithmetic'] / step if step else 0.0,
                  'examples_per_second_per_chip': plan['batch_size'] / plan['devices'] / step if step else 0.0}


def verdict(plan: dict[str, Any], chip: Chip | None) -> dict[str, Any]:
  """Whether a step fits the chip's memory, and what to change where it does not."""
  memory = plan['memory']
  needed = (sum(plan['bytes'].values()) if memory is None else
            memory['arguments'] + memory['outputs'] - memory['aliased'] + memory['temporaries'] + memory['code'])
  if chip is None:
    return {'needed': needed, 'fits': None, 'text': 'runs in the memory of this machine'}
  fits = needed <= chip.usable * chip.memory
  text = (f'{"fits" if fits else "does not fit"}: {needed / 2**30:.2f} of {chip.memory / 2**30:.2f} GiB a chip, of which '
          f'{chip.usable:.0%} can be used')
  if memory is None:
    text += ', without activations, which only a compiler knows'
  return {'needed': needed, 'fits': fits, 'text': text if fits else f'{text}; {advice(plan)}'}


def advice(plan: dict[str, Any]) -> str:
  """What makes a step smaller."""
  return (f'try --config.train.accumulate={2 * plan["accumulate"]} (activations), --config.mesh.fsdp=8 (parameters and '
          'optimizer), or more chips')
