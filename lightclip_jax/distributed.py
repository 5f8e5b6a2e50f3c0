"""Several processes as one run: how they find each other, agree, and end when one of them is gone.

A process is one host of a TPU slice, one task of SLURM, or one of several on a single machine.
"""
import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lightclip_jax.errors import UserError

EXIT_LOST = 76          # EX_PROTOCOL: another process is gone; nothing was saved, start all of them again
AGREE_EVERY = 10        # steps between questions to all processes: each waits for the slowest
HEARTBEAT_SECONDS = 20  # after which a silent process counts as dead
_PLAIN = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_PORT = 12_321
_STATUS = re.compile(r'(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ')
_MEMORY = 'RESOURCE_EXHAUSTED: '   # the runtime's status where a device's memory is full
_LEAVE_SECONDS = 10   # for which a process that has found a mistake waits for the others to end with it


def find(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments for `jax.distributed.initialize` from environment variables; None for one process alone.

  In this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; SLURM's (one task a node, or one a GPU); a TPU
  slice's, whose hosts JAX itself finds (no arguments).

  Raises:
    UserError: if some of the three are set and others not, or one is not a number that fits; in a job of several tasks without
      srun.
  """
  if any(name in environment for name in _PLAIN):
    return _plain(environment)
  if int(environment.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_PROCID' in environment:
    if 'SLURM_STEP_NODELIST' not in environment:   # the batch script itself
      raise UserError(f'SLURM_NTASKS is {environment["SLURM_NTASKS"]}, but this is no process of srun; use srun python …')
    first = _first_node(environment['SLURM_STEP_NODELIST'])
    return dict(coordinator_address=f'{first}:{_PORT + int(environment["SLURM_JOB_ID"]) % 4096}',
                num_processes=int(environment['SLURM_NTASKS']), process_id=int(environment['SLURM_PROCID']))
  return {} if _is_slice(environment) else None


def _is_slice(environment: Mapping[str, str]) -> bool:
  """Whether this is a host of a TPU slice, whose hosts JAX finds: GKE names them here, a Cloud TPU VM in its metadata.

  Device files do not tell: v4's are /dev/accel0 and so on, v5e's and later ones' are VFIO's. JAX itself, when it was imported,
  has looked for chips: it sets TPU_ML_PLATFORM where it found some, and TPU_SKIP_MDS_QUERY where there are no metadata to ask.
  """
  hosts = environment.get('TPU_PROCESS_ADDRESSES', environment.get('TPU_WORKER_HOSTNAMES'))
  if hosts:
    return ',' in hosts or environment.get('MEGASCALE_NUM_SLICES', '1') != '1'
  return 'TPU_ML_PLATFORM' in environment and 'TPU_SKIP_MDS_QUERY' not in environment


def _plain(environment: Mapping[str, str]) -> dict[str, Any]:
  missing = [name for name in _PLAIN if not environment.get(name)]
  if missing:
    raise UserError(f'{", ".join(missing)} is not set; several processes need all of {", ".join(_PLAIN)}')
  address, count, index = (environment[name] for name in _PLAIN)
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise UserError(f'JAX_PROCESS_ID is {index!r} and JAX_NUM_PROCESSES {count!r}; '
                    'the first must be a number from 0 to one below the second')
  if not address.rpartition(':')[2].isdecimal():
    raise UserError(f'JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of process 0')
  return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))


def _first_node(nodes: str) -> str:
  """The first host of SLURM's "gpu[03-05,9],login": "gpu03"."""
  prefix, bracket, rest = nodes.partition('[')
  if not bracket or ',' in prefix:
    return nodes.split(',')[0]
  return prefix + rest.split(']')[0].split(',')[0].split('-')[0]


def initialize(timeout: int | None = None) -> None:
  """Joins the other processes, if the environment names any; ends with `EXIT_LOST` and a line if they do not all come in time.

  Must come before JAX is first used.

  Args:
    timeout: seconds to wait for the others; None: $LIGHTCLIP_START_TIMEOUT, else 300.

  Raises:
    UserError: if they cannot be waited for.
  """
  arguments = find(os.environ)
  if arguments is None or arguments.get('num_processes') == 1:
    return
  # JAX would look at SLURM's variables all the same, and give each task one GPU, by its number on the node: seven of a node's
  # eight would stay idle. JAX_LOCAL_DEVICE_IDS counts in either case.
  detection = None if not arguments or _shares_its_node(os.environ) else 'deactivate'
  seconds = _start_timeout(os.environ) if timeout is None else timeout
  advice = (f'process {arguments.get("process_id", "?")} of {arguments.get("num_processes", "?")} waited {seconds} s for the '
            f'others at {arguments.get("coordinator_address", "their addresses")}: start the same command on every host, open '
            'that port between them, and set LIGHTCLIP_START_TIMEOUT for slow starts')
  late = threading.Timer(seconds, _give_up, (advice,))   # JAX, which is given more, would abort with its C++ stack
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(**arguments, cluster_detection_method=detection, initialization_timeout=seconds + 60,
                               heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=30)
  except (RuntimeError, ValueError) as error:
    raise UserError(f'{advice} ({str(error).splitlines()[0][:120]})') from error
  finally:
    late.cancel()


def _shares_its_node(environment: Mapping[str, str]) -> bool:
  """Whether SLURM runs several tasks on a node, as in "8(x2)" or "2,1": each then takes the GPU of its number."""
  counts = re.sub(r'\(x\d+\)', '', environment.get('SLURM_STEP_TASKS_PER_NODE', '1'))
  return set(counts.split(',')) != {'1'}


def _start_timeout(environment: Mapping[str, str]) -> int:
  text = environment.get('LIGHTCLIP_START_TIMEOUT', '300')
  if not text.isdecimal() or int(text) < 1:
    raise UserError(f'LIGHTCLIP_START_TIMEOUT is {text!r}; it must be a number of seconds, at least 1')
  return int(text)


def _give_up(advice: str) -> None:
  print(f'error: {advice}', file=sys.stderr, flush=True)
  os._exit(EXIT_LOST)


def say(text: str) -> None:
  """Prints, in one process only."""
  if jax.process_index() == 0:
    print(text, flush=True)


def agree(step: int, *flags: bool) -> tuple[bool, ...]:
  """Each flag, if any process raises it. Several processes ask each other at every tenth step and say no at others, so
  that all of them stop and save at the same step (a signal reaches one host, and clocks differ)."""
  if jax.process_count() == 1:
    return flags
  if step % AGREE_EVERY:
    return (False,) * len(flags)
  return _anywhere(*flags)


def _anywhere(*flags: bool) -> tuple[bool, ...]:
  """Each flag, if any process raises it; all of them must ask."""
  return tuple(bool(flag) for flag in np.any(multihost_utils.process_allgather(np.asarray(flags)), axis=0))


def texts_of_all(text: str) -> list[str]:
  """Each process's `text`, in the processes' order; all of them must ask."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  size = int(np.max(multihost_utils.process_allgather(np.asarray(len(data)))))
  rows = multihost_utils.process_allgather(np.pad(data, (0, size - len(data))))
  return [row.tobytes().rstrip(b'\0').decode() for row in rows]


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
  """Process 0 runs the body before the others do: it may make what they find made.

  Raises:
    UserError: in all processes, where process 0's body raises one.
  """
  several, first = jax.process_count() > 1, jax.process_index() == 0
  if several:   # on CPUs the first meeting fails where one comes 30 s late; what the body makes can take longer
    multihost_utils.sync_global_devices(name)
  if several and not first and _anywhere(False)[0]:
    raise UserError(f'process 0 has found a mistake ({name}), and says which')
  try:
    yield
  except UserError:
    if several and first:
      _anywhere(True)
    raise
  if several and first:
    _anywhere(False)


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
  """Ends this process at once where the body fails because another one is gone.

  What would be closed on the way out waits for the one that is gone, which is why nothing is.

  Raises:
    UserError: where it fails because a device has too little memory.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if str(error).startswith(_MEMORY):   # each start would end there again
      raise UserError(f'the devices have too little memory ({str(error).splitlines()[0][:160]}); train.accumulate, mesh.fsdp '
                      'or a smaller train.batch_size need less, and python -m lightclip_jax.plan says how much') from error
    # Where a call fails at once, and not when its result is read, JAX raises the runtime's status as a ValueError.
    if jax.process_count() == 1 or not (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))):
      raise
    print(f'process {jax.process_index()}: lost another process of {jax.process_count()} '
          f'({str(error).splitlines()[0][:160]}); start all again: the run continues at its last checkpoint',
          file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


@contextlib.contextmanager
def keeping_its_code() -> Iterator[None]:
  """Lets this process end with 2 for a mistake that the body finds, also where the others have not found it.

  On the way out JAX waits for all of them, and ends with a code of its own where they do not come; a launch script would then
  repeat the mistake.
  """
  try:
    yield
  except UserError:
    if jax.process_count() > 1:
      timer = threading.Timer(_LEAVE_SECONDS, os._exit, (2,))
      timer.daemon = True   # where all end, nobody waits for it
      timer.start()
    raise
