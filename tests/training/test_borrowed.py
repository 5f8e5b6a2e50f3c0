"""One whole run from the command line on what others made: weights of a file, parts of a checkpoint, a teacher."""
import json
import os
import pathlib
import subprocess
import sys

import compiling
import numpy as np
import pytest
from tiny import TINY

import lightclip_jax
from lightclip_jax import config as config_lib
from lightclip_jax.data import pipeline, teacher, transforms
from lightclip_jax.data.datasets import shapes
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import convert

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'inference'))
import small_checkpoint  # noqa: E402  (the path above must be set first)

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(__file__).with_name('tiny_config.py')


def run(module, *arguments):
  environment = os.environ | {'XLA_FLAGS': compiling.QUICKLY, 'PYTHONWARNINGS': 'ignore'}
  return subprocess.run([sys.executable, '-m', f'lightclip_jax.{module}', *arguments], cwd=ROOT, env=environment,
                        capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_towers_of_others_frozen_and_a_teacher(tmp_path):
  safetensors = pytest.importorskip('safetensors.numpy')
  shapes.prepare(tmp_path / 'data', size=32)
  plain = config_lib.replace(TINY, optimizer=dict(ema_decay=0.0))
  old, file = (small_checkpoint.random_variables(TINY.model, seed) for seed in (1, 2))
  small_checkpoint.write(tmp_path / 'old', plain, old)
  named = convert.restore({kind: file[kind]['image'] for kind in file}, convert.MOBILENET_V2)
  safetensors.save_file({k: np.ascontiguousarray(v) for k, v in named.items()}, tmp_path / 'timm.safetensors')

  made = run('prepare', 'teacher', f'--model={tmp_path / "old"}', f'--data={tmp_path / "data"}')
  assert made.returncode == 0 and 'distillation.teacher_dim=32 ' in made.stdout, made.stderr
  _holds_the_models_own_embeddings(tmp_path / 'data', lightclip_jax.load(tmp_path / 'old'))

  flags = [f'--config={CONFIG}', f'--config.data.dataset={tmp_path / "data"}', '--config.train.steps=2',
           '--config.optimizer.ema_decay=0.0', '--config.objective.distillation.weight=0.5',
           '--config.objective.token_matching.weight=0.0', '--config.objective.masked_lm.weight=0.0']   # compiles sooner
  wrong = run('main', *flags, f'--workdir={tmp_path / "wrong"}')   # teacher_dim is 512 by default
  assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and 'has embeddings of 32' in wrong.stderr
  assert not (tmp_path / 'wrong').exists()
  done = run('main', *flags, f'--workdir={tmp_path / "run"}', '--config.objective.distillation.teacher_dim=32',
             f'--config.init.image={tmp_path / "timm.safetensors"}', f'--config.init.checkpoint={tmp_path / "old"}',
             '--config.init.checkpoint_pattern=^params/text/', '--config.optimizer.freeze=^(image|text)/')
  assert done.returncode == 0, done.stderr
  assert "image tower from '" in done.stdout and f'{len(named)} tensors matched' in done.stdout

  params, statistics = (checkpoint.load(tmp_path / 'run').variables[kind] for kind in ('params', 'batch_stats'))
  for ours, wanted in ((params['image'], file['params']['image']), (params['text'], old['params']['text']),
                       (statistics, file['batch_stats'])):
    for path, array in _flat(wanted):
      np.testing.assert_array_equal(dict(_flat(ours))[path], array, err_msg=str(path))
  assert np.abs(params['image_projection']['kernel']).max() > 0
  rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  losses = [row['train/loss_distillation'] for row in rows if 'train/loss_distillation' in row]
  assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 100 for loss in losses)


def _flat(tree, path=()):
  return [leaf for name, value in tree.items()
          for leaf in (_flat(value, (*path, name)) if isinstance(value, dict) else [((*path, name), np.asarray(value))])]


def _holds_the_models_own_embeddings(folder, model):
  records, stored = pipeline.evaluation_records(folder, 'train')[-8:], teacher.Teacher(folder)
  images = np.stack([transforms.decode(record.image) for record in records])
  wanted = model.encode_image(images), model.encode_text([record.captions[-1] for record in records])
  for i, record in enumerate(records):
    number = pipeline.manifest.load(folder).split('train').count - 8 + i
    got = stored({'example_id': number, 'caption_number': len(record.captions) - 1})
    for name, rows in zip(('teacher_image', 'teacher_text'), wanted, strict=True):
      np.testing.assert_allclose(got[name], rows[i], atol=1e-3)
