"What several tests share: the real data beside the repository, a small synthetic store, an invented EuroSAT, a damaged chunk, figures that are closed."
import io
import os
import sys
import zipfile
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmearth.eurosat import EUROSAT_CLASSES
from mmearth.store import Store
from mmearth.synthetic import write_store

matplotlib.use('agg')


@pytest.fixture(autouse=True)
def no_figure_left():
    "Closes what a test has drawn."
    yield
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


@pytest.fixture(scope='session')
def break_chunk():
    "A function that writes over the chunk of a row in an HDF5 file."
    def broken(path, key, row, byte=b'\xff'):
        with h5py.File(path) as f: chunk = f[key].id.get_chunk_info_by_coord((row,) + (0,) * (f[key].ndim - 1))
        with open(path, 'r+b') as f:
            f.seek(chunk.byte_offset)
            f.write(byte * chunk.size)
    return broken


@pytest.fixture(scope='session')
def shared():
    "Folder of the real data: MMEARTH_SHARED, or shared/data beside the repository."
    path = Path(os.environ.get('MMEARTH_SHARED') or Path(__file__).resolve().parents[2] / 'shared' / 'data')
    if not path.is_dir(): pytest.skip(f'no real data: {path} does not exist (set MMEARTH_SHARED to the folder that holds data_mini_v001_64)')
    return path


@pytest.fixture(scope='module')
def mini(shared): return Store(shared / 'data_mini_v001_64')


@pytest.fixture(scope='session')
def tiny_store(tmp_path_factory):
    "Folder of a synthetic store of 24 tiles of 64 pixels; copy it before changing it."
    return write_store(tmp_path_factory.mktemp('store') / 'tiny', n=24, size=64, seed=3)


@pytest.fixture
def tiny(tiny_store): return Store(tiny_store)


@pytest.fixture
def tiny_eurosat(tmp_path):
    "Zips of small invented jpgs, their index and its path: (zips, frame, path)."
    rng = np.random.default_rng(0)
    ids = [f'{c}_{i}' for i in range(1, 7) for c in EUROSAT_CLASSES]
    zips = [tmp_path / 'a.zip', tmp_path / 'b.zip']
    for path, part in zip(zips, (ids[::2], ids[1::2])):
        with zipfile.ZipFile(path, 'w') as archive:
            for name in part:
                jpg = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), 'uint8')).save(jpg, 'JPEG')
                archive.writestr(f'{name}.jpg', jpg.getvalue())
    frame = pd.DataFrame(dict(id=ids, label=[i.split('_')[0] for i in ids], lat=40 + np.arange(60) * .3, lon=5.25, elevation_m=100., slope_deg=2.,
                              surface_temperature_c=15., biome=7, eco_region=600))
    frame.to_csv(tmp_path / 'index.csv', index=False)
    return zips, frame, tmp_path / 'index.csv'
