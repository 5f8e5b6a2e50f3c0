"""How processes find each other, what they do alone, and how they end when one of them is gone."""
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, storage
from lightclip_jax.config import Config
from lightclip_jax.errors import UserError
from lightclip_jax.training import checks

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
    (dict(TPU_PROCESS_ADDRESSES='a:8476,b:8476'), {}),
    (dict(TPU_WORKER_HOSTNAMES='localhost', MEGASCALE_NUM_SLICES='2'), {}),
    (dict(TPU_WORKER_HOSTNAMES='localhost', TPU_ML_PLATFORM='JAX'), None),
    (dict(TPU_ML_PLATFORM='JAX'), {}),
    (dict(TPU_ML_PLATFORM='JAX', TPU_SKIP_MDS_QUERY='1'), None),
])
def test_what_the_environment_says(environment, found):
  assert distributed.find(environment) == found


@pytest.mark.parametrize('device', ['0x005e', '0x0063', '0x006f'])   # a v4, whose files are /dev/accel*, a v5e and a v6e
def test_a_cloud_tpu_is_found_by_its_chips(monkeypatch, tmp_path, device):
  # JAX marks the environment when it is imported; this is that part of it, with chips that are not there.
  chip = tmp_path / 'sys' / 'chip'
  chip.mkdir(parents=True)
  (chip / 'vendor').write_text('0x1ae0\n')
  (chip / 'device').write_text(f'{device}\n')
  script = (f'import glob, os, sys, types\nfind = glob.glob\nsys.modules["libtpu"] = types.SimpleNamespace('
            f'get_library_path=lambda: "{tmp_path}/libtpu.so")\n'
            f'glob.glob = lambda name, *a, **k: ["{chip}/vendor"] if name.startswith("/sys/bus/pci") else find(name, *a, **k)\n'
            'from lightclip_jax import distributed\nprint(distributed.find(os.environ))')
  clean = {name: value for name, value in os.environ.items() if not name.startswith(('TPU_', 'JAX_'))}
  said = subprocess.run([sys.executable, '-c', script], env=clean, text=True, capture_output=True)
  assert said.stdout == '{}\n', said.stderr


@pytest.mark.parametrize('nodes, first', [('a', 'a'), ('a,b', 'a'), ('gpu[03-05,9]', 'gpu03'), ('n[7,9],m1', 'n7'),
                                          ('head,gpu[1-2]', 'head')])
def test_the_first_node_of_a_list(nodes, first):
  assert distributed.find(SLURM | dict(SLURM_STEP_NODELIST=nodes))['coordinator_address'].startswith(f'{first}:')


def test_a_job_of_several_tasks_needs_srun():
  with pytest.raises(UserError, match='SLURM_NTASKS is 2, .*srun'):
    distributed.find({name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NODELIST'})


CONNECTS = '''
import json, os, sys, jax
from jax._src import distributed as inner
from lightclip_jax import distributed
def stop(*_, **__):
  raise RuntimeError(jax.config._read('jax_cuda_visible_devices'))
inner._jax = type('Connections', (), dict(get_distributed_runtime_service=stop, get_distributed_runtime_client=stop))
clean = dict(os.environ)
for environment in json.loads(sys.argv[1]):
  os.environ.clear()
  os.environ.update(clean | environment)
  jax.config.update('jax_cuda_visible_devices', 'all')
  try:
    distributed.initialize()
  except distributed.UserError as error:
    print(error.__cause__)
'''


def test_a_task_of_slurm_takes_all_gpus_of_its_node():
  """What JAX itself has set when it is about to connect."""
  alone = SLURM | dict(SLURM_LOCALID='0', SLURM_STEP_TASKS_PER_NODE='1(x2)')
  environments, devices = zip(
      (alone, 'all'), (alone | PLAIN, 'all'), (alone | dict(JAX_LOCAL_DEVICE_IDS='2,3'), '2,3'),
      (alone | dict(SLURM_LOCALID='1', SLURM_STEP_TASKS_PER_NODE='2'), '1'), strict=True)
  clean = {name: value for name, value in os.environ.items() if not name.startswith(('TPU_', 'JAX_', 'SLURM_'))}
  done = subprocess.run([sys.executable, '-c', CONNECTS, json.dumps(environments)], env=clean, text=True,
                        capture_output=True)
  assert done.stdout.split() == [*devices], done.stderr


@pytest.mark.parametrize('changes, part', [
    (dict(JAX_PROCESS_ID=''), 'JAX_PROCESS_ID is not set'), (dict(JAX_PROCESS_ID='4'), "'4'"),
    (dict(JAX_NUM_PROCESSES='two'), "'two'"), (dict(JAX_COORDINATOR_ADDRESS='host'), 'HOST:PORT')])
def test_settings_that_do_not_fit(changes, part):
  with pytest.raises(UserError, match=part):
    distributed.find(PLAIN | changes)


def test_failing_to_start_gives_advice(monkeypatch):
  def refuse(**arguments):
    assert arguments['initialization_timeout'] > 7, 'who is late is told by us'
    raise RuntimeError('DEADLINE_EXCEEDED: Barrier timed out\nmore')
  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  for name, value in (PLAIN | dict(LIGHTCLIP_START_TIMEOUT='7')).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match='process 3 of 4 waited 7 s .*10.0.0.1:1234.*same command on every host') as error:
    distributed.initialize()
  assert '\n' not in str(error.value)


def test_who_waits_in_vain_says_so(monkeypatch, capsys):
  ended = threading.Event()
  monkeypatch.setattr(distributed.os, '_exit', lambda code: code == distributed.EXIT_LOST and ended.set())
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **arguments: ended.wait(10))
  for name, value in (PLAIN | dict(LIGHTCLIP_START_TIMEOUT='1')).items():
    monkeypatch.setenv(name, value)
  distributed.initialize()
  said = capsys.readouterr().err
  assert ended.is_set() and said.startswith('error: process 3 of 4 waited 1 s ') and said.count('\n') == 1
  monkeypatch.setenv('LIGHTCLIP_START_TIMEOUT', '5m')
  with pytest.raises(UserError, match="LIGHTCLIP_START_TIMEOUT is '5m'"):
    distributed.initialize()


def test_one_process_needs_nobody(capsys):
  assert distributed.agree(3, True, False) == (True, False)
  distributed.say('alone')
  assert capsys.readouterr().out == 'alone\n'
  with distributed.first_alone('x'), pytest.raises(jax.errors.JaxRuntimeError):
    with distributed.ending_with_the_others():
      raise jax.errors.JaxRuntimeError('its own failure')


@pytest.fixture
def one_of_two(monkeypatch):
  """(process, what process 0 reports) -> the meetings of that process, as they come."""
  def make(process, *reported):
    met = []
    answer = lambda flags: met.append(flags.tolist()) or np.array([reported or flags, flags])  # noqa: E731
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    monkeypatch.setattr(distributed.multihost_utils, 'sync_global_devices', met.append)
    monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', answer)
    return met
  return make


def test_all_meet_before_the_first_works_alone(one_of_two):
  """CPUs, which have not met, wait 30 s for each other: a data set takes longer to make."""
  for process, meetings in ((0, ['data', 'body', [False]]), (1, ['data', [False], 'body'])):
    met = one_of_two(process)
    with distributed.first_alone('data'):
      met.append('body')
    assert met == meetings


def test_the_mistake_of_the_first_ends_all(one_of_two):
  met = one_of_two(0)
  with pytest.raises(UserError, match='no such data'), distributed.first_alone('data'):
    raise UserError('no such data')
  assert met == ['data', [True]]
  one_of_two(1, True)
  with pytest.raises(UserError, match='process 0 has found a mistake .data.'), distributed.first_alone('data'):
    pytest.fail('what the first could not make is not to be made by the others')


@pytest.mark.parametrize('error', [jax.errors.JaxRuntimeError('INTERNAL: gone'), ValueError('UNKNOWN: Gloo AllGather failed')])
def test_a_lost_process_is_one_line_whichever_way_jax_says_it(monkeypatch, capsys, error):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed.os, '_exit', lambda code: (_ for _ in ()).throw(SystemExit(code)))
  with pytest.raises(SystemExit) as ended, distributed.ending_with_the_others():
    raise error
  said = capsys.readouterr().err
  assert ended.value.code == distributed.EXIT_LOST and 'lost another process of 2' in said and said.count('\n') == 1
  with pytest.raises(ValueError, match='its own'), distributed.ending_with_the_others():
    raise ValueError('its own')


@pytest.mark.parametrize('count', [1, 2])
def test_a_memory_that_is_full_is_no_lost_process(monkeypatch, count):
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  too_much = jax.jit(lambda: jnp.zeros((1 << 25, 1 << 25)))   # a real one: no machine has four petabytes
  with pytest.raises(UserError, match='too little memory .*train.accumulate'), distributed.ending_with_the_others():
    too_much().block_until_ready()


def test_a_mistake_that_one_process_finds_keeps_its_code(monkeypatch):
  """JAX waits at the end for the others, which do not come, and aborts."""
  left = threading.Event()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed, '_LEAVE_SECONDS', 0)
  monkeypatch.setattr(distributed.os, '_exit', lambda code: code == 2 and left.set())
  with pytest.raises(UserError, match='no such data'), distributed.keeping_its_code():
    raise UserError('no such data')
  assert left.wait(10)


def test_processes_with_different_configs_all_say_which_option(monkeypatch):
  """As two of them gather: what comes from the other one is as long as the longer of both."""
  other = config_lib.replace(Config(), name='é', train=dict(steps=5))
  texts = [json.dumps(dataclasses.asdict(config)).encode() for config in (Config(), other)]

  def gather(own):
    if own.ndim == 0:
      return np.array([len(text) for text in texts])
    return np.stack([np.frombuffer(text.ljust(len(own), b'\0'), np.uint8) for text in texts])

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', gather)
  said = "name 'lightclip' in process 0, 'é' in process 1, train.steps .* 5 in process 1.*every host"
  for config in (Config(), other):
    with pytest.raises(UserError, match=said):
      checks.check_same_everywhere(config)
  texts[1] = texts[0]
  checks.check_same_everywhere(Config())


@pytest.mark.parametrize('own, said', [('shared', ''), ('other', "process 1 does not find in its workdir '.*other'")])
def test_processes_with_workdirs_of_their_own_are_told(monkeypatch, tmp_path, own, said):
  """As process 1 sees it: each would save its own half of every checkpoint, and none could be restored."""
  for name in ('shared', 'other'):
    (tmp_path / name).mkdir()
  (tmp_path / 'shared' / 'shared-token').touch()   # what process 0 has written
  answers = iter([lambda text: ['token', text], lambda text: ['', text]])
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(storage, 'WAITS', (0.01,))
  monkeypatch.setattr(distributed, 'first_alone', contextlib.nullcontext)
  monkeypatch.setattr(distributed, 'texts_of_all', lambda text: next(answers)(text))
  with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
    checks.check_shared(tmp_path / own)


def work():
  """Adds over all processes for ever, once they agree on what they say."""
  distributed.initialize()
  own = jax.process_index() == 1
  with distributed.first_alone('start'):
    distributed.say('one voice')
  assert distributed.agree(10, own, False) == (True, False) and distributed.agree(11, own) == (False,)
  place = NamedSharding(Mesh(np.asarray(jax.devices()), ('data',)), PartitionSpec('data'))
  add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(place.mesh, PartitionSpec()))
  with distributed.ending_with_the_others():
    while True:
      total = float(add(jax.make_array_from_process_local_data(place, np.ones(1, np.float32))))
      print(f'working {total}', flush=True)
      time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_a_process_ends_soon_after_another_is_killed(lost):
  both = workers.start(__file__)
  try:
    said = [[line for line, _ in zip(iter(worker.stdout.readline, ''), range(6), strict=False)] for worker in both]
    assert ['one voice\n' in lines for lines in said] == [True, False] and all('working 2.0\n' in lines for lines in said)
    both[lost].send_signal(signal.SIGKILL)
    start = time.monotonic()
    said = both[1 - lost].communicate(timeout=120)[1]
    assert time.monotonic() - start < 60 and both[1 - lost].returncode != 0
    assert 'lost another process' in said or 'another task died' in said, said
  finally:
    for worker in both:
      worker.kill()
      worker.communicate()


if __name__ == '__main__':
  work()
