// The page: what is typed, dropped and clicked.

import {Library, dropped, path} from './library.js';
import {open as openPicked} from './picked.js';

const SHOWN = 60;
const $ = selector => document.querySelector(selector);

/** The worker with the towers; `ask` gives a promise of a task's answer. */
export const towers = {
  worker: new Worker('worker.js', {type: 'module'}),
  waiting: new Map(),
  count: 0,
  ask(task, argument) {
    return new Promise((resolve, reject) => {
      this.waiting.set(++this.count, {resolve, reject});
      this.worker.postMessage({id: this.count, task, argument});
    });
  },
};
towers.worker.onmessage = ({data: {id, answer, error}}) => {
  const {resolve, reject} = towers.waiting.get(id);
  towers.waiting.delete(id);
  error === undefined ? resolve(answer) : reject(new Error(error));
};
towers.worker.onerror = event => say(`The model's worker failed: ${event.message ?? 'this browser cannot start it'}.`, true);

export const library = new Library(towers);
let picture = null;      // a query that is a picture: {name, vector}
let latest = 0;          // of the searches that were begun
let stopped = false;
let adding = Promise.resolve();

function say(text, failed = false) {
  $('#status').textContent = text;
  $('#status').classList.toggle('failed', failed);
}

/** Shows the answers to what is typed or picked now; an older search that ends later shows nothing. */
export async function search() {
  const own = ++latest, text = $('#query').value.trim();
  try {
    const query = picture ? picture.vector : text ? await towers.ask('texts', [text]) : null;
    if (own === latest) show(library.search(query, SHOWN), picture ? picture.name : text && `“${text}”`);
  } catch (error) {
    if (own === latest) say(`The search failed: ${error.message}`, true);
  }
}

function show(answers, query) {
  const count = library.files.length;
  $('#empty').hidden = count > 0;
  for (const image of $('#results').querySelectorAll('img')) URL.revokeObjectURL(image.src);
  $('#results').replaceChildren(...answers.map(tile));
  if (count) {
    const all = `${count.toLocaleString()} picture${count > 1 ? 's' : ''}`;
    const some = count > answers.length ? `The first ${answers.length} of ${all}` : all;
    say(query ? `${some}, the nearest to ${query} first.` : `${some}. Type what you look for.`);
  }
  const {failures} = library;
  $('#failures').hidden = !failures.length;
  $('#failures summary').textContent = `${failures.length} file${failures.length === 1 ? '' : 's'} could not be read`;
  $('#failures ul').replaceChildren(...failures.map(({name, reason}) => element('li', `${name}: ${reason}`)));
}

function tile({file, cosine}) {
  const item = element('div'), button = element('button'), image = element('img'), line = element('span');
  item.setAttribute('role', 'listitem');
  button.type = 'button';
  button.title = path(file);
  Object.assign(image, {src: URL.createObjectURL(file), alt: file.name, loading: 'lazy', decoding: 'async'});
  line.append(element('i', file.name), element('b', cosine === undefined ? '' : cosine.toFixed(2)));
  button.append(image, line);
  button.onclick = () => openPicked(file, {towers, query: picture ? '' : $('#query').value.trim(), similar: byPicture});
  item.append(button);
  return item;
}

export function element(name, text = '') {
  return Object.assign(document.createElement(name), {textContent: text});
}

async function byPicture(file) {
  try {
    const {vectors, failures} = await towers.ask('pictures', [file]);
    if (failures.length) throw new Error(failures[0][1]);
    picture = {name: file.name, vector: vectors};
    $('#similar').hidden = false;
    $('#similar span').textContent = `similar to ${file.name}`;
    $('#query').value = '';
    await search();
  } catch (error) {
    say(`${file.name} cannot be the query: ${error.message}`, true);
  }
}

function forget() {
  picture = null;
  $('#similar').hidden = true;
}

/** Reads pictures, one lot after another. */
export function add(files) {
  adding = adding.then(() => read(files));
  return adding;
}

async function read(files) {
  const bar = $('#working progress');
  stopped = false;
  $('#working').hidden = false;
  const before = performance.now();
  try {
    const count = await library.add(files, (done, of) => {
      bar.max = of;
      bar.value = done;
      const rate = done / (performance.now() - before) * 1000;
      $('#working span').textContent = `${done} of ${of}${done ? `, ${rate.toFixed(0)} a second` : ''}`;
      if (done && done % 64 === 0 || done === 16) search();
      return !stopped;
    });
    await search();
    if (!count) say('There is no picture among these files that is not here already.', !library.files.length);
  } catch (error) {
    say(`Reading the pictures failed: ${error.message}`, true);
  }
  $('#working').hidden = true;
}

function moveFocus(event) {
  const tiles = Array.from($('#results').querySelectorAll('button')), at = tiles.indexOf(document.activeElement);
  if (at < 0 && !(event.key === 'ArrowDown' && document.activeElement === $('#query'))) return;
  const across = tiles.filter(button => button.offsetTop === tiles[0].offsetTop).length;
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: at < 0 ? 1 : across, ArrowUp: -across}[event.key];
  event.preventDefault();
  at + step < 0 ? $('#query').focus() : tiles[Math.min(tiles.length - 1, at + step)]?.focus();
}

function listen() {
  $('#query').addEventListener('input', () => { forget(); search(); });
  $('#similar button').onclick = () => { forget(); search(); $('#query').focus(); };
  $('#working button').onclick = () => { stopped = true; };
  for (const button of document.querySelectorAll('[data-opens]')) button.onclick = () => $(`#${button.dataset.opens}`).click();
  for (const id of ['add-pictures', 'add-folder']) {
    $(`#${id}`).onchange = ({target}) => { add(Array.from(target.files)); target.value = ''; };
  }
  $('#by-picture').onchange = ({target}) => { if (target.files.length) byPicture(target.files[0]); target.value = ''; };
  document.addEventListener('keydown', event => {
    if (event.isComposing) return;   // the keys are the input method's: arrows choose among its candidates
    if ($('#picked').open) return;
    if (event.key === '/' && document.activeElement.tagName !== 'INPUT') { event.preventDefault(); $('#query').focus(); }
    if (event.key.startsWith('Arrow')) moveFocus(event);
  });
}

/** From the start, so that no early drop makes the browser leave the page for a file. */
function listenForDrops() {
  document.addEventListener('dragover', event => { event.preventDefault(); document.body.classList.add('dropping'); });
  document.addEventListener('dragleave', event => { if (!event.relatedTarget) document.body.classList.remove('dropping'); });
  document.addEventListener('drop', async event => {
    event.preventDefault();
    document.body.classList.remove('dropping');
    try {
      const found = dropped(event.dataTransfer);   // now: after the event it is empty
      if (!towers.dim) say('What was dropped is read when the model has loaded.');
      const [{files, failures}] = await Promise.all([found, ready]);
      library.fail(failures);
      add(files);
    } catch (error) {
      say(`What was dropped cannot be read: ${error.message}`, true);
    }
  });
}
listenForDrops();

/** Settles when the page can be used. */
export const ready = (async () => {
  const {about, device} = await towers.ask('about');
  towers.dim = about.embed_dim;
  towers.scale = about.logit_scale;
  const name = `${about.name}, ${about.preprocessing.size} px`;
  const introduce = where => { $('#model').textContent = `${name}, runs in this browser on ${where}. Nothing is uploaded.`; };
  introduce(device);
  for (const part of document.querySelectorAll('#bar :disabled')) part.disabled = false;
  listen();
  $('#query').focus();
  towers.ask('gpu').then(introduce, () => {});   // without it the page works as it is
})();
ready.catch(error => {
  $('#model').textContent = `The model cannot be loaded: ${error.message}`;
  $('#model').classList.add('failed');
});
