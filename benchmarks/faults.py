"""The fault campaign: small runs are killed again and again, and must end as if they never had been.

    python -m benchmarks.faults --out=docs/faults.json

Three arms: one process, two processes as one run, and the preparation of data. SIGKILL and SIGTERM in turn, at random moments
and at chosen ones: while restoring, saving, evaluating, writing the report. Of two processes one is killed; the other must end
by itself. Whenever a run gets to its end, the next one starts in a new folder. It is compared with one that nobody touched:
parameters, optimizer state, moving average, running statistics and log bit for bit, and the ids of the examples of every step.
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / 'benchmarks' / 'faults_config.py'
TIMING = ('train/examples_per_second', 'train/data_wait', 'train/eta_seconds')
MOMENTS = ('any', 'save', 'any', 'evaluation', 'any', 'restore', 'any', 'report')
LONGEST = 600     # seconds that one start may take
OTHER_ENDS = 60   # seconds that the rest of a run may outlive the process that was killed
PICTURES = 1500   # of the data that are prepared


@dataclasses.dataclass
class Tally:
  """What was seen in one arm."""
  kills: int = 0
  moments: dict[str, int] = dataclasses.field(default_factory=dict)
  exits: dict[str, int] = dataclasses.field(default_factory=dict)   # of the process that was killed, and of its other
  continued_at_newest_save: int = 0
  continued: int = 0
  steps_made_again: list[int] = dataclasses.field(default_factory=list)
  seconds_to_recover: list[float] = dataclasses.field(default_factory=list)   # from the start to the first new step
  seconds_until_other_ended: list[float] = dataclasses.field(default_factory=list)
  runs_compared: int = 0
  runs_equal: int = 0

  def killed(self, moment: str, codes: list[int]) -> None:
    """Counts one."""
    self.kills += 1
    self.moments[moment] = self.moments.get(moment, 0) + 1
    name = ' and '.join(map(str, codes))
    self.exits[name] = self.exits.get(name, 0) + 1


class Failure(SystemExit):
  """Something that must not happen."""


def main() -> None:
  """Runs the campaign and writes its record."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--one', type=int, default=60, help='kills of a run of one process')
  parser.add_argument('--two', type=int, default=20, help='kills of one of two processes')
  parser.add_argument('--prepare', type=int, default=20, help='kills of the preparation of data')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path)
  flags = parser.parse_args()
  record = {'machine': f'{platform.machine()}, {os.cpu_count()} cores'}
  for name in ('prepare', 'one', 'two'):
    if not (kills := getattr(flags, name)):
      continue
    folder, rng = pathlib.Path(tempfile.mkdtemp()), random.Random(f'{flags.seed} {name}')
    arm = _prepare(folder, kills, rng) if name == 'prepare' else _train(1 + (name == 'two'), folder, kills, rng)
    record[name] = dataclasses.asdict(arm)
    if arm.runs_equal == arm.runs_compared:
      shutil.rmtree(folder)
    else:
      print(f'see {folder}', file=sys.stderr)
    print(json.dumps(record, indent=2))
    if flags.out:
      flags.out.write_text(json.dumps(record, indent=2) + '\n')


def _train(count: int, folder: pathlib.Path, kills: int, rng: random.Random) -> Tally:
  """Runs of `count` processes, killed `kills` times altogether."""
  length = 0.0
  for name in ('whole', 'again'):   # the second has everything compiled: this is how long one takes
    run, begun = Run(folder / name, count), time.monotonic()
    run.wait(LONGEST)
    length = time.monotonic() - begun
  whole, tally = run.outcome(), Tally()
  moments = itertools.cycle(MOMENTS)
  for number in itertools.count():
    if tally.kills >= kills:
      return tally
    _until_the_end(folder / f'run{number}', count, kills, length, moments, rng, tally)
    tally.runs_compared += 1
    equal = _equal(Run(folder / f'run{number}', count, start=False).outcome(), whole)
    tally.runs_equal += equal
    if equal:
      shutil.rmtree(folder / f'run{number}')
    print(f'{count}: {tally.kills} kills, {tally.runs_equal} of {tally.runs_compared} runs equal', file=sys.stderr, flush=True)


def _until_the_end(folder: pathlib.Path, count: int, kills: int, length: float, moments: Iterator[str], rng: random.Random,
                   tally: Tally) -> None:
  """Starts one run until it is complete, and kills it each time while kills are left."""
  while True:
    run = Run(folder, count)
    if tally.kills < kills:
      moment = next(moments)
      latest = length * (rng.random() if moment == 'any' else 0.9)
      moment = run.until(moment, latest, rng.uniform(0, 0.3), tally)
      if run.alive():
        number = signal.SIGKILL if tally.kills % 2 else signal.SIGTERM
        tally.killed(moment, run.kill(rng.randrange(count), number, tally))
        continue
    codes = run.wait(LONGEST)
    if codes == [0] * count:
      return
    raise Failure(f'exit codes {codes}: {run.said()}')


class Run:
  """One start of a run of one or more processes."""

  def __init__(self, folder: pathlib.Path, count: int, start: bool = True) -> None:
    self.folder, self.workdir = folder, folder / 'run'
    folder.mkdir(exist_ok=True)
    self.read_before, self.saved_before, self.begun = self._last_read(), self._newest(), time.monotonic()
    self._recovered = not self.read_before
    for flag in folder.glob('*-[0-9]'):
      flag.unlink()
    self.processes = [self._start(number, count) for number in range(count)] if start else []

  def _start(self, number: int, count: int) -> subprocess.Popen:
    if not number:
      with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        self._port = free.getsockname()[1]
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': str(self.folder.parent / 'cache'),
        'LIGHTCLIP_DATA': str(self.folder.parent / 'data'), 'LIGHTCLIP_START_TIMEOUT': '40'}
    if count > 1:
      environment |= {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{self._port}', 'JAX_NUM_PROCESSES': str(count),
                      'JAX_PROCESS_ID': str(number)}
    command = [sys.executable, '-m', 'lightclip_jax.main', f'--config={CONFIG}:{self.folder}', f'--workdir={self.workdir}']
    with (self.folder / f'said-{number}.txt').open('w') as said:
      return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)

  def until(self, moment: str, latest: float, after: float, tally: Tally) -> str:
    """Returns `after` seconds into the moment if it comes, else `latest` after the start; or when the run has ended."""
    deadline, seen = self.begun + latest, False
    while self.alive() and time.monotonic() < deadline:
      self._note_recovery(tally)
      if not seen and (self.folder / f'{moment}-0').exists():
        seen, deadline = True, time.monotonic() + after
      time.sleep(0.01)
    return moment if seen else 'any'

  def _note_recovery(self, tally: Tally) -> None:
    reads = [] if self._recovered else self._reads(0)
    if len(reads) > self.read_before:
      first, last = reads[self.read_before][0], reads[self.read_before - 1][0]
      tally.continued += 1
      tally.continued_at_newest_save += first == self.saved_before
      tally.steps_made_again.append(last + 1 - first)
      tally.seconds_to_recover.append(round(time.monotonic() - self.begun, 1))
      self._recovered = True

  def alive(self) -> bool:
    """Whether none of the processes has ended."""
    return all(process.poll() is None for process in self.processes)

  def kill(self, victim: int, number: signal.Signals, tally: Tally) -> list[int]:
    """Sends the signal to one process; the exit codes of it and of the other."""
    self.processes[victim].send_signal(number)
    self.processes[victim].wait(LONGEST)
    begun = time.monotonic()
    others = [process for process in self.processes if process is not self.processes[victim]]
    for process in others:
      process.wait(OTHER_ENDS)
      tally.seconds_until_other_ended.append(round(time.monotonic() - begun, 1))
    codes = [process.returncode for process in (self.processes[victim], *others)]
    expected = {-signal.SIGKILL, -signal.SIGTERM, 75, 128 + signal.SIGTERM}
    expected |= {2, 76, -signal.SIGABRT} if others else set()   # JAX itself aborts where its coordinator is gone
    if not set(codes) <= expected | {0}:
      raise Failure(f'exit codes {codes}: {self.said()}')
    return codes

  def wait(self, seconds: float) -> list[int]:
    """Exit codes."""
    return [process.wait(seconds) for process in self.processes]

  def said(self) -> str:
    """What the processes printed."""
    return '\n'.join(path.read_text()[-2000:] for path in sorted(self.folder.glob('said-*.txt')))

  def _last_read(self) -> int:
    return len(self._reads(0))

  def _newest(self) -> int:
    steps = [int(path.name) for path in (self.workdir / 'checkpoints').glob('*') if path.name.isdecimal()]
    return max(steps, default=0)

  def _reads(self, process: int) -> list[tuple[int, list[int]]]:
    path = self.folder / f'read-{process}.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(']]')]

  def outcome(self) -> 'Outcome':
    """The newest checkpoint's arrays, the log's rows by number, the examples by process and step (as read last)."""
    folder, reader = self.workdir / 'checkpoints' / str(self._newest()) / 'state', ocp.PyTreeCheckpointer()
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree)
    state = reader.restore(folder, restore_args=how)
    rows = [json.loads(line) for line in (self.workdir / 'metrics.jsonl').read_text().splitlines()]
    rows = [tuple((name, value) for name, value in row.items() if name not in TIMING) for row in rows]
    reads = {f'{process}/{step}': ids for process in range(2) for step, ids in self._reads(process)}
    return _flat(state), dict(enumerate(rows)), reads


Outcome = tuple[dict, dict, dict]


def _flat(tree: dict) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _equal(one: Outcome, other: Outcome) -> bool:
  """Bit for bit."""
  state, log, reads = ({name: value for name, value in items.items() if not np.array_equal(value, rest.get(name))}
                       for items, rest in zip(one, other, strict=True))
  different = [*state, *log, *reads]
  if different:
    print(f'not equal: {len(state)} arrays, steps {list(log)[:5]} of the log, reads {list(reads)[:5]}', file=sys.stderr)
  return not different and all(one[part].keys() == other[part].keys() for part in range(3))


def _prepare(folder: pathlib.Path, kills: int, rng: random.Random) -> Tally:
  """Preparations of the same pictures, killed `kills` times altogether."""
  _draw(folder / 'pictures')
  tally, begun = Tally(), time.monotonic()
  _preparation(folder, 'whole').wait(LONGEST)
  length, whole = time.monotonic() - begun, _contents(folder / 'whole')
  for number in itertools.count():
    if tally.kills >= kills:
      return tally
    out = f'run{number}'
    while True:
      process, begun = _preparation(folder, out), time.monotonic()
      if tally.kills < kills:
        _sleep(lambda p=process: p.poll() is None, rng.uniform(0, length))
        if process.poll() is None:
          os.killpg(process.pid, signal.SIGKILL if tally.kills % 2 else signal.SIGTERM)
          tally.killed('preparation', [process.wait(LONGEST)])
          continue
      if process.wait(LONGEST):
        raise Failure(f'preparation: exit code {process.returncode}')
      break
    tally.runs_compared += 1
    tally.runs_equal += _contents(folder / out) == whole
    print(f'prepare: {tally.kills} kills, {tally.runs_equal} of {tally.runs_compared} equal', file=sys.stderr, flush=True)


def _draw(folder: pathlib.Path) -> None:
  folder.mkdir()
  for number in range(PICTURES):
    pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), np.uint8)
    PIL.Image.fromarray(pixels).resize((256, 256)).save(folder / f'{number:05d}.jpg')
    (folder / f'{number:05d}.txt').write_text(f'thing {number % 97} beside thing {number % 89}')


def _preparation(folder: pathlib.Path, out: str) -> subprocess.Popen:
  command = [sys.executable, '-m', 'lightclip_jax.prepare', 'folder', str(folder / 'pictures'), f'--out={folder / out}',
             '--size=64', '--vocab_size=200', '--holdout_every=10', '--duplicates=similar']
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _contents(folder: pathlib.Path) -> dict[str, str]:
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _sleep(while_true: Callable[[], bool], seconds: float) -> None:
  deadline = time.monotonic() + seconds
  while while_true() and time.monotonic() < deadline:
    time.sleep(0.01)


if __name__ == '__main__':
  main()
