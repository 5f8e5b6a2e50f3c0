// The pictures that the page knows: their files, embeddings, and those that could not be read.

import {nearest} from './ranking.js';

const PART = 16;   // pictures between two looks at the rest of the page
const SUFFIX = /\.(jpe?g|jfif|png|webp|gif|bmp|avif)$/i;

export class Library {
  constructor(towers) {
    this.towers = towers;
    this.files = [];
    this.failures = [];
    this.vectors = new Float32Array(0);
    this.known = new Set();
  }

  /** Reads the pictures among `files` that are new; `progress(done, of)` after each part, which stops it by returning false. */
  async add(files, progress) {
    const isPicture = file => file.type.startsWith('image/') || SUFFIX.test(file.name);
    const wanted = files.filter(file => isPicture(file) && !this.known.has(key(file)));
    for (let start = 0; start < wanted.length; start += PART) {
      if (progress(start, wanted.length) === false) return wanted.length;
      const part = wanted.slice(start, start + PART);
      const {good, vectors, failures} = await this.towers.ask('pictures', part);
      part.forEach(file => this.known.add(key(file)));
      this.failures.push(...failures.map(([place, reason]) => ({name: path(part[place]), reason})));
      this.append(good.map(place => part[place]), vectors);
    }
    return wanted.length;
  }

  /** Notes [{name, reason}] of what is no file yet; each name once, since a folder may be dropped again. */
  fail(failures) {
    this.failures.push(...failures.filter(({name}) => !this.failures.some(failure => failure.name === name)));
  }

  append(files, vectors) {
    const used = this.files.length * this.towers.dim;
    if (used + vectors.length > this.vectors.length) {
      const larger = new Float32Array(2 * (used + vectors.length));
      larger.set(this.vectors.subarray(0, used));
      this.vectors = larger;
    }
    this.vectors.set(vectors, used);
    this.files.push(...files);
  }

  /** [{file, cosine}], best first; without a query all in the order in which they came. */
  search(query, top) {
    if (!query) return this.files.slice(0, top).map(file => ({file}));
    return nearest(this.vectors.subarray(0, this.files.length * this.towers.dim), query, top)
        .map(({row, cosine}) => ({file: this.files[row], cosine}));
  }
}

/** A file's path as far as the browser tells it. */
export function path(file) {
  return file.webkitRelativePath || file.fromFolder || file.name;
}

/** {files, failures} of a drop, of its folders too; failures are {name, reason}, since one must not cost the others. */
export async function dropped(transfer) {
  const entries = Array.from(transfer.items, item => item.webkitGetAsEntry?.()).filter(entry => entry), failures = [];
  const found = entries.length ? await Promise.all(entries.map(entry => inside(entry, failures))) : Array.from(transfer.files);
  return {files: found.flat(), failures};
}

async function inside(entry, failures) {
  const found = [];
  try {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      file.fromFolder = entry.fullPath.slice(1);
      return [file];
    }
    const reader = entry.createReader();
    for (;;) {   // a reader gives at most a hundred at a time
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) break;
      found.push(...some);
    }
  } catch (error) {
    failures.push({name: entry.fullPath.slice(1), reason: error.message});
  }
  return (await Promise.all(found.map(entry => inside(entry, failures)))).flat();
}

function key(file) {
  return `${path(file)}|${file.size}|${file.lastModified}`;
}
