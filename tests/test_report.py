"Runs, kept folders and the table of runs: the promises of 40_report that a lesson does not show."
import json
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from mmearth import report
from mmearth.named import repo_root


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
    assert folder == repo / 'runs' / 'a'
    for name in ('run.ipynb', 'params.json'): assert str(repo.parent) not in (folder / name).read_text()
    nb = nbformat.read(folder / 'run.ipynb', as_version=4)
    nbformat.validate(nb)
    assert [c.id for c in nb.cells] == ['parameters', 'injected', 'body']
    assert 'papermill' not in json.dumps(nb)
    params = json.loads((folder / 'params.json').read_text())
    assert params == dict(steps=3, root='../elsewhere/tiles', out='runs/a')
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
    assert len(report.load_runs(runs='runs')) == 1
    (repo / 'runs/a/stop').touch()
    with pytest.raises(report.RunError, match='cell 2: AssertionError: too many'): report.run_notebook('sometimes', 'a', quiet=True)
    (repo / 'runs/a/stop').unlink()
    assert report.load_runs(runs='runs') == []
    failed = (repo / 'runs/a/run.failed.ipynb').read_text()
    assert 'AssertionError' in failed and str(repo) not in failed
    report.run_notebook('sometimes', 'a', quiet=True)
    assert not (repo / 'runs/a/run.failed.ipynb').exists()


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
    runs = repo_root() / 'reports' / 'runs'
    for run in report.load_runs():
        assert (runs / run['run_id'] / 'params.json').is_file() and run['metrics'] and 'seconds' in run['env'], run['run_id']


def test_a_progress_bar_is_kept_in_its_last_state(repo):
    write(repo, 'bar', 'steps = 3\nout = ""', KEEP + '\nimport sys\nfor i in range(4):\n    sys.stderr.write(f"\\r{i} of 3"); sys.stderr.flush()\nsys.stderr.write("\\ndone\\n")')
    folder = report.run_notebook('bar', 'a', quiet=True)
    cell = json.loads((folder / 'run.ipynb').read_text())['cells'][-1]
    text = ''.join(t for o in cell['outputs'] if o.get('name') == 'stderr' for t in o['text'])
    assert '3 of 3\ndone\n' in text and '1 of 3' not in text


def test_both_spellings_of_a_parameter_and_both_homes_of_a_run(repo):
    write(repo, 'good', 'steps = 3\nnames = ["a"]\nshares = [1.0]\nout = ""', KEEP)
    for words in ('-p steps 5 -p names b,c -p shares 0.5,1', '-p steps=5 -p names=["b","c"] -p shares=[0.5,1.0]', '-p steps=5 -p names b,c -p shares 5e-1,1'):
        folder = report.main(f'run good a -q {words}'.split())
        assert folder == repo / 'runs' / 'a' and json.loads((folder / 'params.json').read_text()) == dict(steps=5, names=['b', 'c'], shares=[0.5, 1.0], out='runs/a')
    assert report.main('run -p steps=5 good -p names b --runs reports/runs a -q'.split()) == repo / 'reports' / 'runs' / 'a'
    assert [r['run_id'] for r in report.load_runs()] == ['a']
    for words in ('-p steps', '-p steps -q', '-p =5'):
        with pytest.raises(ValueError, match='write -p KEY VALUE or -p KEY=VALUE'): report.main(f'run good b {words}'.split())
    assert not (repo / 'runs' / 'b').exists()


def test_a_recipe_goes_by_name_and_is_checked_before_a_kernel_starts(tmp_path):
    assert report.find_recipe('mini').name == 'mini.yaml' and report.find_recipe('standin', 'benchmark').parent.name == 'evaluations'
    with pytest.raises(FileNotFoundError, match='no recipe nosuch.yaml.*by its name: demo, eurosat, mini'): report.find_recipe('nosuch.yaml')
    with pytest.raises(FileNotFoundError, match='by its name: eurosat, geobench, standin'): report.find_recipe('mini', 'benchmark')
    with pytest.raises(FileNotFoundError, match='give a YAML file$'): report.find_recipe('mini', 'probe')
    for words, says in (('-p size enormous', 'size: .enormous. is not one of'), ('-p crop=57', 'crop: 57 is not a multiple'), ('-p bands B99', 'no band .B99.')):
        with pytest.raises(ValueError, match=says): report.main(f'run pretrain x -q --runs {tmp_path} {words}'.split())
    assert not list(tmp_path.iterdir())


def test_words_for_one_and_for_several_lead_to_each_other():
    runs = repo_root() / 'nbs' / 'runs'
    for notebook, given, meant in (('finetune', 'models', 'pretrained'), ('label_efficiency', 'pretrained', 'models'), ('benchmark', 'encoder', 'models'), ('benchmark', 'protocol', 'methods'), ('finetune', 'methods', 'method'), ('benchmark', 'data', 'tasks')):
        with pytest.raises(ValueError, match=f"no parameter '{given}'; the nearest is '{meant}'"): report.check({given: 'x'}, report.declared(runs / f'{notebook}.ipynb'))


def test_the_index_groups_an_experiment_and_folds_its_seeds(repo):
    (repo / 'nbs' / 'runs' / 'experiments').mkdir()
    for name in ('storm', 'storm-wide'): (repo / 'nbs' / 'runs' / 'experiments' / f'{name}.yaml').touch()
    def kept(run_id, headline, notebook='probe', seconds=60, **params):
        keep = report.Keep(f'reports/runs/{run_id}')
        for name, obj in dict(metrics=dict(headline=headline), env=dict(notebook=notebook, seconds=seconds, device='a|b'[0], commit='c' * 40), params=params).items(): keep.json(name, obj)
        (keep.path / 'run.ipynb').touch()
    for s, a in enumerate((0.71, 0.69, 0.7)): kept(f'storm-all-s{s}-probe', f'all: accuracy {a} with all labels')
    for s in range(2): kept(f'storm-random-s{s}', 'pico-test, 1 tasks, 0 updates', 'pretrain', epochs=0.0)
    kept('storm-report', 'said', 'report', experiment='storm', question='Does it?')
    kept('storm-wide-all-s0', 'wide', seconds=9000)
    kept('other', 'alone', 'fuzz')
    text = report.index().read_text()
    assert [l for l in text.split('\n') if l.startswith('## ')] == ['## storm-wide', '## storm', '## Single runs']
    storm = text.split('## storm\n')[1].split('## ')[0].strip().split('\n')
    assert storm[0] == 'Does it?' and storm[4].startswith('| [storm-report](runs/storm-report/run.ipynb) | report | said')
    assert storm[5:] == ['| storm-all-probe: [s0](runs/storm-all-s0-probe/run.ipynb), [s1](runs/storm-all-s1-probe/run.ipynb), [s2](runs/storm-all-s2-probe/run.ipynb) | probe | all: accuracy 0.69 to 0.71 with all labels | 3.0, a | cccccccccc |',
                         '| storm-random: [s0](runs/storm-random-s0/run.ipynb), [s1](runs/storm-random-s1/run.ipynb) | pretrain | pico-test, 1 task, random weights | 2.0, a | cccccccccc |']
    assert '| alone | 1.0, a |' in text
    report.Keep('reports/runs/other').json('metrics', dict(headline='alone', minutes=90))          # it went on from an earlier go
    assert '| alone | 90.0, a |' in report.index().read_text()
    with pytest.raises(ValueError, match='README.md of the repository'): report.index('runs')


def test_every_kept_run_is_in_the_index():
    root, text = repo_root(), (report.repo_root() / 'reports' / 'README.md').read_text()
    for run in report.load_runs(): assert f'](runs/{run["run_id"]}/run.ipynb)' in text, f'{run["run_id"]}: run python -m mmearth.report index'
    assert '0 updates' not in text


def test_a_scheduler_may_end_a_run_notebook(tiny_store, tmp_path):
    "SIGTERM to the command reaches the kernel: a checkpoint, code 75, no kernel left behind; the same command goes on."
    words = [sys.executable, '-m', 'mmearth.report', 'run', 'pretrain', 'ended', '-q', '--runs', str(tmp_path), '-p', f'data={tiny_store}', '-p', 'tasks=lat,biome', '-p', 'batch=4', '-p', 'decoder_width=32', '-p', 'save_every=100000', '-p', 'log_every=1']
    p = subprocess.Popen([*words, '-p', 'epochs=2000'], stderr=subprocess.PIPE, text=True)
    log = tmp_path / 'ended' / 'log.csv'
    while p.poll() is None and not (log.exists() and log.read_text().count('\n') > 3): time.sleep(.05)
    twice = subprocess.run([*words, '-p', 'epochs=2000', '-p', 'seed=7'], capture_output=True, text=True)
    assert twice.returncode == 1 and 'another process is at work in this folder' in twice.stderr, twice.stderr[-500:]
    assert json.loads((tmp_path / 'ended' / 'params.json').read_text())['seed'] == 0
    for signalled in range(2): p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=90)[1]
    kept = list((tmp_path / 'ended' / 'checkpoints').iterdir())
    assert p.returncode == 75 and 'the same command goes on from there' in said and len(kept) == 1, said[-500:]
    assert int(kept[0].name.split('-')[1]) == len(log.read_text().splitlines()) - 1 and not (tmp_path / 'ended' / 'metrics.json').exists()
