// Exact search over the embeddings that the page holds, and the softmax of zero-shot classification.

/** The `top` rows of `vectors` [N·D] nearest to `query` [D]: [{row, cosine}], best first, equal ones in their order. */
export function nearest(vectors, query, top) {
  const dim = query.length, count = vectors.length / dim;
  const cosines = new Float64Array(count);
  for (let row = 0, at = 0; row < count; row++) {
    let sum = 0;
    for (let k = 0; k < dim; k++) sum += vectors[at++] * query[k];
    cosines[row] = sum;
  }
  const order = Array.from(cosines.keys()).sort((a, b) => cosines[b] - cosines[a] || a - b);
  return order.slice(0, top).map(row => ({row, cosine: cosines[row]}));
}

/** The probability of each class: the softmax of cosines times the model's scale. */
export function probabilities(cosines, scale) {
  const most = Math.max(...cosines);
  const weights = cosines.map(cosine => Math.exp(scale * (cosine - most)));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map(weight => weight / sum);
}
