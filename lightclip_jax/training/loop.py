"""The training loop.

The order of a step is law, because a checkpoint must hold exactly what a run that was never stopped would have:
batch → step → (evaluate) → (save) → (stop if asked). Who asks for a stop does not wait for an evaluation, but for the last one:
the run that continues begins with it. Metrics are read and logged one step late, so that the host never waits for a device that
could be working; evaluation and saves settle them first.
"""
import base64
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, sharding, storage
from lightclip_jax.data import datasets, pipeline, teacher
from lightclip_jax.models import lightclip
from lightclip_jax.training import checkpoint as checkpoint_lib
from lightclip_jax.training import checks, evaluator, health, initialise, metrics, preemption
from lightclip_jax.training.step import Batch, Trainer, fitting_length, put_batch

SLOW_SECONDS = 2 * 3600.0   # a run on a CPU that will take longer is advised to be the quick start


def train(config: config_lib.Config, workdir: storage.Path) -> int:
  """Trains to the end, or until a save is asked for (`preemption`); a workdir with history is continued.

  Returns:
    The exit code: 0 when complete (evaluated, with a report), `preemption.EXIT_PREEMPTED` when stopped and saved.

  Raises:
    UserError: if config, data, devices and workdir do not fit together, or another process trains there; nothing has been
      written then. Later for what no other start would mend (skipped steps in a row, too many faults, a device's memory); the
      last checkpoint stays.
  """
  lost = distributed.ending_with_the_others   # before there is a run, and within `closing`, which would wait for them
  with preemption.Preemption() as stop, lost(), contextlib.closing(Run(config, workdir, stop)) as run:
    with lost(), run.watchdog:
      run.start()
      if run.train():
        run.finish()
        return 0
    distributed.say(f'stopped and saved at step {run.step}; the same command continues there')
    return preemption.EXIT_PREEMPTED


class _PutOffError(Exception):
  """A stop was asked for during an evaluation."""


class Run:
  """One process's part of a training run."""

  def __init__(self, config: config_lib.Config, workdir: storage.Path, stop: preemption.Preemption) -> None:
    self.config, self.workdir, self.step, self._stop = config, workdir, 0, stop
    self._scores: dict[str, float] | None = None   # of the state as it is now
    self._owes = False   # whether an evaluation of this state was put off
    self._last_evaluation = time.monotonic()
    checks.check_same_everywhere(config)
    self._mesh = sharding.make_mesh(config.mesh)
    checks.check_steps(config)
    evaluator.tasks_of(config)
    self._trainer = Trainer.create(config, self._mesh)
    self._abstract = self._trainer.abstract_state()
    # Of several processes none knows the others' texts.
    self._lengths = {config.model.text.context, *(config.train.text_lengths if jax.process_count() == 1 else ())}
    self._steps: dict[int, Callable] = {}   # compiled, by the length of the texts
    with distributed.first_alone('data'):
      folder = datasets.resolve(config.data.dataset, config.data)
    checks.check_splits(config, folder)
    self._tokenizer = pipeline.load_tokenizer(folder)
    checks.check_tokenizer(config, self._tokenizer)
    distils = self._trainer.objective.needs_teacher
    if distils:
      checks.check_teacher(config, teacher.Teacher(folder).dim)
    if not checks.is_claimed(workdir, config):   # a run that continues needs these files no more
      initialise.check(config, self._abstract)
    self.watchdog = health.Watchdog(workdir, config.train.watchdog_minutes, config.train.watchdog_exit)
    self._evaluator = evaluator.Evaluator(config, folder, self._tokenizer, self._mesh, workdir, self._moved)
    share, shares = sharding.process_share(sharding.batch_sharding(self._mesh))
    self._batches = pipeline.train_batches(
        folder, config.data, image_size=config.model.image.size, context=config.model.text.context,
        batch_size=config.train.batch_size, seed=config.train.seed, process_index=share,
        process_count=shares, with_teacher=distils)
    self._claim = contextlib.ExitStack()
    with distributed.first_alone('workdir'):
      self._claim.enter_context(checks.alone(workdir))   # before anything is read there: another one may just be saving
    checks.check_shared(workdir)
    checks.claim_workdir(workdir, config)   # last: the next attempt may have another config
    self._checkpointer = checkpoint_lib.Checkpointer(workdir, config.checkpoint)
    self._pending: tuple[dict[str, jax.Array], np.ndarray] | None = None   # metrics and example ids of the last step
    self._faults: dict[str, int] = {}   # of the batches up to the pending step

  def start(self) -> None:
    """Restores or initialises the state, and opens the logs behind it."""
    restored = self._checkpointer.restore(self._abstract)
    if restored is None:
      self._compile_and_initialise()
      self._meter, self._health = metrics.Meter(), health.Health(self.workdir, self.config.train.max_skipped)
    else:
      self.state, saved = restored
      checks.check_same_tokenizer(saved.tokenizer, self._tokenizer)
      checks.check_same_groups(self.config, saved.shards, sharding.batch_shards(self._mesh))
      self.step = int(self.state.step)
      self._owes = saved.owes_evaluation
      self._batches.restore(saved.iterator)
      self._meter = metrics.Meter(saved.meter)
      self._health = health.Health(self.workdir, self.config.train.max_skipped, saved.health)
      if self.step < self.config.train.steps:
        self._compile()
    self._clock = metrics.Clock(self.config.train.batch_size, self.config.train.steps)
    self._writer = metrics.MetricWriter(self.workdir, self.step) if jax.process_index() == 0 else metrics.NoWriter()
    self._describe()

  def train(self) -> bool:
    """Steps until the end (True), or until a save is asked for (False, saved)."""
    total = self.config.train.steps
    if self.step >= total:
      return True
    forecast = metrics.Forecast(self.step, total)
    stop, = distributed.agree(self.step, self._stop.requested)
    if self._owes and not stop:
      stop = self._evaluate()
    while self.step < total and not stop:
      self._one_step()
      self._warn_if_slow(forecast.after(self.step))
      with self.watchdog.waiting_for('the other processes'):
        stop, late, evaluate = distributed.agree(
            self.step, self._stop.requested, self._checkpointer.late, self._evaluation_is_late)
      if self.step == total:
        break
      every = self.config.evaluation.every_steps
      if evaluate or (every and self.step % every == 0):
        stop = self._evaluate(put_off=stop)
      if not stop and (late or self._checkpointer.due(self.step) or self._scored):
        self._save()
    self._save(wait=True)
    return self.step >= total

  def finish(self) -> None:
    """Final evaluation, table and report; then the last checkpoint, which is saved before, has its score."""
    self._writer.flush()   # the report draws what is logged
    with self.watchdog.waiting_for('evaluation'):
      self._scores = self._evaluator.finish(self.step, self.state.evaluation_variables)
      self._writer.write(self.step, self._scores)
    if self._scored:
      self._save(wait=True)

  def close(self) -> None:
    """Ends workers, flushes what is open, and leaves the workdir to others."""
    with self._claim:
      self._batches.close()
      self._checkpointer.close()
      if hasattr(self, '_writer'):
        self._writer.close()

  def _describe(self) -> None:
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    inference = count(lightclip.inference_parameters(self.state.params))
    training_only = count(self.state.params) - inference
    devices = jax.devices()
    verb = f'continues at step {self.step}' if self.step else 'starts'
    distributed.say(f'{self.config.name} {verb} in {str(self.workdir)!r}: {inference / 1e6:.2f} M parameters at inference, '
                    f'{training_only / 1e6:.2f} M more in training; {len(devices)} × {devices[0].device_kind}')

  def _warn_if_slow(self, seconds: float) -> None:
    if jax.default_backend() == 'cpu' and seconds > SLOW_SECONDS:
      distributed.say(f'without an accelerator this will take about {metrics.duration(seconds)}; the variant :quickstart '
                      'of the same config takes minutes')

  def _compile(self, length: int | None = None) -> None:
    """The step for texts of that length; None: of the length that is likely first."""
    length, start = length or min(self._lengths), time.perf_counter()
    self._steps[length] = self._trainer.compile_step(length)
    texts = f' for texts of {length}' if len(self._lengths) > 1 else ''
    distributed.say(f'compiled the step{texts} in {metrics.duration(time.perf_counter() - start)}')

  def _compile_and_initialise(self) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:   # both are compilations, of which each keeps one core busy
      compiling = pool.submit(self._compile)
      self.state, report = initialise.initialise(self.config, self._trainer.init_state())
      compiling.result()
    for line in report:
      distributed.say(line)

  def _one_step(self) -> None:
    start = time.perf_counter()
    with self.watchdog.waiting_for('data'):
      arrays = next(self._batches)
    self._clock.waited(time.perf_counter() - start)
    length = fitting_length(arrays['tokens'], self.config.model.text.end_id, self._lengths)
    if length not in self._steps:
      self._settle()
      with self._outside_training():
        self._compile(length)
    self._scores, batch = None, put_batch(arrays, self._mesh, length)
    with self.watchdog.waiting_for('the devices, or another process at a step'):
      self.state, fresh = self._steps[length](self.state, batch)
      self._settle()
    self.step += 1
    self._pending, self._faults = (fresh, arrays['example_id']), self._batches.faults()
    self._clock.stepped()
    if self.config.train.name_nans:
      self._name_nans(batch)

  def _name_nans(self, batch: Batch) -> None:
    """Runs a step that was skipped again, by single operations: it changed nothing, so its state is still there."""
    self._settle()
    if self._health.in_a_row:
      state = dataclasses.replace(self.state, step=self.state.step - 1)
      health.name_nans(jax.grad(self._trainer.loss, has_aux=True), state.params, state, batch)

  def _settle(self) -> None:
    """Reads the metrics of the last finished step, while the next one is already running, and logs them if it is time."""
    if self._pending is None:
      return
    fresh, examples = self._pending
    self._pending, fresh = None, jax.device_get(fresh)
    if self._health.add(self.step, fresh, examples):
      self._meter.add({name: value for name, value in fresh.items() if name != 'skipped'})
    if self.step % self.config.train.log_every == 0 or self.step == self.config.train.steps:
      values = self._meter.take() | self._clock.take(self.step) | {'skipped_steps': self._health.skipped}
      values = {f'train/{name}': value for name, value in values.items()}
      self._writer.write(self.step, values | {f'data/left_out_{reason}': count for reason, count in self._faults.items()})
      distributed.say(metrics.console_line(self.step, self.config.train.steps, values))

  @property
  def _evaluation_is_late(self) -> bool:
    minutes = self.config.evaluation.every_minutes
    return bool(minutes and time.monotonic() - self._last_evaluation >= 60 * minutes)

  @property
  def _scored(self) -> bool:
    """Whether this step was evaluated and that decides which checkpoint is best: then it must be one."""
    return bool(self.config.checkpoint.best) and self._scores is not None

  def _evaluate(self, put_off: bool = False) -> bool:
    """Returns whether to stop: where that is asked for before or, of one process, meanwhile, the evaluation is put off."""
    self._settle()
    self._owes, self._last_evaluation = True, time.monotonic()
    if put_off:
      return True
    with contextlib.suppress(_PutOffError), self._outside_training(), self.watchdog.waiting_for('evaluation'):
      self._scores = self._evaluator.evaluate(self.state.evaluation_variables)
      self._owes = False
      self._writer.write(self.step, self._scores)
    return self._owes

  def _moved(self) -> None:
    """At each batch of an evaluation."""
    self.watchdog.moved()
    if self._owes and self._stop.requested and jax.process_count() == 1:
      raise _PutOffError

  def _save(self, wait: bool = False) -> None:
    self._settle()
    which = 'the checkpoint' if wait else 'the checkpoint before this one'
    with self._outside_training(), self.watchdog.waiting_for(f'{which} to be written'):
      self._checkpointer.save(self.step, self.state, metrics=self._scores, wait=wait, run=checkpoint_lib.RunState(
          iterator=self._batches.state(), meter=self._meter.state(), health=self._health.state(), owes_evaluation=self._owes,
          shards=sharding.batch_shards(self._mesh), config=dataclasses.asdict(self.config),
          preprocessing=lightclip.preprocessing(self.config.model),
          tokenizer=base64.b64encode(self._tokenizer.to_bytes()).decode(), tokenizer_kind=self._tokenizer.suffix))
      self._writer.flush()   # what a run that continues here will not log again

  @contextlib.contextmanager
  def _outside_training(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self._clock.paused(time.perf_counter() - start)
