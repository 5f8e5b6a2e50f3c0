"""Two processes of two devices each evaluate together and agree with one process of eight devices."""
import base64
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import compiling
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax import config, distributed
from lightclip_jax import evaluate as evaluate_command
from lightclip_jax.data import pipeline
from lightclip_jax.data.datasets import shapes
from lightclip_jax.evaluation import evaluate, metrics, tasks
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks import pointing

HERE = pathlib.Path(__file__).parent


def measure(folder, batch_size):
  from test_tasks import MODEL, MORE, SPLITS, Colours
  pointing.SCENES = 30
  sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ('data',)), PartitionSpec('data'))
  variables = jax.device_put({'params': {'scale': np.float32(1)}}, NamedSharding(sharding.mesh, PartitionSpec()))
  embedder = Embedder(Colours(), MODEL, variables, pipeline.load_tokenizer(folder), sharding=sharding,
                      batch_size=batch_size)
  chosen = evaluate.of_splits(SPLITS) | tasks.choose(MORE)
  return metrics.scalars(evaluate.run(Session(embedder, folder), chosen))


def together(*command, **variables):
  """What each of two processes of the same command prints."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  environment = {**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count=2 {compiling.QUICKLY}',
                 'JAX_NUM_PROCESSES': '2', 'JAX_COORDINATOR_ADDRESS': address, **variables}
  start = functools.partial(subprocess.Popen, [sys.executable, *command], text=True, cwd=HERE.parents[1],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  workers = [start(env={**environment, 'JAX_PROCESS_ID': str(i)}) for i in range(2)]
  try:
    outputs = [worker.communicate(timeout=120) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.returncode for worker in workers] == [0, 0], outputs
  return [out for out, _ in outputs]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('processes') / 'shapes'
  shapes.prepare(path, size=24)
  return path


@pytest.mark.slow
def test_two_processes_agree_with_one(folder):
  outputs = together(__file__, str(folder), PYTHONPATH=os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)]))
  expected = measure(folder, 64)
  for output in outputs:
    assert json.loads(output.splitlines()[-1]) == expected


@pytest.mark.slow
def test_the_command_of_two_processes_writes_what_one_writes(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.syspath_prepend(HERE.parent / 'inference')
  import small_checkpoint
  tokenizer = pipeline.load_tokenizer(folder)
  small = small_checkpoint.config('vit_ti', text=dict(vocab_size=tokenizer.vocab_size))
  small_checkpoint.write(tmp_path, config.replace(small, data=dict(dataset=str(folder))),
                         small_checkpoint.random_variables(small.model),
                         tokenizer=base64.b64encode(tokenizer.to_bytes()).decode())
  flags = [f'--checkpoint={tmp_path}', '--task=heldout_images', '--task=heldout_style']
  names = 'two', 'one'
  files = [[f'--out={tmp_path / name}.json', f'--csv={tmp_path / name}.csv'] for name in names]
  speaks, silent = together('-m', 'lightclip_jax.evaluate', *flags, *files[0], '--batch_size=14')   # 14 divides neither split
  assert evaluate_command.main(evaluate_command.parse([*flags, *files[1], '--batch_size=64'])) == 0
  table = capsys.readouterr().out
  assert 'heldout_style/concept_top1' in table and table in speaks and 'heldout_style' not in silent
  two, one = (json.loads((tmp_path / f'{name}.json').read_text()) for name in names)
  assert two['metrics'] == one['metrics'] and len(one['metrics']) > 10
  assert {m['name']: m['count'] for m in two['metrics']}['eval/heldout_style/concept_top1'] == 108
  assert (tmp_path / 'two.csv').read_text() == (tmp_path / 'one.csv').read_text()   # one process wrote, once


if __name__ == '__main__':
  distributed.initialize()
  print(json.dumps(measure(pathlib.Path(sys.argv[1]), 14)))
