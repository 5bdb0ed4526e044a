"The passage from real files to a batch, against plain numpy that shares no code with it; rows, pickles, forks, crops."
import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmearth.dataset import ALIASES, MMEarth, Scale, Store, StoreError, as_torchgeo, band_names, decode, random_crop
from mmearth.errata import SHIFTED, shifted
from mmearth.modalities import S2_BANDS, S2_MASKS, TASKS, modality, valid
from mmearth.statistics import statistics
from mmearth.synthetic import write_store

# typed again from the description of the released files, not taken from the package
HOLES = dict(sentinel2=[0], sentinel2_cloudmask=[65535], sentinel2_cloudprod=[65535], sentinel1=[], aster=[-32768], canopy_height_eth=[-128, 127],
             era5=[], lat=[], lon=[], month=[])
DW = {c: c - 1 for c in range(1, 10)}
WC = {c: i for i, c in enumerate((10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100))}
SCL = {c: c for c in range(12)}
CODES = dict(dynamic_world=DW, esa_worldcover=WC, sentinel2_scl=SCL)


def wanted_of(store, names=None): return {k: modality(k).train_bands for k in (names or store.modalities)}


def plain(name, raw, levels, stats, places):
    "One modality decoded tile by tile, as the description says: values and validity."
    values, valid = [], []
    for tile, level in zip(raw, levels):
        if name in CODES:
            values.append(np.vectorize(lambda c: CODES[name].get(int(c), -1))(tile[0]))
            valid.append(values[-1] >= 0)
        elif name in ('biome', 'eco_region'):
            whole = sorted(set(tile.tolist())) == [0, 1] and tile.sum() == 1
            values.append(np.array(int(tile.argmax()) if whole else -1))
            valid.append(np.array(whole))
        else:
            entry = stats[f'{name}_{level}' if name.startswith('sentinel2') else name]
            tile = tile[places].astype(float)
            ok = np.isfinite(tile)
            for code in HOLES[name]: ok &= tile != code
            for c, p in enumerate(places):
                mean, std = entry['mean'][p], entry['std'][p]
                usable = np.isfinite(mean) and np.isfinite(std) and std > 0
                tile[c] = np.where(ok[c], (tile[c] - mean) / std if usable else tile[c], 0)
            values.append(tile)
            valid.append(ok)
    return np.stack(values), np.stack(valid)


def test_what_the_real_files_hold(mini):
    "Counts that the README of the files gives, and those of the published layout."
    assert (len(mini), mini.size) == (396, 64)
    assert {l: int((mini.levels == l).sum()) for l in ('l2a', 'l1c')} == dict(l2a=378, l1c=18)
    assert mini.bands('sentinel2') == S2_BANDS and S2_BANDS.index('B8A') + 1 == S2_BANDS.index('B8')
    assert set(TASKS) < set(mini.modalities)
    batch = decode(mini.read(range(396)), mini.levels, mini.stats, wanted_of(mini, TASKS))
    tiles = {k: int(v.reshape(396, -1).any(1).sum()) for k, v in batch['valid'].items()}
    assert tiles == dict(sentinel2=396, sentinel1=76, aster=39, era5=0, dynamic_world=tiles['dynamic_world'], canopy_height_eth=0, lat=396, lon=396,
                         biome=396, eco_region=396, month=37, esa_worldcover=0)
    codes = mini.read(range(396), ['dynamic_world'])['dynamic_world']
    assert tiles['dynamic_world'] == (codes > 0).any((1, 2, 3)).sum() in range(30, 40)
    assert all(batch[k].isfinite().all() for k in TASKS)


def test_real_tiles_decode_as_plain_numpy_does(mini):
    rows = np.flatnonzero(mini.levels == 'l1c')[:4].tolist() + [0, 7, 7, 350, 395] + np.flatnonzero(np.isfinite(mini.read(range(396), ['month'])['month'][:, 0]))[:6].tolist()
    raw, levels = mini.read(rows), mini.levels[rows]
    wanted = wanted_of(mini, TASKS)
    batch = decode(raw, levels, mini.stats, wanted)
    for name in TASKS:
        places = [mini.bands(name).index(b) for b in wanted[name]]
        values, valid = plain(name, raw[name], levels, mini.stats, places)
        assert np.array_equal(batch['valid'][name].numpy(), valid), name
        np.testing.assert_allclose(batch[name].numpy(), values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_synthetic_tiles_decode_as_plain_numpy_does(tiny):
    rows = np.arange(24)
    raw = tiny.read(rows)
    stored = {k: tiny.bands(k) for k in tiny.modalities}
    batch = decode(raw, tiny.levels, tiny.stats, stored)
    for name in tiny.modalities:
        values, valid = plain(name, raw[name], tiny.levels, tiny.stats, range(modality(name).columns))
        assert np.array_equal(batch['valid'][name].numpy(), valid), name
        np.testing.assert_allclose(batch[name].numpy(), values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('name', [*TASKS, 'sentinel2_cloudmask', 'sentinel2_cloudprod', 'sentinel2_scl'])
def test_holes_never_escape(tiny, name):
    "A NaN, an infinity or a no-data code in one place is invalid in that place, and only there."
    m, rows = modality(name), np.arange(24)
    raw = tiny.read(rows, [name])
    wanted = {name: tiny.bands(name)}
    before = decode(raw, tiny.levels, tiny.stats, wanted)
    bad = [np.nan, np.inf, -np.inf, np.float32(3e38)] if m.dtype == 'float32' else list(m.nodata_stored)
    for code in bad:
        hurt = {name: raw[name].copy()}
        place = (3, 0) + (5, 6) * (m.level == 'pixel')
        hurt[name][(3,) if m.onehot else place] = code
        after = decode(hurt, tiny.levels, tiny.stats, wanted)
        assert after[name].isfinite().all()
        out = (3,) if m.onehot else place if m.kind == 'continuous' else (3, 5, 6)
        if code != np.float32(3e38): assert not after['valid'][name][out] and after[name][out] == (-1 if m.kind == 'categorical' else 0)
        same = torch.ones_like(after['valid'][name])
        same[out] = False
        assert torch.equal(after[name][same], before[name][same]) and torch.equal(after['valid'][name][same], before['valid'][name][same])


def test_codes_that_no_class_has_are_invalid():
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for name, table in CODES.items():
        out = decode({name: codes}, ['l2a'], {}, {name: modality(name).bands})
        assert out[name].flatten().tolist() == [table.get(c, -1) for c in range(256)]
        assert torch.equal(out['valid'][name], out[name] >= 0)


def test_two_marks_in_a_one_hot_row_are_no_class():
    rows = np.zeros((4, 846), 'uint16')
    rows[0, 5], rows[1, [5, 9]], rows[2, 5], rows[3] = 1, 1, 2, 65535
    out = decode(dict(eco_region=rows), ['l2a'] * 4, {}, dict(eco_region=('eco_region',)))
    assert out['eco_region'].tolist() == [5, -1, -1, -1]


def test_rows_in_any_order_and_repeated(mini):
    rows = [395, 0, 17, 17, 3, 4, 5, 0]
    with h5py.File(mini.path) as f: expected = {k: np.stack([f[k][r] for r in rows]) for k in mini.modalities}
    for threads in (1, 4):
        mini.threads = threads
        got = mini.read(rows)
        assert all(got[k].dtype == expected[k].dtype and got[k].tobytes() == expected[k].tobytes() for k in mini.modalities)
    assert all(len(v) == 0 for v in mini.read([]).values())
    assert mini.read([5], ['lat', 'sentinel2'])['lat'].shape == (1, 2)
    with pytest.raises(IndexError): mini.read([-1])


@pytest.mark.parametrize('how', [dict(chunks=(1, 13, 16, 16), compression='lzf'), dict(chunks=(5, 13, 16, 16), compression='gzip'), dict(), dict(chunks=(1, 13, 16, 16)),
                                 dict(chunks=(1, 13, 16, 16), compression='gzip', shuffle=True), dict(chunks=(1, 13, 16, 16), fletcher32=True), dict(chunks=(1, 13, 4, 16), compression='gzip')])
def test_other_chunkings(tmp_path, how):
    root = write_store(tmp_path / 's', n=12, size=16, seed=1)
    with h5py.File(next(root.glob('*.h5')), 'a') as f:
        pixels = f['sentinel2'][:]
        del f['sentinel2']
        f.create_dataset('sentinel2', data=pixels, **how)
    for rows in ([7, 2, 2, 11], range(12), [0, 6]): assert np.array_equal(Store(root).read(rows, ['sentinel2'])['sentinel2'], pixels[list(rows)])


@pytest.mark.parametrize('chosen', [None, -32768])
def test_rows_never_written(tmp_path, chosen):
    "A fill value that the writer chose is data; the zeros that HDF5 makes up for a lost chunk are not."
    root = write_store(tmp_path / 's', n=4, size=16, seed=1)
    with h5py.File(next(root.glob('*.h5')), 'a') as f:
        del f['aster']
        f.create_dataset('aster', (4, 2, 16, 16), 'int16', chunks=(1, 2, 16, 16), compression='gzip', fillvalue=chosen)[1] = 7
    if chosen: assert (Store(root).read([0, 1], ['aster'])['aster'][:, 0, 0, 0] == [-32768, 7]).all()
    else:
        with pytest.raises(StoreError, match=r'aster: cannot read rows \[0, 3\]'): Store(root).read([0, 1, 3], ['aster'])


def first_tile(store): return store.read([2, 1], ['sentinel2'])['sentinel2']


@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_another_process(tiny, how):
    "A store that has been read from works in a child, forked or pickled, and still in the parent."
    here = first_tile(tiny)
    with multiprocessing.get_context(how).Pool(2) as pool: there = pool.map(first_tile, [tiny] * 4, chunksize=1)
    assert all(np.array_equal(here, t) for t in there)
    assert np.array_equal(first_tile(tiny), here)


def inherited(queue): queue.put(first_tile(inherited.store))


def test_a_forked_child_opens_its_own_file(tiny):
    here, inherited.store = first_tile(tiny), tiny
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    children = [context.Process(target=inherited, args=(queue,)) for _ in range(3)]
    for c in children: c.start()
    assert all(np.array_equal(queue.get(timeout=60), here) for _ in children)
    for c in children: c.join()
    assert np.array_equal(first_tile(tiny), here)


def test_pickle_and_threads(tiny):
    here = first_tile(tiny)
    twin = pickle.loads(pickle.dumps(tiny))
    assert twin._file is None and np.array_equal(first_tile(twin), here)
    assert (twin.tile_ids, twin.splits.keys()) == (tiny.tile_ids, tiny.splits.keys())
    with ThreadPoolExecutor(4) as pool: assert all(np.array_equal(here, t) for t in pool.map(first_tile, [tiny] * 16))


def test_one_tile(mini):
    i = int(np.flatnonzero(np.isfinite(mini.read(range(396), ['month'])['month'][:, 0]))[0])
    tile = mini[i]
    assert set(tile) == {*mini.modalities, 'valid', 'meta'} and set(tile['valid']) == set(mini.modalities)
    assert tile['sentinel2'].shape == (13, 64, 64) and tile['valid']['sentinel2'].shape == (13, 64, 64)
    told = mini.info[mini.tile_ids[i]]
    assert tile['meta'] == dict(tile_id=mini.tile_ids[i], lat=told['lat'], lon=told['lon'], date=told['S2_DATE'], crs=told['CRS'], level=told['S2_type'])
    assert tile['meta']['date'] is not None
    np.testing.assert_allclose(np.degrees(np.arctan2(*tile['lat'])), told['lat'], atol=1e-3)
    assert mini[-1]['meta']['tile_id'] == mini.tile_ids[-1]
    with pytest.raises(IndexError): mini[396]


def test_a_level_without_statistics_is_refused(mini):
    "Scaling L1C with numbers of L2A would go unnoticed."
    only = {k: v for k, v in mini.stats.items() if k != 'sentinel2_l1c'}
    scale = Scale(only, dict(sentinel2=('B4',)))
    l1c, l2a = int(np.flatnonzero(mini.levels == 'l1c')[0]), int(np.flatnonzero(mini.levels == 'l2a')[0])
    decode(mini.read([l2a]), ['l2a'], scale)
    with pytest.raises(StoreError, match='sentinel2_l1c'): decode(mini.read([l1c, l2a]), ['l1c', 'l2a'], scale)


def test_wanted_order_is_obeyed(mini):
    raw = mini.read([3, 9], ['sentinel2'])
    levels = mini.levels[[3, 9]]
    there = decode(raw, levels, mini.stats, dict(sentinel2=S2_BANDS))['sentinel2']
    back = decode(raw, levels, mini.stats, dict(sentinel2=('B8', 'B8A', 'B4')))['sentinel2']
    assert torch.equal(back, there[:, [8, 7, 3]])
    with pytest.raises(ValueError, match='other bands'): decode(raw, levels, Scale(mini.stats, dict(sentinel2=('B4',))), dict(sentinel2=('B3',)))
    with pytest.raises(ValueError, match='shape'): decode(dict(sentinel2=raw['sentinel2'][:, :3]), levels, mini.stats, dict(sentinel2=('B4',)))


def test_fewer_bands_than_the_table(tmp_path):
    "The attribute `bands` renames the planes; statistics follow the stored order."
    root = write_store(tmp_path / 's', n=4, size=16, seed=1)
    with h5py.File(next(root.glob('*.h5')), 'a') as f:
        pixels = f['sentinel2'][:][:, [3, 2, 1]]
        del f['sentinel2']
        f.create_dataset('sentinel2', data=pixels, chunks=(1, 3, 16, 16)).attrs['bands'] = ['B4', 'B3', 'B2']
    stats = next(root.glob('*_band_stats.json'))
    with pytest.raises(StoreError, match='13 numbers'): Store(root)
    stats.write_text(json.dumps({k: v for k, v in json.loads(stats.read_text()).items() if not k.startswith('sentinel2_l')}))
    store = Store(root)
    assert store.bands('sentinel2') == ('B4', 'B3', 'B2')
    mine = statistics(store)
    stored = {k: store.bands(k) for k in store.modalities}
    blue = decode(store.read(range(4)), store.levels, Scale(mine, dict(sentinel2=('B2',)), stored))['sentinel2']
    entry = mine[f'sentinel2_{store.levels[0]}']
    np.testing.assert_allclose(blue[0, 0].numpy(), np.where(pixels[0, 2] == 0, 0, (pixels[0, 2] - entry['mean'][2]) / entry['std'][2]), rtol=1e-4, atol=1e-5)


def test_crops_share_their_window():
    "Every map of a sample is cut at the same place, in its own type, and all places are reached."
    place = torch.arange(10 * 12).reshape(1, 1, 10, 12).expand(500, 1, 10, 12)
    raw = dict(sentinel2=place.to(torch.int32).numpy().astype('uint16'), aster=-place.to(torch.int16), dynamic_world=place.to(torch.uint8), lat=torch.rand(500, 2))
    cut = random_crop(raw, 7, torch.Generator().manual_seed(0))
    assert [cut[k].dtype for k in raw] == [torch.uint16, torch.int16, torch.uint8, torch.float32]
    assert cut['sentinel2'].shape == (500, 1, 7, 7) and cut['lat'] is raw['lat']
    start = cut['aster'][:, 0, 0, 0].neg()
    assert torch.equal(cut['sentinel2'].int(), cut['aster'].neg().int()) and torch.equal(cut['sentinel2'].int(), cut['dynamic_world'].int())
    window = torch.arange(7)[:, None] * 12 + torch.arange(7)
    assert torch.equal(cut['sentinel2'].int()[:, 0], (start[:, None, None] + window).int())
    assert {(int(s) // 12, int(s) % 12) for s in start} == {(r, c) for r in range(4) for c in range(6)}
    whole = random_crop(dict(aster=raw['aster']), 10)['aster']
    assert whole.shape[-2:] == (10, 10)
    for size in (0, 11): pytest.raises(ValueError, random_crop, raw, size)


def test_fingerprint_is_of_the_content(tiny_store, tmp_path):
    twin = shutil.copytree(tiny_store, tmp_path / 'twin')
    mark = Store(tiny_store).fingerprint
    assert Store(twin).fingerprint == mark
    stats = next(twin.glob('*_band_stats.json'))
    stats.write_text(stats.read_text() + '\n')
    assert Store(twin).fingerprint != mark


def test_tiles_of_128_pixels(tmp_path):
    store = Store(write_store(tmp_path / 's', n=2, size=128, seed=1))
    assert store.size == 128 and store[1]['sentinel1'].shape == (8, 128, 128)
    assert random_crop(store.read([1, 0]), 112)['aster'].shape == (2, 2, 112, 112)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_the_same_on_a_gpu(tiny):
    raw, wanted = tiny.read(range(24)), wanted_of(tiny)
    moved = {k: torch.as_tensor(v).cuda() for k, v in raw.items()}
    cpu = decode(random_crop(raw, 56, torch.Generator().manual_seed(0)), tiny.levels, tiny.stats, wanted)
    gpu = decode(random_crop(moved, 56, torch.Generator().manual_seed(0)), tiny.levels, tiny.stats, wanted, device='cuda')
    for k in wanted:
        assert gpu[k].device.type == 'cuda' and torch.equal(gpu['valid'][k].cpu(), cpu['valid'][k])
        torch.testing.assert_close(gpu[k].cpu(), cpu[k])


def test_validity_is_the_same_on_both_roads(tiny):
    "`modalities.valid`, for numpy, and `decode`, for the device, agree on every stored number."
    raw = tiny.read(range(24))
    batch = decode(raw, tiny.levels, tiny.stats, {k: tiny.bands(k) for k in tiny.modalities})
    for k, x in raw.items():
        ok = valid(modality(k), x, tiny.bands(k))
        if modality(k).kind == 'categorical': ok = ok[:, 0]
        assert np.array_equal(batch['valid'][k].numpy(), ok), k


def test_a_dataset_gives_what_decode_gives(tiny):
    data = MMEarth(tiny.root)
    rows, wrong = tiny.rows('train'), shifted(tiny.tiles)
    batch = decode(tiny.read(rows, TASKS), tiny.levels[rows], tiny.stats, wanted_of(tiny, TASKS))
    assert len(data) == len(rows) and list(data.bands) == [m for m in TASKS if m in tiny.modalities]
    for i in (0, 5, -1):
        sample, at = data[i], range(len(data))[i]
        for k in TASKS:
            if not (wrong[rows[at]] and k in SHIFTED): assert torch.equal(sample[k], batch[k][at]) and torch.equal(sample['valid'][k], batch['valid'][k][at]), k
        told = tiny.info[sample['meta']['tile_id']]
        assert sample['meta'] == dict(tile_id=tiny.tile_ids[rows[at]], row=rows[at], lat=told['lat'], lon=told['lon'], date=told['S2_DATE'] or '', crs=told['CRS'], level=told['S2_type'])
    for bad in (len(data), -len(data) - 1): pytest.raises(IndexError, data.__getitem__, bad)
    for bad in (1.5, None): pytest.raises(TypeError, data.__getitem__, bad)
    pytest.raises(KeyError, data.__getitem__, 'nowhere')


def test_raw_numbers_keep_their_types(mini):
    data = MMEarth(mini.root, raw=True, modalities=[*TASKS, *S2_MASKS], bands=dict(sentinel2=['RED', 'B10'], aster='slope'))
    sample, whole = data[395], mini.read([395])
    for k in data.bands:
        want = whole[k][0] if k not in ('sentinel2', 'aster') else whole[k][0][[3, 10] if k == 'sentinel2' else [1]]
        assert sample[k].numpy().dtype == want.dtype and sample[k].numpy().tobytes() == want.tobytes(), k
        assert sample['valid'][k].shape == sample[k].shape and sample['valid'][k].dtype == torch.bool
    assert MMEarth(mini.root, raw=True, modalities='sentinel2')[0]['sentinel2'].shape == (13, 64, 64)


@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_workers_of_a_loader(tiny, how):
    "Two workers, started either way, after the parent has read: the same batches as without any."
    data = MMEarth(tiny.root, modalities=['sentinel2', 'sentinel1', 'biome', 'dynamic_world', 'era5'])
    alone = list(DataLoader(data, batch_size=5))
    shared = list(DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context=how))
    assert [b['meta']['tile_id'] for b in alone] == [b['meta']['tile_id'] for b in shared] and len(alone) == 5
    for a, b in zip(alone, shared):
        assert all(torch.equal(a[k], b[k]) and torch.equal(a['valid'][k], b['valid'][k]) for k in data.bands)


def test_samples_without_date_can_be_collated(mini):
    page = next(iter(DataLoader(MMEarth(mini.root, modalities=['lat', 'month']), batch_size=396)))
    assert page['meta']['date'].count('') == 359 and page['lat'].shape == (396, 2)


def test_a_shifted_tile_is_marked(tiny_store, tmp_path):
    root = shutil.copytree(tiny_store, tmp_path / 'store')
    before = Store(root)
    row = int(np.flatnonzero(before.levels == 'l2a')[0])
    path, name = before.paths['tile_info'], before.tile_ids[row]
    info = json.loads(path.read_text())
    info[name]['BANDS']['sentinel2'] = [b for b in info[name]['BANDS']['sentinel2'] if b != 'MSK_CLDPRB']
    path.write_text(json.dumps(info))
    for raw in (False, True):
        sample = MMEarth(root, raw=raw)[name]
        assert not any(sample['valid'][k].any() for k in SHIFTED)
        assert all(sample['valid'][k].any() for k in ('sentinel2', 'biome', 'lat', 'era5'))
        if not raw: assert all((sample[k] == (-1 if modality(k).kind == 'categorical' else 0)).all() for k in SHIFTED)


def test_splits_and_ids(tiny_store, tmp_path):
    root = shutil.copytree(tiny_store, tmp_path / 'store')
    path = next(root.glob('*_splits.json'))
    path.write_text(json.dumps(dict(train=[5, 2], val=[7], test=[])))
    train, val = MMEarth(root, modalities='biome'), [MMEarth(root, s, modalities='biome') for s in ('val', 'valid', 'validation')]
    assert [s['meta']['row'] for s in train] == [5, 2] and train[train.store.tile_ids[2]]['meta']['row'] == 2
    assert [d[0]['meta']['row'] for d in val] == [7, 7, 7] and len(MMEarth(root, 'test')) == 0
    with pytest.raises(KeyError, match="not in split 'train'"): train[train.store.tile_ids[7]]
    with pytest.raises(StoreError, match='no such split'): MMEarth(root, 'holdout')


def test_names_of_bands():
    assert [band_names('sentinel2', n) for n in ('b02', 'BLUE', 'B2')] == [('B2',)] * 3
    assert set(ALIASES['sentinel2'].values()) == set(S2_BANDS)
    assert (ALIASES['sentinel2']['NIR_NARROW'], ALIASES['sentinel2']['NIR_BROAD'], ALIASES['sentinel2']['CIRRUS'], ALIASES['sentinel2']['SWIR_1']) == ('B8A', 'B8', 'B10', 'B11')
    for bad in ([], ['B2', 'BLUE']): pytest.raises(ValueError, band_names, 'sentinel2', bad)
    assert band_names('sentinel2', ['B99', 3]) == ('B99', '3')


def test_what_is_refused(tiny_store, tmp_path):
    for bad in (['B13'], dict(sentinel1=['VV']), dict(aster=['height'])): pytest.raises(KeyError, MMEarth, tiny_store, bands=bad)
    with pytest.raises(StoreError, match='no such modality'): MMEarth(tiny_store, modalities=['clouds'])
    with pytest.raises(ValueError, match='bands of aster'): MMEarth(tiny_store, modalities=['sentinel2'], bands=dict(aster=['slope']))
    with pytest.raises(StoreError, match='no such folder'): MMEarth(tmp_path / 'nowhere')
    for i in (24, 500, -25):
        with pytest.raises(IndexError, match=f"{tiny_store}: sample {i} of split 'train' asked for, it has 24"): MMEarth(tiny_store)[i]
    with pytest.raises(StoreError, match='missing'): MMEarth(tiny_store, stats={'aster': dict(mean=[0, 0], std=[1, 1], min=[0, 0], max=[0, 0])})


def test_downloads_and_hashes_are_asked_for(tiny_store, tmp_path, monkeypatch):
    "`download` and `checksum` are those of the manifest; a fault stops the opening."
    from mmearth import manifest
    asked = []
    monkeypatch.setattr(manifest, 'download', lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(manifest, 'verify', lambda *a, **k: [('tiny/x.h5', 'has another hash')])
    MMEarth(tiny_store, download=True, modalities='biome')
    assert asked == [(('tiny', tiny_store.parent), dict(checksum=False))]
    with pytest.raises(StoreError, match='another hash'): MMEarth(tiny_store, checksum=True)


def test_torchgeo_keys(tiny):
    "The keys of torchgeo's class, with what it lacks beside them."
    data = MMEarth(tiny.root, transforms=lambda s: as_torchgeo(s, data.bands))
    flat, rows = data[2], tiny.rows('train')
    assert {'image_sentinel2', 'image_sentinel1', 'image_aster', 'image_canopy_height_eth', 'mask_dynamic_world', 'mask_esa_worldcover', 'era5', 'biome', 'eco_region',
            'lat', 'lon', 'date', 'crs', 'tile_id', 'avail_bands', 'vector_lat', 'vector_lon', 'vector_month', 'level'} <= set(flat)
    assert flat['lat'] == tiny.info[tiny.tile_ids[rows[2]]]['lat'] and flat['biome'].shape == () and flat['biome'] == tiny.info[tiny.tile_ids[rows[2]]]['biome']
    assert set(flat['avail_bands']['sentinel1']) == {b for b, ok in zip(data.bands['sentinel1'], flat['valid_sentinel1'].flatten(1).any(1)) if ok}
