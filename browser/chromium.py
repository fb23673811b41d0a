"""Where a Chromium is; run as a program it prints the path, or one sentence if none can be had."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
NONE = 'no Chromium: none is installed and playwright could not fetch one; install the package chromium, or set CHROMIUM to the path of the program'


def find_chromium(fetch=True):
    "Path of the program: `CHROMIUM` if set, an installed one, or the one that playwright fetches; None if there is none."
    if os.environ.get('CHROMIUM'): return shutil.which(os.environ['CHROMIUM'])
    for name in NAMES:
        if path := shutil.which(name): return path
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: path = p.chromium.executable_path
    if fetch and not Path(path).exists():
        try: subprocess.run([sys.executable, '-m', 'playwright', 'install', 'chromium'], capture_output=True, timeout=300)
        except subprocess.TimeoutExpired: pass
    return path if Path(path).exists() else None


if __name__ == '__main__':
    path = find_chromium()
    print(path or NONE, file=sys.stdout if path else sys.stderr)
    sys.exit(0 if path else 1)
