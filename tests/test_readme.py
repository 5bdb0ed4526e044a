"""Every number of the README's table is in a kept table, every link leads somewhere, every command names something that exists."""
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest

from mmearth.compare import FLOORS, comparison_table
from mmearth.pack import pack
from mmearth.named import repo_root
from mmearth.store import Store

ROOT = repo_root()
README = (ROOT / 'README.md').read_text()


def test_links_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)\)', README):
        if not target.startswith('http'): assert (ROOT / target).exists(), target


ARMS = {'none': ('image statistics', 'random filters'), 'small, 5 seeds': ('random', 'image only', 'all'), 'Atto, 1 seed': ('random', 'image only', 'all')}


TARGETS = ('image statistics', 'random filters', 'random', 'sentinel2', 'image level', 'pixel level', 'unweighted', 'all')


def kept_line(name, arm, runs=ROOT / 'reports' / 'runs'):
    "An arm as the kept rows say it, read from all stages, over all runs and draws of labels."
    rows = pd.concat([pd.read_csv(f / 'rows.csv').assign(run_id=f.name) for f in sorted([*runs.glob(f'{name}-stages-probe'), *runs.glob(f'{name}-probe')])])
    rows = rows[(rows.metric == 'accuracy') & (rows.protocol == 'linear-stages')]
    table = comparison_table(rows).set_index(['split', 'fraction'])
    cells = [f'{100 * r["mean"]:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})' for r in (table.loc[s, f] for s in ('test_image', 'test_region') for f in (0.01, 1.))]
    return f'| [{arm}](reports/runs/{rows.run_id.iloc[0]}/run.ipynb) | {" | ".join(cells)} |'


def test_the_tables_are_the_kept_ones():
    def name(experiment, arm): return f'{experiment}-{arm.replace(" ", "_")}{"-s?" * (arm not in FLOORS.values())}'
    eurosat = [f'| {encoder} {kept_line(name("eurosat" + "-atto" * encoder.startswith("Atto"), arm), arm)}' for encoder, arms in ARMS.items() for arm in arms]
    assert [line for line in README.split('\n') if line.startswith(tuple(f'| {encoder} |' for encoder in ARMS))] == eurosat
    assert [line for line in README.split('\n') if line.startswith('| [')] == [kept_line(name('ablation', arm), arm) for arm in TARGETS]


def test_rates_are_the_kept_ones():
    kept = [pd.read_csv(ROOT / 'reports' / 'runs' / f'bench-loader-{size}' / 'standing.csv').samples_per_s for size in (128, 64)]
    rows = re.findall(r'^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \|$', README, re.M)
    assert len(rows) == 11 and all({f'{x:,.0f}' for x in all_} >= set(told) for all_, told in zip(kept, zip(*rows)))
    opens = pd.read_csv(ROOT / 'reports' / 'runs' / 'bench-open-1200000' / 'opens.csv').set_index('what')
    plain = opens.loc['json.load, tile information only']
    assert f'{opens.open_s["first"]:.1f} s the first time' in README and f'{plain.open_s:.0f} s and {plain.peak_gb:.1f} GB' in README


def test_the_loop_over_a_pack_runs_as_it_stands(tiny_store, tmp_path):
    loop, = (block for block in re.findall(r'```python\n(.*?)```', README, re.S) if 'Loader' in block)
    pack(Store(tiny_store), tmp_path / 'earth_pack')
    done = subprocess.run([sys.executable, '-c', loop.replace('batch=32', 'batch=8')], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3 and '0 torch.Size([8, 12, 64, 64])' in done.stdout, done.stderr


def test_commands_of_the_data_house_exist():
    from mmearth.cli import app
    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r'^mmearth (\w+)', README, re.M)) <= known


def test_rates_of_the_encoder_are_the_kept_ones():
    runs = {n: ROOT / 'reports' / 'runs' / f'bench-encoder-{n}' for n in ('atto-112', 'atto-56', 'tiny-112')}
    rate = {n: pd.read_csv(r / 'standing.csv').set_index(['what', 'way']).samples_per_s for n, r in runs.items()}
    memory = pd.read_csv(runs['atto-112'] / 'memory.csv').query('not kept_less').set_index('way').step
    ways = ('published structure', 'masked', 'plain', 'lean', 'numba')
    rows = re.findall(r'^\| (?:as the published|all pixels|visible patches)[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$', README, re.M)
    want = [(f"{rate['atto-112']['encoder', w]:.1f}", f"{rate['atto-112']['step', w]:.1f}", f'{memory[w]:,.0f}', f"{rate['atto-56']['step', w]:.1f}", f"{rate['tiny-112']['step', w]:.1f}") for w in ways]
    assert rows == want


def test_the_encoder_runs_as_it_stands():
    block, = (b for b in re.findall(r'```python\n(.*?)```', README, re.S) if 'visible_features' in b)
    here = {}
    exec(block, here)
    assert here['features'].shape == (32, 19, 320)


def test_modules_named_in_commands_exist():
    for name in set(re.findall(r'-m mmearth\.(\w+)', README)): assert (ROOT / 'mmearth' / f'{name}.py').is_file(), name
    makefile = (ROOT / 'Makefile').read_text()
    for target in set(re.findall(r'^make (\w+)', README, re.M)): assert re.search(rf'^{target}:', makefile, re.M), target
    for notebook in set(re.findall(r'`(\d\d_\w+)`', README)): assert (ROOT / 'nbs' / f'{notebook}.ipynb').is_file(), notebook


@pytest.mark.parametrize('line', re.findall(r'-m mmearth\.report (run [^`\n]+)', README))
def test_run_commands_are_accepted(line, monkeypatch):
    "Each names a notebook, a recipe and parameters that there are, and values of their types."
    from mmearth import report
    def run(name, run_id, recipe, runs, quiet, **params):
        allowed = report.declared(ROOT / 'nbs' / 'runs' / f'{name}.ipynb')
        report.check({**report._recipe_values(recipe, allowed, name)[0], **params}, allowed)
        return runs, run_id
    monkeypatch.setattr(report, 'run_notebook', run)
    runs, run_id = report.main(shlex.split(line, comments=True))
    assert runs == ('reports/runs' if (ROOT / 'reports' / 'runs' / run_id).is_dir() else 'runs')


@pytest.mark.parametrize('words', [shlex.split(line, comments=True)[1:] for line in re.findall(r'mmearth(?:\.cli)? ((?:pretrain|rehearse) .*)', README)], ids=' '.join)
def test_recipes_named_in_commands_exist(words):
    from mmearth.report import recipe_with
    recipe_with(words[0], [w for w in words if '=' in w])
