"Part of a store over the network: the same bytes, through servers that cut, lie, change and forget."
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
import requests

from mmearth.fetch import fetch
from mmearth.remote import Ranges, RemoteFile, coalesce
from mmearth.remote import serve as shelf
from mmearth.store import Store, StoreError
from mmearth.synthetic import write_store

N = 90
FAST = dict(pause=.001, retries=3, timeout=10)


class Shelf(SimpleHTTPRequestHandler):
    "A folder over HTTP; `mood` of its server decides how it behaves."
    protocol_version, disable_nagle_algorithm = 'HTTP/1.1', True

    def log_message(self, *args): pass

    def do_GET(self):
        s, path = self.server, Path(self.translate_path(self.path))
        asking = path.name, self.headers.get('Range')
        s.served.append(asking)
        first = s.served.count(asking) == 1
        mood = s.mood if s.only is None or s.only in path.name else ''
        if mood == 'redirect' and not self.path.startswith('/moved'):
            self.send_response(302)
            self.send_header('Location', f'/moved{self.path}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        path = Path(str(path).replace('/moved', ''))
        if mood == 'down' or mood == 'busy' and first: return self.send_error(503)
        if not path.is_file(): return self.send_error(404)
        size = path.stat().st_size
        asked = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        if start >= size: return self.send_error(416)
        with path.open('rb') as f:
            f.seek(start + (mood == 'shifted'))
            data = f.read(stop - start)
        if mood == 'ignorant': return self._send(200, path.read_bytes(), {})
        etag = f'"{path.stat().st_mtime_ns}"' if mood != 'changing' else f'"{len(s.served) // 20}"'
        head = {'Content-Range': f'bytes {start + (mood == "shifted")}-{stop - 1}/{size if mood != "growing" else size + len(s.served)}', 'ETag': etag}
        if mood == 'no content-range': del head['Content-Range']
        if mood == 'long': data += b'xx'
        if mood == 'slow': time.sleep(.02)
        self._send(206, data, head, cut=mood == 'cutting' and first or mood == 'always cutting')

    def _send(self, status, data, head, cut=False):
        self.send_response(status)
        for k, v in {**head, 'Content-Length': str(len(data))}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data[:max(1, len(data) // 2)] if cut else data)
        self.close_connection = cut


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "A labelled store of ninety tiles; `metadata` in one piece."
    return Store(write_store(tmp_path_factory.mktemp('shelf') / 'store', n=N, size=16, seed=2, labelled=True))


def serve(folder):
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Shelf, directory=str(folder)))
    server.mood, server.only, server.served, server.handle_error = '', None, [], lambda *a: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    return server


@pytest.fixture
def server(source):
    found = serve(source.root)
    yield found
    found.shutdown()
    found.server_close()


def url(server, source): return f'{server.url}/{source.stem}.h5'


def agree(part, source, rows, names=None):
    "The fetched store holds exactly these rows."
    rows = np.asarray(rows)
    assert part.tile_ids == [source.tile_ids[r] for r in rows]
    assert part.levels.tolist() == source.levels[rows].tolist()
    assert part.modalities == [m for m in source.modalities if names is None or m in names]
    for k, v in source.read(rows, part.modalities).items():
        got = part.read(range(len(part)), [k])[k]
        assert got.dtype == v.dtype and got.tobytes() == v.tobytes(), k
        if part.file[k].chunks:
            at = (0,) * (v.ndim - 1)
            for i, r in enumerate(rows[:3]): assert part.file[k].id.read_direct_chunk((i, *at)) == source.file[k].id.read_direct_chunk((int(r), *at))
    for t in part.tile_ids: assert part.info[t] == source.info[t]
    assert json.loads(part.paths['band_stats'].read_text()) == json.loads(source.paths['band_stats'].read_text())
    new = {int(r): i for i, r in enumerate(rows)}
    before = json.loads(source.paths['splits'].read_text())
    assert json.loads(part.paths['splits'].read_text()) == {k: [new[r] for r in v if r in new] for k, v in before.items()}
    if source.labels is not None:
        old = source.labels[source.labels.row.isin(rows)]
        assert part.labels.label.tolist() == old.label.tolist() and part.labels.row.tolist() == [new[r] for r in old.row]


@pytest.mark.parametrize('mood', ['', 'redirect', 'cutting', 'busy'])
def test_rows_are_byte_equal_whatever_the_weather(server, source, tmp_path, mood):
    server.mood = mood
    rows = [3, 7, 8, 50, 89]
    agree(Store(fetch(url(server, source), tmp_path / 'x', rows=rows[::-1] + [7], progress=False, batch=2, **FAST)), source, rows)
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_one_modality_of_all_tiles(server, source, tmp_path):
    part = Store(fetch(url(server, source), tmp_path / 'x', modalities='aster', progress=False))
    agree(part, source, np.arange(N), ['aster'])
    took = json.loads((tmp_path / 'x' / f'{source.stem}_fetch.json').read_text())
    assert took['tiles'] == took['of'] == N and took['bytes'] - took['side_bytes'] < took['whole_bytes'] / 4


def test_by_folder_tile_ids_and_query(server, source, tmp_path):
    ids = [source.tile_ids[i] for i in (60, 2)]
    agree(Store(fetch(server.url, tmp_path / 'a', stem=source.stem, tile_ids=ids, progress=False)), source, [2, 60])
    agree(Store(fetch(url(server, source), tmp_path / 'b', query=dict(level='l1c', month=range(1, 7)), modalities=['sentinel2', 'biome'], progress=False)), source,
          source.query(level='l1c', month=list(range(1, 7))), ['sentinel2', 'biome'])
    with pytest.raises(ValueError, match='name its store'): fetch(server.url, tmp_path / 'c')
    with pytest.raises(StoreError, match='unknown'): fetch(url(server, source), tmp_path / 'c', tile_ids=['no such'], progress=False)
    with pytest.raises(ValueError, match='loosen the query'): fetch(url(server, source), tmp_path / 'c', query=dict(box=(0, 89.9, .01, 90)), progress=False)


@pytest.mark.parametrize('layout', ['contiguous', 'many rows a chunk', 'shuffled', 'half chunks', 'rows never written', 'ids in another order', 'newest format'])
def test_any_layout(source, tmp_path, layout):
    root = tmp_path / 'shelf'
    root.mkdir()
    for p in source.paths.values():
        if p.suffix != '.h5': (root / p.name).write_bytes(p.read_bytes())
    how = {'contiguous': {}, 'many rows a chunk': dict(rows=7, compression='gzip'), 'shuffled': dict(rows=1, compression='gzip', shuffle=True, fletcher32=True)}
    with h5py.File(root / source.path.name, 'w', libver='latest' if layout == 'newest format' else None) as f:
        for k, ds in source.file.items():
            kind = dict(how.get(layout, dict(rows=1, compression='gzip')))
            if 'rows' in kind: kind['chunks'] = (kind.pop('rows'), *ds.shape[1:])
            if layout == 'half chunks' and ds.ndim == 4: kind['chunks'] = (4, 1, 8, 16)
            if layout != 'rows never written' or k == 'metadata': f.create_dataset(k, data=ds[:], **kind)
            else: f.create_dataset(k, ds.shape, ds.dtype, fillvalue=3, **kind)[:45] = ds[:45]
    if layout == 'ids in another order':
        info = json.loads(source.paths['tile_info'].read_text())
        (root / source.paths['tile_info'].name).write_text(json.dumps(dict(reversed(info.items()))))
    here, server, rows = Store(root), serve(root), [0, 1, 30, 44, 45, 89]
    part = Store(fetch(url(server, source), tmp_path / 'x', tile_ids=[here.tile_ids[r] for r in rows], progress=False))
    for k, v in here.read(rows).items(): np.testing.assert_array_equal(part.read(range(6))[k], v)
    assert part.tile_ids == [here.tile_ids[r] for r in rows]
    server.shutdown()


WRONG = {'ignorant': 'no byte ranges', 'shifted': 'were asked for', 'no content-range': 'were asked for', 'growing': 'changed while it was read',
         'changing': 'changed while it was read', 'down': 'HTTP 503', 'always cutting': 'do not arrive'}


@pytest.mark.parametrize('mood', WRONG)
def test_a_server_that_cannot_be_trusted_leaves_nothing(server, source, tmp_path, mood):
    server.mood = mood
    with pytest.raises(StoreError, match=WRONG[mood]) as e: fetch(url(server, source), tmp_path / 'x', rows=range(30), progress=False, **FAST)
    assert server.url in str(e.value) and e.value.remedy
    assert (mood in ('ignorant', 'shifted', 'no content-range')) == (f'curl -LO {server.url}' in e.value.remedy)  # `mmearth download` knows the files of the manifest only
    assert not (tmp_path / 'x').exists()


def test_addresses_that_lead_nowhere(server, source, tmp_path):
    with pytest.raises(StoreError, match='HTTP 404'): fetch(f'{server.url}/none.h5', tmp_path / 'x', **FAST)
    with pytest.raises(StoreError, match='check the address'): fetch('nonsense.h5', tmp_path / 'x', **FAST)
    with pytest.raises(StoreError, match='do not arrive'): fetch('http://127.0.0.1:9/a.h5', tmp_path / 'x', **FAST)
    (source.root / 'page.h5').write_text('<html>' + 'x' * 9000)
    try:
        with pytest.raises(StoreError, match='page.h5: not readable as HDF5'): fetch(f'{server.url}/page.h5', tmp_path / 'x', **FAST)
    finally: (source.root / 'page.h5').unlink()
    assert not (tmp_path / 'x').exists()


def test_a_damaged_chunk_is_refused_by_row(source, tmp_path):
    root = tmp_path / 'shelf'
    root.mkdir()
    for p in source.paths.values(): (root / p.name).write_bytes(p.read_bytes())
    c = source.file['sentinel2'].id.get_chunk_info_by_coord((5, 0, 0, 0))
    data = bytearray((root / source.path.name).read_bytes())
    data[c.byte_offset + c.size // 2] ^= 255
    (root / source.path.name).write_bytes(data)
    server = serve(root)
    with pytest.raises(StoreError, match='sentinel2: row 5 cannot be unpacked'): fetch(url(server, source), tmp_path / 'x', rows=[4, 5], progress=False)
    fetch(url(server, source), tmp_path / 'y', rows=[4, 6], progress=False)
    server.shutdown()


def test_bad_questions(server, source, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a').touch()
    for error, match, asked in [(StoreError, 'something else', dict(root=tmp_path / 'full')), (IndexError, '90', dict(rows=[90])), (IndexError, '-1', dict(rows=[-1])),
                                (ValueError, 'exclude each other', dict(rows=[1], query=dict(level='l1c'))), (StoreError, 'sentinel3: not in the file', dict(modalities=['sentinel3'])),
                                (ValueError, 'pixel-level', dict(modalities=['lat'])), (ValueError, 'is meant', dict(rows=[])), (ValueError, 'biome', dict(query=dict(biome='Mars')))]:
        with pytest.raises(error, match=match): fetch(url(server, source), **{**dict(root=tmp_path / 'x', progress=False), **asked})
    assert not (tmp_path / 'x').exists()


def test_killed_and_called_again_fetches_the_rest_only(server, source, tmp_path):
    server.mood = 'slow'
    code = f'from mmearth.fetch import fetch; fetch({url(server, source)!r}, {str(tmp_path / "x")!r}, batch=6, progress=False, connections=2)'
    child = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    part = tmp_path / '.x.part'
    for _ in range(3000):
        if len(list(part.glob('rows-*.npz'))) >= 4 or child.poll() is not None: break
        time.sleep(.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sorted(part.glob('rows-*.npz'))
    assert done and not (tmp_path / 'x').exists()
    server.mood, before = '', {p: p.stat().st_mtime_ns for p in done}
    server.served.clear()
    offsets = [source.file['sentinel2'].id.get_chunk_info_by_coord((r, 0, 0, 0)).byte_offset for r in range(6 * len(done))]
    agree(Store(fetch(url(server, source), tmp_path / 'x', batch=6, progress=False)), source, np.arange(N))
    spans = [tuple(map(int, r[6:].split('-'))) for name, r in server.served if name.endswith('.h5') and r]
    again = [o for o in offsets if any(a <= o <= b for a, b in spans)]
    assert len(before) >= 4 and len(again) < len(offsets) / 4
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_another_plan_or_another_file_begins_anew(source, tmp_path):
    root = tmp_path / 'shelf'
    root.mkdir()
    for p in source.paths.values(): (root / p.name).write_bytes(p.read_bytes())
    server = serve(root)
    server.mood, server.only = 'down', 'splits'
    with pytest.raises(StoreError, match='HTTP 503'): fetch(url(server, source), tmp_path / 'x', rows=[1], progress=False, **FAST)
    assert (tmp_path / '.x.part' / 'plan.json').is_file()
    (tmp_path / '.x.part' / 'rows-000000000.npz').write_bytes(b'left by another version')
    server.mood = ''
    os.utime(root / source.path.name)
    agree(Store(fetch(url(server, source), tmp_path / 'x', rows=[1], progress=False, **FAST)), source, [1])
    server.shutdown()


@pytest.mark.parametrize('wrong', ['no splits', 'tile information cut short', 'a damaged chunk', 'a row too many'])
def test_a_refusal_leaves_nothing(source, tmp_path, wrong, break_chunk):
    root = tmp_path / 'shelf'
    root.mkdir()
    for p in source.paths.values(): (root / p.name).write_bytes(p.read_bytes())
    if wrong == 'no splits': (root / source.paths['splits'].name).unlink()
    if wrong == 'tile information cut short': os.truncate(root / source.paths['tile_info'].name, 1000)
    if wrong == 'a damaged chunk': break_chunk(root / source.path.name, 'sentinel2', 5)
    server = serve(root)
    with pytest.raises((StoreError, IndexError)): fetch(url(server, source), tmp_path / 'new' / 'folder' / 'x', rows=[5, 90] if wrong == 'a row too many' else [5], progress=False, **FAST)
    assert [p.name for p in tmp_path.iterdir()] == ['shelf']
    server.shutdown()


def test_remote_file_reads_like_a_file(server, source):
    data, rng = source.path.read_bytes(), np.random.default_rng(0)
    with RemoteFile(url(server, source), block=1000, cache=5000) as f:
        for _ in range(200):
            at, n = int(rng.integers(len(data) + 10)), int(rng.integers(5000))
            f.seek(at)
            assert f.read(n) == data[at:at + n]
            if rng.random() < .2: f.prefetch([(a, min(a + int(rng.integers(1, 3000)), len(data))) for a in rng.integers(len(data), size=3).tolist()])
            if rng.random() < .1: f.forget()
        assert f.seek(0, 2) == len(data) and f.read(5) == b''
        assert f.bytes > 0 and f.requests > 10


def test_nothing_hidden_is_served_and_every_request_is_told(tmp_path):
    (tmp_path / '.git').mkdir()
    for name in ('.git/config', '.env', 'a.h5'): (tmp_path / name).write_text(name)
    told = []
    address, server = shelf(tmp_path, told=told.append)
    for name in ('.git/config', '.git/', '.git', '.env', '%2egit/config', '', 'b.h5'):
        for ask in (requests.get, requests.head): assert ask(f'{address}/{name}').status_code == 404, name
    assert requests.get(f'{address}/a.h5').content == b'a.h5' and requests.head(f'{address}/a.h5').headers['Content-Length'] == '4'
    assert len(told) == 16 and told[-2:] == ['127.0.0.1 200 /a.h5'] * 2
    server.shutdown()


def test_coalesce_covers_and_is_sorted():
    rng = np.random.default_rng(1)
    for _ in range(50):
        starts = rng.integers(0, 10000, 20)
        spans = [(int(a), int(a + rng.integers(1, 300))) for a in starts]
        joined = coalesce(spans, gap=int(rng.integers(0, 200)), most=1000)
        assert joined == sorted(joined) and all(any(a <= s and e <= b for a, b in joined) for s, e in spans)


def test_a_range_of_wrong_length_is_no_data(server, source):
    server.mood = 'long'
    with pytest.raises(StoreError): Ranges(url(server, source), **FAST)
