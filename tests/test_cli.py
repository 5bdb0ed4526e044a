"The command line: every command through the door, errors as one line, nothing half-written."
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from mmearth.cli import app, conditions, names, numbers
from mmearth.dataset import MMEarth
from mmearth.modalities import BIOMES
from mmearth.pack import Pack
from mmearth.report import run_notebook
from mmearth.statistics import statistics
from mmearth.store import Store, StoreError

COMMANDS = 'download fetch serve synthetic inspect split index query stats pack verify share show export card run rehearse replay convert pretrain experiment'.split()


def listening():
    "In a child: a shell's background job is born deaf to interrupts."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def call(*words, code=0):
    "What was said on stdout; the exit code is as expected."
    found = CliRunner().invoke(app, [str(w) for w in words])
    assert found.exit_code == code, (words, found.output, found.exception)
    return found.stdout if code == 0 else found.stderr


@pytest.fixture
def store(tiny_store, tmp_path): return shutil.copytree(tiny_store, tmp_path / 'store')


def test_help_names_every_command_and_every_option_has_a_text():
    front = call('--help')
    for name in COMMANDS:
        assert re.search(rf'^  {name}\s+\w', front, re.M), name
        text = call(name, '--help')
        bare = [line for line in text.splitlines() if re.fullmatch(r'\s+-{1,2}[\w-]+( [A-Z]+)?\s*', line)]
        assert not bare or all('--help' in b or '--seed' in b for b in bare), (name, bare)
    assert len(COMMANDS) == len(app.registered_commands)


def test_help_imports_nothing_heavy():
    code = 'import sys, mmearth.cli; sys.exit(" ".join({"torch", "h5py", "pandas", "numpy", "matplotlib", "zarr"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr == '\n' or subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_query_index_show(store, tmp_path):
    tiles = Store(store)
    lines = call('query', store, '--level', 'l1c').splitlines()
    assert lines[0] == 'row,tile_id,date,level,lat,lon,biome' and [int(x.split(',')[0]) for x in lines[1:]] == tiles.query(level='l1c').tolist()
    box = '-180,-90,0,90'
    assert len(call('query', store, f'--box={box}').splitlines()) - 1 == len(tiles.query(box=(-180, -90, 0, 90))) == len(call('query', store, '--box', box).splitlines()) - 1
    for out in (tmp_path / 'a.parquet', tmp_path / 'a.geojson'): assert call('index', store, '--out', out).strip() == str(out) and out.stat().st_size > 100
    assert call('show', store, tiles.tile_ids[4], '--out', tmp_path / 'a.png').strip() == str(tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG' and not list(tmp_path.glob('.*'))
    ring = [(-180, -60), (-180, 60), (180, 60), (180, -60), (-180, -60)]
    record = struct.pack('<i4d2ii', 5, -180, -60, 180, 60, 1, 5, 0) + np.array(ring, '<f8').tobytes()
    (tmp_path / 'land.shp').write_bytes(struct.pack('>7i', 9994, 0, 0, 0, 0, 0, 54 + len(record) // 2) + bytes(72) + struct.pack('>2i', 1, len(record) // 2) + record)
    call('show', store, tiles.tile_ids[4], '--out', tmp_path / 'b.png', '--outline', tmp_path / 'land.shp')
    assert (tmp_path / 'a.png').read_bytes() != (tmp_path / 'b.png').read_bytes()
    assert 'a row is written as in row:17' in call('show', store, 'nonsense', code=1)
    assert f'{store}: row 24 asked for, it has 24' in call('show', store, 'row:24', code=1)


def test_a_folder_is_served_until_it_is_interrupted(store, tmp_path):
    command = [sys.executable, '-m', 'mmearth.cli', 'serve', str(store), '--port', '0', '--quiet']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as server:
        try:
            address = server.stdout.readline().strip()
            assert '2 of 24 tiles' in call('fetch', address, tmp_path / 'part', '--rows', '3,9', '--no-progress')
            assert Store(tmp_path / 'part').tile_ids == [Store(store).tile_ids[i] for i in (3, 9)]
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 0 and server.stderr.read() == ''
        finally: server.kill()
    assert 'no such folder' in call('serve', tmp_path / 'nothing', code=1)


def test_split_stats_pack_share_verify(store, tmp_path):
    made, _, counts = call('split', store, 'mine', '--kind', 'random', '--fractions', '0.5,0.25,0.25', '--seed', 3).strip().rpartition(': ')
    assert counts == 'train 12, val 6, test 6 tiles'
    assert made.endswith('_splits_mine.json') and json.loads(open(made).read())['how']['seed'] == 3
    rows = Store(store).rows('mine/train')
    assert call('pack', store, tmp_path / 'pack', '--split', 'mine/train', '--modalities', 'sentinel2,aster,biome', '--no-sound', '--no-progress').endswith(': 12 tiles of mine/train, 3 modalities\n')
    packed = Pack(tmp_path / 'pack')
    assert packed.modalities == ['sentinel2', 'aster', 'biome'] and np.array_equal(packed.read([0])['aster'], Store(store).read(rows[:1])['aster'])
    call('share', tmp_path / 'pack', tmp_path / 'shared')
    call('share', tmp_path / 'shared', tmp_path / 'again', '--back')
    for folder in ('again', 'shared'): assert call('verify', tmp_path / folder, '--no-progress') == 'nothing is wrong: every file of the pack has its hash\n'
    (tmp_path / 'again' / 'hashes.json').write_text('{"a": "b"}')
    assert 'a: missing' in call('verify', tmp_path / 'again', '--no-progress', code=1)
    path = call('stats', store, '--name', 'some', '--rows', '0-9', '--modalities', 'aster', '--no-progress').strip()
    assert json.loads(open(path).read())['how']['tiles'] == 10
    with pytest.raises(StoreError, match='mmearth stats .* --name mine measures them') as e: MMEarth(store, modalities='aster', stats='mine')
    call(*shlex.split(e.value.remedy.removesuffix(' measures them'))[1:], '--no-progress')
    some, mine, given = (MMEarth(store, modalities='aster', stats=s)[0]['aster'] for s in ('some', 'mine', statistics(Store(store))))
    assert (some != mine).any() and (mine == given).all()


def test_biomes_are_listed_and_taken_by_number_and_name(store):
    tiles, listed = Store(store), [f'{i} {n}' for i, n in enumerate(BIOMES)]
    for command in ('query', 'fetch'): assert ', '.join(listed) + ', -1 not known' in ' '.join(call(command, '--help').split())
    said = call('query', store, '--biome', 'Jungle', code=1)
    assert "biome 'Jungle' is not known" in said and all(x in said for x in listed)
    rows = lambda text: [int(x.split(',')[0]) for x in call('query', store, '--biome', text).splitlines()[1:]]
    for i, n in enumerate(BIOMES): assert rows(n) == rows(str(i)) == tiles.query(biome=i).tolist()
    assert rows(f'{BIOMES[4]},9, Tundra') == tiles.query(biome=[4, 9, 0]).tolist() and rows('-1') == tiles.query(biome=-1).tolist()
    for wrong in ('14', '255', '-2'): assert 'is not known; there are 0 Tundra' in call('query', store, '--biome', wrong, code=1)


def test_the_file_of_a_store_stands_for_its_folder(store, tmp_path):
    file, pack = next(store.glob('*.h5')), tmp_path / 'store_pack'
    assert call('split', file, 'mine', '--kind', 'random').startswith(f'{store / file.stem}_splits_mine.json: train 19')
    assert call('pack', file, '--split', 'mine/train', '--no-sound', '--no-progress').startswith(f'{pack}: 19 tiles')
    assert call('inspect', file, '--rows', '0-3', '--no-progress') == call('inspect', store, '--rows', '0-3', '--no-progress')
    assert '19 tiles of' in call('inspect', pack, '--no-progress')
    assert call('query', file, '--level', 'l1c') == call('query', store, '--level', 'l1c')
    assert 'a file, not a folder; give the folder' in call('inspect', store / f'{file.stem}_splits.json', code=1)
    with pytest.raises(StoreError, match='a pack, not a store; open it with mmearth.pack.Pack'): Store(pack)


def test_inspect(store, tmp_path):
    pd.DataFrame(dict(lat=[0.], lon=[0.])).to_csv(tmp_path / 'places.csv', index=False)
    call('inspect', store, '--rows', '0-11', '--labelled', tmp_path / 'places.csv', '--out', tmp_path / 'report', '--no-progress')
    report = json.loads((tmp_path / 'report' / 'inspect.json').read_text())
    assert report['tiles'] == 12 and report['leakage'] is not None
    assert '12 tiles' in call('inspect', store, '--rows', '0-11', '--no-progress')


def test_card_and_verify_of_a_data_folder(tmp_path):
    assert json.loads(call('card', 'MMEarth100k'))['name'] == 'MMEarth100k'
    call('card', 'MMEarth100k', '--out', tmp_path / 'card.json')
    assert json.loads((tmp_path / 'card.json').read_text())['name'] == 'MMEarth100k' and len(list(tmp_path.iterdir())) == 1
    (tmp_path / 'data_1M_v001_64').mkdir()
    (tmp_path / 'data_1M_v001_64' / 'data_1M_v001_64_splits.json').write_text('{"train": [0')
    assert 'data_1M_v001_64_splits.json' in call('verify', tmp_path, code=1)


def test_verify_says_what_it_looked_at_and_refuses_what_it_cannot_judge(store, tmp_path, break_chunk):
    assert 'no such folder' in call('verify', tmp_path / 'nowhere', code=1)
    (tmp_path / 'empty').mkdir()
    assert 'no pack, no store' in call('verify', tmp_path / 'empty', code=1)
    assert 'all 24 tiles of' in call('verify', store, '--no-progress')
    file = next(store.glob('*.h5'))
    break_chunk(file, 'aster', 5)
    assert 'aster, row 5: cannot read' in call('verify', store, '--no-progress', code=1)
    os.truncate(file, file.stat().st_size // 2)
    assert file.name in call('verify', store, '--no-progress', code=1)


def test_export(store, tmp_path):
    import rasterio
    import xarray as xr
    tile = Store(store).tile_ids[3]
    assert call('export', store, 'row:3', tmp_path / 'tile.nc', '--modalities', 'sentinel2').strip() == str(tmp_path / 'tile.nc')
    call('export', store, tile, tmp_path / 'maps')
    with rasterio.open(tmp_path / 'maps' / f'{tile}_sentinel2.tif') as f:
        assert f.crs and f.descriptions == tuple(Store(store).bands('sentinel2')) and (f.read() == Store(store).read([3])['sentinel2'][0]).all()
        with xr.open_dataset(tmp_path / 'tile.nc', decode_coords='all') as ds: assert ds.rio.crs == f.crs and ds.rio.transform() == f.transform
    assert 'ends in .nc or .zarr' in call('export', store, 'row:3', tmp_path / 'tile.png', code=1)
    for command in (['show', store, 'row:99'], ['export', store, 'row:99', tmp_path / 'x.nc']): assert re.search('store.*99.*24', call(*command, code=1))


def test_fetch(tiny_store, tmp_path):
    from test_remote import serve, url
    source = Store(tiny_store)
    server = serve(source.root)
    said = call('fetch', url(server, source), tmp_path / 'x', '--level', 'l2a', '--modalities', 'aster,biome', '--no-progress')
    assert re.search(r': \d+ of 24 tiles, [\d.]+ kB of [\d.]+ MB in \d+ requests', said)
    assert Store(tmp_path / 'x').tile_ids == [source.tile_ids[r] for r in source.query(level='l2a')]
    assert call('fetch', url(server, source), tmp_path / 'x', '--level', 'l2a', '--modalities', 'aster,biome', '--no-progress') == said.replace(': ', ': already there, ', 1)
    (tmp_path / 'x' / source.path.name).rename(tmp_path / 'kept.h5')
    assert re.search(r'x: .*no longer whole.*; remove it, and fetch again', call('fetch', url(server, source), tmp_path / 'x', '--level', 'l2a', '--modalities', 'aster,biome', '--no-progress', code=1))
    (tmp_path / 'kept.h5').rename(tmp_path / 'x' / source.path.name)
    assert 'holds something else' in call('fetch', url(server, source), tmp_path / 'x', '--level', 'l1c', '--no-progress', code=1)
    for words, option in ((('--rows', '0', '--level', 'l1c'), '--rows, --tile-ids'), (('--modalities', 'lat'), '--modalities')):
        assert option in call('fetch', url(server, source), tmp_path / 'y', *words, '--no-progress', code=1)
    assert '--stem' in call('fetch', server.url, tmp_path / 'y', code=1)
    assert 'loosen the query' in call('fetch', url(server, source), tmp_path / 'y', '--year', '1999', '--no-progress', code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x']
    server.shutdown()


def test_thin_calls_pass_the_same_names(monkeypatch, tmp_path):
    import mmearth.experiment, mmearth.manifest, mmearth.report
    got = []
    monkeypatch.setattr(mmearth.manifest, 'download', lambda *a, **k: got.append((a, k)) or [tmp_path / 'a'])
    monkeypatch.setattr(mmearth.report, 'main', got.append)
    monkeypatch.setattr(mmearth.experiment, 'main', got.append)
    assert call('download', 'MMEarth64', '--root', tmp_path, '--mirrors', 'http://a,http://b', '--no-checksum', '--no-progress') == f'{tmp_path / "a"}\n'
    call('run', 'pretrain', 'mine', '-p', 'epochs', '2', '-p', 'tasks=["a=b"]', '-q', '-f', 'x.yaml')
    call('experiment', 'demo', '--jobs', 2, '--into', 'there')
    call('experiment', 'eurosat-atto', '--pretrain-only')
    assert got == [(('MMEarth64', tmp_path), dict(mirrors=['http://a', 'http://b'], progress=False, checksum=False)),
                   ['run', 'pretrain', 'mine', '-p', 'epochs=2', '-p', 'tasks=["a=b"]', '--runs', 'runs', '-f', 'x.yaml', '-q'], ['demo', '--into', 'there', '--jobs', '2'], ['eurosat-atto', '--jobs', '0', '--pretrain-only']]


@pytest.mark.parametrize('words, says', [
    (['download', 'MMEarth65', '--root', 'here'], 'MMEarth65'), (['query', 'nowhere'], 'nowhere: no such folder'), (['show', 'nowhere', '3'], 'no such folder'),
    (['pack', 'nowhere', 'there'], 'no such folder'), (['fetch', 'http://127.0.0.1:9/a.h5', 'there', '--rows', '1-x'], "'1-x' is no number"), (['run', 'no-such', 'x'], 'no-such.ipynb'),
    (['run', 'pretrain', 'x', '-p', 'a'], 'KEY=VALUE'), (['pretrain', 'nosuch.yaml', 'out'], 'no recipe nosuch.yaml: no such file; give a YAML file, or one of ours by its name: demo, eurosat, mini'),
    (['pretrain', 'mini', 'out', '-p', 'clip'], '-p clip: write -p KEY VALUE'), (['pretrain', 'mini', 'out', '-p', 'blr', 'fast'], 'blr: float is needed'), (['rehearse', 'mini', '-p', 'epoch=1'], "did you mean 'epochs'"),
    (['run', 'pretrain', 'x', '-p', 'a=1'], "no parameter 'a'"), (['share', 'nowhere', 'there'], 'nowhere'), (['stats', 'nowhere'], 'no such folder')])
def test_errors_are_one_line(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(*words, code=1)
    assert says in said and said.count('\n') == 1 and 'Traceback' not in said
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


@pytest.mark.parametrize('words, says', [
    (['verify', 'file'], 'file: a file, not a folder; give the folder'), (['serve', 'file'], 'file: a file, not a folder'), (['verify', 'store', '--stem', 'other'], 'store/other.h5: no such store; there are data_synthetic'),
    (['pack', 'store', '--split', 'geographic/train'], 'geographic.json: geographic: no such split; `mmearth split store` makes it'), (['pack', 'store', '--split', 'random/val'], '`mmearth split store --kind random` makes it'),
    (['stats', 'store', '--split', 'mine/train'], '`mmearth split store mine` makes it'), (['pack', 'store', '--split', 'geographic'], 'splits.json: geographic: no such split; there are train, val, test; of a split that `mmearth split` made, name a part, as in geographic/train'),
    (['pack', 'store', '--split', 'test'], 'store: test: no tile to pack; name another split'), (['pack', 'store', 'file'], 'file: it is in the way; choose another path'), (['synthetic', 'file/there', '--tiles', '1'], 'file: it is in the way'),
    (['show', 'store', 'row:1', '--out', 'x.foo'], 'x.foo: no kind of picture that can be written; end it in .png'), (['show', 'store', 'row:1,2'], 'row:1,2: name one tile'), (['show', 'store', 'row:1', '--outline', 'no.shp'], 'no.shp: no such file or folder; check the path'),
    (['export', 'store', 'row:1', 'maps', '--modalities', 'biome'], "maps: no map among biome"), (['export', 'store', 'row:1', 'file/x.nc'], 'file: it is in the way'), (['index', 'store', '--out', 'file/x.parquet'], 'file: it is in the way'),
    (['serve', 'store', '--host', '203.0.113.7'], '203.0.113.7:8765: '), (['run', 'probe', 'x', '-f', 'broken.yaml'], 'broken.yaml is not valid YAML'), (['run', 'pretrain', 'x', '-f', 'broken.yaml'], 'broken.yaml is not valid YAML'),
    (['pretrain', 'smoke', 'store'], 'store: tiles are in this folder; give one for the run, and the tiles as -p data store'), (['pretrain', 'smoke', 'out', '-p', 'device', 'tpu'], "device: 'tpu' is not one of auto, cpu, cuda, mps"),
    (['pretrain', 'smoke', 'file'], 'file: it is in the way'), (['pretrain', 'smoke', 'out', '-p', 'data', 'empty'], "split: empty has no tiles in 'train'; name another split, or make one: `mmearth split "), (['experiment', 'nosuch'], 'nosuch: no such experiment; there are ablation')])
def test_what_is_wrong_is_named_with_a_remedy(words, says, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('hello')
    (tmp_path / 'broken.yaml').write_text('a: [1\nb: }')
    shutil.copytree(store, tmp_path / 'empty')
    next((tmp_path / 'empty').glob('*_splits.json')).write_text('{"train": [], "val": [0], "test": []}')
    before = {p for p in tmp_path.rglob('*')}
    said = call(*words, *(['--no-progress'] if words[0] in ('pack', 'stats', 'verify', 'pretrain', 'synthetic') else []), code=2 if words[0] == 'experiment' else 1)
    assert says in said and 'Traceback' not in said and (words[0] == 'experiment' or said.count('\n') == 1), said
    assert {p for p in tmp_path.rglob('*')} - before <= {tmp_path / 'out'}


@pytest.mark.parametrize('words', [['split', 'x', '--seed', '-1'], ['synthetic', 'x', '--seed', '-1'], ['synthetic', 'x', '--tiles', '0'], ['serve', '.', '--port', '99999'], ['pack', 'x', '--workers', '-1'], ['pack', 'x', '--samples', '0'], ['share', 'x', 'y', '--level', '12'], ['experiment', 'demo', '--jobs', '-1'], ['rehearse', 'smoke', '--seconds', '-1']])
def test_numbers_out_of_range_are_refused_before_any_work(words): assert f"Invalid value for '{words[-2]}'" in call(*words, code=2)  # the rest is worded by typer, not alike in all its versions


def test_a_device_that_is_not_there_is_refused():
    import torch
    from mmearth.pretrain import pick_device
    from mmearth.recipe import RecipeError
    assert pick_device('cpu') == 'cpu' and pick_device('auto') == pick_device()
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match='cuda:1 is asked for, this PyTorch sees none; write cpu or auto'): pick_device('cuda:1')


def test_folders_of_pictures_and_exports_are_made(store, tmp_path):
    for words in (['show', store, 'row:1', '--out', tmp_path / 'new' / 'a.png'], ['export', store, 'row:1', tmp_path / 'newer' / 'a.nc', '--modalities', 'aster'], ['verify', next(store.glob('*.h5')), '--no-progress']): call(*words)
    assert (tmp_path / 'new' / 'a.png').is_file() and (tmp_path / 'newer' / 'a.nc').is_file()


def test_a_bug_is_one_line_too(monkeypatch, store):
    import mmearth.pack
    def broken(*a): raise ZeroDivisionError('two\nlines')
    monkeypatch.setattr(mmearth.pack, 'open_tiles', broken)
    assert call('query', store, code=1) == 'ZeroDivisionError: two lines\n'


def test_mistakes_in_the_command_are_explained():
    assert 'No such command' in call('downlaod', code=2)
    assert 'Missing argument' in call('show', code=2)
    assert call('split', '--help') and 'Usage' in CliRunner().invoke(app, []).output


def test_words():
    assert names(' a, b ,') == ['a', 'b'] and names(None) is None and names('') == []
    assert numbers('0-2,7') == [0, 1, 2, 7] and numbers('-10,5.5', float) == [-10, 5.5]
    assert conditions(None, '3,Tundra', None, None, None, None, None) == dict(biome=[3, 'Tundra'])
    for bad in ('a', '1-', '1--2', '1.5'):
        with pytest.raises(ValueError, match='no number'): numbers(bad)
    assert numbers('11-2,5', wrap=12) == [11, 12, 1, 2, 5] and numbers('3 - 5') == [3, 4, 5]
    for bad in ('11-14', '0-3', '13', '0'):
        with pytest.raises(ValueError, match='months from 1 to 12'): conditions(None, None, None, bad, None, None, None)
    with pytest.raises(ValueError, match='write 2018-2020'): conditions(None, None, None, None, '2020-2018', None, None)


def test_a_real_process_and_ctrl_c(tiny_store, tmp_path):
    source = Store(tiny_store)
    run = lambda *words: subprocess.run([sys.executable, '-m', 'mmearth.cli', *map(str, words)], capture_output=True, text=True)
    good, bad = run('query', tiny_store, '--level', 'l2a'), run('query', tmp_path / 'nowhere')
    assert good.returncode == 0 and len(good.stdout.splitlines()) == 1 + len(source.query(level='l2a'))
    assert bad.returncode == 1 and bad.stdout == '' and bad.stderr.count('\n') == 1 and bad.stderr.startswith('StoreError: ')
    from test_remote import serve, url
    server = serve(source.root)
    server.mood = 'slow'
    child = subprocess.Popen([sys.executable, '-m', 'mmearth.cli', 'fetch', url(server, source), str(tmp_path / 'x')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    while len(server.served) < 30 and child.poll() is None: time.sleep(.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)
    assert child.returncode != 0 and 'Traceback' not in said[1] and not (tmp_path / 'x').exists()
    server.shutdown()


def test_what_a_recipe_costs_and_whether_a_run_comes_out_again(tmp_path):
    recipe, runs = tmp_path / 'r.yaml', os.path.relpath(tmp_path / 'runs')
    recipe.write_text('data: synthetic-64\nepochs: 1\ndecoder_width: 32\n')
    said = call('rehearse', recipe, '-p', 'epochs', '2', '--seconds', '0.2')
    told = dict(line.split(': ', 1) for line in said.splitlines())
    number = lambda key, unit: float(re.fullmatch(rf'([\d.,e-]+) {unit}', told[key])[1].replace(',', ''))
    assert number('updates', 'updates in all') == 8 and number('hours', 'hours in all') > 0 and number('samples_per_second', 'tiles per second') > 1 and 0 <= number('waited', '% of the time waiting for data') <= 100
    assert re.search(r'\nOn this machine the whole run takes about [\d.]+ (seconds|minutes): 8 updates at \d+ tiles per second; .* waiting for data', said)
    assert 'keeps random weights, at no cost' in call('rehearse', 'smoke', '-p', 'epochs', '0')
    kept = run_notebook('pretrain', 'r', recipe=recipe, runs=runs, quiet=True)
    said = call('replay', 'r', '--runs', runs, '-q')
    assert 'log.csv: ' in said and 'differ' not in said
    log = pd.read_csv(kept / 'log.csv')
    log.assign(lat=log.lat + 0.5).to_csv(kept / 'log.csv', index=False)
    found = CliRunner().invoke(app, ['replay', 'r', '--runs', runs, '-q'])
    told = found.stdout
    assert found.exit_code == 1 and 'log.csv: ' in told and 'differ, at most by' in told and 'lat.0' in told
    assert 'no finished run' in call('replay', 'nothing', code=1)
