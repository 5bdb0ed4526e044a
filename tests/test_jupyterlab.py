"""Opt-in: opens every notebook in JupyterLab, in a real browser, and runs all its cells as a person would.

    MMEARTH_LAB=1 .venv/bin/python -m pytest -q tests/test_jupyterlab.py

needs `pip install playwright` and a Chromium (Debian: apt install chromium); MMEARTH_LAB_SHOTS names a folder for the screenshots.
Notebooks are opened in a copy of the tree, because JupyterLab saves what it runs.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
import pytest
from mmearth.named import repo_root

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if os.environ.get('MMEARTH_LAB') != '1': pytest.skip('opt-in: set MMEARTH_LAB=1 to run every notebook in JupyterLab', allow_module_level=True)
if not CHROMIUM: pytest.skip('no chromium on the path', allow_module_level=True)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')

ROOT = repo_root()
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
SECONDS = 300  # for one notebook
SETTINGS = {  # no news from the network, and every cell in the page, not only those in sight
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    'notebook-extension/tracker': dict(windowingMode='none'),
}
PANEL = 'window.jupyterapp.shell.currentWidget'
READY = f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"
OUTCOME = f"""() => {{
  const cells = {PANEL}.content.model.sharedModel.toJSON().cells.filter(c => c.cell_type === 'code' && String(c.source).trim());
  const errors = cells.flatMap(c => c.outputs.filter(o => o.output_type === 'error').map(o => `${{c.id}}: ${{o.ename}}: ${{o.evalue}}`));
  return {{ errors, done: {READY} && (errors.length > 0 || cells.every(c => c.execution_count !== null)) }};
}}"""


def answers(url, **kw):
    "The JSON that the server gives, None while it is not up."
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **kw), timeout=5) as r: return json.load(r) if r.status == 200 else True
    except OSError: return None


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab on a copy of the tree, with settings of its own."
    home, tree = tmp_path_factory.mktemp('jupyter'), tmp_path_factory.mktemp('tree') / 'mmearth'
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns('.git', '.venv', '__pycache__', '.ipynb_checkpoints', 'work', '*.egg-info'))
    for name, values in SETTINGS.items():
        path = home / f'settings/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = dict(JUPYTER_CONFIG_DIR=home / 'config', JUPYTER_RUNTIME_DIR=home / 'runtime', JUPYTERLAB_SETTINGS_DIR=home / 'settings',
               JUPYTERLAB_WORKSPACES_DIR=home / 'workspaces', IPYTHONDIR=home / 'ipython', OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--allow-root',
               '--IdentityProvider.token=', '--ServerApp.password=', '--ServerApp.disable_check_xsrf=True', f'--ServerApp.root_dir={tree}', '--expose-app-in-browser']
    with (home / 'log').open('w') as log:
        server = subprocess.Popen(command, cwd=tree, env=os.environ | {k: str(v) for k, v in own.items()}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            if answers(f'{url}/api/status') or server.poll() is not None: break
            time.sleep(0.5)
        assert server.poll() is None, (home / 'log').read_text()[-2000:]
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
            '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield chromium
        chromium.close()


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_run_all_cells(lab, browser, notebook, tmp_path):
    shots = Path(os.environ.get('MMEARTH_LAB_SHOTS') or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport=dict(width=1300, height=900))
    broken = []
    page.on('pageerror', lambda e: broken.append(str(e)))
    try:
        page.goto(f'{lab}/lab/tree/{notebook}?reset', timeout=60_000)
        page.wait_for_function(READY, timeout=60_000)
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        end = time.monotonic() + SECONDS
        while not (outcome := page.evaluate(OUTCOME))['done'] and time.monotonic() < end: page.wait_for_timeout(250)
        pictures = page.locator('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-RenderedImage')
        if pictures.count(): pictures.last.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        page.screenshot(path=shots / f'{notebook.replace("/", "-").removesuffix(".ipynb")}.png')
        assert outcome['errors'] == []
        assert outcome['done'], f'not finished after {SECONDS} s'
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        assert broken == []
    finally:
        page.close()
        for session in answers(f'{lab}/api/sessions') or (): answers(f'{lab}/api/sessions/{session["id"]}', method='DELETE')
