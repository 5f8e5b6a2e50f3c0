"""The training objective: named terms, each with a weight that may follow a schedule, and their sum.

Letters: B batch, W text positions, K masked positions, E the teacher's embedding.

A new loss is a new file, and one line in `TERMS` that names its section of `config.Objective` and builds it.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.objectives.contrastive import softened_contrastive_loss
from lightclip_jax.objectives.distillation import distillation_loss
from lightclip_jax.objectives.masked_lm import masked_lm_loss
from lightclip_jax.objectives.sigmoid import sigmoid_contrastive_loss
from lightclip_jax.objectives.token_matching import token_matching_loss
from lightclip_jax.outputs import Outputs

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
  """Learned scalars, float32; scales are multiplicative (already exponentiated and clipped)."""
  logit_scale: jax.Array | float
  logit_bias: jax.Array | float = 0.0          # sigmoid only
  token_logit_scale: jax.Array | float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """All that a term may read: the model's outputs, the learned scalars and the batch's labels (None: not needed)."""
  outputs: Outputs
  scales: Scales
  progress: jax.Array | float                         # training fraction in [0, 1]
  duplicate_ids: jax.Array | None = None              # int32 [B], equal for equal captions
  word_mask: jax.Array | None = None                  # bool [B, W], neither padding nor special
  masked_lm_labels: jax.Array | None = None           # int32 [B, K]
  masked_lm_weights: jax.Array | None = None          # float32 [B, K]
  teacher_image: jax.Array | None = None              # [B, E], unit vectors
  teacher_text: jax.Array | None = None               # [B, E]


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the batch is sharded: B over `axes` of `mesh`; None: one device."""
  mesh: Mesh | None = None
  axes: str | tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ContrastiveTerm:
  """The whole batch's image and text embeddings against each other."""
  options: config.Contrastive
  placement: Placement

  def __call__(self, inputs: Inputs) -> tuple[jax.Array, Metrics]:
    """The loss, and how well pairs find each other."""
    out, where = inputs.outputs, dataclasses.asdict(self.placement)
    embeddings = out.image_embedding, out.text_embedding
    o = self.options
    if o.kind == 'sigmoid':
      loss, aux = sigmoid_contrastive_loss(*embeddings, inputs.scales.logit_scale, inputs.scales.logit_bias, **where)
      return loss, dict(top1_image_to_text=aux.top1_image_to_text, top1_text_to_image=aux.top1_text_to_image)
    alpha, beta = (schedule_value(x, inputs.progress) for x in (o.alpha, o.beta))
    loss, aux = softened_contrastive_loss(
      *embeddings, inputs.scales.logit_scale, alpha=alpha, beta=beta, target_temperature=o.target_temperature,
      target_source=o.target_source, duplicate_ids=inputs.duplicate_ids, duplicates=o.duplicates, **where)
    names = 'loss_over_log_batch', 'top1_image_to_text', 'top1_text_to_image', 'duplicate_fraction'
    return loss, dict(alpha=jnp.float32(alpha), beta=jnp.float32(beta)) | {n: getattr(aux, n) for n in names}


@dataclasses.dataclass(frozen=True)
class TokenMatchingTerm:
  """Patches matched to words, inside small groups."""
  options: config.TokenMatching
  placement: Placement

  def __call__(self, inputs: Inputs) -> tuple[jax.Array, Metrics]:
    """The loss, and how often the own text matches best within the group."""
    out, o = inputs.outputs, self.options
    loss, aux = token_matching_loss(
      out.image_tokens, out.text_tokens, inputs.word_mask, inputs.scales.token_logit_scale, group_size=o.group_size,
      epsilon=o.epsilon, num_iterations=o.num_iterations, kind=o.kind, mesh=self.placement.mesh, axes=self.placement.axes)
    return loss, dict(token_matching_top1=(aux.top1_image_to_text + aux.top1_text_to_image) / 2)


@dataclasses.dataclass(frozen=True)
class MaskedLMTerm:
  """Masked words, guessed from the rest of the text and the image."""
  options: config.MaskedLM
  placement: Placement

  def __call__(self, inputs: Inputs) -> tuple[jax.Array, Metrics]:
    """The loss, and the fraction of masked words guessed right."""
    loss, aux = masked_lm_loss(inputs.outputs.masked_lm_logits, inputs.masked_lm_labels, inputs.masked_lm_weights)
    return loss, dict(masked_lm_accuracy=aux.accuracy)


@dataclasses.dataclass(frozen=True)
class DistillationTerm:
  """The whole batch's similarities against a teacher's."""
  options: config.Distillation
  placement: Placement

  def __call__(self, inputs: Inputs) -> tuple[jax.Array, Metrics]:
    """The loss, which is 0 where student and teacher agree."""
    out = inputs.outputs
    loss, _ = distillation_loss(
      out.image_embedding, out.text_embedding, inputs.teacher_image, inputs.teacher_text, inputs.scales.logit_scale,
      temperature=self.options.temperature, mesh=self.placement.mesh, axes=self.placement.axes)
    return loss, {}


TERMS: dict[str, Callable[[Any, Placement], Callable[[Inputs], tuple[jax.Array, Metrics]]]] = {
  'contrastive': ContrastiveTerm,
  'token_matching': TokenMatchingTerm,
  'masked_lm': MaskedLMTerm,
  'distillation': DistillationTerm,
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weighted sum of the terms that are not switched off."""
  terms: dict[str, Any]
  weights: dict[str, config.Schedule]

  @classmethod
  def from_config(cls, options: config.Objective, mesh: Mesh | None = None,
                  axes: str | tuple[str, ...] | None = None) -> 'Objective':
    """The objective of a run; a term whose weight is 0 throughout is left out and never computed.

    Raises:
      UserError: when every term is left out.
    """
    sections = {name: getattr(options, name) for name in TERMS}
    used = {name: o for name, o in sections.items() if not o.weight.is_zero}
    if not used:
      raise UserError(f'all weights of the objective are 0; give one of {", ".join(TERMS)} a weight')
    return cls({name: TERMS[name](o, Placement(mesh, axes)) for name, o in used.items()},
               {name: o.weight for name, o in used.items()})

  @property
  def needs_tokens(self) -> bool:
    """Whether the model must give image and text tokens."""
    return 'token_matching' in self.terms

  @property
  def needs_masked_lm(self) -> bool:
    """Whether the model must guess masked words."""
    return 'masked_lm' in self.terms

  @property
  def needs_teacher(self) -> bool:
    """Whether the batch must bring a teacher's embeddings."""
    return 'distillation' in self.terms

  def __call__(self, outputs: Outputs, scales: Scales, *, progress: jax.Array | float,
               duplicate_ids: jax.Array | None = None, word_mask: jax.Array | None = None,
               masked_lm_labels: jax.Array | None = None, masked_lm_weights: jax.Array | None = None,
               teacher_image: jax.Array | None = None, teacher_text: jax.Array | None = None) -> tuple[jax.Array, Metrics]:
    """The total and its metrics, float32 scalars; `loss_NAME` is a term before its weight. Arguments: see `Inputs`."""
    inputs = Inputs(outputs, scales, progress, duplicate_ids, word_mask, masked_lm_labels, masked_lm_weights,
                    teacher_image, teacher_text)
    total, metrics = jnp.float32(0), {}
    for name, term in self.terms.items():
      loss, measured = term(inputs)
      total += schedule_value(self.weights[name], progress) * loss
      metrics |= {f'loss_{name}': loss} | measured
    return total, {'loss': total} | metrics


def schedule_value(schedule: config.Schedule, progress: jax.Array | float) -> jax.Array | float:
  """`schedule` at a training fraction: a Python number where it never changes, so that a 0 is known when compiling."""
  if schedule.start == schedule.end:
    return schedule.start
  span = schedule.finish - schedule.begin
  done = jnp.asarray(progress >= schedule.begin, jnp.float32)   # a schedule without a span is a step
  if span > 0:
    done = jnp.clip((progress - schedule.begin) / span, 0.0, 1.0)
  if schedule.shape == 'cosine':
    done = (1 - jnp.cos(jnp.pi * done)) / 2
  return schedule.start + (schedule.end - schedule.start) * done
