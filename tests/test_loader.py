"""Loader: one stream over any number of processes, the same batches from anywhere, errors that surface."""
import gc
import threading
import time

import h5py
import numpy as np
import pytest
import torch

from mmearth.loader import Ahead, Loader, shard, stream
from mmearth.pack import Pack, pack
from mmearth.pretrain import Feed
from mmearth.modalities import modality
from mmearth.recipe import Recipe
from mmearth.store import Store, StoreError


@pytest.fixture(scope='module')
def store(tiny_store): return Store(tiny_store)


@pytest.fixture(scope='module')
def packed(store, tmp_path_factory): return Pack(pack(store, tmp_path_factory.mktemp('packs') / 'pack', samples=7))


@pytest.fixture(scope='module')
def contiguous(tiny_store, tmp_path_factory):
    "The same store with its arrays in one piece, unpacked, at odd offsets."
    root = tmp_path_factory.mktemp('contiguous')
    for p in tiny_store.iterdir():
        if p.suffix in ('.json', '.csv'): (root / p.name).write_bytes(p.read_bytes())
    source = next(tiny_store.glob('*.h5'))
    with h5py.File(source) as f, h5py.File(root / source.name, 'w', userblock_size=512) as g:
        for k in f:
            g.create_dataset(k, data=f[k][:])
            g[k].attrs.update(f[k].attrs)
    return Store(root)


@pytest.mark.parametrize('world', [1, 2, 3, 4])
@pytest.mark.parametrize('batch', [1, 3, 8, 31])
@pytest.mark.parametrize('n', [10, 64, 101])
def test_ranks_together_see_the_stream_of_one_process(world, batch, n):
    steps = -(-3 * n // (world * batch))
    parts = [shard(5, n, s, batch, r, world) for s in range(steps) for r in range(world)]
    whole = stream(5, n, 0, steps * world * batch)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for epoch in range(3): assert sorted(whole[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_the_stream_is_what_kept_runs_saw():
    "Pinned: a change here changes every run there is."
    assert stream(0, 10, 0, 10).tolist() == [9, 7, 2, 4, 1, 3, 8, 0, 6, 5]
    assert stream(7, 1000, 995, 10).tolist() == stream(7, 1000, 0, 1010)[995:1005].tolist()


@pytest.mark.parametrize('threads', [0, 1, 2])
@pytest.mark.parametrize('kind', ['packed', 'contiguous', 'store', 'kept'])
def test_every_source_gives_the_same_batches(threads, kind, store, request):
    source = store if kind == 'kept' else request.getfixturevalue(kind)
    rows = store.rows('train')
    with Loader(source, 'train', batch=5, seed=3, threads=threads, memory=2**30 if kind == 'kept' else 0) as loader:
        assert bool(loader.gather.mapped) == (kind in ('packed', 'contiguous'))
        for b in loader.steps(2, 9):
            assert b.rows.tolist() == rows[stream(3, len(rows), b.step * 5, 5)].tolist()
            for name, x in store.read(b.rows).items():
                assert b.raw[name].numpy().dtype == x.dtype and b.raw[name].numpy().tobytes() == x.tobytes(), name


def test_any_step_in_any_order_gives_the_same(packed):
    names = ['aster', 'lat']
    with Loader(packed, batch=4, modalities=names, threads=2) as loader:
        first = {s: (b.rows.copy(), {k: v.clone() for k, v in b.raw.items()}) for s in range(20) for b in [loader.batch(s)]}
        for s in (7, 7, 0, 19, 3, 4, 5, 2, 1000, 6):
            b = loader.batch(s)
            if s in first:
                assert b.rows.tolist() == first[s][0].tolist()
                assert all(torch.equal(b.raw[k], first[s][1][k]) for k in names)


def test_a_batch_holds_until_the_next_is_asked_for(packed):
    with Loader(packed, batch=4, modalities=['sentinel2'], threads=2) as loader:
        b = loader.batch(0)
        kept = b.raw['sentinel2'].clone()
        time.sleep(0.1)  # threads have filled every other buffer
        assert torch.equal(kept, b.raw['sentinel2'])
        assert len({loader.batch(s).raw['sentinel2'].data_ptr() for s in range(1, 40)}) <= 4  # and buffers are used again


def test_a_decoded_batch_is_not_overwritten(packed):
    recipe = Recipe(batch=4, tasks=('sentinel2', 'era5', 'lat', 'biome'))
    feed = Feed(packed, recipe, {t: modality(t).train_bands for t in recipe.tasks}, torch.device('cpu'))
    batch = feed.batch(0)[0]
    kept = {k: v.clone() for k, v in batch.items() if k != 'valid'}
    for p in range(4, 80, 4): feed.batch(p)
    assert all(torch.equal(kept[k], batch[k]) for k in kept)


def test_an_error_surfaces_at_its_step_with_the_file_and_the_loader_goes_on(tiny_store):
    class Broken(Store):
        broken = True
        def read(self, rows, modalities=None):
            if self.broken and len(rows) > 1 and 7 in rows: raise StoreError(self.path, 'aster', 'cannot read rows [7]', 'download it again')
            return super().read(rows, modalities)
    source = Broken(tiny_store)
    with Loader(source, batch=4, modalities=['aster'], threads=2) as loader:
        bad = [s for s in range(12) if 7 in loader.rows[loader.picks(s)]]
        for s in range(12):
            if s in bad:
                with pytest.raises(StoreError, match='cannot read rows .7.'): loader.batch(s)
            else: assert loader.batch(s).step == s
        source.broken = False
        assert 7 in loader.batch(bad[0]).rows


def test_real_damage_in_a_thread_names_the_file(tiny_store, tmp_path, break_chunk):
    import shutil
    shutil.copytree(tiny_store, tmp_path / 'store')
    bad = Store(tmp_path / 'store')
    break_chunk(bad.path, 'sentinel2', 11)
    with Loader(bad, batch=24, modalities=['sentinel2']) as loader, pytest.raises(StoreError, match=r'\.h5: sentinel2: cannot read rows .11.'): loader.batch(0)


def test_threads_end_with_the_loader(packed):
    def alive(): return sum(t.name.startswith('mmearth-loader') for t in threading.enumerate())
    gc.collect()
    time.sleep(0.1)
    before = alive()
    loader = Loader(packed, batch=4, threads=2)
    loader.batch(0)
    assert alive() == before + 2
    loader.close()
    assert alive() == before
    loader = Loader(packed, batch=4, threads=2)
    loader.batch(0)
    del loader  # no collection needed: there is no cycle
    for _ in range(200):
        if alive() == before: break
        time.sleep(0.01)
    assert alive() == before


def test_waiting_is_measured():
    slow = Ahead(lambda step, slot: time.sleep(0.02), ['a', 'b', 'c'], 1)
    for s in range(5): slow.get(s)
    assert slow.idle > 0.05
    slow.close()
    ready = Ahead(lambda step, slot: None, ['a', 'b', 'c'], 1)
    for s in range(5): ready.get(s); time.sleep(0.02)
    assert ready.idle < 0.5 * (ready.ended - ready.began)
    ready.close()


def test_no_thread_works_while_all_buffers_are_full(packed):
    calls = []
    line = Ahead(lambda step, slot: calls.append(step), ['a', 'b', 'c'], 2)
    line.get(0)
    time.sleep(0.1)
    assert sorted(calls) == [0, 1, 2]
    line.close()


@pytest.mark.parametrize('arguments,error', [(dict(rows=[]), ValueError), (dict(rows=[24]), IndexError), (dict(rows=[-1]), IndexError), (dict(batch=0), ValueError),
    (dict(rank=1), ValueError), (dict(rank=-1), ValueError), (dict(world=0), ValueError), (dict(rows='moon'), StoreError), (dict(modalities=['radar']), StoreError), (dict(modalities='radar'), StoreError), (dict(modalities=[]), ValueError)])
def test_wrong_arguments(packed, store, arguments, error):
    for source in (packed, store):
        with pytest.raises(error): Loader(source, **dict(batch=4) | arguments)


def test_a_loop_is_an_epoch_and_the_next_goes_on(packed):
    with Loader(packed, batch=5) as loader:
        first, second = ([(b.step, *b.rows) for b in loader] for _ in range(2))
        assert [s for s, *_ in first] == [0, 1, 2, 3] and [s for s, *_ in second] == [4, 5, 6, 7]
        assert len({r for _, *rows in first for r in rows}) == 20


def test_folders_words_and_too_large_batches(packed):
    with Loader(str(packed.root), modalities='aster', batch=4) as loader: assert list(loader.batch(0).raw) == ['aster']
    with pytest.raises(ValueError, match='24 such rows: make the batch smaller'): Loader(packed, batch=25)
    with pytest.raises(ValueError, match='for 2 processes'): Loader(packed, batch=13, world=2)


def test_hints_change_nothing(packed):
    with Loader(packed, batch=4, ahead=True) as a, Loader(packed, batch=4) as b:
        for s in range(6):
            x, y = a.batch(s), b.batch(s)
            assert all(torch.equal(x.raw[k], y.raw[k]) for k in x.raw)


def test_a_pack_without_one_piece_reads_file_by_file(store, tmp_path, monkeypatch):
    monkeypatch.setattr('mmearth.pack.side_by_side', lambda array: None if array.folder.name in ('aster', 'lat') else np.concatenate([np.fromfile(f, array.dtype).reshape(-1, *array.shape[1:]) for f in array.files])[:array.shape[0]])
    piecemeal = Pack(pack(store, tmp_path / 'pack', samples=7, modalities=['aster', 'lat', 'month']))
    with Loader(piecemeal, batch=5) as loader:
        assert loader.gather.others == ['aster', 'lat']
        for b in loader.steps(0, 6):
            for k, x in store.read(b.rows, b.raw).items(): assert b.raw[k].numpy().tobytes() == x.tobytes()
