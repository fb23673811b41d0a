"""Packaging: everything is read from settings.ini, the single source of truth (nbdev 2.x)."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(interpolation=None)
parser.read(here / 'settings.ini', encoding='utf8')
cfg = parser['DEFAULT']

nbdev = ['nbdev>=2.4,<3', 'execnb<0.2', 'fastcore<2', 'ghapi<2']
book = ['jupyterlab', 'ipykernel', 'papermill', 'nbclient', 'nbconvert', 'ipywidgets', 'anywidget', 'psutil']
docs = [*nbdev, *book, 'pyyaml', 'beautifulsoup4', 'latex2mathml', 'pygments']
hub, foundation, slurm = ['huggingface_hub'], ['transformers'], [*book, 'submitit']
dev = [*docs, *foundation, *slurm, 'pytest', 'hypothesis', 'ruff', 'vector-quantize-pytorch', 'playwright']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], long_description=(here / 'README.md').read_text(encoding='utf8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['atari_hrvq', 'atari_hrvq.*']), package_data={'atari_hrvq': ['py.typed', 'fonts/*']},
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={'book': book, 'docs': docs, 'dev': dev, 'hub': hub, 'foundation': foundation, 'slurm': slurm},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n')}, zip_safe=False,
)
