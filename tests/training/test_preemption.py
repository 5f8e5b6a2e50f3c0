"""What asks a run to save and stop, in a process of its own that does nothing else."""
import contextlib
import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from lightclip_jax.training import preemption

PROGRAM = '''
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_{HUP})   # the tests themselves may run under nohup
from lightclip_jax.training import preemption
with preemption.Preemption() as stop:
  for step in range(2000):
    print('step', step, flush=True)
    if stop.requested and step > 20:   # some lines after it
      print('saved', flush=True)
      sys.exit(preemption.EXIT_PREEMPTED)
    time.sleep(0.01)
'''


@contextlib.contextmanager
def running(hangup='DFL', stdout=subprocess.PIPE):
  with subprocess.Popen([sys.executable, '-c', PROGRAM.replace('{HUP}', hangup)], stdout=stdout, stderr=subprocess.PIPE,
                        text=True, cwd=pathlib.Path(__file__).parents[2]) as child:
    try:
      yield child
    finally:
      child.kill()


def end(child):
  """Exit code and what it said to stderr."""
  errors = child.stderr.read()
  return child.wait(timeout=60), errors


def test_a_reader_that_is_gone_asks_for_a_stop():
  with running() as child:
    assert child.stdout.readline() == 'step 0\n'
    child.stdout.close()
    assert end(child) == (preemption.EXIT_PREEMPTED, '')


def test_a_terminal_that_is_gone_asks_for_a_stop():
  terminal, its_end = os.openpty()
  with running(stdout=its_end) as child:
    os.close(its_end)
    assert os.read(terminal, 4) == b'step'
    os.close(terminal)
    assert end(child) == (preemption.EXIT_PREEMPTED, '')


@pytest.mark.parametrize('signals, code', [
    ((signal.SIGHUP, signal.SIGHUP), preemption.EXIT_PREEMPTED), ((signal.SIGHUP, signal.SIGTERM), preemption.EXIT_PREEMPTED),
    ((signal.SIGINT, signal.SIGTERM), preemption.EXIT_PREEMPTED), ((signal.SIGTERM, signal.SIGTERM), 128 + signal.SIGTERM)])
def test_the_same_signal_again_ends_at_once_but_for_that_of_terminals(signals, code):
  with running() as child:
    assert child.stdout.readline() == 'step 0\n'
    for number in signals:
      child.send_signal(number)
      child.stdout.readline()   # the next line: two signals at once may be handled in any order
    assert end(child)[0] == code


def test_nohup_keeps_a_run_going():
  with running(hangup='IGN') as child:
    assert child.stdout.readline() == 'step 0\n'
    child.send_signal(signal.SIGHUP)
    assert [child.stdout.readline() for _ in range(40)][-1] == 'step 40\n'
    child.send_signal(signal.SIGTERM)
    assert end(child)[0] == preemption.EXIT_PREEMPTED


def test_other_errors_of_a_stream_are_not_hidden():
  with open('/dev/full', 'w') as full, running(stdout=full) as child:
    code, errors = end(child)
    assert code == 1 and 'No space left on device' in errors


def test_a_file_that_fails_is_no_terminal(tmp_path):
  class Failing:
    def write(self, text):
      raise OSError(errno.EIO, 'a bad block')

    def fileno(self):
      return file.fileno()

  with open(tmp_path / 'log', 'w') as file, pytest.raises(OSError, match='a bad block'):
    preemption._Output(Failing(), lambda: pytest.fail('nobody has gone')).write('step 1')


def test_a_stream_that_is_closed_at_the_start_stays_closed(monkeypatch):
  monkeypatch.setattr(sys, 'stdout', None)
  with preemption.Preemption():
    print('nowhere', flush=True)
    assert sys.stdout is None


def test_the_streams_come_back():
  before = sys.stdout, sys.stderr
  with preemption.Preemption():
    assert sys.stdout is not before[0] and sys.stdout.encoding == before[0].encoding
  assert (sys.stdout, sys.stderr) == before
