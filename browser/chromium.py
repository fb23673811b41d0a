"""Where a Chromium is; run as a program it prints the path, or one sentence if none can be had."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
PACKED = Path(__file__).resolve().parent / '.chromium'                            # where one from npm is kept
NONE = 'no Chromium: none is installed, and neither playwright nor npm could fetch one; install the package chromium, or set CHROMIUM to the path of the program'


def quietly(command, **kwargs):
    "Whether `command` ended well within five minutes."
    try: return subprocess.run(command, capture_output=True, timeout=300, **kwargs).returncode == 0
    except (OSError, subprocess.TimeoutExpired): return False


def from_npm(fetch):
    "Path of the program that npm's @sparticuz/chromium carries (Linux on x86-64), for machines that reach a package registry and nothing else; None if it is not there."
    path = PACKED / 'chromium'
    if fetch and not path.exists() and sys.platform == 'linux':
        PACKED.mkdir(exist_ok=True)
        unpack = "import c from '@sparticuz/chromium'; await c.executablePath()"
        if not (quietly(['npm', 'install', '--no-save', '--prefix', str(PACKED), '@sparticuz/chromium']) and quietly(['node', '--input-type=module', '-e', unpack], cwd=PACKED, env={**os.environ, 'TMPDIR': str(PACKED)})): shutil.rmtree(PACKED)         # no half of a program stays
    return str(path) if path.exists() else None


def find_chromium(fetch=True):
    "Path of the program: `CHROMIUM` if set, an installed one, or one that playwright or npm fetches; None if there is none."
    if os.environ.get('CHROMIUM'): return shutil.which(os.environ['CHROMIUM'])
    for name in NAMES:
        if path := shutil.which(name): return path
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: path = p.chromium.executable_path
    if fetch and not (Path(path).exists() or from_npm(False)): quietly([sys.executable, '-m', 'playwright', 'install', 'chromium'])
    return path if Path(path).exists() else from_npm(fetch)


if __name__ == '__main__':
    path = find_chromium()
    print(path or NONE, file=sys.stdout if path else sys.stderr)
    sys.exit(0 if path else 1)
