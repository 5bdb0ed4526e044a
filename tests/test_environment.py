"""environment.yml, settings and constraints say what pyproject.toml says, and the Makefile's helpers do what they promise."""
import re
import shutil
import subprocess
import tomllib
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from mmearth.named import repo_root

ROOT = repo_root()
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
ENVIRONMENT = yaml.safe_load((ROOT / 'environment.yml').read_text())
CONDA = [line for line in ENVIRONMENT['dependencies'] if isinstance(line, str)]
PIP, = (line['pip'] for line in ENVIRONMENT['dependencies'] if isinstance(line, dict))


def table(lines): return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def constraints(kind):
    lines = (re.sub('#.*', '', line).strip() for line in (ROOT / f'constraints-{kind}.txt').read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_the_environment_is_the_project():
    wanted = table(PROJECT['dependencies'] + PROJECT['optional-dependencies']['dev'])
    conda, pip = table(line for line in CONDA if line != 'pip' and not line.startswith('python=')), table(line for line in PIP if not line.startswith('-'))
    assert not conda.keys() & pip.keys()
    assert conda | pip == wanted


def test_the_environment_has_one_channel_one_python_and_this_package():
    assert ENVIRONMENT['channels'] == ['conda-forge']
    assert 'python=3.11' in CONDA and '3.11' in SpecifierSet(PROJECT['requires-python'])
    assert 'pip' in CONDA and ENVIRONMENT['dependencies'][-1] == dict(pip=PIP)
    assert PIP[-1] == '-e .'
    assert 'solve was not run' in (ROOT / 'environment.yml').read_text()


def test_a_cpu_machine_cannot_get_a_cuda_build():
    linux, = (c for c in constraints('cpu') if c.marker.evaluate(dict(sys_platform='linux')))
    other, = (c for c in constraints('cpu') if c.marker.evaluate(dict(sys_platform='darwin')))
    assert '2.13.0+cpu' in linux.specifier and '2.13.0' not in linux.specifier and '2.13.0+cu130' not in linux.specifier
    assert '2.13.0' in other.specifier
    torch, = constraints('gpu')
    assert torch.specifier == table(PROJECT['dependencies'])['torch'] and '2.13.0' in torch.specifier


def test_no_committed_setting_names_a_private_place():
    for file in ('Makefile', '.ci/setup', '.ci/run', 'environment.yml', 'constraints-cpu.txt', 'constraints-gpu.txt', 'pyproject.toml', 'settings.ini'):
        text = (ROOT / file).read_text()
        assert set(re.findall(r'https?://[^\s"\']+', text)) <= {'https://download.pytorch.org/whl/cpu'}, file
        assert not re.search(r'find.links|index.url(?! "\$cpu_index")|file://', text), file


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_help_names_every_target():
    text = subprocess.run(['make', '--no-print-directory'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r'^\.PHONY: (.+)$', (ROOT / 'Makefile').read_text(), re.M)[1].split()
    assert re.findall(r'^make (\w+) +\S', text, re.M) == targets
    assert {'demo', 'test', 'lab', 'clean'} <= set(targets)


@pytest.fixture
def tree(tmp_path):
    "A folder with the helpers, one notebook and the settings, and no git."
    shutil.copytree(ROOT / '.ci', tmp_path / '.ci')
    for file in ('nbs/10_rain.ipynb', 'mmearth/rain.py', 'pyproject.toml', 'settings.ini'):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('as it was\n')
    return tmp_path


@pytest.mark.parametrize('command, status, said', [
    ('true', 0, ''), ('false', 1, ''), ('touch nbs/.hidden nbs/log.txt', 0, ''),
    ('echo more >> nbs/10_rain.ipynb', 1, 'nbs/10_rain.ipynb'), ('rm mmearth/rain.py', 1, 'mmearth/rain.py'), ('touch mmearth/new.py', 1, 'mmearth/new.py')])
def test_unchanged_fails_when_a_tool_changes_a_file_and_names_it(tree, command, status, said):
    done = subprocess.run(['bash', '.ci/unchanged', 'bash', '-c', command], cwd=tree, capture_output=True, text=True)
    assert done.returncode == status and said in done.stderr
    assert ('commit it, run again' in done.stderr) == bool(said)


def test_setup_refuses_an_unknown_torch(tree):
    done = subprocess.run(['bash', '.ci/setup'], cwd=tree, capture_output=True, text=True, env=dict(PATH='/usr/bin:/bin', TORCH='tpu'))
    assert done.returncode == 1 and 'use TORCH=cpu or TORCH=gpu' in done.stderr and not (tree / '.venv').exists()


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
@pytest.mark.parametrize('tests, status, last', [("'3 passed, 1 skipped in 0.10s'", 0, '3 passed, 1 skipped in 0.10s'),
    ("'1 failed, 2 passed in 0.10s'; exit 1", 2, '1 failed, 2 passed in 0.10s'), ('broken; exit 1', 2, 'no test was run: a step before pytest failed')])
def test_ci_ends_with_the_summary_of_pytest(tree, tests, status, last):
    (tree / 'Makefile').write_text(f'test:\n\t@echo {tests}\n')
    done = subprocess.run(['bash', '.ci/run'], cwd=tree, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == status and done.stdout.splitlines()[-1] == last
