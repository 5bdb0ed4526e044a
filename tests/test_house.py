"""The real notebooks keep the rules, and each rule notices when a copy of them is broken."""
import json
import shutil
import subprocess
import sys
import pytest
from mmearth.house import RULES, House, check, open_house, settings_agree
from mmearth.named import repo_root

ROOT = repo_root()


@pytest.fixture
def copy(tmp_path):
    "A copy of what the rules look at."
    for folder in ('nbs', 'mmearth'): shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for file in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT / file, tmp_path)
    for folder in ('reports/figures', 'reports/runs'): (tmp_path / folder).mkdir(parents=True)
    for side in (ROOT / 'reports/figures').glob('*.json'): shutil.copy(side, tmp_path / 'reports/figures')
    for run in (ROOT / 'reports/runs').glob('*/'): (tmp_path / 'reports/runs' / run.name).mkdir()
    return tmp_path


def test_nothing_is_found_in_this_repository():
    assert [str(f) for f in check(ROOT)] == []


def test_settings_agree():
    assert settings_agree(House(ROOT, ())) == []


@pytest.mark.parametrize('run', [nb for nb in open_house(ROOT).runs], ids=lambda nb: nb.name)
def test_a_run_notebook_has_one_cell_of_parameters(run):
    assert sum('parameters' in c.tags for c in run.cells) == 1


def code(id, source, *outputs): return dict(cell_type='code', id=id, metadata={}, source=source, outputs=list(outputs))


BREAKS = {  # rule -> what to do to a notebook to break it
    'titled': lambda nb: nb['cells'].pop(0),
    'readable_ids': lambda nb: nb['cells'][4].update(id='9f3c21ab'),
    'one_direction': lambda nb: nb['cells'].append(code('late', '#| export\nfrom mmearth.house import check')),
    'no_star_import': lambda nb: nb['cells'].append(code('star', 'from mmearth.modalities import *')),
    'no_path_literal': lambda nb: nb['cells'].append(code('path', 'open("/home/ann/tiles.h5")')),
    'sizes': lambda nb: nb['cells'].append(code('long', '#| export\n' + 'pass\n' * 46)),
    'outputs': lambda nb: nb['cells'].append(code('error', '1/0', dict(output_type='error', ename='ZeroDivisionError', evalue='', traceback=[]))),
    'shown_in_use': lambda nb: nb['cells'].append(code('unseen', '#| export\ndef unseen(): return 1')),
    'command_lines': lambda nb: nb['cells'].append(code('wakes', "#| export\n#| eval: false\nif __name__ == '__main__': main()")),
    'numbered': lambda nb: nb['cells'].append(code('again', '#| default_exp other')),
}


@pytest.mark.parametrize('rule', BREAKS)
def test_a_broken_copy_is_noticed(copy, rule):
    before = RULES[rule](open_house(copy))
    path = copy / 'nbs/10_masking.ipynb'
    nb = json.loads(path.read_text())
    BREAKS[rule](nb)
    path.write_text(json.dumps(nb))
    found = [f for f in RULES[rule](open_house(copy)) if f not in before]
    assert found and {(f.file, f.rule) for f in found} == {('nbs/10_masking.ipynb', rule)}


@pytest.mark.parametrize('what, broken', [
    ('tag stripped', lambda c: c.update(metadata={})),
    ('derived value', lambda c: c.update(source=[*c['source'], '\ntwice = 2 * 3'])),
    ('exports', lambda c: c.update(source=['#| export\n', *c['source']])),
])
def test_a_broken_run_notebook_is_noticed(copy, what, broken):
    runs = sorted((copy / 'nbs/runs').glob('*.ipynb'))
    if not runs: pytest.skip('no run notebook yet')
    nb = json.loads(runs[0].read_text())
    broken(next(c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', ())))
    runs[0].write_text(json.dumps(nb))
    assert {f.file for f in RULES['run_notebooks'](open_house(copy))} == {f'nbs/runs/{runs[0].name}'}


def test_other_files_are_noticed(copy):
    (copy / 'nbs/10_again.ipynb').write_text((copy / 'nbs/10_masking.ipynb').read_text())
    assert any('number 10 belongs to' in f.remedy for f in RULES['numbered'](open_house(copy)))
    (copy / 'mmearth/byhand.py').touch()
    assert any(f.file == 'mmearth/byhand.py' for f in RULES['numbered'](open_house(copy)))
    (copy / 'reports/figures/drawn.json').write_text('{"run_ids": ["never-ran"]}')
    assert any('never-ran' in f.remedy for f in RULES['traced_figures'](open_house(copy)))


@pytest.mark.parametrize('old, new, key', [('version = 0.1.0', 'version = 0.0.9', 'version'), ('torch>=2.6', 'torch>=2.5', 'requirements'),
    ('gpu slow net', 'gpu|slow|net', 'tst_flags'), ('keys = tags', 'keys = parameters', 'allowed_cell_metadata_keys'), ('nbdev==3.3.26', 'nbdev', 'dev_requirements')])
def test_drifted_settings_are_named(copy, old, new, key):
    ini = copy / 'settings.ini'
    assert old in ini.read_text()
    ini.write_text(ini.read_text().replace(old, new))
    found = settings_agree(House(copy, ()))
    assert found and all(f.remedy.startswith(key) for f in found)


def test_the_command_fails_when_a_rule_is_broken(copy):
    (copy / 'data_manifest').mkdir()
    (copy / 'settings.ini').unlink()
    done = subprocess.run([sys.executable, '-c', 'import sys; from mmearth.house import main; sys.exit(main())'], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and 'settings.ini: settings_agree' in done.stdout and done.stdout.splitlines()[-1].startswith('house: ')
