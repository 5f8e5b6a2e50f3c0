"""Does each part of LightCLIP help, and by how much? The same run with and without each, several seeds.

    python -m benchmarks.ablation --size=cpu --jobs=2 --out=docs/ablation.jsonl [--study=rows] [--towers mbv2 rn18 swin_nano]
    python -m benchmarks.ablation --out=docs/ablation.jsonl --report=docs/RESULTS.md      # tables and plot from the lines

Every row is a run of `lightclip_jax.main` with some options changed; rows of one seed see the same examples in the same order,
and start from the same parameters. A finished run is one line of JSON; one whose line is there is not made again for this study
or another on the same kind of machine, and one that was interrupted continues in its folder under --runs. On CPUs --jobs=N
runs N side by side, each on its share of the cores: more a minute than one after the other on all.
"""
import argparse
import collections
import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import tqdm

from lightclip_jax import cli
from lightclip_jax.errors import UserError

Options = dict[str, Any]
Tables = dict[tuple[str, str, str, str], dict[str, list[dict[str, Any]]]]   # size, study, tower, machine -> row -> its lines

PLAIN = {'objective.contrastive.alpha.start': 0.0, 'objective.contrastive.alpha.end': 0.0}
SOFTENED = {'objective.contrastive.alpha.start': 0.0, 'objective.contrastive.alpha.end': 0.1,
            'objective.contrastive.target_source': 'cross'}
NO_MATCHING = {'objective.token_matching.weight.start': 0.0, 'objective.token_matching.weight.end': 0.0}
NO_MASKED_LM = {'objective.masked_lm.weight.start': 0.0, 'objective.masked_lm.weight.end': 0.0}
CLIP = PLAIN | NO_MATCHING | NO_MASKED_LM
SOFT_ONLY, MATCHING_ONLY, MASKED_ONLY = CLIP | SOFTENED, PLAIN | NO_MASKED_LM, PLAIN | NO_MATCHING


def _each(option: str, values: Sequence[Any], base: Options) -> dict[str, Options]:
  return {f'{option.rpartition(".")[2]} {value}': {**base, option: value} for value in values}


def _targets(name: str, base: Options) -> dict[str, Options]:
  """Softened targets, and other ways to make them."""
  contrastive = 'objective.contrastive.'
  return {name: base, f'{name}, within a side': {**base, f'{contrastive}target_source': 'intra'},
          f'{name}, fixed alpha': {**base, f'{contrastive}alpha.start': 0.1},
          f'{name}, uniform weights': {**base, f'{contrastive}beta.end': 0.0},
          f'{name}, temperature 0.05': {**base, f'{contrastive}target_temperature': 0.05}}


STUDIES: dict[str, dict[str, Options]] = {   # name -> row -> options; everything else is the recipe's
  'rows': {'CLIP': CLIP, '+ softened': SOFT_ONLY, '+ matching': MATCHING_ONLY, '+ masked LM': MASKED_ONLY,
           '+ matching + masked LM': PLAIN, 'all three': SOFTENED},
  'targets': {'CLIP': CLIP, **{f'CLIP, duplicates {kind}': {**CLIP, 'objective.contrastive.duplicates': kind}
                               for kind in ('negative', 'ignore')},
              **_targets('+ softened', SOFT_ONLY), '+ matching + masked LM': PLAIN, **_targets('all three', SOFTENED)},
  'matching': {'CLIP': CLIP, '+ matching': MATCHING_ONLY, **_each('model.token_stage', (0, 3), MATCHING_ONLY),
               **_each('objective.token_matching.kind', ('max',), MATCHING_ONLY),
               **{f'weight {w}': MATCHING_ONLY | {f'objective.token_matching.weight.{end}': w for end in ('start', 'end')}
                  for w in (0.1, 0.3, 1.0)},
               **_each('objective.token_matching.epsilon', (0.02, 0.2), MATCHING_ONLY),
               **_each('objective.token_matching.num_iterations', (1, 5), MATCHING_ONLY),
               **_each('objective.token_matching.group_size', (4, 32), MATCHING_ONLY)},
  'mosaic': {f'{row}{f", mosaic {share}" if share else ""}': {**options, **({'data.mosaic': share} if share else {})}
             for share in (0.0, 0.25, 0.5) for row, options in
             {'CLIP': CLIP, '+ matching': MATCHING_ONLY, 'all three': SOFTENED}.items()},
  'masked_lm': {'CLIP': CLIP, '+ masked LM': MASKED_ONLY, **_each('model.fusion.op', ('cross_attention',), MASKED_ONLY),
                **_each('model.fusion.stages', ('((4,1),)', '((4,2),)', '((3,1),(4,2))'), MASKED_ONLY),
                **_each('data.mask_fraction', (0.15, 0.3), MASKED_ONLY)},
  'text': {'CLIP': CLIP, **_each('model.text.causal', (True,), CLIP),
           **_each('model.text.depth', (1, 4, 6, 12), CLIP | {'model.fusion.stages': '((4,1),)'})}}
SIZES = {'cpu': ('quickstart', {'train.steps': 900, 'evaluation.every_steps': 900}),
         'quickstart': ('quickstart', {'evaluation.every_steps': 1700}), 'laptop': ('laptop', {}), 'gpu': ('emoji', {}),
         'test': ('quickstart', {'train.steps': 2, 'train.batch_size': 32, 'data.dataset': 'shapes', 'model.image.size': 32,
                                 'model.text.vocab_size': 45, 'evaluation.splits': "('heldout_style',)"})}
TASKS = ('flags', 'pointing', 'zero_shot:digits', 'linear_probe:digits')
SHOWN = {'held-out style top-1': 'eval/heldout_style/concept_top1', 'top-5': 'eval/heldout_style/concept_top5',
         'group': 'eval/heldout_style/group_top1', 'held-out images top-1': 'eval/heldout_images/concept_top1',
         'text → image R@1': 'eval/heldout_images/text_to_image_r1', 'image → text R@1': 'eval/heldout_images/image_to_text_r1',
         'held-out concepts top-5': 'eval/heldout_concepts/concept_top5', 'flags': 'eval/flags/top1',
         'pointing': 'eval/pointing/plan', 'digits (linear)': 'eval/linear_probe:digits/top1'}
PLOTTED = 'text → image R@1'


def runs(flags: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Options]]:
  """What names each run, and its options; all rows of a seed before the next seed. Raises UserError for an unknown row."""
  if unknown := [row for row in flags.rows or () if row not in STUDIES[flags.study]]:
    raise UserError(f'--rows has {unknown[0]!r}; the study {flags.study!r} has: {", ".join(STUDIES[flags.study])}')
  variant, changes = SIZES[flags.size]
  tasks = {} if flags.size == 'test' else {'evaluation.tasks': TASKS}
  for tower in flags.towers:
    for seed in range(flags.seeds):
      for row, options in STUDIES[flags.study].items():
        if flags.rows and row not in flags.rows:
          continue
        key = {'size': flags.size, 'study': flags.study, 'tower': tower, 'row': row, 'seed': seed}
        yield key, {'config': f'configs/{tower}.py:{variant}', **tasks, **changes, **options, 'train.seed': seed}


def identity(size: str, tower: str, where: str, options: Options) -> str:
  """What tells a run from all others, whichever study asks for it. Another processor rounds otherwise."""
  return json.dumps([size, tower, where, {name: value for name, value in options.items() if name != 'config'}], sort_keys=True)


def machine(cores: int) -> str:
  """The processor, and how many of its cores a run has. Its family and model too: virtual machines call many alike."""
  text = pathlib.Path('/proc/cpuinfo').read_text() if sys.platform == 'linux' else ''
  said = {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in text.splitlines())}
  kind = f' ({said["cpu family"]}.{said["model"]})' if {'cpu family', 'model'} <= said.keys() else ''
  return f'{said.get("model name", platform.machine())}{kind}, {cores} core{"s" * (cores > 1)}'


def run(key: dict[str, Any], options: Options, folder: pathlib.Path, cores: Sequence[int]) -> dict[str, Any]:
  """Trains and evaluates on these cores (none: on all); the line of the record."""
  options = dict(options)
  name = '-'.join(str(value) for part, value in key.items() if part != 'study')   # studies share runs
  workdir = folder / name.replace(' ', '_').replace('/', '_')
  command = [sys.executable, '-m', 'lightclip_jax.main', f'--config={options.pop("config")}', f'--workdir={workdir}']
  bound = ['taskset', '--cpu-list', ','.join(map(str, cores))] if cores else []
  begun = time.monotonic()
  process = subprocess.Popen([*bound, *command, *(f'--config.{name}={value}' for name, value in options.items())], text=True,
                             stdout=subprocess.PIPE)
  said = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f'{key}: exit code {os.waitstatus_to_exitcode(status)}; the same command continues')
  log = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rates = [row['train/examples_per_second'] for row in log if 'train/examples_per_second' in row]
  results = json.loads((workdir / 'results.json').read_text())
  commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], text=True, capture_output=True).stdout.strip()
  return {**key, 'options': options, 'commit': commit, 'machine': machine(len(cores or os.sched_getaffinity(0))),
          'command': ' '.join(command[1:4]), 'steps': results['step'], 'seconds': time.monotonic() - begun,
          'examples_per_second': statistics.median(rates), 'parameters': _parameters(said),
          'peak_gigabytes': usage.ru_maxrss * 1024 / 1e9,
          'curve': [(row['step'], row['train/loss_contrastive']) for row in log if 'train/loss_contrastive' in row][::4],
          'metrics': {metric['name']: metric['value'] for metric in results['metrics']}}


def _parameters(said: str) -> str:
  """"1.70 M parameters at inference, 0.10 M more in training", as the run says."""
  return next(line.partition(': ')[2].partition(';')[0] for line in said.splitlines() if 'parameters at inference' in line)


def report(lines: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Replaces all that follows the line "## Tables" in `path`, and draws `ablation.svg` beside it."""
  before = path.read_text().partition('## Tables\n')[0] if path.exists() else '# Results\n\n'
  tables = _tables(lines)
  text = ''.join(_table(name, rows) for name, rows in tables.items())
  path.write_text(f'{before}## Tables\n{text}\n![Retrieval by row, and the loss](ablation.svg)\n')
  _plot(tables, path.with_name('ablation.svg'))


def _tables(lines: Sequence[dict[str, Any]]) -> Tables:
  """Without the studies that show no run beside those shown before."""
  made = {identity(line['size'], line['tower'], line['machine'], line['options']): line for line in lines}
  seeds = 1 + max((line['seed'] for line in lines), default=0)
  tables, shown = {}, set()
  places = dict.fromkeys((line['size'], line['tower'], line['machine']) for line in lines)
  for (size, tower, where), study in itertools.product(places, STUDIES):
    rows, names = collections.defaultdict(list), set()
    for key, options in runs(argparse.Namespace(size=size, study=study, rows=None, towers=[tower], seeds=seeds)):
      if (name := identity(size, tower, where, options)) in made:
        rows[key['row']].append(made[name])
        names.add(name)
    if names - shown:
      tables[size, study, tower, where] = {row: rows[row] for row in STUDIES[study] if row in rows}
      shown |= names
  for name in made.keys() - shown:
    print(f'in no study now: {name}', file=sys.stderr)
  return tables


def _table(name: tuple[str, str, str, str], rows: dict[str, list[dict[str, Any]]]) -> str:
  size, study, tower, where = name
  every = [run for found in rows.values() for run in found]
  metrics = {title: metric for title, metric in SHOWN.items() if all(metric in run['metrics'] for run in every)}
  out = [f'\n### {study}, {tower}, {size}, {where}', '',
         f'`python -m benchmarks.ablation --size={size} --study={study} --towers {tower} --out=docs/ablation.jsonl`; percent, '
         'mean ± standard deviation over seeds.', '', f'| row | seeds | {" | ".join(metrics)} | pairs/s | GB |',
         '|---' * (len(metrics) + 4) + '|']
  for row, found in rows.items():
    values = [_spread([100 * run['metrics'][metric] for run in found]) for metric in metrics.values()]
    rate, peak = (statistics.median(run[what] for run in found) for what in ('examples_per_second', 'peak_gigabytes'))
    out.append(f'| {row} | {len(found)} | {" | ".join(values)} | {rate:.0f} | {peak:.1f} |')
  out += _differences(rows, metrics)
  told = '; '.join(sorted({run['parameters'] for run in every}))
  return '\n'.join([*out, '', f'{told}; commit {", ".join(sorted({run["commit"] for run in every}))}.', ''])


def _differences(rows: dict[str, list[dict[str, Any]]], metrics: dict[str, str]) -> list[str]:
  """A table of each row less the first, seed by seed: what seeds share cancels."""
  first, *others = rows
  if not others:
    return []
  base = {run['seed']: run['metrics'] for run in rows[first]}
  out = ['', f'Less {first} of the same seed:', '', f'| row | {" | ".join(metrics)} |', '|---' * (len(metrics) + 1) + '|']
  for row in others:
    pairs = [(run['metrics'], base[run['seed']]) for run in rows[row] if run['seed'] in base]
    values = [_spread([100 * (own[metric] - other[metric]) for own, other in pairs], '+') for metric in metrics.values()]
    out.append(f'| {row} | {" | ".join(values)} |')
  return out


def _spread(values: Sequence[float], sign: str = '') -> str:
  if not values:
    return ''
  return f'{statistics.mean(values):{sign}.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')


def _plot(tables: Tables, path: pathlib.Path) -> None:
  """Retrieval of every row, a dot a seed, and the first seed's contrastive loss against steps."""
  figure, axes = plt.subplots(len(tables), 2, figsize=(10, 1 + 2.2 * len(tables)), squeeze=False, layout='constrained')
  for (dots, curves), (name, rows) in zip(axes, tables.items(), strict=True):
    for place, (row, found) in enumerate(rows.items()):
      recalls = [100 * run['metrics'].get(SHOWN[PLOTTED], math.nan) for run in found]
      dots.plot(recalls, [-place] * len(found), 'o', alpha=0.6)
      curves.plot(*zip(*found[0]['curve'], strict=True), label=row)
    dots.set_yticks(range(0, -len(rows), -1), rows)
    dots.set_xlabel(f'{", ".join(name)}: {PLOTTED}, %')
    curves.set_xlabel('step')
    curves.set_ylabel('contrastive loss')
    curves.legend(fontsize='x-small')
  figure.savefig(path)
  plt.close(figure)


def main() -> None:
  """Makes the runs that are missing, or the report."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True, help='lines of JSON')
  parser.add_argument('--report', type=pathlib.Path,
                      help='replaces the tables of this page, and its plot, by those of the lines; runs nothing')
  parser.add_argument('--runs', type=pathlib.Path, default=pathlib.Path('runs/ablation'))
  parser.add_argument('--size', choices=SIZES, default='cpu')
  parser.add_argument('--study', choices=STUDIES, default='rows')
  parser.add_argument('--rows', nargs='+', help='of the study; all if not given')
  parser.add_argument('--towers', nargs='+', default=['mbv2'])
  parser.add_argument('--seeds', type=cli.positive, default=3)
  parser.add_argument('--jobs', type=cli.positive, default=1, help='runs side by side')
  flags = parser.parse_args()
  lines = [json.loads(line) for line in flags.out.read_text().splitlines()] if flags.out.exists() else []
  if flags.report and not lines:   # the page's tables would be replaced by none
    raise UserError(f'{str(flags.out)!r} has no runs to report; --out names the lines of JSON that earlier runs wrote')
  if flags.report:
    report(lines, flags.report)
    return
  done = {identity(line['size'], line['tower'], line['machine'], line['options']) for line in lines}
  here = machine(max(1, len(os.sched_getaffinity(0)) // flags.jobs))
  missing = [(key, options) for key, options in runs(flags) if identity(flags.size, key['tower'], here, options) not in done]
  flags.runs.mkdir(parents=True, exist_ok=True)
  for line in side_by_side(missing, flags.runs, flags.jobs):
    with flags.out.open('a') as file:
      file.write(json.dumps(line) + '\n')


def side_by_side(pairs: Sequence[tuple[dict[str, Any], Options]], folder: pathlib.Path, jobs: int) -> Iterator[dict[str, Any]]:
  """The lines of the runs as they finish. After one that fails no other begins."""
  waiting = iter(pairs)
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool, tqdm.tqdm(total=len(pairs), desc='runs') as bar:
    def begin(cores: Sequence[int]) -> dict[concurrent.futures.Future, Sequence[int]]:
      return {pool.submit(run, *pair, folder, cores): cores for pair in itertools.islice(waiting, 1)}

    running, cores = {}, sorted(os.sched_getaffinity(0))
    for job in range(jobs):
      running |= begin(cores[job::jobs][:max(1, len(cores) // jobs)] if jobs > 1 else ())
    while running:
      for done in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
        yield done.result()
        bar.update()
        running |= begin(running.pop(done))


if __name__ == '__main__':
  sys.exit(cli.run(main))
