"""Examples per second of an image tower, and of the same tower written with plain Flax layers, in one run.

    python -m benchmarks.tower_cpu --tower mobilenet_v2 --size 64 --width 0.5 --batch 128 --out tower.json

"plain" is the same module tree with `nn.Conv` and `nn.BatchNorm`, so that the ratio is what these layers bring.
The two alternate, and medians are compared; `cpu_ratio` is of processor time, which a busy machine disturbs less.
"""
import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax import cli, config
from lightclip_jax.models import image_towers, layers, norm


class PlainConv(nn.Module):
  """`layers.Conv` as `nn.Conv`."""
  features: int
  kernel_size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    half = self.kernel_size // 2
    return nn.Conv(self.features, (self.kernel_size,) * 2, self.stride, [(half, half)] * 2, use_bias=False,
                   dtype=x.dtype)(x)


class PlainDepthwise(nn.Module):
  """`layers.DepthwiseConv` as a grouped `nn.Conv`."""
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    return nn.Conv(channels, (3, 3), self.stride, [(1, 1)] * 2, feature_group_count=channels, use_bias=False,
                   dtype=x.dtype)(x)


class PlainNorm(nn.Module):
  """`norm.BatchNorm` as `nn.BatchNorm` over the whole batch, then the activation."""
  activation: str | None = None
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = nn.BatchNorm(not train, dtype=x.dtype, scale_init=self.scale_init)(x)
    return {'relu6': nn.relu6, 'relu': nn.relu, None: lambda x: x}[self.activation](x)


def steps(image: config.ImageTower, batch: int, plain: bool, dtype: str,
          names: tuple[str, ...] = ('forward', 'forward_backward')) -> dict[str, Callable[[], Any]]:
  """Compiled forward and forward+backward calls of the tower."""
  norm_layer = PlainNorm if plain else functools.partial(norm.BatchNorm, policy='global')
  x = jax.random.normal(jax.random.key(0), (batch, image.size, image.size, 3), dtype)
  tower = image_towers.build(image, norm_layer)
  with mock.patch.multiple(layers, Conv=PlainConv, DepthwiseConv=PlainDepthwise) if plain else mock.patch.object(
      layers, 'Conv', layers.Conv):
    variables = jax.jit(functools.partial(tower.init, train=False))(jax.random.key(0), x[:1])
    mutable = ['batch_stats', norm.STATISTICS]

    def forward(params: Any) -> Any:
      features, updated = tower.apply({**variables, 'params': params}, x, train=True, mutable=mutable)
      return features.pooled_BxF.astype(jnp.float32).var(), updated

    step = jax.value_and_grad(forward, has_aux=True)
    compiled = {name: jax.jit(f).lower(variables['params']).compile()
                for name, f in {'forward': forward, 'forward_backward': step}.items() if name in names}
  return {name: functools.partial(f, variables['params']) for name, f in compiled.items()}


def measure(call: Callable[[], Any]) -> tuple[float, float]:
  """(wall seconds, processor seconds) of one call."""
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(call())
  return time.perf_counter() - wall, time.process_time() - cpu


def compare(image: config.ImageTower, batch: int, repeats: int, dtype: str) -> dict[str, dict[str, float]]:
  """Examples per second of ours and plain, and their ratios."""
  ours, plain = steps(image, batch, False, dtype), steps(image, batch, True, dtype)
  out = {}
  for name in ours:
    pairs = [(measure(ours[name]), measure(plain[name])) for _ in range(repeats + 1)][1:]
    (wall, cpu), (plain_wall, plain_cpu) = ([statistics.median(p[side][i] for p in pairs) for i in range(2)]
                                            for side in range(2))
    out[name] = dict(examples_per_second=round(batch / wall, 1), plain_examples_per_second=round(batch / plain_wall, 1),
                     ratio=round(plain_wall / wall, 2), cpu_ratio=round(plain_cpu / cpu, 2))
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tower', default='mobilenet_v2', choices=list(image_towers.TOWERS))
  parser.add_argument('--size', type=cli.positive, default=64)
  parser.add_argument('--width', type=float, default=1.0)
  parser.add_argument('--stem-stride', type=int, default=2)
  parser.add_argument('--batch', type=cli.positive, default=128)
  parser.add_argument('--repeats', type=cli.positive, default=5)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--out', help='a JSON file; without it the result is printed only')
  args = parser.parse_args()
  image = config.ImageTower(args.tower, args.size, args.width, args.stem_stride)
  result = dict(vars(args), device=jax.devices()[0].device_kind, **compare(image, args.batch, args.repeats, args.dtype))
  text = json.dumps(result, indent=2)
  print(text)
  if args.out:
    with open(args.out, 'w') as f:
      f.write(text + '\n')


if __name__ == '__main__':
  sys.exit(cli.run(main))
