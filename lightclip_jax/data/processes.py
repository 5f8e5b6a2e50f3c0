"""Worker processes that end with their parent, and leave Ctrl-C and a closed terminal to it."""
import os
import signal
import sys
import threading
import time


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
