"Splits: exact shares, the promise of the buffer by brute force, the date line and the poles, any order of tiles, files that appear whole."
import json
import struct
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mmearth.index import StoreError
from mmearth.splits import EARTH_KM, blocks, block_split, hold_out, nearest_km, random_split, read_outline, save_splits, split_counts, split_map, write_split


def far(lat, lon, lat2, lon2):
    "Haversine distance in km."
    a, b, c, d = map(np.radians, (lat, lon, lat2, lon2))
    return 2 * EARTH_KM * np.arcsin(np.sqrt(np.sin((c - a) / 2) ** 2 + np.cos(a) * np.cos(c) * np.sin((d - b) / 2) ** 2))


def globe(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def near(n, lat, lon, spread, seed=0):
    "Places around one point of the globe, over the date line and the pole."
    rng = np.random.default_rng(seed)
    a, o, d, t = np.radians(lat), np.radians(lon), np.radians(spread) * np.sqrt(rng.random(n)), rng.uniform(0, 2 * np.pi, n)
    north = np.arcsin(np.sin(a) * np.cos(d) + np.cos(a) * np.sin(d) * np.cos(t))
    east = o + np.arctan2(np.sin(t) * np.sin(d) * np.cos(a), np.cos(d) - np.sin(a) * np.sin(north))
    return np.degrees(north), (np.degrees(east) + 180) % 360 - 180


REGIONS = dict(globe=globe(1500), europe=near(1500, 50, 10, 6), date_line=near(1500, 5, 179.9, 6), north_pole=near(1500, 89, 30, 6), south_pole=near(1500, -90, 0, 6))


@pytest.mark.parametrize('region', REGIONS)
@pytest.mark.parametrize('buffer', [0, 5, 60])
def test_no_training_tile_within_the_buffer(region, buffer):
    lat, lon = REGIONS[region]
    split = block_split(lat, lon, buffer=buffer, seed=1)
    distance = far(lat[:, None], lon[:, None], lat, lon)
    train, held, strip = (np.flatnonzero(np.isin(split, names)) for names in (['train'], ['val', 'test'], ['buffer']))
    assert len(train) and len(held) and distance[np.ix_(train, held)].min() >= buffer - 1e-6
    assert (distance[np.ix_(strip, held)].min(1) < buffer + 1e-6).all() if len(strip) else buffer < 60
    whole = block_split(lat, lon, buffer=0, seed=1)
    assert (whole[split != 'buffer'] == split[split != 'buffer']).all() and (whole[strip] == 'train').all()
    block = blocks(lat, lon, 2)
    assert all(len(set(whole[block == b])) == 1 for b in np.unique(block))


@pytest.mark.parametrize('region', REGIONS)
def test_the_order_of_tiles_does_not_matter(region):
    lat, lon = REGIONS[region]
    biome = np.floor(lat / 3).astype(int)
    order, split = np.random.default_rng(5).permutation(len(lat)), block_split(lat, lon, biome, seed=4)
    assert (block_split(lat[order], lon[order], biome[order], seed=4) == split[order]).all()
    assert (block_split(lat, lon + 360, biome, seed=4) == split).all()
    assert any((block_split(lat, lon, biome, seed=s) != split).any() for s in range(5, 9))


def test_shares_of_every_biome():
    lat, lon = globe(30_000)
    biome = (np.floor(lat / 20) + np.floor(lon / 90)).astype(int) % 9
    for seed in range(3):
        split = block_split(lat, lon, biome, dict(train=.7, val=.1, test=.2), buffer=0, seed=seed)
        share = pd.crosstab(biome, split, normalize='index')[['train', 'val', 'test']]
        assert (share - [.7, .1, .2]).abs().max(axis=None) < .01


def test_a_biome_in_one_block_stays_whole():
    lat, lon = globe(4000)
    biome = np.r_[np.zeros(4000, int), np.ones(60, int)]
    lat, lon = np.r_[lat, np.full(60, 47.)], np.r_[lon, np.full(60, 11.)]
    split = block_split(lat, lon, biome, buffer=0)
    assert len(set(split[biome == 1])) == 1 and abs((split == 'train').mean() - .8) < .02


def test_few_tiles_many_biomes():
    "24 tiles of 14 biomes: shares per biome are out of reach, shares of the whole are not."
    lat, lon = globe(24, seed=2)
    split = block_split(lat, lon, np.arange(24) % 14)
    counts = pd.Series(split).value_counts()
    assert {'train', 'val', 'test'} <= set(split) and 18 <= counts['train'] <= 20


def test_tiles_without_a_place_are_used_by_nobody():
    lat, lon = globe(500)
    lat[:7], lon[5:9] = np.nan, np.nan
    split = block_split(lat, lon)
    assert (split[:9] == 'buffer').all()
    assert (split[9:] == block_split(lat[9:], lon[9:])).all()
    with pytest.raises(ValueError, match='only a random split'): block_split([np.nan], [np.nan])


@pytest.mark.parametrize('bad,words', [(dict(fractions=dict(train=.5, val=.1)), 'add up to 1'), (dict(fractions=dict(val=.5, test=.5)), 'must be called train'), (dict(fractions={}), 'add up to 1'),
                                       (dict(fractions=dict(train=.9, buffer=.1)), 'cannot name a part'), (dict(fractions=dict(train=1.1, test=-.1)), 'above 0'), (dict(fractions=dict(train='0.9', test=.1)), 'above 0'),
                                       (dict(buffer=-1), 'kilometres'), (dict(buffer=np.nan), 'kilometres'), (dict(buffer=30_000), 'nothing to train on'),
                                       (dict(block=0), '0.01 to 90'), (dict(block=np.nan), '0.01 to 90'), (dict(biome=[1, 2]), '2 biomes'), (dict(block=90), 'smaller blocks')])
def test_bad_wishes_are_named(bad, words):
    lat, lon = near(200, 45, 45, 3)
    with pytest.raises(ValueError, match=words): block_split(lat, lon, **bad)


@pytest.mark.parametrize('lat,lon', [([91.], [0.]), ([np.nan], [0.]), ([0.], [np.inf])])
def test_places_that_are_none(lat, lon):
    with pytest.raises(ValueError, match='leave them out'): blocks(lat, lon)


@pytest.mark.parametrize('side', [.37, 1, 2, 7])
def test_blocks_have_nearly_the_same_area(side):
    lat, lon = globe(400_000)
    per_row = pd.Series(blocks(lat, lon, side)).groupby(blocks(lat, lon, side) >> 20).nunique()
    south = per_row.index.to_numpy() * side - 90
    area = np.radians(360) * EARTH_KM ** 2 * (np.sin(np.radians(np.minimum(south + side, 90))) - np.sin(np.radians(south)))
    columns = np.maximum(np.round(360 / side * np.cos(np.radians((south + np.minimum(south + side, 90)) / 2))), 1)
    assert (per_row <= columns).all() and (side < 2 or (per_row == columns).all())
    usual = np.abs(south) < 90 - 6 * side
    assert ((area / columns)[usual] / np.median(area / columns)).max() < 1.07 and ((area / columns)[usual] / np.median(area / columns)).min() > .93


def test_blocks_at_seams():
    assert len(set(blocks([0.5] * 4, [180, -180, 540, -179.99]))) == 1
    assert blocks(90, 0) >> 20 == 89 and blocks(-90, 0) >> 20 == 0
    assert len(set(blocks([-1, 1, -1, 1], [-1, -1, 1, 1]))) == 4
    plain = blocks([51.2, 51.9], [9.2, 9.9], .01, equal_area=False)
    assert plain[0] != plain[1] and len(set(blocks(np.full(9, 51.), np.arange(9) / 50, .01, equal_area=False))) == 9


def test_distances():
    (lat, lon), (to_lat, to_lon) = globe(300), globe(200, 1)
    direct = far(lat[:, None], lon[:, None], to_lat, to_lon).min(1)
    np.testing.assert_allclose(nearest_km(lat, lon, to_lat, to_lon), direct, rtol=1e-9)
    within = nearest_km(lat, lon, to_lat, to_lon, within=400)
    np.testing.assert_allclose(within[direct < 400], direct[direct < 400], rtol=1e-9)
    assert np.isinf(within[direct > 400]).all() and (direct > 400).any()
    np.testing.assert_allclose(nearest_km([0.], [0.], [0.], [180.]), [np.pi * EARTH_KM], rtol=1e-6)
    assert nearest_km([10.], [20.], [10.], [20.])[0] == 0 and len(nearest_km([], [], [1.], [1.])) == 0


@pytest.mark.parametrize('n', [1, 7, 999, 1000])
def test_random_shares_are_exact(n):
    counts = pd.Series(random_split(n, seed=3)).value_counts().reindex(['train', 'val', 'test'], fill_value=0)
    assert counts.sum() == n and (counts - n * np.array([.8, .1, .1])).abs().max() < 1


def test_random_strata():
    strata = np.random.default_rng(0).choice(['a', 'b', 'c', 'd'], 2000, p=[.6, .3, .09, .01])
    split = random_split(2000, seed=1, strata=strata)
    table = pd.crosstab(strata, split)[['train', 'val', 'test']]
    assert table.sum().tolist() == [1600, 200, 200]
    assert (table - table.sum(axis=1).to_numpy()[:, None] * [.8, .1, .1]).abs().max(axis=None) <= 2
    assert (split == random_split(2000, seed=1, strata=strata)).all() and (split != random_split(2000, seed=2, strata=strata)).any()
    with pytest.raises(ValueError, match='3 strata'): random_split(2, strata=[1, 2, 3])
    assert len(random_split(0)) == 0


def test_hold_out():
    block = np.repeat(np.arange(50), np.arange(1, 51))
    away = hold_out(block, .3, np.random.default_rng(1))
    assert .2 < away.mean() <= .3 and not set(block[away]) & set(block[~away])
    assert not hold_out(np.zeros(5, int), .3, np.random.default_rng(1)).any()


def test_counts():
    table = split_counts(['val', 'train', 'buffer', 'train'], [0, 0, -1, 13])
    assert table.columns.tolist() == ['train', 'val', 'buffer'] and table.loc['all'].tolist() == [2, 1, 1]
    assert table.loc['unknown', 'buffer'] == 1 and table.loc['Tundra'].tolist() == [1, 1, 0]


def saved(folder, names, name='mine', how=dict(seed=0)): return save_splits(folder, 'data_x', name, names, dict(how))


def test_saved_beside_never_over(tmp_path):
    released = tmp_path / 'data_x_splits.json'
    released.write_text('{"train": [0, 1, 2]}')
    path = saved(tmp_path, ['train', 'buffer', 'test'])
    first = path.read_bytes()
    found = json.loads(first)
    assert [found[k] for k in ('train', 'test', 'buffer')] == [[0], [2], [1]] and found['how']['seed'] == 0 and 'mmearth' in found['how']['versions']
    assert saved(tmp_path, ['train', 'buffer', 'test']) == path and path.read_bytes() == first
    for names, how in ((['train', 'test', 'test'], dict(seed=0)), (['train', 'buffer', 'test'], dict(seed=1))):
        with pytest.raises(StoreError, match='holds a different split'): saved(tmp_path, names, how=how)
    path.write_bytes(first[:-9])
    with pytest.raises(StoreError, match='not readable as JSON'): saved(tmp_path, ['train', 'buffer', 'test'])
    assert released.read_text() == '{"train": [0, 1, 2]}' and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('name', ['', '../x', 'a/b', '.hidden', 'two words', 'x\n'])
def test_names_of_splits(tmp_path, name):
    with pytest.raises(ValueError, match='cannot name a split'): saved(tmp_path, ['train'], name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_failed_write(tmp_path):
    with pytest.raises(TypeError): saved(tmp_path, ['train'], how=dict(what=object()))
    with pytest.raises(ValueError, match='no tiles'): saved(tmp_path, [])
    with pytest.raises(FileNotFoundError): saved(tmp_path / 'nowhere', ['train'])
    assert not list(tmp_path.iterdir())


def test_write_split(tmp_path):
    lat, lon = globe(900)
    store = SimpleNamespace(root=tmp_path, stem='data_x', tiles=pd.DataFrame(dict(lat=lat, lon=lon, biome=np.int16(np.arange(900) % 15 - 1))))
    for kind in ('geographic', 'random'):
        found = json.loads(write_split(store, kind, seed=7).read_text())
        assert sorted(sum((v for k, v in found.items() if k != 'how'), [])) == list(range(900))
        assert found['how']['kind'] == kind and found['how']['seed'] == 7 and found['how']['counts']['all']['train'] == len(found['train'])
        assert sum(found['how']['counts']['unknown'].values()) == 60
    assert found['how'].keys() >= {'fractions', 'strata', 'versions'} and 'block_degrees' not in found['how']


def test_a_store_reads_what_was_written(tiny_store, tmp_path):
    import shutil
    from mmearth.store import Store
    store = Store(shutil.copytree(tiny_store, tmp_path / 'tiny'))
    found = json.loads(write_split(store, block=1).read_text())
    again = Store(store.root)
    for part in ('train', 'val', 'test'): assert again.rows(f'geographic/{part}').tolist() == found[part]


def shapefile(rings):
    body = b''
    for i, ring in enumerate(rings):
        ring = np.asarray(ring, '<f8')
        record = struct.pack('<i4d2ii', 5, *ring.min(0), *ring.max(0), 1, len(ring), 0) + ring.tobytes()
        body += struct.pack('>2i', i + 1, len(record) // 2) + record
    return struct.pack('>7i', 9994, 0, 0, 0, 0, 0, 50 + len(body) // 2) + bytes(72) + body


def test_outlines(tmp_path, shared):
    rings, path = [[(0, 0), (0, 9), (9, 9), (0, 0)], [(20, 0), (20, 9), (29, 9), (29, 0), (20, 0)]], tmp_path / 'x.shp'
    path.write_bytes(shapefile(rings))
    assert [r.tolist() for r in read_outline(path)] == [[list(map(float, p)) for p in ring] for ring in rings]
    whole = path.read_bytes()
    for n in (0, 3, 60, 101, 140, len(whole) - 8):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='x.shp: '): read_outline(path)
    for name in ('natural_earth/ne_50m_admin_0_countries.shp', 'resolve_ecoregions/Ecoregions2017.shp'):
        found = read_outline(shared / 'maps' / name)
        assert len(found) > 500 and all(np.abs(r).max() <= 180.01 and r.shape[1] == 2 for r in found)


def test_map(tmp_path):
    lat, lon = globe(300)
    fig = split_map(lat, lon, block_split(lat, lon), outline=[np.array([[0, 0], [0, 20], [30, 20], [0, 0.]])])
    fig.savefig(tmp_path / 'map.png')
    assert [t.get_text().split()[0] for t in fig.legends[0].get_texts()][:3] == ['train', 'val', 'test'] and fig.axes[0].get_xlim() == (-180, 180)
    small = split_map([40, 41, np.nan], [9, 12, 3], ['train', 'test_region', 'own'], outline=np.ones((18, 36), bool))
    assert small.axes[0].get_xlim()[0] < 3 and small.axes[0].get_xlim()[1] < 20
