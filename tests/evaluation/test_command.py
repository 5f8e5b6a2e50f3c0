"""The command, and gallery, matchings and report of a real (untrained) model on the data set of shapes."""
import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

from lightclip_jax import config, evaluate
from lightclip_jax.data import pipeline
from lightclip_jax.data.datasets import shapes
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import evaluate as evaluation
from lightclip_jax.evaluation import gallery, insight, matching, metrics, report
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.session import Session
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import lightclip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('command') / 'shapes'
  shapes.prepare(path, size=32)
  return path


@pytest.fixture(scope='module')
def loaded(folder):
  tokenizer = pipeline.load_tokenizer(folder)
  small = config.replace(
    config.Config(), data=dict(dataset=str(folder)), train=dict(batch_size=32), evaluation=dict(batch_size=48),
    model=dict(embed_dim=16, token_dim=8, image=dict(size=32, width=0.1, stem_stride=1),
               fusion=dict(stages=((1, 1),), heads=2),
               text=dict(width=16, heads=2, depth=1, context=12, vocab_size=tokenizer.vocab_size)))
  rng = np.random.default_rng(0)   # filled by hand, since compiling the initialisation takes longer than all the rest
  shape = jax.eval_shape(lambda: lightclip.init_variables(small.model, jax.random.key(0)))
  variables = {'params': jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shape['params']),
               'batch_stats': jax.tree.map(lambda x: np.ones(x.shape, np.float32), shape['batch_stats'])}
  return checkpoint.Loaded(7, small, variables, tokenizer, {})


@pytest.fixture(scope='module')
def session(folder, loaded):
  model = lightclip.LightCLIP(loaded.config.model)
  return Session(Embedder(model, loaded.config.model, loaded.variables, loaded.tokenizer, batch_size=48), folder)


def test_the_command_writes_what_the_function_measures(folder, loaded, session, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(checkpoint, 'load', lambda path, step: loaded)
  out = tmp_path / 'results.json'
  evaluate.main(evaluate.parse(['--checkpoint=run', '--task=heldout_style', f'--out={out}']))
  read = json.loads(out.read_text())
  assert (read['checkpoint'], read['step']) == ('run', 7)
  expected = metrics.scalars(evaluation.evaluate_splits(session, ['heldout_style']))
  assert {m['name']: m['value'] for m in read['metrics']} == pytest.approx(expected)
  assert 'heldout_style/concept_top1' in capsys.readouterr().out
  # A run on other sources, whose options say nothing of a prepared folder.
  own = dict(dataset='csv:gone.csv', tokenizer='gone.model', image_column='x', holdout_every=9)
  elsewhere = dataclasses.replace(loaded, config=config.replace(loaded.config, data=own))
  monkeypatch.setattr(checkpoint, 'load', lambda path, step: elsewhere)
  evaluate.main(evaluate.parse(['--checkpoint=run', '--task=heldout_style', f'--data={folder}', f'--out={out}']))
  assert json.loads(out.read_text())['metrics'] == read['metrics']
  monkeypatch.setattr(checkpoint, 'load', lambda path, step: loaded)
  evaluate.main(evaluate.parse(['--checkpoint=run', f'--out={out}']))
  names = {m['name'].split('/')[1] for m in json.loads(out.read_text())['metrics']}
  assert names == set(loaded.config.evaluation.splits)
  capsys.readouterr()
  with pytest.raises(IsADirectoryError):
    evaluate.main(evaluate.parse(['--checkpoint=run', '--task=heldout_style', f'--out={tmp_path}']))
  assert 'heldout_style/concept_top1' in capsys.readouterr().out   # what was measured is not lost
  with pytest.raises(UserError, match='evaluation batch size is 0'):   # not the config's
    evaluate.main(evaluate.parse(['--checkpoint=run', '--batch_size=0', f'--out={out}']))


def test_pairs_of_ones_own_are_evaluated_whole_with_the_words_of_the_checkpoint(loaded, monkeypatch, tmp_path):
  gone = config.replace(loaded.config, data=dict(dataset='csv:gone.csv', tokenizer='gone.model', weights=(2.0,)))
  monkeypatch.setattr(checkpoint, 'load', lambda path, step: dataclasses.replace(loaded, config=gone))
  monkeypatch.setenv('LIGHTCLIP_DATA', str(tmp_path / 'cache'))
  colours = {'red': (255, 0, 0), 'green': (0, 128, 0), 'blue': (0, 0, 255)}
  for name, colour in colours.items():
    PIL.Image.new('RGB', (20, 20), colour).save(tmp_path / f'{name}.png')
  rows = [f'{name}.png,{text} {name}' for name in colours for text in ('a', 'all')]
  (tmp_path / 'own.csv').write_text('\n'.join(['filepath,title', *rows]))
  evaluate.main(evaluate.parse(['--checkpoint=run', f'--data=csv:{tmp_path}/own.csv', f'--out={tmp_path / "own.json"}']))
  counts = {m['name']: m['count'] for m in json.loads((tmp_path / 'own.json').read_text())['metrics']}
  assert counts['eval/heldout/image_to_text_r1'] == 3 and counts['eval/heldout/text_to_image_r1'] == 6


def test_prompts_that_no_task_uses_are_named(loaded, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(checkpoint, 'load', lambda path, step: loaded)
  (tmp_path / 'mine.json').write_text('{"digit": ["the {}"], "digits": ["the {}"]}')
  monkeypatch.setattr(evaluation, 'run_each', lambda *_: [])
  flags = ['--checkpoint=run', f'--out={tmp_path / "none.json"}', f'--prompts={tmp_path / "mine.json"}']
  for chosen, said in ((['zero_shot:digits', 'zero_shot:./my/colours'], "'digit'; here they can be for colours, digits"),
                       (['knn:digits'], "'digits'; here they can be for no image set")):
    evaluate.main(evaluate.parse([*flags, *(f'--task={name}' for name in chosen)]))
    assert f'no task uses the prompts for {said}\n' in capsys.readouterr().out


def test_embeddings_are_unit_vectors_whatever_the_batch(session, folder, loaded):
  one = Embedder(session.embedder.model, loaded.config.model, loaded.variables, loaded.tokenizer, batch_size=24)
  images = session.images('heldout_images')
  np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(Session(one, folder).images('heldout_images'), images, atol=1e-5)


def test_report_of_a_real_model(session, loaded, tmp_path):
  results = evaluation.evaluate_splits(session, ['heldout_style'])
  pictures = gallery.make_gallery(session, 'heldout_style', count=6)
  drawn = matching.make_matchings(session, 'heldout_style', count=2)
  grid = drawn[0].heat[0].shape[0]
  for one in drawn:
    assert all(heat.shape == (grid, grid) for heat in one.heat)
    total = sum(heat.sum() for heat in one.heat)
    pieces = loaded.tokenizer.encode([' '.join(one.words)], 12)
    assert total == pytest.approx(min(grid * grid, loaded.tokenizer.word_mask(pieces).sum()), rel=0.02)   # one-to-one
  looked = insight.look(session, 'heldout_style', ['heldout_images'])
  accuracy = metrics.scalars(results)['eval/heldout_style/group_top1']
  assert sum(row.count for row in looked.confused) == 108
  assert sum(row.count * row.accuracy for row in looked.confused) / 108 == pytest.approx(accuracy)
  for row in looked.neighbours:
    cosines = [cosine for _, cosine in row.nearest]
    assert row.query.style == 'small' and cosines == sorted(cosines, reverse=True) and len(cosines) == 5
  page = report.write_report(tmp_path, results, pictures, drawn, loaded.config, looked).read_text(encoding='utf-8')
  assert page.count('<article') == 6 and page.count('alt="where the model finds') == sum(len(m.words) for m in drawn)
  assert all(picture.name in page for picture in pictures)


@pytest.mark.parametrize('flags, words', [
  (['--checkpoint=x', '--task=nope', '--out=o'], "error: unknown task 'nope'; there are: heldout_images"),
  (['--checkpoint=/nowhere', '--out=o'], "error: '/nowhere' holds no checkpoint"),
])
def test_mistakes_are_one_line_and_exit_code_2(flags, words):
  done = subprocess.run([sys.executable, '-m', 'lightclip_jax.evaluate', *flags], capture_output=True, text=True)
  assert done.returncode == 2
  assert words in done.stderr and done.stderr.count('\n') == 1


def test_the_command_keeps_what_it_compiles(tmp_path):
  code = ('import sys; from lightclip_jax import evaluate\n'
          'try: evaluate.main(evaluate.parse(["--checkpoint=none", "--out=none.json"]))\n'
          'except ValueError: print(sys.modules["jax"].config.jax_compilation_cache_dir)')
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  done = subprocess.run([sys.executable, '-c', code], env=environment | {'LIGHTCLIP_DATA': str(tmp_path)},
                        capture_output=True, text=True, check=True)
  assert done.stdout == f'{tmp_path / "compiled"}\n'
