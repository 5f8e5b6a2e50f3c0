"""One run on other meshes, and what several processes agree on."""
import jax
import numpy as np
import pytest
from tiny import TINY, random_batch

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, sharding
from lightclip_jax.models import vit
from lightclip_jax.training import checkpoint as checkpoint_lib
from lightclip_jax.training.step import Trainer

WIDE = config_lib.replace(TINY, model=dict(text=dict(vocab_size=46)))   # a vocabulary that two devices can share


def trainer_on(count, config=WIDE, **mesh):
  return Trainer.create(config, sharding.make_mesh(config_lib.Mesh(**mesh), jax.devices()[:count]))


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(monkeypatch):
  monkeypatch.setattr(vit, 'DEPTH', 2)   # has wide layers to split, and compiles in a fraction of the time
  monkeypatch.setattr(vit, 'MAPS_AFTER', (1, 2))
  monkeypatch.setattr(sharding, 'WHOLE_BELOW', 512)
  small = config_lib.replace(
      WIDE, model=dict(image=dict(name='vit_ti', patch_size=8, stem_stride=2, width=1.0), fusion=dict(stages=((2, 1),))),
      objective=dict(token_matching=dict(weight=config_lib.constant(0.0))))
  losses = []
  for count, mesh in ((1, {}), (8, {}), (8, dict(fsdp=2)), (8, dict(fsdp=2, tensor=2))):
    trainer = trainer_on(count, small, **mesh)
    step, state = trainer.compile_step(), trainer.init_state()
    batches = [random_batch(trainer.mesh, seed)[1] for seed in range(4)]
    losses.append([])
    for k in range(20):
      state, metrics = step(state, batches[k % 4])
      losses[-1].append(float(metrics['loss']))
  np.testing.assert_allclose(losses[1:], np.broadcast_to(losses[0], (3, 20)), rtol=1e-5)


def test_parameters_are_really_split(monkeypatch):
  monkeypatch.setattr(sharding, 'WHOLE_BELOW', 512)   # this model is tiny throughout
  whole = sum(leaf.size for leaf in jax.tree.leaves(trainer_on(1).abstract_state()))
  state = trainer_on(8, fsdp=4, tensor=2).abstract_state()
  own = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(state))
  assert own < 0.5 * whole
  table = state.params['text']['token_embedding']['embedding'].sharding
  assert table.shard_shape((46, 32)) == (23, 8)
  assert state.ema['text']['token_embedding']['embedding'].sharding == table


def test_a_checkpoint_restores_on_other_meshes_bit_for_bit(tmp_path):
  state, wanted = None, None
  for number, (count, mesh) in enumerate(((8, dict(fsdp=2, tensor=2)), (4, dict(fsdp=4)), (1, {}))):
    trainer = trainer_on(count, **mesh)
    if state is None:
      state = trainer.init_state()
      wanted = jax.device_get(state)
    else:
      checkpointer = checkpoint_lib.Checkpointer(tmp_path, WIDE.checkpoint)
      state, run = checkpointer.restore(trainer.abstract_state())
      checkpointer.close()
      assert run.iterator == {'next_batch': 3}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), wanted)
    assert all(leaf.sharding == place for leaf, place in zip(*map(jax.tree.leaves, (state, trainer.places)), strict=True))
    checkpointer = checkpoint_lib.Checkpointer(tmp_path, WIDE.checkpoint)
    checkpointer.save(number, state, checkpoint_lib.RunState({'next_batch': 3}, {}, {}, {}, ''))
    checkpointer.close()


def test_agreement_is_asked_for_at_some_steps_only(monkeypatch):
  asked = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed.multihost_utils, 'process_allgather',
                      lambda flags: asked.append(flags) or np.array([flags, [False, True]]))
  answers = {step: distributed.agree(step, False, False) for step in range(1, 21)}
  assert len(asked) == 2 and [step for step, answer in answers.items() if answer == (False, True)] == [10, 20]
