"""The launch scripts, against stand-ins of gcloud, xpk, kubectl and srun that note their words."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest

from tests.waiting import until

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
SCRIPTS = ('tpu_vm.sh', 'xpk.sh', 'slurm.sbatch')
TRAIN = ('pretrain', '--config=bert_base', '--workdir=gs://bucket/a run')


class Machine:
  """A PATH of stand-ins; `called()` lists what was called, a list of words each."""

  def __init__(self, folder):
    self.folder, self.notes = folder, folder / 'notes'
    self.notes.touch()
    for name in ('gcloud', 'xpk', 'kubectl', 'srun', 'scontrol'):
      self.stand_in(name, '')

  def stand_in(self, name, then):
    path = self.folder / name
    note = f'{{ printf "%s\\0" {name} "$@"; printf "\\n\\0"; }} >> {self.notes}'
    path.write_text(f'#!/usr/bin/env bash\n{note}\n{then}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def run(self, script, *words, **settings):
    environment = {'PATH': f'{self.folder}:{os.environ["PATH"]}', 'HOME': str(self.folder)}
    return subprocess.run(
      ['bash', str(LAUNCH / script), *words], env=environment | settings, capture_output=True,
      text=True, cwd=self.folder,
    )  # fmt: skip

  def called(self):
    calls = self.notes.read_text().split('\n\0')
    return [call.rstrip('\0').split('\0') for call in calls if call]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def test_the_scripts_are_clean_under_shellcheck():
  checker = shutil.which('shellcheck', path=pathlib.Path(sys.executable).parent)
  checker = checker or shutil.which('shellcheck')
  assert checker, "pip install -e '.[test]' brings shellcheck"
  done = subprocess.run(
    [checker, *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ('script', 'words'),
  [(SCRIPTS[0], (verb,)) for verb in ('create', 'setup', 'logs', 'stop', 'delete')]
  + [(SCRIPTS[1], (verb,)) for verb in ('list', 'logs', 'stop')]
  + [(script, ('run', *TRAIN)) for script in SCRIPTS[:2]]
  + [(SCRIPTS[2], TRAIN)],
)
def test_a_dry_run_prints_what_the_run_calls_and_calls_nothing(machine, script, words):
  settings = {'CLUSTER': 'pods', 'SLURM_JOB_ID': '7', 'PROJECT': 'mine'}
  dry = machine.run(script, '--dry-run', *words, **settings)
  assert dry.returncode == 0 and dry.stdout.startswith('+ ') and not machine.called()
  assert machine.run(script, *words, '--dry-run', **settings).stdout == dry.stdout
  assert not machine.called()
  wet = machine.run(script, *words, **settings)
  assert wet.returncode == 0, wet.stderr
  ours = [line for line in dry.stdout.splitlines() if line.startswith('+ ')]
  assert len(machine.called()) == len([line for line in ours if not line.startswith('+ git')])


@pytest.mark.parametrize('script', SCRIPTS)
def test_without_a_verb_a_script_prints_its_usage(machine, script):
  done = machine.run(script, CLUSTER='pods')
  assert done.returncode == 2 and '--dry-run' in done.stderr and not machine.called()


def test_a_slice_is_asked_for_in_the_queue_and_may_be_spot(machine):
  machine.run('tpu_vm.sh', 'create', TYPE='v6e-256', SPOT='1', ZONE='europe-west4-a', NAME='pod')
  create = machine.called()[0]
  assert create[:6] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'pod']
  assert {'--accelerator-type=v6e-256', '--runtime-version=v2-alpha-tpuv6e', '--spot'} < set(create)
  assert '--zone=europe-west4-a' in create
  machine.run('tpu_vm.sh', 'create')
  assert '--spot' not in machine.called()[2]


def on_the_hosts(machine):
  """Lets the stand-in of gcloud run the command that it gets for the hosts, here, and wait."""
  run = 'for word; do [[ $word == --command=* ]] && bash -c "${word#--command=}"; done; wait'
  machine.stand_in('gcloud', run)
  machine.stand_in('setsid', 'shift; exec "$@"')  # not into the background of the test
  (machine.folder / 'venv/bin').mkdir(parents=True)
  machine.stand_in('sleep', '')
  return machine.folder / 'venv/bin/bertjax'


def wait_for(path, text):
  until(lambda: path.exists() and text in path.read_text(), f'{text!r} in {path}')
  return path.read_text()


@pytest.mark.parametrize(('last', 'starts'), [(0, 3), (2, 3)])
def test_a_host_starts_again_until_the_run_has_ended(machine, last, starts):
  bertjax = on_the_hosts(machine)
  bertjax.write_text(
    'printf "[%s]" "$@"; echo; echo x >> starts\n'
    f'case $(wc -l < starts) in 1) exit 75;; 2) exit 137;; *) echo end; exit {last};; esac\n'
  )
  bertjax.chmod(0o755)
  done = machine.run('tpu_vm.sh', 'run', *TRAIN)
  assert done.returncode == 0, done.stderr
  log = wait_for(machine.folder / 'run.log', 'end')
  assert log.count('[--workdir=gs://bucket/a run]') == starts


def test_setup_sends_the_checkout_and_brings_a_python(machine):
  machine.stand_in('git', '')
  machine.run('tpu_vm.sh', 'setup')
  git, scp, ssh = machine.called()
  assert 'archive' in git and '--worker=all' in scp and 'scp' in scp
  command = next(word for word in ssh if word.startswith('--command='))
  assert 'uv venv' in command and '--python 3.12' in command and 'bertjax[tpu]' in command


def test_gke_gets_the_command_and_the_exit_code_to_restart_on(machine):
  machine.run('xpk.sh', 'run', *TRAIN, CLUSTER='pods', SLICES='2')
  (create,) = machine.called()
  assert create[:4] == ['xpk', 'workload', 'create', '--cluster=pods']
  assert {'--num-slices=2', '--restart-on-exit-codes=1,75'} < set(create)
  assert create[-1].endswith(
    r'exec bertjax pretrain --config=bert_base --workdir=gs://bucket/a\ run'
  )


def test_gke_follows_the_logs_of_any_number_of_pods(machine):
  """The stand-in refuses as kubectl does: at most five pods, unless --max-log-requests allows."""
  machine.stand_in(
    'kubectl',
    'most=5; for word; do case $word in --max-log-requests=*) most=${word#*=};; esac; done\n'
    '[[ $most -ge 512 ]] || { echo "you are attempting to follow 512 log streams" >&2; exit 1; }',
  )
  done = machine.run('xpk.sh', 'logs', CLUSTER='pods')
  assert done.returncode == 0, done.stderr
  (logs,) = machine.called()
  assert logs[:3] == ['kubectl', 'logs', '-f']
  assert logs[-2:] == ['-l', 'jobset.sigs.k8s.io/jobset-name=bertjax']


def seconds(words, flag):
  [value] = [word.partition('=')[2] for word in words if word.startswith(flag)]
  return int(value.rpartition('@')[2])


def test_a_save_to_a_bucket_has_ten_minutes_before_a_kill(machine):
  machine.run('xpk.sh', 'run', *TRAIN, CLUSTER='pods')
  machine.run('xpk.sh', 'run', *TRAIN, CLUSTER='pods', GRACE='1800')
  given = [seconds(words, '--termination-grace-period-seconds=') for words in machine.called()]
  assert given == [600, 1800]
  lines = (LAUNCH / 'slurm.sbatch').read_text().splitlines()
  directives = [line.removeprefix('#SBATCH ') for line in lines if line.startswith('#SBATCH')]
  assert seconds(directives, '--signal=TERM@') == 600
  machine.run('slurm.sbatch', *TRAIN, SLURM_JOB_ID='42')
  srun = machine.called()[-1]
  assert seconds(srun, '--wait=') == 600 and '--kill-on-bad-exit=0' in srun


@pytest.mark.parametrize(('given', 'cores'), [({}, 8), ({'SLURM_CPUS_PER_TASK': '16'}, 16)])
def test_srun_gives_each_process_the_cores_of_the_job(machine, given, cores):
  machine.run('slurm.sbatch', *TRAIN, SLURM_JOB_ID='42', **given)
  assert seconds(machine.called()[0], '--cpus-per-task=') == cores
  assert f'#SBATCH --cpus-per-task={8}\n' in (LAUNCH / 'slurm.sbatch').read_text()


def test_gke_needs_a_cluster(machine):
  done = machine.run('xpk.sh', 'list')
  assert done.returncode != 0 and 'CLUSTER' in done.stderr


@pytest.mark.parametrize(('code', 'requeued'), [(0, False), (2, False), (75, True), (137, True)])
def test_a_slurm_job_goes_back_into_the_queue_unless_it_ended(machine, code, requeued):
  machine.stand_in('srun', f'exit {code}')
  done = machine.run('slurm.sbatch', *TRAIN, SLURM_JOB_ID='42')
  assert done.returncode == code
  srun, *rest = machine.called()
  assert srun[-4:] == ['bertjax', *TRAIN]
  assert rest == ([['scontrol', 'requeue', '42']] if requeued else [])
