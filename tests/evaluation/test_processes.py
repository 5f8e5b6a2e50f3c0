"""Two processes of two devices each evaluate together and agree with one process of eight devices."""
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax.data import pipeline
from lightclip_jax.data.datasets import shapes
from lightclip_jax.evaluation import evaluate, metrics, tasks
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import pointing


def measure(folder, batch_size):
  from test_tasks import MODEL, MORE, SPLITS, Colours
  pointing.SCENES = 30
  sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ('data',)), PartitionSpec('data'))
  variables = jax.device_put({'params': {'scale': np.float32(1)}}, NamedSharding(sharding.mesh, PartitionSpec()))
  embedder = Embedder(Colours(), MODEL, variables, pipeline.load_tokenizer(folder), sharding=sharding,
                      batch_size=batch_size)
  chosen = evaluate.of_splits(SPLITS) | tasks.choose(MORE)
  return metrics.scalars(evaluate.run(Session(embedder, folder), chosen))


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
  folder = tmp_path / 'shapes'
  shapes.prepare(folder, size=24)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  here = pathlib.Path(__file__).parent
  environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
                 'PYTHONPATH': os.pathsep.join([str(here.parents[1]), str(here)])}
  workers = [subprocess.Popen([sys.executable, __file__, address, str(i), str(folder)], env=environment, text=True,
                              stdout=subprocess.PIPE) for i in range(2)]
  try:
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.returncode for worker in workers] == [0, 0]
  expected = measure(folder, 64)
  for output in outputs:
    assert json.loads(output.splitlines()[-1]) == expected


if __name__ == '__main__':
  jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
  print(json.dumps(measure(pathlib.Path(sys.argv[3]), 14)))
