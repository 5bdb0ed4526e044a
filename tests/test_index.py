"Tile information: the stream against plain json, copies that are never believed when stale, every kind of broken record, questions, files for other tools."
import json
import os
import pickle
import random

import geopandas
import numpy as np
import pandas as pd
import pytest

import mmearth.index as index
from mmearth.index import SOURCES, StoreError, query, read_geoparquet, read_tile_info, write_geojson, write_geoparquet


@pytest.fixture(scope='module')
def records(tiny_store): return json.loads(next(tiny_store.glob('*_tile_info.json')).read_text())


@pytest.fixture
def path(tmp_path): return tmp_path / 'x_tile_info.json'


@pytest.fixture
def cached(monkeypatch, tmp_path):
    "Copies of columns are kept for files of any size; the user's cache folder is a temporary one."
    monkeypatch.setattr(index, 'CACHED_FROM', 0)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def write(path, what, **how):
    path.write_text(json.dumps(what, **how))
    return path


def many(records, n=300):
    "As many records as wanted, all different."
    kinds = list(records.values())
    return {str(i): {**kinds[i % len(kinds)], 'lat': i / 7 - 20, 'eco_region': i} for i in range(n)}


def expected(records):
    "The table, spelled out record by record."
    rows = []
    for t, r in records.items():
        bands = r.get('BANDS') or {}
        rows.append(dict(tile_id=t, level=r.get('S2_type'), date=pd.Timestamp(r['S2_DATE']) if r.get('S2_DATE') else pd.NaT, crs=r.get('CRS'), no_data=bool(r.get('NO_DATA')),
                         **{k: np.nan if r.get(k) is None else r[k] for k in ('lat', 'lon')}, **{k: -1 if r.get(k) is None else r[k] for k in ('biome', 'eco_region')},
                         **{f'has_{s}': bool(bands.get(s)) for s in SOURCES}, sentinel2_bands=','.join(bands['sentinel2']) if bands.get('sentinel2') else None))
    return pd.DataFrame(rows)


def check(tiles, records):
    want = expected(records)
    assert tiles.frame.columns.tolist() == ['tile_id', 'level', 'date', 'lat', 'lon', 'biome', 'eco_region', 'crs', 'no_data', *(f'has_{s}' for s in SOURCES), 'sentinel2_bands']
    for c in want: assert [None if pd.isna(x) else x for x in tiles.frame[c]] == [None if pd.isna(x) else x for x in want[c]], c
    assert list(tiles) == list(records) and len(tiles) == len(records)
    for t in list(records)[::max(len(records) // 20, 1)]: assert json.dumps(tiles[t]) == json.dumps(records[t])


@pytest.mark.parametrize('how', [{}, dict(indent=1), dict(separators=(',', ':')), dict(sort_keys=True)], ids=str)
def test_every_spelling_gives_the_same_columns(path, records, how, monkeypatch):
    write(path, many(records), **how)
    for window in (1 << 23, 5_000): # one window, and records cut by its edge
        monkeypatch.setattr(index, '_WINDOW', window)
        check(read_tile_info(path), json.loads(path.read_text()))


def test_bulk_and_single_readers_agree(path, records, monkeypatch):
    fast = read_tile_info(write(path, many(records)))
    assert index._many_records(path.read_bytes()[1:]) is not None
    monkeypatch.setattr(index, '_many_records', lambda data: None)
    slow = read_tile_info(path)
    pd.testing.assert_frame_equal(fast.frame, slow.frame)
    assert (fast._at == slow._at).all() and (fast._until == slow._until).all()


def test_types_of_the_columns(path, records):
    frame = read_tile_info(write(path, records)).frame
    assert frame.level.cat.categories.tolist() == ['l1c', 'l2a'] and frame.date.dtype == 'datetime64[s]' and frame.biome.dtype == frame.eco_region.dtype == 'int16'
    assert frame.no_data.dtype == frame.has_aster.dtype == bool and frame.lat.dtype == frame.lon.dtype == float and isinstance(frame.crs.dtype, pd.CategoricalDtype)
    empty = read_tile_info(write(path, {}))
    assert len(empty) == 0 and (empty.frame.dtypes.drop(['crs', 'sentinel2_bands']) == frame.dtypes.drop(['crs', 'sentinel2_bands'])).all()


def test_real_tile_information(shared):
    path = next((shared / 'data_mini_v001_64').glob('*_tile_info.json'))
    check(read_tile_info(path), json.loads(path.read_text()))


def test_what_is_missing_or_odd_but_true(path, records):
    r = records['3']
    odd = {'': {}, 'plain': dict(r, lat=float('nan'), lon=None, S2_DATE=None, biome=None, BANDS=None), 'Zürich 🛰': dict(r, CRS=None, NO_DATA=True), 'a"b\\c\n': dict(r, BANDS={}),
           '"}}, "9": {"S2_DATE': dict(r, note='}}, "8": {"S2_DATE": 1}'), 'more': dict(r, era5=None, extra={'a': [{'S2_DATE': {}}]}, **{'#': 5})}
    for escaped in (True, False): check(read_tile_info(write(path, odd, ensure_ascii=escaped)), odd)
    check(read_tile_info(write(path, {**many(records), **odd})), {**many(records), **odd})


FAULTS = {
    'no object': (lambda t: list(t), '', 'an object expected'),
    'not a record': (lambda t: t | {'7': 'l1c'}, '7', 'a JSON str, a record expected'),
    **{f'{k} = {v!r}': (lambda t, k=k, v=v: t | {'7': t['7'] | {k: v}}, '7', f'{k} is {v!r}') for k, v in (
        ('S2_type', 'L2A'), ('S2_type', 3), ('S2_DATE', '2019-02-29'), ('S2_DATE', '2019'), ('S2_DATE', 20190203), ('lat', 'north'), ('lat', 91.0), ('lat', float('inf')), ('lat', True), ('lon', 361.0),
        ('lon', [1]), ('biome', 4.5), ('biome', '4'), ('biome', True), ('biome', 70_000), ('eco_region', 10 ** 20), ('CRS', 32632), ('NO_DATA', 0), ('BANDS', ['sentinel2']))},
    'BANDS of text': (lambda t: t | {'7': t['7'] | {'BANDS': {'sentinel2': 'B1'}}}, '7', "BANDS.sentinel2 is 'B1'"),
    'BANDS of numbers': (lambda t: t | {'7': t['7'] | {'BANDS': {'aster': [1]}}}, '7', 'BANDS.aster is [1]'),
    'half a character': (lambda t: t | {'\ud800': t['7']}, '', 'not readable as JSON'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_broken_records_are_named(path, records, fault):
    change, key, words = FAULTS[fault]
    with pytest.raises(StoreError) as caught: read_tile_info(write(path, change(many(records, 20))))
    error = caught.value
    assert (error.path, error.key) == (str(path), key) and words in str(error) and error.remedy, str(error)


def test_a_tile_with_two_records(path, records):
    for place in (0, 12):
        text = json.dumps(many(records, 20))
        at = text.index(f'"{place}": ') if place else 1
        path.write_text(f'{text[:at]}"7": {json.dumps(records["7"])}, {text[at:]}')
        with pytest.raises(StoreError, match='7: this tile and 0 others have more than one record'): read_tile_info(path)


def test_cut_at_any_byte(path, records, monkeypatch):
    text = json.dumps(many(records, 6))
    for window in (1 << 23, 2_000):
        monkeypatch.setattr(index, '_WINDOW', window)
        for n in random.Random(0).sample(range(len(text)), 50):
            path.write_text(text[:n])
            with pytest.raises(StoreError, match='JSON|record'): read_tile_info(path)
    for tail in ('}', ' x', ', ', '{}'):
        path.write_text(text + tail)
        with pytest.raises(StoreError): read_tile_info(path)
    path.write_text(text[:-1] + ',}')
    with pytest.raises(StoreError): read_tile_info(path)
    path.unlink()
    with pytest.raises(StoreError, match='not readable'): read_tile_info(path)


def test_changed_at_any_byte(path, records):
    "The stream takes what json takes, with the same meaning, or refuses; where json refuses, so does the stream."
    good, dice = json.dumps(many(records, 4)).encode(), random.Random(1)
    refused = 0
    for _ in range(250):
        hurt = bytearray(good)
        for _ in range(dice.choice((1, 1, 3))): hurt[dice.randrange(len(hurt))] = dice.choice((dice.randrange(256), *b'"{}[],: 0\\'))
        path.write_bytes(hurt)
        try: want = json.loads(hurt.decode())
        except ValueError: want = None
        try: tiles = read_tile_info(path)
        except StoreError:
            refused += 1
            continue
        assert want is not None, hurt
        check(tiles, want)
    assert 50 < refused < 250


def test_garbage_early_in_a_long_file_is_found_there(path, records, monkeypatch):
    monkeypatch.setattr(index, '_WINDOW', 20_000)
    monkeypatch.setattr(index, '_LONGEST', 10_000)
    text = json.dumps(many(records, 400))
    path.write_text(text.replace('"17": {', '"17": <', 1))
    with pytest.raises(StoreError, match='17: not readable as JSON: the record at byte'): read_tile_info(path)


def test_nesting_without_end(path, records):
    path.write_text(json.dumps(records)[:-1] + ', "deep": ' + '[' * 200_000)
    with pytest.raises(StoreError, match='not readable as JSON'): read_tile_info(path)


def test_copy_is_used_and_equal(path, records, cached, monkeypatch):
    first = read_tile_info(write(path, many(records)))
    assert path.with_suffix('.parquet').is_file()
    monkeypatch.setattr(index, '_stream', lambda *_: pytest.fail('read again'))
    again = read_tile_info(path)
    pd.testing.assert_frame_equal(first.frame, again.frame)
    check(again, many(records))
    assert dict(pickle.loads(pickle.dumps(again))) == dict(first)


def test_copy_is_not_believed_once_the_file_has_changed(path, records, cached):
    what = many(records)
    read_tile_info(write(path, what))
    stat = path.stat()
    what['0']['biome'] = (what['0']['biome'] + 1) % 10
    write(path, what)
    check(read_tile_info(path), what)
    what['1']['biome'] = (what['1']['biome'] + 1) % 10
    os.utime(write(path, what), ns=(stat.st_atime_ns, stat.st_mtime_ns)) # same size, same time: its bytes tell
    check(read_tile_info(path), what)


def test_damaged_copies_are_made_again(path, records, cached):
    what, dice, copy = many(records, 40), random.Random(2), path.with_suffix('.parquet')
    good = read_tile_info(write(path, what)).frame
    whole = copy.read_bytes()
    for i in range(60):
        hurt = bytearray(whole)
        if i % 3 == 0: hurt = hurt[:dice.randrange(len(hurt))]
        else: hurt[dice.randrange(len(hurt))] ^= 1 << dice.randrange(8)
        copy.write_bytes(hurt)
        again = read_tile_info(path)
        pd.testing.assert_frame_equal(again.frame, good)
        assert again['13'] == what['13']
    for other in (b'', b'garbage'):
        copy.write_bytes(other)
        pd.testing.assert_frame_equal(read_tile_info(path).frame, good)
    write_geoparquet(good, copy)
    pd.testing.assert_frame_equal(read_tile_info(path).frame, good)


def test_copy_goes_to_the_cache_folder_where_the_store_is_not_writable(path, records, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(index, '_cache_places', lambda p, places=index._cache_places: [tmp_path / 'x_tile_info.json' / 'no.parquet', places(p)[1]])
    read_tile_info(write(path, records))
    assert [p.suffix for p in (tmp_path / 'cache' / 'mmearth').iterdir()] == ['.parquet']
    monkeypatch.setattr(index, '_stream', lambda *_: pytest.fail('read again'))
    check(read_tile_info(path), records)


def test_small_files_leave_no_copy(path, records):
    read_tile_info(write(path, records))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_record_that_has_moved_is_refused(path, records):
    tiles = read_tile_info(write(path, records))
    write(path, dict(reversed(records.items())))
    with pytest.raises(StoreError, match='open the store again'): tiles['3']
    with pytest.raises(KeyError, match='no tile'): tiles['somewhere']
    assert '3' in tiles and 'somewhere' not in tiles


@pytest.fixture(scope='module')
def frame():
    rng, n = np.random.default_rng(0), 2000
    lat, lon = rng.uniform(-90, 90, n), rng.uniform(-180, 180, n)
    lat[5], lon[6] = np.nan, np.nan
    lat[:4], lon[:4] = [10, 20, 10, 20], [30, 40, 40, 30] # corners belong to a box
    date = pd.Series(np.datetime64('2017-01-01', 's') + rng.integers(0, 1461, n) * np.timedelta64(86400, 's'))
    date[7] = pd.NaT
    return pd.DataFrame(dict(tile_id=[f'é{i}' for i in range(n)], level=pd.Categorical(rng.choice(['l1c', 'l2a'], n), ['l1c', 'l2a']), date=date.astype('datetime64[s]'), lat=lat, lon=lon,
        biome=rng.integers(-1, 14, n).astype('int16'), eco_region=rng.integers(-1, 846, n).astype('int16'), crs=pd.Categorical(rng.choice(['EPSG:32632', None], n)),
        no_data=False, **{f'has_{s}': rng.random(n) < .7 for s in SOURCES}, sentinel2_bands=pd.Categorical(['B1,B2'] * n)))


def test_query_against_a_loop(frame):
    def loop(test): return [i for i, r in enumerate(frame.itertuples()) if test(r)]
    ask = lambda **how: query(frame, **how).tolist()
    assert ask() == list(range(len(frame))) and query(frame).dtype == np.int64
    assert ask(box=(30, 10, 40, 20)) == loop(lambda r: 30 <= r.lon <= 40 and 10 <= r.lat <= 20) and set(range(4)) <= set(ask(box=(30, 10, 40, 20)))
    for box in ((170, -90, -170, 90), (170, -90, 190, 90), (-190, -90, -170, 90)): assert ask(box=box) == loop(lambda r: abs(r.lon) >= 170 and abs(r.lat) <= 90), box
    assert ask(box=(-180, -90, 180, 90)) == loop(lambda r: np.isfinite(r.lat) and np.isfinite(r.lon))
    assert ask(biome=4) == ask(biome=[4]) == ask(biome='Temperate Grasslands, Savannas & Shrublands') == loop(lambda r: r.biome == 4)
    assert ask(eco_region=[0, 7, 845], level='l1c') == loop(lambda r: r.eco_region in (0, 7, 845) and r.level == 'l1c')
    assert ask(month=[1, 12], year=2018) == loop(lambda r: r.date is not pd.NaT and r.date.month in (1, 12) and r.date.year == 2018)
    assert ask(has=['aster', 'era5']) == loop(lambda r: r.has_aster and r.has_era5) and ask(has='aster') == loop(lambda r: r.has_aster)
    assert ask(biome=-1, month=3) == loop(lambda r: r.biome == -1 and r.date is not pd.NaT and r.date.month == 3)


@pytest.mark.parametrize('how,words', [(dict(box=(1, 2, 3)), 'west, south'), (dict(box=(0, 50, 10, 40)), 'south below north'), (dict(box=(0, float('nan'), 1, 1)), 'box'), (dict(biome='Tundr'), 'biome'),
    (dict(biome=14), 'biome 14'), (dict(eco_region=1.5), 'eco_region'), (dict(level='L2A'), 'level'), (dict(month=0), 'month'), (dict(month='May'), 'month'), (dict(has='sentinel1'), 'sentinel1_asc')])
def test_questions_that_make_no_sense(frame, how, words):
    with pytest.raises(ValueError, match=words): query(frame, **how)


def test_geoparquet_in_geopandas_and_back(frame, tmp_path):
    path = write_geoparquet(frame, tmp_path / 'tiles.parquet')
    pd.testing.assert_frame_equal(read_geoparquet(path), frame)
    found = geopandas.read_parquet(path)
    assert found.crs == 'OGC:CRS84' and found.geometry.isna().sum() == 2 and found.geometry.isna()[[5, 6]].all()
    known = found[found.geometry.notna()]
    assert (known.geometry.x == frame.lon[known.index]).all() and (known.geometry.y == frame.lat[known.index]).all()
    assert len(known.cx[0:10, 0:10]) == len(query(frame, box=(0, 0, 10, 10)))
    for few in (frame[:0], frame[5:6]):
        again = read_geoparquet(write_geoparquet(few, path))
        assert again.level.dtype == frame.level.dtype and again.date.dtype == frame.date.dtype
        pd.testing.assert_frame_equal(again.astype(object), few.reset_index(drop=True).astype(object))
    assert geopandas.read_parquet(path).crs == 'OGC:CRS84'
    (tmp_path / 'bad').write_bytes(path.read_bytes()[:300])
    with pytest.raises(StoreError, match='write it again'): read_geoparquet(tmp_path / 'bad')


def test_geojson_in_geopandas(frame, tmp_path):
    path = write_geojson(frame, tmp_path / 'tiles.geojson')
    features = json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(f'{x} is no JSON'))['features']
    assert [f['properties']['tile_id'] for f in features] == frame.tile_id.tolist() and features[5]['geometry'] is None and features[7]['properties']['date'] is None
    assert features[9]['geometry']['coordinates'] == pytest.approx([frame.lon[9], frame.lat[9]], abs=1e-12) and features[9]['properties']['date'] == str(frame.date[9].date())
    found = geopandas.read_file(path)
    assert len(found) == len(frame) and found.crs == 'EPSG:4326'
