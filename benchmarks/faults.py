"""The fault campaign: a small run is killed again and again at random moments, and must end as if it never had been.

  python benchmarks/faults.py --kills=100 --out=docs/faults.json

Kills are SIGKILL and SIGTERM in turn, at a random time after the start: so they fall into start-up, restoring, steps, saves,
evaluation and the report. Whenever a run gets to its end, the next one starts in a new workdir. Compared with a run that
nobody touched: parameters, optimizer state, moving average and running statistics bit for bit, and the logged metrics.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / 'tests' / 'training' / 'tiny_config.py'
TIMING = ('train/examples_per_second', 'train/data_wait', 'train/eta_seconds')
LONGEST = 900   # seconds that one start may take


@dataclasses.dataclass
class Tally:
  """What was seen."""
  kills: int = 0
  exits: dict[str, int] = dataclasses.field(default_factory=dict)     # by exit code of the killed process
  steps_lost: list[int] = dataclasses.field(default_factory=list)     # logged, and made again
  seconds_to_recover: list[float] = dataclasses.field(default_factory=list)   # from the start to the first new step
  runs_compared: int = 0
  runs_equal: int = 0


def main() -> None:
  """Runs the campaign and writes its record."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    record = campaign(pathlib.Path(folder), flags.kills, flags.steps, random.Random(flags.seed))
  text = json.dumps(record, indent=2)
  print(text)
  if flags.out:
    flags.out.write_text(text + '\n')


def campaign(folder: pathlib.Path, kills: int, steps: int, rng: random.Random) -> dict:
  """A run that nobody touches, then runs that are killed until there were `kills` of it."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')}
  environment['LIGHTCLIP_DATA'] = str(folder / 'data')
  start(folder / 'whole', steps, environment).communicate(timeout=LONGEST)
  begun = time.monotonic()
  start(folder / 'again', steps, environment).communicate(timeout=LONGEST)   # how long one takes when all is compiled
  length, whole, tally, number = time.monotonic() - begun, outcome(folder / 'whole'), Tally(), 0
  while tally.kills < kills:
    workdir, number = folder / f'run{number}', number + 1
    until_the_end(workdir, steps, environment, kills, length, rng, tally)
    tally.runs_compared += 1
    tally.runs_equal += equal(outcome(workdir), whole)
    shutil.rmtree(workdir)
    print(f'{tally.kills} kills, {tally.runs_equal} of {tally.runs_compared} runs equal', file=sys.stderr, flush=True)
  return {'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'steps': steps, **dataclasses.asdict(tally)}


def until_the_end(workdir: pathlib.Path, steps: int, environment: dict[str, str], kills: int, length: float,
                  rng: random.Random, tally: Tally) -> None:
  """Starts one run until it is complete, and kills each start but the last at a random moment."""
  while True:
    before, begun = last_step(workdir), time.monotonic()
    process = start(workdir, steps, environment)
    if tally.kills >= kills:
      process.communicate(timeout=LONGEST)
    else:
      recover(process, workdir, before, begun, rng.uniform(0, 0.9 * length), tally)
    if process.returncode == 0:
      return
    if process.returncode not in (-signal.SIGKILL, -signal.SIGTERM, 75, 128 + signal.SIGTERM):
      raise SystemExit(f'exit {process.returncode}: {process.stdout.read() if process.stdout else ""}')
    name = str(process.returncode)
    tally.exits[name] = tally.exits.get(name, 0) + 1


def recover(process: subprocess.Popen, workdir: pathlib.Path, before: int, begun: float, seconds: float,
            tally: Tally) -> None:
  """Waits for `seconds`, notes when the first new step was made, and kills."""
  lost = None
  while time.monotonic() < begun + seconds and process.poll() is None:
    now = last_step(workdir)
    if lost is None and before and now != before:   # the log is cut back to the last save when a run continues
      lost = max(0, before - now)
      tally.steps_lost.append(lost)
      tally.seconds_to_recover.append(round(time.monotonic() - begun, 1))
    time.sleep(0.05)
  if process.poll() is None:
    process.send_signal(signal.SIGKILL if tally.kills % 2 else signal.SIGTERM)
    tally.kills += 1
  process.communicate(timeout=LONGEST)


def start(workdir: pathlib.Path, steps: int, environment: dict[str, str]) -> subprocess.Popen:
  """One start of the command."""
  command = [sys.executable, '-m', 'lightclip_jax.main', f'--config={CONFIG}:shallow', f'--workdir={workdir}',
             f'--config.train.steps={steps}']
  return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)


def rows(workdir: pathlib.Path) -> list[dict]:
  """The log."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith('}')]


def last_step(workdir: pathlib.Path) -> int:
  """The last step in the log; 0 without one."""
  return max((row['step'] for row in rows(workdir)), default=0)


def outcome(workdir: pathlib.Path) -> tuple[dict, list[dict]]:
  """The newest checkpoint's arrays, and the log without times."""
  with ocp.CheckpointManager(workdir / 'checkpoints', options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    step = manager.latest_step()
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']
  return state, [{name: value for name, value in row.items() if name not in TIMING} for row in rows(workdir)]


def equal(one: tuple[dict, list[dict]], other: tuple[dict, list[dict]]) -> bool:
  """Bit for bit, log and state."""
  import jax
  pairs = zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True)
  return one[1] == other[1] and all(np.array_equal(a, b) for a, b in pairs)


if __name__ == '__main__':
  main()
