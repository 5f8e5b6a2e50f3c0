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

/** All files of a drop, those in folders too. */
export async function dropped(transfer) {
  const entries = Array.from(transfer.items, item => item.webkitGetAsEntry?.()).filter(entry => entry);
  return entries.length ? (await Promise.all(entries.map(inside))).flat() : Array.from(transfer.files);
}

async function inside(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    file.fromFolder = entry.fullPath.slice(1);
    return [file];
  }
  const reader = entry.createReader(), found = [];
  for (;;) {   // a reader gives at most a hundred at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(inside))).flat();
}

function key(file) {
  return `${path(file)}|${file.size}|${file.lastModified}`;
}
