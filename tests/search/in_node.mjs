// Runs functions of the page outside a browser: one JSON request on standard input, one JSON answer.
import fs from 'node:fs';
import {pathToFileURL} from 'node:url';
import path from 'node:path';

const page = name => import(pathToFileURL(path.join(process.argv[2], name)));
const request = JSON.parse(fs.readFileSync(0, 'utf8'));
const tasks = {
  async tokens({file, special, context, texts}) {
    const tokenizer = await (await page('tokenizer.js')).load(new Uint8Array(fs.readFileSync(file)), special);
    return texts.map(text => Array.from(tokenizer.encode(text, context)));
  },
  async resize({images, size}) {
    const {evaluationTransform} = await page('resize.js');
    return images.map(({data, width, height}) => Buffer.from(
      evaluationTransform({data: Buffer.from(data, 'base64'), width, height}, size)).toString('base64'));
  },
  async plan({patches, words, dim, epsilon}) {
    return Array.from((await page('matching.js')).plan(patches, words, dim, epsilon));
  },
  async nearest({vectors, query, top}) {
    return (await page('ranking.js')).nearest(Float32Array.from(vectors), Float32Array.from(query), top);
  },
  async words({pieces}) {
    return (await page('tokenizer.js')).joinPieces(pieces);
  },
};
try {
  const answer = {};
  for (const [name, task] of Object.entries(request)) answer[name] = await tasks[name](task);
  process.stdout.write(JSON.stringify(answer));
} catch (error) {
  process.stdout.write(JSON.stringify({error: error.message}));
}
