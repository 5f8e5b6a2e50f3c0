"""How processes find each other, and what they do alone."""
import socket

import jax
import pytest

from lightclip_jax import distributed
from lightclip_jax.errors import UserError

PLAIN = dict(JAX_COORDINATOR_ADDRESS='10.0.0.1:1234', JAX_NUM_PROCESSES='4', JAX_PROCESS_ID='3')
SLURM = dict(SLURM_JOB_ID='4097', SLURM_NTASKS='2', SLURM_PROCID='1', SLURM_STEP_NODELIST='gpu[03-04]')


@pytest.mark.parametrize('environment, found', [
    ({}, None),
    (PLAIN, dict(coordinator_address='10.0.0.1:1234', num_processes=4, process_id=3)),
    (SLURM, dict(coordinator_address='gpu03:12322', num_processes=2, process_id=1)),
    (SLURM | PLAIN, dict(coordinator_address='10.0.0.1:1234', num_processes=4, process_id=3)),
    (SLURM | dict(SLURM_NTASKS='1'), None),
    (dict(TPU_WORKER_HOSTNAMES='a,b'), {}),
    (dict(TPU_WORKER_HOSTNAMES='localhost'), None),
])
def test_what_the_environment_says(monkeypatch, environment, found):
  monkeypatch.setattr(distributed.glob, 'glob', lambda pattern: [])
  assert distributed.find(environment) == found


@pytest.mark.parametrize('nodes, first', [('a', 'a'), ('a,b', 'a'), ('gpu[03-05,9]', 'gpu03'), ('n[7,9],m1', 'n7'),
                                          ('head,gpu[1-2]', 'head')])
def test_the_first_node_of_a_list(nodes, first):
  assert distributed.find(SLURM | dict(SLURM_STEP_NODELIST=nodes))['coordinator_address'].startswith(f'{first}:')


@pytest.mark.parametrize('changes, part', [
    (dict(JAX_PROCESS_ID=''), 'JAX_PROCESS_ID is not set'), (dict(JAX_PROCESS_ID='4'), "'4'"),
    (dict(JAX_NUM_PROCESSES='two'), "'two'"), (dict(JAX_COORDINATOR_ADDRESS='host'), 'HOST:PORT')])
def test_settings_that_do_not_fit(changes, part):
  with pytest.raises(UserError, match=part):
    distributed.find(PLAIN | changes)


def test_failing_to_start_gives_advice(monkeypatch):
  def refuse(**arguments):
    assert arguments['initialization_timeout'] == 7
    raise RuntimeError('DEADLINE_EXCEEDED: Barrier timed out\nmore')
  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  for name, value in (PLAIN | dict(LIGHTCLIP_START_TIMEOUT='7')).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match='process 3 of 4 waited 7 s .*10.0.0.1:1234.*same command on every host') as error:
    distributed.initialize()
  assert '\n' not in str(error.value)


def test_one_process_needs_nobody(capsys):
  assert distributed.agree(3, True, False) == (True, False)
  distributed.say(socket.__name__)
  assert capsys.readouterr().out == 'socket\n'
  with distributed.first_alone('x'), pytest.raises(jax.errors.JaxRuntimeError):
    with distributed.ending_with_the_others():
      raise jax.errors.JaxRuntimeError('its own failure')
