"""Evaluation of a checkpoint on disk, outside a run."""
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping

import jax

from lightclip_jax import distributed, storage
from lightclip_jax.data import datasets, sources
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import evaluate as evaluation
from lightclip_jax.evaluation import metrics, prompts, results, tasks
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.session import Session
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import lightclip


def evaluate(path: storage.Path, chosen: Mapping[str, tasks.Task], out: str, *, step: str = 'last',
             csv: str | None = None, data: str | None = None, templates: prompts.Choice = prompts.OWN,
             batch_size: int | None = None, debug: bool = False) -> list[str]:
  """Runs the tasks (none: those of the config), prints the table, one line for each that failed, and writes the files.

  Args:
    path: a workdir, or its folder of checkpoints.
    chosen: tasks by name; none: those of the config, of KIND:PATH the retrieval of all its records.
    out: the JSON file.
    step: 'last', 'best' or a number.
    csv: a CSV file to append to.
    data: a prepared folder, a built-in name or KIND:PATH instead of the config's.
    templates: prompts instead of the tasks' own.
    batch_size: instead of the config's.
    debug: raise what a task raises.

  Returns:
    The names of the tasks that failed.

  Raises:
    UserError: if there is no such checkpoint, or its parts do not belong together.
  """
  loaded = checkpoint.load(path, checkpoint.which(step))
  config = loaded.config
  if loaded.tokenizer.vocab_size != config.model.text.vocab_size:
    raise UserError(f'the tokenizer in {str(path)!r} has {loaded.tokenizer.vocab_size} pieces; '
                    f"its model's vocabulary has {config.model.text.vocab_size}")
  embedder = Embedder(lightclip.LightCLIP(config.model), config.model, loaded.variables, loaded.tokenizer,
                      batch_size=config.evaluation.batch_size if batch_size is None else batch_size)
  folder = (functools.partial(datasets.whole, data, loaded.tokenizer) if data else
            functools.partial(datasets.resolve, config.data.dataset, config.data, loaded.tokenizer))
  session = Session(embedder, folder, templates=templates, token_matching=config.objective.token_matching,
                    max_pixels=config.data.max_pixels)
  if not chosen and data and not datasets.is_prepared(data):
    chosen = evaluation.of_splits((sources.HELDOUT,))
  chosen = chosen or evaluation.of_splits(config.evaluation.splits) | tasks.choose(config.evaluation.tasks)
  used = tasks.prompted(chosen)
  for key in sorted({key for key, _ in templates.templates} - used - {''}):   # a file may serve several evaluations: no error
    distributed.say(f'no task uses the prompts for {key!r}; here they can be for {", ".join(sorted(used)) or "no image set"}')
  found = evaluation.run_each(session, chosen, debug)
  # First: what took hours must not be lost where the files cannot be written.
  distributed.say(metrics.format_table([metric for result in found for metric in result.metrics]))
  about = json.loads(json.dumps(dataclasses.asdict(config)))
  if jax.process_index() == 0:
    subject = results.Subject(str(path), loaded.step, about, loaded.preprocessing)
    results.write(out, subject, found)
    if csv:
      results.append_csv(csv, subject, found)
  failed = [result.task for result in found if result.error]
  for result in found:
    if result.error and jax.process_index() == 0:
      print(f'error: task {result.task!r} failed: {result.error}', file=sys.stderr)
  return failed
