"Synthetic Earth: the released layout to the byte, one cause behind all modalities, and no half stores."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from mmearth import synthetic
from mmearth.modalities import ECOREGION_BIOME, S2_MASKS, TASKS, modality, valid
from mmearth.synthetic import SCENES, land, planet, scene, write_store


def read(root):
    "All datasets and side files of a store, by name."
    h5, = root.glob('*.h5')
    with h5py.File(h5) as h: arrays = {name: d[:] for name, d in h.items()}
    side = {f.stem.removeprefix(h5.stem + '_'): json.loads(f.read_text()) for f in root.glob('*.json')}
    return arrays, side


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "40 tiles of 64 pixels, and where they are."
    root = write_store(tmp_path_factory.mktemp('synthetic') / 'store', 40)
    return root, *read(root)


@pytest.fixture(scope='module')
def crowd(tmp_path_factory):
    "600 small tiles, for rates and statistics."
    return read(write_store(tmp_path_factory.mktemp('synthetic') / 'crowd', 600, size=16))


def test_layout_is_that_of_the_real_store(store, shared):
    stem = 'data_mini_v001_64'
    with h5py.File(next(store[0].glob('*.h5'))) as ours, h5py.File(shared / stem / f'{stem}.h5') as theirs:
        assert set(ours) == set(theirs)
        for name in theirs:
            a, b = ours[name], theirs[name]
            assert (a.dtype, a.ndim, a.shape[1:], a.chunks, a.compression, dict(a.attrs)) == (b.dtype, b.ndim, b.shape[1:], b.chunks, b.compression, dict(b.attrs)), name
        assert dict(ours.attrs) == dict(theirs.attrs)
    theirs = {f.stem.removeprefix(stem + '_'): json.loads(f.read_text()) for f in (shared / stem).glob('*.json')}
    ours = store[2]
    assert set(ours) == set(theirs) and list(ours['splits']) == list(theirs['splits'])
    assert set(ours['tile_info']['0']) >= set(theirs['tile_info']['0']) - {'source'}
    assert list(ours['tile_info']['0']['BANDS']) == list(theirs['tile_info']['0']['BANDS'])
    assert set(ours['band_stats']) >= set(theirs['band_stats'])
    for key, entry in theirs['band_stats'].items():
        assert {k: len(v) for k, v in ours['band_stats'][key].items()} == {k: len(v) for k, v in entry.items()}, key


def test_layout_is_that_of_the_table(store):
    with h5py.File(next(store[0].glob('*.h5'))) as h:
        assert set(h) == {*TASKS, *S2_MASKS, 'metadata'}
        for m in map(modality, TASKS + S2_MASKS):
            d = h[m.name]
            assert (d.shape, d.dtype, d.chunks, d.compression) == ((40, *m.shape(64)), m.dtype, (1, *m.shape(64)), 'gzip')
        assert h['metadata'].dtype == np.dtype([('tile_id', 'S100'), ('S2_type', 'S10')])
    assert sorted(f.name for f in store[0].iterdir()) == [f'data_synthetic_v001_64{end}' for end in ('.h5', '_band_stats.json', '_splits.json', '_tile_info.json')]
    assert store[2]['splits'] == {'train': list(range(40)), 'val': [], 'test': []}
    wanted = {m.stats_key(level) for m in map(modality, TASKS + S2_MASKS) if m.kind == 'continuous' for level in ('l1c', 'l2a')}
    assert set(store[2]['band_stats']) == wanted


def test_same_arguments_same_tiles(store, tmp_path):
    arrays, side = read(write_store(tmp_path / 'again', 40))
    for name, a in store[1].items(): np.testing.assert_array_equal(a, arrays[name], err_msg=name)
    assert json.dumps(side) == json.dumps(store[2])


def test_first_tiles_do_not_depend_on_their_number(store, tmp_path):
    arrays, side = read(write_store(tmp_path / 'few', 7))
    for name, a in arrays.items(): np.testing.assert_array_equal(a, store[1][name][:7], err_msg=name)
    assert all(side['tile_info'][key] == store[2]['tile_info'][key] for key in side['tile_info'])


def test_another_seed_is_another_place_and_another_world_another_planet(crowd, tmp_path):
    other = read(write_store(tmp_path / 'seed', 60, size=16, seed=1))[1]['tile_info'].values()
    places = {(round(t['lat'], 3), round(t['lon'], 3)) for t in crowd[1]['tile_info'].values()}
    assert len(places) > 590 and not places & {(round(t['lat'], 3), round(t['lon'], 3)) for t in other}
    cell = lambda t: (int((90 - t['lat']) * 2), int((t['lon'] + 180) * 2))
    assert all(planet(0).biome[cell(t)] == t['biome'] for t in other)
    assert np.mean(planet(0).biome == planet(1).biome) < 0.8


def test_every_biome_and_many_ecoregions(crowd):
    arrays, side = crowd
    assert (arrays['biome'].sum(0) > 15).all() and (arrays['eco_region'].sum(0) > 0).sum() > 250
    for info, biome, region in zip(side['tile_info'].values(), arrays['biome'], arrays['eco_region']):
        assert biome.sum() == region.sum() == 1
        assert info['biome'] == biome.argmax() == ECOREGION_BIOME[region.argmax()] and info['eco_region'] == region.argmax()


def test_holes_carry_the_codes_of_the_released_files(crowd):
    arrays, _ = crowd
    level = arrays['metadata']['S2_type']
    for name, code in (('aster', -32768), ('canopy_height_eth', -128), ('canopy_height_eth', 127), ('dynamic_world', 0), ('esa_worldcover', 0)):
        share = np.mean(arrays[name] == code)
        assert 0 < share < 0.25, (name, code, share)
    assert 0 < np.isnan(arrays['era5']).all(1).mean() < 0.05
    s1 = arrays['sentinel1']
    missing = np.isneginf(s1).mean((0, 2, 3))
    assert np.isfinite(s1[~np.isneginf(s1)]).all() and (missing[[2, 3, 6, 7]] > 0.9).all() and (0.01 < missing[[0, 1, 4, 5]]).all() and (missing[[0, 1, 4, 5]] < 0.2).all()
    l2a = level == b'l2a'
    assert 0.15 < l2a.mean() < 0.5 and arrays['sentinel2'][l2a, 10].max() == 0 < arrays['sentinel2'][~l2a, 10].min(where=arrays['sentinel2'][~l2a, 0] > 0, initial=9)
    assert (arrays['sentinel2_scl'][~l2a] == 255).all() and (arrays['sentinel2_cloudprod'][~l2a] == 65535).all()
    assert (arrays['sentinel2_scl'][l2a] < 12).all() and 0 < (arrays['sentinel2_cloudprod'][l2a] == 65535).mean() < 0.15
    assert set(np.unique(arrays['sentinel2_cloudmask'])) == {0, 1024, 2048}
    for m in map(modality, TASKS): assert valid(m, arrays[m.name]).mean() > (0.4 if m.name == 'sentinel1' else 0.8), m.name


def test_statistics_leave_holes_out(crowd):
    arrays, side = crowd
    stats, level = side['band_stats'], arrays['metadata']['S2_type'].astype(str)
    assert stats['aster']['min'][0] > -500 and stats['canopy_height_eth']['max'][0] < 100 and stats['canopy_height_eth']['min'][0] >= 0
    assert all(np.isnan(stats['sentinel2_l2a'][k][10]) for k in ('mean', 'std', 'min', 'max')) and np.isfinite(stats['era5']['mean']).all()
    for key, raw in (('sentinel2_l2a', arrays['sentinel2'][level == 'l2a']), ('sentinel1', arrays['sentinel1'])):
        m = modality(key.removesuffix('_l2a'))
        band = raw[:, 1][valid(m, raw)[:, 1]].astype('float64')
        np.testing.assert_allclose([stats[key][k][1] for k in ('mean', 'std', 'min', 'max')], [band.mean(), band.std(), band.min(), band.max()], rtol=1e-6)


def test_tile_info_agrees_with_the_arrays(crowd):
    arrays, side = crowd
    for row, (key, t) in enumerate(side['tile_info'].items()):
        assert key == str(row) == arrays['metadata'][row][0].decode() and t['S2_type'] == arrays['metadata'][row][1].decode()
        np.testing.assert_allclose(np.degrees(np.arctan2(*arrays['lat'][row])), t['lat'], atol=1e-3)
        np.testing.assert_allclose(np.degrees(np.arctan2(*arrays['lon'][row])), t['lon'], atol=1e-3)
        angle = 2 * np.pi * int(t['S2_DATE'][5:7]) / 12
        np.testing.assert_allclose(arrays['month'][row], (np.sin(angle), np.cos(angle)), atol=1e-5)
        assert t['CRS'] == f"EPSG:{326 if t['lat'] >= 0 else 327}{int((t['lon'] + 180) // 6) + 1:02d}" and '2017-01-01' <= t['S2_DATE'] <= '2020-12-28'
        for orbit, first in (('asc', 0), ('desc', 4)):
            there = [p for p, plane in zip(('VV', 'VH', 'HH', 'HV'), arrays['sentinel1'][row, first:first + 4]) if np.isfinite(plane).all()]
            assert (t['BANDS'][f'sentinel1_{orbit}'] or []) == there
        assert ('B10' in t['BANDS']['sentinel2']) == (t['S2_type'] == 'l1c') and t['BANDS']['sentinel2'][-1] == 'QA60'
        assert ('MSK_CLDPRB' in t['BANDS']['sentinel2']) == (arrays['sentinel2_cloudprod'][row] != 65535).any()
        numbers = np.array(t['era5']['month1'] + t['era5']['month2'] + t['era5']['year'], float)
        np.testing.assert_array_equal(numbers.astype('float32'), arrays['era5'][row])
        assert t['BANDS']['era5'][4].startswith(t['S2_DATE'][:7].replace('-', '')) and len(t['BANDS']['era5']) == 12


def test_seasons_are_half_a_year_apart_and_years_are_consistent(crowd):
    arrays, side = crowd
    info = pd.DataFrame(side['tile_info'].values())
    month, warmth = info.S2_DATE.str[5:7].astype(int), pd.Series(arrays['era5'][:, 4] - arrays['era5'][:, 8])  # this month against the year
    far, ok = info.lat.abs() > 30, np.isfinite(arrays['era5'][:, 0])
    assert warmth[ok & far & (info.lat > 0) & month.isin([6, 7, 8])].mean() > 5 > -5 > warmth[ok & far & (info.lat < 0) & month.isin([6, 7, 8])].mean()
    e = arrays['era5'][ok].reshape(-1, 3, 4)
    assert (e[..., 1] < e[..., 0]).all() and (e[..., 0] < e[..., 2]).all() and (e[..., 3] > 0).all()
    assert (e[:, 2, 1] <= e[:, :2, 1].min(1)).all() and (e[:, 2, 2] >= e[:, :2, 2].max(1)).all() and (e[:, 2, 3] >= e[:, :2, 3].max(1)).all()


def test_slope_is_that_of_the_heights(store):
    aster = store[1]['aster'][(store[1]['aster'] != -32768).all((1, 2, 3))].astype(float)
    gy, gx = np.gradient(aster[:, 0], 10, axis=(1, 2))
    slope = np.degrees(np.arctan(np.hypot(gx, gy)))
    assert np.corrcoef(slope.ravel(), aster[:, 1].ravel())[0, 1] > 0.9


def fitted(x, y, shuffle=False):
    "R2 on the last third of least squares fitted to the first two; rows of the target shuffled for the null."
    ok = np.isfinite(y)
    x, y = np.c_[x, np.log1p(x), np.ones(len(x))][ok], y[ok]
    n = len(y) * 2 // 3
    w = np.linalg.lstsq(x[:n], np.random.default_rng(0).permutation(y[:n]) if shuffle else y[:n], rcond=None)[0]
    return 1 - np.mean((y[n:] - x[n:] @ w)**2) / y[n:].var()


def test_modalities_predict_each_other_but_not_trivially(crowd):
    arrays, _ = crowd
    s2 = np.delete(arrays['sentinel2'], 10, 1).astype(float)
    pixels = s2[:, :, 2::4, 2::4].transpose(0, 2, 3, 1).reshape(-1, 12)
    canopy, vh = (arrays[name][:, band, 2::4, 2::4].ravel().astype(float) for name, band in (('canopy_height_eth', 0), ('sentinel1', 1)))
    canopy[np.isin(canopy, (127, -128))] = np.nan
    vh[np.isneginf(vh)] = np.nan
    for name, x, y in (('temperature', s2.mean((2, 3)), arrays['era5'][:, 4].astype(float)), ('canopy', pixels, canopy), ('VH', pixels, vh)):
        found, null = fitted(x, y), fitted(x, y, shuffle=True)
        assert 0.3 < found < 0.97 and found > null + 0.3, (name, found, null)


def test_land_cover_maps_agree_mostly_and_not_always(crowd):
    arrays, _ = crowd
    dw, esa = arrays['dynamic_world'].ravel(), arrays['esa_worldcover'].ravel()
    for a, b in ((1, 80), (2, 10), (5, 40), (7, 50)):
        assert 0.5 < np.mean(esa[dw == a] == b) < (1 if a > 1 else 1.01)


def test_an_existing_store_is_never_overwritten(store, tmp_path):
    before = {f.name: f.stat().st_mtime_ns for f in store[0].iterdir()}
    with pytest.raises(FileExistsError, match='not empty'): write_store(store[0], 4)
    assert {f.name: f.stat().st_mtime_ns for f in store[0].iterdir()} == before
    (tmp_path / 'file').write_text('kept')
    with pytest.raises(FileExistsError): write_store(tmp_path / 'file', 4)
    assert (tmp_path / 'file').read_text() == 'kept'
    for n, size in ((0, 64), (-3, 64), (1, 0), (1, -64), (1, 8), (1, 33)):
        with pytest.raises(ValueError, match='at least one tile, of 16 pixels or a larger multiple of 8'): write_store(tmp_path / 'none', n, size)
    assert not list(tmp_path.glob('*none*'))
    (tmp_path / 'empty').mkdir()
    assert len(list(write_store(tmp_path / 'empty', 1, size=16, stem='mine').glob('mine*'))) == 4


def test_processes_write_the_same_store(tmp_path):
    stores = [write_store(tmp_path / f'store{workers}', 70, size=16, seed=3, labelled=True, workers=workers) for workers in (0, 2)]
    one, two = ({f.name: f.read_bytes() for f in root.iterdir() if f.suffix != '.h5'} for root in stores)
    assert one == two
    with h5py.File(next(stores[0].glob('*.h5'))) as a, h5py.File(next(stores[1].glob('*.h5'))) as b:
        assert set(a) == set(b)
        for name in a: assert a[name][()].tobytes() == b[name][()].tobytes(), name


def test_a_failing_writer_leaves_nothing(tmp_path, monkeypatch):
    calls, observe = [], synthetic.observe
    def failing(t):
        calls.append(t)
        if len(calls) == 2: raise OSError('disk full')
        return observe(t)
    monkeypatch.setattr(synthetic, 'observe', failing)
    with pytest.raises(OSError, match='disk full'): write_store(tmp_path / 'store', 40, size=16)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_store(tmp_path):
    code = f"from mmearth.synthetic import write_store; write_store({str(tmp_path / 'store')!r}, 100000, size=16)"
    with subprocess.Popen([sys.executable, '-c', code], cwd=Path(__file__).parents[1]) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob('.store*/store/*.h5')) and time.monotonic() < deadline: time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob('.store*')) and not (tmp_path / 'store').exists()
    assert write_store(tmp_path / 'store', 2, size=16).is_dir()


def test_labelled_scenes(tmp_path):
    root = write_store(tmp_path / 'scenes', 60, size=32, labelled=True, seed=5)
    labels, tiles = pd.read_csv(root / 'data_synthetic_v001_32_labels.csv'), read(root)[1]['tile_info']
    assert list(labels) == ['tile_id', 'row', 'label', 'split'] and labels.row.tolist() == labels.tile_id.tolist() == list(range(60))
    assert (labels.label.value_counts() == 6).all() and labels.label.nunique() == 10
    targets, attempts = synthetic.search(0, 5, np.arange(32), 32)
    t = land(0, 5, np.arange(32), 32, attempts, targets)
    assert SCENES['scene'][scene(t)].tolist() == labels.label[:32].tolist()
    few = pd.read_csv(write_store(tmp_path / 'few', 11, size=32, labelled=True, seed=5) / 'data_synthetic_v001_32_labels.csv')
    pd.testing.assert_frame_equal(few, labels[:11])
    assert labels.label.str.cat(labels.row.mod(10).astype(str)).nunique() > 10  # turns are shuffled
    assert {t['S2_type'] for t in tiles.values()} == {'l1c', 'l2a'}


def test_test_regions_are_whole_blocks(tmp_path):
    root = write_store(tmp_path / 'scenes', 300, size=16, labelled=True)
    labels, tiles = pd.read_csv(next(root.glob('*_labels.csv'))), pd.DataFrame(read(root)[1]['tile_info'].values())
    shares = labels.split.value_counts(normalize=True)
    assert set(shares.index) == {'train', 'val', 'test_image', 'test_region'} and 0.5 < shares['train'] < 0.7 and (shares > 0.05).all()
    blocks = pd.DataFrame(dict(held=labels.split == 'test_region', lat=np.floor(tiles.lat / 6), lon=np.floor(tiles.lon / 6))).groupby(['lat', 'lon']).held
    assert (blocks.nunique() == 1).all() and (blocks.size() > 1).sum() > 20


def test_other_sizes(tmp_path):
    arrays, _ = read(write_store(tmp_path / 'wide', 2, size=128))
    assert arrays['sentinel2'].shape == (2, 13, 128, 128) and arrays['sentinel2'].std() > 0
