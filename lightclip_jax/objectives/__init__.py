"""The training objectives. They know no model: they read `Outputs` and labels, and give a loss and metrics."""
from lightclip_jax.objectives.contrastive import softened_contrastive_loss
from lightclip_jax.objectives.distillation import distillation_loss
from lightclip_jax.objectives.masked_lm import masked_lm_loss
from lightclip_jax.objectives.objective import Objective, Scales, schedule_value
from lightclip_jax.objectives.sigmoid import sigmoid_contrastive_loss
from lightclip_jax.objectives.sinkhorn import sinkhorn_plan
from lightclip_jax.objectives.token_matching import token_matching_loss

__all__ = ['Objective', 'Scales', 'distillation_loss', 'masked_lm_loss', 'schedule_value', 'sigmoid_contrastive_loss',
           'sinkhorn_plan', 'softened_contrastive_loss', 'token_matching_loss']
