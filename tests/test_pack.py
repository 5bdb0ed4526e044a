"""Packs: the same bytes however they came about, every damage named, nothing finished done twice."""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

from mmearth.chunks import Array, array_meta, chunk_samples, side_by_side, take
from mmearth.pack import Pack, open_tiles, pack, verify_pack
from mmearth.share import share, unshare
from mmearth.splits import write_split
from mmearth.statistics import statistics
from mmearth.store import Store, StoreError
from mmearth.synthetic import write_store


def content(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file() and p.suffix in ('', '.json', '.csv', '.0') and 'index' not in p.name}


@pytest.fixture(scope='module')
def store(tiny_store): return Store(tiny_store)


@pytest.fixture(scope='module')
def packed(store, tmp_path_factory): return pack(store, tmp_path_factory.mktemp('packs') / 'pack', samples=10)


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / 'pack')
    return tmp_path / 'pack'


def test_a_pack_reads_as_the_store_does(store, packed):
    p, rows = Pack(packed), np.array([23, 0, 9, 10, 10])
    for name, x in store.read(rows).items():
        y = p.read(rows)[name]
        assert y.dtype == x.dtype and y.tobytes() == x.tobytes()
        assert p.mapped(name).shape == (24, *x.shape[1:]) and not p.mapped(name).flags.writeable
    assert p.tile_ids == store.tile_ids and p.levels.tolist() == store.levels.tolist() and len(p) == 24
    assert {k: v.tolist() for k, v in p.splits.items()} == {k: v.tolist() for k, v in store.splits.items()}
    np.testing.assert_equal(p.stats, store.stats)
    assert p.info[p.tile_ids[3]] == store.info[store.tile_ids[3]] and p.tiles.equals(store.tiles)
    assert p[p.tile_ids[4]]['meta'] == store[4]['meta']


def test_one_modality_may_be_named_by_a_word(store, packed):
    for tiles in (store, Pack(packed)):
        assert list(tiles.read([0], 'aster')) == list(tiles.read([0], ['aster'])) == ['aster']
        assert statistics(tiles, [0, 1], 'aster').keys() == {'aster'}
        for ask in (lambda: tiles.read([0], 'radar'), lambda: statistics(tiles, [0], 'radar'), lambda: tiles.to_xarray(0, 'radar')):
            with pytest.raises(StoreError, match='radar: no such modality; there are sentinel2, '): ask()


def test_rows_splits_and_modalities_are_chosen_in_the_order_given(store, tmp_path):
    rows = [20, 3, 11]
    p = Pack(pack(store, tmp_path / 'rows', rows=rows, modalities=['sentinel2', 'month']))
    assert p.tile_ids == [store.tile_ids[r] for r in rows] and p.modalities == ['sentinel2', 'month'] and p.source_rows.tolist() == rows
    again = Pack(pack(p, tmp_path / 'again', rows=[2, 0], modalities=['month']))
    np.testing.assert_array_equal(again.read([0, 1])['month'], store.read([11, 20])['month'])
    name = next(iter(store.splits))
    split = Pack(pack(store, tmp_path / 'split', split=name, modalities=['month']))
    assert [split.tile_ids[r] for r in split.rows(name)] == [store.tile_ids[r] for r in store.rows(name)]


@pytest.mark.parametrize('arguments,error,message', [
    (dict(rows=[24]), IndexError, 'it has 24'), (dict(rows=[-1]), IndexError, 'it has 24'), (dict(rows=[1, 1]), ValueError, 'twice'), (dict(rows=[]), StoreError, 'no tile to pack'),
    (dict(rows=[1], split='train'), ValueError, 'not both'), (dict(split='moon'), StoreError, 'moon'), (dict(modalities=['radar']), StoreError, 'radar'),
    (dict(statistics='guessed'), ValueError, 'measured'), (dict(samples=0), ValueError, 'at least one tile'), (dict(samples=-5), ValueError, 'at least one tile')])
def test_wrong_arguments_are_refused_and_leave_nothing(store, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message): pack(store, tmp_path / 'pack', **arguments)
    assert not (tmp_path / 'pack').exists()


def test_labels_travel(tmp_path):
    labelled = Store(write_store(tmp_path / 'scenes', 24, seed=1, labelled=True))
    name = next(iter(labelled.splits))
    p = Pack(pack(labelled, tmp_path / 'pack', split=name))
    want = labelled.labels.set_index('tile_id').label
    assert p.labels.label.tolist() == want[p.labels.tile_id].tolist() and len(p.labels) == len(labelled.rows(name))
    assert p.rows(name).tolist() == list(range(len(p)))


def test_saved_splits_travel(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / 'store')
    store = Store(tmp_path / 'store')
    (store.root / f'{store.stem}_splits_mine.json').write_text(json.dumps(dict(train=[5, 2], test=[7], how=dict(seed=1))))
    p = Pack(pack(Store(store.root), tmp_path / 'pack', split='mine/train'))
    assert p.rows('mine/train').tolist() == [0, 1] and p.rows('mine/test').tolist() == [] and p.tile_ids == [store.tile_ids[5], store.tile_ids[2]]


def test_measured_statistics_are_of_the_packed_rows(store, tmp_path):
    p = Pack(pack(store, tmp_path / 'pack', rows=[1, 2, 3], modalities=['aster', 'lat'], statistics='measured'))
    np.testing.assert_equal(p.stats, statistics(store, [1, 2, 3], ['aster', 'lat']))


def test_corrupt_tiles_are_dropped_and_counted(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / 'store')
    info = next((tmp_path / 'store').glob('*_tile_info.json'))
    told = json.loads(info.read_text())
    bad = next(t for t, e in told.items() if e['S2_type'] == 'l2a')
    told[bad]['BANDS']['sentinel2'] = [b for b in told[bad]['BANDS']['sentinel2'] if b != 'MSK_CLDPRB']
    info.write_text(json.dumps(told))
    store = Store(tmp_path / 'store')
    p = Pack(pack(store, tmp_path / 'pack', modalities=['lat']))
    assert bad not in p.tile_ids and len(p) == 23 and p.about['dropped'] == 1
    assert len(Pack(pack(store, tmp_path / 'all', modalities=['lat'], sound=False))) == 24


def test_two_processes_write_the_same_bytes(store, packed, tmp_path):
    assert content(pack(store, tmp_path / 'pack', samples=10, workers=2)) == content(packed)


KILLED = '''
import sys
from mmearth.pack import pack
from mmearth.store import Store
pack(Store(sys.argv[1]), sys.argv[2], samples=2)
'''


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(store, tmp_path):
    whole, out = content(pack(store, tmp_path / 'whole', samples=2)), tmp_path / 'killed'
    seen, kills = {}, 0
    while not (out / 'zarr.json').exists():
        p = subprocess.Popen([sys.executable, '-c', KILLED, store.root, out])
        before = len(list(out.glob('*/c.*')))
        while p.poll() is None and len(list(out.glob('*/c.*'))) < before + 80: time.sleep(0.002)
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
        for f in out.glob('*/c.*'): assert seen.setdefault(f, f.stat().st_ino) == f.stat().st_ino, f'{f.name} was made twice'
        if not (out / 'zarr.json').exists():
            with pytest.raises(StoreError, match='not finished|missing'): Pack(out)
    assert kills >= 2 and content(out) == whole and verify_pack(out) == []
    assert not list(out.rglob('*.part'))


def test_a_full_disk_is_an_error_and_loses_nothing(store, packed, tmp_path):
    code = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n{KILLED.replace("samples=2", "samples=10")}'
    p = subprocess.run([sys.executable, '-c', code, store.root, tmp_path / 'pack'], capture_output=True, text=True)
    assert p.returncode and 'StoreError' in p.stderr and 'cannot be written' in p.stderr and 'what is finished is kept' in p.stderr
    assert not list((tmp_path / 'pack').rglob('*.part')) or [f.name for f in (tmp_path / 'pack').rglob('*.part')] == ['hashes.part']
    assert content(pack(store, tmp_path / 'pack', samples=10)) == content(packed)


def test_too_little_room_is_said_before_anything_is_read(store, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), dict(free=1000)))
    with pytest.raises(StoreError, match='GB needed.*choose fewer modalities'): pack(store, tmp_path / 'new' / 'pack')
    assert not list(tmp_path.iterdir())  # so that fewer can be chosen for the same folder


def test_a_bad_source_names_its_file_and_finished_chunks_stay(tiny_store, store, packed, tmp_path, break_chunk):
    shutil.copytree(tiny_store, tmp_path / 'store')
    bad = Store(tmp_path / 'store')
    break_chunk(bad.path, 'sentinel1', 15)
    with pytest.raises(StoreError, match='sentinel1.*cannot read rows .15.'): pack(bad, tmp_path / 'pack', samples=10)
    assert (tmp_path / 'pack' / 'sentinel1' / 'c.0.0.0.0').exists() and not (tmp_path / 'pack' / 'zarr.json').exists()


@pytest.mark.parametrize('damage', ['shorter', 'longer', 'missing'])
def test_a_chunk_of_the_wrong_length_is_refused_on_opening_and_repaired_by_packing(damage, copy, store, packed):
    file = copy / 'dynamic_world' / 'c.1.0.0.0'
    if damage == 'missing': file.unlink()
    else: os.truncate(file, file.stat().st_size + (1 if damage == 'longer' else -1))
    with pytest.raises(StoreError, match='dynamic_world/c.1.0.0.0'): Pack(copy)
    assert [f for f, _ in verify_pack(copy)] == ['dynamic_world/c.1.0.0.0']
    pack(store, copy, samples=10)
    assert content(copy) == content(packed)


def test_every_file_is_covered_by_verify_and_small_ones_by_opening(copy):
    for file in [f for f in content(copy) if f != 'hashes.json']:
        path, kept = copy / file, (copy / file).read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert [f for f, _ in verify_pack(copy)] == [file]
        if '/' not in file and 'tile_info' not in file or file.startswith(('tile_id/c', 'level/c', 'source_row/c')):
            with pytest.raises(StoreError, match='differs from its hash'): Pack(copy)
        path.write_bytes(kept)
    assert verify_pack(copy) == []


def test_a_file_without_a_hash_is_noticed(copy):
    hashes = json.loads((copy / 'hashes.json').read_text())
    del hashes['aster/c.1.0.0.0']
    (copy / 'hashes.json').write_text(json.dumps(hashes))
    assert verify_pack(copy) == [('aster/c.1.0.0.0', 'has no hash')]
    splits = next(copy.glob('*_splits.json')).name
    del hashes[splits]
    (copy / 'hashes.json').write_text(json.dumps(hashes))
    for file in ('aster/c.1.0.0.0', splits): (copy / file).unlink()
    assert sorted(verify_pack(copy)) == [('aster/c.1.0.0.0', 'missing'), (splits, 'missing')]


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"zarr.json": 3}', 'null'])
def test_a_broken_ledger_is_refused(copy, text):
    (copy / 'hashes.json').write_text(text)
    with pytest.raises(StoreError, match='pack again into the same folder'): Pack(copy)
    if text in ('{}', '{"zarr.json": 3}'): assert verify_pack(copy)
    else:
        with pytest.raises(StoreError, match='pack again into the same folder'): verify_pack(copy)


@pytest.mark.parametrize('file', ['aster/c.1.0.0.0', 'tile_id/c.0.0', 'aster/zarr.json', 'zarr.json', '*_splits.json', '*_tile_info.json', 'hashes.json'])
@pytest.mark.parametrize('damage', ['another byte', 'nothing left', 'gone'])
def test_packing_again_repairs_whatever_was_damaged(file, damage, copy, packed, store):
    path = next(copy.glob(file))
    text = path.read_bytes()
    if damage == 'gone': path.unlink()
    else: path.write_bytes(text[:20] + b'?' + text[21:] if damage == 'another byte' else b'')
    pack(store, copy, samples=10)
    assert content(copy) == content(packed) and verify_pack(copy) == []


def test_what_was_damaged_in_an_unfinished_pack_is_made_again(copy, packed, store):
    done = json.loads((copy / 'hashes.json').read_text())
    (copy / 'hashes.json').unlink()
    (copy / 'zarr.json').rename(copy / 'plan.json')
    (copy / 'lat' / 'c.1.0').unlink()
    (copy / 'hashes.part').write_text(''.join(f'\n{k}\t{v}' for k, v in done.items() if k not in ('zarr.json', 'lat/c.1.0')))
    for file in ('aster/c.1.0.0.0', 'tile_id/c.0.0', 'aster/zarr.json'): (copy / file).write_bytes(b'?' + (copy / file).read_bytes()[1:])
    pack(store, copy, samples=10)
    assert content(copy) == content(packed) and verify_pack(copy) == []


def test_a_remedy_that_is_named_works(copy, packed, store):
    for file in ('hashes.json', next(copy.glob('*_splits.json')).name):
        (copy / file).unlink()
        with pytest.raises(StoreError, match='pack again into the same folder'): Pack(copy)
        pack(store, copy, samples=10)
        assert Pack(copy).tile_ids == store.tile_ids


def test_tile_information_is_held_against_its_hash(copy):
    path = next(copy.glob('*_tile_info.json'))
    path.write_bytes(path.read_bytes().replace(b'l2a', b'l1c', 1))
    with pytest.raises(StoreError, match='differs from its hash'): Pack(copy).info


def test_a_split_made_anew_is_another_pack(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / 'store')
    store = Store(tmp_path / 'store')
    for seed in (0, 1):
        for old in store.root.glob('*_splits_mine.json'): old.unlink()
        write_split(store, 'random', 'mine', fractions=dict(train=.5, val=.25, test=.25), seed=seed)
        if not seed: before = content(pack(store, tmp_path / 'pack', split='mine/train', modalities=['lat']))
    with pytest.raises(StoreError, match='splits'): pack(store, tmp_path / 'pack', split='mine/train', modalities=['lat'])
    assert content(tmp_path / 'pack') == before
    fresh = Pack(pack(store, tmp_path / 'fresh', split='mine/train', modalities=['lat']))
    assert fresh.source_rows.tolist() == store.rows('mine/train').tolist()


def test_what_is_no_finished_pack_does_not_verify(packed, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder'): verify_pack(tmp_path / 'nowhere')
    (copy / 'zarr.json').rename(copy / 'plan.json')
    assert verify_pack(copy) == [('plan.json', 'packing is not finished: pack again into this folder, it goes on where it was')]
    shared = share(Pack(packed), tmp_path / 'shared')
    assert verify_pack(shared) == []
    shard = next(f for f in (shared / 'aster').rglob('*') if f.is_file() and f.name != 'zarr.json')
    shard.write_bytes(shard.read_bytes()[:-1])
    assert verify_pack(shared) == [(shard.relative_to(shared).as_posix(), 'content differs from its hash')]


def test_damage_is_not_shared_and_a_refusal_leaves_nothing(copy, packed, tmp_path):
    chunk = copy / 'aster' / 'c.1.0.0.0'
    chunk.write_bytes(b'?' + chunk.read_bytes()[1:])
    with pytest.raises(StoreError, match='c.1.0.0.0.*pack again'): share(Pack(copy), tmp_path / 'shared')
    for wrong in (dict(level=10), dict(level=-1), dict(codec='gzip')):
        with pytest.raises(ValueError, match='is needed'): share(Pack(packed), tmp_path / 'shared', **wrong)
    shared = share(Pack(packed), tmp_path / 'shared')
    listed = json.loads((shared / 'hashes.json').read_text())
    listed['aster/c.1.0.0.0'] = '0' * 64
    (shared / 'hashes.json').write_text(json.dumps(listed))
    travelling = json.loads((shared / 'shared.json').read_text())
    from mmearth.chunks import hash_file
    (shared / 'shared.json').write_text(json.dumps(travelling | {'hashes.json': hash_file(shared / 'hashes.json')}))
    with pytest.raises(StoreError, match='1 files differ'): unshare(shared, tmp_path / 'back')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['pack', 'shared']


@pytest.mark.parametrize('samples', [7, 12, 24])
def test_shards_of_any_size_are_shared(samples, store, tmp_path):
    from mmearth.share import _pieces
    assert samples % _pieces(samples) == 0 and _pieces(samples) == {7: 7, 12: 12, 24: 12}[samples]
    made = pack(store, tmp_path / 'pack', samples=samples, modalities='aster')
    assert content(unshare(share(Pack(made), tmp_path / 'shared'), tmp_path / 'back')) == content(made)


def test_another_pack_is_not_overwritten(copy, store):
    before = content(copy)
    for other in (dict(samples=5), dict(samples=10, modalities=['lat']), dict(samples=10, rows=[0, 1])):
        with pytest.raises(StoreError, match='another pack'): pack(store, copy, **other)
    assert content(copy) == before
    with pytest.raises(StoreError, match='not empty'): pack(store, store.root)


def test_xarray_and_dask_open_it_as_it_is(packed, store):
    cube = xr.open_zarr(packed)
    assert cube.sentinel2.dims == ('sample', 'band_sentinel2', 'y', 'x') and cube.sentinel2.attrs['bands'] == list(store.bands('sentinel2'))
    assert cube.chunks['sample'] == (10, 10, 4)
    assert {'latitude', 'longitude', 'date', 'level'} <= set(cube.aster.coords) and cube.latitude.units == 'degrees_north'
    assert (cube.date.values == store.tiles.date).all() and (cube.longitude.values == store.tiles.lon).all()
    for name, x in store.read(np.arange(24)).items():
        assert cube[name].dtype == x.dtype
        np.testing.assert_array_equal(cube[name].values, x)
    assert float(cube.aster.astype('float64').mean().compute()) == pytest.approx(store.read(np.arange(24), ['aster'])['aster'].mean(dtype='float64'))


def test_shared_and_back_the_same_bytes(packed, tmp_path, store):
    shared = share(Pack(packed), tmp_path / 'shared')
    assert content(unshare(shared, tmp_path / 'back')) == content(packed)
    np.testing.assert_array_equal(xr.open_zarr(shared).sentinel2[7].values, store.read([7])['sentinel2'][0])
    with pytest.raises(StoreError, match='for sharing'): open_tiles(shared) if (shared / 'zarr.json').exists() else Pack(shared)
    with pytest.raises(StoreError, match='exists already'): share(Pack(packed), shared)
    shard = max((shared / 'sentinel2').rglob('*'), key=lambda f: f.stat().st_size if f.is_file() else 0)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StoreError, match=f'{shard.name}.*not what shared.json says'): unshare(shared, tmp_path / 'bad')
    assert not (tmp_path / 'bad').exists()


def test_a_pack_travels_to_another_process_and_opens_without_zarr_or_xarray(packed):
    twin = pickle.loads(pickle.dumps(Pack(packed)))
    assert twin.read([3])['aster'].tobytes() == Pack(packed).read([3])['aster'].tobytes()
    code = f'import sys; from mmearth.pack import Pack; Pack({str(packed)!r}).read([1]); assert not {{"zarr", "xarray", "dask"}} & set(sys.modules), "imported"'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('shape,samples', [((10, 3, 64, 64), 4), ((10, 5), 4), ((10, 1, 7, 7), 3), ((2, 9), 2)])
def test_all_ways_of_reading_an_array_agree(shape, samples, tmp_path):
    a = Array.of(tmp_path, array_meta(shape, samples, 'int16', ('sample', 'band', 'y', 'x')[:len(shape)]))
    x = np.random.default_rng(0).integers(-9, 9, (len(a.files) * samples, *shape[1:])).astype('int16')
    for i, f in enumerate(a.files): f.write_bytes(x[i * samples:(i + 1) * samples].tobytes())
    rows = np.array([shape[0] - 1, 0, 1, 1])
    np.testing.assert_array_equal(take(a, None, rows), x[rows])
    np.testing.assert_array_equal(side_by_side(a), x[:shape[0]])
    if a.bytes % 4096: assert side_by_side(a, memory=0) is None or len(a.files) == 1


def test_a_view_outlives_the_pack(packed):
    view = Pack(packed).mapped('sentinel2')[5]
    total = int(view.sum())
    assert total == int(Pack(packed).read([5])['sentinel2'].sum())


def test_chunks_stay_below_the_limit_of_maps():
    for n in (1, 256, 257, 1000, 131072, 131073, 1_241_424, 5_000_000): assert 1 <= chunk_samples(n) <= 1024 and 12 * -(-n // chunk_samples(n)) < 65_530
