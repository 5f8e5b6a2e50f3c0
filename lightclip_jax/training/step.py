"""One training step, pure: (state, batch) -> (state, metrics). The loop only binds it to jit.

Letters: B global batch, K micro-batches, S image side, W text positions, M masked positions,
E a teacher's embedding.
"""
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.models import lightclip, norm
from lightclip_jax.objectives.objective import Objective, Scales
from lightclip_jax.outputs import Outputs
from lightclip_jax.training import checks
from lightclip_jax.training import optimizer as optimizer_lib
from lightclip_jax.training import state as state_lib

COMPILER_OPTIONS = {'cpu': {'xla_cpu_prefer_vector_width': 512}}   # XLA's own choice is 256, also where the CPU has 512
INITIAL_OPTIONS = {'cpu': {'xla_backend_optimization_level': 1}}   # compiles in 0.6 of the time, to the same numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One global batch on the devices."""
  image: jax.Array             # uint8 [B, S, S, 3]
  tokens: jax.Array            # int32 [B, W]
  word_mask: jax.Array         # bool [B, W]
  masked_tokens: jax.Array     # int32 [B, W]
  masked_positions: jax.Array  # int32 [B, M]
  masked_labels: jax.Array     # int32 [B, M]
  masked_weights: jax.Array    # float32 [B, M]
  caption_id: jax.Array        # int32 [B]
  teacher_image: jax.Array | None = None   # float16 [B, E]; None where nothing is distilled
  teacher_text: jax.Array | None = None    # float16 [B, E]


def abstract_batch(config: config_lib.Config, mesh: jax.sharding.Mesh, length: int | None = None) -> Batch:
  """Shapes, dtypes and shardings of a global batch, for compiling ahead of time; W is `length`, None: the context."""
  size, context, masked = config.model.image.size, length or config.model.text.context, config.data.max_masked
  place = sharding.batch_sharding(mesh)

  def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.train.batch_size, *shape), dtype, sharding=place)

  distillation = config.objective.distillation
  teacher = {} if distillation.weight.is_zero else {
      name: array(jnp.float16, distillation.teacher_dim) for name in ('teacher_image', 'teacher_text')}
  return Batch(image=array(jnp.uint8, size, size, 3), tokens=array(jnp.int32, context), word_mask=array(jnp.bool_, context),
               masked_tokens=array(jnp.int32, context), masked_positions=array(jnp.int32, masked),
               masked_labels=array(jnp.int32, masked), masked_weights=array(jnp.float32, masked),
               caption_id=array(jnp.int32), **teacher)


def put_batch(arrays: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, length: int | None = None) -> Batch:
  """This process's rows as its part of the global batch on the devices, the texts cut to `length`."""
  place = sharding.batch_sharding(mesh)
  arrays = {**arrays, **{name: arrays[name][:, :length] for name in ('tokens', 'word_mask', 'masked_tokens')}}
  return Batch(**{field.name: jax.make_array_from_process_local_data(place, arrays[field.name])
                  for field in dataclasses.fields(Batch) if field.name in arrays or not field.name.startswith('teacher')})


def fitting_length(tokens_BxW: np.ndarray, end_id: int, lengths: Sequence[int]) -> int:
  """The smallest of `lengths` that holds every text with its end token; W where none does."""
  ends_BxW, context = tokens_BxW == end_id, tokens_BxW.shape[1]
  longest = ends_BxW.argmax(1).max() + 1 if ends_BxW.any(1).all() else context
  return min((length for length in lengths if length >= longest), default=context)


def update_if(good: jax.Array, update: Callable[..., Any], state: Any, *operands: Any, platform: str) -> Any:
  """update(state, *operands) where the scalar `good` is true, the state otherwise.

  A branch on CPUs, where XLA copies what both an update and a selection read: AdamW's step takes half as long. Elsewhere a
  selection, since a GPU's host would wait for the branch's condition.
  """
  if platform == 'cpu':
    return jax.lax.cond(good, update, lambda state, *_: state, state, *operands)
  return jax.tree.map(functools.partial(jax.lax.select, good), update(state, *operands), state)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The parts of a step that do not change during a run."""
  config: config_lib.Config
  mesh: jax.sharding.Mesh
  model: lightclip.LightCLIP
  objective: Objective
  optimizer: optax.GradientTransformationExtraArgs

  @classmethod
  def create(cls, config: config_lib.Config, mesh: jax.sharding.Mesh) -> 'Trainer':
    """Builds model, objective and optimizer from a config.

    Raises:
      UserError: for a batch that does not divide into devices, micro-batches and groups: a group across devices would be
        another set of examples than it says.
    """
    checks.check_model(config.model)
    checks.check_numbers(config)
    checks.check_batch(config, sharding.batch_shards(mesh))
    objective = Objective.from_config(config.objective, mesh=mesh, axes=sharding.BATCH_AXES)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)
    return cls(config, mesh, lightclip.LightCLIP(config.model, sharding.batch_shards(mesh)), objective, optimizer)

  @property
  def _platform(self) -> str:
    return self.mesh.devices.flat[0].platform

  def init_state(self) -> state_lib.TrainState:
    """A fresh state, created directly in its shards: no device ever holds what is not its own."""
    create = jax.jit(self._create, out_shardings=self.places, compiler_options=INITIAL_OPTIONS.get(self._platform))
    return create(jax.random.key(self.config.train.seed))

  def abstract_state(self) -> state_lib.TrainState:
    """Its shapes and shardings."""
    return self._abstract_state

  @functools.cached_property
  def _abstract_state(self) -> state_lib.TrainState:
    return state_lib.abstract_state(self._create, self.mesh)

  @functools.cached_property
  def _create(self) -> Callable[[jax.Array], state_lib.TrainState]:
    return functools.partial(state_lib.create_state, self.config, self.optimizer)   # one object, so that JAX traces it once

  @functools.cached_property
  def places(self) -> state_lib.TrainState:
    """Where each part of the state lives."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

  def lower_step(self, length: int | None = None) -> Any:
    """The step for the mesh's platform and texts of `length` (None: the context), not yet compiled. The state's buffers are
    donated."""
    step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.places, sharding.replicated(self.mesh)))
    with jax.default_matmul_precision(self.config.train.matmul_precision):
      return step.lower(self.abstract_state(), abstract_batch(self.config, self.mesh, length))

  def compile_step(self, length: int | None = None) -> Any:
    """`lower_step`, compiled ahead of time. The state's buffers are donated: the argument must not be used again."""
    return self.lower_step(length).compile(COMPILER_OPTIONS.get(self._platform))

  def step(self, state: state_lib.TrainState, batch: Batch) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """One update on one global batch. Metrics are float32 scalars.

    A batch whose loss or gradients are not finite changes nothing but the count of steps, and has `skipped` 1.
    """
    gradient_of = jax.value_and_grad(self.loss, has_aux=True)
    (loss, (metrics, statistics)), gradients = gradient_of(state.params, state, batch)
    gradients = jax.lax.with_sharding_constraint(gradients, self.places.params)
    gradient_norm = optax.tree.norm(gradients)
    good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    rate = optimizer_lib.learning_rate(self.config.optimizer, self.config.train.steps)(state.step)
    metrics |= {'gradient_norm': gradient_norm, 'learning_rate': rate, 'skipped': 1.0 - good}
    new = update_if(good, self._update, state, gradients, gradient_norm, statistics, platform=self._platform)
    return dataclasses.replace(new, step=state.step + 1), metrics

  def _update(self, state: state_lib.TrainState, gradients: Any, gradient_norm: jax.Array, statistics: Any
              ) -> state_lib.TrainState:
    """The state that has learnt from the gradients, its step not yet counted."""
    scheduled = optimizer_lib.at_step(state.optimizer, state.step)
    updates, optimizer_state = self.optimizer.update(gradients, scheduled, state.params, gradient_norm=gradient_norm)
    params = optax.apply_updates(state.params, updates)
    batch_stats = state.batch_stats
    if statistics:   # not where the image tower has no BatchNorm, or is locked
      batch_stats = norm.update_running_statistics(batch_stats, statistics, self.config.model.batch_norm_momentum)
    return state_lib.TrainState(state.step, params, batch_stats, optimizer_state, self._average(state, params))

  def loss(self, params: Any, state: state_lib.TrainState, batch: Batch) -> tuple[jax.Array, tuple[Any, Any]]:
    """The named sum over the full batch, its metrics, and the normalisation statistics of each group."""
    params = sharding.gather(optimizer_lib.stop_frozen(params, self.config.optimizer.freeze), self.places.params)
    outputs, statistics = self.encode(params, state, batch)
    progress = state.step / self.config.train.steps
    heads = params['training_only']
    scales = Scales(lightclip.clipped_scale(params['logit_scale']), heads['logit_bias'],
                    lightclip.clipped_scale(heads['token_logit_scale']))
    total, metrics = self.objective(
        outputs, scales, progress=progress, duplicate_ids=batch.caption_id, word_mask=batch.word_mask,
        masked_lm_labels=batch.masked_labels, masked_lm_weights=batch.masked_weights,
        teacher_image=batch.teacher_image, teacher_text=batch.teacher_text)
    return total, (metrics | {'logit_scale': scales.logit_scale}, statistics)

  def encode(self, params: Any, state: state_lib.TrainState, batch: Batch) -> tuple[Outputs, Any]:
    """Both towers over the batch. With K micro-batches the encoders run one micro-batch at a time and are
    rematerialised in the backward pass, while the loss still sees the full batch: gradients are exact (GradCache)."""
    count = self.config.train.accumulate
    index_B = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    if count == 1:
      return self._apply(params, state, batch, index_B)
    batch = dataclasses.replace(batch, teacher_image=None, teacher_text=None)   # for the loss, which sees them whole
    micro = sharding.to_micro_batches((batch, index_B), count, self.mesh)
    apply = jax.checkpoint(lambda batch, index: self._apply(params, state, batch, index))
    _, (outputs, statistics) = jax.lax.scan(lambda carry, part: (carry, apply(*part)), None, micro)
    return sharding.from_micro_batches(outputs, self.mesh), statistics

  def _apply(self, params: Any, state: state_lib.TrainState, batch: Batch, index: jax.Array) -> tuple[Outputs, Any]:
    dropout = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
    masked = {}
    if self.objective.needs_masked_lm:
      masked = {'masked_tokens_BxW': batch.masked_tokens, 'masked_positions_BxK': batch.masked_positions}
    outputs, updates = self.model.apply(
        {'params': params, 'batch_stats': state.batch_stats}, batch.image, batch.tokens, **masked,
        token_heads=self.objective.needs_tokens, train=True, example_index_B=index,
        locked=optimizer_lib.locked_towers(params, self.config.optimizer.freeze),
        rngs={'dropout': dropout}, mutable=['group_statistics'])
    return outputs, updates.get('group_statistics', {})

  def _average(self, state: state_lib.TrainState, params: Any) -> Any:
    if state.ema is None:
      return None
    # The warm-up keeps the random initial parameters from weighing on short runs.
    decay = jnp.minimum(self.config.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    return optax.incremental_update(params, state.ema, 1.0 - decay)
