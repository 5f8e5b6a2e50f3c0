"""Plans of the relaxed matching: exact marginals, symmetric, close to converged, an assignment as epsilon goes to 0."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import objectives_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from lightclip_jax.objectives import sinkhorn, sinkhorn_kernel, sinkhorn_plan

SHAPES = [(49, 15), (16, 8), (8, 16), (4, 3), (8, 1), (1, 8), (16, 15), (16, 16), (3, 3)]


@functools.cache
def compiled(epsilon=0.05, num_iterations=20):
  return jax.jit(functools.partial(sinkhorn_plan, epsilon=epsilon, num_iterations=num_iterations))


def problems(count, n, m, seed=0):
  """Costs in [0, 2] (a fifth of them only 0 or 2) and masks: half of the problems in any pattern, half full."""
  rng = np.random.default_rng(seed)
  cost = rng.uniform(0, 2, (count, n, m)).astype(np.float32)
  cost[:count // 5] = 2.0 * (cost[:count // 5] > 1)
  rows, cols = rng.random((count, n)) < 0.8, rng.random((count, m)) < 0.8
  rows[count // 2:], cols[count // 2:] = True, True
  return cost, rows, cols


def full(cost):
  return cost, np.ones(cost.shape[-2], bool), np.ones(cost.shape[-1], bool)


@pytest.mark.parametrize(('n', 'm'), SHAPES)
def test_sums_are_right_and_masked_items_get_nothing(n, m):
  cost, rows, cols = problems(200, n, m)
  plan = np.asarray(compiled()(cost, rows, cols))
  assert plan.dtype == np.float32 and np.isfinite(plan).all() and plan.min() >= 0
  assert plan[~(rows[:, :, None] & cols[:, None])].max(initial=0) == 0
  for plan_i, r, c in zip(plan, rows, cols, strict=True):
    row_sums, col_sums = plan_i.sum(1)[r], plan_i.sum(0)[c]
    small, large = (row_sums, col_sums) if r.sum() <= c.sum() else (col_sums, row_sums)
    assert max(small.max(initial=0), large.max(initial=0)) <= 1 + 1e-5
    if r.any() and c.any():
      assert small.min() >= 1 - 1e-5


@pytest.mark.parametrize(('n', 'm'), [(6, 4), (4, 6), (5, 5), (9, 1)])
def test_twenty_iterations_are_close_to_the_optimum_and_many_reach_it(n, m):
  cost = problems(20, n, m, seed=3)[0][4:]
  expected = np.stack([reference.sinkhorn(c, 0.05)[0] for c in cost])
  few, many = (np.asarray(compiled(num_iterations=k)(*full(cost))) for k in (20, 2000))
  np.testing.assert_allclose(many, expected, atol=2e-4)
  assert np.abs(few - expected).sum((1, 2)).mean() / min(n, m) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(('n', 'm'), [(16, 8), (8, 8), (5, 9), (12, 4)])
def test_a_small_epsilon_gives_the_assignment(n, m):
  cost = np.random.default_rng(n).uniform(0, 2, (250, n, m)).astype(np.float32)
  plan = np.asarray(compiled(2e-3, 5000)(*full(cost)))
  for c, p in zip(cost, plan, strict=True):
    best = c[linear_sum_assignment(c)].mean()
    assert abs((p * c).sum() / min(n, m) - best) <= 1e-3
    np.testing.assert_allclose(p.sum(1 if n <= m else 0), 1, atol=1e-3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10 ** 6), epsilon=st.sampled_from([0.05, 0.02]))
def test_transposition_and_permutation(seed, epsilon):
  cost, rows, cols = (x[:10] for x in problems(20, 7, 5, seed))
  rows[0], cols[1] = False, np.arange(5) == 2   # no row at all; one column
  plan = np.asarray(compiled(epsilon)(cost, rows, cols))
  turned = np.asarray(compiled(epsilon)(cost.swapaxes(1, 2), cols, rows)).swapaxes(1, 2)
  np.testing.assert_allclose(turned, plan, atol=2e-4)
  p, q = np.random.default_rng(seed).permutation(7), np.random.default_rng(seed).permutation(5)
  moved = np.asarray(compiled(epsilon)(cost[:, p][:, :, q], rows[:, p], cols[:, q]))
  np.testing.assert_allclose(moved, plan[:, p][:, :, q], atol=2e-4)
  assert (plan[0] == 0).all()


@pytest.mark.parametrize(('iterations', 'epsilon', 'gap'), [(20, 7e-4, 2e-3), (20, 1e-4, 0.03), (10, 0.01, 0.02)])
def test_a_small_epsilon_is_cooled_to_in_fewer_and_larger_steps(iterations, epsilon, gap):
  """Without any, the plans cost 0.04 to 0.12 more an item than the assignment."""
  costs = np.random.default_rng(0).uniform(size=(64, 8, 5)).astype(np.float32)
  plans = sinkhorn_plan(jnp.asarray(costs), jnp.ones(8, bool), jnp.ones(5, bool), epsilon=epsilon, num_iterations=iterations)
  best = [cost[linear_sum_assignment(cost)].sum() for cost in costs]
  assert np.mean((np.asarray(plans) * costs).sum((1, 2)) - best) / 5 < gap
  temperatures, counts = zip(*sinkhorn._stages(epsilon, iterations), strict=True)
  assert sum(counts) == iterations and temperatures[-1] == epsilon and sorted(temperatures, reverse=True) == list(temperatures)


@pytest.mark.parametrize('epsilon', [1e-10, 1e-30])
def test_a_tiny_epsilon_rounds_but_is_finite(epsilon):
  costs = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 4)), jnp.float32)
  plan = sinkhorn_plan(costs, jnp.ones(6), jnp.ones(4, jnp.bfloat16), epsilon=epsilon)   # masks of numbers, too
  assert np.isfinite(plan).all()
  np.testing.assert_allclose(plan.sum(0), 1, atol=1e-5)


def test_equal_costs_share_equally():
  plan = compiled()(*full(np.full((1, 6, 3), 0.7, np.float32)))
  np.testing.assert_allclose(plan, 1 / 6, rtol=1e-5)


def test_both_domains_agree_and_wide_costs_are_finite(monkeypatch):
  cost, rows, cols = problems(30, 9, 6)
  fast = sinkhorn_plan(cost, rows, cols)
  monkeypatch.setattr(sinkhorn, '_SAFE_EXPONENT', -1.0)
  sinkhorn.solve.clear_cache()
  np.testing.assert_allclose(fast, sinkhorn_plan(cost, rows, cols), atol=2e-4)
  monkeypatch.undo()
  sinkhorn.solve.clear_cache()
  wide = np.asarray(sinkhorn_plan(100 * cost, rows, cols))
  assert np.isfinite(wide).all() and wide.sum(1).max() <= 1 + 1e-5


@pytest.mark.parametrize('never', [1e3, 1e6, 1e9, 1e30])
def test_a_pair_that_a_large_cost_forbids_leaves_the_others_their_digits(never):
  np.testing.assert_allclose(compiled()(*full(jnp.array([[never, 0], [0, 1]]))), [[0, 1], [1, 0]], atol=1e-5)
  cost = np.random.default_rng(0).uniform(0, 2, (3, 4)).astype(np.float32)
  cost[0, 0] = never
  expected = reference.sinkhorn(np.where(cost == cost[0, 0], 100, cost), 0.05)[0]
  plan = np.asarray(compiled(num_iterations=500)(*full(cost)))
  np.testing.assert_allclose(plan, expected, atol=2e-4)
  both = compiled(num_iterations=500)(*full(np.stack([cost, np.minimum(cost, 2)])))   # one in need of logs, one not
  np.testing.assert_allclose(both[0], plan, atol=1e-6)


@pytest.mark.parametrize(('count', 'n', 'm'), [(130, 6, 4), (3, 49, 77)])   # more than a block; the paper's recipe
@pytest.mark.parametrize('in_logs', [False, True])
def test_the_kernel_equals_the_plain_version(in_logs, count, n, m, monkeypatch):
  monkeypatch.setattr(sinkhorn, '_SAFE_EXPONENT', -1.0 if in_logs else 21.0)
  cost, rows, cols = (x[:, None] for x in problems(count, n, m))
  sinkhorn.solve.clear_cache()
  plain = sinkhorn.solve(cost, rows, cols, 0.05, 20, False)
  sinkhorn.solve.clear_cache()
  kernel = functools.partial(sinkhorn_kernel.potentials, interpret=True)
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, tpu, default: functools.partial(
    kernel, *tpu.args)(*args))
  np.testing.assert_allclose(sinkhorn.solve(cost, rows, cols, 0.05, 20, True), plain, atol=1e-4)
  sinkhorn.solve.clear_cache()


def test_the_kernel_is_what_a_tpu_gets_and_its_code_does_not_grow_with_the_problem():
  def calls(n, m, fused=True):
    shapes = [jax.ShapeDtypeStruct((256, *s), d) for s, d in (((n, m), jnp.float32), ((n,), bool), ((m,), bool))]
    f = jax.jit(lambda *x: sinkhorn.solve(*x, 0.05, 20, fused))
    text = f.trace(*shapes).lower(lowering_platforms=('tpu',)).as_text()
    return [len(line) for line in text.splitlines() if 'tpu_custom_call' in line]
  small, large = calls(48, 16), calls(48, 77)
  assert len(small) == len(large) == 2   # in products and in logs
  assert max(large) < 1.2 * max(small)
  assert len(calls(196, 77)) == 2 and not calls(196, 197) and not calls(49, 16, fused=False)


@pytest.mark.parametrize(('n', 'm'), [(5, 3), (3, 5), (4, 4)])
def test_envelope_gradient_is_that_of_the_converged_objective(n, m):
  cost = np.random.default_rng(1).uniform(0, 2, (n, m))

  def value(cost, gradient='envelope'):
    plan = sinkhorn_plan(cost, np.ones(n, bool), np.ones(m, bool), num_iterations=500, gradient=gradient)
    return jnp.sum(plan * cost)
  gradient = jax.grad(value)(cost.astype(np.float32))
  for i, j in np.ndindex(n, m):
    step = np.zeros((n, m))
    step[i, j] = 1e-4
    slope = (reference.sinkhorn(cost + step, 0.05)[1] - reference.sinkhorn(cost - step, 0.05)[1]) / 2e-4
    assert abs(gradient[i, j] - slope) <= 1e-3


def test_unrolled_gradient_is_the_slope_of_the_plan():
  cost, weights = (np.random.default_rng(k).uniform(0, 2, (4, 3)).astype(np.float32) for k in (1, 2))
  f = jax.jit(lambda c: jnp.sum(weights * sinkhorn_plan(c, np.ones(4, bool), np.ones(3, bool), epsilon=0.5,
                                                        gradient='unroll')))
  step = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)
  slope = (f(cost + 1e-2 * step) - f(cost - 1e-2 * step)) / 2e-2
  np.testing.assert_allclose(np.sum(jax.grad(f)(cost) * step), slope, rtol=2e-2)
  envelope = jax.grad(lambda c: jnp.sum(weights * sinkhorn_plan(c, np.ones(4, bool), np.ones(3, bool))))(cost)
  assert np.abs(envelope).max() == 0


def test_memory_of_the_envelope_gradient_does_not_grow_with_iterations():
  shape = jax.ShapeDtypeStruct((512, 16, 12), jnp.float32)

  def temporaries(iterations, gradient):
    f = lambda c: jnp.sum(c * sinkhorn_plan(c, np.ones(16, bool), np.ones(12, bool), num_iterations=iterations,  # noqa: E731
                                            gradient=gradient))
    return jax.jit(jax.grad(f)).lower(shape).compile().memory_analysis().temp_size_in_bytes
  few, many = (temporaries(k, 'envelope') for k in (20, 200))
  assert many <= few * 1.01
  assert temporaries(20, 'unroll') > 1.5 * few   # what it would be


@pytest.mark.parametrize('gradient', ['envelope', 'unroll'])
@pytest.mark.parametrize('shape', [(0, 3), (3, 0), (2, 0, 0), (0, 2, 3)])
def test_a_side_without_items_is_an_empty_plan(shape, gradient):
  cost, rows, cols = full(np.zeros(shape, np.float32))
  plan = sinkhorn_plan(cost, rows, cols, gradient=gradient)
  assert plan.shape == shape and plan.dtype == np.float32
  assert jax.grad(lambda c: jnp.sum(sinkhorn_plan(c, rows, cols, gradient=gradient)))(cost).shape == shape


def test_bfloat16_costs():
  cost, rows, cols = problems(10, 6, 4)
  rounded = jnp.asarray(cost, jnp.bfloat16)
  plan = sinkhorn_plan(rounded, rows, cols)
  assert plan.dtype == jnp.float32
  np.testing.assert_allclose(plan, compiled()(np.asarray(rounded, np.float32), rows, cols), atol=1e-5)


@pytest.mark.parametrize(('message', 'args', 'options'), [
  (r'\(4, 3\).*\(3,\)', (np.zeros((4, 3)), np.ones(3, bool), np.ones(3, bool)), {}),
  (r"'exact'.*'unroll'", full(np.zeros((4, 3))), dict(gradient='exact')),
  (r'epsilon=0', full(np.zeros((4, 3))), dict(epsilon=0)),
  (r'epsilon=inf', full(np.zeros((4, 3))), dict(epsilon=np.inf)),
  (r'masks .*row_mask has \(3, 4\)', (np.zeros((2, 4, 3)), np.ones((3, 4)), np.ones(3)), {}),
  (r'masks .*row_mask has \(1, 4\)', (np.zeros((4, 3)), np.ones((1, 4)), np.ones(3)), {}),
  (r'num_iterations=0', full(np.zeros((4, 3))), dict(num_iterations=0)),
])
def test_bad_input_is_named(message, args, options):
  with pytest.raises(ValueError, match=message):
    sinkhorn_plan(*args, **options)


def test_arguments_have_their_public_names():
  cost, ones = jnp.ones((2, 3)), functools.partial(jnp.ones, dtype=bool)
  np.testing.assert_allclose(sinkhorn_plan(cost, row_mask=ones(2), col_mask=ones(3)), sinkhorn_plan(cost, ones(2), ones(3)))
