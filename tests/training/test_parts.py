"""The small parts of a run: schedule, decay mask, meter, writer, checks."""
import base64
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from tiny import SHALLOW, TINY

from lightclip_jax import cli, sharding, storage
from lightclip_jax import config as config_lib
from lightclip_jax.data import manifest
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.models import image_towers, mobilenet_v2
from lightclip_jax.training import checkpoint, checks, loop, metrics, optimizer, preemption
from lightclip_jax.training.step import Trainer


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('freeze', ['', '^b'])
def test_the_schedule_counts_steps_that_were_skipped_too(name, freeze):
  options = config_lib.Optimizer(name=name, freeze=freeze, weight_decay=0.0, warmup_fraction=0.5)
  rule, params = optimizer.make_optimizer(options, 100), {'a': {'kernel': jnp.ones((8, 4))}, 'b': jnp.ones(3)}
  gradients, state = jax.tree.map(jnp.ones_like, params), rule.init(params)
  sizes = []
  for step in (10, 30):   # the first that was not skipped
    updates, after = rule.update(gradients, optimizer.at_step(state, jnp.int32(step)), params, gradient_norm=jnp.float32(1.0))
    sizes.append(float(jnp.abs(updates['a']['kernel']).mean()))
  assert sizes[0] > 0 and sizes[1] == pytest.approx(3 * sizes[0])
  assert jax.tree.structure(after) == jax.tree.structure(state)


def test_local_statistics_continue_on_as_many_devices():
  for config, before, now in ((TINY, 8, 1), (config_lib.replace(TINY, model=dict(batch_norm='local')), 8, 8),
                              (config_lib.replace(TINY, model=dict(batch_norm='local')), 0, 8)):
    checks.check_same_groups(config, before, now)
  with pytest.raises(UserError, match="'local'.* began with 8 devices for the batch, here are 1; "):
    checks.check_same_groups(config, 8, 1)


def test_learning_rate_warms_up_and_ends_at_zero():
  rate = optimizer.learning_rate(config_lib.Optimizer(learning_rate=2.0, warmup_fraction=0.1), 100)
  assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 1, 2])
  assert float(rate(55)) == pytest.approx(1.0) and float(rate(100)) == pytest.approx(0, abs=1e-6)


def test_decay_spares_offsets_scales_and_tables(trainer_of):
  params = trainer_of(1).abstract_state().params
  mask = optimizer.decay_mask(params)
  assert mask['image']['stem']['kernel'] and mask['image_projection']['kernel']
  assert not mask['image']['stem_norm']['scale'] and not mask['logit_scale'] and not mask['text']['position_embedding']


def test_meter_continues_from_its_state():
  meter = metrics.Meter()
  meter.add({'loss': 0.1})
  meter.add({'loss': 0.7})
  again = metrics.Meter(json.loads(json.dumps(meter.state())))
  for m in (meter, again):
    m.add({'loss': 1.3})
  assert meter.take() == again.take() == {'loss': pytest.approx(0.7)}
  meter.add({'loss': 5.0})
  assert meter.take() == {'loss': 5.0}


def test_writer_drops_what_a_killed_run_wrote_after_its_last_save(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 2.0}\n{"step": 3, "tra')
  writer = metrics.MetricWriter(tmp_path, resume_step=1)
  writer.write(2, {'train/loss': 2.5})
  writer.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
      {'step': 1, 'train/loss': 1.0}, {'step': 2, 'train/loss': 2.5}]
  assert list((tmp_path / 'tensorboard').glob('events.*'))


def test_the_last_evaluation_is_logged_once_by_a_run_that_is_killed_after_it(tmp_path):
  for values in ({'train/loss': 2.0}, {'eval/x': 1.0}, {'eval/x': 1.0}):
    writer = metrics.MetricWriter(tmp_path, resume_step=5)
    writer.write(5, values)
    writer.close()
  assert [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [
      {'step': 5, 'train/loss': 2.0}, {'step': 5, 'eval/x': 1.0}]


def test_durations():
  assert [metrics.duration(s) for s in (12.4, 250, 3900, math.inf)] == ['12 s', '4 min 10 s', '1 h 05 min', '?']


@pytest.mark.parametrize('measured, words', [
  (dict(loss_over_log_batch=0.5, top1_image_to_text=0.25),
   'loss 2.000 (contrastive 2.000)  loss/log B 0.500  top-1 25.0%  scale 9.0'),
  (dict(top1_image_to_text=0.25), 'loss 2.000 (contrastive 2.000)  top-1 25.0%  scale 9.0'),   # as the sigmoid loss
  ({}, 'loss 2.000 (contrastive 2.000)  scale 9.0'),   # no contrastive loss
])
def test_the_console_shows_what_the_objective_measures(measured, words):
  others = dict(logit_scale=9.0, examples_per_second=8.0, data_wait=0.0, eta_seconds=1.0)
  values = dict(loss=2.0, loss_contrastive=2.0, **measured, **others)
  line = metrics.console_line(5, 10, {f'train/{name}': value for name, value in values.items()})
  assert line == f'step 5/10 (50%)  {words}  8 pairs/s  data wait 0%  ETA 1 s'


@pytest.mark.parametrize('changes, shards, parts', [
    (dict(train=dict(batch_size=60)), 8, ['train.batch_size', '60', '8']),
    (dict(train=dict(batch_size=64, accumulate=3)), 1, ['64', 'accumulate 3']),
    (dict(train=dict(accumulate=0)), 1, ['train.accumulate is 0; it must be at least 1']),
    (dict(train=dict(accumulate=-1)), 1, ['train.accumulate is -1']),
    (dict(model=dict(batch_norm='group:32')), 8, ['model.batch_norm', '32', '16']),
    (dict(train=dict(accumulate=2)), 8, ['model.batch_norm', '16', '8', 'accumulate 2']),
    (dict(model=dict(batch_norm='batch')), 1, ["'batch'", 'group:N']),
    (dict(model=dict(batch_norm='global'), train=dict(accumulate=2)), 1, ['accumulate is 2', "'global'", 'group:N']),
    (dict(objective=dict(token_matching=dict(group_size=3))), 1, ['group_size', '3', '128']),
])
def test_batches_that_do_not_divide(changes, shards, parts):
  with pytest.raises(UserError) as error:
    Trainer.create(config_lib.replace(TINY, **changes), sharding.make_mesh(TINY.mesh, jax.devices()[:shards]))
  assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize('name', image_towers.TOWERS)
def test_groups_must_divide_the_batch_of_towers_that_have_any(name):
  tower = dict(name=name, size=224, width=1.0, stem_stride=2)
  config = config_lib.replace(TINY, model=dict(image=tower, fusion=dict(stages=())))
  statistics = Trainer.create(config, sharding.make_mesh(TINY.mesh, jax.devices()[:1])).abstract_state().batch_stats
  assert bool(statistics) == (name in image_towers.BATCH_NORM)
  with pytest.raises(UserError, match='model.batch_norm') if statistics else contextlib.nullcontext():
    checks.check_batch(config_lib.replace(config, model=dict(batch_norm='group:100')), 1)


@pytest.mark.parametrize('changes, words', [
  (dict(text=dict(heads=0)), 'model.text.heads is 0; it must be at least 1'),
  (dict(image=dict(size=-32)), 'model.image.size is -32; it must be at least 1'),
  (dict(logit_scale_init=0.0), 'model.logit_scale_init is 0.0; it must be above 0'),
  (dict(fusion=dict(stages=((3, 1), (3, 1)))), 'each pair can be there once'),
  (dict(batch_norm='group:²'), "'group:²'"),
])
def test_model_sizes_must_be_positive(changes, words):
  with pytest.raises(UserError, match=words):
    Trainer.create(config_lib.replace(TINY, model=changes), sharding.make_mesh(TINY.mesh, jax.devices()[:1]))


@pytest.mark.parametrize('name, value, words', [
  ('optimizer.clip_norm', -1.0, 'at least 0'),   # it turned each gradient round
  ('optimizer.b1', 1.0, 'at least 0 and below 1'),
  ('optimizer.ema_decay', 1.5, 'at least 0 and below 1'),
  ('optimizer.eps', 0.0, 'above 0'),   # the row of a word that no batch has shown became not a number
  ('optimizer.warmup_fraction', 2.0, '0 to 1'),
  ('model.batch_norm_momentum', 1.0, 'at least 0 and below 1'),   # statistics that never move
  ('objective.masked_lm.weight.end', -0.5, 'at least 0'),
  ('model.text.dropout', 1.0, 'at least 0 and below 1'),
  ('objective.contrastive.target_temperature', 0.0, 'above 0'),
  ('objective.contrastive.alpha.end', 1.5, '0 to 1'),
  ('objective.token_matching.epsilon', 0.0, 'above 0'),
  ('objective.token_matching.num_iterations', 0, 'at least 1'),
  ('checkpoint.every_minutes', -1.0, 'at least 0'),   # it saved every step
])
def test_numbers_must_be_in_their_ranges(name, value, words):
  config = config_lib.replace(TINY, **functools.reduce(lambda tree, part: {part: tree}, reversed(name.split('.')), value))
  with pytest.raises(UserError, match=f'^{name} is {value}; it must be {words}$'):
    Trainer.create(config, sharding.make_mesh(TINY.mesh, jax.devices()[:1]))


@pytest.mark.parametrize('begin, finish', [(0.8, 0.3), (-0.1, 1.0), (0.0, 1700.0)])
def test_schedules_begin_before_they_finish(begin, finish):
  falling = config_lib.Schedule(1.0, 0.2, begin, finish)   # a finish before the begin was a step at the begin
  config = config_lib.replace(TINY, objective=dict(token_matching=dict(weight=falling)))
  with pytest.raises(UserError, match=f'objective.token_matching.weight begins at {begin} and finishes at {finish};'):
    Trainer.create(config, sharding.make_mesh(TINY.mesh, jax.devices()[:1]))


def test_a_run_continues_with_its_own_tokenizer():
  begun, other = (types.SimpleNamespace(to_bytes=lambda content=content: content) for content in (b'as it began', b'another'))
  saved = base64.b64encode(begun.to_bytes()).decode()
  checks.check_same_tokenizer(saved, begun)
  with pytest.raises(UserError, match='another than that of the run'):
    checks.check_same_tokenizer(saved, other)


def test_counts_must_be_positive():
  with pytest.raises(UserError, match='train.steps is 0'):
    checks.check_steps(config_lib.replace(TINY, train=dict(steps=0)))
  with pytest.raises(UserError, match=r'train.steps is 2147483648; .* below 2\^31'):
    checks.check_steps(config_lib.replace(TINY, train=dict(steps=1 << 31)))
  with pytest.raises(UserError, match='train.seed is -1; it must be at least 0'):
    checks.check_steps(config_lib.replace(TINY, train=dict(seed=-1)))
  with pytest.raises(UserError, match=r'train.seed is 9223372036854775808; .* below 2\^63'):
    checks.check_steps(config_lib.replace(TINY, train=dict(seed=1 << 63)))
  with pytest.raises(UserError, match='data.max_masked is 0; it must be at least 1'):   # of words that are to be guessed
    checks.check_steps(config_lib.replace(TINY, data=dict(max_masked=0)))
  unused = dict(masked_lm=dict(weight=config_lib.constant(0.0)))
  checks.check_steps(config_lib.replace(TINY, data=dict(max_masked=0), objective=unused))
  with pytest.raises(UserError, match=r'data.crop_ratio is \(0.0, 1.0\)'):
    checks.check_steps(config_lib.replace(TINY, data=dict(crop_ratio=(0.0, 1.0))))


def test_a_full_disk_is_one_line(tmp_path, capsys):
  keeper = checkpoint.Checkpointer(tmp_path / 'run', TINY.checkpoint)

  def main():
    with open('/dev/full', 'w') as logs:
      logs.write('x' * 100)
      with keeper._failures_by_name():   # as TensorStore says it
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "params/0" in OCDBT database at local file "x"')

  assert cli.run(main) == 1
  said = capsys.readouterr().err
  assert said.startswith('error: No space left on device, and a checkpoint needs 0.0 MB: ')
  assert str(tmp_path / 'run') in said and said.count('\n') == 1
  with pytest.raises(ValueError, match='another'), keeper._failures_by_name():
    raise ValueError('another error')
  with pytest.raises(OSError, match='nonsense'):   # not about room
    cli.run(lambda: (_ for _ in ()).throw(OSError(errno.EINVAL, 'nonsense', 'f')))
  keeper.close()


def test_two_processes_do_not_train_in_one_workdir(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(storage, 'WAITS', (0.0, 0.1))
  with checks.alone(tmp_path):
    with pytest.raises(UserError, match='another process trains in'), checks.alone(tmp_path):
      raise AssertionError
    assert capsys.readouterr().err.count(f'another process trains in this folder: {str(tmp_path)!r}; tried again in 0') == 2
    assert cli.run(lambda: checks.alone(tmp_path).__enter__()) == 2
    said = f'\nerror: another process trains in {str(tmp_path)!r}; wait for it, stop it, or use another --workdir\n'
    assert capsys.readouterr().err.endswith(said)
    with checks.alone(epath.Path('gs://bucket/run')):   # no locks there
      pass
  with checks.alone(tmp_path):   # once the first has ended
    pass

  program = f'''
import pathlib
from lightclip_jax.training import checks
with checks.alone(pathlib.Path({str(tmp_path)!r})):
  print(flush=True)
  input()'''
  with subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b'\n'
    with pytest.raises(UserError, match='another process trains in'), checks.alone(tmp_path):
      raise AssertionError
    other.kill()   # gives it back
    other.wait()
    with checks.alone(tmp_path):
      pass


def test_a_workdir_is_held_before_its_checkpoints_are_listed_and_until_all_is_closed(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'WAITS', ())
  monkeypatch.setattr(mobilenet_v2, 'STAGES', SHALLOW)

  class Checkpointer:
    def __init__(self, workdir, options):
      with pytest.raises(UserError, match='another process trains in'), checks.alone(workdir):
        raise AssertionError

    def close(self):
      Checkpointer(tmp_path, None)

  monkeypatch.setattr(checkpoint, 'Checkpointer', Checkpointer)
  run = loop.Run(config_lib.replace(TINY, mesh=dict(data=8)), tmp_path, preemption.Preemption())
  run.close()
  with checks.alone(tmp_path):
    pass


def test_a_disk_without_locks_is_not_refused(tmp_path, monkeypatch):
  def none(descriptor, operation):
    raise OSError(errno.ENOTSUP, 'no locks')
  monkeypatch.setattr(storage.fcntl, 'flock', none)
  with checks.alone(tmp_path), checks.alone(tmp_path):
    pass


def test_output_that_nobody_reads_is_one_line(capsys):
  def main():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, 'w') as output:
      print('step 1', file=output, flush=True)

  assert cli.run(main) == 1
  assert capsys.readouterr().err.startswith('error: Broken pipe: the standard output, or a connection; ')


def test_a_path_that_cannot_be_written_is_one_line(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  for path, words in ((tmp_path, 'Is a directory'), (tmp_path / 'file/x', 'Not a directory'),
                      (tmp_path / ('x' * 300), 'File name too long')):
    assert cli.run(lambda path=path: path.write_text('x') and 0) == 2
    assert capsys.readouterr().err == f'error: {words}: {str(path)!r}; give another path\n'
  assert cli.run(lambda: (tmp_path / 'no/x').write_text('x') and 0) == 1, 'what was there may be there again'
  said = f"error: No such file or directory: {str(tmp_path / 'no/x')!r}; put it back or give another path\n"
  assert capsys.readouterr().err == said


def test_no_split_to_evaluate_is_said_at_the_start(tmp_path):
  shapes.prepare(tmp_path / 'data', size=16)
  with pytest.raises(UserError, match='evaluation.splits is empty.*heldout_style'):
    checks.check_splits(config_lib.replace(TINY, evaluation=dict(splits=())), tmp_path / 'data')
  with pytest.raises(UserError, match="evaluation.splits names 'nope', which 'shapes' does not have; .*heldout_style.*holdout"):
    checks.check_splits(config_lib.replace(TINY, evaluation=dict(splits=('nope',))), tmp_path / 'data')
  made = manifest.load(tmp_path / 'data')
  empty = dataclasses.replace(made, splits={**made.splits, 'heldout_style': manifest.Split((), 0)})
  empty.save(tmp_path / 'data')
  with pytest.raises(UserError, match="evaluation.splits names 'heldout_style', of which 'shapes' has no record"):
    checks.check_splits(config_lib.replace(TINY, evaluation=dict(splits=('heldout_style',))), tmp_path / 'data')


def test_tokenizer_must_fit():
  tokenizer = type('Tokenizer', (), dict(vocab_size=99, end_id=3))
  with pytest.raises(UserError, match="vocab_size is 45, .*'shapes' has 99"):
    checks.check_tokenizer(TINY, tokenizer)
  tokenizer.vocab_size, tokenizer.end_id = 45, 7
  with pytest.raises(UserError, match='end_id is 3, .* 7'):
    checks.check_tokenizer(TINY, tokenizer)


def test_workdir_belongs_to_one_config(tmp_path):
  checks.claim_workdir(tmp_path / 'run', TINY)
  checks.claim_workdir(tmp_path / 'run', config_lib.replace(TINY, train=dict(log_every=7)))  # changes nothing that is learnt
  with pytest.raises(UserError, match='optimizer.learning_rate 0.003 there, 0.1 here.*another --workdir'):
    checks.claim_workdir(tmp_path / 'run', config_lib.replace(TINY, optimizer=dict(learning_rate=0.1)))
  (tmp_path / 'run' / 'config.json').write_text('{')
  with pytest.raises(UserError, match='not JSON'):
    checks.claim_workdir(tmp_path / 'run', TINY)


def test_what_is_best_stays_what_it_was(tmp_path):
  claim = lambda **options: checks.claim_workdir(tmp_path, config_lib.replace(TINY, checkpoint=options))
  claim(best_mode='min')
  claim(best='eval/a/b')   # there are no scores yet
  claim(best='eval/a/b', keep=7)
  (tmp_path / 'checkpoints' / '7' / 'metrics').mkdir(parents=True)   # a checkpoint that has one
  for options, said in (dict(best='eval/a/c'), "checkpoint.best 'eval/a/b' there, 'eval/a/c' here"), (
      dict(best='eval/a/b', best_mode='min'), "best_mode 'max' there, 'min' here"):
    with pytest.raises(UserError, match=said):
      claim(**options)


def test_a_devices_own_statistics_keep_their_devices(tmp_path):
  local = config_lib.replace(TINY, model=dict(batch_norm='local'))
  for name, config, changed in (('group', TINY, None), ('local', local, 'mesh.fsdp 1 there, 2 here')):
    checks.claim_workdir(tmp_path / name, config)
    with pytest.raises(UserError, match=changed) if changed else contextlib.nullcontext():
      checks.claim_workdir(tmp_path / name, config_lib.replace(config, mesh=dict(fsdp=2)))


def test_free_options_exist():
  for name in checks.FREE:
    config_lib.check_key(name)




def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
  params = {'dense': {'kernel': jnp.ones((8, 24)), 'bias': jnp.ones(24)}, 'conv': {'kernel': jnp.ones((3, 3, 8, 4))},
            'depthwise': {'kernel': jnp.ones((3, 3, 1, 8))}, 'stem': {'kernel': jnp.ones((3, 3, 3, 8))},
            'token_embedding': {'embedding': jnp.ones((50, 8))}}
  key = jax.random.key(0)
  gradients = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
  options = config_lib.Optimizer(name='muon', learning_rate=1e-2, matrix_learning_rate=1e-1, warmup_fraction=0.0,
                                 weight_decay=0.0)
  muon, adamw = (optimizer.make_optimizer(o, 2) for o in (options, config_lib.replace(options, name='adamw')))
  updates = []
  for transformation in (muon, adamw):
    state = transformation.init(params)
    for _ in range(2):   # the first step's rate is 0
      update, state = transformation.update(gradients, state, params, gradient_norm=optax.tree.norm(gradients))
    updates.append(update)
  for name in ('dense', 'conv'):
    matrix = np.asarray(updates[0][name]['kernel']).reshape(-1, params[name]['kernel'].shape[-1])
    singular = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * math.sqrt(max(matrix.shape)))
    assert 0.6 < singular.min() and singular.max() < 1.3, name
  for path in (('dense', 'bias'), ('depthwise', 'kernel'), ('stem', 'kernel'), ('token_embedding', 'embedding')):
    ours, theirs = (update[path[0]][path[1]] for update in updates)
    assert np.sign(ours).tolist() == np.sign(theirs).tolist() and 0.5e-2 < np.abs(ours).mean() < 2e-2, path


def test_a_forecast_leaves_out_the_start_and_a_pause(monkeypatch):
  now = iter([1000.0, 1004.0, 1008.0, 1070.0, 1074.0, 1079.0])   # only these steps are timed; one waited for a compilation
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(now))
  forecast = metrics.Forecast(100, 200)
  told = {step: forecast.after(step) for step in range(101, 201)}
  assert {step: seconds for step, seconds in told.items() if seconds} == {110: 90 * 4.0}
