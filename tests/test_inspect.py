"Errata, copies, overlaps and reports: every defect planted in a store is found, and nothing else."
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest

from mmearth.errata import ERRATA
from mmearth.inspect import errata, inspect, overlaps, read_places, sound_rows, write_report
from mmearth.modalities import modality
from mmearth.store import Store
from mmearth.synthetic import write_store


@pytest.fixture(scope='module')
def clean(tmp_path_factory): return write_store(tmp_path_factory.mktemp('clean') / 'earth', n=20, size=16, seed=2)


@pytest.fixture
def root(clean, tmp_path): return shutil.copytree(clean, tmp_path / 'earth')


def records(root, change):
    "Rewrites the tile information."
    path = next(root.glob('*_tile_info.json'))
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def found(store): return errata(store).set_index('id').rows


def test_every_erratum_is_looked_for(clean):
    frame = errata(Store(clean))
    assert frame.id.tolist() == [e['id'] for e in ERRATA]
    assert frame.tiles.isna().eq(frame.detectable == 'no').all()
    for e in frame.itertuples():
        if e.detectable == 'tile': assert len(e.rows) == e.tiles
    assert frame.set_index('id').tiles[['band-shift', 'unknown-codes', 'month-differs', 'place-differs', 'class-vector', 'sentinel2-blank', 'duplicate-pixels',
                                        'duplicate-places', 'date-missing', 'sentinel1-record']].sum() == 0


def test_the_band_shift_is_told_from_the_record(root):
    "A tile of L2A without MSK_CLDPRB, whatever it holds; a record without any mask is not the converter's."
    before = Store(root)
    l2a, l1c = (np.flatnonzero(before.levels == l) for l in ('l2a', 'l1c'))
    def change(info):
        for r in l2a[:2]: info[before.tile_ids[r]]['BANDS']['sentinel2'].remove('MSK_CLDPRB')
        for r in (l2a[2], l1c[0]): info[before.tile_ids[r]]['BANDS']['sentinel2'] = ['B2', 'B3']
    records(root, change)
    store = Store(root)
    assert found(store)['band-shift'].tolist() == l2a[:2].tolist()
    assert sound_rows(store).tolist() == np.setdiff1d(np.arange(20), l2a[:2]).tolist()
    assert sound_rows(store, [l2a[0], 3, l1c[0], 3]).tolist() == [r for r in (3, l1c[0], 3) if r not in l2a[:2]]
    assert sound_rows(store, []).tolist() == []
    for bad in ([20], [-1]): pytest.raises(IndexError, sound_rows, store, bad)


def test_what_is_planted_is_found(root):
    store = Store(root)
    was = {k: set(v.tolist()) for k, v in found(store).items()}
    store.close()
    with h5py.File(store.path, 'a') as f:
        for name, row, code in (('aster', 4, -32768), ('canopy_height_eth', 5, 127), ('canopy_height_eth', 6, -128), ('esa_worldcover', 7, 255), ('esa_worldcover', 8, 0), ('dynamic_world', 9, 77)):
            tile = f[name][row]
            tile[0, 3, 2] = code
            f[name][row] = tile
        f['month'][10], f['lat'][11], f['biome'][12], f['sentinel2'][13] = np.roll(f['month'][10], 1), -f['lat'][11][::-1], 0, 0
        f['sentinel2'][15] = f['sentinel2'][14]
        f['sentinel1'][16, :4] = -np.inf
    def change(info):
        info[store.tile_ids[17]].update(lat=info[store.tile_ids[18]]['lat'], lon=info[store.tile_ids[18]]['lon'])
        info[store.tile_ids[19]]['S2_DATE'] = '2016-05-01'
        info[store.tile_ids[0]]['S2_DATE'] = None
        info[store.tile_ids[16]]['BANDS'].update(sentinel1_asc=['VV', 'VH'])
    records(root, change)
    new = {k: set(v.tolist()) - was[k] for k, v in found(Store(root)).items()}
    expected = {'aster-saturated': {4}, 'canopy-saturated': {5, 6} - was['canopy-saturated'], 'worldcover-holes': {7, 8}, 'unknown-codes': {9}, 'place-differs': {11, 17}, 'class-vector': {12},
                'sentinel2-blank': {13}, 'duplicate-pixels': {14, 15}, 'duplicate-places': {17, 18}, 'tiles-overlap': {17, 18}, 'date-missing': {0, 19}, 'sentinel1-record': {16} - was['sentinel1-record']}
    for key, rows in expected.items(): assert new[key] == rows, key
    assert 10 in new['month-differs']
    for key in ('band-shift', 'era5-thirteen-months'): assert not new[key], key


def test_blank_tiles_are_not_copies(root):
    with h5py.File(next(root.glob('*.h5')), 'a') as f: f['sentinel2'][3:6] = 0
    r = inspect(Store(root))
    assert r['duplicates']['pixels'] == dict(tiles=0, groups=0, surplus=0, examples=[])


def test_a_report_counts_what_numpy_counts(clean):
    store = Store(clean)
    r, raw = inspect(store), store.read(range(20))
    assert json.loads(json.dumps(r)) == r
    assert set(r) == {'tiles', 'size', 'stem', 'fingerprint', 'levels', 'splits', 'months', 'biomes', 'eco_regions', 'nodata', 'classes', 'histograms', 'duplicates', 'errata', 'leakage'}
    assert r['levels'] == {l: int((store.levels == l).sum()) for l in ('l1c', 'l2a')} and r['leakage'] is None
    assert sum(sum(v.values()) for v in r['months'].values()) == sum(r['biomes'].values()) == sum(r['eco_regions'].values()) == 20
    assert r['nodata']['aster'] == {b: float((raw['aster'][:, i] == -32768).mean()) for i, b in enumerate(('elevation', 'slope'))}
    assert r['nodata']['sentinel1']['asc_VV'] == float((~np.isfinite(raw['sentinel1'][:, 0])).mean())
    for name in ('dynamic_world', 'esa_worldcover', 'sentinel2_scl'):
        assert r['classes'][name] == {c.name: int((raw[name] == c.code).sum()) for c in modality(name).classes}
    height = raw['canopy_height_eth'][:, 0]
    height = height[(height != -128) & (height != 127)]
    h = r['histograms']['canopy_height_eth/height']
    assert h['counts'] == np.histogram(height, h['edges'])[0].tolist() and len(r['histograms']) == 3 + 12


def test_processes_make_the_same_report(clean):
    store = Store(clean)
    rows = [3, 4, 4, 19, 0]
    here = inspect(store, rows)
    assert here['tiles'] == 4 and inspect(store, rows, workers=2) == here
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=':0') as cluster:
        assert inspect(store, rows, scheduler=cluster.scheduler_address) == here


def test_the_real_store(shared):
    store = Store(shared / 'data_mini_v001_64')
    r = inspect(store, labelled=store.tiles[['lat', 'lon']].iloc[[7]])
    tiles = {e['id']: e['tiles'] for e in r['errata']}
    assert (tiles['l2a-without-b10'], tiles['band-shift'], tiles['empty-splits'], tiles['duplicate-pixels']) == (378, 0, 396, 0)
    assert len(sound_rows(store)) == 396 and r['leakage']['places_met'] == 1 and 7 in r['leakage']['rows']


def brute(lat, lon, size, west, south, east, north):
    "Overlap of one tile and one box, with the definition."
    half = size * 5 / 111_195.
    top = min(abs(lat) + half, 90)
    reach = 180 if top >= 90 else min(half / np.cos(np.radians(top)), 180)
    if north < lat - half or south > lat + half: return False
    if east - west >= 360 or reach >= 180: return True
    width, start, end = (east - west) % 360, lon - reach, lon + reach
    return any(west <= end + turn and west + width >= start + turn for turn in (-720, -360, 0, 360, 720))


def test_overlaps_against_brute_force():
    rng = np.random.default_rng(0)
    lat = np.concatenate([rng.uniform(-90, 90, 100), 90 - .02 * rng.random(20), -90 + .01 * rng.random(10), [0, 0, np.nan]])
    lon = np.concatenate([rng.uniform(-180, 180, 130), [179.9999, -180, 5]])
    places = []
    for _ in range(150):
        s, w = rng.uniform(-90, 89), rng.uniform(-180, 180)
        places.append((w, s, (w + rng.choice([.01, 3, 90, 200]) + 180) % 360 - 180, min(s + rng.choice([.01, 2, 60]), 90)))
    near = rng.choice(130, 150)
    places += [(lon[i] + a, lat[i] + b, lon[i] + a, lat[i] + b) for i, a, b in zip(near, rng.normal(0, .004, 150), rng.normal(0, .004, 150)) if abs(lat[i] + b) <= 90]
    places += [(-180, -90, 180, 90), (180, 0, 180, 0), (170, -1, -170, 1)]
    boxes = pd.DataFrame(places, columns=['west', 'south', 'east', 'north'])
    for size in (64, 128):
        got = overlaps(lat, lon, size, boxes)
        want = [(i, j) for j, p in enumerate(places) for i in range(len(lat)) if np.isfinite(lat[i]) and brute(lat[i], lon[i], size, *p)]
        assert list(got.itertuples(index=False, name=None)) == want
        assert got.equals(overlaps(lat, lon, size, boxes, chunk=7))


def test_points_inside_and_outside_a_tile():
    for lat, lon in ((0, 0), (60, 179.9999), (-33, -180), (78, 20)):
        side = 640 / 111_195.
        for share, inside in ((.99, True), (1.01, False)):
            for up, right in ((share, 0), (-share, 0), (0, share), (0, -share)):
                place = pd.DataFrame(dict(lat=[lat + up * side], lon=[(lon + right * side / np.cos(np.radians(lat)) + 180) % 360 - 180]))
                assert (len(overlaps([lat], [lon], 128, place)) == 1) == inside, (lat, lon, share, up, right)
    assert len(overlaps([0], [0], 128, pd.DataFrame(dict(lat=[0.006], lon=[0])))) == 0
    assert len(overlaps([0], [0], 128, pd.DataFrame(dict(lat=[0.006], lon=[0])), margin=50)) == 1


def test_bad_places():
    good = dict(west=[0.], south=[0.], east=[1.], north=[1.])
    for bad in (dict(south=[2.]), dict(west=[np.nan]), dict(north=[91.]), dict(east=[1000.])):
        with pytest.raises(ValueError, match='labelled place 0'): overlaps([0], [0], 64, pd.DataFrame(good | bad))
    with pytest.raises(ValueError, match='lat, lon or west'): overlaps([0], [0], 64, pd.DataFrame(dict(x=[0])))
    assert len(overlaps([], [], 64, pd.DataFrame(good))) == len(overlaps([0], [0], 64, pd.DataFrame(good).iloc[:0])) == 0


@pytest.mark.parametrize('head', ['lat,lon', 'Latitude,LNG', 'y,x', ' LAT , Longitude', '\ufefflat,lon', 'lat,long'])
def test_places_by_the_usual_names(tmp_path, head):
    (tmp_path / 'p.csv').write_text(f'{head}\n\n47,10.5\n', encoding='utf-8')
    assert read_places(tmp_path / 'p.csv').to_dict('list') == dict(lat=[47], lon=[10.5])


def test_degrees_are_taken_before_coordinates_called_x_and_y(tmp_path):
    (tmp_path / 'p.csv').write_text('x,y,Latitude,lon\n5,6,47,10.5\n')
    assert read_places(tmp_path / 'p.csv').to_dict('list') == dict(lat=[47], lon=[10.5])


@pytest.mark.parametrize('text, words', [
    ('lat,lon\n1,2\n\n\n3,abc\n', "line 5, column lon: 'abc' is no number"), ('Latitude,LNG\n1,2\n3,\n', "line 3, column LNG: ''"),
    ('id,lat,lon\n"a\nb",1,2\nc,q,2\n', "line 4, column lat: 'q'"), ('lat,lon\n95,10\n', "line 2, column lat: '95' is no number from -90 to 90"),
    ('lat,lon\n1,nan\n', 'line 2, column lon'), ('lat,lon\n1\n', 'line 2, column lon'), ('xmin,ymin,xmax,ymax\n1,5,2,4\n', 'line 2, columns ymin and ymax'),
    ('', 'there are none'), ('lat;lon\n1;2\n', 'joined by commas, are needed; there are lat;lon'), (None, 'not readable as CSV')])
def test_a_bad_table_of_places_is_named_by_file_line_and_column(tmp_path, text, words):
    path = tmp_path / 'p.csv'
    if text is not None: path.write_text(text)
    with pytest.raises(ValueError, match=f'p.csv: .*{words}'): read_places(path)


def test_a_million_tiles_and_twenty_thousand_places():
    rng = np.random.default_rng(0)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 1_200_000))), rng.uniform(-180, 180, 1_200_000)
    picked = rng.choice(1_200_000, 20_000)
    pairs = overlaps(lat, lon, 128, pd.DataFrame(dict(lat=lat[picked], lon=lon[picked])))
    assert pairs.labelled.nunique() == 20_000 and set(picked) <= set(pairs.row) and len(pairs) < 25_000


def test_a_page_to_read(clean, tmp_path):
    store = Store(clean)
    r = inspect(store, labelled=pd.DataFrame(dict(lat=[0.], lon=[0.])))
    page = write_report(r, tmp_path / 'deep' / 'report')
    text = page.read_text()
    assert json.loads((page.parent / 'inspect.json').read_text()) == r
    for e in r['errata']: assert e['id'] in text
    assert '0 of 1 places' in text and all(line.count('|') > 2 for line in text.split('\n') if line.startswith('|'))
    for head in ('| biome | tiles |', '| ecoregion | tiles |', '| month | tiles |', '| class | pixels |'): assert head in text, head
    assert '--labelled places.csv' not in text
    assert '`mmearth inspect DIR --labelled places.csv`' in write_report(inspect(store, [0]), tmp_path / 'unasked').read_text()
    write_report(inspect(store, []), tmp_path / 'none')
    assert '0 tiles' in (tmp_path / 'none' / 'inspect.md').read_text()


def test_rows_that_do_not_exist(clean):
    for rows in ([20], [-1, 3]): pytest.raises(IndexError, inspect, Store(clean), rows)


def test_a_store_with_few_modalities(root):
    with h5py.File(next(root.glob('*.h5')), 'a') as f:
        for name in ('sentinel1', 'aster', 'biome', 'month', 'era5', 'esa_worldcover', 'sentinel2_scl', 'dynamic_world', 'canopy_height_eth', 'lat', 'sentinel2'): del f[name]
    r = inspect(Store(root))
    assert r['duplicates']['pixels'] is None and r['histograms'] == {} and 'sentinel2_cloudmask' in r['nodata']
