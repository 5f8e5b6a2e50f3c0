"""Time and temporary memory of the objectives: dense, all-gather and ring; Sinkhorn unrolled, envelope and fused.

COMMAND: python -m benchmarks.objectives --out=docs
Runs on simulated CPU devices (times of these share a few cores: compare them with each other only). Where the `libtpu`
package is installed, the bytes that a TPU v5e moves for Sinkhorn are asked of its compiler too; no TPU is needed.

Letters: B batch, D embedding, X problems, N rows, M columns.
"""
import argparse
import functools
import itertools
import json
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8 '
                      '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED')   # one order of collectives
os.environ.setdefault('PJRT_NPROC', '64')   # fewer threads than devices' collectives wait for each other for ever
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')   # libtpu compiles here; it must not look for a TPU's host

import jax  # noqa: E402  (the flags above must be set first)
import jax.numpy as jnp  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

from lightclip_jax import cli  # noqa: E402
from lightclip_jax.objectives import sinkhorn, sinkhorn_plan, softened_contrastive_loss  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

D, SCALE, ALPHA, BETA = 512, 20.0, 0.2, 0.5


def dense(image, text, scale, alpha, beta):
  """Softened loss with whole matrices, as the formulas read."""
  logits = scale * image @ text.T
  eye = jnp.eye(len(logits), dtype=bool)

  def direction(logits, tokens):
    q = jax.nn.softmax(jnp.where(eye, -jnp.inf, tokens @ tokens.T / 0.1))
    w = (1 - beta) * ~eye / (len(logits) - 1) + beta * q
    y = jax.lax.stop_gradient((1 - alpha) * eye + alpha * w)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(y * logits, 1))
  return (direction(logits, text) + direction(logits.T, image)) / 2


def all_gather(image, text, scale, alpha, beta, *, mesh):
  """The usual local loss: each device gathers the other modality and scores its own rows against all."""
  def share(image, text):
    everything = [jax.lax.all_gather(x, 'data', tiled=True) for x in (image, text)]
    start = jax.lax.axis_index('data') * len(image)
    own = jnp.arange(len(everything[0]))[None] == start + jnp.arange(len(image))[:, None]

    def direction(rows, others, tokens, all_tokens):
      logits = scale * rows @ others.T
      q = jax.nn.softmax(jnp.where(own, -jnp.inf, tokens @ all_tokens.T / 0.1))
      y = jax.lax.stop_gradient((1 - alpha) * own + alpha * ((1 - beta) * ~own / (own.shape[1] - 1) + beta * q))
      return jax.nn.logsumexp(logits, axis=1) - jnp.sum(y * logits, 1)
    both = direction(image, everything[1], text, everything[1]), direction(text, everything[0], image, everything[0])
    return (both[0] + both[1]) / 2
  spec = PartitionSpec('data')
  return jnp.mean(jax.shard_map(share, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(image, text))


def measure(f, *args, repeats=3):
  """(seconds of the fastest run, temporary MiB per device) of a jitted function."""
  compiled = f.lower(*args).compile()
  jax.block_until_ready(compiled(*args))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    seconds.append(time.perf_counter() - start)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return dict(seconds=round(min(seconds), 4), temporary_mib=round(temporary / 2 ** 20, 2))


def contrastive(batches, devices):
  """One record for each form of the loss, batch and number of devices: value and gradient."""
  for count in devices:
    mesh = jax.make_mesh((count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    place = NamedSharding(mesh, PartitionSpec('data'))
    forms = dict(dense=dense, all_gather=functools.partial(all_gather, mesh=mesh), ring=lambda i, t, s, a, b, mesh=mesh:
                 softened_contrastive_loss(i, t, s, alpha=a, beta=b, mesh=mesh, axes='data')[0])
    for batch in batches:
      x = np.random.default_rng(0).normal(size=(2, batch, D)).astype(np.float32)
      image, text = jax.device_put(tuple(x / np.linalg.norm(x, axis=-1, keepdims=True)), place)
      for name, form in forms.items():
        f = jax.jit(jax.value_and_grad(form, argnums=(0, 1, 2)), in_shardings=(place, place, None, None, None))
        record = measure(f, image, text, SCALE, ALPHA, BETA)
        yield dict(form=name, batch=batch, devices=count) | record


def matching(count=2048, rows=36, cols=16):
  """Value and gradient of matched similarities, by how the iterations are differentiated."""
  cost = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (count, rows, cols)), jnp.float32)
  for gradient in ('unroll', 'envelope'):
    for iterations in (20, 80):
      f = lambda c, k=iterations, g=gradient: jnp.sum(c * sinkhorn_plan(  # noqa: E731
        c, jnp.ones(rows, bool), jnp.ones(cols, bool), num_iterations=k, gradient=g))
      record = measure(jax.jit(jax.value_and_grad(f)), cost)
      yield dict(form=gradient, problems=count, rows=rows, cols=cols, iterations=iterations) | record


def tpu_traffic(count=4096, sizes=((49, 16), (49, 77)), forms=(('fused', True), ('plain', False)), iterations=(20, 5)):
  """MiB that a TPU v5e moves to and from its main memory, by its compiler's count (`plain`: loops written out), and the
  processor time that compiling takes."""
  device = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[0]
  place = SingleDeviceSharding(device)
  loop = jax.lax.fori_loop
  for k, (rows, cols), (name, fused) in itertools.product(iterations, sizes, forms):
    args = [jax.ShapeDtypeStruct((count, *shape), dtype, sharding=place)
            for shape, dtype in (((rows, cols), jnp.float32), ((rows,), bool), ((cols,), bool))]
    sinkhorn.solve.clear_cache()
    if not fused:   # the compiler counts a loop's body once
      jax.lax.fori_loop = lambda low, high, f, x: functools.reduce(lambda y, i: f(i, y), range(low, high), x)
    start = time.process_time()
    compiled = jax.jit(lambda *x, k=k, fused=fused: sinkhorn.solve(*x, 0.05, k, fused)).lower(*args).compile()
    jax.lax.fori_loop = loop
    yield dict(form=name, problems=count, rows=rows, cols=cols, iterations=k,
               accessed_mib=round(compiled.cost_analysis()['bytes accessed'] / 2**20, 1),
               compile_cpu_seconds=round(time.process_time() - start, 1))


def plot(results, path):
  """Memory and time over B at the most devices, and Sinkhorn's memory over iterations."""
  figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
  most = max(r['devices'] for r in results['contrastive'])
  for name in ('dense', 'all_gather', 'ring'):
    records = [r for r in results['contrastive'] if r['form'] == name and r['devices'] == most]
    for axis, key in zip(axes, ('temporary_mib', 'seconds'), strict=False):
      axis.loglog([r['batch'] for r in records], [r[key] for r in records], 'o-', base=2, label=name.replace('_', '-'))
  for name in ('unroll', 'envelope'):
    records = [r for r in results['sinkhorn'] if r['form'] == name]
    axes[2].plot([r['iterations'] for r in records], [r['temporary_mib'] for r in records], 'o-', label=name)
  titles = f'softened loss and gradient, {most} devices', f'the same, {results["machine"]}', 'matching and gradient'
  labels = ('batch', 'temporaries per device (MiB)'), ('batch', 'seconds'), ('iterations', 'temporaries (MiB)')
  for axis, title, (x, y) in zip(axes, titles, labels, strict=True):
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.title.set_size(9)
    axis.grid(alpha=0.3)
    axis.legend()
  figure.tight_layout()
  figure.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                   epilog='example: python -m benchmarks.objectives --out=docs --batches 1024 2048')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('docs'), help='folder of the JSON and the plot')
  parser.add_argument('--batches', type=cli.positive, nargs='+', default=[1024, 2048, 4096])
  parser.add_argument('--devices', type=cli.positive, nargs='+', default=[1, 2, 8])
  args = parser.parse_args()
  machine = f'{os.cpu_count()}-core CPU ({platform.machine()}), simulated devices'
  results = dict(machine=machine, jax=jax.__version__, embedding=D, contrastive=[], sinkhorn=[], sinkhorn_tpu_v5e=[])
  runs = dict(contrastive=contrastive(args.batches, args.devices), sinkhorn=matching(), sinkhorn_tpu_v5e=tpu_traffic())
  for name, records in runs.items():
    try:
      for record in records:
        print(name, record, flush=True)
        results[name].append(record)
    except RuntimeError as error:   # no libtpu
      print(f'{name} left out: {error}')
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / 'objectives.json').write_text(json.dumps(results, indent=1) + '\n')
  plot(results, args.out / 'objectives.svg')


if __name__ == '__main__':
  sys.exit(cli.run(main))
