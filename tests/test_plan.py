"""Plans: what is read from a compiled program, the formulas, and the command."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from lightclip_jax import config as config_lib
from lightclip_jax import plan as plan_command
from lightclip_jax import sharding
from lightclip_jax.errors import UserError
from lightclip_jax.planning import hlo, measure, table
from lightclip_jax.planning.chips import CHIPS, Topology
from lightclip_jax.training.step import Trainer

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / 'tests' / 'training' / 'tiny_config.py'

TEXT = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %cps = (f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v), channel_id=1
  %cpd = f32[8]{0} collective-permute-done(%cps)
}

%unused (p: f32[4]) -> f32[4] {
  %never = f32[4] all-to-all(%p)
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"256"}}
  %ar = (f32[16]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add, metadata={op_name="jit(step)/transpose/dot"}
  %ags = ((f32[2]{0}, f32[4]{0}), (f32[16]{0}, f32[32]{0})) all-gather-start(%c, %d), dimensions={0}
  ROOT %agd = (f32[16]{0}, f32[32]{0}) all-gather-done(%ags)
}
"""


def test_a_loop_without_a_count_is_a_loop_still():
  without = TEXT.replace('"known_trip_count":{"n":"256"}', '')
  (ring,) = [one for one in hlo.collectives(without) if one.kind == 'collective-permute']
  assert ring.in_loop and ring.runs == 1
  condition = """%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(15)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY"""
  (ring,) = [one for one in hlo.collectives(without.replace('ENTRY', condition)) if one.kind == 'collective-permute']
  assert ring.in_loop and ring.runs == 15


def test_collectives_are_counted_once_with_their_loops():
  found = {one.kind: one for one in hlo.collectives(TEXT)}
  assert len(hlo.collectives(TEXT)) == len(found) == 3
  assert found['all-reduce'].bytes == 16 * 4 + 6 * 2 and found['all-reduce'].origin == 'jit(step)/transpose/dot'
  assert found['all-gather'].bytes == 48 * 4
  assert (found['collective-permute'].bytes, found['collective-permute'].runs) == (32, 256)
  assert hlo.summary(list(found.values()))['collective-permute in loops'] == dict(instructions=1, runs=256, bytes=32 * 256)


PLACED = """HloModule jit_step

%fused (x: f32[8], y: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %unseen = f32[8]{0:T(128)} negate(%x)
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %n = f32[8]{0:T(128)S(1)} negate(%p)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %b = bf16[8]{0:T(128)(2,1)S(1)} convert(%a)
  %start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[8]{0:T(128)S(1)} copy-done(%start)
  %cut = ((f32[8]{0:T(128)}), f32[2]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2]}
  %loop = f32[8]{0:T(128)} while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %pair = (f32[8]{0:T(8,128)S(1)}, f32[8]{0:T(8,128)}) fusion(%done, %b), kind=kLoop, calls=%fused
}
"""


def test_main_memory_is_told_from_fast_memory():
  convert, copied, cut, loop, fusion = 32, 32, 8, 10 * 32, 32
  assert hlo.main_memory_bytes(PLACED) == convert + copied + cut + loop + fusion


@pytest.mark.parametrize('branches', ['branch_computations={%cheap, %dear}',
                                      'true_computation=%dear, false_computation=%cheap'])
def test_of_a_conditional_the_dearest_branch_moves(branches):
  branch = '%{} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %n = f32[8]{} negate(%p)\n}}\n\n'
  both = branch.format('dear', '{0}') + branch.format('cheap', '{0:S(1)}')
  choice = f'  %choice = f32[8]{{0}} conditional(%start, %a, %a), {branches}\n}}\n'
  text = PLACED.replace('ENTRY', both + 'ENTRY').removesuffix('}\n') + choice
  assert hlo.main_memory_bytes(text) - hlo.main_memory_bytes(PLACED) == 2 * 32   # %dear's; nothing of %cheap's 32


@pytest.mark.parametrize('shape, size', [('f32[8,4]{1,0:T(8,128)}', 128), ('(pred[3], s4[4], token[])', 5), ('bf16[]', 2)])
def test_bytes_of_shapes(shape, size):
  assert hlo.shape_bytes(shape) == size


@pytest.mark.parametrize('instruction', [
    'f32[8]{0} reduce-scatter(%a)', '((f32[64]{0}), f32[8]{0}) reduce-scatter-start(f32[64]{0} %a)'])
def test_of_a_reduce_scatter_all_that_it_takes_is_sent(instruction):
  text = f'ENTRY %main (a: f32[64]) -> f32[8] {{\n  %a = f32[64]{{0}} parameter(0)\n  %rs = {instruction}, to_apply=%add\n}}\n'
  (found,) = hlo.collectives(text)
  assert (found.kind, found.bytes, found.shape) == ('reduce-scatter', 64 * 4, 'f32[64]')


def test_a_real_program_is_read():
  mesh = sharding.make_mesh(config_lib.Mesh())
  place = NamedSharding(mesh, PartitionSpec('data'))

  def step(x):
    def shift(x, _):
      return jax.lax.ppermute(x, 'data', [(i, (i + 1) % 8) for i in range(8)]) * 0.5, None
    ring = jax.shard_map(lambda x: jax.lax.scan(shift, x, length=6)[0], mesh=mesh, in_specs=PartitionSpec('data'),
                         out_specs=PartitionSpec('data'))
    return jnp.sum(ring(x))

  text = jax.jit(step).lower(jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=place)).compile().as_text()
  total = hlo.summary(hlo.collectives(text))
  assert sum(row['runs'] for kind, row in total.items() if kind.startswith('collective-permute')) == 6
  assert total['all-reduce'] == dict(instructions=1, runs=1, bytes=4)


@pytest.mark.parametrize('name, count', [('v5e:16x16', 256), ('v4:4x4x4', 64), ('cpu:8', 8), ('gpu:64', 64)])
def test_topologies(name, count):
  assert Topology.parse(name).count == count


@pytest.mark.parametrize('name', ['v5e', 'v9:2x2', 'cpu:2x2', 'v5e:16', 'v5e:0x4', 'v5e:16x16x', 'gpu:x'])
def test_topologies_that_do_not_exist(name):
  with pytest.raises(UserError, match=f'topology.*{name}'):
    Topology.parse(name)


PLAN = dict(flops=2e12, bytes_moved=8.19e9, main_memory_bytes=None, batch_size=512, devices=4, accumulate=1, bytes={},
            collectives={'all-reduce': dict(bytes=1e9), 'collective-permute in loops': dict(bytes=2e9)},
            memory=dict(arguments=10e9, outputs=4e9, aliased=3e9, temporaries=4e9, code=0.2e9))


def test_roofline_by_hand():
  best = measure.roofline(PLAN, CHIPS['v5e'])
  assert best['arithmetic'] == pytest.approx(2e12 / 197e12) and best['memory'] == pytest.approx(0.01)
  assert best['links'] == pytest.approx(4e9 / 200e9) == best['step']   # an all-reduce's bytes count twice
  assert best['examples_per_second_per_chip'] == pytest.approx(128 / 0.02)
  assert best['mfu'] == pytest.approx(best['arithmetic'] / 0.02)
  read = measure.roofline(PLAN | dict(main_memory_bytes=4.095e9), CHIPS['v5e'])
  assert read['memory'] == pytest.approx(0.005) and read['step'] == best['step']


def test_verdict_counts_donated_buffers_once_and_says_what_to_change():
  fits = measure.verdict(PLAN, CHIPS['v5e'])
  assert fits['needed'] == pytest.approx(15.2e9) and fits['fits']
  too_much = measure.verdict(PLAN | dict(memory=PLAN['memory'] | dict(temporaries=5e9)), CHIPS['v5e'])
  assert not too_much['fits'] and 'accumulate=2' in too_much['text'] and 'fsdp' in too_much['text']


@pytest.mark.parametrize('installed, compiles', [((), False), (('jax_cuda12_plugin',), True), (('jax_cuda13_plugin',), True)])
def test_gpus_are_compiled_for_where_the_plugin_is_at_hand(monkeypatch, installed, compiles):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name in installed or None)
  assert Topology.parse('gpu:8').compiles is compiles and Topology.parse('v5e:2x2').compiles


def test_a_gpu_is_not_full_of_what_jax_leaves_free():
  verdict = measure.verdict(PLAN | dict(memory=PLAN['memory'] | dict(temporaries=55e9)), CHIPS['gpu'])
  assert not verdict['fits'] and '75% can be used' in verdict['text'], 'JAX takes three quarters of a GPU when it starts'


def test_scratch_memory_of_a_library_does_not_move():
  text = """ENTRY %main (a: bf16[8,4], b: bf16[4,2]) -> f32[8,2] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,2]{1,0} parameter(1)
  %product = (f32[8,2]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  ROOT %out = f32[8,2]{1,0} get-tuple-element(%product), index=0
}
"""
  assert hlo.main_memory_bytes(text) == 2 * (8 * 4 + 4 * 2) + 4 * 8 * 2


def run(*arguments):
  environment = os.environ | {'XLA_FLAGS': '', 'PYTHONWARNINGS': 'ignore'}
  return subprocess.run([sys.executable, '-m', 'lightclip_jax.plan', *arguments], cwd=ROOT, env=environment,
                        capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(Topology.parse('gpu:4').compiles, reason='JAX with CUDA is installed')
def test_plan_by_formula(tmp_path):
  done = run(f'--config={TINY}', '--topology=gpu:4', '--config.mesh.fsdp=4', '--config.optimizer.name=adamw',
             f'--json={tmp_path / "plan.json"}')
  assert done.returncode == 0, done.stderr
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert 'BY FORMULA' in done.stdout and plan['formula_only'] and plan['roofline']['arithmetic'] > 0
  assert plan['parameters_inference'] + plan['parameters_training_only'] == sum(plan['parameters'].values())
  whole = 4 * sum(plan['parameters'].values())
  assert whole / 4 < plan['bytes']['parameters'] < 0.6 * whole, 'most bytes are divided by four, the small ones stay whole'
  assert plan['bytes']['ema'] == plan['bytes']['parameters']
  assert plan['bytes']['optimizer'] == pytest.approx(2 * plan['bytes']['parameters'], abs=64)


@pytest.mark.parametrize('arguments, part', [
    (['--config=configs/mbv2.py:yfcc15m', '--topology=v5e:banana'], 'v5e:banana'),
    ([f'--config={TINY}', '--topology=cpu:3'], '128'),
    ([f'--config={TINY}', '--topology=cpu:8', '--config.mesh.tensor=2'], '45 of'),
])
def test_bad_input_is_one_line(arguments, part):
  done = run(*arguments)
  assert done.returncode == 2 and part in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_a_missing_compiler_is_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install libtpu'):
    Topology.parse('v5e:2x2').devices()


def test_a_compiler_that_does_not_start_is_one_line(monkeypatch):
  def refuse(*_, **__):
    raise NotImplementedError('topology not implemented for cuda')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'jax_cuda13_plugin')
  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  with pytest.raises(UserError, match=f'gpu:2.*not implemented.*{jax.__version__}'):
    Topology.parse('gpu:2').devices()


def test_a_program_that_cannot_be_printed_says_so(monkeypatch):
  memory = jax.jit(lambda x: x + 1).lower(1.0).compile().memory_analysis()

  class Unprintable:
    """What compiling gives where libtpu is newer than jaxlib."""
    as_text = lambda self: (_ for _ in ()).throw(jax.errors.JaxRuntimeError('INTERNAL: no such opcode'))  # noqa: E731
    memory_analysis = lambda self: memory  # noqa: E731
    cost_analysis = lambda self: {'flops': 1.0, 'bytes accessed': 1.0}  # noqa: E731

  monkeypatch.setattr(jax.stages.Lowered, 'compile', lambda self: Unprintable())
  trainer = type('Trainer', (), {'lower_step': lambda self: jax.jit(lambda x: x).lower(1.0)})()
  found = measure._compiled(trainer)
  assert found['collectives_unread'] == 'INTERNAL: no such opcode' and found['collectives_beside_loops'] is None


def test_a_step_that_the_compiler_finds_too_large_does_not_fit(monkeypatch, tmp_path, capsys):
  def refuse(_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nLargest program: …')
  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  monkeypatch.setattr(Trainer, 'lower_step', lambda self: jax.jit(lambda x: x).lower(1.0))
  monkeypatch.setattr(Topology, 'prepare', lambda self: None)
  assert plan_command.main([f'--config={TINY}', '--topology=cpu:8', f'--json={tmp_path / "plan.json"}']) == 1
  said = json.loads((tmp_path / 'plan.json').read_text())['verdict']
  assert said['fits'] is False and 'does not fit: Ran out of memory in memory space hbm. try' in said['text']
  assert said['text'] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Topology.parse('gpu:4').compiles, reason='the compiler for GPUs is not installed')
def test_a_plan_for_gpus_without_one(tmp_path):
  done = run(f'--config={TINY}', '--topology=gpu:8', f'--json={tmp_path / "plan.json"}')
  assert done.returncode == 0, done.stderr
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert not plan['formula_only'] and plan['memory']['temporaries'] > 0 and plan['bytes_moved'] > 0 and plan['flops'] > 0
  assert any(kind.startswith('collective-permute') for kind in plan['collectives']), 'the loss travels a ring'
  assert not any(kind.startswith('all-gather') for kind in plan['collectives'])


@pytest.mark.slow
def test_the_plan_of_the_step_that_trains(monkeypatch):
  monkeypatch.syspath_prepend(str(TINY.parent))
  import tiny  # the very step that the tests of training compile, which is in the cache then
  plan = measure.make_plan(tiny.TINY, Topology.parse('cpu:8'))
  assert plan['memory']['temporaries'] > 0 and plan['flops'] > 0 and plan['verdict']['fits'] is None
  assert any(kind.startswith('collective-permute') for kind in plan['collectives']), 'the loss travels a ring'
  assert not any(kind.startswith('all-gather') for kind in plan['collectives'])
  assert 'compiled in' in table.format_plan(plan) and json.dumps(plan)
