"""The best checkpoint is kept beside the newest, and a run continues at the newest."""
import jax.numpy as jnp
import pytest

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import embed
from lightclip_jax.inference import checkpoint as inference
from lightclip_jax.training import checkpoint, checks, evaluator
from lightclip_jax.training.state import TrainState

NAME = 'eval/x/top1'


def state_of(step):
  return TrainState(jnp.int32(step), {'w': jnp.full((2,), float(step))}, {}, {'m': jnp.zeros(2)}, None)


def run_of(step):
  return checkpoint.RunState({'next_batch': step}, {}, {}, {}, '')


def save_all(folder, scores, **options):
  """A checkpoint a step; None: it was not evaluated."""
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint(keep=2, best=NAME, **options))
  for step, score in enumerate(scores, 1):
    keeper.save(step, state_of(step), run_of(step), None if score is None else {NAME: score, 'eval/x/other': 0.0})
  keeper.close()


@pytest.mark.parametrize('scores, options, best, kept', [
  ([0.1, 0.5, 0.2, 0.3, None, 0.4], {}, 2, [2, 5, 6]),
  ([0.1, 0.5, 0.2, None], dict(best_mode='min'), 1, [1, 3, 4]),
  ([0.1, float('nan'), 0.0, 0.05], {}, 1, [1, 3, 4]),
])
def test_the_best_and_the_newest_are_kept(tmp_path, scores, options, best, kept):
  save_all(tmp_path, scores, **options)
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()) == kept
  again = checkpoint.Checkpointer(tmp_path, config_lib.Checkpoint(keep=2, best=NAME, **options))
  state, run = again.restore(state_of(0))
  assert int(state.step) == len(scores) and run.iterator == {'next_batch': len(scores)}   # never the best: exact resume
  again.close()
  assert inference.step_of(tmp_path, 'best') == best
  assert inference.step_of(tmp_path, None) == len(scores)


def test_a_score_may_come_after_the_save(tmp_path):
  save_all(tmp_path, [0.1, 0.5, 0.2, 0.3, None, None])
  keeper = checkpoint.Checkpointer(tmp_path, config_lib.Checkpoint(keep=2, best=NAME))
  kept = lambda: sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit())  # noqa: E731
  keeper.save(5, state_of(5), run_of(5), {NAME: 0.4})
  assert inference.step_of(tmp_path, 'best') == 2 and kept() == [2, 5, 6]
  keeper.save(5, state_of(5), run_of(5), {NAME: 0.9})
  assert inference.step_of(tmp_path, 'best') == 2, 'what has a score keeps it'
  keeper.save(6, state_of(6), run_of(6), {NAME: 0.6})
  assert inference.step_of(tmp_path, 'best') == 6 and kept() == [5, 6], 'the best until now is not needed any more'
  assert int(keeper.restore(state_of(0))[0].step) == 6
  keeper.close()


def test_without_scores_there_is_no_best(tmp_path):
  save_all(tmp_path, [None, None, None])
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()) == [2, 3]
  with pytest.raises(UserError, match='no scored checkpoint; .*checkpoint.best'):
    inference.step_of(tmp_path, 'best')
  with pytest.raises(UserError, match=r'no checkpoint of step 1; it has \[2, 3\]'):
    inference.step_of(tmp_path, 1)


@pytest.mark.parametrize('changes, words', [
  (dict(checkpoint=dict(best='eval/heldout_stile/x')), "'eval/heldout_stile/x'; it must be .*heldout_images, heldout_style"),
  (dict(evaluation=dict(tasks=('knn:digit',))), "unknown image set 'digit'"),
])
def test_a_run_says_at_its_start_what_it_cannot_measure(changes, words):
  with pytest.raises(UserError, match=words):
    evaluator.tasks_of(config_lib.replace(config_lib.Config(), **changes))


def test_a_run_says_at_its_start_what_its_processes_cannot_share(monkeypatch):
  monkeypatch.setattr(embed, 'process_share', lambda place: (0, 2))
  config = config_lib.replace(config_lib.Config(), evaluation=dict(batch_size=63))
  with pytest.raises(UserError, match='batch size is 63.*2 processes'):
    evaluator.Evaluator(config, None, None, sharding.make_mesh(config.mesh), None, lambda: None)


def test_a_metric_that_is_not_measured_is_named_and_costs_neither_the_step_nor_the_workdir(tmp_path, capsys):
  config = lambda name: config_lib.replace(config_lib.Config(), checkpoint=dict(best=name))  # noqa: E731
  checks.claim_workdir(tmp_path, config('eval/x/tpo1'))
  keeper = checkpoint.Checkpointer(tmp_path, config('eval/x/tpo1').checkpoint)
  keeper.save(1, state_of(1), run_of(1), {NAME: 0.1})
  keeper.close()
  said = capsys.readouterr().out
  assert "'eval/x/tpo1', which no evaluation measures" in said and 'there are: eval/x/top1' in said
  checks.claim_workdir(tmp_path, config(NAME))   # nothing has a score yet
  keeper = checkpoint.Checkpointer(tmp_path, config(NAME).checkpoint)
  assert int(keeper.restore(state_of(0))[0].step) == 1
  keeper.save(2, state_of(2), run_of(2), {NAME: 0.1})
  keeper.close()
  with pytest.raises(UserError, match="checkpoint.best 'eval/x/top1' there, 'eval/x/other' here"):
    checks.claim_workdir(tmp_path, config('eval/x/other'))
