"""book, cli: the chain runs, skips, resumes after a kill to the last bit, stops on request, and answers every mistake with one sentence."""
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import nbformat
import psutil
import pytest
import torch
from conftest import BIN, ENV, ROOT
from atari_hrvq import __version__, book, cli, publish
from atari_hrvq.claims import CLAIMS, GOALS, goals_met, ledger
from atari_hrvq.core import BookError, load_checkpoint, write_json

COMMAND = str(BIN / 'atari-hrvq')
NAMES = [s.name for s in book.STAGES]


def shell(*arguments, **more):
    return subprocess.run([COMMAND, *map(str, arguments)], cwd=ROOT, env={**ENV, **more}, capture_output=True, text=True, timeout=600)


def sentence(capsys, arguments, expected, code=2):
    "`main(arguments)` must end with `code` and say one line on standard error that matches `expected`."
    assert cli.main([str(a) for a in arguments]) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and re.search(expected, err[0]), err
    assert 'Traceback' not in err[0]


def wait_for(condition, seconds=90, log=None):
    end = time.time() + seconds
    while time.time() < end:
        found = condition()
        if found: return found
        time.sleep(.02)
    raise AssertionError('waited in vain' + (f'; {log} has:\n{log.read_text()[-2000:]}' if log else ''))


# ------------------------------------------------------------------ mistakes that need no run

@pytest.mark.parametrize('arguments, expected', [
    (['run', '--profile', 'huge'], "unknown profile 'huge': expected one of smoke, laptop, overnight, gpu, paper"),
    (['run', '--profile', 'smoke', '--games', 'pong,tetris'], "unknown game 'tetris': expected one of pong, breakout, ms_pacman"),
    (['run', '--profile', 'smoke', '--games', ','], 'no game was given'),
    (['run', '--profile', 'smoke', '--to', '99'], "unknown chapter '99': expected one of 01_frames"),
    (['run', '--profile', 'smoke', '--from', 'tokens'], "unknown chapter 'tokens'"),
    (['run', '--profile', 'smoke', '--from', '05', '--to', '04'], 'lies after'),
    (['run', '--profile', 'smoke', '--seed', 'x'], 'invalid int value'),
    (['run', '--profile', 'smoke', '--seed', '-1'], 'is not a whole number from 0 on'),
    (['run', '--seeds', '0,1', '--profile', 'huge'], "unknown profile 'huge'"),
    (['run', '--seeds', '0,1', '--games', 'chess'], 'chess'),
    (['run', '--seeds', '0,1', '--from', '99'], '99'),
    (['run', '--seeds', '0,1', '--seed', '7'], '--seed is for one run and --seeds for several'),
    (['ship', 'encoder', '--run', 'nowhere', '--episodes', '5'], '--episodes: for an agent'),
    (['train', '--profile', 'smoke', '--set', 'iterations=0'], 'iterations is 1 or more'),
    (['train', '--profile', 'smoke', '--set', 'mix=1'], 'mix is a share from 0 to below 1'),
    (['run', '--jobs', '0'], '0 chapters at a time is no number from 1 on'),
    (['train', '--set', 'color=red'], "unknown field of LoopConfig 'color': expected one of rounds, real_steps, "),
    (['train', '--set', 'rounds=few'], "--set rounds=few: rounds is a whole number, not 'few'"),
    (['train', '--set', 'foresight'], "--set foresight: foresight is yes or no, not ''"),
    (['train', '--set', 'mix=a'], "--set mix=a: mix is a number, not 'a'"),
    (['pack', 'nowhere', '--to', 'x'], 'nowhere is not a run folder: name one that atari-hrvq run or train made'),
    (['run', '--colour', 'red'], 'unrecognized arguments: --colour red'),
    (['bench', 'luck'], "unknown benchmark 'luck': expected one of frames, encoder, quantizer, dream"),
    (['run', '--start', 'warm'], "unknown start 'warm': expected one of scratch, pretrained, replay"),
    (['verify', 'nowhere'], 'nowhere has no manifest.json: expected a folder that atari-hrvq ship wrote'),
    (['evaluate', 'nowhere', '--game', 'pong'], 'nowhere does not hold an Agent'),
    (['ship', 'agent', '--run', 'nowhere'], 'chapter 10_agent, which makes the agent, is not finished'),
    (['run', '--seeds', '0,x'], "--seeds '0,x' is not a list of whole numbers from 0 on"),
    (['run', '--seeds', '1,1'], r'the seeds \[1, 1\] must be whole numbers, each named once'),
    (['run', '--seeds', '0,1', '--on', 'moon'], "unknown place to run on 'moon'"),
    (['run', '--slurm', 'partition=gpu'], '--on and --slurm are for several seeds'),
    (['run', '--seeds', '0', '--on', 'slurm', '--slurm', 'gpu'], "--slurm 'gpu' is not KEY=VALUE"),
    (['claims', 'nowhere', 'elsewhere'], 'nowhere is not a run folder'),
    (['claims', 'nowhere', 'elsewhere', '--longest'], 'claims: --longest is for one run'),
    (['claims', 'nowhere', 'elsewhere', '--goals'], 'claims: --goals is for one run, with nothing but --json'),
    (['claims', 'nowhere', '--goals', '--into', 'x'], 'claims: --goals is for one run, with nothing but --json'),
    (['claims', 'nowhere', '--goals'], 'nowhere is not a run folder'),
    (['play', '--run', 'nowhere', '--port', '99999'], '--port 99999 is no port: expected 1 to 65535, or 0'),
    (['play', '--run', 'nowhere', '--port', '-1'], '--port -1 is no port'),
    (['ship', 'agent', '--run', 'nowhere', '--episodes', '0'], '--episodes 0 is no number from 1 on'),
    (['ship', 'agent', '--run', 'nowhere', '--temperatures', '1,cold'], "'1,cold' is not a list of numbers above 0"),
    (['ship', 'agent', '--run', 'nowhere', '--temperatures', '0'], 'is not a list of numbers above 0'),
    (['bench', 'quantizer', '--json', ROOT / 'README.md' / 'x.json'], r'cannot write .*README\.md.x\.json: '),
    (['bench', 'quantizer', '--json', ROOT], 'is a folder: name a file'),
    (['outputs', '--run', 'nowhere'], 'nowhere holds no finished chapter: run one first'),
    (['dance'], 'invalid choice'), ([], 'required')])
def test_mistakes_on_the_command_line(arguments, expected, tmp_path, capsys):
    if arguments[:1] == ['run'] and '--colour' not in arguments: arguments = [*arguments, '--run', tmp_path / 'r']
    sentence(capsys, arguments, expected)
    assert not (tmp_path / 'r').exists()


def test_folders_that_are_no_runs(tmp_path, capsys):
    sentence(capsys, ['status', tmp_path / 'none'], 'is not a run of the chain')
    sentence(capsys, ['claims', tmp_path / 'none'], 'run chapter 12_claims first')


def test_missing_earlier_stage_is_named(tmp_path, capsys):
    sentence(capsys, ['run', '--run', tmp_path / 'r', '--profile', 'smoke', '--from', '07'], 'lacks chapter 01_frames')


def test_other_configuration_is_refused(tmp_path, capsys):
    write_json(tmp_path / 'r' / 'run.json', {'profile': 'laptop', 'games': ['pong'], 'seed': 3})
    sentence(capsys, ['run', '--run', tmp_path / 'r', '--profile', 'smoke'], 'was made by another configuration')


@pytest.mark.parametrize('missing', ['papermill', 'nbclient', 'ipykernel'])
def test_the_extra_that_runs_chapters_is_named(missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(book, 'find_spec', lambda name: None if name == missing else True)
    sentence(capsys, ['run', '--run', tmp_path / 'r', '--profile', 'smoke'], rf'needs {missing}: install the extra \(pip install "atari-hrvq\[book\]"\)')
    assert not (tmp_path / 'r').exists()


def test_train_needs_no_notebook_and_no_installation():
    "A lent machine has torch and the emulator, and the package lies in a folder."
    code = f"""import sys
for name in ('papermill', 'nbclient', 'nbformat', 'nbconvert', 'nbdev', 'IPython', 'ipykernel', 'jupyter_client', 'ipywidgets', 'plotly', 'pandas', 'matplotlib', 'timm', 'vector_quantize_pytorch'): sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
from atari_hrvq import agent, cli
assert cli.main(['train', '--set', 'color=red']) == 2
cli.main(['--version'])"""
    done = subprocess.run([BIN / 'python', '-c', code], cwd=ROOT / 'tests', capture_output=True, text=True)
    assert done.returncode == 0 and "unknown field of LoopConfig 'color'" in done.stderr and done.stdout.strip() == __version__, done.stderr


def test_verify_fails_on_weights_that_were_cut(tmp_path, capsys):
    (tmp_path / 'model.safetensors').write_bytes(b'weights')
    write_json(tmp_path / 'manifest.json', {'files': {'model.safetensors': hashlib.sha256(b'weights and more').hexdigest()}})
    sentence(capsys, ['verify', tmp_path], 'is not what was shipped, see model.safetensors: fetch it again')


def test_damaged_manifest_is_named(tmp_path, capsys):
    (tmp_path / 'manifest.json').write_text('{"stages":')
    sentence(capsys, ['run', '--run', tmp_path, '--profile', 'smoke', '--to', '01'], r'manifest\.json is damaged')


def test_no_write_permission(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    sentence(capsys, ['run', '--run', tmp_path / 'file' / 'r', '--profile', 'smoke'], 'cannot write to')


def test_disk_full_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    write_json(tmp_path / 'manifest.json', {'stages': {}})
    before = (tmp_path / 'manifest.json').read_bytes()

    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'replace', full)
    sentence(capsys, ['run', '--run', tmp_path, '--profile', 'smoke', '--to', '01'], 'cannot write .*No space left')
    assert (tmp_path / 'manifest.json').read_bytes() == before and not list(tmp_path.rglob('*.tmp'))


@pytest.mark.parametrize('command', [[], ['run'], ['train'], ['pack'], ['unpack'], ['status'], ['claims'], ['bench'], ['outputs'], ['ship'], ['verify'], ['evaluate'], ['play'], ['publish']])
def test_help_everywhere(command, capsys):
    with pytest.raises(SystemExit) as e: cli.main([*command, '--help'])
    assert e.value.code == 0 and 'usage: atari-hrvq' in capsys.readouterr().out


# ------------------------------------------------------------------ what a chapter can do to the chain

def small_book(folder, body, tags=('parameters',), name='01_frames'):
    "A checkout with `body` as the chapter `name`."
    v4 = nbformat.v4
    head = v4.new_code_cell("run = 'runs/smoke'\nprofile = 'smoke'\ngames = ['pong']\nseed = 0\nstart = 'scratch'", metadata={'tags': list(tags)})
    (folder / 'nbs').mkdir(parents=True, exist_ok=True)
    (folder / 'atari_hrvq').mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[head, v4.new_code_cell(body)], metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}), folder / 'nbs' / f'{name}.ipynb')
    return folder


WRITE = "import json, pathlib\np = pathlib.Path(run) / 'stages' / '01_frames.json'; p.parent.mkdir(parents=True, exist_ok=True)\np.write_text(json.dumps(dict(profile=profile, games=games, seed={seed}, start=start)))\n"


@pytest.mark.parametrize('body, tags, code, expected', [
    ("class BookError(Exception): pass\nraise BookError('the cup is empty: fill it')", ['parameters'], 2, '^atari-hrvq: the cup is empty: fill it$'),
    ('1 / 0', ['parameters'], 1, r'01_frames failed with ZeroDivisionError: division by zero \(the executed notebook is .*01_frames\.ipynb\)'),
    ('import os; os._exit(9)', ['parameters'], 1, 'its kernel died'),
    (WRITE.format(seed='seed'), [], 2, "unknown parameter of 01_frames 'run'"),
    (WRITE.format(seed=7), ['parameters'], 2, "01_frames ran with .*'seed': 7.* instead of"),
    ('pass', ['parameters'], 2, '01_frames ran with nothing instead of')], ids=['book-error', 'other-error', 'kernel-dies', 'no-parameters-cell', 'other-parameters', 'nothing-written'])
def test_what_a_chapter_can_do(body, tags, code, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(book, 'repo_root', lambda: small_book(tmp_path / 'book', body, tags))
    assert cli.main(['run', '--run', str(tmp_path / 'r'), '--profile', 'smoke', '--games', 'pong', '--to', '01']) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert re.search(expected, err[-1]) and not any('Traceback' in line for line in err), err
    assert json.loads((tmp_path / 'r' / 'manifest.json').read_text())['stages']['01_frames']['state'] == 'failed'
    assert not list((tmp_path / 'r' / 'notebooks').glob('.*'))


@pytest.mark.parametrize('taken, code, expected', [(1, 0, '01_frames     done in'), (99, 1, '01_frames: no kernel started, tried three times .*died')])
def test_a_kernel_whose_port_was_taken_is_started_again(taken, code, expected, tmp_path, capsys, monkeypatch):
    "As by another chain that starts at the same moment."
    from jupyter_client.connect import LocalPortCache
    free, asked = LocalPortCache.find_available_port, []
    monkeypatch.setattr(book, 'repo_root', lambda: small_book(tmp_path / 'book', WRITE.format(seed='seed')))
    with socket.create_server(('127.0.0.1', 0)) as busy:
        def port(self, ip): asked.append(ip); return busy.getsockname()[1] if len(asked) <= taken else free(self, ip)
        monkeypatch.setattr(LocalPortCache, 'find_available_port', port)
        assert cli.main(['run', '--run', str(tmp_path / 'r'), '--profile', 'smoke', '--games', 'pong', '--to', '01']) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert len(asked) == (15 if code else 10) and re.search(expected, '\n'.join(err)) and not any('Traceback' in line for line in err), err
    assert json.loads((tmp_path / 'r' / 'manifest.json').read_text())['stages']['01_frames']['state'] == ('failed' if code else 'done')
    assert not list((tmp_path / 'r' / 'notebooks').glob('.*'))


def test_a_checkpoint_stays_for_the_same_code_only(tmp_path):
    "A chapter that was interrupted finds its checkpoint again; one that was changed meanwhile does not."
    body = "import pathlib\nc = pathlib.Path(run) / 'checkpoints' / '01_frames-x.safetensors'\nfound = c.exists(); c.parent.mkdir(exist_ok=True); c.touch()\nassert found, 'no checkpoint'\n" + WRITE.format(seed='seed')
    call = lambda more='': book.run_chain(tmp_path / 'r', 'smoke', ['pong'], last='01', root=small_book(tmp_path / 'book', body + more))
    for more in ('', '# changed'):
        with pytest.raises(book.StageFailed, match='no checkpoint'): call(more)
    assert call('# changed')['stages']['01_frames']['state'] == 'done'
    (tmp_path / 'new' / 'checkpoints').mkdir(parents=True); (tmp_path / 'new' / 'checkpoints' / '01_frames-x.safetensors').touch()       # of a command, before the chapter ran for the first time
    assert book.run_chain(tmp_path / 'new', 'smoke', ['pong'], last='01', root=tmp_path / 'book')['stages']['01_frames']['state'] == 'done'


@pytest.fixture
def packed(tmp_path):
    "A run of 40 kB with two rounds' checkpoints, in pieces of 10 kB: `(run, folder of the pieces)`."
    run = tmp_path / 'run'
    write_json(run / 'run.json', {'profile': 'smoke', 'games': ['pong'], 'seed': 0, 'start': 'scratch'})
    for name in ('artifacts/agent/x', 'artifacts/a', 'cache/frames.npy', 'notebooks/n', 'checkpoints/10_agent-round-0.safetensors', 'checkpoints/10_agent-round-10.ab.safetensors', 'checkpoints/10_agent-round-10.safetensors'):
        (run / name).parent.mkdir(parents=True, exist_ok=True); (run / name).write_bytes(os.urandom(10_000))
    book.pack_run(run, tmp_path / 'out', piece=10_000)
    return run, tmp_path / 'out'


def test_a_run_travels_in_small_pieces(packed, tmp_path, capsys):
    run, out = packed
    assert len(list(out.iterdir())) == 4 and max(p.stat().st_size for p in out.iterdir()) == 10_000
    assert cli.main(['unpack', str(out), '--run', str(tmp_path / 'there')]) == 0 and str(tmp_path / 'there') in capsys.readouterr().out
    made = {str(p.relative_to(tmp_path / 'there')): p.read_bytes() for p in (tmp_path / 'there').rglob('*') if p.is_file() and p.name != '.lock'}
    assert set(made) == {'run.json', 'artifacts/a', 'checkpoints/10_agent-round-10.ab.safetensors', 'checkpoints/10_agent-round-10.safetensors'}       # nothing that regenerates, and of the rounds the newest
    assert all((run / name).read_bytes() == data for name, data in made.items())
    assert cli.main(['pack', str(tmp_path / 'there'), '--to', str(out)]) == 0 and re.search(r'\d files, 0\.0 MiB: ', capsys.readouterr().out)
    assert len(list(out.glob('run.tar.xz.*'))) == len(list(out.iterdir()))


@pytest.mark.parametrize('harm, expected', [
    (lambda p: p[1].unlink(), 'does not hold all pieces of a run: expected run.tar.xz.00, run.tar.xz.01 and so on'),
    (lambda p: p[-1].unlink(), 'damaged or not all there .*: pack the run again'),
    (lambda p: p[1].write_bytes(bytes(10_000)), 'damaged or not all there .*: pack the run again'),
    (lambda p: [x.unlink() for x in p], 'found none')], ids=['a hole', 'the end is missing', 'overwritten', 'nothing'])
def test_pieces_that_do_not_make_a_run_change_nothing(packed, tmp_path, capsys, harm, expected):
    harm(sorted(packed[1].iterdir()))
    sentence(capsys, ['unpack', packed[1], '--run', tmp_path / 'there'], expected)
    assert not [p for p in (tmp_path / 'there').rglob('*') if p.name != '.lock']


def test_another_run_is_not_overwritten(packed, tmp_path, capsys):
    write_json(tmp_path / 'there' / 'run.json', {'seed': 1})
    sentence(capsys, ['unpack', packed[1], '--run', tmp_path / 'there'], 'is another run than the one in .*: choose another folder')
    assert json.loads((tmp_path / 'there' / 'run.json').read_text()) == {'seed': 1}


def test_train_runs_the_loop_and_says_how_it_went(tmp_path, capsys):
    call = ['train', '--run', str(tmp_path / 'r'), '--profile', 'smoke', '--games', 'pong', *(x for s in ('first=60', 'begin_tokenizer=9', 'frames=30', 'foresight=no', 'begin_lr=1e-3', 'rounds=0', 'begin_world=2') for x in ('--set', s))]
    assert cli.main(call) == 0
    said = capsys.readouterr().out
    assert re.search(r'round +agent steps a game +dreamt reward, pong', said) and re.search(r'^ {4}0 +60 ', said, re.M) and str(tmp_path / 'r' / 'artifacts' / 'agent') in said
    assert load_checkpoint(next((tmp_path / 'r' / 'checkpoints').glob('10_agent-round-0.safetensors')))['history'][0]['real_steps'] == 60
    assert not (tmp_path / 'r' / 'stages').exists() and cli.main([*call, '--finish']) == 0                # as if the chapter had run: ship and later chapters take its agent
    assert json.loads((tmp_path / 'r' / 'stages' / '10_agent.json').read_text())['games'] == ['pong'] and not list((tmp_path / 'r' / 'checkpoints').iterdir())
    told = {r.get('name', r.get('curve')): r for r in map(json.loads, (tmp_path / 'r' / 'metrics' / '10_agent.jsonl').read_text().splitlines())}
    assert told['real_steps']['value'] == 60 and told['recipe']['begin_world'] == 2
    assert cli.main(call) == 2 and 'chapter 10 is finished in ' in capsys.readouterr().err and (tmp_path / 'r' / 'stages' / '10_agent.json').exists()      # it does not begin anew over a finished one


def test_what_a_killed_chain_left_is_cleaned_up(tmp_path):
    sleeper, run = subprocess.Popen(['sleep', '300']), tmp_path / 'r'
    write_json(run / '.kernels-06_moe', [[sleeper.pid, psutil.Process(sleeper.pid).create_time()]])
    (run / '.kernels-09_ppo').write_text('')                                   # a kill in the middle of a write
    with pytest.raises(BookError, match='lacks chapter 01_frames'): book.run_chain(run, 'smoke', ['pong'], first='07', root=ROOT)
    assert not list(run.glob('.kernels*')) and not psutil.pid_exists(sleeper.pid)


def test_the_list_of_kernels_is_never_half_written(tmp_path, monkeypatch):
    running = book.Running('01_frames', 'frames', tmp_path)
    sleepers = [subprocess.Popen(['sleep', '300'], env={**ENV, 'ATARI_HRVQ_PROGRESS': str(running.report)}) for _ in range(2)]
    try:
        wait_for(lambda: all(psutil.Process(s.pid).name() == 'sleep' for s in sleepers))
        running.look([psutil.Process(sleepers[0].pid)])
        before = running.pids.read_text()
        assert [pid for pid, _ in json.loads(before)] == [sleepers[0].pid]

        def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, 'replace', full)
        running.look([psutil.Process(s.pid) for s in sleepers])
        assert running.pids.read_text() == before and len(running.kids) == 2
    finally: running.end()


@pytest.fixture
def three(tmp_path, monkeypatch):
    "A book of three chapters, where the last needs the other two; a function that gives them bodies (each notes its time) and returns the checkout."
    specs = [book.StageSpec('01_a', 'a', ()), book.StageSpec('02_b', 'b', ()), book.StageSpec('03_c', 'c', ('01_a', '02_b'))]
    monkeypatch.setattr(book, 'STAGES', specs)

    def write(**bodies):
        for s in specs:
            body = f"import time; began = time.time()\n{bodies.get(s.title, 'time.sleep(1)')}\n" + WRITE.format(seed='seed').replace('01_frames', s.name) + f"(pathlib.Path(run) / '{s.name}.txt').write_text(f'{{began}} {{time.time()}}')"
            small_book(tmp_path / 'book', body, name=s.name)
        return tmp_path / 'book'
    return write


@pytest.mark.parametrize('jobs', [1, 2])
def test_chapters_that_do_not_need_each_other_run_together(three, tmp_path, jobs):
    root, run = three(a='time.sleep(4)', b='time.sleep(4)'), tmp_path / 'r'
    manifest = book.run_chain(run, 'smoke', ['pong'], root=root, jobs=jobs)
    (a, b, c) = ([float(x) for x in (run / f'{n}.txt').read_text().split()] for n in ('01_a', '02_b', '03_c'))
    assert (max(a[0], b[0]) < min(a[1], b[1])) == (jobs == 2) and c[0] > max(a[1], b[1])
    assert list(manifest['stages']) == ['01_a', '02_b', '03_c'] and all(s['state'] == 'done' and s['peak_mb'] > 10 for s in manifest['stages'].values())
    assert not list(run.glob('.kernels*')) and not list(run.glob('.progress*'))


def left(run):
    "Processes of the chapters of `run` that are still alive."
    found = []
    for p in psutil.Process().children(recursive=True):
        try: found += [p] if p.environ().get('ATARI_HRVQ_PROGRESS', '').startswith(str(run)) and p.status() != 'zombie' else []
        except psutil.Error: pass
    return found


def test_a_chapter_that_fails_stops_the_other(three, tmp_path):
    root, run = three(a='time.sleep(5); 1 / 0', b='time.sleep(300)'), tmp_path / 'r'
    began, seen, here = time.time(), [], Path.cwd()
    watcher = threading.Thread(target=lambda: seen.extend(wait_for(lambda: left(run)))); watcher.start()
    with pytest.raises(book.StageFailed, match='01_a failed with ZeroDivisionError'): book.run_chain(run, 'smoke', ['pong'], root=root, jobs=2)
    stages = json.loads((run / 'manifest.json').read_text())['stages']
    assert time.time() - began < 100 and {n: s['state'] for n, s in stages.items()} == {'01_a': 'failed', '02_b': 'stopped'} and stages['02_b']['error'] == 'another chapter failed'
    assert not list(run.glob('.kernels*')) and not book.busy(run) and not left(run)
    watcher.join(); assert seen
    three()
    book.run_chain(run, 'smoke', ['pong'], root=root, jobs=2)                   # and the same command goes on
    assert json.loads((run / 'manifest.json').read_text())['stages']['03_c']['state'] == 'done'
    assert Path.cwd() == here                                                  # two at a time did not carry each other away


def test_two_chapters_may_save_at_once(tmp_path):
    "The index and the joined metrics of a run lose nothing when several processes write to them at the same time."
    code = f"""import sys, numpy as np; from atari_hrvq.core import Stage
stage = Stage(sys.argv[1], {str(tmp_path)!r}, 'smoke', ['pong'], 0)
for i in range(25): stage.save(f'{{sys.argv[1]}}-{{i}}', {{'x': np.zeros(3)}})
stage.metric('one', 1.); stage.done()"""
    names = ['01_frames', '06_moe', '09_ppo']
    jobs = [subprocess.Popen([BIN / 'python', '-c', code, n], env=ENV) for n in names]
    assert all(j.wait(120) == 0 for j in jobs)
    assert len(json.loads((tmp_path / 'artifacts' / 'index.json').read_text())) == 75
    assert {json.loads(line)['chapter'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()} == set(names)


def test_a_sweep_is_one_run_a_seed_here_and_as_jobs(tmp_path, capsys, monkeypatch):
    fine = WRITE.format(seed='seed')
    monkeypatch.setattr(book, 'repo_root', lambda: small_book(tmp_path / 'book', fine + 'if seed == 3: 1 / 0'))
    call = lambda where, seeds, *more: cli.main(['run', '--run', str(tmp_path / where), '--seeds', seeds, '--on', where, '--profile', 'smoke', '--games', 'pong', '--to', '01', *more])
    for where in ('here', 'local'):
        assert call(where, '0,2') == 0
        made = [json.loads((tmp_path / where / f'seed-{s}' / 'stages' / '01_frames.json').read_text()) for s in (0, 2)]
        assert [m['seed'] for m in made] == [0, 2] and not (tmp_path / where / 'seed-1').exists()
        capsys.readouterr()
        assert call(where, '2,3') == 1                                       # one goes wrong, the other is done
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(r'1 of 2 seeds did not end; seed 3: 01_frames failed with ZeroDivisionError: .*; run the same command again to go on', err), err
    sentence(capsys, ['run', '--run', tmp_path / 'x', '--seeds', '0,1', '--on', 'slurm'], "submitit cannot start jobs on 'slurm'")
    sentence(capsys, ['run', '--run', tmp_path / 'x', '--seeds', '0,1', '--slurm', 'partition=gpu'], r"parameters of slurm \(partition\) mean nothing on 'here'")
    assert not (tmp_path / 'x').exists() or not list((tmp_path / 'x').glob('seed-*'))


def test_keys_follow_code_parameters_and_upstream(tmp_path):
    root, stage = small_book(tmp_path, 'from atari_hrvq.core import x'), book.STAGES[0]
    (root / 'atari_hrvq' / 'core.py').write_text('from .vq import y')
    (root / 'atari_hrvq' / 'vq.py').write_text('y = 1')
    (root / 'atari_hrvq' / 'hrvq.py').write_text('z = 1')
    key = lambda **p: book.stage_key(root, stage, p, {})
    first = key(seed=0)
    (root / 'atari_hrvq' / 'hrvq.py').write_text('z = 2')
    assert key(seed=0) == first != key(seed=1)                               # a module that it does not import; another parameter
    (root / 'atari_hrvq' / 'vq.py').write_text('y = 2')
    assert key(seed=0) != first                                              # one that it imports by way of another
    later = book.StageSpec('01_frames', '', ('00_core',))
    keys = [book.stage_key(root, later, {}, {'00_core': {'key': k, 'files': {'a': f}}}) for k, f in (('k', 'f'), ('l', 'f'), ('k', 'g'), ('k', 'f'))]
    assert len(set(keys)) == 3 and keys[0] == keys[3]


def test_keys_follow_what_is_read_beside_the_run(tmp_path, monkeypatch):
    stage, weights = book.STAGES[0], tmp_path / 'pretrained' / 'x' / 'model.safetensors'
    weights.parent.mkdir(parents=True)
    key = lambda body, start='scratch': book.stage_key(small_book(tmp_path, body), stage, {'start': start}, {})
    bodies, starts = ("begin = stage.shipped('x')", 'x = 1', "os.environ.get('ATARI_HRVQ_DINOV2')"), ('scratch', 'pretrained', 'replay')
    def keys(data, named):
        weights.write_bytes(data)
        monkeypatch.delenv('ATARI_HRVQ_DINOV2', raising=False) if named is None else monkeypatch.setenv('ATARI_HRVQ_DINOV2', named)
        return {(b, s): key(b, s) for b in bodies for s in starts}
    first, other, named = keys(b'one', None), keys(b'two', None), keys(b'one', 'here')
    assert {k for k in first if other[k] != first[k]} == {(bodies[0], 'pretrained'), (bodies[0], 'replay')}
    assert {k for k in first if named[k] != first[k]} == {(bodies[2], s) for s in starts} and keys(b'one', None) == first
    assert len(set(named.values()) | set(keys(b'one', 'there').values())) == 12


def test_shipped_weights_are_hashed_once(tmp_path, monkeypatch):
    (tmp_path / 'pretrained').mkdir(); (tmp_path / 'pretrained' / 'm.safetensors').write_bytes(b'weights')
    hashed = []
    monkeypatch.setattr(book, 'file_hash', lambda path: hashed.append(path) or 'hash')
    seen = [book.outside(tmp_path, ["stage.shipped('x')"], {'start': 'pretrained'}) for _ in range(3)]
    assert seen == [[['pretrained/m.safetensors', 'hash']]] * 3 and len(hashed) == 1


def test_a_cell_that_is_not_python_is_named(tmp_path):
    root, stage = small_book(tmp_path, 'x = (1'), book.STAGES[0]
    with pytest.raises(BookError, match=f'{stage.name}.ipynb has a cell that is not Python: .*x = \\(1'): book.stage_key(root, stage, {}, {})


def test_stop_and_second_chain(tmp_path, capsys):
    run = tmp_path / 'r'
    chain = subprocess.Popen([COMMAND, 'run', '--run', run, '--profile', 'smoke', '--from', '06', '--to', '06'], cwd=ROOT, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    kernels = wait_for(lambda: (run / '.kernels-06_moe').exists() and json.loads((run / '.kernels-06_moe').read_text() or '[]'))
    sentence(capsys, ['run', '--run', run, '--profile', 'smoke'], 'is in use by another chain')
    assert book.busy(run)
    chain.send_signal(signal.SIGINT)
    out, err = chain.communicate(timeout=30)
    assert chain.returncode == 130 and err.strip().splitlines()[-1].endswith('stopped; run the same command again without --from to go on') and 'Traceback' not in err
    assert kernels and not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != 'zombie' for pid, _ in kernels)
    assert json.loads((run / 'manifest.json').read_text())['stages']['06_moe']['state'] == 'stopped' and not book.busy(run)


def test_keys_of_this_book(tmp_path):
    for d in ('nbs', 'atari_hrvq'): shutil.copytree(ROOT / d, tmp_path / d)
    p = {'profile': 'smoke', 'games': ['pong'], 'seed': 0}
    before = book.stage_keys(tmp_path, p)
    assert book.stage_keys(tmp_path, p) == before and all(a != b for a, b in zip(before.values(), book.stage_keys(tmp_path, {**p, 'seed': 1}).values(), strict=True))
    with open(tmp_path / 'atari_hrvq' / 'vq.py', 'a') as f: f.write('# changed\n')
    changed = {n for n, k in book.stage_keys(tmp_path, p).items() if k != before[n]}
    assert {'03_vq', '04_hrvq', '07_world', '12_claims'} <= changed and not {'01_frames', '06_moe', '09_ppo'} & changed
    p['start'] = 'pretrained'
    before = book.stage_keys(tmp_path, p)
    (tmp_path / 'pretrained').mkdir(); (tmp_path / 'pretrained' / 'm.safetensors').write_bytes(b'shipped meanwhile')
    changed = {n for n, k in book.stage_keys(tmp_path, p).items() if k != before[n]}
    assert {'02_encoder', '04_hrvq', '07_world', '10_agent', '11_evaluate', '12_claims'} <= changed and not {'01_frames', '06_moe', '09_ppo'} & changed


def test_plain_papermill_names_what_is_missing_or_unknown(tmp_path):
    call = lambda notebook, *more: subprocess.run([BIN / 'papermill', f'nbs/{notebook}.ipynb', tmp_path / 'out.ipynb', '-p', 'run', tmp_path / 'r', *more], cwd=ROOT, env=ENV, capture_output=True, text=True)
    done = call('08_dream', '-p', 'stpes', '3')
    assert done.returncode and "unknown parameter of 08_dream 'stpes'" in done.stderr and not (tmp_path / 'r').exists()
    done = call('07_world')
    assert done.returncode and 'run chapter 04_hrvq first' in done.stderr


def test_ledger_is_whole_after_any_number_of_chapters():
    assert [c.id for c in CLAIMS] == 'E1 E2 E3 E4 E5 Q1 Q2 Q3 Q4 H1 H2 H3 H4 H5 W1 W2 W3 W4 W5 W6 P1 P2 P3 L1'.split()
    rows = [{'chapter': '02_encoder', 'claim': 'E3', 'value': .1, 'null': .4, 'seeds': 1, 'frames': 9, 'cell': 'record'}]
    for profile, expected in (('smoke', 'open'), ('laptop', 'open'), ('gpu', 'refuted'), ('paper', 'refuted')):
        table = ledger(rows, profile)
        assert len(table) == 24 and table[2]['verdict'] == expected and all(r['verdict'] == 'open' for r in table if r['id'] != 'E3')
        assert list(table[2]) == ['id', 'claim', 'original', 'ours', 'interval', 'null', 'verdict', 'profile', 'seeds', 'frames', 'chapter', 'cell']
    assert ledger([{**rows[0], 'note': 'decisive: counted'}], 'smoke')[2]['verdict'] == 'refuted'
    assert ledger([], 'smoke')[2]['ours'] is None
    good = {**rows[0], 'value': .9, 'null': .1}
    assert ledger([good], 'smoke')[2]['verdict'] == 'reproduced' and ledger([{**good, 'note': 'too few seeds to decide: a gain'}], 'gpu')[2]['verdict'] == 'open'


def test_outputs_that_are_copied(tmp_path, monkeypatch):
    "Outputs go where the source is the same, without the injected cell, counts and metadata; a picture that is too large is left out and named."
    root, v4 = small_book(tmp_path / 'book', 'x = 1'), nbformat.v4
    path = root / 'nbs' / '01_frames.ipynb'
    ids = [c['id'] for c in json.loads(path.read_text())['cells']]
    output = lambda data: v4.new_output('display_data', data, metadata={'isolated': True})
    done = v4.new_notebook(cells=[v4.new_code_cell("run = 'other'", id=ids[0], outputs=[output({'text/plain': 'a'})]), v4.new_code_cell('run = 3', id='injected'),
                                  v4.new_code_cell('x = 1', id=ids[1], execution_count=7, outputs=[output({'image/png': 'A' * 300_000}), output({'text/plain': 'kept'}), v4.new_output('stream', name='stderr', text='noise')])])
    (tmp_path / 'r' / 'notebooks').mkdir(parents=True)
    for name in ('01_frames', '02_encoder'): nbformat.write(done, tmp_path / 'r' / 'notebooks' / f'{name}.ipynb')
    write_json(tmp_path / 'r' / 'manifest.json', {'stages': {'01_frames': {'state': 'done'}, '02_encoder': {'state': 'failed'}}})
    shutil.copy(path, root / 'nbs' / '02_encoder.ipynb'); unfinished = path.read_bytes()
    monkeypatch.setattr(publish, 'repo_root', lambda: root)
    publish.store_outputs(tmp_path / 'r')
    assert (root / 'nbs' / '02_encoder.ipynb').read_bytes() == unfinished
    first, second = json.loads(path.read_text())['cells']
    assert first['outputs'] == [] and [''.join(o['data']['text/plain']) for o in second['outputs']] == ['kept'] and second['execution_count'] is None and second['outputs'][0]['metadata'] == {}


def test_outputs_of_notebooks_that_are_no_stage(tmp_path, capsys, monkeypatch):
    "They are executed for it, in a kernel that is told not to write; one with parameters waits for its run; a cell that fails is one sentence."
    def write(body): small_book(tmp_path / 'book', f'import os\nprint(os.environ["IN_TEST"], os.getcwd())\n{body}', tags=(), name='13_bench')
    root = small_book(tmp_path / 'book', 'print(1)'); small_book(root, 'print(2)', name='index'); write('')
    write_json(tmp_path / 'r' / 'manifest.json', {'stages': {'01_frames': {'state': 'done'}}})
    (tmp_path / 'r' / 'notebooks').mkdir(); shutil.copy(root / 'nbs' / '01_frames.ipynb', tmp_path / 'r' / 'notebooks')
    monkeypatch.setattr(publish, 'repo_root', lambda: root)
    said = lambda name: [''.join(o['text']) for c in json.loads((root / 'nbs' / f'{name}.ipynb').read_text())['cells'] for o in c['outputs']]
    assert cli.main(['outputs', '--run', str(tmp_path / 'r')]) == 0
    assert said('13_bench') == ['1 .\n'] and said('index') == said('01_frames') == []
    write("raise ValueError('a beautiful mistake')"); capsys.readouterr()
    sentence(capsys, ['outputs', '--run', tmp_path / 'r'], '13_bench.ipynb failed with ValueError: a beautiful mistake: correct it')
    publish.store_outputs(tmp_path / 'r', chapters=['01_frames'])              # and the others may be had without it


def test_make_and_ci():
    shown = subprocess.run(['make', '-s', 'help'], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f'make {t}' in shown for t in ('reproduce', 'test', 'lab', 'clean')) and os.access(ROOT / '.ci' / 'run', os.X_OK)
    pins = (ROOT / 'constraints.txt').read_text().split()
    assert 'torch==2.13.0' in pins and all(re.fullmatch(r'[\w.-]+==[\w.]+', p) for p in pins)


# ------------------------------------------------------------------ the smoke chain

def test_chain_runs_every_chapter(smoke):
    manifest = json.loads((smoke / 'manifest.json').read_text())
    assert list(manifest['stages']) == NAMES and all(s['state'] == 'done' and s['seconds'] > 0 and s['key'] for s in manifest['stages'].values())
    assert max(s['peak_mb'] for s in manifest['stages'].values()) < 8000
    assert {'python', 'torch', 'numpy', 'ale-py', 'atari-hrvq'} <= set(manifest['versions']) and set(manifest['notebooks']) == set(NAMES)
    assert {p.stem for p in (smoke / 'notebooks').glob('*.ipynb')} == set(NAMES) and not list(smoke.rglob('*.tmp')) and not list((smoke / 'checkpoints').glob('*'))
    assert not [p for p in (smoke / 'artifacts').rglob('*') if p.suffix in ('.pt', '.pkl', '.pth')]
    log = (smoke.parent / 'smoke.log').read_text()
    assert f'[ 4/{len(NAMES)}] 04_hrvq' in log and f'executed notebooks: {smoke / "notebooks"}' in log


def test_ledger(smoke):
    done = shell('claims', smoke, '--json')
    table = json.loads(done.stdout)
    assert [r['id'] for r in table] == [c.id for c in CLAIMS] == 'E1 E2 E3 E4 E5 Q1 Q2 Q3 Q4 H1 H2 H3 H4 H5 W1 W2 W3 W4 W5 W6 P1 P2 P3 L1'.split()
    for r in table:
        assert list(r) == ['id', 'claim', 'original', 'ours', 'interval', 'null', 'verdict', 'profile', 'seeds', 'frames', 'chapter', 'cell']
        assert r['verdict'] in ('open', 'reproduced', 'exceeded', 'refuted', 'reproduced but worth nothing') and (r['ours'] is not None or r['verdict'] == 'open')
        if r['cell']: assert r['cell'] in [c['id'] for c in json.loads((ROOT / 'nbs' / f'{r["chapter"]}.ipynb').read_text())['cells']]
    assert 'E1' in (smoke / 'claims.md').read_text() and shell('claims', smoke).stdout.count('\n') >= len(CLAIMS)


def test_goals_find_the_metrics_of_their_chapters(smoke, tmp_path):
    "A goal whose metric no chapter writes would stay unmeasured for ever: without anything shipped, only those are that a run in seconds has too few frames or seeds for."
    goals = goals_met(smoke, tmp_path)
    missing = {r['goal']: r['chapter'] for r in goals if r['verdict'] == 'not measured' and r['chapter'] != '14_pretrained'}
    assert len(goals) == len(GOALS) and set(missing.values()) <= {'05_shared', '08_dream', '11_evaluate', 'A2_ablations'} and len(missing) <= 7, missing


def test_metrics_name_cells_and_are_valid_json(smoke):
    rows = [json.loads(line) for line in (smoke / 'metrics.jsonl').read_text().splitlines()]
    assert {r['chapter'] for r in rows} >= set(NAMES) - {'00_core', '12_claims', '90_explore'}
    ids = {n: {c['id'] for c in json.loads((ROOT / 'nbs' / f'{n}.ipynb').read_text())['cells']} for n in NAMES}
    assert all(r['cell'] in ids[r['chapter']] for r in rows if 'cell' in r)


def test_second_call_skips_everything(smoke):
    began, before = time.time(), (smoke / 'metrics.jsonl').read_bytes()
    done = shell('run', '--run', smoke, '--profile', 'smoke')
    assert done.returncode == 0 and done.stderr.count('unchanged, skipped') == len(NAMES) and time.time() - began < 30
    assert (smoke / 'metrics.jsonl').read_bytes() == before
    assert shell('status', smoke).stdout.count('done') == len(NAMES)


@pytest.fixture(scope='module')
def copy(smoke, tmp_path_factory):
    "A copy of the smoke run that tests may damage (and mend)."
    return Path(shutil.copytree(smoke, tmp_path_factory.mktemp('copy') / 'run', ignore=shutil.ignore_patterns('notebooks')))


@pytest.mark.parametrize('file, chapter', [('artifacts/tokenizer/model.safetensors', '04_hrvq'), ('artifacts/frames-pong-train.safetensors', '01_frames'), ('metrics/02_encoder.jsonl', '02_encoder'), ('claims.json', '12_claims')])
def test_damaged_artefacts_are_named(copy, capsys, file, chapter):
    path = copy / file
    whole = path.read_bytes()
    altered = bytearray(whole); altered[-2] ^= 1
    for damaged, expected in ((whole[:-9], 'was altered or cut short'), (bytes(altered), 'was altered or cut short'), (None, 'is missing')):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert cli.main(['run', '--run', str(copy), '--profile', 'smoke']) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(path) in last and expected in last and f'--from {chapter}' in last
        path.write_bytes(whole)


def test_plain_papermill_runs_the_same_stage(copy, tmp_path):
    before = (copy / 'metrics' / '90_explore.jsonl').read_bytes()
    (copy / 'metrics' / '90_explore.jsonl').unlink()
    done = subprocess.run([BIN / 'papermill', 'nbs/90_explore.ipynb', tmp_path / 'out.ipynb', '-p', 'run', copy, '-p', 'profile', 'smoke'], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before and (copy / 'metrics' / '90_explore.jsonl').read_bytes() == before


def killed_and_resumed(copy, chapter, checkpoint):
    "kill -9 of the chain and its kernel in the middle of a training; started again, the chapter ends in the same bytes."
    files = {p: (copy / p).read_bytes() for p in json.loads((copy / 'manifest.json').read_text())['stages'][chapter]['files']}
    log = copy / 'killed.log'
    with open(log, 'w') as out: chain = subprocess.Popen([COMMAND, 'run', '--run', copy, '--profile', 'smoke', '--from', chapter, '--to', chapter], cwd=ROOT, env={**ENV, 'ATARI_HRVQ_CHECKPOINT_S': '0'}, stderr=out, stdout=out)
    path = copy / 'checkpoints' / f'{chapter}-{checkpoint}.safetensors'
    wait_for(lambda: path.exists() or chain.poll() is not None, 600, log)
    assert chain.poll() is None, log.read_text()
    for p in [*psutil.Process(chain.pid).children(recursive=True), chain]: p.kill()
    chain.wait()
    state = load_checkpoint(path)
    assert 0 < state['step'] < 1000 and json.loads((copy / 'manifest.json').read_text())['stages'][chapter]['state'] == 'running'
    assert re.search(rf'{chapter}\s+killed', str(book.status_table(copy)))
    done = shell('run', '--run', copy, '--profile', 'smoke', '--to', chapter)
    assert done.returncode == 0, done.stderr
    assert f'{chapter}  ' in done.stderr and 'done in' in done.stderr
    for p, data in files.items(): assert (copy / p).read_bytes() == data, p


def test_kill_and_resume_is_bitwise(smoke, tmp_path):
    "Two chapters side by side, each in a copy of the run, with one thread each."
    def one(chapter, checkpoint): killed_and_resumed(Path(shutil.copytree(smoke, tmp_path / chapter, ignore=shutil.ignore_patterns('notebooks'))), chapter, checkpoint)
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(one, '02_encoder', 'encoder'), pool.submit(one, '04_hrvq', 'tokenizer')]: job.result()


def test_outputs_are_copied_clean(smoke, tmp_path, monkeypatch):
    from conftest import copy_book
    checkout = copy_book(tmp_path / 'book')
    monkeypatch.setattr(publish, 'repo_root', lambda: checkout)
    publish.store_outputs(smoke, chapters=[*NAMES, '93_cli'])
    before = {p.name: p.read_bytes() for p in (checkout / 'nbs').glob('*.ipynb')}
    for name in ('01_frames', '93_cli'): assert any(c['outputs'] for c in json.loads(before[f'{name}.ipynb'])['cells'] if c['cell_type'] == 'code'), name
    for name, data in before.items():
        mine, theirs = json.loads(data)['cells'], json.loads((ROOT / 'nbs' / name).read_text())['cells']
        assert [(c['id'], c['source']) for c in mine] == [(c['id'], c['source']) for c in theirs]
    assert subprocess.run([BIN / 'nbdev_clean'], cwd=checkout, env={k: v for k, v in ENV.items() if k != 'IN_TEST'}).returncode == 0
    assert {p.name: p.read_bytes() for p in (checkout / 'nbs').glob('*.ipynb')} == before
    assert max(len(json.dumps([c.get('outputs') for c in json.loads(d)['cells']])) for d in before.values()) < 220_000


def test_book_error_is_the_one_of_core():
    with pytest.raises(BookError): book.find_stage('nothing')


def test_ship_copies_weights_with_a_card_of_measured_figures(smoke, tmp_path, capsys):
    from atari_hrvq.encoder import Encoder
    assert cli.main(['ship', 'encoder', '--run', str(smoke), '--to', str(tmp_path)]) == 0
    there, here = (Encoder.from_pretrained(f).state_dict() for f in (smoke / 'artifacts' / 'encoder', tmp_path / 'encoder'))
    assert all(torch.equal(v.half().float() if v.is_floating_point() else v, here[k]) for k, v in there.items())
    card = (tmp_path / 'encoder' / 'README.md').read_text()
    row = next(r for r in map(json.loads, (tmp_path / 'encoder' / 'metrics.jsonl').read_text().splitlines()) if r.get('name') == 'diversity')
    assert f'| diversity | all | {row["value"]:.4g} |' in card and 'from atari_hrvq.encoder import Encoder' in card and 'profile `smoke`' in card
    assert re.search(r'rounded to half precision: (0\.999\d|1\.0000) cosine of the vectors', card)
    assert cli.main(['ship', 'A2_ablations', '--run', str(smoke), '--to', str(tmp_path)]) == 0
    assert (tmp_path / 'A2_ablations' / 'metrics.jsonl').read_bytes() == (smoke / 'metrics' / 'A2_ablations.jsonl').read_bytes() and '| parameters_saved | all |' in (tmp_path / 'A2_ablations' / 'README.md').read_text()
    sentence(capsys, ['ship', 'crown', '--run', smoke], "holds no model 'crown': expected one of agent")
    kept = tmp_path / '10_agent'                                                   # play that is kept beside figures stays beside those of its run
    assert cli.main(['ship', '10_agent', '--run', str(smoke), '--to', str(tmp_path)]) == 0
    (kept / 'replay.safetensors').touch()
    assert cli.main(['ship', '10_agent', '--run', str(smoke), '--to', str(tmp_path)]) == 0
    other = (kept / 'metrics.jsonl').read_text().replace('"round": 0', '"round": 7')
    (kept / 'metrics.jsonl').write_text(other)
    sentence(capsys, ['ship', '10_agent', '--run', smoke, '--to', tmp_path], 'holds in replay.safetensors the play of another run')
    assert (kept / 'metrics.jsonl').read_text() == other
