"Band statistics against plain numpy; blocks, processes, conventions, bad input."
import json
import shutil

import h5py
import numpy as np
import pytest

from mmearth.modalities import MODALITIES, TASKS, modality
from mmearth.moments import Moments
from mmearth.statistics import doubts, statistics, write_statistics
from mmearth.store import Store, StoreError
from mmearth.synthetic import write_store

# typed again from the description of the released files, not taken from the package
HOLES = dict(sentinel2=[0], sentinel2_cloudmask=[65535], sentinel2_cloudprod=[65535], aster=[-32768], canopy_height_eth=[-128, 127])
DOCUMENTED = dict(sentinel2=[0], sentinel2_cloudmask=[65535], sentinel2_cloudprod=[65535], canopy_height_eth=[255])


def plain(store, name, rows, codes):
    "mean, std, min and max by level and band, with numpy, everything in memory."
    raw, out = store.read(rows, [name])[name], {}
    for level in ('l1c', 'l2a') if modality(name).by_level else (None,):
        here = raw if level is None else raw[store.levels[rows] == level]
        if not len(here): continue
        bands = [here[:, c].astype(float).ravel() for c in range(here.shape[1])]
        bands = [b[np.isfinite(b) & ~np.isin(b, codes)] for b in bands]
        out[name if level is None else f'{name}_{level}'] = {how: [getattr(np, how)(b) if len(b) else np.nan for b in bands] for how in ('mean', 'std', 'min', 'max')}
    return out


@pytest.mark.parametrize('which', ['mini', 'tiny'])
def test_equal_to_numpy(which, request):
    store = request.getfixturevalue(which)
    mine, rows = statistics(store, block=17), np.arange(len(store))
    names = [n for n in store.modalities if MODALITIES[n].kind == 'continuous']
    theirs = {k: v for n in names for k, v in plain(store, n, rows, HOLES.get(n, [])).items()}
    assert set(mine) == set(theirs)
    for key, entry in theirs.items():
        for how in entry: np.testing.assert_allclose(mine[key][how], entry[how], rtol=1e-12, atol=1e-12, err_msg=f'{key} {how}')


def test_blocks_order_and_processes_do_not_matter(tiny):
    rows = np.array([20, 3, 8, 11, 0, 3])
    whole = statistics(tiny, rows)
    for other in (statistics(tiny, rows[::-1], block=1), statistics(tiny, rows, block=4)):
        for key in whole:
            for how in whole[key]: np.testing.assert_allclose(other[key][how], whole[key][how], rtol=1e-12, atol=1e-12)
    assert json.dumps(statistics(tiny, rows, workers=2, block=2)) == json.dumps(statistics(tiny, rows, block=2))


def test_moments_merge_in_any_grouping():
    rng = np.random.default_rng(0)
    x = rng.normal(1e7, 1e-2, (500, 3))
    ok = rng.random(x.shape) < .8
    ok[:, 2] = False
    cuts = np.split(np.arange(500), [0, 1, 7, 7, 300])
    parts = [Moments.of(x[i], ok[i]) for i in cuts]
    for order in (parts, parts[::-1]):
        total = order[0]
        for p in order[1:]: total = Moments.from_dict(json.loads(json.dumps((total + p).to_dict())))
        for c in (0, 1):
            here = x[ok[:, c], c]
            got = total.entry()
            assert (got['min'][c], got['max'][c], total.count[c]) == (here.min(), here.max(), len(here))
            np.testing.assert_allclose([got['mean'][c], got['std'][c]], [here.mean(), here.std()], rtol=1e-6)
        assert all(np.isnan(v[2]) for v in got.values())
    assert sum((Moments.of(x[:0], ok[:0]),), parts[0]).count.tolist() == parts[0].count.tolist()
    for bad in (3, None): pytest.raises(TypeError, lambda: parts[0] + bad)


def test_the_published_convention(mini):
    "Rows drawn as the script draws them, documented codes only: numpy on the same draw."
    mine = statistics(mini, modalities=['sentinel2', 'aster', 'canopy_height_eth', 'sentinel1', 'lat', 'month'], convention='reference', block=50)
    np.random.seed(0)
    drawn = np.random.randint(0, 396, size=396)
    for name in ('sentinel2', 'aster', 'canopy_height_eth', 'sentinel1'):
        for key, entry in plain(mini, name, drawn, DOCUMENTED.get(name, [])).items():
            for how in entry: np.testing.assert_allclose(mine[key][how], entry[how], rtol=1e-9, err_msg=f'{key} {how}')
    assert mine['aster']['min'][0] == -32768  # a code that the documentation does not know
    for key, entry in plain(mini, 'lat', np.arange(396), []).items(): np.testing.assert_allclose(mine[key]['mean'], entry['mean'], rtol=1e-12)
    assert any('no-data code' in d for d in doubts(mine)) and not any('no-data code' in d for d in doubts(statistics(mini)))


def test_the_mini_store_agrees_with_its_own_file(mini):
    mine = statistics(mini, modalities=TASKS)
    assert set(mine) == set(mini.stats)
    for key in mine:
        for part in ('mean', 'std', 'min', 'max'): np.testing.assert_allclose(mine[key][part], mini.stats[key][part], rtol=1e-9, err_msg=f'{key} {part}')
    assert sorted(doubts(mini.stats)) == sorted(doubts(mine))


def test_bad_input(tiny, tiny_store, tmp_path):
    with pytest.raises(ValueError, match='convention'): statistics(tiny, convention='none')
    with pytest.raises(ValueError, match='blocks of 0'): statistics(tiny, block=0)
    for rows in ([24], [-1], [0, 3, 1000]): pytest.raises(IndexError, statistics, tiny, rows)
    with pytest.raises(StoreError, match='clouds: no such modality'): statistics(tiny, modalities=['clouds'])
    assert statistics(tiny, []) == {} and statistics(tiny, modalities=['biome', 'dynamic_world']) == {}
    few = shutil.copytree(tiny_store, tmp_path / 'few')
    with h5py.File(next(few.glob('*.h5')), 'a') as f: del f['sentinel1']
    with pytest.raises(StoreError, match='sentinel1'): statistics(Store(few), modalities=['sentinel1'])


def test_nan_infinity_and_huge_numbers(tmp_path):
    root = write_store(tmp_path / 's', n=6, size=16, seed=1)
    with h5py.File(next(root.glob('*.h5')), 'a') as f: f['era5'][:4, 0] = [np.nan, np.inf, -np.inf, 3e38]
    entry = statistics(Store(root), [0, 1, 2, 3], ['era5'])['era5']
    assert entry['mean'][0] == entry['max'][0] == np.float32(3e38) and entry['std'][0] == 0


def test_a_damaged_row_is_named(tmp_path, break_chunk):
    root = write_store(tmp_path / 's', n=6, size=16, seed=1)
    break_chunk(next(root.glob('*.h5')), 'aster', 4)
    with pytest.raises(StoreError, match=r'aster: cannot read rows \[4\]') as e: statistics(Store(root), modalities=['aster'], block=3)
    assert 'in part 1' in e.value.__notes__[0] and "'aster'" in e.value.__notes__[0]


def test_written_beside_never_over(tiny_store, tmp_path):
    store = Store(shutil.copytree(tiny_store, tmp_path / 'store'))
    before = store.paths['band_stats'].read_bytes()
    path = write_statistics(store, modalities=['aster'], rows=[0, 5])
    assert path.name == f'{store.stem}_band_stats_measured.json' and json.loads(path.read_text())['how']['tiles'] == 2
    assert write_statistics(store, modalities=['aster'], rows=[0, 5]) == path
    with pytest.raises(StoreError, match='other statistics'): write_statistics(store, modalities=['aster'])
    for name in ('', '../x', 'a/b', '.'): pytest.raises(ValueError, write_statistics, store, name)
    with pytest.raises(StoreError, match='root='): write_statistics(store, root=tmp_path / 'nowhere', modalities=['aster'])
    assert store.paths['band_stats'].read_bytes() == before and len(list(store.root.iterdir())) == 5
    assert doubts(json.loads(path.read_text())) == []


def test_doubts_of_foreign_entries():
    assert doubts(dict(how=dict(tiles=3), unheard_of=dict(mean=[1]))) == []
    assert doubts(dict(aster=dict(mean=[1., None], std=[0., 1.], min=[0, 0], max=[1, 1]))) == ['aster[0]: no spread', 'aster[1]: never measured']
