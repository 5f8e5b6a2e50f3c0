"""Renders jobset.yaml.j2; see run.sh, which calls it."""
import argparse
import json
import math
import pathlib
import re
import sys

import jinja2


def parse(arguments: list[str]) -> dict[str, object]:
  """The template's variables. What follows `--` are the flags of main."""
  split = arguments.index('--') if '--' in arguments else len(arguments)
  own, flags = arguments[:split], arguments[split + 1:]
  parser = argparse.ArgumentParser(prog='render.py', allow_abbrev=False)
  for name in ('name', 'image', 'accelerator', 'topology'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--namespace', default='default')
  parser.add_argument('--service-account', default='')
  parser.add_argument('--claim', default='')
  parser.add_argument('--chips', type=int, default=4)
  parser.add_argument('--restarts', type=int, default=100)
  parser.add_argument('--spot', action='store_true')
  values = parser.parse_args(own)
  if not re.fullmatch(r'[a-z]([a-z0-9-]{0,40}[a-z0-9])?', values.name):
    parser.error(f'name is {values.name!r}; it can have small letters, digits and dashes')
  if not re.fullmatch(r'\d+x\d+(x\d+)?', values.topology):
    parser.error(f'topology is {values.topology!r}; it is a shape such as 16x16')
  total = math.prod(map(int, values.topology.split('x')))
  if values.chips < 1 or total % values.chips:
    parser.error(f'the {total} chips of {values.topology} are not a multiple of the {values.chips} of a host')
  if not flags:
    parser.error('the flags of main are missing, after --')
  return vars(values) | {'hosts': total // values.chips, 'arguments': flags}


def render(values: dict[str, object]) -> str:
  """The YAML. Strings are written as JSON, which YAML contains, so that no blank or quote can break it."""
  template = pathlib.Path(__file__).with_name('jobset.yaml.j2').read_text()
  environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
  # Jinja's own `tojson` writes < and & for HTML; flags hold them as they are.
  environment.filters['tojson'] = lambda value: json.dumps(value, ensure_ascii=False)
  return environment.from_string(template).render(values)


if __name__ == '__main__':
  sys.stdout.write(render(parse(sys.argv[1:])) + '\n')
