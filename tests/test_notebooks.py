"""notebooks and package: in sync, clean, one parameters cell, imports one way, cells that metrics name exist, small outputs, every chapter runs."""
import ast
import filecmp
import json
import re
import subprocess
import sys
import pytest
import torch
from conftest import BIN, ENV, ROOT, copy_book
from atari_hrvq.book import STAGES, module_closure, package_imports
from atari_hrvq.publish import cell_options

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
PAGES = ['A3_tried', 'index', 'notation']                                     # export nothing and set no exercises
CHAPTERS = [p for p in NOTEBOOKS if p.stem not in PAGES]
STAGE_NOTEBOOKS = [p for p in CHAPTERS if '01' <= p.stem[:2] <= '12' or p.stem.startswith('A')]
by_name = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def cells(path): return json.loads(path.read_text())['cells']
def source(cell): return ''.join(cell['source'])
def code(path): return [c for c in cells(path) if c['cell_type'] == 'code']
def solutions(path):
    "Every block of Python inside a <details> of the notebook."
    hidden = re.findall(r'<details>.*?</details>', '\n\n'.join(source(c) for c in cells(path) if c['cell_type'] == 'markdown'), re.S)
    return [block for d in hidden for block in re.findall(r'```python\n(.*?)```', d, re.S)]


def test_in_sync_and_clean(tmp_path):
    book = copy_book(tmp_path / 'book')
    for p in (book / 'atari_hrvq').glob('*.py'):
        if p.name != '__init__.py': p.unlink()                               # a module that no notebook exports shows
    for tool in ('nbdev_export', 'nbdev_clean'):
        env = {k: v for k, v in ENV.items() if k != 'IN_TEST'}
        done = subprocess.run([BIN / tool], cwd=book, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for folder in ('nbs', 'atari_hrvq'):
        here, there = ({p.name for p in (r / folder).iterdir() if p.is_file() and not p.name.startswith('.')} for r in (ROOT, book))
        assert here == there, f'{folder}: {here ^ there} only on one side after nbdev_export and nbdev_clean'
        _, wrong, failed = filecmp.cmpfiles(ROOT / folder, book / folder, sorted(here), shallow=False)
        assert not wrong and not failed, f'{folder}: {wrong + failed} change under nbdev_export and nbdev_clean'


@pytest.mark.parametrize('path', STAGE_NOTEBOOKS, ids=lambda p: p.stem)
def test_one_parameters_cell(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(source(tagged[0])).body}
    assert values == {'run': 'runs/smoke', 'profile': 'smoke', 'games': ['pong', 'breakout', 'ms_pacman'], 'seed': 0, 'start': 'scratch'}


def test_every_stage_of_the_chain_is_a_notebook():
    assert [p.stem[:2] for p in CHAPTERS] == [*(f'{i:02d}' for i in range(15)), '90', '91', '92', '93', 'A1', 'A2'] and [p.stem for p in NOTEBOOKS[-3:]] == PAGES
    assert {p.stem for p in STAGE_NOTEBOOKS} <= {s.name for s in STAGES} <= {p.stem for p in CHAPTERS}


@by_name
def test_ids_are_unique_and_one_title(path):
    ids = [c['id'] for c in cells(path)]
    assert len(ids) == len(set(ids))
    text = re.sub(r'```.*?```', '', '\n\n'.join(source(c) for c in cells(path) if c['cell_type'] == 'markdown'), flags=re.S)
    assert len(re.findall(r'^# \S', text, re.M)) == 1


@by_name
def test_cells_are_short_and_the_first_is_prose(path):
    lengths = sorted(len(source(c).splitlines()) for c in code(path))
    assert lengths[len(lengths) // 2] < 15 and cells(path)[0]['cell_type'] == 'markdown'


@by_name
def test_outputs_are_small_and_hold_no_errors(path):
    outputs = [o for c in code(path) for o in c['outputs']]
    assert len(json.dumps(outputs)) < 200_000 and not [o for o in outputs if o['output_type'] == 'error']


@by_name
def test_cells_that_metrics_name_exist(path):
    ids, named = {c['id'] for c in cells(path)}, set()
    for c in code(path):
        for node in ast.walk(ast.parse(source(c))):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'metric':
                named |= {k.value.value for k in node.keywords if k.arg == 'cell' and isinstance(k.value, ast.Constant)}
    assert named <= ids, f'{path.name} has no cells {named - ids}'


def test_imports_run_one_way():
    module = {p.stem: p.stem.split('_', 1)[1] for p in CHAPTERS}
    number = {m: n[:2] for n, m in module.items()}
    for path in CHAPTERS:
        used = set().union(*(package_imports(source(c)) for c in code(path)))
        exported = ROOT / 'atari_hrvq' / f'{module[path.stem]}.py'
        used |= package_imports(exported.read_text())
        wrong = {m for m in used if number[m] > number[module[path.stem]]}
        assert not wrong, f'{path.stem} imports the later {wrong}'
        assert path.stem[0] == '9' or 'explore' not in used               # what is explored does not enter the keys of stages
    assert set(module_closure({'ppo'})) <= {'core', 'frames', 'ppo'}, 'ppo must not need the world model'


@pytest.mark.parametrize('snippet', re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S), ids=lambda s: s.splitlines()[-1][:24])
def test_readme_snippet_runs(snippet):
    done = subprocess.run([sys.executable, '-c', snippet], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('snippet', [pytest.param(s, id=f'{p.stem}-{i}') for p in NOTEBOOKS for i, s in enumerate(solutions(p), 1)])
def test_solution_runs(snippet):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: exec(compile(snippet, 'solution', 'exec'), {'__name__': 'solution'})
    finally: torch.set_num_threads(before)


@by_name
def test_every_chapter_has_solutions_and_none_is_overlooked(path):
    text = '\n\n'.join(source(c) for c in cells(path))
    assert bool(solutions(path)) == (path in CHAPTERS) and len(solutions(path)) == text.count('```python\n')


def test_no_registry_and_no_machine_path():
    words = ('pypi.org', 'pythonhosted', '/opt/', '/work/', '/root/', 'npmjs')
    for p in [*ROOT.glob('*'), *NOTEBOOKS, *(ROOT / 'atari_hrvq').glob('*.py'), *(ROOT / '.ci').glob('*')]:
        if p.is_file(): assert not [w for w in words if w in p.read_text(errors='ignore')], p


def test_exported_modules_are_sound():
    done = subprocess.run([BIN / 'ruff', 'check', '--no-cache', '--select', 'E9,F63,F7,F82', 'atari_hrvq', 'tests'], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_notebook_is_in_the_published_book():
    listed = re.findall(r'^\s*- (\S+\.ipynb)$', (ROOT / '_quarto.yml').read_text(), re.M)
    assert sorted(listed) == [p.name for p in NOTEBOOKS]


def test_chapters_through_nbdev_test(chapters):
    book, exit_code, output = chapters
    assert exit_code == 0, output[-4000:]


def test_chapters_give_the_same_metrics_as_the_chain(chapters, smoke):
    "The same seed on the same machine, once by nbdev_test and once by papermill: the same bytes."
    mine, theirs = (({p.name: p.read_text() for p in (run / 'metrics').glob('*.jsonl')}) for run in (chapters[0] / 'runs' / 'smoke', smoke))
    assert {'01_frames.jsonl', '06_moe.jsonl', '09_ppo.jsonl'} <= set(mine) and mine == {name: theirs[name] for name in mine}


def test_labels_are_unique_have_captions_and_are_referred_to_by_name():
    labels, referred = [], set()
    for path in NOTEBOOKS:
        for c in cells(path):
            if c['cell_type'] == 'code':
                options, _ = cell_options(source(c))
                if 'label' not in options: continue
                kind = options['label'].split('-')[0]
                assert kind in ('fig', 'tbl') and options[f'{kind}-cap'].endswith('.'), f'{path.name} {c["id"]}: {options}'
                labels.append(options['label'])
            else:
                labels += re.findall(r'\$\$ \{#(eq-[\w-]+)\}$', source(c), re.M)
                referred |= set(re.findall(r'(?<![\w.`])@((?:fig|tbl|eq)-[\w-]*\w)', source(c)))
    assert len(labels) == len(set(labels)) > 100 and referred <= set(labels), referred - set(labels)
