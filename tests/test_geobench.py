"GEO-Bench: hostile pickles, real samples against other readers, packs, and everything that can be wrong with a download."
import ast
import datetime
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import types

import h5py
import numpy as np
import pytest

from mmearth import geobench, samples
from mmearth.geobench import GEOBENCH, GeoBench, available, declared, pack_task, select
from mmearth.index import StoreError
from mmearth.manifest import read_manifest
from mmearth.samples import Inert, as_numpy, choose, metadata, misnamed, read_pickle, read_sample, s2_band, write_pickle

S2 = ['01 - Coastal aerosol', '02 - Blue', '03 - Green', '04 - Red', '05 - Vegetation Red Edge', '06 - Vegetation Red Edge', '07 - Vegetation Red Edge', '08 - NIR',
      '08A - Vegetation Red Edge', '09 - Water vapour', '10 - SWIR - Cirrus', '11 - SWIR', '12 - SWIR']
RADAR = ['01 - VH.Real', '02 - VH.Imaginary', '03 - VV.Real', '04 - VV.Imaginary', '05 - VH.LEE Filtered', '06 - VV.LEE Filtered', '07 - VH.LEE Filtered.Real', '08 - VV.LEE Filtered.Imaginary']


@pytest.fixture
def writer(monkeypatch):
    "Modules in the place of GEO-Bench's own, so that Python's pickle writes their classes."
    def make(module, *names):
        found = types.ModuleType(module)
        for name in names: setattr(found, name, type(name, (), {'__module__': module, '__init__': lambda self, **kw: self.__dict__.update(kw)}))
        monkeypatch.setitem(sys.modules, module, found)
        return found
    for parent in ('ccb', 'ccb.io', 'geobench', 'geobench.io'): make(parent)
    return make


@pytest.fixture
def dataset(writer): return writer('geobench.dataset', 'Sentinel1', 'Sentinel2', 'Landsat8', 'SpectralBand', 'SegmentationClasses', 'CloudProbability', 'TaskSpecifications', 'Classification')


def write_sample(path, planes, label, sensor, date=None, mask=None, **more):
    "As `write_sample_hdf5` of GEO-Bench does, with Python's own pickle."
    with h5py.File(path, 'w') as f:
        told = {} if label is None else dict(label=label)
        keys = {name: name if date is None else f'{name}_{date}' for name in planes}
        for name, x in planes.items():
            f.create_dataset(keys[name], data=x)
            told[keys[name]] = dict(date=date, date_id=date, spatial_resolution=10, band_info=sensor(name=name, alt_names=('x',), spatial_resolution=10, wavelength=.49), meta_info=None, **more)
        if mask is not None:
            f.create_dataset('label' if date is None else f'label_{date}', data=mask)
            told['label' if date is None else f'label_{date}'] = dict(date=date, band_info=None)
        told['bands_order'] = [*keys.values(), *(k for k in told if k.startswith('label') and mask is not None)]
        f.attrs['pickle'] = str(pickle.dumps(told))


def write_task(root, sensor, n=20, names=S2, size=8, label=lambda i: i % 4, dtype='int16', kind='single', seed=0, **kw):
    "A task with partitions 10 : 5 : 5; gives back the pixels (n, C, H, W)."
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    x = (rng.integers(1, 9000, (n, len(names), size, size)) / (1 if np.dtype(dtype).kind == 'i' else 7)).astype(dtype)
    for i in range(n):
        y = label(i)
        write_sample(root / f's{i:03d}.hdf5', dict(zip(names, x[i])), None if kind == 'segment' else y, sensor, mask=y if kind == 'segment' else None, **kw)
    parts = dict(train=[f's{i:03d}' for i in range(10)], valid=[f's{i:03d}' for i in range(10, 15)], test=[f's{i:03d}' for i in range(15, 20)])
    (root / 'default_partition.json').write_text(json.dumps(parts))
    (root / '0.50x_train_partition.json').write_text(json.dumps({**parts, 'train': ['s007', 's001', 's004', 's002', 's009']}))
    (root / 'band_stats.json').write_text(json.dumps({n: dict(mean=float(x[:, i].mean()), std=float(x[:, i].std()), max=float(x[:, i].max())) for i, n in enumerate(names)}))
    (root / 'label_map.json').write_text(json.dumps({str(c): [f's{i:03d}' for i in range(n) if i % 4 == c] for c in range(4)}))
    return x


# ---- pickles

class Call:
    def __init__(self, call, *args): self.call = call, args
    def __reduce__(self): return self.call


def payloads(mark):
    "Pickles that would leave `mark` behind, import something, or eat the memory."
    touch, code = f'touch {mark}', f'open({str(mark)!r}, "w")'
    deep = b'\x80\x04' + b'(' * 10 + b']' * 100_000 + b'.'
    yield from dict(
        system=pickle.dumps(Call(os.system, touch)), eval=pickle.dumps(Call(eval, code)), exec=pickle.dumps(Call(exec, code)), popen=pickle.dumps(Call(subprocess.Popen, ['touch', str(mark)])),
        protocol_0=pickle.dumps(Call(os.system, touch), 0), protocol_2=pickle.dumps(Call(os.system, touch), 2), by_hand=f"cos\nsystem\n(S'{touch}'\ntR.".encode(),
        inst=f"(S'{touch}'\nios\nsystem\n.".encode(), obj=b'(cos\nsystem\n' + f"S'{touch}'\no.".encode(), nested=pickle.dumps(dict(bands_order=['a'], a=dict(meta=[(Call(os.system, touch),)]))),
        dotted=b'\x80\x04\x8c\x10geobench.dataset\x8c\x09os.system\x93.', lower=b'\x80\x04\x8c\x10geobench.dataset\x8c\x06system\x93.', alike=b'\x80\x04\x8c\x0cgeobenchmark\x8c\x04Evil\x93.',
        getattr=b'\x80\x04cbuiltins\ngetattr\n.', importer=b'\x80\x04cbuiltins\n__import__\n.', numpy_load=b'\x80\x04cnumpy\nload\n.',
        reconstructor=b'\x80\x04ccopyreg\n_reconstructor\n.', operator=b'\x80\x04coperator\nattrgetter\n.', persistent=b'\x80\x04\x8c\x01xQ.', extension=b'\x80\x04\x82\x01.',
        build_on_class=b'\x80\x04\x8c\x10geobench.dataset\x8c\x09Sentinel2\x93}\x8c\x03get\x8c\x01xsb.', build_on_dict=b'\x80\x04}N}\x8c\x01a\x8c\x01bs\x86b.',
        new_of_text=b'\x80\x04\x8c\x01x)\x81.', much=b'\x80\x05\x96' + struct.pack('<Q', 10**12) + b'.', frame=b'\x80\x04\x95' + b'\xff' * 8 + b'N.', cut=pickle.dumps(dict(a=1))[:-4],
        memo=b'\x80\x04j\xff\xff\xff\x7f.', empty=b'', text=b'hello', large=bytes(samples.LIMIT + 1), deep=deep).items()


@pytest.mark.parametrize('name', [n for n, _ in payloads('x')])
def test_hostile_pickles_are_refused_and_not_run(name, tmp_path):
    mark = tmp_path / 'mark'
    data = dict(payloads(mark))[name]
    before = set(sys.modules)
    if name in ('deep', 'frame'):  # strange, but tame: nested lists, a frame that says more than there is
        try: read_pickle(data, 'x.hdf5', 'pickle')
        except StoreError: pass
    else:
        with pytest.raises(StoreError, match=r'x\.hdf5: pickle: pickle refused .*nothing in it was run'): read_pickle(data, 'x.hdf5', 'pickle')
    assert not mark.exists() and set(sys.modules) == before


def test_a_hostile_sample_and_a_hostile_task(tmp_path, dataset):
    "Through the front door: the attribute of a sample, task_specs.pkl."
    mark = tmp_path / 'mark'
    write_task(tmp_path / 't', dataset.Sentinel2)
    evil = pickle.dumps(dict(label=Call(os.system, f'touch {mark}')))
    with h5py.File(tmp_path / 't' / 's004.hdf5', 'r+') as f: f.attrs['pickle'] = str(evil)
    with pytest.raises(StoreError, match=r's004\.hdf5: pickle: pickle refused .*system'): GeoBench(tmp_path / 't').arrays('train', progress=False)
    with h5py.File(tmp_path / 't' / 's004.hdf5', 'r+') as f: f.attrs['pickle'] = f"__import__('os').system('touch {mark}')"
    with pytest.raises(StoreError, match=r's004\.hdf5: pickle: no attribute with the text of a pickle'): GeoBench(tmp_path / 't').arrays('train', progress=False)
    with h5py.File(tmp_path / 't' / 's004.hdf5', 'r+') as f: f.attrs['pickle'] = "b'a' + b'b'"
    with pytest.raises(StoreError, match='no attribute with the text'): read_sample(tmp_path / 't' / 's004.hdf5')
    (tmp_path / 't' / 'task_specs.pkl').write_bytes(evil)
    with pytest.raises(StoreError, match=r'task_specs\.pkl: pickle refused'): GeoBench(tmp_path / 't')
    assert not mark.exists()


def test_mutated_pickles(dataset):
    "A thousand damaged records: a value or a StoreError, nothing else."
    good = pickle.dumps(dict(label=np.int64(3), a=dict(date=datetime.date(2019, 11, 5), band_info=dataset.Sentinel2(name='02 - Blue')), bands_order=['a']))
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(1000):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 3): bad[at] = rng.integers(0, 256)
        try: outcomes.append(type(metadata(repr(bytes(bad)), 'x.hdf5')))
        except StoreError: outcomes.append(StoreError)
    assert set(outcomes) == {dict, StoreError} and outcomes.count(StoreError) > 100


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_tame_pickles_of_every_protocol(protocol, dataset):
    band = dataset.Sentinel2(name='02 - Blue', alt_names=('2', 'blue'), spatial_resolution=10)
    told = read_pickle(pickle.dumps(dict(label=7, band=band, none=None, flags=(True, False, 1.5, 2**40, -3, 'ü', [1, [2]])), protocol), '')
    assert told['flags'] == (True, False, 1.5, 2**40, -3, 'ü', [1, [2]]) and told['label'] == 7
    assert isinstance(told['band'], Inert) and told['band'].get('alt_names') == ('2', 'blue') and type(told['band']) is not type(band)
    if protocol > 2:
        for number in (np.int64(-7), np.float32(.5), np.bool_(True), np.uint8(255), np.arange(12).reshape(3, 4), np.arange(12.).reshape(3, 4).T, np.array([0, 1, 1], bool), np.arange(3, dtype='>i2')):
            got = as_numpy(read_pickle(pickle.dumps(number, protocol), ''))
            assert np.array_equal(got, number) and np.dtype(got.dtype).newbyteorder('=') == number.dtype.newbyteorder('=')


def test_places_and_dates_are_inert(dataset):
    "What samples with coordinates carry: affine, rasterio, dates; the last are not needed as themselves."
    affine, crs = pytest.importorskip('affine'), pytest.importorskip('rasterio.crs')
    told = read_pickle(pickle.dumps(dict(transform=affine.Affine(10, 0, 331040, 0, -10, -3714560), crs=crs.CRS.from_epsg(32634), date=datetime.date(2019, 11, 5), at=datetime.datetime(2019, 11, 5))), '')
    assert {k: type(v).__name__ for k, v in told.items()} == dict(transform='Affine', crs='CRS', date='date', at='datetime')
    assert all(isinstance(v, Inert) for v in told.values()) and told['transform'].args[:2] == (10, 0)


def test_written_pickles_are_read_by_python(dataset):
    "What `write_pickle` writes for a class that is not there, Python reads where it is."
    blue = samples.inert('geobench.dataset', 'Sentinel2')()
    blue.__setstate__(dict(name='02 - Blue'))
    got = pickle.loads(write_pickle(dict(bands=[blue, blue], label=[0, 1])))
    assert type(got['bands'][0]) is dataset.Sentinel2 and got['bands'][0].name == '02 - Blue' and got['bands'][0] is got['bands'][1] and got['label'] == [0, 1]


# ---- real samples

def test_real_samples_against_plain_h5py(shared, tmp_path, monkeypatch):
    "Pixels and labels of all samples, read here key by key with an unpickler of its own."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

    class Any(pickle.Unpickler):
        def find_class(self, module, name): return type(name, (), {})

    for folder, kind, order in (('eurosat', 'single', 'B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A'), ('brick_kiln_v1.0', 'single', 'B1 B2 B3 B4 B5 B7 B8A B8 B11 B12'),
                                ('southAfricaCropType', 'segment', 'B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12')):
        task = GeoBench(shared / 'geobench' / folder)
        images = task.arrays('all', progress=False)
        assert (task.kind, task.bands, images.bands) == (kind, tuple(order.split()), tuple(order.split())) and task.name == declared(folder).name
        for i, name in enumerate(images.ids):
            with h5py.File(shared / 'geobench' / folder / f'{name}.hdf5') as f:
                keys = [k for k in sorted(f) if k[0].isdigit()][:len(task.bands)]
                assert np.array_equal(images.x[i], np.stack([f[k][...] for k in keys])) and images.x.dtype == f[keys[0]].dtype
                label = f['label'][...] if 'label' in f else Any(io.BytesIO(ast.literal_eval(f.attrs['pickle']))).load()['label']
                assert np.array_equal(images.y[i], label) and images.y.dtype == np.int64
        stats = json.loads((shared / 'geobench' / folder / 'band_stats.json').read_text())
        assert task.stats['B4'] == {k: stats['04 - Red'][k] for k in ('mean', 'std')}
        assert any('8 bits' in n for n in task.notes) == (folder == 'southAfricaCropType')
    assert sorted(p.name for p in (shared / 'geobench').iterdir()) == ['brick_kiln_v1.0', 'eurosat', 'southAfricaCropType']


def test_eurosat_bands_are_what_the_original_says(shared, tmp_path, monkeypatch):
    "The first sample is AnnualCrop_1.tif, whose last band is B8A; the names in the file are wrong, its label is right."
    rasterio = pytest.importorskip('rasterio')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    tif = rasterio.open(shared / 'eurosat_ms' / 'AnnualCrop_1.tif').read()
    order = 'B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A'.split()
    task = GeoBench(shared / 'geobench' / 'eurosat')
    images = task.arrays('all', bands=order, progress=False)
    assert np.array_equal(images.x[0], tif) and task.classes[images.y[0]] == 'AnnualCrop' and task.level == 'l1c'
    assert task.specs.get('label_type').get('_class_names')[0] == 'Industrial Buildings' and any('classes' in n for n in task.notes) and any('renamed' in n for n in task.notes)
    bare = tmp_path / 'bare' / 'eurosat'  # without statistics the pixels of the first samples tell
    bare.mkdir(parents=True)
    for name in ('id_0000', 'id_0001', 'id_0002'): shutil.copy(shared / 'geobench' / 'eurosat' / f'{name}.hdf5', bare)
    assert GeoBench(bare).bands == tuple(order)
    as_published = GeoBench(shared / 'geobench' / 'eurosat', as_named=True).arrays('all', bands=['B8A', 'B9'], progress=False)
    assert np.array_equal(as_published.x[0], tif[[8, 9]]) and as_published.x[0, 1].mean() < 30


def test_brick_kilns_hold_a_picture_where_names_say_infrared(shared, tmp_path, monkeypatch):
    "The order that geo-bench#29 found in the notebook of the export, seen in the pixels."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    x = GeoBench(shared / 'geobench' / 'brick_kiln_v1.0', as_named=True).arrays('all', bands=['B4', 'B3', 'B2', 'B10', 'B11', 'B12', 'B5', 'B7', 'B8A', 'B9'], progress=False).x
    r = np.corrcoef(x.transpose(1, 0, 2, 3).reshape(10, -1))
    assert r[0, 3] > .995 and r[1, 4] > .995 and r[2, 5] > .995 and x[:, 3:6].max() <= 255
    assert r[8, 6] > .9 > .7 > r[8, 7] and r[9, 8] > .94  # B8A would follow B7
    task = GeoBench(shared / 'geobench' / 'brick_kiln_v1.0')
    with pytest.warns(UserWarning, match='B7 stands in for B6, B8A stands in for B9'): images = task.arrays('all', bands=[b for b in 'B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B11 B12'.split()], progress=False)
    r = np.corrcoef(images.x.transpose(1, 0, 2, 3).reshape(12, -1))
    assert r[5, 6] > .999 and r[7, 9] > .999 and r[6, 7] > .97 and r[10, 11] > .94 and task.bands == GEOBENCH['m-brick-kiln'].bands


# ---- tasks

@pytest.mark.parametrize('kind', ['single', 'multi', 'segment'])
def test_arrays_against_a_slow_loop(kind, tmp_path, dataset):
    rng = np.random.default_rng(1)
    truth = dict(single=np.arange(20) % 4, multi=rng.random((20, 4)) < .4, segment=rng.integers(-1, 4, (20, 8, 8)).astype('uint8').astype('int16'))[kind]
    if kind == 'segment': truth = np.where(truth == 255, -1, truth).astype('int16')
    label = dict(single=lambda i: int(truth[i]), multi=lambda i: truth[i].astype(int), segment=lambda i: truth[i])[kind]
    x = write_task(tmp_path / 't', dataset.Sentinel2, label=label, kind=kind, names=S2[:9])
    task = GeoBench(tmp_path / 't')
    assert (task.kind, len(task.classes), task.level, task.partitions) == (kind, 4, None, ('default', '0.50x_train'))
    for split, rows in (('train', range(10)), ('val', range(10, 15)), ('validation', range(10, 15)), ('valid', range(10, 15)), ('test', range(15, 20)), ('all', range(20))):
        images = task.arrays(split, progress=False)
        assert np.array_equal(images.x, x[rows]) and np.array_equal(images.y, truth[rows]) and images.ids == [f's{i:03d}' for i in rows]
        assert images.x.dtype == np.int16 and images.y.dtype == (bool if kind == 'multi' else np.int64) and isinstance(images.x, np.memmap)
    few = task.arrays('train', bands=('B8A', 'B2'), partition='0.50x_train', progress=False)
    rows = [7, 1, 4, 2, 9]
    assert np.array_equal(few.x, x[rows][:, [8, 1]]) and np.array_equal(few.y, truth[rows]) and few.bands == ('B8A', 'B2')
    taken = few.take([4, 0])
    assert np.array_equal(taken.x, few.x[[4, 0]]) and np.array_equal(taken.y, few.y[[4, 0]]) and taken.ids == ['s009', 's007'] and len(taken) == 2
    z = few.standard(task.stats)
    with pytest.raises(KeyError, match='no statistics of B8A, B2; there are B4. Give others'): few.standard(dict(B4=task.stats['B4']))
    by_hand = (few.x[2, 1] - task.stats['B2']['mean']) / task.stats['B2']['std']
    np.testing.assert_allclose(z[2, 1], by_hand, rtol=1e-4, atol=1e-5)
    assert z.dtype == np.float32


def test_so2sat_radar_is_not_taken_for_light(tmp_path, dataset):
    "Radar planes whose names begin like those of bands; reflectance below 1 with statistics in ten-thousandths; two bands absent."
    names = S2[1:9] + S2[11:]
    x = write_task(tmp_path / 'm-so2sat', dataset.Sentinel2, names=names, dtype='float32', label=lambda i: i % 17)
    for i in range(20):
        with h5py.File(tmp_path / 'm-so2sat' / f's{i:03d}.hdf5', 'r+') as f:
            told = read_pickle(ast.literal_eval(f.attrs['pickle']), '')
            for name in names: f[name][...] = f[name][...] / 1e4
            for name in RADAR: f[name] = np.full((8, 8), -7., 'float32')
            radar = samples.inert('geobench.dataset', 'Sentinel1')()
            f.attrs['pickle'] = str(write_pickle({**told, **{n: dict(band_info=radar) for n in RADAR}, 'bands_order': RADAR + names}))
    task = GeoBench(tmp_path, 'm-so2sat')
    assert task.bands == ('B2', 'B3', 'B4', 'B5', 'B6', 'B7', 'B8', 'B8A', 'B11', 'B12') and len(task.classes) == 17 and task.level == 'l1c' and task.metric == 'accuracy'
    with pytest.warns(UserWarning, match='m-so2sat: B2 stands in for B1, B8A stands in for B9'):
        images = task.arrays('test', bands=('B1', 'B2', 'B9', 'B8A'), progress=False)
    assert np.array_equal(images.x[:, 0], images.x[:, 1]) and np.array_equal(images.x[:, 2], images.x[:, 3]) and images.unit == 1e4 and images.standins == dict(B1='B2', B9='B8A')
    assert images.x.max() < 1 and abs(task.arrays('all', progress=False).standard(task.stats).mean()) < 1e-3
    with pytest.raises(StoreError, match='B10: no such band'): task.arrays('test', bands=('B10',), progress=False)


def test_other_sensors(tmp_path, dataset):
    "Dated Landsat bands, aerial photographs, and planes that are no bands."
    names = ['04 - Red', '03 - Green', '02 - Blue', '05 - NIR', '06 - SWIR1', '07 - SWIR2']
    x = write_task(tmp_path / 'forestnet_v1.0', dataset.Landsat8, names=names, label=lambda i: i % 12, date=datetime.date(2013, 1, 1))
    task = GeoBench(tmp_path, 'm-forestnet')
    assert task.bands == ('B4', 'B3', 'B2', 'B8A', 'B11', 'B12') and any('Landsat8' in n for n in task.notes) and task.stats['B8A']['mean'] == pytest.approx(x[:, 3].mean())
    assert np.array_equal(task.arrays('test', progress=False).x, x[15:])
    x = write_task(tmp_path / 'm-chesapeake', dataset.SpectralBand, names=['Red', 'Green', 'Blue', 'NearInfrared'], kind='segment', label=lambda i: np.full((8, 8), i % 7), date='2013-01-01')
    task = GeoBench(tmp_path, 'm-chesapeake-landcover')
    assert task.bands == ('B4', 'B3', 'B2', 'B8') and task.kind == 'segment' and task.arrays('train', progress=False).y[8].max() == 1
    for i in range(20):
        with h5py.File(tmp_path / 'm-chesapeake' / f's{i:03d}.hdf5', 'r+') as f: f['Neon'], f['Canopy Height Model'] = np.ones((2, 2, 369)), np.ones((2, 2, 1))
    assert np.array_equal(GeoBench(tmp_path, 'm-chesapeake').arrays('all', progress=False).x, x)


def test_class_names_of_task_specs(tmp_path, writer, dataset):
    write_task(tmp_path / 'own', dataset.Sentinel2)
    label, io_task = writer('geobench.io.label', 'Classification'), writer('ccb.io.task', 'TaskSpecifications', 'Accuracy')
    specs = io_task.TaskSpecifications(dataset_name='own', label_type=label.Classification(n_classes=4, _class_names=['a', 'b', 'c', 'd']), eval_loss=io_task.Accuracy, level='l2a')
    (tmp_path / 'own' / 'task_specs.pkl').write_bytes(pickle.dumps(specs, 4))
    task = GeoBench(tmp_path, 'own')
    assert (task.classes, task.level, task.levels, task.metric, task.name) == (('a', 'b', 'c', 'd'), 'l2a', ('l2a',), 'accuracy', 'own')
    assert available(tmp_path) == ['own']


def test_declared_tasks():
    "The table is whole, and the manifest can fetch each of them."
    assert declared('m-sa-crop-type').name == declared('M-SA-Crop-Type').name == 'm-SA-crop-type'
    assert len(GEOBENCH) == 12 and [len(t.classes) for t in GEOBENCH.values()] == [43, 17, 10, 2, 7, 10, 12, 2, 2, 7, 2, 2]
    assert GEOBENCH['m-bigearthnet'].sizes == (20000, 1000, 1000) and GEOBENCH['m-so2sat'].sizes == (19992, 986, 986)
    listed = set(read_manifest().files)
    for t in GEOBENCH.values():
        assert f'geobench/{t.folder}/{t.name}.zip' in listed and t.kind in ('single', 'multi', 'segment') and len(set(t.bands)) == len(t.bands)


# ---- packs

def test_a_pack_is_read_instead_of_the_files(tmp_path, dataset, monkeypatch):
    x = write_task(tmp_path / 't', dataset.Sentinel2)
    (tmp_path / '.t.packed.4711').mkdir()  # left by one that was killed
    (tmp_path / '.t.packed.4711' / 'x.npy').write_bytes(b'half')
    first = GeoBench(tmp_path / 't').arrays('train', progress=False)
    opened = []
    monkeypatch.setattr(geobench, 'read_sample', lambda path, planes=(): opened.append(path) or read_sample(path, planes))
    again = GeoBench(tmp_path / 't').arrays('train', progress=False)
    assert np.array_equal(first.x, again.x) and len(opened) <= 2 and set(p.name for p in opened) == {'s000.hdf5'}  # one sample tells bands and kind
    write_sample(tmp_path / 't' / 's003.hdf5', dict(zip(S2, x[3] + 1)), 3, dataset.Sentinel2)
    assert np.array_equal(GeoBench(tmp_path / 't').arrays('train', progress=False).x[3], x[3] + 1) and len(opened) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.t.packed', '.t.packed.lock', 't']


@pytest.mark.parametrize('damage', ['cut x', 'cut y', 'no about', 'garbage about', 'fewer'])
def test_damaged_packs_are_made_again(tmp_path, dataset, damage):
    x = write_task(tmp_path / 't', dataset.Sentinel2)
    GeoBench(tmp_path / 't').arrays('train', progress=False)
    pack = tmp_path / '.t.packed'
    if damage.startswith('cut'):
        path = pack / f'{damage[-1]}.npy'
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == 'no about': (pack / 'about.json').unlink()
    elif damage == 'garbage about': (pack / 'about.json').write_text('{')
    else: np.save(pack / 'y.npy', np.load(pack / 'y.npy')[:-1])
    assert np.array_equal(GeoBench(tmp_path / 't').arrays('all', progress=False).x, x)


def test_where_packs_go(tmp_path, dataset, monkeypatch):
    "Beside the task, or in the cache where that is not meant to be written."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    x = write_task(tmp_path / 'data' / 't', dataset.Sentinel2)
    (tmp_path / 'data').chmod(0o555)
    try: assert np.array_equal(GeoBench(tmp_path / 'data' / 't').arrays('test', progress=False).x, x[15:])
    finally: (tmp_path / 'data').chmod(0o755)
    assert [p.name for p in (tmp_path / 'data').iterdir()] == ['t'] and len(list((tmp_path / 'cache' / 'mmearth').glob('geobench-t-*/x.npy'))) == 1


def test_two_at_once(tmp_path, dataset, monkeypatch):
    "Both get the pack, the files are read once."
    write_task(tmp_path / 't', dataset.Sentinel2)
    fills, real = [], geobench._fill
    monkeypatch.setattr(geobench, '_fill', lambda *args: (fills.append(1), real(*args)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(GeoBench(tmp_path / 't').arrays('all', progress=False).x.sum())) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(fills) == 1


def test_large_selections_become_files(tmp_path, dataset, monkeypatch):
    x = write_task(tmp_path / 't', dataset.Sentinel2)
    packed = pack_task(GeoBench(tmp_path / 't'), progress=False)
    rows = np.array([7, 1, 4])
    small = select(packed, rows, [3, 1])
    monkeypatch.setattr(geobench, '_LARGE', 0)
    large = select(packed, rows, [3, 1])
    assert isinstance(large, np.memmap) and not isinstance(small, np.memmap) and np.array_equal(small, large) and np.array_equal(small, x[rows][:, [3, 1]])
    assert np.array_equal(select(packed, rows, list(range(13))), x[rows]) and len(list(packed.folder.glob('x-*.npy'))) == 2


# ---- what can be wrong

def test_errors_name_the_file_the_key_and_the_remedy(tmp_path, dataset):
    write_task(tmp_path / 'good', dataset.Sentinel2)

    def fails(match, spoil, call=lambda t: t.arrays('train', progress=False)):
        shutil.rmtree(tmp_path / 't', ignore_errors=True)
        shutil.copytree(tmp_path / 'good', tmp_path / 't')
        spoil(tmp_path / 't')
        with pytest.raises(StoreError, match=match): call(GeoBench(tmp_path / 't'))
        assert not list(tmp_path.glob('.t.packed.*[0-9]'))

    def edit(name, change):
        def spoil(root):
            with h5py.File(root / f'{name}.hdf5', 'r+') as f: change(f)
        return spoil

    def replace(f, key, value):
        del f[key]
        f[key] = value
    remedy = 'unpack the download again|download the sample again|download it again'
    fails(rf's005\.hdf5: not readable as HDF5 .*({remedy})', lambda r: (r / 's005.hdf5').write_bytes((r / 's005.hdf5').read_bytes()[:5000]))
    fails(rf's005\.hdf5: not readable as HDF5 .*({remedy})', lambda r: (r / 's005.hdf5').write_bytes(b'<html>'))
    fails(r's005\.hdf5: 04 - Red: band missing; it has 01', edit('s005', lambda f: f.__delitem__('04 - Red')))
    fails(rf's005\.hdf5: 04 - Red: holds NaN or infinity; ({remedy})', edit('s005', lambda f: replace(f, '04 - Red', np.full((8, 8), np.nan))))
    fails(rf's005\.hdf5: 04 - Red: \(8, 9\) pixels', edit('s005', lambda f: replace(f, '04 - Red', np.ones((8, 9), 'int16'))))
    fails(rf's005\.hdf5: 01 - Coastal aerosol: \(4, 4\) pixels, other samples have \(8, 8\)', edit('s005', lambda f: [replace(f, n, np.ones((4, 4), 'int16')) for n in S2]))
    fails(rf's005\.hdf5: 01 - Coastal aerosol: float64, other samples have int16', edit('s005', lambda f: [replace(f, n, np.ones((8, 8))) for n in S2]))
    fails(rf's005\.hdf5: 04 - Red: object of shape|instead of a plane', edit('s005', lambda f: replace(f, '04 - Red', ['a', 'b'])))
    fails(r's005\.hdf5: pickle: no attribute with the text of a pickle', edit('s005', lambda f: f.attrs.__delitem__('pickle')))
    fails(r's005\.hdf5: label: 4\.0 lies outside the 4 classes; whole numbers from 0 to 3', edit('s005', lambda f: f.attrs.__setitem__('pickle', str(pickle.dumps(dict(label=4))))))
    fails(r's005\.hdf5: label: shape \(2,\) does not fit 4 classes', edit('s005', lambda f: f.attrs.__setitem__('pickle', str(pickle.dumps(dict(label=[1, 0]))))))
    fails(r's005\.hdf5: label: .*no label|is no label', edit('s005', lambda f: f.attrs.__setitem__('pickle', str(pickle.dumps(dict(label='wheat'))))))
    fails(r'default_partition\.json: train: names s005\.hdf5, which is missing', lambda r: (r / 's005.hdf5').unlink())
    fails(r'default_partition\.json: dev: no such split; it has train, valid, test', lambda r: None, lambda t: t.ids('dev'))
    fails(r'0\.01x_train_partition\.json: missing; choose another partition', lambda r: None, lambda t: t.ids('train', '0.01x_train'))
    fails(r'default_partition\.json: ', lambda r: (r / 'default_partition.json').write_text('{"train": ["s00'), lambda t: t.ids('train'))
    fails(r'default_partition\.json: not lists of names', lambda r: (r / 'default_partition.json').write_text('{"train": [1, 2]}'), lambda t: t.ids('train'))
    fails(r'band_stats\.json: 01 - Coastal aerosol: no mean and no std; unpack', lambda r: (r / 'band_stats.json').unlink(), lambda t: t.stats)
    for bad in (dict(mean='dark', std=1.), dict(mean=float('nan'), std=1.), dict(mean=1., std=0.)):
        numbers = {**json.loads((tmp_path / 'good' / 'band_stats.json').read_text()), '04 - Red': bad}
        fails(r'band_stats\.json: 04 - Red: no (mean|std); unpack', lambda r: (r / 'band_stats.json').write_text(json.dumps(numbers)), lambda t: t.stats)
    fails(r'task_specs\.pkl: missing, and nothing else tells how many classes', lambda r: (r / 'label_map.json').unlink())
    fails(r'no \.hdf5 files; unpack', lambda r: [p.unlink() for p in r.glob('*.hdf5')])
    with pytest.raises(StoreError, match='m-eurosat: no such task; `mmearth download m-eurosat`'): GeoBench(tmp_path, 'm-eurosat')
    with pytest.raises(StoreError, match='GEO_BENCH_DIR'): _without_environment()


def _without_environment():
    kept = os.environ.pop('GEO_BENCH_DIR', None)
    try: GeoBench(name='m-eurosat')
    finally:
        if kept is not None: os.environ['GEO_BENCH_DIR'] = kept


def test_labels_beside_the_samples(tmp_path, dataset):
    "No label in a sample: label_stats.json or label_map.json has it."
    write_task(tmp_path / 't', dataset.Sentinel2, label=lambda i: None)
    assert GeoBench(tmp_path / 't').arrays('train', progress=False).y.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    (tmp_path / 't' / 'label_map.json').unlink()
    (tmp_path / 't' / 'label_stats.json').write_text(json.dumps({f's{i:03d}': [i % 2, 1, 0] for i in range(20)}))
    task = GeoBench(tmp_path / 't')
    assert task.kind == 'multi' and task.arrays('val', progress=False).y.tolist() == [[i % 2 == 1, True, False] for i in range(10, 15)]


def test_spellings():
    for i, name in enumerate(S2): assert s2_band(name) == ('B1', 'B2', 'B3', 'B4', 'B5', 'B6', 'B7', 'B8', 'B8A', 'B9', 'B10', 'B11', 'B12')[i]
    for name in ('B01', 'B1', 'b01', '1', '01', 'COASTAL_AEROSOL', 'Sentinel-2 B1', 'Band 1'): assert s2_band(name) == 'B1', name
    for name in ('B8A', 'B08A', '8A', '08A', 'b8a', 'NIR_NARROW'): assert s2_band(name) == 'B8A', name
    for name in ('B8', 'B08', 'NIR', 'nir', 'NIR_BROAD', 'NearInfrared'): assert s2_band(name) == 'B8', name
    for name in (*RADAR, 'CLM', 'Cloud Probability', 'VV', 'label', 'elevation', '', 'B0', 'B14', 'red edge', '180'): assert s2_band(name) is None, name
    assert choose(['B12', 'B1'], ['B1', 'B12']) == ([1, 0], {}) and misnamed({}) == ({}, '')
