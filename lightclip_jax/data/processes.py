"""Worker processes that end with their parent, and leave Ctrl-C and a closed terminal to it."""
import errno
import os
import shutil
import signal
import sys
import threading
import time

_SHARED = '/dev/shm'   # Linux's; through it workers hand over batches


def short_of_memory(error: Exception, exit_code: int, needed: int) -> str:
  """What to do where workers fail because /dev/shm is too small; '' where that is not why.

  Its pages are taken as they are written: who gets none is killed by SIGBUS, and what he leaves there stays; then there is no
  room for the queues of new workers (ENOSPC, of no file).

  Args:
    error: of Grain's iterator.
    exit_code: of the worker that died; 0: none did.
    needed: bytes that all workers may hold there.
  """
  full = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
  if not (full or exit_code == -signal.SIGBUS) or not os.path.isdir(_SHARED):
    return ''
  usage = shutil.disk_usage(_SHARED)
  if usage.free >= needed:
    return ''
  return (f'{_SHARED} is full: it has {usage.total / 1e6:,.1f} MB, and data workers, which hand over batches through it, need '
          f'up to {needed / 1e6:,.1f} MB; make it larger (docker run --shm-size=8g, Kubernetes: an emptyDir of medium Memory), '
          'or decode in threads with data.workers=0')


def start_worker(parent: int) -> None:
  """Runs first in a worker: no accelerator, no Ctrl-C traceback, and an end within a second of process `parent`'s."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if 'jax' in sys.modules:   # Grain imports it, and it has read the environment by now; the accelerator is the parent's
    sys.modules['jax'].config.update('jax_platforms', 'cpu')
  for number in (signal.SIGINT, signal.SIGHUP):   # to all processes of a terminal
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
  # A killed parent closes no queue that its workers hold too: they would wait for work for ever.
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)
