"Figures draw whatever a store or a run holds, holes included."
import json
from contextlib import chdir

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mmearth import figures as f
from mmearth.modalities import TASKS, modality, valid

matplotlib.use('agg')


class Stand:
    "A store with chosen modalities, of one tile."
    size = 16

    def __init__(self, stem='stand', **arrays): self.stem, self.arrays, self.modalities = stem, arrays, list(arrays)
    def bands(self, name): return ('B4', 'B3', 'B2') if name == 'sentinel2' and len(self.arrays[name]) == 3 else modality(name).bands
    def __getitem__(self, i):
        ok = {k: valid(modality(k), v, self.bands(k)) for k, v in self.arrays.items()}
        return {**self.arrays, 'valid': ok, 'meta': dict(tile_id='7', lat=None, lon=None, date=None, level='l1c')}


@pytest.fixture(autouse=True)
def close():
    yield
    f.plt.close('all')


def titles(fig): return [a.get_title() for a in fig.axes]


def test_rgb_only_store_is_drawn_with_holes():
    store = Stand(sentinel2=np.full((3, 16, 16), 900, 'uint16'), lat=np.float32([0.6, 0.8]), lon=np.float32([0, 1]), elevation=np.float32([120]),
                  surface_temperature=np.float32([np.nan]), biome=np.eye(14, dtype='uint8')[7])
    fig = f.draw_tile(store, 0)
    fig.canvas.draw()
    holes = [t for a in fig.axes for t in a.texts if t.get_text() == 'no data']
    assert len(holes) == 9 + 3  # eight rasters and ERA5; date, month and ecoregion among the facts
    assert ('elevation', '120.0 m') in f.facts(store[0]) and not any(k == 'surface temperature' for k, _ in f.facts(store[0]))
    assert '36.87° N, 0.00° E' in titles(fig)


def test_an_empty_tile_is_all_holes():
    store = Stand(sentinel2=np.zeros((13, 16, 16), 'uint16'), sentinel1=np.full((8, 16, 16), -np.inf, 'float32'), aster=np.full((2, 16, 16), -32768, 'int16'),
                  canopy_height_eth=np.full((2, 16, 16), 127, 'int8'), dynamic_world=np.zeros((1, 16, 16), 'uint8'), esa_worldcover=np.full((1, 16, 16), 255, 'uint8'),
                  era5=np.full(12, np.nan, 'float32'), lat=np.full(2, -np.inf, 'float32'), lon=np.full(2, -np.inf, 'float32'), month=np.full(2, -np.inf, 'float32'),
                  biome=np.full(14, 255, 'uint8'), eco_region=np.full(846, 65535, 'uint16'))
    fig = f.draw_tile(store, 0)
    fig.canvas.draw()
    assert all(f.tile_layer(store, store[0], layer) is None for layer in f.LAYERS)
    assert 'Place: no data' in titles(fig)


def test_radar_takes_the_polarisation_there_is():
    radar = np.full((8, 16, 16), -np.inf, 'float32')
    radar[2:4] = -12
    store = Stand(sentinel1=radar)
    asc, desc = (f.tile_layer(store, store[0], layer) for layer in f.LAYERS[2:4])
    assert asc[2] == ('asc_HH', 'asc_HV') and desc is None


@pytest.mark.parametrize('month', range(1, 13))
def test_months_by_name(month):
    a = 2 * np.pi * month / 12
    store = Stand(sentinel2=np.ones((13, 16, 16), 'uint16'), month=np.float32([np.sin(a), np.cos(a)]))
    assert dict(f.facts(store[0]))['month'] == 'January February March April May June July August September October November December'.split()[month - 1]


def test_holes_are_transparent_and_scales_shared():
    layer = f.LAYERS[4]
    x = np.arange(16.).reshape(1, 4, 4)
    ok = x[0] > 3
    colours, scale = f.paint(layer, x, ok, (0, 100))
    assert np.array_equal(colours[..., 3] == 1, ok) and scale.get_clim() == (0, 100)
    assert f.paint(layer, np.full((1, 4, 4), 5.))[1].get_clim() == (5, 25)


def test_reconstructions_need_only_arrays():
    rng, shape = np.random.default_rng(0), (16, 16)
    true = dict(sentinel2=rng.uniform(0, 3000, (3, *shape)), aster=np.where(rng.random((2, *shape)) < 0.1, np.nan, 300), dynamic_world=rng.integers(-1, 9, shape), biome=3)
    fig = f.reconstructions(true, {k: v for k, v in true.items()}, rng.random(shape) < 0.5, dict(sentinel2=('B4', 'B3', 'B2')))
    assert [t for t in titles(fig) if t] == ['S2, true colour', 'Elevation', 'Dynamic World']
    pictures = [a.images[0].get_array() for a in fig.axes]
    np.testing.assert_array_equal(pictures[6], pictures[9])  # a perfect prediction, put together, is the original


@pytest.mark.parametrize('tasks', [('sentinel2',), ('lat', 'lon', 'slope'), TASKS])
def test_losses_of_any_set_of_tasks(tasks):
    log = pd.DataFrame({'step': [1, 2], 'samples': [4, 8], 'lr': 1e-3, 'loss': [3., 2.], **{t: [1., np.nan] for t in tasks}, **{f's_{t}': [0., 0.1] for t in tasks}, 'seconds': 1.})
    drawn = [t for t in titles(f.losses(log)) if t]
    assert drawn == [t for t in TASKS if t in tasks] + [t for t in tasks if t not in TASKS] + ['total', 'log-variance']
    plain = log[[c for c in log if not c.startswith('s_') or c == 's_']]
    if set(tasks) <= set(TASKS): assert 'log-variance' not in titles(f.losses(plain.drop(columns=[c for c in plain if c.startswith('s_')])))


def rows(arms=('random', 'all'), **more):
    return pd.DataFrame([dict(arm=a, protocol='linear', fraction=x, seed=s, split=p, metric='accuracy', value=v, low=v - 0.01, high=v + 0.01, run_id=f'{a}-{r}') | more
                         for a in arms for x in (0.05, 1.0) for s in range(2) for p in ('val', 'test_region') for r in range(2) for v in [0.5 + 0.01 * s + 0.02 * r]])


def test_label_efficiency_draws_any_arms_and_quoted_numbers():
    quoted = pd.DataFrame([dict(arm='all', split='test_region', fraction=0.05, value=0.37), dict(arm='all', split='test_region', fraction=1.0, value=0.737)])
    fig = f.label_efficiency(rows(('all', 'mystery')), quoted=quoted)
    labels = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert len(fig.axes) == 1 and labels == ['all', 'all, quoted', 'mystery']
    with pytest.raises(ValueError, match='no rows for knn'): f.label_efficiency(rows(), 'knn')


def test_figures_and_tables_repeat_to_the_byte(tmp_path):
    (tmp_path / 'data_manifest').mkdir()
    with chdir(tmp_path):
        first = {}
        for _ in range(2):
            png = f.save_figure('a', f.label_efficiency(rows()), rows().run_id, 'runs/report')
            csv = f.write_table('t', f.comparison_table(rows()))
            found = {p.name: p.read_bytes() for p in (*png.parent.iterdir(), *csv.parent.iterdir())}
            assert not first or found == first
            first = found
    assert set(first) == {'a.png', 'a.json', 't.csv', 't.md'}
    side = json.loads(first['a.json'])
    assert side == dict(maker='runs/report', run_ids=['all-0', 'all-1', 'random-0', 'random-1'], commit='unknown')


def test_outline_is_refused_when_it_is_something_else(tmp_path):
    (tmp_path / 'x.shp').write_bytes(b'not a map')
    with pytest.raises(ValueError, match='not a shapefile'): f.read_outline(tmp_path / 'x.shp')


def test_unknown_arms_get_different_colours():
    colours = f.arm_colours([f'arm {i}' for i in range(5)] + ['all'])
    assert len(set(colours.values())) == 6 and colours['all'] == '#F98E09'
