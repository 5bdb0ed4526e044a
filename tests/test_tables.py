"The paper's tables: numbers are what the sources say, cells are laid where they belong, and what is kept can be made again."
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmearth import tables as t
from mmearth.manifest import ManifestError, manifest_folder
from mmearth.named import repo_root
from mmearth.recipe import TASK_SETS, load_recipe, to_dict
from mmearth.report import load_runs, run_notebook

NUMBERS = manifest_folder() / 'paper_numbers.csv'
FULL = dict(pretrain='MMEarth64', input='S2 12 bands', targets='all', encoder='Atto', loss='uncertainty', image='56-8')


@pytest.fixture(scope='module')
def numbers(): return t.paper_numbers()


# ---- numbers ----

def test_the_main_table_is_the_authors_image(numbers):
    main = numbers[numbers.table == 'a.1'].pivot(index=['pretrain', 'targets'], columns=['task', 'protocol'], values='value')
    columns = [('m-bigearthnet', 'finetune-paper'), ('m-bigearthnet', 'linear-paper'), ('m-so2sat', 'finetune-paper'), ('m-so2sat', 'linear-paper'), ('m-cashew-plant', 'unet-paper'), ('m-SA-crop-type', 'unet-paper')]
    want = {('ImageNet', 'RGB'): [55.7, 25.9, 36.6, 24.0, 77.1, 26.7], ('MMEarth64', 'S2'): [65.1, 36.2, 48.7, 33.5, 79.9, 36.0], ('MMEarth64', 'all'): [68.2, 40.9, 54.0, 41.7, 81.6, 39.7]}
    assert {k: main.loc[k, columns].tolist() for k in main.index} == want
    gains = main.loc[('MMEarth64', 'all'), columns].to_numpy() - main.loc[('MMEarth64', 'S2'), columns].to_numpy()
    np.testing.assert_allclose(gains, [3.1, 4.7, 5.3, 8.2, 1.7, 3.7], atol=1e-9)  # as derived beside the table in the source


def test_the_digitised_figure_meets_the_main_table_at_all_labels(numbers):
    full = numbers[(numbers.fraction == 1) & (numbers.protocol == 'linear-paper') & numbers.table.isin(['a.1', 'a.4'])]
    both = full.pivot_table(index=[*t.SETTING, 'task'], columns='table', values='value').dropna()
    assert len(both) == 6 and (both['a.1'] - both['a.4']).abs().max() < 0.05
    assert (numbers[numbers.table == 'a.4'].groupby(['pretrain', 'targets', 'task']).value.apply(lambda v: v.is_monotonic_increasing)).all()  # in order of fraction


def test_no_number_of_the_first_version_is_among_them(numbers):
    old = {72.9, 57.2, 44.5, 34.9, 78.6, 64.5, 46.2, 28.6, 80.0, 68.2, 55.9, 44.2} - {68.2}
    own = numbers[(numbers.model == 'MP-MAE') & (numbers.split == 'test')]
    assert not old & set(own.value)
    assert set(own[own.metric == 'micro_f1_before_fix'].tag) == {'GIT'}


def test_other_metrics_are_not_mixed(numbers):
    assert set(numbers[numbers.protocol.str.endswith('torchgeo-bench') & (numbers.task == 'm-bigearthnet')].metric) == {'map_micro'}
    assert set(numbers[numbers.protocol.str.endswith('galileo') & (numbers.task == 'm-bigearthnet')].metric) == {'micro_f1'}
    assert numbers.groupby(['protocol', 'task']).metric.nunique().drop([('finetune-paper', 'm-bigearthnet'), ('linear-paper', 'm-bigearthnet')]).max() == 1
    third = numbers[(numbers.model == 'MMEarth Atto')]
    assert third[(third.task == 'm-eurosat') & (third.fraction == 1)].set_index('protocol').value.to_dict() == {'knn-galileo': 81.7, 'finetune-galileo': 95.7}


def change(tmp_path, line, **cells):
    lines = list(csv.reader(io.StringIO(NUMBERS.read_text(encoding='utf-8'))))
    for key, value in cells.items(): lines[line - 1][lines[0].index(key)] = value
    path = tmp_path / 'paper_numbers.csv'
    with path.open('w', encoding='utf-8', newline='') as f: csv.writer(f).writerows(lines)
    return path


@pytest.mark.parametrize('key, value', [('value', '0.557x'), ('value', '-1'), ('value', '101'), ('value', 'nan'), ('value', ''), ('unit', ''), ('unit', 'fraction'), ('tag', 'REC'), ('tag', 'img'), ('task', 'm-bigearth'),
                                        ('protocol', 'lp'), ('metric', 'accuracy'), ('fraction', '100'), ('fraction', '0'), ('split', 'train'), ('repeat', '0'), ('table', 'main'), ('source', ''), ('model', ''), ('note', ' blank')])
def test_a_bad_number_is_named_with_line_and_column(tmp_path, key, value):
    with pytest.raises(ManifestError) as e: t.paper_numbers(change(tmp_path, 3, **{key: value}))
    assert (e.value.line, e.value.key) == (3, key) and 'paper_numbers.csv' in str(e.value) and e.value.remedy


@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:3000], lambda b: b.replace(b'protocol', b'protocols', 1), lambda b: b'\xff' + b, lambda b: b + b'a.1,too,short\n', lambda b: b + b.split(b'\n')[5] + b'\n'])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / 'paper_numbers.csv'
    path.write_bytes(damage(NUMBERS.read_bytes()))
    with pytest.raises(ManifestError, match='paper_numbers.csv'): t.paper_numbers(path)
    with pytest.raises(ManifestError, match='paper_numbers.csv'): t.paper_numbers(tmp_path / 'gone' / 'paper_numbers.csv')


# ---- settings ----

RECIPES = sorted((repo_root() / 'nbs/runs/recipes').glob('pt-*.yaml'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_a_published_recipe_and_its_name_say_the_same(path):
    assert t.setting(to_dict(load_recipe(path))) == t.published_setting(path.stem)


def test_every_line_of_the_ablations_has_a_recipe():
    made = [{k: t.published_setting(p.stem)[k] for k in t.SETTING} for p in RECIPES]
    for name, (_, settings, *_) in t.GRIDS.items():
        for s in settings:
            if s['pretrain'] != 'ImageNet': assert {k: s[k] for k in t.SETTING} in made, f'{name}: {s}'


def recipe(**more): return dict(data='data_1M_v001_64', bands=[f'B{i}' for i in range(12)], tasks=list(TASK_SETS['all']), size='atto', balance='uncertainty', crop=56, patch=8, epochs=200., seed=0) | more


def kept(name='try', arms=(('all', {}),), task='m-so2sat', protocol='linear-paper', metric='accuracy', split='test', values=(0.40, 0.42, 0.44), fraction=1.0, width=0.03):
    runs = []
    for arm, own in arms:
        for s, v in enumerate(values):
            run = f'{name}-{arm}-s{s}'
            rows = pd.DataFrame([dict(task=task, protocol=protocol, fraction=fraction, seed=0, split=split, metric=metric, value=v, low=v - width, high=v + width, n_train=100, n_test=986)])
            runs += [dict(run_id=run, params=recipe(seed=s, **own), rows=None), dict(run_id=f'{run}-{protocol}', params=dict(pretrained=f'elsewhere/runs/{run}'), rows=rows)]
    return runs


def described(runs): return t.described(t.result_rows(runs), runs)


def test_runs_of_one_recipe_are_one_group_whatever_evaluated_them():
    runs = kept() + [r for r in kept(protocol='knn') if r['rows'] is not None]
    rows = described(runs)
    assert set(rows.group) == {'try-all'} and sorted(rows.pretrain_seed) == [0, 0, 1, 1, 2, 2] and set(rows.checkpoint) == {'try-all-s0', 'try-all-s1', 'try-all-s2'}


def test_models_of_a_benchmark_are_called_by_what_they_are():
    runs = [r for s in ({}, dict(tasks=['sentinel2'])) for r in kept('try' + 's2' * bool(s), (('x', s),))]
    ids = [r['run_id'] for r in runs if 'size' in r['params']]
    assert t.model_names([f'reports/runs/{ids[0]}', f'reports/runs/{ids[-1]}/checkpoints/step-000008', 'image_statistics', 'untrained-atto', 'pt-pix_mod_atto_1M_64_uncertainty_56-8'], runs) \
        == ['MMEarth64, all tasks', 'MMEarth64, the image alone', 'image statistics', 'random weights', 'MMEarth64, pixel']
    assert t.model_names([f'reports/runs/{i}' for i in ids[:2]] + ['random_filters'], runs) == [f'MMEarth64, all tasks ({i})' for i in ids[:2]] + ['random filters']


def test_released_weights_and_unknown_ones():
    rows = kept()[1]['rows']
    name = 'pt-S2_atto_1M_64_uncertainty_56-8'
    runs = [dict(run_id='a', params=dict(pretrained=f'checkpoints/{name}/checkpoint-199.pth'), rows=rows), dict(run_id='b', params=dict(pretrained='weights/mystery.pth'), rows=rows), dict(run_id='c', params=dict(pretrained=''), rows=rows)]
    facts = described(runs).set_index('run_id')
    assert facts.loc['a', 'group'] == f'released {name}' and facts.loc['a', 'targets'] == 'S2'
    assert facts.loc['b', 'pretrain'] == 'checkpoint mystery' and facts.loc['c', 'pretrain'] == 'none, random weights'


@pytest.mark.parametrize('column, value', [('value', 42.0), ('value', np.nan), ('low', -0.1), ('high', 'high')])
def test_a_row_out_of_range_is_named(column, value):
    runs = kept()
    runs[1]['rows'] = runs[1]['rows'].astype(object).assign(**{column: value})
    with pytest.raises(ValueError, match=r'try-all-s0-linear-paper/rows.csv, line 2: .* run its notebook again'): t.result_rows(runs)


def test_an_incomplete_recipe_is_named():
    runs = kept()
    del runs[0]['params']['balance']
    with pytest.raises(KeyError, match='lacks balance'): described(runs)


# ---- tables ----

def test_a_cell_of_ours_is_a_slow_loops(numbers):
    rows = described(kept())
    cell = t.paper_table('main', rows, numbers).dropna(subset='mean')
    assert len(cell) == 1 and cell.paper.item() == 41.7 and cell.tag.item() == 'IMG'
    from scipy import stats
    values = [40., 42., 44.]
    half = np.hypot(stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3 ** 0.5, 3)
    assert cell['mean'].item() == pytest.approx(42) and cell.high.item() == pytest.approx(42 + half, abs=1e-4) and cell.low.item() == pytest.approx(42 - half, abs=1e-4)
    assert cell.run_ids.item() == ' '.join(f'try-all-s{i}-linear-paper' for i in range(3)) and cell.runs.item() == 3


@pytest.mark.parametrize('protocol, metric, split, drawn', [('linear-paper', 'accuracy', 'test', 1), ('linear', 'accuracy', 'test', 0), ('linear-paper', 'macro_f1', 'test', 0), ('linear-paper', 'accuracy', 'val', 0)])
def test_only_the_same_protocol_metric_and_a_test_split_meet_the_paper(numbers, protocol, metric, split, drawn):
    table = t.paper_table('main', described(kept(protocol=protocol, metric=metric, split=split)), numbers)
    assert table['mean'].notna().sum() == drawn and table.paper.notna().sum() == 24


@pytest.mark.parametrize('name', t.GRIDS)
def test_tables_of_nothing_are_whole(numbers, name):
    title, settings, cells, _ = t.GRIDS[name]
    table = t.paper_table(name, t.described(t.result_rows([]), []), numbers)
    assert len(table) == len(settings) * len(cells) and table['mean'].isna().all()
    page = t.table_page(title, table)
    assert not re.search(r'\bnan\b|\bNone\b|\bNaN\b', page) and page.count(t.GAP) >= len(table)


def test_a_paper_number_is_never_invented(numbers):
    for name in ('loss', 'targets', 'size'):
        table = t.paper_table(name, described(kept()), numbers)
        for r in table.dropna(subset='paper').to_dict('records'):
            found = numbers[(numbers[t.SETTING] == pd.Series({k: r[k] for k in t.SETTING})).all(axis=1) & (numbers.task == r['task']) & (numbers.protocol == r['protocol']) & (numbers.value == r['paper']) & (numbers.tag == r['tag'])]
            assert len(found)
    assert t.paper_table('loss', described(kept()), numbers).query("loss == 'unweighted'").paper.isna().all()


def test_ours_join_an_ablation_only_in_pairs(numbers):
    alone = described(kept(task='scenes', protocol='linear', arms=(('plain', dict(balance='sum', data='synthetic-9')),)))
    pair = described(kept(task='scenes', protocol='linear', arms=(('plain', dict(balance='sum', data='synthetic-9')), ('weighed', dict(data='synthetic-9')))))
    longer = described(kept(task='scenes', protocol='linear', arms=(('plain', dict(balance='sum', data='synthetic-9')), ('weighed', dict(data='synthetic-9', epochs=3.)))))
    assert [t.paper_table('loss', r, numbers)['mean'].notna().sum() for r in (alone, pair, longer)] == [0, 2, 0]
    assert [len(t.own_table(r)) for r in (alone, pair)] == [1, 2]


def test_other_work_keeps_protocols_apart(numbers):
    work = t.other_work(described(kept(protocol='linear-torchgeo-bench')), numbers)
    ours = work[work.tag == 'ours']
    assert ours.protocol.tolist() == ['linear-torchgeo-bench'] and ours.value.item() == pytest.approx(42)
    page = t.work_page(work)
    sections = {part.split('\n')[0]: part for part in page.split('\n## ')[1:]}
    assert len(sections) == work.protocol.nunique() and 'ours, try-all' in sections['Linear probe, torchgeo-bench'] and sum('ours, try-all' in p for p in sections.values()) == 1
    assert 'TerraFM-L' in sections["Fine-tuning, Galileo's protocol"] and 'TerraFM-L' not in sections["Linear probe, paper's recipe"]


# ---- what is kept ----

def alike(a:Path, b:Path):
    "Two pictures, but for what another version of a font or of libpng does to single pixels."
    one, two = (np.asarray(Image.open(p).convert('RGB'), dtype=float) for p in (a, b))
    assert one.shape == two.shape, f'{a.name}: {two.shape} where {one.shape} is kept'
    assert np.abs(one - two).mean() < 1, f'{a.name}: drawn otherwise'


@pytest.mark.parametrize('name', ['tables', 'figures'])
def test_kept_tables_and_figures_are_remade(name, tmp_path):
    "The kept run of runs/tables or runs/figures again, into another folder: tables and drawn numbers to the byte, pictures nearly so."
    params = json.loads((repo_root() / 'reports/runs' / name / 'params.json').read_text())
    run_notebook(name, name, runs=tmp_path / 'runs', quiet=True, **{k: v for k, v in params.items() if k not in ('into', 'out')}, into=tmp_path)
    kept_, made = repo_root() / params['into'], tmp_path
    patterns = ('tables/paper-*', 'figures/paper-conclusions.*', 'conclusions.md') if name == 'tables' else ('figures/paper-*',)
    files = {p.relative_to(kept_).as_posix() for pattern in patterns for p in kept_.glob(pattern) if name == 'tables' or p.stem != 'paper-conclusions'}
    assert files and files == {p.relative_to(made).as_posix() for pattern in patterns for p in made.glob(pattern)}
    for file in sorted(files):
        if file.endswith('.png'): alike(kept_ / file, made / file)
        elif file.endswith('.json'): assert all(json.loads((kept_ / file).read_text())[k] == json.loads((made / file).read_text())[k] for k in ('maker', 'run_ids')), file
        else: assert (kept_ / file).read_bytes() == (made / file).read_bytes(), f'{file} differs; run: python -m mmearth.report run {name} {name} -p into reports --runs reports/runs'
    for png in kept_.glob('figures/paper-*.png'): assert png.stat().st_size <= 200_000


def test_kept_runs_are_all_described():
    runs = load_runs()
    rows = described(runs)
    assert rows.notna()[[*t.SETTING, 'group', 'pretrain_seed']].all().all() and not rows.pretrain.str.startswith('checkpoint').any()
