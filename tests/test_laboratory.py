"""The pretext laboratory: arms, effects against a loop, and one that was stopped."""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import NearestCentroid

import mmearth
from mmearth.laboratory import _code, arms, draw_effects, effects, experiment, questions, smallest_effects
from mmearth.modalities import TASKS, modality
from mmearth.recipe import Recipe, RecipeError
from mmearth.store import Store
from mmearth.synthetic import write_store


def test_every_task_is_left_out_once_and_taken_in_once():
    found = arms(TASKS)
    assert len(found) == 1 + 12 + 1 + 11
    for t in TASKS:
        assert set(found[f'without {t}']) == set(TASKS) - {t}
        if t != 'sentinel2': assert found[f'with {t}'] == ('sentinel2', t)


def test_effects_are_paired_by_seed():
    rng = np.random.default_rng(0)
    names = list(arms(('sentinel2', 'lat', 'biome')))
    luck = rng.normal(0, 0.2, 5)
    rows = pd.DataFrame([dict(arm=a, seed=s, question='q', accuracy=0.5 + luck[s] + (0.1 if a in ('all', 'without lat', 'with biome') else 0) + rng.normal(0, 0.002), images=9) for a in names for s in range(5)])
    found = effects(rows).set_index(['way', 'task'])
    at = rows.set_index(['arm', 'seed']).accuracy
    for (way, task), r in found.iterrows():
        a, b = ('all', f'without {task}') if way == 'left out' else (f'with {task}', 'sentinel2')
        each = [100 * (at[a, s] - at[b, s]) for s in range(5)]
        wide = 2.776445 * np.std(each, ddof=1) / 5 ** 0.5
        assert (r.points, r.low, r.high) == pytest.approx((np.mean(each), np.mean(each) - wide, np.mean(each) + wide))
    assert found.low['left out', 'biome'] > 8 and abs(found.points['left out', 'lat']) < 1 and found.low['taken in', 'biome'] > 8


def _drawn(ax):
    "(points, row, mark, fill) of every mark of a panel, and (row, low, high) of every bar that can be seen."
    marks = {(x, round(float(y), 2), m.get_marker(), m.get_markerfacecolor()) for m in ax.lines if m.get_marker() not in ('None', None, '') for x, y in zip(m.get_xdata(), m.get_ydata())}
    bars = {(round(float(b[0][1]), 2), b[0][0], b[1][0]) for c in ax.collections for b in c.get_segments()}
    return marks, bars


def test_the_picture_tells_what_has_an_interval_and_what_is_told_apart():
    shape = dict(way='left out', question='q', seeds=3)
    found = pd.DataFrame([shape | dict(task='lat', points=-2.0, low=-3.0, high=-1.0), shape | dict(task='lon', points=-2.5, low=-5.0, high=1.0),
                          shape | dict(task='biome', points=1.5, low=np.nan, high=np.nan, seeds=1), shape | dict(task='lat', way='taken in', points=2.0, low=0.5, high=3.5),
                          shape | dict(task='month', question='other', points=-1.0, low=np.nan, high=np.nan, seeds=1)])
    fig = draw_effects(found)
    q, other = fig.axes
    assert (q.get_title(), other.get_title()) == ('Q', 'Other') and [t.get_text() for t in q.get_yticklabels()] == ['Latitude', 'Longitude', 'Biome', 'Month']
    marks, bars = _drawn(q)
    blue, orange = '#2B6CA3', '#C2540A'
    assert marks == {(2.0, -0.18, 'o', blue), (-2.0, 0.18, 's', orange), (-2.5, 1.18, 's', 'white'), (1.5, 2.18, 's', 'white')}
    assert bars == {(-0.18, 0.5, 3.5), (0.18, -3.0, -1.0), (1.18, -5.0, 1.0)}
    assert _drawn(other) == ({(-1.0, 3.18, 's', 'white')}, set())
    low, high = q.get_xlim()
    assert low == -high and high > 5
    note = fig._supxlabel.get_text().replace('\n', ' ')
    assert 'Mean of 1 to 3 pretraining seeds' in note and 'Filled: 2 of 3 intervals leave out zero, about 0 would by luck alone' in note and 'none where there is one seed' in note
    assert 'Mean of 1 pretraining seed, which has no interval' in draw_effects(found[found.low.isna()])._supxlabel.get_text().replace('\n', ' ')


def test_the_size_that_is_seen_four_times_in_five():
    found = pd.DataFrame(dict(question=['a', 'a', 'b'], deviation=[1.0, 7.0, 5.0]))
    table = smallest_effects(found, (3, 6), power=0.6).set_index(['question', 'seeds'])
    assert table.deviation.to_numpy() == pytest.approx(np.full(6, 5.0))
    rng = np.random.default_rng(1)
    for n, t in ((3, 4.302653), (6, 2.570582)):
        size = table.smallest['a', n]
        assert table.half_width['a', n] == pytest.approx(t * 5 / n ** 0.5, rel=1e-5)
        x = rng.normal(size, 5, (40000, n))
        assert (abs(x.mean(1)) > t * x.std(1, ddof=1) / n ** 0.5).mean() == pytest.approx(0.6, abs=0.01)
    with pytest.raises(ValueError, match='at least two seeds'): smallest_effects(found.assign(deviation=np.nan))


def test_one_that_was_stopped_goes_on(tmp_path):
    store, scenes = Store(write_store(tmp_path / 'tiles', 24, seed=3)), Store(write_store(tmp_path / 'scenes', 64, seed=1, labelled=True))
    recipe = Recipe(batch=8, epochs=0.5, crop=32, decoder_width=32, tasks=('sentinel2', 'lat'))
    whole = experiment(recipe, store, scenes, tmp_path / 'kept', (0,), ('in',), progress=False)
    first, second = sorted((tmp_path / 'kept').glob('*.csv'))
    before = first.stat().st_mtime_ns
    second.unlink()
    (tmp_path / 'kept' / 'x.part').write_text('half')
    again = experiment(recipe, store, scenes, tmp_path / 'kept', (0,), ('in',), progress=False)
    pd.testing.assert_frame_equal(again.drop(columns='seconds'), whole.drop(columns='seconds'))
    assert first.stat().st_mtime_ns == before and (again.seconds > 0).all() and again.groupby('arm').seconds.nunique().eq(1).all()


def test_one_folder_answers_about_what_it_was_asked(tmp_path, monkeypatch):
    tiles, others = (Store(write_store(tmp_path / f'tiles{s}', 16, seed=s)) for s in (3, 4))
    scenes, more = (Store(write_store(tmp_path / f'scenes{n}', n, seed=1, labelled=True)) for n in (48, 96))
    monkeypatch.setattr('mmearth.laboratory.linear_probe', lambda x, y, *val: NearestCentroid().fit(x, y))  # quick; what is tried is the cache
    recipe, kept = Recipe(batch=8, epochs=0.5, crop=32, decoder_width=32, tasks=('sentinel2', 'lat')), tmp_path / 'kept'
    ask = lambda store, scenes, folder=kept: experiment(recipe, store, scenes, folder, (0,), ('in',), progress=False).drop(columns='seconds')
    files = lambda: len(list(kept.glob('*.csv')))
    one = ask(tiles, scenes)
    assert files() == 2
    two = ask(tiles, more)
    assert files() == 4 and not one.equals(two)
    pd.testing.assert_frame_equal(two, ask(tiles, more, tmp_path / 'fresh'))
    pd.testing.assert_frame_equal(one, ask(tiles, scenes))
    ask(others, scenes)
    assert files() == 6
    monkeypatch.setattr('mmearth.laboratory._code', lambda: 'other code')
    ask(tiles, scenes)
    assert files() == 8
    monkeypatch.setattr('mmearth.laboratory.pick_device', lambda asked: 'another')
    ask(tiles, scenes)
    assert files() == 10


def test_the_code_that_counts_is_what_is_imported(tmp_path):
    for name, text in dict(a='from .b import x\nimport numpy\n', b='x = 1\n', c='y = 1\n').items(): (tmp_path / f'{name}.py').write_text(text)
    first = _code(('a',), tmp_path)
    (tmp_path / 'c.py').write_text('y = 2\n')
    assert _code(('a',), tmp_path) == first
    (tmp_path / 'b.py').write_text('x = 2\n')
    assert _code(('a',), tmp_path) != first
    package = tmp_path / 'package'
    shutil.copytree(Path(mmearth.__file__).parent, package, ignore=shutil.ignore_patterns('__pycache__'))
    assert _code(folder=package) == _code()
    for name, counts in dict(laboratory=False, figures=False, logistic=True, convnext=True, store=True, fast=True).items():
        with (package / f'{name}.py').open('a') as f: f.write('# changed\n')
        assert (_code(folder=package) != _code()) == counts
        if counts: shutil.copy(Path(mmearth.__file__).parent / f'{name}.py', package)


def test_questions_are_read_off_the_store(tmp_path):
    scenes = Store(write_store(tmp_path / 'scenes', 40, seed=1, labelled=True))
    asked, rows = questions(scenes, np.arange(40)), np.arange(40)
    cover = scenes.read(rows, ['dynamic_world'])['dynamic_world']
    for i in rows:
        codes, counts = np.unique(cover[i][cover[i] > 0], return_counts=True)
        assert asked['main cover'][i] == (codes[counts.argmax()] if len(codes) else -1)
    height = scenes.read(rows, ['aster'])['aster'][:, 0].astype(float)
    height[np.isin(height, modality('aster').nodata_stored)] = np.nan
    known = [i for i in rows if asked['elevation'][i] >= 0]
    order = np.argsort([np.nanmean(height[i]) for i in known], kind='stable')
    assert (np.diff(asked['elevation'][known][order]) >= 0).all()
    with pytest.raises(RecipeError, match='no labels'): questions(Store(write_store(tmp_path / 'tiles', 8)), np.arange(8))
    for bad in (('lat', 'lon'), ('sentinel2',)):
        with pytest.raises(RecipeError, match='at least one more'): arms(bad)
