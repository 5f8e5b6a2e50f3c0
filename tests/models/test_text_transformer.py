"""The text tower: what padding, length and injection may and may not change."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.models import text_transformer

END = 3


def tower_of(**options):
  text = config.TextTower(**dict(dict(width=32, heads=4, depth=2, context=12, vocab_size=50, end_id=END), **options))
  tower = text_transformer.TextTransformer(text)
  variables = tower.init(jax.random.key(0), jnp.zeros((1, 12), jnp.int32))
  return tower, jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), variables)


def tokens_of(*ends, positions=12):
  tokens = np.random.default_rng(0).integers(4, 50, (len(ends), positions)).astype(np.int32)
  tokens[np.arange(len(ends)), ends] = END
  return tokens


def test_valid_positions_stop_at_the_first_end():
  tokens = jnp.array([[5, END, END, 7], [5, 6, 7, 8], [END, 1, 1, 1]])
  np.testing.assert_array_equal(text_transformer.valid_positions(tokens, END),
                                [[True, True, False, False], [True] * 4, [True, False, False, False]])


@pytest.mark.parametrize('causal', [False, True])
def test_padding_changes_nothing(causal):
  tower, variables = tower_of(causal=causal)
  tokens = tokens_of(4, 7)
  other = tokens.copy()
  other[0, 5:], other[1, 8:] = END, 17
  end, hidden = tower.apply(variables, tokens)
  end_other, hidden_other = tower.apply(variables, other)
  short, _ = tower.apply(variables, tokens[:, :9])
  np.testing.assert_allclose(end, end_other, atol=1e-6)
  np.testing.assert_allclose(end, short, atol=1e-6)
  np.testing.assert_allclose(hidden[0, :5], hidden_other[0, :5], atol=1e-6)
  np.testing.assert_array_equal(end, hidden[jnp.arange(2), jnp.array([4, 7])])


@pytest.mark.parametrize('causal', [False, True])
def test_only_a_causal_tower_hides_later_words(causal):
  tower, variables = tower_of(causal=causal)
  tokens = tokens_of(9)
  later = tokens.copy()
  later[0, 6] = 5 + (tokens[0, 6] == 5)
  change = np.abs(tower.apply(variables, tokens)[1] - tower.apply(variables, later)[1])[0, :6].max()
  assert (change == 0) if causal else (change > 1e-3)


def test_injection_is_called_after_each_block_and_its_result_goes_on():
  tower, variables = tower_of(depth=3)
  tokens, calls = tokens_of(5, 8), []

  def inject(done, hidden, after=2):
    calls.append((done, hidden.shape))
    return hidden.at[..., 0].add(done == after)

  def run(tower, tokens, at, inject):
    return tower.read_at(tower.all_but_last(tokens, inject), tokens, at, inject, train=False, example_index=None)

  at = jnp.array([[2, 4], [1, 8]])
  plain = tower.apply(variables, tokens, at, None, method=run)
  tower.apply(variables, tokens, at, inject, method=run)
  assert calls == [(1, (2, 12, 32)), (2, (2, 12, 32)), (3, (2, 2, 32))]
  for after in (1, 2, 3):
    got = tower.apply(variables, tokens, at, functools.partial(inject, after=after), method=run)
    assert np.abs(got - plain).max() > 1e-2, after
  zeros = tower.apply(variables, tokens, at, lambda done, hidden: hidden * (done < 3), method=run)
  assert np.ptp(zeros, axis=1).max() == 0   # the final norm of zeros


@pytest.mark.parametrize('causal', [False, True])
def test_some_positions_alone_are_those_of_all(causal):
  tower, variables = tower_of(causal=causal)
  tokens, at = tokens_of(4, 11), jnp.array([[3, 0, 4], [7, 7, 2]])

  def some(tower, tokens):
    return tower.read_at(tower.all_but_last(tokens), tokens, at, train=False, example_index=None)

  def read(end, positions):
    return jnp.sum(jnp.sin(end)) + jnp.sum(jnp.cos(positions))

  end, hidden = tower.apply(variables, tokens)
  end_alone, nothing = tower.apply(variables, tokens, words=False)
  assert nothing is None
  np.testing.assert_allclose(end_alone, end, atol=1e-6)
  np.testing.assert_allclose(tower.apply(variables, tokens, method=some),
                             jnp.take_along_axis(hidden, at[..., None], axis=1), atol=1e-6)
  wanted = jax.grad(lambda v: read(tower.apply(v, tokens)[0], jnp.take_along_axis(tower.apply(v, tokens)[1], at[..., None], 1)))
  got = jax.grad(lambda v: read(tower.apply(v, tokens, words=False)[0], tower.apply(v, tokens, method=some)))
  for left, right in zip(jax.tree.leaves(wanted(variables)), jax.tree.leaves(got(variables)), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_any_batch_axes_give_the_same_rows():
  tower, variables = tower_of()
  tokens = tokens_of(5, 8, 2, 9)
  flat, _ = tower.apply(variables, tokens)
  folded, hidden = tower.apply(variables, tokens.reshape(2, 2, 12))
  assert hidden.shape == (2, 2, 12, 32)
  np.testing.assert_allclose(folded.reshape(4, 32), flat, atol=1e-6)


@pytest.mark.parametrize('words', [True, False])
def test_dropout_follows_the_example(words):
  tower, variables = tower_of(dropout=0.3)
  tokens = np.repeat(tokens_of(6), 4, axis=0)

  def end(tokens, index, seed=0, train=True):
    return tower.apply(variables, tokens, words, train=train, example_index=index, rngs={'dropout': jax.random.key(seed)})[0]

  whole = end(tokens, jnp.arange(4))
  np.testing.assert_allclose(whole[2:], end(tokens[2:], jnp.arange(2, 4)), atol=1e-6)
  assert np.abs(whole[0] - whole[1]).max() > 1e-3
  assert np.abs(whole - end(tokens, jnp.arange(4), seed=1)).max() > 1e-3
  assert np.ptp(end(tokens, jnp.arange(4), train=False), axis=0).max() < 1e-6


def test_errors_name_the_numbers():
  tower, variables = tower_of()
  with pytest.raises(UserError, match='13.*12'):
    tower.apply(variables, jnp.zeros((1, 13), jnp.int32))
  with pytest.raises(UserError, match='30.*4'):
    tower_of(width=30)
  with pytest.raises(UserError, match='depth is 0'):
    tower_of(depth=0)
