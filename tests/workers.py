"""Several processes of one run on this machine, for what one process cannot test."""
import os
import pathlib
import socket
import subprocess
import sys


def start(script, *arguments, count=2):
  """`python script arguments` as each process of `count`, with a CPU device each; what they say is piped."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  tests = pathlib.Path(__file__).parent
  common = {**os.environ, 'XLA_FLAGS': '', 'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count),
            'PYTHONPATH': f'{tests.parent}:{tests}'}
  return [subprocess.Popen([sys.executable, script, *map(str, arguments)], env=common | {'JAX_PROCESS_ID': str(index)},
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for index in range(count)]
