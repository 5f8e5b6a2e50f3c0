// Which patches each word is matched with: the plan of lightclip_jax/objectives/sinkhorn.py, iterated until it is exact.

const EPSILON_MARGINAL = 1e-6, MOST_ITERATIONS = 5000;

/** Float64Array [P·W]: the plan that minimises <plan, 1 − cosine> − epsilon·entropy, one-to-one on the smaller side;
 * what is left of the larger side goes to a slack item of no cost. `patches` [P·d] and
 * `words` [W·d] are unit vectors, row by row. */
export function plan(patches, words, dim, epsilon) {
  const [P, W] = [patches.length / dim, words.length / dim];
  const [n, m] = [P + (W > P), W + (P > W)];   // with the slack item
  const rows = new Float64Array(n).fill(1), columns = new Float64Array(m).fill(1);
  if (n > P) rows[P] = W - P;
  if (m > W) columns[W] = P - W;
  const gain = new Float64Array(n * m);
  for (let p = 0; p < P; p++) {
    for (let w = 0; w < W; w++) gain[p * m + w] = (dot(patches, p, words, w, dim) - 1) / epsilon;
  }
  const f = new Float64Array(n), g = new Float64Array(m);
  for (let i = 0; i < MOST_ITERATIONS; i++) {
    for (let p = 0; p < n; p++) f[p] = Math.log(rows[p]) - logSum(m, w => gain[p * m + w] + g[w]);
    let off = 0;
    for (let w = 0; w < m; w++) {
      const next = Math.log(columns[w]) - logSum(n, p => gain[p * m + w] + f[p]);
      off = Math.max(off, Math.abs(next - g[w]));
      g[w] = next;
    }
    if (off < EPSILON_MARGINAL) break;
  }
  const out = new Float64Array(P * W);
  for (let p = 0; p < P; p++) {
    for (let w = 0; w < W; w++) out[p * W + w] = Math.exp(gain[p * m + w] + f[p] + g[w]);
  }
  return out;
}

/** The product of row i of `a` with row j of `b`, both of `dim` columns. */
export function dot(a, i, b, j, dim) {
  let sum = 0;
  for (let k = 0; k < dim; k++) sum += a[i * dim + k] * b[j * dim + k];
  return sum;
}

function logSum(count, value) {
  let most = -Infinity;
  for (let i = 0; i < count; i++) most = Math.max(most, value(i));
  let sum = 0;
  for (let i = 0; i < count; i++) sum += Math.exp(value(i) - most);
  return most + Math.log(sum);
}
