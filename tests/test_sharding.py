import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.errors import UserError
from lightclip_jax.sharding import Rule


def mesh_of(**sizes):
  return sharding.make_mesh(config_lib.Mesh(**sizes))


def test_mesh_fills_what_is_left():
  assert dict(mesh_of().shape) == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert dict(mesh_of(data=-1, fsdp=2, tensor=2).shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert sharding.batch_shards(mesh_of(fsdp=2, tensor=2)) == 4


@pytest.mark.parametrize('sizes, part', [(dict(data=3), '8 devices'), (dict(data=-1, fsdp=-1), 'one alone'),
                                         (dict(data=-1, fsdp=3), '8 devices'), (dict(data=0), 'at least 1')])
def test_mesh_that_does_not_fit(sizes, part):
  with pytest.raises(UserError, match=part):
    mesh_of(**sizes)


def test_rules_are_tried_in_order_and_must_cover():
  tree = {'text': {'embedding': jnp.zeros((16, 4)), 'bias': jnp.zeros(3)}, 'scale': jnp.zeros(())}
  rules = (Rule('embedding$', ('vocabulary',)), Rule('.*'))
  placed = sharding.tree_shardings(tree, mesh_of(tensor=2), rules)
  assert placed['text']['embedding'].spec == PartitionSpec('tensor')
  assert placed['text']['bias'].spec == PartitionSpec() == placed['scale'].spec


@pytest.mark.parametrize('rule, part', [
    (Rule('embedding$', ('vocabulary',)), "no sharding rule covers 'text/bias'.*\\(3,\\)"),
    (Rule('.*', ('vocabulary',)), "3 of 'text/bias'.*mesh.tensor=2"),
    (Rule('.*', ('vocabulary', 'hidden')), 'does not fit .text/bias'),
    (Rule('bias|table', (None, None)), 'does not fit .text/bias'),
])
def test_rules_that_do_not_fit_name_the_parameter(rule, part):
  with pytest.raises(UserError, match=part):
    sharding.tree_shardings({'text': {'bias': jnp.zeros(3)}}, mesh_of(tensor=2), (rule,))


def test_one_mesh_axis_cannot_split_a_parameter_twice():
  with pytest.raises(UserError, match="does not fit 'kernel'"):
    sharding.tree_shardings({'kernel': jnp.zeros((4, 4))}, mesh_of(tensor=2), (Rule('.*', ('vocabulary', 'hidden')),))


def test_fsdp_splits_the_largest_dimension_that_is_left():
  shapes = {'table': (4096, 512), 'square': (64, 4098), 'small': (8, 8), 'odd': (4097, 3)}
  tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  placed = sharding.tree_shardings(tree, mesh_of(fsdp=4, tensor=2), (Rule('table', ('vocabulary',)), Rule('.*')))
  specs = {name: tuple(place.spec) for name, place in placed.items()}
  assert specs == {'table': ('tensor', 'fsdp'), 'square': ('fsdp',), 'small': (), 'odd': ()}


def test_moments_and_averages_live_where_their_parameters_do():
  params = {'text': {'kernel': jnp.zeros((64, 128)), 'bias': jnp.zeros(128)}}
  mesh = mesh_of(fsdp=4)
  places = sharding.tree_shardings(params, mesh, (Rule('.*'),))
  state = {'optimizer': [optax.adam(1e-3).init(params), {'text': {'kernel': jnp.zeros(64)}}], 'ema': params}
  followed = sharding.follow(state, params, places, mesh)
  for tree in (followed['ema'], followed['optimizer'][0][0].mu, followed['optimizer'][0][0].nu):
    assert tree['text']['kernel'].spec == PartitionSpec(None, 'fsdp') and tree['text']['bias'].spec == PartitionSpec()
  assert followed['optimizer'][1]['text']['kernel'].spec == PartitionSpec(), 'a factor of another shape is no copy'


Device = collections.namedtuple('Device', 'id process_index')


def shares_of(monkeypatch, process_of, processes, **sizes):
  """Each process's share of the batch, where of eight devices each belongs to the process `process_of(its number)`."""
  mesh = mesh_of(**sizes)
  rows = {Device(device.id, process_of(device.id)): part
          for device, part in sharding.batch_sharding(mesh).devices_indices_map((8,)).items()}
  place = types.SimpleNamespace(mesh=mesh, devices_indices_map=lambda shape: rows)
  for process in range(processes):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    yield sharding.process_share(place)


def test_processes_feed_the_rows_that_their_devices_hold(monkeypatch):
  assert [*shares_of(monkeypatch, lambda i: 0, 1, fsdp=2)] == [(0, 1)]
  assert [*shares_of(monkeypatch, lambda i: i // 4, 2, fsdp=2, tensor=2)] == [(0, 2), (1, 2)]
  assert [*shares_of(monkeypatch, lambda i: 1 - i // 4, 2)] == [(1, 2), (0, 2)], 'the mesh says who is first'
  assert [*shares_of(monkeypatch, lambda i: i // 2, 4, tensor=4)] == [(0, 2), (0, 2), (1, 2), (1, 2)], 'copies'
  with pytest.raises(UserError, match="'tensor': 2.*each other's"):
    [*shares_of(monkeypatch, lambda i: (i + 1) % 8 // 2, 4, tensor=2)]


@pytest.mark.parametrize('count', [1, 2, 4])
def test_micro_batches_keep_runs_and_move_nothing(count):
  mesh = mesh_of()
  x = jax.device_put(jnp.arange(64 * 3).reshape(64, 3), sharding.batch_sharding(mesh))
  split = jax.jit(lambda x: sharding.to_micro_batches(x, count, mesh))
  back = jax.jit(lambda x: sharding.from_micro_batches(sharding.to_micro_batches(x, count, mesh), mesh))
  assert split(x).shape == (count, 64 // count, 3)
  runs = np.asarray(split(x))[:, :, 0].reshape(-1, 64 // count // 8) // 3
  assert (np.diff(runs, axis=1) == 1).all(), 'a device must cut its share into contiguous runs'
  np.testing.assert_array_equal(back(x), x)
  hlo = split.lower(x).compile().as_text()
  assert not any(name in hlo for name in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce'))
