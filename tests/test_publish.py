"""publish: pages of a small book, by nbconvert and by a stand-in for Quarto; every page is checked, every mistake is one sentence."""
import hashlib
import json
import os
import re
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from atari_hrvq import claims, cli, publish as P
from atari_hrvq.core import BookError, write_atomic, write_json

v4 = nbformat.v4
DOT = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
MARK = '#' + '|'                                                     # the sign of a directive, which this file must not hold at the head of a line
CONFIG = """
project: {type: book, output-dir: _docs}
book:
  title: Small
  subtitle: a book
  chapters: [index.ipynb, 00_core.ipynb, {part: See, chapters: [01_frames.ipynb]}, references.qmd]
  appendices: [api.qmd]
  page-footer: {left: Apache-2.0}
"""
BIB = "@article{oe2019dots, title={{Dots}}, author={van Oe, J. and Wu, L. and Li, M.}, year={2019}, eprint={1901.00001}}\n"


def notebook(*cells): return v4.new_notebook(cells=list(cells), metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
def md(text, id): return v4.new_markdown_cell(text, id=id)
def code(text, id, outputs=(), tags=()): return v4.new_code_cell(text, id=id, outputs=list(outputs), metadata={'tags': list(tags)} if tags else {})
def show(**data): return v4.new_output('display_data', {k.replace('_', '/', 1): v for k, v in data.items()})


def frames(outputs=True, extra=''):
    done = lambda *o: o if outputs else ()
    widget = v4.new_output('display_data', {'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/html': '<b id="twin">twin</b>', 'text/plain': 'W'})
    return notebook(
        md('# Frames\n\n> What is seen.\n\nSee @oe2019dots, [@oe2019dots], @fig-dot and [the tools](00_core.ipynb#the-tools). `fit` trains: $a_t < b$.' + extra, 'title'),
        code(f'{MARK} default_exp frames', 'exp'), code(f'{MARK} export\nimport json', 'imports'),
        md('## The picture\n\nIt is dark. A dot is in the middle.', 'picture-md'),
        code(f'{MARK} label: fig-dot\n{MARK} fig-cap: "A dot, as @fig-dot has *it*."\nplot()', 'picture', done(show(image_png=DOT), v4.new_output('stream', name='stderr', text='noise'))),
        code('plot(again)', 'again', done(v4.new_output('execute_result', {'image/png': DOT}, execution_count=None))),
        code('run = "runs/smoke"', 'parameters', tags=['parameters']), code('# Parameters\nrun = "/some/machine/runs/mine"', 'injected', tags=['injected-parameters']),
        code('print(run)', 'where', done(v4.new_output('stream', name='stdout', text='/some/machine/runs/mine/x'))),
        code('widget', 'widget', done(widget)),
        code(f'{MARK} hide\nsecret = 1', 'hidden'),
        md('### Deeper\n\n$$\\sum_i x_i$$ {#eq-sum}\n\nSum is @eq-sum.\n\n::: {.callout-tip collapse="true" title="Solution"}\nForty-two.\n:::', 'deeper'))


def test_a_docstring_keeps_its_references_and_no_other_markup():
    def f(): "Pays @eq-foresight to me@example.org, *n* [D] times; `a*b` stays."
    assert P.docstring(f) == 'Pays @eq-foresight to me&#64;example.org, &#42;n&#42; &#91;D&#93; times; `a*b` stays.'


def test_imports_one_after_the_other_are_one_line_to_open(tmp_path):
    made = P.prepare(notebook(code(f'{MARK} export\nimport json', 'a'), code('import os', 'b'), md('Text', 'c'), code('import sys', 'd'), code('x = 1', 'e')), tmp_path)
    assert [(c['cell_type'], ''.join(c['source']).splitlines()[-2:]) for c in made['cells'] if c['id'] in 'bde'] == [('code', ['import json', 'import os']), ('code', ['#' + '| code-summary: "Imports"', 'import sys']), ('code', ['x = 1'])]
    assert [c['id'] for c in made['cells']] == ['b', 'c', 'd', 'e']


@pytest.fixture
def book(tmp_path):
    "`(root, run)` of a checkout with four pages and one finished stage."
    root, run = tmp_path / 'book', tmp_path / 'mine'
    for d in (root / 'nbs', run / 'notebooks'): d.mkdir(parents=True)
    (root / '_quarto.yml').write_text(CONFIG); (root / 'references.bib').write_text(BIB)
    nbformat.write(notebook(md('# Small\n\nThe [first](01_frames.ipynb#the-picture).', 'title'), code('1', 'one', [show(text_markdown='| where |\n|---|\n| 01_frames where |')])), root / 'nbs' / 'index.ipynb')
    nbformat.write(notebook(md('# Core\n\n## The tools', 'title'), code(f'{MARK} default_exp core', 'exp'), code(f'{MARK} export\ndef fit(): pass', 'fit')), root / 'nbs' / '00_core.ipynb')
    nbformat.write(frames(outputs=False), root / 'nbs' / '01_frames.ipynb')
    nbformat.write(frames(), run / 'notebooks' / '01_frames.ipynb')
    write_json(run / 'manifest.json', {'stages': {'01_frames': {'state': 'done'}}})
    return root, run


@pytest.fixture
def no_quarto(monkeypatch): monkeypatch.setattr(P.shutil, 'which', lambda name: None)


def hashes(folder): return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_pages_without_quarto(book, tmp_path, no_quarto, capsys, monkeypatch):
    root, run = book
    before = {**hashes(root / 'nbs'), **hashes(run)}
    out = P.publish(run, tmp_path / 'docs', root)
    assert P.NO_QUARTO in capsys.readouterr().err and {**hashes(root / 'nbs'), **hashes(run)} == before
    assert sorted(p.name for p in out.iterdir()) == sorted(['00_core.html', '01_frames.html', 'api.html', 'index.html', 'math.css', 'math.woff2', 'references.html', 'script.js', 'search.js', 'style.css'])
    page = (out / '01_frames.html').read_text()
    for absent in (MARK, ':::', 'default_exp', 'noise', '/some/machine', 'widget-view', 'secret', '@oe2019', '@fig', '@eq', '{#'): assert absent not in page, absent
    for present in ('<h1 id="frames">Frames</h1>', 'references.html#ref-oe2019dots">van Oe et al. (2019)</a>', '(<a href="references.html#ref-oe2019dots">van Oe et al. 2019</a>)',
                    '00_core.html#the-tools', 'api.html#core-fit"><code>fit</code></a>', '<math', 'alt="A dot, as Figure 1.1 has it."', 'id="fig-dot"', '<figcaption>Figure 1.1: A dot, as <a href="01_frames.html#fig-dot">Figure 1.1</a> has <em>it</em>.</figcaption>', '#fig-dot">Figure 1.1</a>',
                    'alt="Figure in the section on The picture. A dot is in the middle."', '<summary>Imports</summary>', '<summary>Parameters of the run</summary>', 'runs/mine/x',
                    '<b id="twin">twin</b>', '<summary>Solution</summary>', '#eq-sum">Equation 1.1</a>', 'rel="prev"', 'rel="next"', 'Apache-2.0', 'aria-current=page', 'id="at-where"',
                    '<div id="found" role="region" aria-label="Search results" aria-live="polite" hidden>'):
        assert present in page, present
    assert page.index('<summary>Solution</summary>') < page.index('Forty-two.') < page.index('</details>', page.index('Forty-two.'))
    assert '01_frames.html#at-where' in (out / 'index.html').read_text() and 'id="ref-oe2019dots"' in (out / 'references.html').read_text()
    assert 'id="core-require"' in (out / 'api.html').read_text() and 'Raise' in (out / 'api.html').read_text()
    words = json.loads((out / 'search.js').read_text().split('=', 1)[1])
    assert any(s['head'] == 'The picture' and s['url'] == '01_frames.html#the-picture' and 'dot' in s['text'] for s in words)
    kept = (tmp_path / '_proc' / '01_frames.ipynb').read_text()
    assert 'fig-alt' in kept and 'default_exp' not in kept and '"execute_result"' not in kept and (tmp_path / '_proc' / '_quarto.yml').read_bytes() == (root / '_quarto.yml').read_bytes()
    assert P.publish(run, out, root) == out                                     # again, over the pages of last time

    def stuck(self, to): raise OSError('full')
    with monkeypatch.context() as m:
        m.setattr(P.Path, 'rename', stuck)
        pages = hashes(out)
        with pytest.raises(OSError, match='full'): P.publish(run, out, root)
    assert hashes(out) == pages and not (tmp_path / '.docs.new').exists()


def change(path, old, new): path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize('damage, expected', [
    (lambda root, run: (run / 'notebooks' / '01_frames.ipynb').unlink(), 'is not finished, it lacks 01_frames: end it first'),
    (lambda root, run: write_json(run / 'manifest.json', {'stages': {'01_frames': {'state': 'failed'}}}), 'is not finished, it lacks 01_frames'),
    (lambda root, run: (run / 'manifest.json').unlink(), 'is not a run of the chain'),
    (lambda root, run: change(root / '_quarto.yml', '00_core.ipynb', '14_more.ipynb'), r'_quarto.yml lists 14_more.ipynb, which is not in nbs/'),
    (lambda root, run: change(root / '_quarto.yml', 'chapters: [index', 'chapters: [[index'), 'is not YAML'),
    (lambda root, run: (root / '_quarto.yml').unlink(), 'does not exist: publish from a checkout'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '[@oe2019dots]', '[@nn2020none]'), 'the citation @nn2020none is not in references.bib'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '@fig-dot', '@fig-none'), 'refers to @fig-none, and nothing carries that label'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '#the-tools', '#the-toys'), '1 problem, .*01_frames.html links to 00_core.html#the-toys, and 00_core.html has no such place'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '00_core.ipynb#the-tools', 'gone.html'), 'links to gone.html, which is not there'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '### Deeper', '##### Deeper'), 'a heading of level 5 follows one of level 2'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '":::"', '""'), 'is never closed'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '# Frames', 'Frames'), '0 headings of level 1'),
    (lambda root, run: change(run / 'notebooks' / '01_frames.ipynb', '$a_t < b$', '$\\\\frac$'), 'a formula cannot be read'),
    (lambda root, run: change(root / 'references.bib', '2019}', '2019'), 'a brace is not closed')])
def test_mistakes_are_one_sentence_and_the_old_pages_stay(damage, expected, book, tmp_path, no_quarto, capsys, monkeypatch):
    root, run = book
    monkeypatch.setattr(P, 'repo_root', lambda: root)
    out = tmp_path / 'docs'; out.mkdir(); (out / 'search.js').write_text('old')
    damage(root, run)
    assert cli.main(['publish', '--run', str(run), '--out', str(out)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('atari-hrvq: ') and re.search(expected, last), last
    assert [p.name for p in out.iterdir()] == ['search.js'] and not (tmp_path / '.docs.new').exists()


def test_a_folder_that_holds_something_else_is_left_alone(book, tmp_path, no_quarto):
    with pytest.raises(BookError, match='holds something that is no page set of this book'): P.publish(book[1], book[0], book[0])
    assert (book[0] / 'nbs' / 'index.ipynb').exists()


def test_a_project_folder_that_holds_something_else_is_left_alone(book, tmp_path, no_quarto):
    (tmp_path / '_proc').mkdir(); (tmp_path / '_proc' / 'thesis.txt').write_text('years of work')
    with pytest.raises(BookError, match='_proc, where the Quarto project goes, holds something that is none'): P.publish(book[1], tmp_path / 'docs', book[0])
    assert (tmp_path / '_proc' / 'thesis.txt').exists() and not (tmp_path / 'docs').exists()
    (tmp_path / '_proc' / 'thesis.txt').unlink()
    P.publish(book[1], tmp_path / 'docs', book[0])


def pages_of(folder): return {p.name: p.read_text() for p in folder.iterdir()}


def test_pages_are_put_in_place_whole_or_not_at_all(tmp_path, monkeypatch):
    out, fresh, aside = tmp_path / 'docs', tmp_path / '.docs.new', tmp_path / '.docs.old'
    def make(folder, text): folder.mkdir(); (folder / 'a.html').write_text(text)
    make(out, 'old'); make(fresh, 'new')
    moved = P.Path.rename
    def stuck(self, to):
        if self == fresh: raise OSError('full')
        return moved(self, to)
    with monkeypatch.context() as m:
        m.setattr(P.Path, 'rename', stuck)
        with pytest.raises(OSError, match='full'): P.put_in_place(fresh, out)
    assert pages_of(out) == {'a.html': 'old'} and pages_of(fresh) == {'a.html': 'new'}
    with monkeypatch.context() as m:                                            # the old pages cannot be taken away
        m.setattr(P.shutil, 'rmtree', lambda *_, **__: None)
        P.put_in_place(fresh, out)
    assert pages_of(out) == {'a.html': 'new'} and pages_of(aside) == {'a.html': 'old'}
    make(fresh, 'newer'); P.put_in_place(fresh, out)
    assert pages_of(out) == {'a.html': 'newer'} and not aside.exists() and not fresh.exists()
    out.rename(aside); make(fresh, 'newest')                                     # a stop between the two renames
    with monkeypatch.context() as m:
        m.setattr(P.Path, 'rename', stuck)
        with pytest.raises(OSError, match='full'): P.put_in_place(fresh, out)
    assert pages_of(out) == {'a.html': 'newer'}


def contrast(one, other):
    "The contrast of two colours #rrggbb as WCAG counts it."
    def light(c):
        parts = [int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (x / 12.92 if x <= .03928 else ((x + .055) / 1.055) ** 2.4) for w, x in zip((.2126, .7152, .0722), parts, strict=True))
    a, b = sorted((light(one), light(other)))
    return (b + .05) / (a + .05)


def test_code_and_text_can_be_read_on_light_and_dark(book, tmp_path, no_quarto):
    style = (P.publish(book[1], tmp_path / 'docs', book[0]) / 'style.css').read_text()
    assert round(contrast('#000000', '#ffffff'), 2) == 21 and not re.search(r'summary \{[^}]*opacity', style)
    seen = {}
    for theme, head, at in (('light', '', r':root \{'), ('dark', ':root[data-theme=dark] ', r':root\[data-theme=dark\] \{')):
        colour = dict(re.findall(r'--(\w+): (#\w+)', re.search(at + r'(.*?)\}', style)[1]))
        panel = colour['panel'] if len(colour['panel']) == 7 else '#' + ''.join(2 * c for c in colour['panel'][1:])
        seen[theme] = dict(re.findall(rf'^{re.escape(head)}\.highlight \.(\w+) \{{ ?([^}}]*)', style, re.M))
        for name, rule in {**seen[theme], 'text': f'color: {colour["text"]}', 'soft': f'color: {colour["soft"]}', 'link': f'color: {colour["link"]}'}.items():
            ink, paper = re.search(r'(?<!-)color: (#\w{6})', rule), re.search(r'background-color: (#\w{6})', rule)
            if ink and name != 'w': assert contrast(ink[1], paper[1] if paper else panel) >= 4.5, (theme, name, rule)
    assert 'k' in seen['light'] and set(seen['light']) <= set(seen['dark'])


def test_changed_chapters_are_named(book, tmp_path, no_quarto, capsys):
    change(book[0] / 'nbs' / '01_frames.ipynb', 'plot(again)', 'plot(more)')
    P.publish(book[1], tmp_path / 'docs', book[0])
    assert 'the code of 01_frames has changed since it ran' in capsys.readouterr().err


# ------------------------------------------------------------------ with (a stand-in for) Quarto

QUARTO = """#!/bin/sh
test "$1 $2 $3 $4" = 'render . --to html' && test -f _quarto.yml || exit 9
mkdir -p _docs
for p in index 00_core 01_frames references api; do echo "<main><h1 id=top>$p</h1></main>" > _docs/$p.html; done
{more}
"""


@pytest.mark.parametrize('more, expected', [
    ('', None), ('echo "WARN: unable to resolve"', 'quarto gave 1 warnings, the first: WARN: unable to resolve'), ('echo "ERROR: no engine"; exit 1', 'quarto could not render the pages: ERROR: no engine'),
    ('rm _docs/api.html', '1 problem, .*api.html is missing')], ids=['well', 'warning', 'error', 'page-missing'])
def test_quarto(more, expected, book, tmp_path, monkeypatch, capsys):
    (tmp_path / 'bin').mkdir(); (tmp_path / 'bin' / 'quarto').write_text(QUARTO.format(more=more)); (tmp_path / 'bin' / 'quarto').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}')
    if expected:
        with pytest.raises(BookError, match=expected): P.publish(book[1], tmp_path / 'docs', book[0])
    else:
        out = P.publish(book[1], tmp_path / 'docs2', book[0])
        assert '01_frames' in (out / '01_frames.html').read_text() and P.NO_QUARTO not in capsys.readouterr().err
        assert (tmp_path / '_proc' / 'references.qmd').read_text().startswith('---\nnocite:')


# ------------------------------------------------------------------ the checks, one by one

def page(body, head='<h1 id="a">A</h1>'): return f'<html><body><main>{head}{body}</main></body></html>'


@pytest.mark.parametrize('body, expected', [
    ('<a href="#a">up</a><a href="https://example.org/x">out</a><a href="sub/b.html#b">b</a><a href="#">top</a>', None),
    ('<a href="b.html">b</a>', 'links to b.html, which is not there'), ('<a href="sub/b.html#c">b</a>', 'and sub/b.html has no such place'), ('<a href="../x.html">x</a>', 'links out of the book'),
    ('<img src="gone.png" alt="x">', 'links to gone.png, which is not there'), ('<img src="data:," alt=" ">', 'a picture has no alternative text'),
    ('<h4>deep</h4>', 'a heading of level 4 follows one of level 1'), ('<h1>B</h1>', '2 headings of level 1'), ('<p id="a">twice</p>', 'the identifier a stands twice'),
    (f'<pre><span>{MARK}</span> export</pre>', 'shows a directive'), ('<p>::: box</p>', 'shows a raw box mark'), ('<pre>x = "' + ':::"</pre>', None), ('<script src="x.js"></script>', 'links to x.js, which is not there')])
def test_checks(body, expected, tmp_path):
    (tmp_path / 'sub').mkdir(); (tmp_path / 'sub' / 'b.html').write_text('<p id="b">b</p>'); (tmp_path / 'a.html').write_text(page(body))
    found = P.check_pages(tmp_path, [P.Page('a.ipynb', '')])
    assert len(found) == bool(expected) and (not expected or expected in found[0]), found


def test_weight(tmp_path):
    (tmp_path / 'a.html').write_text(page('x' * 20_000))
    assert P.check_pages(tmp_path, [], limit_mb=.01) == ['the pages weigh 0.0 MB, at most 0.01 are wanted']


def test_the_configuration_of_this_book():
    config = P.book_config(ROOT)
    pages = P.listed_pages(config)
    assert pages[0].file == 'index.ipynb' and {'api.qmd', 'references.qmd'} <= {p.file for p in pages} and {'A1_foundation.ipynb', 'A2_ablations.ipynb'} <= {p.file for p in pages if p.part == 'Appendices'}
    assert config['project']['output-dir'] == '_docs' and set(config['format']['html']['theme']) == {'light', 'dark'} and config['execute'] == {'enabled': False}
    entries = P.read_bib((ROOT / 'references.bib').read_text())
    assert len(entries) > 40 and all({'title', 'author', 'year'} <= set(e) and not re.search(r'[{}\\]', ' '.join(e.values())) for e in entries.values())


@pytest.mark.parametrize('entry, year, link', [
    ('year = 2019, url={www.oe.org/a}', '2019', '<a href="https://www.oe.org/a">www.oe.org/a</a>'), ('year={2019}, url={https://oe.org/?a=1&b="2"}', '2019', '<a href="https://oe.org/?a=1&amp;b=&quot;2&quot;">oe.org/?a=1&amp;b=&quot;2&quot;</a>'),
    ('doi={10.1/x}', 'no year', '<a href="https://doi.org/10.1/x">doi.org/10.1/x</a>'), ('month = 5,\n  year=2019\n', '2019', '')])
def test_bibtex_as_others_write_it(entry, year, link):
    entries = P.read_bib(f'@misc{{oe2019x,\n title={{year = 3, {{A}}}}, author={{Oe, J}}, {entry}}}\n@misc{{b2020y, title={{B}}}}\n')
    assert list(entries) == ['oe2019x', 'b2020y'] and entries['oe2019x']['title'] == 'year = 3, A'
    first = next(line for line in P.bibliography(entries).splitlines() if 'ref-oe2019x' in line)
    assert f'J Oe ({year}). <em>' in first and (link in first if link else '<a' not in first)
    assert P.cite('@oe2019x [@oe2019x]', entries) == f'[Oe ({year})](references.qmd#ref-oe2019x) ([Oe {year}](references.qmd#ref-oe2019x))'


@pytest.mark.parametrize('field', ['title = "A"', 'year = 2019a', 'journal = tmlr', 'nothing'])
def test_bibtex_that_is_not_read_is_named(field):
    with pytest.raises(BookError, match=r'references.bib: oe2019x cannot be read from "(title|a|journal|nothing).*" on'): P.read_bib(f'@misc{{oe2019x, author={{Oe, J}}, {field}, url={{x}}}}')


# ------------------------------------------------------------------ the results table

def test_claims_into_a_file(tmp_path, capsys):
    write_json(tmp_path / 'claims.json', [{'id': 'E1', 'claim': 'it dreams', 'original': 'yes', 'ours': .5, 'interval': [.4, .6], 'null': .1, 'verdict': 'reproduced', 'profile': 'overnight', 'seeds': 1, 'frames': 9, 'chapter': '08_dream', 'cell': None}])
    write_json(tmp_path / 'run.json', {'profile': 'laptop', 'games': ['pong'], 'seed': 3})
    readme = tmp_path / 'R.md'
    readme.write_text(f'before\n{P.MARKERS[0]}\nold\n{P.MARKERS[1]}\nafter\n')
    for _ in range(2): assert cli.main(['claims', str(tmp_path), '--into', str(readme)]) == 0
    text = readme.read_text()
    assert '| it dreams | yes | 0.5 (0.4 to 0.6) | 0.1 | reproduced | overnight |' in text and 'profile `laptop`, games pong, seed 3' in text and 'old' not in text and text.startswith('before\n') and text.endswith('after\n')
    assert cli.main(['claims', str(tmp_path), '--markdown']) == 0 and '| it dreams |' in capsys.readouterr().out
    for arguments, expected in ((['--into', str(tmp_path / 'none.md')], 'does not exist'), (['--into', str(tmp_path / 'run.json')], 'does not hold the lines'), (['--json', '--markdown'], 'give one of')):
        assert cli.main(['claims', str(tmp_path), *arguments]) == 2 and expected in capsys.readouterr().err


def test_goals_by_the_longest_run(tmp_path, capsys):
    "The larger budget speaks, a run on fewer games does not, and the shipped agent is judged by its own scores beside random play and PPO."
    def made(folder, profile, games, *rows):
        write_json(folder / 'run.json', {'profile': profile, 'games': games, 'seed': 0})
        write_atomic(folder / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in rows))
    ratio = lambda value: {'chapter': '02_encoder', 'name': 'temporal_ratio', 'value': value, 'lo': value, 'hi': value, 'null': .5}
    of = lambda goals, words: next(r for r in goals if r['goal'].startswith(words))
    made(tmp_path / 'run', 'laptop', ['pong', 'breakout'], ratio(.3))
    made(tmp_path / 'kept' / 'one', 'gpu', ['pong'], ratio(.1))                                                        # on one game of two: it does not speak
    row = of(claims.goals_met(tmp_path / 'run', tmp_path / 'kept'), 'temporal ratio')
    assert (row['reached'], row['verdict'], row['profile']) == (.3, 'missed', 'laptop')
    made(tmp_path / 'kept' / 'two', 'overnight', ['pong', 'breakout'], ratio(.2), {'chapter': '09_ppo', 'name': 'model_free_score_long', 'game': 'pong', 'value': 10., 'lo': 9., 'hi': 11.})
    row = of(claims.goals_met(tmp_path / 'run', tmp_path / 'kept'), 'temporal ratio')
    assert (row['reached'], row['verdict'], row['profile']) == (.2, 'reached', 'overnight')
    assert of(claims.goals_met(tmp_path / 'run', tmp_path / 'kept'), 'Pong, the shipped')['verdict'] == 'not measured'
    made(tmp_path / 'kept' / 'three-games', 'overnight', ['pong', 'breakout', 'ms_pacman'])
    write_json(tmp_path / 'kept' / 'three-games' / 'scores.json', {'pong': {'mean': 20., 'lo': 19.8, 'hi': 20.2, 'random': -20., 'random hi': -19.}})
    goals = claims.goals_met(tmp_path / 'run', tmp_path / 'kept')
    assert of(goals, 'Pong, the shipped')['verdict'] == 'reached on average' and of(goals, 'Breakout, the shipped')['verdict'] == 'not measured'
    rows = {r['name']: r for r in claims.shipped_rows(tmp_path / 'kept')}
    assert rows['shipped_above_random_play']['lo'] == 19.8 + 19 and abs(rows['shipped_above_model_free_PPO']['lo'] - 8.8) < 1e-9
    assert 'shipped_human_normalised' not in rows                                                                      # one game is no mean of three
    write_json(tmp_path / 'kept' / 'three-games' / 'scores.json', {g: {'mean': 1.5 * human - .5 * none, 'lo': human, 'hi': 2 * human - none, 'random': none, 'random hi': none} for g, human, none in (('pong', 14.6, -20.7), ('breakout', 30.5, 1.7), ('ms_pacman', 6951.6, 307.3))})
    row = of(claims.goals_met(tmp_path / 'run', tmp_path / 'kept'), 'human-normalised score of the shipped')
    assert np.allclose([row['reached'], *row['interval'], row['null']], [1.5, 1., 2., 0.]) and row['verdict'] == 'missed'
    assert cli.main(['claims', str(tmp_path / 'run'), '--goals']) == 0 and 'temporal ratio of the embeddings' in capsys.readouterr().out


def test_what_stands_beside_the_book():
    import yaml
    from configparser import ConfigParser
    settings = ConfigParser(interpolation=None); settings.read(ROOT / 'settings.ini')
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert cited['version'] == settings['DEFAULT']['version'] and cited['license'] == 'Apache-2.0' and (ROOT / 'atari_hrvq' / 'py.typed').exists()
    for name in ('test', 'publish'): assert yaml.safe_load((ROOT / '.github' / 'workflows' / f'{name}.yml').read_text())['jobs']
    readme = (ROOT / 'README.md').read_text()
    assert all(m in readme for m in P.MARKERS)
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', readme + (ROOT / 'CONTRIBUTING.md').read_text()): assert (ROOT / target).exists(), target


def test_what_a_run_did_not_make_is_said_in_words():
    def books(*labels):
        made = [code(f'{MARK} label: {x}\n{MARK} {x[:3]}-cap: "See @fig-gone."\nplot()', x) for x in labels]
        return {'01_frames': notebook(md('See @fig-gone and @tbl-gone, @fig-kept, @eq-none and a@fig-gone.', 'said'), *made)}
    kept = books('fig-kept')
    P.say_undrawn(kept, books('fig-kept', 'fig-gone', 'tbl-gone'))
    assert [''.join(c['source']) for c in kept['01_frames']['cells']] == [
        'See a figure that this run did not draw and a table that this run did not make, @fig-kept, @eq-none and a@fig-gone.',
        f'{MARK} label: fig-kept\n{MARK} fig-cap: "See a figure that this run did not draw."\nplot()']
