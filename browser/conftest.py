"""A real browser, a page exported from the executed chapter, and a table of what was measured."""
import json
import os
import sys
from pathlib import Path
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUN = ROOT / os.environ.get('EXPLORE_RUN', 'runs/smoke')
SHOTS = HERE / 'shots'
sys.path.insert(0, str(HERE))
from chromium import FLAGS, NONE, find_chromium

MEASURED = {}


def pytest_terminal_summary(terminalreporter):
    if not MEASURED: return
    lines = [f'{k:<58} {v}' for k, v in MEASURED.items()]
    terminalreporter.write_sep('-', 'measured'); terminalreporter.write_line('\n'.join(lines))
    SHOTS.mkdir(exist_ok=True); (SHOTS / 'measured.txt').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='session')
def measured(): return MEASURED


@pytest.fixture(scope='session')
def chrome():
    path = find_chromium()
    if not path: pytest.exit(NONE, 1)
    from playwright.sync_api import sync_playwright
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    "A page that lets no request out (but to `allowed`), and remembers those that were tried and what the console complained about."
    def __init__(self, browser, scheme='light', allowed=None, size=(1040, 900)):
        self.context = browser.new_context(color_scheme=scheme, viewport={'width': size[0], 'height': size[1]})
        self.tried, self.errors, self.allowed = [], [], allowed
        self.context.route(lambda url: not self.inside(url), lambda route: route.abort())
        self.page = self.context.new_page()
        self.page.on('request', lambda r: None if self.inside(r.url) else self.tried.append(r.url))
        self.page.on('console', lambda m: self.errors.append(m.text) if m.type in ('error', 'warning') else None)
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))

    def inside(self, url): return url.startswith(('file:', 'data:', 'blob:', 'about:')) or bool(self.allowed and url.startswith(self.allowed))

    def pixels(self, at): return at.evaluate('c => c.toDataURL()')

    def quiet(self): assert not self.tried and not self.errors, (self.tried, self.errors)


@pytest.fixture
def tab(chrome):
    tabs = []
    def open_tab(*args, **kwargs):
        tabs.append(Tab(chrome, *args, **kwargs))
        return tabs[-1]
    yield open_tab
    for t in tabs: t.context.close()


@pytest.fixture(scope='session')
def chapter(tmp_path_factory):
    "The executed chapter as one HTML file."
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config
    source = RUN / 'notebooks' / '90_explore.ipynb'
    if not source.exists(): pytest.exit(f'{source} is missing: make test-browser runs the smoke chain first', 1)
    config = Config({'NbConvertBase': {'display_data_priority': ['text/html', 'text/markdown', 'image/png', 'text/plain']}})
    book = nbformat.read(source, 4); book.metadata.pop('widgets', None)
    body, _ = HTMLExporter(template_name='basic', config=config).from_notebook_node(book)
    from atari_hrvq.explore import PAGE
    path = tmp_path_factory.mktemp('page') / 'chapter.html'
    path.write_text(PAGE.format(title='90_explore', body=body))
    return path


@pytest.fixture(scope='session')
def explorer_file(tmp_path_factory):
    "All widgets of the run as `explorer_page` writes them."
    from atari_hrvq.explore import explorer_page
    path = tmp_path_factory.mktemp('page') / 'explorer.html'
    explorer_page(RUN, path)
    return path
