"Every way in which a store has been seen, or imagined, to be wrong: found on opening, with file, key and remedy."
import json
import random
import re
import shutil

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from mmearth.cli import app
from mmearth.dataset import Scale, Store, StoreError
from mmearth.statistics import statistics
from mmearth.synthetic import write_store

STEM = 'data_synthetic_v001_16'


@pytest.fixture(scope='session')
def whole(tmp_path_factory): return write_store(tmp_path_factory.mktemp('bad') / 'whole', n=8, size=16, seed=1, labelled=True)


@pytest.fixture
def store(whole, tmp_path):
    "A copy that may be damaged."
    return shutil.copytree(whole, tmp_path / 'store')


def path(root, kind): return root / (f'{STEM}.h5' if kind == 'h5' else f'{STEM}_labels.csv' if kind == 'labels' else f'{STEM}_{kind}.json')


def edit(root, kind, change):
    "Applies `change` to the JSON of a side file."
    p = path(root, kind)
    what = json.loads(p.read_text())
    p.write_text(json.dumps(change(what) or what))


def recast(root, key, **how):
    "Replaces an array of the HDF5 file."
    with h5py.File(path(root, 'h5'), 'a') as f:
        data = f[key][:]
        del f[key]
        f.create_dataset(key, data=how.get('data', lambda x: x)(data))


def drop_key(root, key):
    with h5py.File(path(root, 'h5'), 'a') as f: del f[key]


def rename_key(root, old, new):
    with h5py.File(path(root, 'h5'), 'a') as f: f.move(old, new)


def set_bands(root, names):
    with h5py.File(path(root, 'h5'), 'a') as f: f['sentinel2'].attrs['bands'] = names


def metadata(root, change):
    with h5py.File(path(root, 'h5'), 'a') as f:
        rows = f['metadata'][:]
        del f['metadata']
        f['metadata'] = change(rows)


def put(rows, field, i, value):
    rows[field][i] = value
    return rows


def cut(root, kind, share):
    p = path(root, kind)
    p.write_bytes(p.read_bytes()[:int(p.stat().st_size * share)])


def group_for_array(root):
    drop_key(root, 'aster')
    with h5py.File(path(root, 'h5'), 'a') as f: f.create_group('aster')


def labels(root, change):
    p = path(root, 'labels')
    p.write_text(change(p.read_text()))


# name: damage, file named, words of the error
DAMAGE = {
    'no h5': (lambda r: path(r, 'h5').unlink(), '', 'no .h5 file'),
    **{f'no {k}': (lambda r, k=k: path(r, k).unlink(), k, 'download it too') for k in ('band_stats', 'splits', 'tile_info')},
    'two stems': (lambda r: shutil.copy(path(r, 'h5'), r / 'other.h5'), '', 'several stores: data_synthetic_v001_16, other; name one'),
    **{f'h5 cut to {s}': (lambda r, s=s: cut(r, 'h5', s), 'h5', 'download it again') for s in (0, .001, .3, .99)},
    'h5 is html': (lambda r: path(r, 'h5').write_text('<html>404</html>'), 'h5', 'download it again'),
    **{f'{k} cut': (lambda r, k=k: cut(r, k, .7), k, 'not readable as JSON') for k in ('band_stats', 'splits', 'tile_info')},
    'splits is empty': (lambda r: cut(r, 'splits', 0), 'splits', 'download it again'),
    'splits is a list': (lambda r: edit(r, 'splits', lambda s: s['train']), 'splits', 'a JSON list, an object expected'),
    'splits is binary': (lambda r: path(r, 'splits').write_bytes(b'\xff\x00\x80'), 'splits', 'not readable as JSON'),
    'no metadata': (lambda r: drop_key(r, 'metadata'), 'h5', 'metadata: missing key'),
    'metadata without ids': (lambda r: metadata(r, lambda m: m[['S2_type']].astype([('S2_type', 'S10')])), 'h5', 'no field tile_id'),
    'metadata is plain': (lambda r: metadata(r, lambda m: np.arange(8)), 'h5', 'no field tile_id'),
    'misspelt key': (lambda r: rename_key(r, 'sentinel2', 'sentinel_2'), 'h5', 'sentinel_2: unknown key'),
    'no map at all': (lambda r: [drop_key(r, k) for k in list(h5py.File(path(r, 'h5'))) if k not in ('metadata', 'lat')], 'h5', 'no pixel-level modality'),
    'group for array': (group_for_array, 'h5', 'aster: a group'),
    'fewer rows': (lambda r: recast(r, 'aster', data=lambda x: x[:7]), 'h5', 'aster: shape (7, 2, 16, 16), (8, 2, 16, 16) expected'),
    'fewer bands': (lambda r: recast(r, 'sentinel2', data=lambda x: x[:, :12]), 'h5', 'sentinel2: shape (8, 12, 16, 16), (8, 13, 16, 16) expected'),
    'other size': (lambda r: recast(r, 'dynamic_world', data=lambda x: x[..., :8, :8]), 'h5', 'dynamic_world: shape'),
    'not square': (lambda r: recast(r, 'sentinel2', data=lambda x: x[..., :8]), 'h5', 'shape'),
    'axis missing': (lambda r: recast(r, 'dynamic_world', data=lambda x: x[:, 0]), 'h5', 'dynamic_world: shape (8, 16, 16)'),
    'fewer columns': (lambda r: recast(r, 'biome', data=lambda x: x[:, :13]), 'h5', 'biome: shape (8, 13), (8, 14) expected'),
    'no axis': (lambda r: recast(r, 'lat', data=lambda x: x[0, 0]), 'h5', 'lat: shape ()'),
    **{f'{k} as {t}': (lambda r, k=k, t=t: recast(r, k, data=lambda x: x.astype(t)), 'h5', f'{k}: {t} numbers')
       for k, t in (('sentinel2', 'int16'), ('sentinel2', 'float32'), ('sentinel1', 'float64'), ('aster', 'float32'), ('canopy_height_eth', 'uint8'), ('eco_region', 'int64'), ('sentinel2', '>u2'))},
    'bands attribute short': (lambda r: set_bands(r, ['B4', 'B3']), 'h5', 'shape (8, 13, 16, 16), (8, 2, 16, 16) expected'),
    'bands attribute unknown': (lambda r: set_bands(r, [f'B{i}' for i in range(13)]), 'h5', 'B0'),
    'bands attribute repeats': (lambda r: set_bands(r, ['B4'] * 13), 'h5', 'repeats a name'),
    'tile not in tile_info': (lambda r: edit(r, 'tile_info', lambda t: t.pop('3') and None), 'tile_info', '3: 1 tiles of'),
    'level differs': (lambda r: edit(r, 'tile_info', lambda t: t['3'].update(S2_type={'l1c': 'l2a', 'l2a': 'l1c'}[t['3']['S2_type']])), 'tile_info', '3: S2_type'),
    'level unknown': (lambda r: metadata(r, lambda m: put(m, 'S2_type', 2, 'l3')), 'h5', "row 2 has processing level 'l3'"),
    'tile twice': (lambda r: metadata(r, lambda m: put(m, 'tile_id', 2, '3')), 'h5', "tile '3' and 0 others appear more than once"),
    'tile id not text': (lambda r: metadata(r, lambda m: put(m, 'tile_id', 2, b'\xff\xfe')), 'tile_info', '1 tiles of'),
    'facts twice': (lambda r: path(r, 'tile_info').write_text(path(r, 'tile_info').read_text()[:-1] + ', "3": {"S2_type": "l1c"}}'), 'tile_info', '3: this tile and 0 others have more than one record'),
    'facts without level': (lambda r: edit(r, 'tile_info', lambda t: t['3'].pop('S2_type') and None), 'tile_info', '3: S2_type'),
    'place beyond the pole': (lambda r: edit(r, 'tile_info', lambda t: t['3'].update(lat=95.)), 'tile_info', '3: lat is 95.0'),
    'ids as numbers': (lambda r: metadata(r, lambda m: m.astype([('tile_id', 'i4'), ('S2_type', 'S10')])), 'h5', 'metadata: tile_id is not text'),
    'facts not an object': (lambda r: edit(r, 'tile_info', lambda t: t.update({'3': 'l1c'})), 'tile_info', '3'),
    'row too large': (lambda r: edit(r, 'splits', lambda s: s.update(val=[8], train=[])), 'splits', 'val: row 8 does not exist, the file has 8'),
    'row negative': (lambda r: edit(r, 'splits', lambda s: s.update(train=[-1])), 'splits', 'row -1 does not exist'),
    'row twice': (lambda r: edit(r, 'splits', lambda s: s.update(train=[1, 2, 1])), 'splits', 'row 1 is also in train'),
    'row in two splits': (lambda r: edit(r, 'splits', lambda s: s.update(train=[1, 2], test=[2])), 'splits', 'test: row 2 is also in train'),
    'row beyond all numbers': (lambda r: edit(r, 'splits', lambda s: s.update(train=[10 ** 30])), 'splits', f'row {10 ** 30} does not exist'),
    'row is true': (lambda r: edit(r, 'splits', lambda s: s.update(train=[True])), 'splits', 'not a list of row numbers'),
    'row not a number': (lambda r: edit(r, 'splits', lambda s: s.update(train=['1'])), 'splits', 'not a list of row numbers'),
    'row a fraction': (lambda r: edit(r, 'splits', lambda s: s.update(train=[1.5])), 'splits', 'not a list of row numbers'),
    'split not a list': (lambda r: edit(r, 'splits', lambda s: s.update(train=3)), 'splits', 'not a list of row numbers'),
    'statistics short': (lambda r: edit(r, 'band_stats', lambda s: s['aster'].update(std=[1.])), 'band_stats', "aster: 1 numbers in 'std', the file has 2 bands"),
    'statistics without std': (lambda r: edit(r, 'band_stats', lambda s: s['era5'].pop('std') and None), 'band_stats', "era5: no list of numbers 'std'"),
    'statistics not an object': (lambda r: edit(r, 'band_stats', lambda s: s.update(aster=3)), 'band_stats', 'aster'),
    'statistics not numbers': (lambda r: edit(r, 'band_stats', lambda s: s['aster'].update(mean=['a', 'b'])), 'band_stats', 'aster'),
    'label of another tile': (lambda r: labels(r, lambda t: t.replace('\n3,3,', '\nx3,3,')), 'labels', 'x3: 1 labels name tiles that the file does not hold'),
    'label of another row': (lambda r: labels(r, lambda t: t.replace('\n3,3,', '\n3,9,')), 'labels', '3: 1 labels name another row'),
    'label twice': (lambda r: labels(r, lambda t: t + t.splitlines()[3] + '\n'), 'labels', 'row 2 is labelled twice'),
    'label column missing': (lambda r: labels(r, lambda t: t.replace('split', 'part')), 'labels', 'split: column missing'),
    'label row not a number': (lambda r: labels(r, lambda t: t.replace('\n3,3,', '\n3,x,')), 'labels', 'not readable as a table'),
    'labels cut': (lambda r: labels(r, lambda t: '\n'.join(t.splitlines()[:5]) + '\n'), 'labels', '4 rows of the splits have no label'),
    'labels empty': (lambda r: cut(r, 'labels', 0), 'labels', 'not readable as a table'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_found_on_opening(store, damage):
    do, kind, words = DAMAGE[damage]
    do(store)
    with pytest.raises(StoreError) as caught: Store(store)
    error = caught.value
    assert words in str(error), str(error)
    assert error.path == str(path(store, kind) if kind else store), str(error)
    assert error.remedy and error.remedy in str(error)


def test_the_undamaged_store_opens(store): assert len(Store(store).labels) == 8


def test_statistics_that_are_missing_are_made_as_the_error_says(store):
    path(store, 'band_stats').unlink()
    with pytest.raises(StoreError) as caught: Store(store)
    path(store, 'band_stats').write_text('{}')
    said = CliRunner().invoke(app, [*re.search('`mmearth (.*?)`', caught.value.remedy)[1].split(), '--no-progress'])
    assert said.exit_code == 0, said.output
    shutil.copy(said.output.strip(), path(store, 'band_stats'))
    made = Store(store)
    for key, entry in statistics(made).items():
        for part, numbers in entry.items(): np.testing.assert_array_equal(np.array(made.stats[key][part], float), np.array(numbers, float))
    assert Scale(made.stats, dict(sentinel2=made.bands('sentinel2'))).mean['sentinel2'].isfinite().all()


def test_names_that_do_not_exist(store, tmp_path):
    s = Store(store)
    for bad, known in ((lambda: s.read([0], ['sentinel3']), 'sentinel2'), (lambda: s.bands('sentinel3'), 'dynamic_world'), (lambda: s.rows('holdout'), 'train'),
                       (lambda: Store(store, stem='data_1M_v001'), STEM)):
        with pytest.raises(StoreError, match=known): bad()
    with pytest.raises(StoreError, match='no such folder'): Store(tmp_path / 'nowhere')
    assert Store(path(store, 'h5')).stem == STEM  # the file itself stands for its store
    shutil.copy(path(store, 'h5'), store / 'other.h5')
    assert len(Store(store, stem=STEM)) == 8
    with pytest.raises(StoreError, match='other_band_stats.json: missing'): Store(store, stem='other')


def test_level_from_tile_info_where_metadata_has_none(store):
    "The published merge tool writes metadata without the level."
    before = Store(store).levels
    metadata(store, lambda m: m[['tile_id']].astype([('tile_id', 'S100')]))
    assert (Store(store).levels == before).all()


@pytest.mark.parametrize('key,threads', [('sentinel1', 1), ('sentinel2', 4), ('lat', 1)])
def test_a_broken_chunk_is_named(store, key, threads, break_chunk):
    break_chunk(path(store, 'h5'), key, 5, b'\0')
    s = Store(store, threads=threads)
    with pytest.raises(StoreError, match=rf'{key}: cannot read rows \[5\]') as caught: s.read([1, 5, 3])
    assert caught.value.path == str(path(store, 'h5')) and 'download' in caught.value.remedy
    assert len(s.read([1, 3])[key]) == 2


def test_random_damage_is_refused_or_harmless(store, whole):
    "Bytes flipped, zeroed or cut anywhere in the HDF5 file: a StoreError, or exactly the right numbers; never wrong ones."
    good, right, dice = path(whole, 'h5').read_bytes(), Store(whole).read(range(8)), random.Random(0)
    for _ in range(120):
        hurt = bytearray(good)
        at = dice.choice((dice.randrange(len(hurt)), dice.randrange(8000)))
        if (kind := dice.choice('flip zero cut'.split())) == 'cut': hurt = hurt[:at]
        elif kind == 'zero': hurt[at:at + 512] = bytes(len(hurt[at:at + 512]))
        else: hurt[at] ^= 1 << dice.randrange(8)
        path(store, 'h5').unlink()
        path(store, 'h5').write_bytes(hurt)
        try: read = Store(store).read(range(8))
        except StoreError: continue
        assert all(read[k].tobytes() == right[k].tobytes() for k in right), (kind, at)


def test_saved_splits_are_checked_too(store):
    s, saved = Store(store), store / f'{STEM}_splits_blocks.json'
    with pytest.raises(StoreError, match='mmearth split .* makes it'): s.rows('blocks/train')
    saved.write_text(json.dumps(dict(train=[0, 5], val=[2], how=dict(seed=0))))
    assert s.rows('blocks/train').tolist() == [0, 5] and s.rows('blocks/valid').tolist() == s.rows('blocks/validation').tolist() == [2]
    for bad, words in ((dict(train=[8]), 'row 8 does not exist'), (dict(train=[1], val=[1]), 'row 1 is also in train'), ([1], 'an object expected'), (dict(train='all'), 'not a list')):
        saved.write_text(json.dumps(bad))
        with pytest.raises(StoreError, match=words) as caught: s.rows('blocks/train')
        assert caught.value.path == str(saved)
    saved.write_text('{"train": [0, 5')
    with pytest.raises(StoreError, match='not readable as JSON'): s.rows('blocks/train')
