"""One smoke run of the whole chain, shared by the tests that look at it."""
import os
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(sys.executable).parent / 'atari-hrvq'
os.environ.pop('ATARI_HRVQ_PROGRESS', None)


def cli(*args, **environment):
    "Run `atari-hrvq` as a reader would; returns the finished process."
    return subprocess.run([PROGRAM, *map(str, args)], cwd=ROOT, text=True, capture_output=True, env={**os.environ, **environment})


@pytest.fixture(scope='session')
def smoke():
    "`runs/smoke`: the folder that the notebooks name in their parameters, made by the chain (what is unchanged is skipped)."
    done = cli('run', '--run', 'runs/smoke', '--profile', 'smoke')
    assert done.returncode == 0, done.stderr
    return ROOT / 'runs' / 'smoke'
