// Text to token ids, equal to lightclip_jax/data/tokenizers.py: SentencePiece's unigram models, and CLIP's BPE, as its own file
// or as a Hugging Face tokenizer.json.

const SPACE = '▁';
const PIECE = {normal: 1, unknown: 2, userDefined: 4, unused: 5, byte: 6};

/** The tokenizer in a file's bytes; `special` is model.json's special_ids {pad, start, end}. */
export async function load(bytes, special) {
  if (bytes[0] === 0x1f) return new ClipBytePairs(await unzipped(bytes), special);
  return bytes[0] === 0x7b ? new BytePairs(JSON.parse(decoded(bytes)), special) : new SentencePiece(bytes, special);
}

const decoded = bytes => new TextDecoder().decode(bytes);

async function unzipped(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return decoded(await new Response(stream).arrayBuffer().catch(() => { throw new Error('the tokenizer file is damaged'); }));
}

/** Int32Array of `context` ids: start, words, end, padding. Longer texts lose words; the end token stays. */
function framed(words, context, {pad, start, end}) {
  const ids = new Int32Array(context).fill(pad);
  ids.set([start, ...words.slice(0, context - 2), end]);
  return ids;
}

/** Pieces joined to words: [{word, places}], places among the given pieces (evaluation/matching.py, join_pieces). */
export function joinPieces(pieces) {
  const words = [];
  let ended = true;
  pieces.forEach((piece, place) => {
    if (ended || piece.startsWith(SPACE)) words.push({word: '', places: []});
    words.at(-1).word += piece.replace(/^▁/, '').replace(/<\/w>$/, '');
    words.at(-1).places.push(place);
    ended = piece.endsWith('</w>');
  });
  return words.filter(({word}) => word);
}

export class SentencePiece {
  constructor(bytes, special) {
    const model = parse(bytes);
    this.special = special;
    this.pieces = model.pieces.map(piece => piece.text);
    this.normalize = normalizer(model.normalizer);
    this.unknown = model.pieces.findIndex(piece => piece.type === PIECE.unknown);
    this.trie = new Map();
    let least = Infinity;
    model.pieces.forEach(({text, score, type}, id) => {
      if (type !== PIECE.normal) return;
      least = Math.min(least, score);
      let node = this.trie;
      for (const letter of text) {
        if (!node.has(letter)) node.set(letter, new Map());
        node = node.get(letter);
      }
      node.id = id;
      node.score = score;
    });
    this.unknownScore = Math.fround(least - 10);
  }

  encode(text, context) {
    return framed(this.words(text), context, this.special);
  }

  /** The ids without start, end and padding: the most probable segmentation (Viterbi, in float32 as SentencePiece does it). */
  words(text) {
    const letters = Array.from(this.normalize(text));
    const best = new Float32Array(letters.length + 1);
    const from = new Int32Array(letters.length + 1).fill(-1);
    const by = new Int32Array(letters.length + 1);
    const offer = (start, end, score, id) => {
      const total = Math.fround(score + best[start]);
      if (from[end] === -1 || total > best[end]) [best[end], from[end], by[end]] = [total, start, id];
    };
    for (let start = 0; start < letters.length; start++) {
      let single = false;
      for (let end = start, node = this.trie; end < letters.length && (node = node.get(letters[end++]));) {
        if (node.id === undefined) continue;
        offer(start, end, node.score, node.id);
        single ||= end === start + 1;
      }
      if (!single) offer(start, start + 1, this.unknownScore, this.unknown);
    }
    const ids = [];
    for (let end = letters.length; end > 0; end = from[end]) {
      if (by[end] !== this.unknown || ids.at(-1) !== this.unknown) ids.push(by[end]);   // neighbours that are unknown are one
    }
    return ids.reverse();
  }
}

/** The parts of SentencePiece's ModelProto (protocol buffers) that encoding needs. */
function parse(bytes) {
  const model = {pieces: [], normalizer: {charsmap: null, prefix: true, squeeze: true, escape: true}};
  const text = new TextDecoder();
  for (const [field, value] of fields(bytes)) {
    if (field === 1) {
      const piece = {text: '', score: 0, type: PIECE.normal};
      for (const [inner, x] of fields(value)) {
        if (inner === 1) piece.text = text.decode(x);
        if (inner === 2) piece.score = new DataView(x.buffer, x.byteOffset, 4).getFloat32(0, true);
        if (inner === 3) piece.type = x;
      }
      if (piece.type === PIECE.userDefined || piece.type === PIECE.byte) {
        throw new Error(`the tokenizer has the piece "${piece.text}" of type ${piece.type}, which this page does not know`);
      }
      model.pieces.push(piece);
    } else if (field === 2) {
      const kind = [...fields(value)].find(([inner]) => inner === 3)?.[1] ?? 1;
      if (kind !== 1) throw new Error(`the SentencePiece model is of type ${kind}; this page reads unigram models (1)`);
    } else if (field === 3) {
      for (const [inner, x] of fields(value)) {
        if (inner === 2) model.normalizer.charsmap = x;
        if (inner === 3) model.normalizer.prefix = Boolean(x);
        if (inner === 4) model.normalizer.squeeze = Boolean(x);
        if (inner === 5) model.normalizer.escape = Boolean(x);
      }
    }
  }
  if (!model.pieces.length) throw new Error('the tokenizer file holds no pieces');
  return model;
}

/** Yields [number, value] of a message: numbers for varints, bytes for everything else. */
function* fields(bytes) {
  let at = 0;
  const damaged = () => new Error('the tokenizer file is damaged');
  const varint = () => {
    let value = 0, factor = 1, byte;
    do {
      if (at >= bytes.length) throw damaged();
      byte = bytes[at++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag & 7;
    if (kind === 0) {
      yield [tag >>> 3, varint()];
    } else {
      const length = kind === 2 ? varint() : {1: 8, 5: 4}[kind];
      if (length === undefined || at + length > bytes.length) throw damaged();
      yield [tag >>> 3, bytes.subarray(at, at += length)];
    }
  }
}

/** SentencePiece's normaliser: the longest rule at each place (a double-array trie, darts-clone), then white space. */
function normalizer({charsmap, prefix, squeeze, escape}) {
  const encoder = new TextEncoder(), decoder = new TextDecoder();
  let units = new Uint32Array(0), rules = new Uint8Array(0);
  if (charsmap?.length) {
    const copy = charsmap.slice();   // aligned
    const length = new DataView(copy.buffer).getUint32(0, true);
    units = new Uint32Array(copy.buffer, 4, length / 4);
    rules = copy.subarray(4 + length);
  }
  const offset = unit => (unit >>> 10) << ((unit & 512) >>> 6);

  function longestRule(bytes, start) {
    let found = null, at = offset(units[0]);
    for (let i = start; i < bytes.length; i++) {
      at ^= bytes[i];
      const unit = units[at];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== bytes[i]) break;
      at ^= offset(unit);
      if (unit & 256) found = {end: i + 1, rule: units[at] & 0x7fffffff};
    }
    return found;
  }

  return text => {
    const bytes = encoder.encode(text), out = [];
    for (let at = 0; at < bytes.length;) {
      const found = units.length ? longestRule(bytes, at) : null;
      const lead = bytes[at];
      const end = found ? found.end : at + (lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4);
      const part = found ? rules.subarray(found.rule, rules.indexOf(0, found.rule)) : bytes.subarray(at, end);
      for (const byte of part) {
        if (!squeeze || byte !== 32 || (out.length && out.at(-1) !== 32)) out.push(byte);
      }
      at = end;
    }
    if (!out.length) return '';
    let normal = decoder.decode(new Uint8Array(out));
    normal = escape ? normal.replaceAll(' ', SPACE) : normal;
    const space = escape ? SPACE : ' ';
    while (squeeze && normal.endsWith(space)) normal = normal.slice(0, -1);
    return (prefix ? space : '') + normal;
  };
}

export class BytePairs {
  /** `file` is what a tokenizer.json says. */
  constructor(file, special) {
    if (file.model.type !== 'BPE') throw new Error(`the tokenizer is of type ${file.model.type}; this page reads BPE`);
    this.special = special;
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.pieces = [];
    for (const [piece, id] of this.vocabulary) this.pieces[id] = piece;
    this.suffix = file.model.end_of_word_suffix ?? '';
    this.unknown = this.vocabulary.get(file.model.unk_token);
    const merges = file.model.merges.map(pair => (typeof pair === 'string' ? pair.split(' ') : pair).join(' '));
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
    this.normalizers = steps(file.normalizer, 'normalizers').map(normalizerStep);
    this.split = splitter(steps(file.pre_tokenizer, 'pretokenizers'));
    for (const token of file.added_tokens ?? []) this.pieces[token.id] = token.content;
    // A special token's name in a text is text like any other.
    this.added = (file.added_tokens ?? []).filter(token => !token.special).map(token => {
      const plain = !token.lstrip && !token.rstrip && !token.single_word;
      if (!plain) throw new Error(`this page cannot read the token ${token.content}`);
      return {id: token.id, raw: !token.normalized, content: token.normalized ? this.normal(token.content) : token.content};
    });
    this.cache = new Map();
  }

  encode(text, context) {
    return framed(this.words(text), context, this.special);
  }

  normal(text) {
    return this.normalizers.reduce((x, step) => step(x), text);
  }

  words(text) {
    return this.cut(text, true).flatMap(part => typeof part === 'number' ? part : this.cut(this.normal(part), false).flatMap(
      inner => typeof inner === 'number' ? inner : this.split(inner).flatMap(word => this.bytePairs(word))));
  }

  /** The text with added tokens as ids between its other parts: those that are looked for before normalising, or after it. */
  cut(text, raw) {
    const tokens = new Map(this.added.filter(token => token.raw === raw).map(token => [token.content, token.id]));
    if (!tokens.size) return [text];
    const pattern = [...tokens.keys()].sort((a, b) => b.length - a.length).map(escaped);
    return text.split(new RegExp(`(${pattern.join('|')})`)).filter(x => x).map(x => tokens.get(x) ?? x);
  }

  /** Of the pairs in a word, the one that was merged first in training is merged first, wherever it stands. */
  bytePairs(word) {
    if (this.cache.has(word)) return this.cache.get(word);
    let parts = Array.from(new TextEncoder().encode(word), byte => LETTERS[byte]);
    parts[parts.length - 1] += this.suffix;
    for (;;) {
      let best = -1, rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const other = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (other < rank) [best, rank] = [i, other];
      }
      if (best < 0) break;
      const [first, second] = [parts[best], parts[best + 1]], merged = [];
      for (let i = 0; i < parts.length; i++) {
        const here = parts[i] === first && parts[i + 1] === second;
        merged.push(here ? first + second : parts[i]);
        i += here;
      }
      parts = merged;
    }
    const ids = parts.map(part => this.vocabulary.get(part) ?? this.unknown).filter(id => id !== undefined);
    if (word.length < 64) this.cache.set(word, ids);
    return ids;
  }
}

/** The printable letter that stands for each byte (GPT-2's table). */
const LETTERS = (() => {
  let next = 256;
  const plain = byte => (byte > 32 && byte < 127) || (byte > 160 && byte < 173) || byte > 173;
  return Array.from({length: 256}, (_, byte) => String.fromCharCode(plain(byte) ? byte : next++));
})();

/** CLIP's own list of merges, as bpe_simple_vocab_16e6.txt has it. */
export class ClipBytePairs extends BytePairs {
  constructor(text, special) {
    const merges = text.split('\n').slice(1, 49152 - 256 - 2 + 1).map(line => line.trim()).filter(line => line);
    const letters = LETTERS.toSorted();
    const pieces = [...letters, ...letters.map(letter => `${letter}</w>`), ...merges.map(pair => pair.replace(' ', '')),
      '<start_of_text>', '<end_of_text>'];
    super({
      model: {type: 'BPE', vocab: Object.fromEntries(pieces.map((piece, id) => [piece, id])), merges, end_of_word_suffix: '</w>'},
      pre_tokenizer: {type: 'Sequence', pretokenizers: [
        {type: 'Split', pattern: {Regex: CLIP_WORDS}, behavior: 'Removed', invert: true}, {type: 'ByteLevel', use_regex: false}]},
    }, special);
  }

  /** What ftfy and html.unescape do in Python, but for names of rare entities and texts that were decoded wrongly. */
  normal(text) {
    for (let i = 0; i < 2; i++) text = text.replace(ENTITY, (_, name, hex, decimal) => ENTITIES[name] ?? letter(hex, decimal));
    return text.replace(/[\ufb00-\ufb04\ufb06\uff01-\uffef\u3000\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3]/g,
        one => one.normalize('NFKC')).replaceAll('\ufb05', 'ſt')
        .replace(/[\u02bc\u2018-\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"')
        .replace(/[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, '').normalize('NFC').toLowerCase();
  }
}

const CLIP_WORDS = String.raw`'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+`;
const ENTITY = /&(?:(amp|lt|gt|quot|apos|nbsp)|#[xX]([0-9a-fA-F]{1,5})|#([0-9]{1,6}));/g;
const ENTITIES = {amp: '&', lt: '<', gt: '>', quot: '"', apos: "'", nbsp: '\u00a0'};

function letter(hex, decimal) {
  return String.fromCodePoint(hex ? parseInt(hex, 16) : Number(decimal));
}

function steps(part, name) {
  return !part ? [] : part.type === 'Sequence' ? part[name].flatMap(inner => steps(inner, name)) : [part];
}

/** A regular expression of Hugging Face's (Oniguruma) as JavaScript's; \s is Unicode's white space there. */
function pattern({Regex, String: exact}) {
  return new RegExp(exact === undefined ? Regex.replaceAll('\\s', '\\p{White_Space}') : escaped(exact), 'gu');
}

function escaped(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
}

function normalizerStep(step) {
  switch (step.type) {
    case 'NFC': case 'NFD': case 'NFKC': case 'NFKD': return text => text.normalize(step.type);
    case 'Lowercase': return text => Array.from(text, letter => letter.toLowerCase()).join('');   // by letter: no final sigma
    case 'Replace': { const found = pattern(step.pattern); return text => text.replace(found, () => step.content); }
    default: throw new Error(`the tokenizer's normaliser ${step.type} is not known to this page`);
  }
}

/** A function from a text to its words: CLIP's pattern, and in each of its finds GPT-2's, which the byte level adds. */
function splitter(parts) {
  const [split, bytes] = parts;
  const known = parts.length === 2 && split.type === 'Split' && split.behavior === 'Removed' && split.invert &&
      bytes.type === 'ByteLevel' && !bytes.add_prefix_space;
  const names = parts.map(part => part.type).join(', ');
  if (!known) throw new Error(`the tokenizer splits words by ${names}; this page knows CLIP's way alone`);
  const found = text => Array.from(text.matchAll(pattern(split.pattern)), ([word]) => word);
  return bytes.use_regex === false ? found : text => found(text).flatMap(word => word.match(GPT2));
}

const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+/gu;
