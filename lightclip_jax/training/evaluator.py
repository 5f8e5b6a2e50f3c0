"""Evaluation inside a run: during training as log values, at the end as a table, a JSON file and the report."""
from collections.abc import Callable
from typing import Any

import jax

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, sharding, storage
from lightclip_jax.data.tokenizers import Tokenizer
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import evaluate, gallery, insight, matching, metrics, report, results, tasks
from lightclip_jax.evaluation.embed import Embedder, share_of
from lightclip_jax.evaluation.session import Session
from lightclip_jax.models.lightclip import LightCLIP

SHOWN = 'heldout_style'  # the split that the report's gallery is drawn from, where there is one


def tasks_of(config: config_lib.Config) -> dict[str, tasks.Task]:
  """What is evaluated, by name.

  Raises:
    UserError: for an unknown task, or a `checkpoint.best` that none of them measures.
  """
  chosen, best = evaluate.of_splits(config.evaluation.splits) | tasks.choose(config.evaluation.tasks), config.checkpoint.best
  if best and not best.startswith(tuple(f'eval/{tasks.short(name)}/' for name in chosen)):
    raise UserError(f'checkpoint.best is {best!r}; it must be eval/TASK/METRIC of a task that is evaluated: '
                    f'{", ".join(map(tasks.short, chosen))}')
  return chosen


class Evaluator:
  """Evaluates the variables of a run on the splits of its config."""

  def __init__(self, config: config_lib.Config, folder: storage.Path, tokenizer: Tokenizer, mesh: jax.sharding.Mesh,
               workdir: storage.Path, moved: Callable[[], None]) -> None:
    """`moved` is called at each batch."""
    self._config, self._folder, self._tokenizer = config, folder, tokenizer
    self._mesh, self._workdir, self._moved = mesh, workdir, moved
    self._model = LightCLIP(config.model)
    self._tasks = tasks_of(config)
    share_of(sharding.batch_sharding(mesh), config.evaluation.batch_size)   # said now, not after a thousand steps

  def evaluate(self, variables: dict[str, Any]) -> dict[str, float]:
    """Every metric by name, for the log and for checkpoints."""
    return metrics.scalars(self._measure(self._session(variables)))

  def finish(self, step: int, variables: dict[str, Any]) -> dict[str, float]:
    """The same, with the table on the console, `results.json` and the report in the workdir."""
    session = self._session(variables)
    found = self._measure(session)
    distributed.say(metrics.format_table(found))
    split = SHOWN if SHOWN in self._config.evaluation.splits else self._config.evaluation.splits[0]
    pictures = gallery.make_gallery(session, split)   # in every process: the devices of all of them embed
    matchings = matching.make_matchings(session, split)
    looked = insight.look(session, split, [name for name in self._config.evaluation.splits if name != split])
    if jax.process_index() == 0:
      results.write_json(self._workdir / 'results.json', found, step=step)
      page = report.write_report(self._workdir, found, pictures, matchings, self._config, looked)
      print(f'report: {page}', flush=True)
    return metrics.scalars(found)

  def _session(self, variables: dict[str, Any]) -> Session:
    return Session(Embedder(self._model, self._config.model, variables, self._tokenizer,
                            sharding=sharding.batch_sharding(self._mesh), batch_size=self._config.evaluation.batch_size,
                            moved=self._moved),
                   self._folder, token_matching=self._config.objective.token_matching,
                   max_pixels=self._config.data.max_pixels)

  def _measure(self, session: Session) -> list[metrics.Metric]:
    return evaluate.run(session, self._tasks)
