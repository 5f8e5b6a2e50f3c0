// The exported towers, run by ONNX Runtime Web. Knows no page: pixels and texts in, embeddings out.

import {evaluationTransform} from './resize.js';
import {dot, plan} from './matching.js';
import {joinPieces, load as loadTokenizer} from './tokenizer.js';

const LEAST_COSINE = 0.999;   // below this another device's answer is not the model's

export class Engine {
  /** `ort` is the runtime; `read(name)` gives the bytes of a file of the export. */
  static async open(ort, read) {
    const engine = new Engine();
    const about = JSON.parse(new TextDecoder().decode(await read('model.json')));
    if (about.format !== 'onnx') throw new Error(`the export is ${about.format}; this page runs onnx`);
    Object.assign(engine, {ort, read, about, device: 'WebAssembly', size: about.preprocessing.size, dim: about.embed_dim});
    engine.tokenizer = await loadTokenizer(await read(about.tokenizer), about.special_ids);
    engine.text = await engine.session(ort, about.text);
    engine.image = await engine.session(ort, about.image);
    return engine;
  }

  /** A tower with the runtime that runs it. */
  async session(ort, name, provider = 'wasm') {
    const options = {executionProviders: [provider], logSeverityLevel: 3};
    return {ort, session: await ort.InferenceSession.create(await this.read(name), options)};
  }

  /** Takes the GPU for images where it gives the same answers sooner: a small tower is often done before a GPU has begun.
   * `ort` is a second runtime, since the one with WebGPU has not all that a text tower needs. Gives the device. */
  async tryGpu(ort) {
    const wasm = this.image;
    const noise = Uint8Array.from({length: 16 * this.size * this.size * 3}, (_, i) => Math.imul(i + 1, 2654435761) >>> 24);
    const measure = async tower => {
      this.image = tower;
      await this.images(noise);
      const start = performance.now();
      return [await this.images(noise), performance.now() - start];
    };
    try {
      const gpu = await this.session(ort, this.about.image, 'webgpu');
      const [[here, wasmTime], [there, gpuTime]] = [await measure(wasm), await measure(gpu)];
      const cosines = Array.from({length: 16}, (_, row) => dot(here, row, there, row, this.dim));
      if (Math.min(...cosines) < LEAST_COSINE) throw new Error(`its embeddings are others (cosine ${Math.min(...cosines)})`);
      if (gpuTime < wasmTime) this.device = 'WebGPU';
      else throw new Error(`it needs ${gpuTime.toFixed(0)} ms where WebAssembly needs ${wasmTime.toFixed(0)} ms`);
    } catch (error) {
      this.image = wasm;
      console.info(`WebGPU is not used: ${error.message}`);
    }
    return this.device;
  }

  /** Float32Array [n·D] of the RGB bytes of n prepared pictures. */
  async images(pixels) {
    const shape = [pixels.length / (this.size * this.size * 3), this.size, this.size, 3];
    return this.run(this.image, new this.image.ort.Tensor('uint8', pixels, shape));
  }

  /** Float32Array [n·D] of n texts. */
  async texts(texts) {
    return this.run(this.text, this.tokens(texts));
  }

  /** The bytes that the image tower reads, of RGBA pixels. */
  prepare(pixels) {
    return evaluationTransform(pixels, this.size);
  }

  tokens(texts) {
    const {context} = this.about, ids = new Int32Array(texts.length * context);
    texts.forEach((text, i) => ids.set(this.tokenizer.encode(text, context), i * context));
    return new this.ort.Tensor('int32', ids, [texts.length, context]);
  }

  async run({session}, tensor) {
    const output = (await session.run({[session.inputNames[0]]: tensor}))[session.outputNames[0]];
    const data = await output.getData();
    if (!data.every(Number.isFinite)) throw new Error('the model gives no finite numbers here');
    return data;
  }

  /** Which patches of a prepared picture each word of the text is matched with: {grid, words: [{word, heat}]}, heat [grid²]
   * row by row; null where the export has no token heads. */
  async match(pixels, text) {
    const {tokens, special_ids: special, context} = this.about;
    if (!tokens) return null;
    this.heads ??= await Promise.all([this.session(this.ort, tokens.image), this.session(this.ort, tokens.text)]);
    const size = [1, this.size, this.size, 3];
    const patches = await this.run(this.heads[0], new this.ort.Tensor('uint8', pixels, size));
    const all = await this.run(this.heads[1], this.tokens([text]));
    const ids = this.tokenizer.encode(text, context), dim = all.length / context;
    const places = Array.from(ids.keys()).filter(place => !Object.values(special).includes(ids[place]));
    const mine = Float32Array.from(places.flatMap(place => Array.from(all.subarray(place * dim, (place + 1) * dim))));
    const shares = places.length ? plan(patches, mine, dim, tokens.epsilon) : [];
    const count = patches.length / dim, grid = Math.floor(Math.sqrt(count));
    const share = (p, own) => own.reduce((sum, w) => sum + shares[p * places.length + w], 0);
    const words = joinPieces(places.map(place => this.tokenizer.pieces[ids[place]])).map(
        ({word, places: own}) => ({word, heat: Array.from({length: grid * grid}, (_, p) => share(p, own))}));
    return {grid, words};
  }
}
