"The atlas: what is drawn is what was counted; poor reports and poor data are named or drawn as holes."
import copy
import json

import numpy as np
import pandas as pd
import pytest

from mmearth import atlas
from mmearth.inspect import inspect
from mmearth.modalities import BIOMES
from mmearth.store import Store

PAGE = (atlas.months, atlas.levels, atlas.land_cover, atlas.biome_counts, atlas.climate, atlas.heights, atlas.holes)


@pytest.fixture(scope='module')
def report(tiny_store): return inspect(Store(tiny_store))


@pytest.mark.parametrize('draw', PAGE, ids=lambda f: f.__name__)
def test_every_figure_is_eight_inches_and_says_what_it_is_of(report, tmp_path, draw):
    fig = draw(json.loads(json.dumps(report)))
    fig.savefig(tmp_path / 'x.png')
    assert fig.get_size_inches()[0] == 8 and fig._suptitle.get_text() == 'Synthetic Earth, 24 tiles'
    real = draw(dict(report, stem='data_1M_v001_64'))
    assert real._suptitle.get_text() == 'data_1M_v001_64, 24 tiles'


@pytest.mark.parametrize('draw', PAGE, ids=lambda f: f.__name__)
def test_what_was_not_inspected_is_named(draw):
    with pytest.raises(KeyError, match='poor'): draw(dict(stem='poor', tiles=3))


def test_density():
    rng = np.random.default_rng(0)
    tiles = pd.DataFrame(dict(lat=np.r_[rng.uniform(-50, 80, 500), np.nan, np.full(40, 10.5)], lon=np.r_[rng.uniform(-180, 180, 500), 3, np.full(20, 180.2), np.full(20, -179.8)]))
    fig = atlas.density(tiles, step=1)
    drawn = fig.axes[0].collections[0].get_array()
    assert drawn.sum() == 540 and drawn.max() >= 40 and drawn.mask.any()
    assert fig.axes[0].get_ylim() == (-60, 85) and atlas.density(tiles.assign(lat=-89.9)).axes[0].get_ylim()[0] == -90
    europe = atlas.density(tiles.assign(lat=50., lon=tiles.lon / 20)).axes[0]
    assert -25 < europe.get_xlim()[0] < -9
    with pytest.raises(ValueError, match='none of 1 tiles'): atlas.density(tiles.iloc[500:501].assign(lat=np.nan))


def test_month_bars(report):
    fig = atlas.months(report)
    bars = [p.get_height() for p in fig.axes[0].patches]
    assert len(bars) == 48 and sum(bars) == 24
    stacked = [p.get_height() for p in atlas.months(report, by_level=True).axes[0].patches]
    assert sum(stacked[:48]) == report['levels']['l1c'] and sum(stacked[48:]) == report['levels']['l2a']
    quoted = atlas.months(report, quoted=atlas.paper_months()).axes[0].patches
    assert len(quoted) == 96 and not quoted[-1].get_fill() and sum(p.get_height() for p in quoted[48:]) == pytest.approx(24)
    said = [atlas.months(report, quoted=atlas.paper_months() * f).axes[0].get_legend().get_texts()[-1].get_text() for f in (1, 24 / 1_244_000, 5 / 1_244_000)]
    assert said == ['paper, digitised, divided by 52,000', 'paper, digitised', 'paper, digitised, times 4.8']


def test_months_of_other_years(report):
    other = dict(report, tiles=9, months={'2015-12': dict(l1c=2, l2a=0), '2021-01': dict(l1c=0, l2a=3)})
    fig = atlas.months(other)
    assert len(fig.axes[0].patches) == 7 * 12 and any('4 tiles without a date' in t.get_text() for t in fig.axes[0].texts)
    none = atlas.months(dict(report, tiles=5, months={}), quoted=atlas.paper_months()).axes[0]
    assert not none.patches and {t.get_text() for t in none.texts} == {'no data', '5 tiles without a date'}


def test_paper_months_are_as_quoted():
    paper = atlas.paper_months()
    assert paper.index.tolist() == [f'{y}-{m:02}' for y in range(2017, 2021) for m in range(1, 13)]
    assert paper['2018-07'] == 35690 and abs(paper.sum() - 1_244_000) < 1000


def test_level_shares(report):
    widths = np.array([p.get_width() for p in atlas.levels(report).axes[0].patches]).reshape(-1, 2)
    np.testing.assert_allclose(widths.sum(1), 1)
    assert widths[-1, 1] == pytest.approx(report['levels']['l2a'] / 24)


def test_class_shares(report):
    axes = atlas.land_cover(report).axes
    for ax, name in zip(axes, ('dynamic_world', 'esa_worldcover')):
        counts = np.array(list(report['classes'][name].values()))
        np.testing.assert_allclose([p.get_width() for p in ax.patches], 100 * counts / counts.sum())
    bare = copy.deepcopy(report)
    bare['classes']['esa_worldcover'] = dict.fromkeys(bare['classes']['esa_worldcover'], 0)
    assert [t.get_text() for t in atlas.land_cover(bare).axes[1].texts] == ['no data']
    del bare['classes']['esa_worldcover']
    assert len(atlas.land_cover(bare).axes) == 1


def test_biomes_all_named(report):
    ax = atlas.biome_counts(report).axes[0]
    assert {t.get_text() for t in ax.get_yticklabels()} == set(BIOMES)
    assert sum(p.get_width() for p in ax.patches) == 24


def test_histograms_in_units(report):
    temperature, rain = atlas.climate(report).axes
    assert temperature.get_xlim()[0] > -90 and temperature.get_xlim()[1] < 70
    key = 'era5/curr_month_precipitation'
    measured = np.array(report['histograms'][key]['edges'])[1:][np.array(report['histograms'][key]['counts']) > 0].max() * 1000
    assert rain.get_xlim()[1] == pytest.approx(measured, rel=.1)
    holes = atlas.climate(dict(report, histograms={}))
    assert all(ax.texts[0].get_text() == 'no data' for ax in holes.axes)


def test_hole_table(report):
    texts = {}
    ax = atlas.holes(dict(report, nodata=dict(aster=dict(elevation=0.0004, slope=1.0), lat=dict(sin_lat=0.0, cos_lat=0.123)))).axes[0]
    texts = [t.get_text() for t in ax.texts]
    assert texts == ['elev', '<0.1', 'slope', '100', 'sin lat', '0', 'cos lat', '12']
    with pytest.raises(KeyError, match='no modality'): atlas.holes(dict(report, nodata={}))


def test_a_real_store(shared):
    store = Store(shared / 'data_mini_v001_64')
    report = inspect(store, rows=range(0, 396, 30))
    for draw in PAGE: draw(report)
    atlas.density(store.tiles, report=report)
