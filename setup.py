"""Packaging: everything is read from settings.ini, the single source of truth (nbdev 2.x)."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(interpolation=None)
parser.read(here / 'settings.ini', encoding='utf8')
cfg = parser['DEFAULT']

book = ['jupyterlab', 'ipykernel', 'papermill', 'nbclient', 'nbconvert', 'ipywidgets', 'anywidget', 'psutil']
dev = ['nbdev>=2.4,<3', 'execnb<0.2', 'fastcore<2', 'ghapi<2', 'pytest', 'hypothesis', 'ruff', 'vector-quantize-pytorch', 'transformers', 'playwright', *book]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], long_description=(here / 'README.md').read_text(encoding='utf8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['atari_hrvq', 'atari_hrvq.*']), include_package_data=True,
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={'book': book, 'dev': dev, 'hub': ['huggingface_hub'], 'foundation': ['transformers']},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n')}, zip_safe=False,
)
