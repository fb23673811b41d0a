"""The chain: it runs, skips, notices, survives kill -9 bit for bit, and says in one sentence what is wrong."""
import json
import os
import shutil
import signal
import subprocess
import time
import nbformat
import pytest
from atari_hrvq.book import STAGES, module_closure, stage_keys
from atari_hrvq.claims import CLAIMS
from atari_hrvq.core import read_metrics
from conftest import PROGRAM, ROOT, cli

STAGE_NAMES = [s.name for s in STAGES]
FIELDS = {'id', 'claim', 'original', 'ours', 'interval', 'null', 'verdict', 'seeds', 'frames', 'chapter', 'cell'}


def test_every_stage_finished(smoke):
    manifest = json.loads((smoke / 'manifest.json').read_text())
    assert {n: s['state'] for n, s in manifest['stages'].items()} == dict.fromkeys(STAGE_NAMES, 'done')
    assert manifest['versions']['torch'] and manifest['hardware']['cores'] and manifest['seed'] == 0
    assert all(s['seconds'] > 0 and s['peak_mb'] > 0 for s in manifest['stages'].values())
    assert not list((smoke / 'checkpoints').glob('*')) and not list((smoke / 'artifacts').rglob('*.tmp'))


def test_a_second_call_skips_everything(smoke):
    began, before = time.time(), (smoke / 'metrics.jsonl').read_bytes()
    done = cli('run', '--run', 'runs/smoke', '--profile', 'smoke')
    assert done.returncode == 0 and done.stderr.count('unchanged, skipped') == len(STAGES) and time.time() - began < 30
    assert (smoke / 'metrics.jsonl').read_bytes() == before


def test_the_ledger_has_every_claim(smoke):
    rows = json.loads((smoke / 'claims.json').read_text())
    assert [r['id'] for r in rows] == [c.id for c in CLAIMS] and all(FIELDS <= set(r) for r in rows)
    shown = cli('claims', 'runs/smoke', '--json')
    assert json.loads(shown.stdout) == rows and 'E1' in cli('claims', 'runs/smoke').stdout


def test_claims_name_cells_that_exist(smoke):
    for r in read_metrics(smoke):
        if 'cell' not in r: continue
        nb = nbformat.read(ROOT / 'nbs' / f'{r["chapter"]}.ipynb', 4)
        assert r['cell'] in {c['id'] for c in nb.cells}, r


def test_status_lists_every_stage(smoke):
    text = cli('status', 'runs/smoke').stdout
    assert all(n in text for n in STAGE_NAMES)


def test_no_pickle_in_a_run(smoke):
    assert {p.suffix for p in (smoke / 'artifacts').rglob('*') if p.is_file()} <= {'.safetensors', '.json', '.gif'}


def run_to(folder, last, **environment): return cli('run', '--run', folder, '--profile', 'smoke', '--games', 'pong,breakout', '--to', last, **environment)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Frames and tokenizer of two games, run without interruption."
    folder = tmp_path_factory.mktemp('whole') / 'run'
    for first in ('01', '04'):
        done = cli('run', '--run', folder, '--profile', 'smoke', '--games', 'pong,breakout', '--from', first, '--to', first)
        assert done.returncode == 0, done.stderr
    return folder


def test_killed_and_resumed_is_bitwise_the_same(whole, tmp_path):
    folder = tmp_path / 'run'
    arguments = [PROGRAM, 'run', '--run', folder, '--profile', 'smoke', '--games', 'pong,breakout']
    assert subprocess.run([*arguments, '--to', '01'], cwd=ROOT, capture_output=True).returncode == 0
    process = subprocess.Popen([*arguments, '--from', '04', '--to', '04'], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'ATARI_HRVQ_CHECKPOINT_S': '0'})
    checkpoint, deadline = folder / 'checkpoints' / '04_hrvq-tokenizer.safetensors', time.time() + 90
    while not checkpoint.exists() and time.time() < deadline: time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL); process.wait()
    assert checkpoint.exists(), 'no checkpoint appeared: nothing was interrupted'
    assert json.loads((folder / 'manifest.json').read_text())['stages']['04_hrvq']['state'] == 'running' and not (folder / 'metrics' / '04_hrvq.jsonl').exists()
    again = cli('run', '--run', folder, '--profile', 'smoke', '--games', 'pong,breakout', '--from', '04', '--to', '04')
    assert again.returncode == 0, again.stderr
    for name in ('metrics.jsonl', 'artifacts/index.json'): assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_plain_papermill_does_the_same(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    before = (tmp_path / 'run/metrics/04_hrvq.jsonl').read_bytes()
    (tmp_path / 'run/metrics/04_hrvq.jsonl').unlink()
    done = subprocess.run([PROGRAM.parent / 'papermill', 'nbs/04_hrvq.ipynb', tmp_path / 'out.ipynb', '-p', 'run', tmp_path / 'run', '-p', 'profile', 'smoke', '-p', 'games', 'pong,breakout', '-k', 'python3'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/metrics/04_hrvq.jsonl').read_bytes() == before


def test_papermill_with_an_unknown_parameter_fails(tmp_path):
    done = subprocess.run([PROGRAM.parent / 'papermill', 'nbs/01_frames.ipynb', tmp_path / 'out.ipynb', '-p', 'run', tmp_path / 'run', '-p', 'stpes', '3', '-k', 'python3'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "unknown parameter of 01_frames 'stpes'" in done.stderr and not (tmp_path / 'run').exists()


def one_sentence(done, *parts):
    "The process failed with code 2 and one line on standard error that begins with the program's name and holds `parts`."
    lines = [x for x in done.stderr.splitlines() if x.startswith('atari-hrvq: ')]
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr + done.stdout, done.stderr
    for p in parts: assert p in lines[0], lines[0]


@pytest.mark.parametrize('arguments, parts', [
    (['--profile', 'huge'], ['unknown profile', 'laptop']), (['--games', 'pong,tetris'], ["unknown game 'tetris'", 'breakout']),
    (['--from', '77'], ["unknown chapter '77'", '04_hrvq']), (['--to', 'nothing'], ['unknown chapter']), (['--from', '05', '--to', '03'], ['swap them']),
    (['--from', '04', '--to', '04'], ['lacks chapter 01_frames', '--from 01_frames'])])
def test_bad_calls(tmp_path, arguments, parts):
    options = {'--profile': 'smoke', **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    one_sentence(cli('run', '--run', tmp_path / 'r', *(x for pair in options.items() for x in pair)), *parts)
    assert not (tmp_path / 'r' / 'run.json').exists()


def test_a_missing_stage_under_plain_papermill_names_its_chapter(tmp_path):
    done = subprocess.run([PROGRAM.parent / 'papermill', 'nbs/04_hrvq.ipynb', tmp_path / 'out.ipynb', '-p', 'run', tmp_path / 'run', '-k', 'python3'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and 'run chapter 01_frames first' in done.stderr


def test_another_configuration(whole): one_sentence(cli('run', '--run', whole, '--profile', 'smoke', '--games', 'pong,breakout', '--seed', '1', '--to', '01'), 'another configuration')


@pytest.mark.parametrize('damage', ['cut', 'altered', 'missing'])
def test_a_damaged_artefact_is_named(whole, tmp_path, damage):
    shutil.copytree(whole, tmp_path / 'run')
    path = tmp_path / 'run/artifacts/frames-pong-train.safetensors'
    data = path.read_bytes()
    if damage == 'missing': path.unlink()
    else: path.write_bytes(data[:-10] if damage == 'cut' else data[:-1] + bytes([data[-1] ^ 1]))
    one_sentence(run_to(tmp_path / 'run', '01'), str(path), '--from 01_frames')


def test_no_permission(tmp_path):
    (tmp_path / 'file').write_text('')
    one_sentence(cli('run', '--run', tmp_path / 'file' / 'run', '--profile', 'smoke', '--to', '01'), 'cannot write')


def test_two_chains_in_one_folder(tmp_path):
    import fcntl
    (tmp_path / 'r').mkdir()
    with open(tmp_path / 'r' / '.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        one_sentence(run_to(tmp_path / 'r', '01'), 'in use by another chain')


@pytest.mark.parametrize('arguments, part', [(['status', '/nowhere'], 'is not a run'), (['claims', '/nowhere'], 'no claims.json'), (['bench', 'speed'], 'unknown benchmark')])
def test_other_commands(arguments, part): one_sentence(cli(*arguments), part)


@pytest.mark.parametrize('command', [[], ['run'], ['status'], ['claims'], ['bench'], ['outputs']])
def test_help_everywhere(command): assert 'usage: atari-hrvq' in cli(*command, '--help').stdout


def test_keys_follow_code_and_parameters(tmp_path):
    for d in ('nbs', 'atari_hrvq'): shutil.copytree(ROOT / d, tmp_path / d)
    p = {'profile': 'smoke', 'games': ['pong'], 'seed': 0}
    before = stage_keys(tmp_path, p)
    assert stage_keys(tmp_path, p) == before and all(a != b for a, b in zip(before.values(), stage_keys(tmp_path, {**p, 'seed': 1}).values(), strict=True))
    with open(tmp_path / 'atari_hrvq/vq.py', 'a') as f: f.write('# changed\n')
    changed = {n for n, k in stage_keys(tmp_path, p).items() if k != before[n]}
    assert {'03_vq', '04_hrvq', '07_world', '12_claims'} <= changed and not {'01_frames', '06_moe', '09_ppo'} & changed
    assert 'vq' in module_closure({'hrvq'})
