"Readers of other people's formats: tiles written for them are the same tiles, and what cannot run says why."
import numpy as np
import pytest
import torch

from mmearth import peers
from mmearth.modalities import TASKS, modality, valid
from mmearth.store import Store


@pytest.fixture(scope='module')
def places(tiny_store, tmp_path_factory):
    tiles = peers.Repeated(Store(tiny_store), 53)
    return tiles, peers.prepare(peers.READERS, tiles, tmp_path_factory.mktemp('forms'))


@pytest.mark.parametrize('name', peers.READERS)
def test_every_reader_gives_the_tiles_it_names(places, name):
    if peers.absent(name): pytest.skip(peers.absent(name))
    tiles, folders = places
    reader = peers.READERS[name]
    batches = reader.read(folders[reader.form], 8, 0)
    for _ in range(3):
        batch = next(batches)
        assert len(batch['row']) == 8
        if not reader.differs or 'shuffled' in reader.differs: assert peers.delivered(batch, tiles) == list(TASKS)


@pytest.mark.parametrize('name', [n for n, r in peers.READERS.items() if not r.needs])
def test_an_epoch_holds_no_tile_twice(places, name):
    tiles, folders = places
    reader = peers.READERS[name]
    batches = reader.read(folders[reader.form], 8, 1)
    seen = np.concatenate([np.asarray(next(batches)['row']) for _ in range(53 // 8)])
    assert len(set(seen.tolist())) == len(seen) and seen.tolist() != sorted(seen.tolist())


def test_one_wrong_bit_is_seen(places):
    tiles, folders = places
    batch = {k: np.array(v) for k, v in next(peers.READERS['h5py, open arrays'].read(folders['contiguous'], 4, 0)).items()}
    batch['sentinel1'][2, 0, 0, 0] = np.nextafter(batch['sentinel1'][2, 0, 0, 0], np.float32(0))
    batch['aster'] = batch['aster'].astype('int32')
    del batch['month']
    assert set(TASKS) - set(peers.delivered(batch, tiles)) == {'sentinel1', 'aster', 'month'}


@pytest.mark.parametrize('gzip', [True, False])
def test_a_store_laid_out_again_is_a_store_with_the_same_tiles(places, tmp_path, gzip):
    tiles, _ = places
    again = Store(peers.lay_out(tiles, tmp_path / 'again', gzip=gzip, block=7))
    assert len(again) == 53 and again.levels.tolist() == tiles.levels.tolist() and again.size == tiles.size
    for name, x in again.read(range(53)).items(): np.testing.assert_array_equal(x, tiles.read(range(53))[name])
    assert (again.mapped('sentinel2') is None) == gzip


def test_holes_are_holes(places):
    tiles, _ = places
    holed = peers.Holed(tiles.source, 3).read(range(3))
    sound = tiles.read(range(3))
    for name in TASKS:
        m = modality(name)
        ok = valid(m, holed[name], tiles.bands(name))
        if m.level == 'pixel': assert not ok[..., :8, :8].any()
        assert (ok <= valid(m, sound[name], tiles.bands(name))).all()


def test_what_is_missing_says_why(monkeypatch):
    monkeypatch.setitem(peers.READERS, 'gone', peers.Reader('gone', 'pack', None, needs='no_such_package'))
    assert 'ModuleNotFoundError' in peers.absent('gone')
    assert peers.prepare(['gone'], None, 'nowhere') == {}
    with pytest.raises(KeyError, match='there are'): peers.absent('never heard of')


def test_larger_packs_are_read_within_their_size(places):
    _, folders = places
    runners = peers.sized(folders['pack'], [16, 53], batch=4, calls=2, threads=1)
    assert {n: run() for n, run in runners.items()} == {16: 8, 53: 8}


def test_holes_that_are_told_and_holes_that_are_not():
    raw = np.full((1, 8, 8), 20, 'uint8')
    raw[0, :2] = 0
    seen, kept = torch.from_numpy(raw[0] > 0), torch.from_numpy(raw).long()
    row = lambda theirs: peers.returned('esa_worldcover', raw, kept[0], seen, theirs)['told_by_torchgeo']
    assert row(torch.where(kept > 0, 1, 0)) == 0
    assert row(torch.where(kept > 0, 1, 255)) == 1
    assert row(torch.where(kept > 0, 1., torch.nan)) == 1
    assert row(None) is None


def test_both_classes_on_the_same_holes(places, tmp_path):
    if peers.absent('torchgeo MMEarth'): pytest.skip(peers.absent('torchgeo MMEarth'))
    tiles, _ = places
    table = peers.what_each_returns(Store(peers.lay_out(peers.Holed(tiles.source, 2), tmp_path / 'holed', gzip=False)))
    assert (table.told_by_ours == 1).all()
    assert table.told_by_torchgeo['sentinel1'] == 1 and table.told_by_torchgeo['sentinel2'] == 0
    assert 'lost' in table.note['biome']
