"Runs, kept folders and the table of runs: the promises of 40_report that a lesson does not show."
import json
from contextlib import chdir
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from mmearth import report


@pytest.fixture
def repo(tmp_path):
    (tmp_path / 'data_manifest').mkdir()
    (tmp_path / 'nbs' / 'runs').mkdir(parents=True)
    with chdir(tmp_path): yield tmp_path


def write(repo, name, parameters, body, tags=('parameters',)):
    v4 = nbformat.v4
    cells = [v4.new_code_cell(parameters, id='parameters', metadata=dict(tags=list(tags))), v4.new_code_cell(body, id='body')]
    spec = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(v4.new_notebook(cells=cells, metadata=spec), repo / 'nbs' / 'runs' / f'{name}.ipynb')


KEEP = '''
import json, os, warnings
from pathlib import Path
folder = next(p for p in Path.cwd().parents if (p / 'data_manifest').is_dir()) / out
(folder / 'metrics.json').write_text(json.dumps(dict(steps=steps)))
warnings.warn('from ' + os.getcwd())
print(folder)
folder'''


def test_run_keeps_no_machine_path_and_no_clock(repo):
    write(repo, 'good', 'steps = 3\nroot = ""\nout = ""', KEEP)
    folder = report.run_notebook('good', 'a', quiet=True, root=repo.parent / 'elsewhere' / 'tiles')
    assert folder == repo / 'reports' / 'runs' / 'a'
    for name in ('run.ipynb', 'params.json'): assert str(repo.parent) not in (folder / name).read_text()
    nb = nbformat.read(folder / 'run.ipynb', as_version=4)
    nbformat.validate(nb)
    assert [c.id for c in nb.cells] == ['parameters', 'injected', 'body']
    assert 'papermill' not in json.dumps(nb)
    params = json.loads((folder / 'params.json').read_text())
    assert params == dict(steps=3, root='../elsewhere/tiles', out='reports/runs/a')
    env = json.loads((folder / 'env.json').read_text())
    assert env['notebook'] == 'good' and env['seconds'] > 0 and env['peak_memory_mb'] > 0 and len(env['notebook_hash']) == 64
    assert not any(isinstance(v, str) and v.startswith('/') for v in env.values())


def test_runs_outside_the_repository(repo, tmp_path_factory):
    write(repo, 'good', 'steps = 3\nout = ""', KEEP)
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    folder = report.run_notebook('good', 'a', runs=elsewhere, quiet=True)
    assert folder == elsewhere / 'a' and (folder / 'metrics.json').is_file()


def test_a_failure_is_not_a_finished_run(repo):
    write(repo, 'sometimes', 'steps = 3\nout = ""', KEEP + '\nassert not (folder / "stop").exists(), "too many"')
    report.run_notebook('sometimes', 'a', quiet=True)
    assert len(report.load_runs()) == 1
    (repo / 'reports/runs/a/stop').touch()
    with pytest.raises(report.RunError, match='cell 2: AssertionError: too many'): report.run_notebook('sometimes', 'a', quiet=True)
    (repo / 'reports/runs/a/stop').unlink()
    assert report.load_runs() == []
    failed = (repo / 'reports/runs/a/run.failed.ipynb').read_text()
    assert 'AssertionError' in failed and str(repo) not in failed
    report.run_notebook('sometimes', 'a', quiet=True)
    assert not (repo / 'reports/runs/a/run.failed.ipynb').exists()


def test_a_kept_run_is_not_overwritten_by_another(repo):
    write(repo, 'good', 'steps = 3\nout = ""', KEEP)
    folder = report.run_notebook('good', 'a', quiet=True)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match='kept with other parameters .steps: 3 and 9'): report.run_notebook('good', 'a', quiet=True, steps=9)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_metrics_are_owed(repo):
    write(repo, 'silent', 'out = ""', '1')
    with pytest.raises(report.RunError, match='kept no metrics.json'): report.run_notebook('silent', 'a', quiet=True)


@pytest.mark.parametrize('tags, parameters, message', [
    ((), 'a = 1', '0 cells are tagged'), (('parameters',), 'a = 1\nb = a', 'not `name = literal`'), (('parameters',), 'import os', 'not `name = literal`'),
])
def test_declaration_is_strict(repo, tags, parameters, message):
    write(repo, 'odd', parameters, 'a', tags)
    with pytest.raises(ValueError, match=message): report.declared(repo / 'nbs/runs/odd.ipynb')


def test_two_tagged_cells_are_one_too_many(repo):
    cells = [nbformat.v4.new_code_cell('a = 1', metadata=dict(tags=['parameters'])) for _ in range(2)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), repo / 'nbs/runs/two.ipynb')
    with pytest.raises(ValueError, match='2 cells are tagged'): report.declared(repo / 'nbs/runs/two.ipynb')


@pytest.mark.parametrize('default, good, bad', [
    (3, [5, np.int32(5)], [5.0, True, '5', None]), (0.5, [1, 0.1, np.float32(1)], [True, '0.1', None]), (True, [False], [0, 'yes']),
    ('', ['a', Path('a')], [1, ['a']]), ([1], [[], [2, 3], (4,)], [1, ['a'], 'ab']), ({}, [{'a': 1}], [[1]]), (None, [1, 'a', None], []),
])
def test_types_follow_the_default(repo, default, good, bad):
    for value in good: report.check(dict(x=value), dict(x=default))
    for value in bad:
        with pytest.raises(ValueError, match="parameter 'x' is"): report.check(dict(x=value), dict(x=default))


def test_recipe_gives_values_or_its_path(repo):
    (repo / 'r.yaml').write_text('steps: 4\n')
    assert report._recipe_values('r.yaml', dict(steps=1)) == (dict(steps=4), repo / 'r.yaml')
    assert report._recipe_values('r.yaml', dict(recipe=''))[0] == dict(recipe=str(repo / 'r.yaml'))
    (repo / 'r.yaml').write_text('- 4\n')
    with pytest.raises(ValueError, match='key: value'): report._recipe_values('r.yaml', dict(steps=1))
    with pytest.raises(FileNotFoundError, match='no recipe'): report._recipe_values('s.yaml', dict(steps=1))


def test_keep_is_exact(repo):
    keep = report.Keep('reports/runs/k')
    keep.json('m', dict(a=np.float64('nan'), b=np.arange(2), c={1: np.bool_(True)}, d=(float('inf'),)))
    assert json.loads((keep.path / 'm.json').read_text()) == dict(a=None, b=[0, 1], c={'1': True}, d=[None])
    keep.csv('rows', [dict(x=0.1 + 0.2), dict(x=None)])
    assert pd.read_csv(keep.path / 'rows.csv').x[0] == 0.1 + 0.2
    assert not list(keep.path.glob('.*'))
    nothing = report.Keep('')
    assert nothing.path is None and nothing.csv('rows', []) is None and nothing.figure('f', None) is None


def test_large_figures_are_reduced_then_refused(repo):
    import matplotlib.pyplot as plt
    keep, rng = report.Keep('k'), np.random.default_rng(0)
    fig, ax = plt.subplots(figsize=(3, 3))
    ax.imshow(rng.random((150, 150)))
    assert keep.figure('noise', fig).stat().st_size <= report.MAX_FIGURE
    fig, ax = plt.subplots(figsize=(12, 12))
    ax.imshow(rng.random((1800, 1800, 3)))
    with pytest.raises(ValueError, match='make the figure smaller'): keep.figure('noise', fig)


def test_command_line_reads_types(repo):
    assert report._typed('1e-3', 0.5) == 1e-3 and report._typed('7', 3) == 7 and report._typed('07', '') == '07'
    assert report._typed('[1, 2]', [0]) == [1, 2] and report._typed('true', False) is True and report._typed('x', 3) == 'x'


def test_this_repository_indexes(tmp_path, monkeypatch):
    runs = report.repo_root() / 'reports' / 'runs'
    for run in report.load_runs():
        assert (runs / run['run_id'] / 'params.json').is_file() and run['metrics'] and 'seconds' in run['env'], run['run_id']


def test_a_progress_bar_is_kept_in_its_last_state(repo):
    write(repo, 'bar', 'steps = 3\nout = ""', KEEP + '\nimport sys\nfor i in range(4):\n    sys.stderr.write(f"\\r{i} of 3"); sys.stderr.flush()\nsys.stderr.write("\\ndone\\n")')
    folder = report.run_notebook('bar', 'a', quiet=True)
    cell = json.loads((folder / 'run.ipynb').read_text())['cells'][-1]
    text = ''.join(t for o in cell['outputs'] if o.get('name') == 'stderr' for t in o['text'])
    assert '3 of 3\ndone\n' in text and '1 of 3' not in text
