"A cube says where, what and whether; written and read back it is the same; a tile is drawn whatever it lacks."
import json
import pickle
import shutil
import warnings

import h5py
import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from affine import Affine
from rasterio.warp import transform

from mmearth import layers
from mmearth.cube import Bounds, describe, georeference, open_cube, plot, tile_bounds, tile_transform, to_geotiff, to_xarray, write_cube
from mmearth.modalities import MODALITIES, modality, valid
from mmearth.store import Store, StoreError

PIXELS = [k for k, m in MODALITIES.items() if m.level == 'pixel']


@pytest.fixture(scope='module')
def store(tiny_store): return Store(tiny_store)


@pytest.fixture
def changed(tiny_store, tmp_path):
    "A function that copies the store, changes tile information and arrays, and opens it."
    def change(info=None, arrays=None):
        root = shutil.copytree(tiny_store, tmp_path / 'copy', dirs_exist_ok=True)
        path = next(root.glob('*_tile_info.json'))
        told = json.loads(path.read_text())
        first = next(iter(told))
        for key, value in (info or {}).items():
            if value is ...: told[first].pop(key)
            else: told[first][key] = value
        path.write_text(json.dumps(told))
        with h5py.File(next(root.glob('*.h5')), 'r+') as f:
            for name, value in (arrays or {}).items(): f[name][0] = value
        found = Store(root)
        assert found.tile_ids[0] == first
        return found
    return change


def corner(t, column, row): return t.c + t.a * column, t.f + t.e * row


HOLES = dict(sentinel2=0, sentinel1=-np.inf, aster=-32768, canopy_height_eth=np.where(np.arange(64) < 32, -128, 127), dynamic_world=0, esa_worldcover=255, era5=np.nan,
             biome=0, eco_region=0, month=-np.inf)


# ------------------------------------------------------------------ where

@pytest.mark.parametrize('size', [64, 128, 1, 65])
def test_transform_lies_on_the_grid_and_holds_the_centre(size):
    for lat, lon, crs in ((-33.2, 19.9, 'EPSG:32734'), (0.0, 3.0, 'EPSG:32631'), (71.3, -179.9, 'EPSG:32601'), (48.1, 11.5, 'EPSG:32632')):
        t = tile_transform(lat, lon, crs, size)
        (x,), (y,) = transform('EPSG:4326', crs, [lon], [lat])
        assert (t.a, t.b, t.d, t.e) == (10, 0, 0, -10) and t.c % 10 == t.f % 10 == 0
        assert abs(t.c + 5 * size - x) <= 7.5 and abs(t.f - 5 * size - y) <= 7.5


def test_transform_is_exact_where_the_centre_is(store):
    for left, top in ((600_000, 4_900_000), (399_960, 5_700_000), (512_340, 10)):
        true = Affine(10, 0, left, 0, -10, top + 640)
        (lon,), (lat,) = transform('EPSG:32633', 'EPSG:4326', *([v] for v in corner(true, 32, 32)))
        assert tile_transform(lat, lon, 'EPSG:32633', 64) == true


def test_a_real_raster_is_placed_to_half_a_pixel(shared):
    "Its grid is a half pixel beside that of Sentinel-2 (its maker, stackstac, says where centres are); on Sentinel-2's grid the derivation is exact."
    with rasterio.open(shared / 'rasters' / 's2_l2a_256.tif') as f: grid, crs = f.transform, f.crs
    assert (grid.c % 10, grid.f % 10) == (5, 5)
    for row, column in ((0, 0), (64, 128), (101, 77), (192, 192)):
        for shift, error in ((0, 5), (5, 0)):
            left, top = corner(grid, column, row)
            true = Affine(10, 0, left + shift, 0, -10, top - shift)
            (lon,), (lat,) = transform(crs, 'EPSG:4326', *([v] for v in corner(true, 32, 32)))
            found = tile_transform(lat, lon, crs.to_string(), 64)
            assert (found.c - true.c, found.f - true.f) == (-error, error)


def test_bounds_are_those_of_the_cube(store):
    for i in (0, 7):
        ds, box = to_xarray(store, i), tile_bounds(store, i)
        own = tile_bounds(store, store.tile_ids[i], crs=None)
        assert own[:4] == ds.rio.bounds() and own.crs == store.tiles.crs[i] and isinstance(box, Bounds)
        assert box.west < ds.longitude < box.east and box.south < ds.latitude < box.north
        assert box.north - box.south < 0.007  # 640 m and a little tilt
        x, y = corner(ds.rio.transform(), 0.5, 0.5)
        assert (ds.x[0], ds.y[0]) == (x, y) and ds.y[0] > ds.y[1]


@pytest.mark.parametrize('info, why', [({'CRS': None}, 'no CRS'), ({'CRS': ...}, 'no CRS'), ({'lat': None, 'lon': None}, 'no place'), ({'CRS': 'EPSG:4326'}, 'not in metres')])
def test_a_tile_without_a_place_says_so(changed, tmp_path, info, why):
    poor = changed(info)
    ds = to_xarray(poor, 0)
    assert why in ds.georeference and ds.rio.crs is None and 'x' not in ds.coords and ds.sentinel2.shape == (13, 64, 64)
    for name in ('a.nc', 'a.zarr'): assert open_cube(write_cube(ds, tmp_path / name)).load().identical(ds)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        paths = to_geotiff(ds, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with rasterio.open(paths[0]) as f: assert f.crs is None and f.tags()['georeference'] == ds.georeference
    with pytest.raises(StoreError, match=why): tile_bounds(poor, 0)
    many = to_xarray(poor, [0, 1])
    assert many.crs.values.tolist() == ['', poor.tiles.crs[1]] and np.isnan(many.easting[0]).all() and not np.isnan(many.easting[1]).any()


@pytest.mark.parametrize('info', [{'CRS': 'EPSG:999999'}, {'CRS': 'somewhere'}, {'lat': 1e9, 'lon': 1e9}])
def test_a_wrong_place_is_named(changed, info):
    try: poor = changed(info)
    except StoreError: return  # refused on opening: as good
    with pytest.raises(StoreError, match=f'{poor.tile_ids[0]}: cannot be placed'): to_xarray(poor, 0)


# ------------------------------------------------------------------ what

def test_numbers_types_and_validity_are_those_of_the_store(store):
    for i in (0, 5, 23):
        ds, tile = to_xarray(store, i), store[i]
        for name in store.modalities:
            m, raw, ok = modality(name), tile[name], tile['valid'][name]
            if m.onehot:
                assert ds[name].dtype == np.int16 and ds[name] == (raw.argmax() if ok.all() else -1) and ds[f'{name}_valid'] == ok.all()
                continue
            np.testing.assert_array_equal(ds[name].values, raw.squeeze(0) if len(raw) == 1 else raw)
            np.testing.assert_array_equal(ds[f'{name}_valid'].values, ok.squeeze(0) if len(ok) == 1 else ok)
            assert ds[name].dtype == m.dtype and ds[name].attrs.get('_FillValue', raw.dtype.type(0)).dtype == m.dtype
            if len(raw) > 1: assert tuple(ds[f'band_{name}'].values) == store.bands(name)


def test_every_no_data_code_is_masked_by_plain_xarray(changed):
    ds = to_xarray(changed(arrays=HOLES), 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        masked = xr.decode_cf(ds)
    for name in HOLES:
        assert not ds[f'{name}_valid'].any(), name
        assert masked[name].isnull().all(), name
    assert ds.biome == -1 and ds.where(ds.sentinel2_valid).sentinel2.isnull().all()


def test_plain_xarray_gives_reflectance(store):
    ds = to_xarray(store, 0, ['sentinel2'])
    masked = xr.decode_cf(ds).sentinel2
    np.testing.assert_allclose(masked, ds.sentinel2.where(ds.sentinel2_valid) * 1e-4, rtol=1e-5)


def test_legends_are_the_table(store):
    ds = to_xarray(store, 0)
    for name in ('dynamic_world', 'esa_worldcover', 'sentinel2_scl'):
        a, classes = ds[name].attrs, modality(name).classes
        assert a['flag_values'].tolist() == [c.code for c in classes] and a['flag_values'].dtype == ds[name].dtype
        assert a['flag_colors'].split() == [c.colour for c in classes] and len(a['flag_meanings'].split()) == len(classes)
    assert len(ds.eco_region.attrs['flag_meanings'].split()) == 846


@pytest.mark.parametrize('name', MODALITIES)
def test_attributes_of_every_modality(name):
    m = modality(name)
    a = describe(m, m.bands)
    assert a['long_name'] and all(v is not None for v in a.values())
    codes = {c for c in np.atleast_1d(a.get('missing_value', a.get('_FillValue', []))).tolist() if c == c}
    if not m.onehot: assert codes == {c for c in m.nodata_stored if c == c}


def test_facts_and_subsets(store):
    ds = to_xarray(store, store.tile_ids[3], 'sentinel2')
    assert set(ds.data_vars) == {'sentinel2'} and ds.tile_id.item() == store.tile_ids[3] and ds.level.item() == store.levels[3]
    told = store.info[store.tile_ids[3]]
    assert str(ds.date.values)[:10] == told['S2_DATE'] and ds.latitude == told['lat']
    assert ds.biome_name.item() == modality('biome').classes[told['biome']].name
    assert ds.eco_region_name.item() == modality('eco_region').classes[told['eco_region']].name
    with pytest.raises(StoreError, match='no such modality'): to_xarray(store, 0, ['soil'])
    with pytest.raises(IndexError): to_xarray(store, len(store))
    with pytest.raises(IndexError): to_xarray(store, [0, len(store)])
    with pytest.raises(TypeError, match='flatnonzero'): to_xarray(store, store.levels == 'l2a')
    assert to_xarray(store, -1).tile_id == store.tile_ids[-1]


# ------------------------------------------------------------------ many

def test_many_tiles_are_their_single_ones(store):
    rows = [4, 2, 2, 19]
    many = to_xarray(store, rows)
    for k, r in enumerate(rows):
        one = to_xarray(store, r)
        for name in [*store.modalities, *(f'{m}_valid' for m in store.modalities), 'tile_id', 'date', 'level', 'biome_name', 'latitude']:
            np.testing.assert_array_equal(many[name][k].values, one[name].values)
        np.testing.assert_array_equal(many.easting[k], one.x)
        np.testing.assert_array_equal(many.northing[k], one.y)
        assert many.crs[k] == one.rio.crs.to_string()


def test_lazy_cubes_read_what_is_asked_for(store):
    rows = np.arange(10)
    lazy, eager = to_xarray(store, rows, chunks=3), to_xarray(store, slice(0, 10))
    assert all(lazy[n].chunks is not None and lazy[n].dtype == eager[n].dtype and lazy[n].shape == eager[n].shape for n in store.modalities)
    assert lazy.sentinel2.data.chunks[0] == (3, 3, 3, 1)
    asked = []
    spy = Store(store.root)
    spy.read = lambda rows, names=None: asked.append((np.asarray(rows).tolist(), names)) or store.read(rows, names)
    part = to_xarray(spy, rows, ['aster', 'sentinel1'], chunks=3)
    assert asked == []
    part.aster[4].compute()
    assert asked == [([3, 4, 5], ['aster'])]
    assert lazy.compute().identical(eager)
    pickle.loads(pickle.dumps(lazy.sentinel1.isel(sample=[1])))
    with pytest.raises(ValueError, match='several tiles'): to_xarray(store, 0, chunks=4)


def test_no_tiles_at_all(store):
    for empty in (to_xarray(store, []), to_xarray(store, slice(0, 0))):
        assert dict(empty.sizes)['sample'] == 0 and empty.sentinel2.dtype == np.uint16


# ------------------------------------------------------------------ out and back

@pytest.mark.parametrize('suffix', ['nc', 'zarr'])
@pytest.mark.parametrize('which', ['one', 'many', 'holes', 'lazy'])
def test_cubes_come_back_identical(store, changed, tmp_path, suffix, which):
    ds = dict(one=lambda: to_xarray(store, 5), many=lambda: to_xarray(store, [5, 1, 8]), holes=lambda: to_xarray(changed({'S2_DATE': None}, HOLES), 0), lazy=lambda: to_xarray(store, range(5), chunks=2))[which]()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        path = write_cube(ds, tmp_path / f'cube.{suffix}')
        with open_cube(path) as back: back = back.load()
    xr.testing.assert_identical(back, ds.compute())
    for v in ds.variables:
        assert back[v].dtype.kind == ds[v].dtype.kind, v
        if ds[v].dtype.kind not in 'UOM': assert back[v].dtype == ds[v].dtype, v
    if which in ('one', 'holes'): assert (back.rio.crs, back.rio.transform(), back.sentinel2.rio.nodata) == (ds.rio.crs, ds.rio.transform(), 0)
    if which == 'one': write_cube(back, tmp_path / f'again.{suffix}')


def test_a_gis_finds_the_place_of_every_map_in_a_netcdf(store, tmp_path):
    ds = to_xarray(store, int(np.flatnonzero(store.tiles.crs.notna())[0]))
    path = write_cube(ds, tmp_path / 'tile.nc')
    assert rioxarray.open_rasterio(path).rio.crs == ds.rio.crs == xr.open_dataset(path, decode_coords='all').rio.crs
    maps = [k for k, v in ds.variables.items() if v.dims[-2:] == ('y', 'x')]
    assert {'sentinel2', 'sentinel2_valid', 'aster_valid'} <= set(maps)
    for name in maps:
        with rasterio.open(f'netcdf:{path}:{name}') as f: assert f.crs == ds.rio.crs and f.transform.almost_equals(ds.rio.transform()), name


def test_cubes_open_lazily_and_refuse_nonsense(store, tmp_path):
    path = write_cube(to_xarray(store, [0, 1]), tmp_path / 'a.zarr')
    assert open_cube(path, chunks={}).sentinel2.chunks is not None
    with pytest.raises(ValueError, match='written as .nc or .zarr'): write_cube(to_xarray(store, 0), tmp_path / 'a.grib')
    with pytest.raises(FileNotFoundError, match='no such cube'): open_cube(tmp_path / 'b.nc')


@pytest.mark.parametrize('holes', [False, True])
def test_geotiffs_come_back_equal(store, changed, tmp_path, holes):
    one = changed(arrays={k: v for k, v in HOLES.items() if modality(k).level == 'pixel'}) if holes else store
    ds = to_xarray(one, 0)
    paths = to_geotiff(ds, tmp_path / 'tiffs')
    assert {p.name for p in paths} == {f'{one.tile_ids[0]}_{n}.tif' for n in PIXELS}
    for name, path in zip(PIXELS, sorted(paths, key=lambda p: PIXELS.index(p.stem.removeprefix(f'{one.tile_ids[0]}_')))):
        raw = one[0][name]
        ok = valid(modality(name), raw)
        with rasterio.open(path) as f:
            x = f.read()
            assert (f.crs, f.transform, f.dtypes[0], f.descriptions) == (ds.rio.crs, ds.rio.transform(), raw.dtype.name, one.bands(name))
            np.testing.assert_array_equal(x[ok], raw[ok])
            np.testing.assert_array_equal(f.read_masks() > 0, ok)
            assert f.scales == ((1e-4 if name == 'sentinel2' else 1.0),) * len(raw) and f.tags()['tile_id'] == one.tile_ids[0]
            if name in ('dynamic_world', 'esa_worldcover'):
                for c in modality(name).classes: assert '#%02x%02x%02x' % f.colormap(1)[c.code][:3] == c.colour
            if name == 'aster': assert f.units == ('m', 'degree')


def test_geotiffs_are_of_one_tile(store, tmp_path):
    with pytest.raises(ValueError, match='no common grid'): to_geotiff(to_xarray(store, [0, 1]), tmp_path)


def test_a_store_of_three_bands(changed, tiny_store, tmp_path):
    root = shutil.copytree(tiny_store, tmp_path / 'rgb')
    with h5py.File(next(root.glob('*.h5')), 'r+') as f:
        rgb = f['sentinel2'][:][:, [3, 2, 1]]
        for name in ('sentinel2', *[k for k in f if k not in ('metadata', 'sentinel2', 'biome')]): del f[name]
        f.create_dataset('sentinel2', data=rgb).attrs['bands'] = ['B4', 'B3', 'B2']
    stats = next(root.glob('*_band_stats.json'))
    stats.write_text(json.dumps({}))
    store = Store(root)
    ds = to_xarray(store, 0)
    assert ds.band_sentinel2.values.tolist() == ['B4', 'B3', 'B2'] and set(ds.data_vars) == {'sentinel2', 'biome'}
    with rasterio.open(to_geotiff(ds, tmp_path)[0]) as f: assert f.descriptions == ('B4', 'B3', 'B2')
    assert titles(plot(store, 0))[0].startswith('Sentinel-2, true colour')


def test_real_tiles_go_there_and_back(shared, tmp_path):
    mini = Store(shared / 'data_mini_v001_64')
    for i in (2, 5):
        ds = to_xarray(mini, i)
        assert ds.rio.crs is not None
        for name in ('a.nc', 'a.zarr'): xr.testing.assert_identical(open_cube(write_cube(ds, tmp_path / name)).load(), ds)
        for path in to_geotiff(ds, tmp_path):
            name = path.stem.removeprefix(f'{ds.tile_id.item()}_')
            with rasterio.open(path) as f: np.testing.assert_array_equal((f.read_masks() > 0).squeeze(), ds[f'{name}_valid'])
    assert georeference(mini, 0).transform.a == 10


# ------------------------------------------------------------------ drawn

class Stand:
    "A store with chosen modalities, of one tile."
    size = 16

    def __init__(self, stem='stand', **arrays): self.stem, self.arrays, self.modalities = stem, arrays, list(arrays)
    def __len__(self): return 1
    def bands(self, name): return ('B4', 'B3', 'B2') if name == 'sentinel2' and len(self.arrays[name]) == 3 else modality(name).bands
    def __getitem__(self, i):
        ok = {k: valid(modality(k), v, self.bands(k)) for k, v in self.arrays.items()}
        return {**self.arrays, 'valid': ok, 'meta': dict(tile_id='7', lat=None, lon=None, date=None, level='l1c')}


def titles(fig): return [t for a in fig.axes for t in (a.get_title(), a.get_title(loc='left')) if t]


def missing(fig): return [t.get_text() for a in fig.axes for t in a.texts if t.get_text().startswith('no data')]


def test_a_whole_tile_has_all_panels(store):
    i = next(i for i in range(len(store)) if all(layers.tile_layer(store, store[i], layer) for layer in layers.LAYERS) and layers.has(store[i], 'era5'))
    fig = plot(store, store.tile_ids[i])
    fig.canvas.draw()
    assert len([t for t in titles(fig)]) == 11 and missing(fig) == []


def test_rgb_only_store_is_drawn_without_empty_panels():
    store = Stand(sentinel2=np.full((3, 16, 16), 900, 'uint16'), lat=np.float32([0.6, 0.8]), lon=np.float32([0, 1]), elevation=np.float32([120]),
                  surface_temperature=np.float32([np.nan]), biome=np.eye(14, dtype='uint8')[7])
    fig = plot(store, 0)
    fig.canvas.draw()
    assert titles(fig) == ['Sentinel-2, true colour to 0.2', '36.87° N, 0.00° E']
    assert missing(fig) == ['no data: Sentinel-2, infrared, Sentinel-1, elevation and slope, canopy height, Dynamic World, WorldCover, ERA5, date, ecoregion']
    assert ('elevation', '120.0 m') in layers.facts(store[0]) and not any(k == 'surface temperature' for k, _ in layers.facts(store[0]))


def test_an_empty_tile_is_a_sentence():
    store = Stand(sentinel2=np.zeros((13, 16, 16), 'uint16'), sentinel1=np.full((8, 16, 16), -np.inf, 'float32'), aster=np.full((2, 16, 16), -32768, 'int16'),
                  canopy_height_eth=np.full((2, 16, 16), 127, 'int8'), dynamic_world=np.zeros((1, 16, 16), 'uint8'), esa_worldcover=np.full((1, 16, 16), 255, 'uint8'),
                  era5=np.full(12, np.nan, 'float32'), lat=np.full(2, -np.inf, 'float32'), lon=np.full(2, -np.inf, 'float32'), month=np.full(2, -np.inf, 'float32'),
                  biome=np.full(14, 255, 'uint8'), eco_region=np.full(846, 65535, 'uint16'))
    fig = plot(store, 0)
    fig.canvas.draw()
    assert all(layers.tile_layer(store, store[0], layer) is None for layer in layers.LAYERS)
    assert titles(fig) == ['Place: no data'] and 'place, date, biome, ecoregion' in missing(fig)[0]


@pytest.mark.parametrize('names', [('aster',), ('sentinel2', 'dynamic_world'), ('sentinel2', 'sentinel1'), ('sentinel2', 'sentinel1', 'aster'), ('sentinel2', 'sentinel1', 'aster', 'era5'),
                                   ('sentinel2', 'sentinel1', 'aster', 'canopy_height_eth', 'dynamic_world')])
def test_any_number_of_panels_fits(store, names):
    i = next(i for i in range(len(store)) if all(layers.tile_layer(store, store[i], layer) for layer in layers.LAYERS) and layers.has(store[i], 'era5'))
    tile = store[i]
    fig = plot(Stand(**{k: tile[k] for k in names}), 0)
    boxes = [a.get_position() for a in fig.axes]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= 1 and b.y1 <= 1 for b in boxes)
    seen = [b for b, a in zip(boxes, fig.axes) if a.get_title() or a.get_title(loc='left')]
    assert not any(a.overlaps(b) for k, a in enumerate(seen) for b in seen[:k])


def test_radar_takes_the_polarisation_there_is():
    radar = np.full((8, 16, 16), -np.inf, 'float32')
    radar[2:4] = -12
    store = Stand(sentinel1=radar)
    asc, desc = (layers.tile_layer(store, store[0], layer) for layer in layers.LAYERS[2:4])
    assert asc[2] == ('asc_HH', 'asc_HV') and desc is None
    assert 'Sentinel-1 ascending, HH HV' in titles(plot(store, 0))


@pytest.mark.parametrize('month', range(1, 13))
def test_months_by_name_where_there_is_no_date(month):
    a = 2 * np.pi * month / 12
    store = Stand(sentinel2=np.ones((13, 16, 16), 'uint16'), month=np.float32([np.sin(a), np.cos(a)]))
    assert dict(layers.facts(store[0]))['date'] == 'January February March April May June July August September October November December'.split()[month - 1]


def test_holes_are_transparent_and_scales_shared():
    layer = layers.LAYERS[4]
    x = np.arange(16.).reshape(1, 4, 4)
    ok = x[0] > 3
    colours, scale = layers.paint(layer, x, ok, (0, 100))
    assert np.array_equal(colours[..., 3] == 1, ok) and scale.get_clim() == (0, 100)
    assert layers.paint(layer, np.full((1, 4, 4), 5.))[1].get_clim() == (5, 25)


def test_bright_land_is_not_white():
    sand = np.full((13, 16, 16), 4500, 'uint16')
    fig = plot(Stand(sentinel2=sand), 0)
    assert titles(fig)[0] == 'Sentinel-2, true colour to 0.6'
    assert fig.axes[0].images[0].get_array()[..., :3].max() < 0.8


def test_a_legend_names_what_is_there():
    codes = np.repeat([1, 2, 2, 9], 64).reshape(1, 16, 16).astype('uint8')
    fig = plot(Stand(dynamic_world=codes), 0)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ['trees', 'water', 'snow and ice']
