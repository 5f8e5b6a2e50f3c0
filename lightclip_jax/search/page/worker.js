// Runs the towers beside the page, so that it never stops answering: {id, task, argument} in, {id, answer | error} out.

import {Engine} from './engine.js';

const here = new URL('.', import.meta.url);

async function read(name) {
  const response = await fetch(new URL(`model/${name}`, here));
  if (!response.ok) throw new Error(`the model's file ${name} cannot be fetched (${response.status})`);
  return new Uint8Array(await response.arrayBuffer());
}

async function runtime(kind) {
  const ort = await import(`./runtime/ort.${kind}.min.mjs`);
  ort.env.wasm.wasmPaths = new URL('runtime/', here).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  return ort;
}

const engine = runtime('wasm').then(ort => Engine.open(ort, read));

/** The RGBA pixels of a picture file on white, upright, in the numbers that the file holds. */
async function decode(file) {
  const bitmap = await createImageBitmap(file, {colorSpaceConversion: 'none'});
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white';
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

const tasks = {
  async about({about, device}) {
    return {about, device};
  },
  /** The device, after a look whether there is a GPU that is faster. */
  async gpu(engine) {
    const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
    return adapter ? engine.tryGpu(await runtime('webgpu')) : engine.device;
  },
  async texts(engine, texts) {
    return engine.texts(texts);
  },
  /** {good: places of the files that were read, vectors, failures: [[place, reason]]} */
  async pictures(engine, files) {
    const good = [], parts = [], failures = [];
    for (const [place, file] of files.entries()) {
      try {
        parts.push(engine.prepare(await decode(file)));
        good.push(place);
      } catch (error) {
        failures.push([place, error.message]);
      }
    }
    const pixels = new Uint8Array(parts.length * engine.size * engine.size * 3);
    parts.forEach((part, i) => pixels.set(part, i * part.length));
    return {good, vectors: parts.length ? await engine.images(pixels) : new Float32Array(0), failures};
  },
  async match(engine, {file, text}) {
    return engine.match(engine.prepare(await decode(file)), text);
  },
};

let last = Promise.resolve();   // one task after another: a session takes no second run before the first has ended
self.onmessage = ({data: {id, task, argument}}) => {
  last = last.then(async () => {
    try {
      self.postMessage({id, answer: await tasks[task](await engine, argument)});
    } catch (error) {
      self.postMessage({id, error: error.message ?? String(error)});
    }
  });
};
