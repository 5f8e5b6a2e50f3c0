"""Evaluation inside a run: during training as log values, at the end as a table, a JSON file and the report."""
from typing import Any

import jax

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, sharding, storage
from lightclip_jax.data.tokenizers import Tokenizer
from lightclip_jax.evaluation import evaluate, gallery, matching, metrics, report
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.session import Session
from lightclip_jax.models.lightclip import LightCLIP

SHOWN = 'heldout_style'  # the split that the report's gallery is drawn from, where there is one


class Evaluator:
  """Evaluates the variables of a run on the splits of its config."""

  def __init__(self, config: config_lib.Config, folder: storage.Path, tokenizer: Tokenizer, mesh: jax.sharding.Mesh,
               workdir: storage.Path) -> None:
    self._config, self._folder, self._tokenizer = config, folder, tokenizer
    self._mesh, self._workdir = mesh, workdir
    self._model = LightCLIP(config.model)

  def evaluate(self, variables: dict[str, Any]) -> dict[str, float]:
    """Every metric by name, for the log."""
    return metrics.scalars(self._measure(self._session(variables)))

  def finish(self, step: int, variables: dict[str, Any]) -> dict[str, float]:
    """The same, with the table on the console, `results.json` and the report in the workdir."""
    session = self._session(variables)
    results = self._measure(session)
    distributed.say(metrics.format_table(results))
    split = SHOWN if SHOWN in self._config.evaluation.splits else self._config.evaluation.splits[0]
    token = self._config.objective.token_matching
    pictures = gallery.make_gallery(session, split)   # in every process: the devices of all of them embed
    matchings = matching.make_matchings(session, split, epsilon=token.epsilon, num_iterations=token.num_iterations)
    if jax.process_index() == 0:
      evaluate.write_json(self._workdir / 'results.json', results, step=step)
      print(f'report: {report.write_report(self._workdir, results, pictures, matchings, self._config)}', flush=True)
    return metrics.scalars(results)

  def _session(self, variables: dict[str, Any]) -> Session:
    return Session(Embedder(self._model, self._config.model, variables, self._tokenizer,
                            sharding=sharding.batch_sharding(self._mesh), batch_size=self._config.evaluation.batch_size),
                   self._folder)

  def _measure(self, session: Session) -> list[metrics.Metric]:
    return evaluate.evaluate_splits(session, self._config.evaluation.splits)
