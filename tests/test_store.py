"Stores in layouts other than the released one, handles in other processes, tiles by id, row and question."
import inspect
import json
import multiprocessing
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest

from mmearth import cube
from mmearth.index import query
from mmearth.pack import Pack, pack
from mmearth.store import Store, StoreError, TileSet, map_array
from mmearth.synthetic import write_store


def h5(root): return next(root.glob('*.h5'))


@pytest.fixture(scope='module')
def small(tmp_path_factory): return write_store(tmp_path_factory.mktemp('small') / 'store', n=20, size=16, seed=4)


def rewrite(small, tmp_path, **how):
    "A copy of the store with every array stored in another way."
    root = shutil.copytree(small, tmp_path / 'store')
    h5(root).unlink()
    with h5py.File(h5(small)) as old, h5py.File(root / h5(small).name, 'w', userblock_size=how.pop('userblock_size', 0)) as new:
        for name, ds in old.items():
            chunks = dict(chunks=how['chunks'] + ds.shape[1:]) if how.get('chunks') and name != 'metadata' else {}
            new.create_dataset(name, data=ds[:], **({**how, **chunks} if name != 'metadata' else {}))
            new[name].attrs.update(ds.attrs)
    return root


@pytest.mark.parametrize('how', [{}, dict(userblock_size=1024), dict(chunks=(7,)), dict(chunks=(7,), compression='lzf', shuffle=True), dict(chunks=(1,), compression='gzip', fletcher32=True)], ids=str)
def test_every_layout_reads_the_same(small, tmp_path, how):
    plain, other, rows = Store(small), Store(rewrite(small, tmp_path, **dict(how))), [19, 3, 3, 0, 7]
    want, got = plain.read(rows), other.read(rows)
    assert want.keys() == got.keys()
    for k in want: assert got[k].dtype == want[k].dtype and got[k].tobytes() == want[k].tobytes() and type(got[k]) is np.ndarray and got[k].flags.writeable, k
    assert other.tile_ids == plain.tile_ids and (other.levels == plain.levels).all()
    assert all((other.mapped(k) is not None) == ('chunks' not in how) for k in other.modalities) and plain.mapped('sentinel2') is None


def test_memory_maps(small, tmp_path):
    root = rewrite(small, tmp_path)
    s = Store(root)
    mapped = s.mapped('sentinel2')
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable and mapped.shape == (20, 13, 16, 16) and (mapped == Store(small).read(range(20))['sentinel2']).all()
    assert s.mapped('sentinel2') is mapped and len(pickle.dumps(s)) < 10_000
    with pytest.raises(StoreError, match='no such modality'): s.mapped('sentinel3')
    size = os.path.getsize(h5(root))
    os.truncate(h5(root), size // 2)
    for ask in (lambda: s.read(range(20)), lambda: [s.mapped(k) for k in s.modalities]):
        with pytest.raises(StoreError, match='shorter'): ask()
    s.close()
    with pytest.raises(StoreError, match='not readable as HDF5'): Store(root)


def test_map_of_bytes_that_are_not_there(tmp_path):
    with h5py.File(tmp_path / 'a.h5', 'w') as f:
        f['whole'] = np.arange(4000)
        f.create_dataset('never', (4, 2), 'f4')
        f.create_dataset('none', (0, 2), 'f4')
    with h5py.File(tmp_path / 'a.h5') as f:
        assert map_array(f['never']) is None and map_array(f['none']) is None
        os.truncate(tmp_path / 'a.h5', f['whole'].id.get_offset() + 31_999)
        with pytest.raises(StoreError, match='whole: it ends at byte .* cut short'): map_array(f['whole'])


@pytest.mark.parametrize('shape', [(7, 13, 16, 16), (7, 13, 8, 8), None])
def test_rows_that_were_never_written(small, tmp_path, shape):
    "HDF5 would give zeros."
    root = shutil.copytree(small, tmp_path / 'store')
    with h5py.File(h5(root), 'a') as f:
        pixels = f['sentinel2'][:]
        del f['sentinel2']
        ds = f.create_dataset('sentinel2', pixels.shape, pixels.dtype, chunks=shape)
        if shape: ds[:14] = pixels[:14]
    s = Store(root)
    lost = '14, 19' if shape else '0, 14, 19'
    with pytest.raises(StoreError, match=rf'sentinel2: rows \[{lost}\] are not in the file'): s.read([19, 0, 14], ['sentinel2'])
    if shape: assert (s.read([3, 13], ['sentinel2'])['sentinel2'] == pixels[[3, 13]]).all()


def test_part_of_a_row_lost(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'store')
    with h5py.File(h5(root), 'a') as f:
        pixels = f['aster'][:]
        del f['aster']
        f.create_dataset('aster', pixels.shape, pixels.dtype, chunks=(10, 1, 8, 8))[:, :, :8] = pixels[:, :, :8]
    with pytest.raises(StoreError, match=r'aster: rows \[2\]'): Store(root).read([2], ['aster'])


def test_fill_values_that_were_chosen_are_meant(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'store')
    with h5py.File(h5(root), 'a') as f:
        del f['dynamic_world']
        f.create_dataset('dynamic_world', (20, 1, 16, 16), 'uint8', chunks=(5, 1, 16, 16), fillvalue=3)
    assert (Store(root).read([2, 9], ['dynamic_world'])['dynamic_world'] == 3).all()


def _child(store, queue): queue.put((store.read([3])['aster'].tobytes(), store.file.id.id != 0, store.row(store.tile_ids[7])))


@pytest.mark.parametrize('start', ['fork', 'spawn'])
@pytest.mark.parametrize('mapped', [False, True])
def test_other_processes_open_for_themselves(small, tmp_path, start, mapped):
    s = Store(rewrite(small, tmp_path) if mapped else small)
    want, context = s.read([3])['aster'].tobytes(), multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_child, args=(s, queue))
    process.start()
    assert queue.get(timeout=60) == (want, True, 7)
    process.join()
    assert s.read([3])['aster'].tobytes() == want


def test_what_a_travelled_store_knows(small):
    s = Store(small)
    twin = pickle.loads(pickle.dumps(s))
    assert 'info' not in vars(twin) and '_at' not in vars(twin) and len(twin) == 20
    assert twin.tiles.equals(s.tiles) and (twin.levels == s.levels).all() and twin.rows('train').tolist() == s.rows('train').tolist() and dict(twin.info) == dict(s.info) and twin.labels is None
    s.close(), s.close()
    assert s.read([1])['lat'].shape == (1, 2)


def test_tile_information_in_another_order_and_with_more_tiles(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'store')
    path = next(root.glob('*_tile_info.json'))
    told = json.loads(path.read_text())
    order = sorted(told, key=lambda t: hash((t, 7)) % 101)
    path.write_text(json.dumps({'elsewhere': told['0'], **{t: told[t] for t in order}}))
    a, b = Store(small), Store(root)
    assert b.tiles.index.tolist() == list(range(20)) and b.tile_ids == a.tile_ids and len(b.info) == 21
    for c in a.tiles: assert [str(x) for x in a.tiles[c]] == [str(x) for x in b.tiles[c]], c
    assert b.query(month=[6, 7, 8], level='l2a').tolist() == a.query(month=[6, 7, 8], level='l2a').tolist()
    with pytest.raises(KeyError, match='no tile'): b.row('elsewhere')


def test_both_index_spaces(small):
    s = Store(small)
    assert isinstance(s, TileSet) and [s.row(t) for t in s.tile_ids] == list(range(20)) and s.tiles.tile_id.tolist() == s.tile_ids == list(s.info)
    for i in (0, 7, 19, -1):
        a, b, told = s[i], s[s.tile_ids[i]], s.info[s.tile_ids[i]]
        assert a['meta'] == b['meta'] == dict(tile_id=s.tile_ids[i], lat=told['lat'], lon=told['lon'], date=told['S2_DATE'], crs=told['CRS'], level=told['S2_type'])
        assert all((a[k] == b[k]).all() for k in ('sentinel2', 'biome'))
    for wrong, error in (('99', KeyError), (20, IndexError), (-21, IndexError), (1.5, TypeError)):
        with pytest.raises(error): s[wrong]


@pytest.mark.parametrize('packed', [False, True])
def test_a_row_that_does_not_exist_is_named_on_every_road(small, tmp_path, packed):
    tiles = Pack(pack(Store(small), tmp_path / 'pack', sound=False)) if packed else Store(small)
    for road in (tiles.row, tiles.__getitem__, tiles.to_xarray, tiles.plot, lambda i: tiles.to_xarray([0, i])):
        for i in (20, np.int64(500), -21):
            with pytest.raises(IndexError, match=f'{tiles.root}: row {i} asked for, it has 20'): road(i)
        with pytest.raises(TypeError): road(1.5)
    assert (tiles.row(-1), tiles.row(np.int64(3)), tiles[-1]['meta']['tile_id']) == (19, 3, tiles.tile_ids[19])


@pytest.mark.parametrize('name, same', [('to_xarray', cube.to_xarray), ('plot', cube.plot), ('query', query)])
def test_help_of_a_method_names_what_it_takes(name, same):
    method = getattr(Store, name)
    words, wanted = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()][1:] for f in (method, same))
    assert words == wanted and same.__module__ in method.__doc__


def test_names_of_the_validation_split(small):
    s = Store(small)
    assert s.rows('val').tolist() == s.rows('valid').tolist() == s.rows('validation').tolist() == [] and len(s.rows('train')) == 20
