"""Our training step and open_clip's, alternating in one run: the same towers, batch, resolution and context.

    python -m benchmarks.train_step --out=docs/train_step.json --open_clip=PYTHON [--tower=mobilenet_v2] [--batch=32]

Plain CLIP (its loss, AdamW) with a 6-layer text tower of width 512, 77 positions and 49,408 tokens. open_clip's images are
on the device and normalised before; ours are bytes. Each setting is a process of its own; in a round each makes a few steps,
one setting after the other, the first of them not timed: memory that lay idle goes back to a virtual machine's host. Of a
setting's seconds a step the median over rounds counts. "ratio" is the median over rounds of the seconds of open_clip's best
setting by ours: above 1 we are faster. On CPUs ours run in launch/memory.sh, as launch/local.sh does; open_clip runs as it is
installed and, in settings of their own that have a "ratio_in_same_memory", in the same. `--full` adds our step with all
objectives. PYTHON: an interpreter with open_clip (launch/parity_env.sh).
"""
import argparse
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tqdm

from lightclip_jax import cli
from lightclip_jax import config as config_lib
from lightclip_jax.errors import UserError

SIZE, CONTEXT, VOCABULARY, WIDTH, LAYERS = 224, 77, 49_408, 512, 6
MEMORY = pathlib.Path(__file__).parents[1] / 'launch' / 'memory.sh'
SAME_MEMORY = ', our memory'
TOWERS = ('mobilenet_v2', 'resnet18', 'vit_ti')


def config_of(tower: str, dtype: str, batch: int, full: bool) -> config_lib.Config:
  """The same model and optimizer that open_clip is given; BatchNorm over the whole batch, as PyTorch's.

  "mixed" is float32 with the factors of products rounded to bfloat16, which is what PyTorch's autocast makes of "bfloat16".
  """
  precision, dtype = ('bfloat16', 'float32') if dtype == 'mixed' else ('default', dtype)
  constant = config_lib.constant
  off = {'weight': constant(0.0)}
  objective = {} if full else dict(contrastive=dict(alpha=constant(0.0), beta=constant(0.0), duplicates='negative'),
                                   token_matching=off, masked_lm=off)
  text = dict(width=WIDTH, heads=WIDTH // 64, depth=LAYERS, context=CONTEXT, vocab_size=VOCABULARY, end_id=VOCABULARY - 1,
              causal=True)
  return config_lib.replace(
    config_lib.Config(), objective=objective, optimizer=dict(clip_norm=0.0),
    train=dict(batch_size=batch, matmul_precision=precision),
    model=dict(image=dict(name=tower, size=SIZE), text=text, compute_dtype=dtype, batch_norm=f'group:{batch}'))


def serve(config: config_lib.Config, length: int) -> None:
  """Our side of what `benchmarks/train_step_open_clip.py` does for theirs, on random examples of `length` positions."""
  import jax

  from benchmarks import noise
  from lightclip_jax import sharding
  from lightclip_jax.training.step import Trainer, put_batch
  trainer = Trainer.create(config, sharding.make_mesh(config.mesh))
  start = time.perf_counter()
  step = trainer.compile_step(length)
  compiled = time.perf_counter() - start
  state = trainer.init_state()
  batch = put_batch(noise.examples(config, trainer.mesh, length), trainer.mesh)
  print(json.dumps(compiled), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
      state, metrics = step(state, batch)
      assert np.isfinite(jax.device_get(metrics['loss']))
    print(json.dumps(time.perf_counter() - start), flush=True)
  memory = jax.devices()[0].memory_stats() or {}
  print(json.dumps(memory.get('peak_bytes_in_use') or peak_of_process()), flush=True)


def peak_of_process() -> int:
  """Bytes."""
  return 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])


class Setting:
  """One process that makes steps when asked. `first` is the seconds of its compilation, or of its first step."""

  def __init__(self, name: str, command: list[str], environment: dict[str, str]):
    self.name, self.seconds = name, []
    self._log = pathlib.Path(f'{os.environ.get("TMPDIR", "/tmp")}/train_step-{os.getpid()}-{name.replace(" ", "-")}.log')
    environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', **environment}
    with self._log.open('w') as log:
      self._process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                       env=environment)
    self.first = self._read()

  def _read(self) -> float:
    line = self._process.stdout.readline()
    if not line:
      said = self._log.read_text().strip().splitlines()
      last = said[-1][:200] if said else 'it ended without a word; are there too many settings at once for the memory?'
      raise UserError(f'{self.name}: {last}')
    return json.loads(line)

  def run(self, steps: int) -> None:
    """Makes one step and then some, and notes the seconds of one of these."""
    self._make(1)
    self.seconds.append(self._make(steps) / steps)

  def _make(self, steps: int) -> float:
    try:
      print(steps, file=self._process.stdin, flush=True)
    except BrokenPipeError:   # killed, by a system without memory for all settings at once; what it said is read below
      pass
    return self._read()

  def close(self) -> dict[str, float]:
    """Ends the process; what was measured."""
    self._process.stdin.close()
    peak = self._read()
    self._process.wait()
    self._log.unlink()
    return {'seconds_a_step': float(np.median(self.seconds)), 'seconds_to_compile_or_first_step': self.first,
            'peak_gigabytes': peak / 1e9}


def own_memory() -> dict[str, str]:
  """What launch/memory.sh adds to the environment."""
  code = 'import json, os; print(json.dumps({name: os.environ[name] for name in os.environ if name[:3] in ("LD_", "MIM")}))'
  return json.loads(subprocess.check_output([MEMORY, sys.executable, '-c', code]))


def settings(flags: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
  """Name -> command and environment, ours first."""
  memory = {} if shutil.which('nvidia-smi') else own_memory()
  own = [sys.executable, '-m', 'benchmarks.train_step', f'--tower={flags.tower}', f'--batch={flags.batch}']
  out = {f'ours {dtype}{f", {length} positions" if length < CONTEXT else ""}':
         ([*own, f'--serve={dtype}', f'--length={length}'], memory) for length in flags.lengths for dtype in flags.dtypes}
  if flags.full:
    out[f'ours {flags.dtypes[0]}, full objective'] = [*own, f'--serve={flags.dtypes[0]}', '--full'], memory
  if flags.open_clip:
    script = str(pathlib.Path(__file__).with_name('train_step_open_clip.py'))
    shape = [str(n) for n in (flags.batch, SIZE, CONTEXT, VOCABULARY, WIDTH, LAYERS)]
    environments = ({}, memory) if memory else ({},)
    for dtype, how, extra in itertools.product(flags.peer_dtypes, flags.peer_modes, environments):
      command = [flags.open_clip, script, flags.tower, dtype, str(int(how == 'compiled')), *shape]
      out[f'open_clip {dtype} {how}{SAME_MEMORY if extra else ""}'] = command, extra
  return out


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Starts every setting, lets them take turns, and compares."""
  running, failed = {}, {}
  for name, (command, environment) in tqdm.tqdm(settings(flags).items(), desc='starting'):
    try:
      running[name] = Setting(name, command, environment)
      running[name].run(1)
      running[name].seconds.clear()
    except UserError as error:
      failed[name] = str(error)
  for _ in tqdm.trange(flags.rounds, desc='rounds'):
    for name, setting in list(running.items()):
      try:
        setting.run(flags.steps)
      except UserError as error:
        failed[name] = str(error)
        del running[name]
  seconds = {name: np.array(setting.seconds) for name, setting in running.items()}
  result = {'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'tower': flags.tower, 'batch': flags.batch,
            'rounds': flags.rounds, 'steps_a_round': flags.steps, 'failed': failed,
            'settings': {name: setting.close() for name, setting in running.items()}}
  theirs = [name for name in seconds if name.startswith('open_clip')]
  for key, names in (('', [name for name in theirs if not name.endswith(SAME_MEMORY)]),
                     ('_in_same_memory', [name for name in theirs if name.endswith(SAME_MEMORY)])):
    if names:
      best = min(names, key=lambda name: np.median(seconds[name]))
      result |= {f'open_clip_best{key}': best, f'ratio{key}': {
        name: float(np.median(seconds[best] / values)) for name, values in seconds.items() if name not in theirs}}
  return result


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
  """Bars: pairs a second of each setting."""
  rates = {name: result['batch'] / values['seconds_a_step'] for name, values in result['settings'].items()}
  figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(rates)), layout='constrained')
  bars = axes.barh(list(rates)[::-1], list(rates.values())[::-1],
                   color=['C0' if name.startswith('ours') else '0.6' for name in rates][::-1])
  axes.bar_label(bars, fmt='%.1f', padding=3)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_xlabel(f'pairs a second, {result["tower"]}, batch {result["batch"]}')
  figure.savefig(path)


def main() -> None:
  """Measures, prints and writes JSON and a plot."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--open_clip', metavar='PYTHON')
  parser.add_argument('--tower', choices=TOWERS, default='mobilenet_v2')
  parser.add_argument('--batch', type=cli.positive, default=32)
  parser.add_argument('--dtypes', nargs='+', default=['float32'], help='ours')
  parser.add_argument('--peer_dtypes', nargs='+', default=['float32', 'bfloat16'], help='of open_clip')
  parser.add_argument('--peer_modes', nargs='+', choices=('eager', 'compiled'), default=['eager', 'compiled'],
                      help='of open_clip')
  parser.add_argument('--lengths', nargs='+', type=cli.positive, default=[CONTEXT], help='of the texts of ours')
  parser.add_argument('--full', action='store_true')
  parser.add_argument('--rounds', type=cli.positive, default=5)
  parser.add_argument('--steps', type=cli.positive, default=2, help='of each setting in a round')
  parser.add_argument('--serve', metavar='DTYPE', help=argparse.SUPPRESS)
  parser.add_argument('--length', type=int, default=CONTEXT, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.serve:
    serve(config_of(flags.tower, flags.serve, flags.batch, flags.full), flags.length)
    return
  result = measure(flags)
  text = json.dumps(result, indent=1)
  print(text)
  if flags.out:
    flags.out.write_text(text + '\n')
    plot(result, flags.out.with_suffix('.svg'))


if __name__ == '__main__':
  sys.exit(cli.run(main))
