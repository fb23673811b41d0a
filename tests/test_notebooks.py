"""The notebooks are the source: in sync, clean, small, one-way, and every cell of them runs."""
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from atari_hrvq.core import Stage
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r'(0[1-9]|1[0-2])_', p.name)]
BIN = Path(sys.executable).parent
cells = lambda p: json.loads(p.read_text())['cells']
text = lambda c: ''.join(c['source'])


def test_all_chapters_are_here():
    assert [p.stem for p in NOTEBOOKS] == ['00_core', '01_frames', '02_encoder', '03_vq', '04_hrvq', '05_shared', '06_moe', '07_world', '08_dream', '09_ppo', '10_agent', '11_evaluate', '12_claims', '90_explore', '91_book', 'index']


def test_package_and_notebooks_are_in_sync_and_clean(tmp_path):
    copy = tmp_path / 'book'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.venv', 'runs', '.git', '*.egg-info', '__pycache__', '.pytest_cache'))
    for p in (copy / 'atari_hrvq').glob('*.py'):
        if p.name != '__init__.py': p.unlink()
    for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([BIN / command], cwd=copy, check=True, capture_output=True)
    for folder in ('nbs', 'atari_hrvq'):
        names = sorted(p.name for p in (ROOT / folder).iterdir() if p.suffix in ('.py', '.ipynb'))
        assert names == sorted(p.name for p in (copy / folder).iterdir() if p.suffix in ('.py', '.ipynb'))
        _, different, errors = filecmp.cmpfiles(ROOT / folder, copy / folder, names, shallow=False)
        assert not different and not errors, f'run nbdev_export and nbdev_clean: {different + errors}'


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_one_parameters_cell_with_the_same_names(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    assert tuple(n.targets[0].id for n in ast.parse(text(tagged[0])).body) == Stage.parameters


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path):
    cs = cells(path)
    titles = [line for c in cs if c['cell_type'] == 'markdown' for line in text(c).splitlines() if line.startswith('# ')]
    assert len(titles) == 1 and cs[0]['cell_type'] == 'markdown'
    assert len({c['id'] for c in cs}) == len(cs)
    lengths = sorted(len(text(c).splitlines()) for c in cs if c['cell_type'] == 'code')
    assert lengths[len(lengths) // 2] < 15 and len(json.dumps([c.get('outputs') for c in cs])) < 200_000


def test_imports_run_one_way():
    order = {p.stem[3:]: p.stem[:2] for p in NOTEBOOKS if p.stem != 'index'}
    for name, number in order.items():
        for node in ast.walk(ast.parse((ROOT / 'atari_hrvq' / f'{name}.py').read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and name != 'book':
                assert order[node.module] < number and node.module != 'explore', f'{name} imports {node.module}'
    top = [n for n in ast.parse((ROOT / 'atari_hrvq/book.py').read_text()).body if isinstance(n, ast.ImportFrom) and n.level == 1]
    assert {n.module for n in top} <= {'core'}
    ppo = [n.module for n in ast.walk(ast.parse((ROOT / 'atari_hrvq/ppo.py').read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1]
    assert set(ppo) == {'core'}


def test_readme_snippets_run(tmp_path):
    for i, code in enumerate(re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)):
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f'snippet {i}: {done.stderr}'


def test_no_registry_and_no_machine_path():
    words = ('pypi.org', 'pythonhosted', '/opt/', '/work/', '/root/', 'npmjs')
    for p in [*ROOT.glob('*'), *(ROOT / 'nbs').glob('*.ipynb'), *(ROOT / 'atari_hrvq').glob('*.py'), *(ROOT / '.ci').glob('*')]:
        if p.is_file(): assert not [w for w in words if w in p.read_text(errors='ignore')], p


def test_ruff(): assert subprocess.run([BIN / 'ruff', 'check', '--select', 'E9,F63,F7,F82', 'atari_hrvq', 'tests'], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_runs(path, smoke):
    done = subprocess.run([BIN / 'nbdev_test', '--path', path, '--n_workers', '1'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
