"""What the model gives to the objectives. It stands below both, so that models know no loss and losses no model.

Letters: B batch, D embedding, P image tokens, W text positions, d token embedding, K masked positions, V vocabulary.
"""
import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
  """One batch through both towers. Embeddings and tokens are unit vectors; fields of a head that was not asked for are None."""
  image_embedding: jax.Array                    # float32 [B, D]
  text_embedding: jax.Array                     # float32 [B, D]
  image_tokens: jax.Array | None = None         # [B, P, d]
  text_tokens: jax.Array | None = None          # [B, W, d]
  masked_lm_logits: jax.Array | None = None     # float32 [B, K, V]
