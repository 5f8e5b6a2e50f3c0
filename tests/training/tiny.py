"""One tiny model and a batch for it, which the tests of training share."""
import jax
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax.config import Config, Schedule
from lightclip_jax.training.step import put_batch

TINY = config_lib.replace(
    Config(),
    model=dict(embed_dim=32, token_dim=16, batch_norm='group:16', batch_norm_momentum=0.9,
               image=dict(size=32, stem_stride=1, width=0.1),
               text=dict(width=32, heads=2, depth=2, context=12, vocab_size=45, dropout=0.1),
               fusion=dict(stages=((3, 1), (4, 2)), heads=2)),
    data=dict(dataset='shapes', workers=0, max_masked=3),
    objective=dict(contrastive=dict(alpha=Schedule(0.1, 0.2), beta=Schedule(0.2, 1.0)), token_matching=dict(group_size=2)),
    train=dict(steps=200, batch_size=128, log_every=1),
    optimizer=dict(learning_rate=3e-3, ema_decay=0.9),
    evaluation=dict(every_steps=1000, batch_size=64))


def random_batch(mesh: jax.sharding.Mesh, seed: int = 0, teacher_dim: int = 0) -> tuple[dict[str, np.ndarray], object]:
  """A global batch of noise whose pairs are all distinct, as numpy and on the devices."""
  rng = np.random.default_rng(seed)
  batch, context, masked = TINY.train.batch_size, TINY.model.text.context, TINY.data.max_masked
  tokens = np.zeros((batch, context), np.int32)
  lengths = rng.integers(2, context - 2, batch)
  for row, length in zip(tokens, lengths, strict=True):
    row[:length + 2] = [2, *rng.integers(5, 45, length), 3]
  word_mask = tokens > 4
  positions = np.stack([rng.permutation(np.flatnonzero(row))[:2].tolist() + [0] for row in word_mask]).astype(np.int32)
  labels = np.take_along_axis(tokens, positions, 1)
  masked_tokens = tokens.copy()
  np.put_along_axis(masked_tokens, positions[:, :2], 4, 1)
  arrays = dict(
      image=rng.integers(0, 256, (batch, 32, 32, 3), np.uint8), tokens=tokens, word_mask=word_mask,
      masked_tokens=masked_tokens, masked_positions=positions, masked_labels=labels,
      masked_weights=np.broadcast_to(np.float32([1, 1, 0]), (batch, masked)).copy(),
      caption_id=(np.arange(batch) // 2 * 2 % 50).astype(np.int32))  # some captions occur twice or more
  if teacher_dim:
    for name in ('teacher_image', 'teacher_text'):
      rows = rng.normal(size=(batch, teacher_dim))
      arrays[name] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
  return arrays, put_batch(arrays, mesh)
