// Pictures as the image tower reads them, to the last bit what data/transforms.py's evaluation_transform gives for the same
// pixels: the shorter side resized as Pillow does it (bicubic, antialiased, uint8 between the passes), then the centre.

const BITS = 22;   // of the fixed-point weights
const LONGEST = 16;   // times as long as wide; of a longer picture only the middle is read

/** RGB of size×size×3 from RGBA pixels whose transparency is gone already ({data, width, height}). */
export function evaluationTransform({data, width, height}, size) {
  const line = 4 * width, x = middle(width, LONGEST * height), y = middle(height, LONGEST * width);
  [width, height] = [width - 2 * x, height - 2 * y];
  const [w, h] = width <= height ? [size, Math.floor(size * height / width)] : [Math.floor(size * width / height), size];
  const [left, top] = [halfToEven((w - size) / 2), halfToEven((h - size) / 2)];
  // Only what the crop keeps is computed.
  const columns = weights(width, w, left, size), rows = weights(height, h, top, size);
  const first = rows[0].from, last = Math.max(...rows.map(row => row.from + row.by.length));
  const between = new Uint8Array((last - first) * size * 3);
  pass(data, line * (y + first) + 4 * x, line, 4, between, size * 3, 3, last - first, columns);
  const out = new Uint8Array(size * size * 3);
  pass(between, -first * size * 3, 3, size * 3, out, 3, size * 3, size, rows);
  return out;
}

/** What stands before the middle `longest` of `length`. */
function middle(length, longest) {
  return Math.max(0, Math.floor((length - longest) / 2));
}

/** One axis: line after line, each output pixel a weighted sum of a few input pixels. */
function pass(source, start, sourceLine, sourceStep, target, targetLine, targetStep, lines, weighted) {
  for (let line = 0; line < lines; line++) {
    for (let x = 0; x < weighted.length; x++) {
      const {from, by} = weighted[x];
      let at = start + line * sourceLine + from * sourceStep;
      let red = 1 << (BITS - 1), green = red, blue = red;
      for (let i = 0; i < by.length; i++, at += sourceStep) {
        red += source[at] * by[i];
        green += source[at + 1] * by[i];
        blue += source[at + 2] * by[i];
      }
      const to = line * targetLine + x * targetStep;
      target[to] = clip(red >> BITS);
      target[to + 1] = clip(green >> BITS);
      target[to + 2] = clip(blue >> BITS);
    }
  }
}

/** [{from, by}] of output pixels first … first + count − 1: the first input pixel, and the weights from there. */
function weights(before, after, first, count) {
  if (before === after) return Array.from({length: count}, (_, x) => ({from: x + first, by: Int32Array.of(1 << BITS)}));
  const scale = before / after, stretch = Math.max(scale, 1), support = 2 * stretch;
  return Array.from({length: count}, (_, x) => {
    const centre = (x + first + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - support + 0.5));
    const length = Math.min(before, Math.trunc(centre + support + 0.5)) - from;
    const exact = Array.from({length}, (_, i) => cubic((i + from - centre + 0.5) * (1 / stretch)));
    const sum = exact.reduce((a, b) => a + b, 0);
    return {from, by: Int32Array.from(exact, w => Math.trunc(w / sum * (1 << BITS) + (w < 0 ? -0.5 : 0.5)))};
  });
}

/** Keys' cubic with a = −0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

function clip(value) {
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** As Python's round. */
function halfToEven(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + floor % 2 : Math.round(x);
}
