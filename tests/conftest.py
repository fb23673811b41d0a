"""The two long jobs (the smoke chain; chapters through nbdev_test) start with the session, run beside the short tests, all on one
thread each, and are waited for by the tests that read their results, which come last. The chain runs every chapter that has a stage, so nbdev_test is
asked for the others and three stages that need no earlier one; `--all-chapters`, as in CI, asks it for all."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
os.environ['OMP_NUM_THREADS'] = '1'                                      # before torch is imported: with the long jobs, one thread too many makes all of them several times slower
ENV = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1', 'MPLBACKEND': 'agg', 'IN_TEST': '1', 'PATH': f'{BIN}{os.pathsep}{os.environ.get("PATH", "")}'}
LONG = ('smoke', 'chapters')
AFTER_OTHERS = r'^([_.]|0[234578]|1[012]|90|A[12])'                  # notebooks that need what an earlier one saved
os.environ.pop('ATARI_HRVQ_PROGRESS', None)


def copy_book(to):
    "A copy of the checkout without runs, caches and environment."
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns('.venv', '.git', 'runs', '_proc', '_docs', '__pycache__', '.ipynb_checkpoints', '.pytest_cache', '.hypothesis', 'build'))
    return to


class Job:
    "A process in the background with its output in a file; `wait()` gives `(exit code, output, seconds)`."
    def __init__(self, command, log, cwd=ROOT, env=ENV):
        self.log, self.began = Path(log), time.time()
        self.process = subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, stdout=open(log, 'w'), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def wait(self, timeout=1200):
        code = self.process.wait(timeout)
        return code, self.log.read_text(), time.time() - self.began


def pytest_addoption(parser):
    parser.addoption('--all-chapters', action='store_true', help='run every chapter through nbdev_test as well, which takes as long as the chain')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: any(n in item.fixturenames for n in (*LONG, 'copy')))      # stable: short tests keep their order


@pytest.fixture(scope='session', autouse=True)
def jobs(request, tmp_path_factory):
    used = {n for item in request.session.items for n in item.fixturenames}
    folder, started = tmp_path_factory.mktemp('jobs'), {}
    if 'smoke' in used: started['smoke'] = Job([BIN / 'atari-hrvq', 'run', '--run', folder / 'smoke', '--profile', 'smoke', '--jobs', '1'], folder / 'smoke.log')
    if 'chapters' in used:
        book = copy_book(folder / 'book')
        some = [] if request.config.getoption('--all-chapters') else ['--skip_file_re', AFTER_OTHERS]
        started['chapters'] = Job([BIN / 'nbdev_test', '--n_workers', '1', '--timing', *some], folder / 'chapters.log', cwd=book)
    yield folder, started
    for job in started.values():
        if job.process.poll() is None: job.process.terminate(); job.process.wait(20)


@pytest.fixture(scope='session')
def smoke(jobs):
    "The run folder of the smoke chain, after it has finished."
    folder, started = jobs
    code, output, _ = started['smoke'].wait()
    assert code == 0, output[-3000:]
    return folder / 'smoke'


@pytest.fixture(scope='session')
def chapters(jobs):
    "`(checkout, exit code, output)` of nbdev_test over the notebooks."
    folder, started = jobs
    code, output, _ = started['chapters'].wait()
    return folder / 'book', code, output
