"The stand-in benchmark: the format as Python's own pickle sees it, labels from the latent world, nested partitions, and EuroSAT in the same form."
import ast
import hashlib
import io
import json
import pickle
import sys
import types
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmearth import standin
from mmearth.eurosat import EUROSAT_CLASSES, write_eurosat
from mmearth.geobench import GeoBench, available
from mmearth.index import StoreError
from mmearth.standin import FRACTIONS, STANDINS, ZONES, eurosat_images, even_order, koppen, partitions, scenery, write_standin
from mmearth.store import Store
from mmearth.synthetic import SURFACES, land


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    "40 samples of each task."
    return write_standin(tmp_path_factory.mktemp('standin') / 'bench', n=40)


@pytest.fixture
def own_classes(monkeypatch):
    "GEO-Bench's modules, with any class."
    class Module(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith('__'): raise AttributeError(name)
            setattr(self, name, type(name, (), {'__module__': self.__name__}))
            return getattr(self, name)
    for name in ('geobench', 'geobench.dataset', 'geobench.label', 'geobench.task'): monkeypatch.setitem(sys.modules, name, Module(name))


def digest(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_samples_as_python_reads_them(bench, own_classes):
    "Keys, dtypes and records of GEO-Bench, read without this package."
    s = STANDINS['standin-covers']
    home = bench / s.folder / s.name
    with h5py.File(home / 'id_0007.hdf5') as f:
        told = pickle.loads(ast.literal_eval(f.attrs['pickle']))
        assert [k for k in f] == sorted(told['bands_order']) and told['bands_order'][7:9] == ['08 - NIR', '08A - Vegetation Red Edge'] and '10 - SWIR - Cirrus' not in f
        assert all(f[k].dtype == np.int16 and f[k].shape == (64, 64) for k in f)
    band = told['08A - Vegetation Red Edge']['band_info']
    assert type(band).__module__ == 'geobench.dataset' and (band.name, band.alt_names, band.wavelength) == ('08A - Vegetation Red Edge', ('8A', '08A'), .865)
    assert told['label'] == json.loads((home / 'label_stats.json').read_text())['id_0007'] and len(told['label']) == 11
    specs = pickle.loads((home / 'task_specs.pkl').read_bytes())
    assert (specs.dataset_name, specs.patch_size, specs.label_type.n_classes, type(specs.label_type).__name__) == (s.name, (64, 64), 11, 'MultiLabelClassification')
    assert [b.name for b in specs.bands_info] == told['bands_order']
    with h5py.File(bench / 'segmentation_v1.0' / 'standin-land' / 'id_0000.hdf5') as f:
        told = pickle.loads(ast.literal_eval(f.attrs['pickle']))
        assert 'label' in f and told['bands_order'][-1] == 'label' and type(told['label']['band_info']).__name__ == 'SegmentationClasses' and told['label']['band_info'].n_classes == 9


@pytest.mark.parametrize('name', list(STANDINS))
def test_what_is_written_is_read(bench, name):
    s, task = STANDINS[name], GeoBench(bench, name)
    images = task.arrays('all', progress=False)
    assert (task.kind, task.classes, task.bands, task.level, task.notes, images.bands) == (s.kind, s.classes, s.bands, s.level, (), s.bands)
    for i, (pixels, y) in enumerate(scenery(s, 40, seed=1, world=0)):
        want = (pixels / 1e4).astype('float32') if s.like == 'm-so2sat' else pixels
        assert np.array_equal(images.x[i], want) and np.array_equal(images.y[i], y)
    assert images.unit == (1e4 if s.like == 'm-so2sat' else 1) and np.isfinite(images.x).all() and images.x.min() > 0
    train = task.arrays('train', progress=False)
    mean, std = (train.x * train.unit).astype(float).mean((0, 2, 3)), (train.x * train.unit).astype(float).std((0, 2, 3))
    for i, b in enumerate(s.bands):  # the statistics are of a hundred pixels of each training image
        assert task.stats[b]['mean'] == pytest.approx(mean[i], rel=.05) and task.stats[b]['std'] == pytest.approx(std[i], rel=.15)
    z = train.standard(task.stats)
    assert z.dtype == np.float32 and abs(z.mean()) < .05 and abs(z.std() - 1) < .1


def test_labels_are_the_latent_truth(bench):
    "Covers and masks, recomputed from the surfaces of the same rows."
    for name in ('standin-covers', 'standin-land'):
        first = 10_000_000 * list(STANDINS).index(name)
        surface = land(0, 1, first + np.arange(32), 64).surface
        y = GeoBench(bench, name).arrays('all', progress=False).y[:32]
        if name == 'standin-land': assert np.array_equal(y, SURFACES['dynamic_world'][surface] - 1)
        else:
            codes = [10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100]
            for i in range(32):
                share = {c: sum((surface[i] == k).sum() for k in range(len(SURFACES)) if SURFACES['esa_worldcover'][k] == c) / 4096 for c in codes}
                assert y[i].tolist() == [share[c] >= .02 for c in codes]
    scenes = GeoBench(bench, 'standin-scene').arrays('all', progress=False).y
    assert np.bincount(scenes, minlength=10).tolist() == [4] * 10


def test_zones_against_the_rules_one_by_one():
    "Peel et al. (2007), table 1, in plain words; random climates."
    rng = np.random.default_rng(0)
    n = 4000
    month = np.arange(12)[:, None]
    season = np.cos(2 * np.pi * (month - 6) / 12) * np.ones((1, n))
    t = rng.uniform(-20, 30, n) + rng.uniform(0, 20, n) * season
    p = rng.gamma(1.5, 500, n) / 12 * np.maximum(1 + rng.uniform(-1, .75, n) * season, .02)
    found, seen = koppen(t, p, season), set()
    for i in range(n):
        temps, rains, summer = t[:, i], p[:, i], season[:, i] > 0
        hot, cold, mean, year = max(temps), min(temps), np.mean(temps), sum(rains)
        if rains[~summer].sum() >= .7 * year: limit = 2 * mean
        elif rains[summer].sum() >= .7 * year: limit = 2 * mean + 28
        else: limit = 2 * mean + 14
        seasonal = rains[summer].min() < 40 and rains[summer].min() < rains[~summer].max() / 3
        mild = sum(temps > 10) >= 4
        if hot < 10: zone = 'E'
        elif year < 10 * limit: zone = ('BW' if year < 5 * limit else 'BS') + ('h' if mean >= 18 else 'k')
        elif cold >= 18: zone = 'Af' if rains.min() >= 60 else 'Am' if rains.min() >= 100 - year / 25 else 'Aw'
        elif cold > 0: zone = ('Cs' if seasonal else 'Cf') + ('a' if hot >= 22 else 'b')
        elif seasonal: zone = 'Dsb' if mild else 'Dsc'
        else: zone = 'Dfa' if hot >= 22 else 'Dfb' if mild else 'Dfc'
        assert ZONES[found[i]] == zone, (i, zone, ZONES[found[i]])
        seen.add(zone)
    assert seen == set(ZONES)


def test_the_same_to_the_byte_and_never_pretraining(bench, tmp_path):
    again = write_standin(tmp_path / 'again', n=40, tasks=['standin-climate'])
    home = 'classification_v1.0/standin-climate'
    assert digest(again / home) == digest(bench / home) and available(again) == ['standin-climate']
    other = write_standin(tmp_path / 'other', n=8, seed=2, tasks=['standin-climate'])
    samples = [{h for name, h in digest(b / home).items() if name.endswith('.hdf5')} for b in (other, bench)]
    assert len(samples[1]) == 40 and not samples[0] & samples[1]
    pixels = [x.tobytes() for s in STANDINS.values() for x, _ in scenery(s, 8, seed=1, world=0)]
    seed_of_pretraining = [x.tobytes() for s in STANDINS.values() for x, _ in scenery(s, 8, seed=0, world=0)]
    assert len(set(pixels)) == 32 and not set(pixels) & set(seed_of_pretraining)


def test_partitions_are_nested_and_even(bench):
    rng = np.random.default_rng(0)
    strata = rng.choice(5, 4000, p=[.5, .25, .15, .08, .02])
    names = [f'n{i}' for i in range(4000)]
    found, at = partitions(names, strata, seed=3), {n: i for i, n in enumerate(names)}
    whole = found['default']
    assert [len(whole[s]) for s in ('train', 'valid', 'test')] == [2000, 1000, 1000] and len(set().union(*map(set, whole.values()))) == 4000
    for f in FRACTIONS:
        part = found[f'{f:.2f}x_train']
        assert part['train'] == whole['train'][:int(f * 2000)] and part['valid'] == whole['valid'] and part['test'] == whole['test']
    share = np.bincount(strata, minlength=5) / 4000
    for names_of in (whole['valid'], whole['test'], whole['train'][:200], whole['train'][:1000]):
        got = np.bincount(strata[[at[n] for n in names_of]], minlength=5) / len(names_of)
        assert abs(got - share).max() < .015
    for k in (10, 50, 333): assert (abs(np.bincount(strata[even_order(strata, rng)[:k]], minlength=5) - k * share) < 2).all()
    assert partitions(names, strata, seed=3) == found != partitions(names, strata, seed=4)
    for s in STANDINS.values():
        task = GeoBench(bench, s.name)
        assert task.partitions == ('default', *sorted(f'{f:.2f}x_train' for f in FRACTIONS)) and len(task.ids('train', '0.01x_train')) == 1
        assert [len(task.ids(x)) for x in ('train', 'val', 'test')] == [20, 10, 10]


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    "A writer that is stopped leaves no task and no litter; what is there is not touched."
    real, calls = standin.write_sample, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        real(*args)
    monkeypatch.setattr(standin, 'write_sample', stop)
    with pytest.raises(KeyboardInterrupt): write_standin(tmp_path / 'b', n=8, tasks=['standin-climate'])
    assert list((tmp_path / 'b' / 'classification_v1.0').iterdir()) == []
    monkeypatch.setattr(standin, 'write_sample', real)
    write_standin(tmp_path / 'b', n=8, tasks=['standin-climate'])
    with pytest.raises(StoreError, match='standin-climate: already exists; delete it'): write_standin(tmp_path / 'b', n=8, tasks=['standin-climate'])
    with pytest.raises(ValueError, match="no stand-in task 'm-eurosat'; there are standin-scene"): write_standin(tmp_path / 'b', tasks=['m-eurosat'])


# ---- EuroSAT

def test_eurosat_store_and_zips_agree(tiny_eurosat, tmp_path):
    zips, frame, index = tiny_eurosat
    store = Store(write_eurosat(zips, index, tmp_path / 'store'))
    pixels = {}
    for path in zips:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist(): pixels[entry[:-4]] = np.asarray(Image.open(io.BytesIO(archive.read(entry)))).transpose(2, 0, 1)
    seen = []
    for split in ('train', 'val', 'test_image', 'test_region', 'test'):
        one, two, three = eurosat_images(store, split), eurosat_images(tmp_path / 'store', split), eurosat_images(zips, split, index)
        for other in (two, three): assert np.array_equal(one.x, other.x) and np.array_equal(one.y, other.y) and one.ids == other.ids and one.bands == other.bands
        assert one.bands == ('B4', 'B3', 'B2') and one.level == 'l1c' and one.classes == EUROSAT_CLASSES and one.kind == 'single' and one.y.dtype == np.int64
        for x, y, name in zip(one.x, one.y, one.ids):
            assert np.array_equal(x, np.maximum(np.round(10.83 * pixels[name] - 11.), 1)) and EUROSAT_CLASSES[y] == name.split('_')[0]
        if split != 'test': seen += one.ids
    assert sorted(seen) == sorted(frame.id)
    stats = eurosat_images(store, 'train').stats(block=7)
    x = eurosat_images(store, 'train').x.astype(float)
    np.testing.assert_allclose([[stats[b]['mean'], stats[b]['std']] for b in ('B4', 'B3', 'B2')], np.stack([x.mean((0, 2, 3)), x.std((0, 2, 3))], 1))
    with pytest.raises(StoreError, match='dev: no such images; splits are'): eurosat_images(store, 'dev')


def test_zips_without_their_index(tiny_eurosat):
    zips, *_ = tiny_eurosat
    for source in (zips, zips[0]):
        with pytest.raises(StoreError, match='a.zip.*zips of EuroSAT without their index; say index='): eurosat_images(source, 'train')


def test_a_store_without_labels(tiny_store):
    with pytest.raises(StoreError, match='labels: missing; write the store with'): eurosat_images(tiny_store, 'train')


def test_real_eurosat(shared, tmp_path):
    source = shared / 'eurosat_rgb'
    frame = pd.read_csv(source / 'eurosat_rgb_index.csv').iloc[::90]
    frame.to_csv(tmp_path / 'index.csv', index=False)
    zips = [source / 'eurosat_rgb_a.zip', source / 'eurosat_rgb_b.zip']
    train, test = (eurosat_images(zips, split, tmp_path / 'index.csv') for split in ('train', 'test'))
    assert train.x.shape[1:] == (3, 64, 64) and len(train) + len(test) + len(eurosat_images(zips, 'val', tmp_path / 'index.csv')) == len(frame)
    assert not set(train.ids) & set(test.ids) and dict(zip(frame.id, frame.label))[train.ids[0]] == train.classes[train.y[0]]
