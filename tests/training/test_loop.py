"""The order of what a run does at a step, with parts that only say when they are asked."""
import contextlib
import types

import pytest
from tiny import TINY

from lightclip_jax import config as config_lib
from lightclip_jax.training import loop


class Run(loop.Run):
  """Steps, evaluations of two batches and saves that are only noted; a stop is asked for at the note `asked_at`."""

  def __init__(self, asked_at='', step=0, owes=False, best=''):
    self.config = config_lib.replace(TINY, train=dict(steps=6), evaluation=dict(every_steps=2, every_minutes=0.0),
                                     checkpoint=dict(best=best, every_steps=4))
    self.step, self._owes, self._asked_at, self.notes = step, owes, asked_at, []
    self._scores, self._pending, self._last_evaluation = None, None, 0.0
    self._stop, self.state = types.SimpleNamespace(requested=False), types.SimpleNamespace(evaluation_variables={})
    self.watchdog = types.SimpleNamespace(waiting_for=lambda what: contextlib.nullcontext(), moved=lambda: self.note('batch'))
    self._clock = types.SimpleNamespace(paused=lambda seconds: None)
    self._writer = types.SimpleNamespace(write=lambda step, values: self.note(f'log {step}'), flush=lambda: None)
    self._evaluator = types.SimpleNamespace(
        evaluate=lambda variables: (self._moved(), self._moved(), {'eval/x/top1': 0.5})[-1],
        finish=lambda step, variables: (self._moved(), {'eval/x/top1': 0.5})[-1])
    self._checkpointer = types.SimpleNamespace(late=False, due=lambda step: step % 4 == 0)

  def note(self, text):
    self.notes.append(text)
    self._stop.requested |= text == self._asked_at

  def _one_step(self):
    self.step, self._scores = self.step + 1, None
    self.note(f'step {self.step}')

  def _save(self, wait=False):
    self.note(f'save {self.step}' + ' scored' * (self._scores is not None) + ' owing' * self._owes)


EVALUATED = ['batch', 'batch', 'log 2']


def test_evaluate_then_save_then_go_on():
  run = Run()
  assert run.train()
  assert run.notes == ['step 1', 'step 2', *EVALUATED, 'step 3', 'step 4', 'batch', 'batch', 'log 4', 'save 4 scored', 'step 5',
                       'step 6', 'save 6']


@pytest.mark.parametrize('asked_at, notes', [
    ('step 1', ['step 1', 'save 1']),
    ('step 2', ['step 1', 'step 2', 'save 2 owing']),
    ('batch', ['step 1', 'step 2', 'batch', 'save 2 owing']),   # and the second batch is not embedded
    ('log 2', ['step 1', 'step 2', *EVALUATED, 'step 3', 'save 3']),
])
def test_who_asks_for_a_stop_waits_for_no_evaluation(asked_at, notes):
  run = Run(asked_at)
  assert not run.train()
  assert run.notes == notes


def test_the_run_that_continues_begins_with_what_is_owed():
  run = Run(step=2, owes=True)
  assert run.train()
  assert run.notes[:4] == [*EVALUATED, 'step 3']
  again = Run('batch', step=2, owes=True)
  assert not again.train() and again.notes == ['batch', 'save 2 owing']


@pytest.mark.parametrize('asked_at', ['', 'step 6', 'batch'])
def test_the_last_step_is_saved_before_it_is_scored(asked_at):
  run = Run(asked_at, best='eval/x/top1', step=4)
  assert run.train()
  assert run.notes == ['step 5', 'step 6', 'save 6']
  run.finish()
  assert run.notes[3:] == ['batch', 'log 6', 'save 6 scored'], 'nothing is lost any more, so it is not put off'
