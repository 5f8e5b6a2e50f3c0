// One picture: its class among typed labels, and where the words of a text are in it.

import {element} from './app.js';
import {dot} from './matching.js';
import {probabilities} from './ranking.js';

const MAGENTA = [208, 0, 120];
const $ = selector => document.querySelector(selector);
let last = {};   // of each input: the latest thing that it asked for

/** Opens the dialog for a file. `query` is the text that found it; `similar(file)` searches by the picture. */
export function open(file, {towers, query, similar}) {
  const url = URL.createObjectURL(file);
  $('#picked-name').textContent = file.name;
  Object.assign($('#picked img'), {src: url, alt: file.name});
  $('#words').value = query;
  $('#labels').oninput = () => show('#labels', $('#guesses'), () => classify(file, towers));
  $('#words').oninput = () => show('#words', $('#matching'), () => match(file, url, towers));
  $('#find-similar').onclick = () => { $('#picked').close(); similar(file); };
  $('#close').onclick = () => $('#picked').close();
  $('#picked').onclose = () => { last = {}; URL.revokeObjectURL(url); };
  $('#picked').showModal();
  $('#labels').oninput();
  $('#words').oninput();
}

/** Fills `place` with what `make` gives, unless something newer was asked for meanwhile. */
async function show(input, place, make) {
  const own = last[input] = {};
  try {
    const children = await make();
    if (own === last[input]) place.replaceChildren(...children);
  } catch (error) {
    if (own === last[input]) place.replaceChildren(Object.assign(element('li', error.message), {className: 'failed'}));
  }
}

async function classify(file, towers) {
  const labels = [...new Set($('#labels').value.split(',').map(label => label.trim()).filter(label => label))];
  if (!labels.length) return [];
  const {vectors, failures} = await towers.ask('pictures', [file]);
  if (failures.length) throw new Error(failures[0][1]);
  const texts = await towers.ask('texts', labels);
  const cosines = labels.map((_, i) => dot(vectors, 0, texts, i, towers.dim));
  const shares = probabilities(cosines, towers.scale);
  return labels.map((label, i) => [label, shares[i]]).sort((a, b) => b[1] - a[1]).map(([label, share]) => {
    const line = element('li'), bar = element('i');
    bar.style.width = `${100 * share}%`;
    line.append(element('span', label), `${(100 * share).toFixed(1)} %`, bar);
    return line;
  });
}

async function match(file, url, towers) {
  const text = $('#words').value.trim();
  const found = await towers.ask('match', {file, text});
  $('#matching-note').textContent = found
      ? 'Each word’s share in the one-to-one matching of words and patches; white is an average share or less.'
      : 'This export has no token heads, which only training needs; lightclip_jax.export --tokens writes them too.';
  return found ? found.words.map(({word, heat}) => overlay(word, heat, found.grid, url)) : [];
}

/** The picture's centre, as the model sees it, under one coloured pixel a patch. */
function overlay(word, heat, grid, url) {
  const tile = element('figure'), frame = element('div'), image = element('img'), canvas = element('canvas');
  tile.className = 'tile';
  Object.assign(image, {src: url, alt: `where the model finds ${word}`});
  canvas.width = canvas.height = grid;
  const mean = heat.reduce((a, b) => a + b, 0) / heat.length, most = Math.max(...heat);
  const pixels = new ImageData(grid, grid);
  heat.forEach((value, i) => {
    const share = Math.min(1, Math.max(0, (value - mean) / Math.max(most - mean, 2 * mean, 1e-12)));
    pixels.data.set([...MAGENTA.map(x => 255 + (x - 255) * share), 110 + 90 * share], 4 * i);
  });
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  frame.append(image, canvas);
  tile.append(frame, element('span', word));
  return tile;
}
