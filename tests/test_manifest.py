"The manifest is strict; a download survives bad servers, cuts and kills, and believes nothing twice."
import csv
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pooch
import pytest

from mmearth.croissant import croissant
from mmearth.manifest import (DownloadError, File, Manifest, ManifestError, download, manifest_folder, read_hashes, read_manifest, record_hash, verify)
from mmearth.modalities import MODALITIES, S2_MASKS, TASKS
from mmearth.transfer import BLOCK, Part, form

pooch.get_logger().setLevel('ERROR')
QUICK = dict(progress=False, wait=0)


# ---- a server that does what bad servers do ----

class Server(ThreadingHTTPServer):
    "Serves `files`; each request takes the next item of `plan`, and `log` tells (name, status, first byte, bytes of body sent)."
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answer)
        self.files, self.plan, self.ended, self.etag, self.lock, self.asked = {}, [], [], '"one"', threading.Lock(), 0
        threading.Thread(target=self.serve_forever, args=(.01,), daemon=True).start()

    @property
    def address(self): return f'http://127.0.0.1:{self.server_port}'

    @property
    def log(self):
        "What was sent, once every request has ended; a server learns late that nobody listens."
        deadline = time.time() + 20
        while len(self.ended) < self.asked and time.time() < deadline: time.sleep(.005)
        return self.ended

    def forget(self):
        self.log.clear()
        self.asked = 0

    def sent(self, name='file.bin'): return sum(n for file, status, _, n in self.log if file == name and status in (200, 206))


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        s, name = self.server, self.path.strip('/')
        with s.lock:
            todo = s.plan.pop(0) if s.plan else {}
            s.asked += 1
        if todo.get('status'): return self.say(name, todo['status'], b'', {})
        if todo.get('redirect'): return self.say(name, 302, b'', dict(Location=f'/{name}'))
        if todo.get('page'): return self.say(name, 200, b'<html>sorry</html>', {'Content-Type': todo['page']})
        if name not in s.files: return self.say(name, 404, b'', {})
        body, etag = todo.get('body', s.files[name]), todo.get('etag', s.etag)
        if todo.get('flip'): body = body[:todo['flip']] + bytes([body[todo['flip']] ^ 1]) + body[todo['flip'] + 1:]
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked and 'If-Range' in self.headers and self.headers['If-Range'] != etag: asked = None
        if asked and int(asked[1]) >= len(body): return self.say(name, 416, b'', {})
        start = int(asked[1]) if asked and not todo.get('ignore_range') else 0
        if todo.get('portion') and start: body, size = body[:start + todo['portion']], len(body)
        else: size = len(body)
        headers = {'Content-Type': 'application/octet-stream', 'Content-Length': len(body) - start + todo.get('lie', 0)} | todo.get('headers', {})
        if etag: headers['ETag'] = etag
        if asked and not todo.get('ignore_range'): headers['Content-Range'] = todo.get('span') or f'bytes {start}-{len(body) - 1}/{size}'
        self.say(name, 206 if 'Content-Range' in headers else 200, body[start:start + todo.get('cut', len(body))], headers, start, todo.get('pause', 0))

    def say(self, name, status, body, headers, start=0, pause=0):
        self.send_response(status)
        for key, value in ({'Content-Length': len(body)} | headers).items():
            if value is not None: self.send_header(key, value)
        self.end_headers()
        sent = 0
        try:
            for i in range(0, len(body), 1 << 15):
                self.wfile.write(body[i:i + (1 << 15)])
                sent += len(body[i:i + (1 << 15)])
                time.sleep(pause)
        except OSError: pass
        with self.server.lock: self.server.ended.append((name, status, start, sent))
        self.close_connection = True

    def log_message(self, *args): pass


@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture
def data(server):
    "A megabyte and a bit, served as file.bin."
    server.files['file.bin'] = np.random.default_rng(0).integers(0, 256, 1_200_000, 'uint8').tobytes()
    return server.files['file.bin']


def hashed(data): return hashlib.sha256(data).hexdigest()


def listed(*urls, path='file.bin', **facts):
    return Manifest({path: File(path, 'thing', 'tiny', 'CC-BY-4.0', 'mmearth', 'invented', urls=urls, **facts)}, dict(thing={}), (), {})


def visible(root): return sorted(p.name for p in root.iterdir() if not p.name.startswith('.'))


# ---- the tables ----

def test_the_tables_of_the_repository_hold():
    m = read_manifest()
    for name, stem in (('MMEarth', 'data_1M_v001'), ('MMEarth64', 'data_1M_v001_64'), ('MMEarth100k', 'data_100k_v001')):
        wanted = {f'{stem}/{f}' for f in (f'{stem}.h5', f'{stem}_band_stats.json', f'{stem}_splits.json', f'{stem}_tile_info.json', 'LICENSE-data')}
        assert {f.path for f in m.select(name)} == wanted and m.select(stem) == m.select(name)
    assert len(m.select('checkpoints')) == 11 and len(m.select('geobench')) == 12
    assert {*TASKS, *S2_MASKS} == {s['modality'] for s in m.sources}
    assert sum(bool(f.sha256) for f in m.files.values()) == 6
    assert all(f.urls and f.source and f.licence for f in m.files.values())
    assert len({f.sha256 for f in m.files.values() if f.sha256}) == 6


def test_a_collection_in_the_tables_is_the_one_the_modality_names():
    m = read_manifest()
    for s in m.sources:
        if s['modality'] in ('sentinel2', 'sentinel1', 'era5', 'dynamic_world', 'esa_worldcover'): assert s['collection_id'] in MODALITIES[s['modality']].source


@pytest.fixture
def tables(tmp_path):
    return shutil.copytree(manifest_folder(), tmp_path / 'tables')


def change(path, line, key, value):
    rows = list(csv.reader(io.StringIO(path.read_text(encoding='utf-8'))))
    rows[line - 1][rows[0].index(key)] = value
    with path.open('w', encoding='utf-8', newline='') as f: csv.writer(f).writerows(rows)


@pytest.mark.parametrize('table,key,value', [
    ('files', 'path', '../../etc/passwd'), ('files', 'path', '/etc/passwd'), ('files', 'path', 'a//b'), ('files', 'path', 'a\\b.h5'), ('files', 'path', 'C:x'),
    ('files', 'path', 'x.h5.part'), ('files', 'path', ''), ('files', 'path', 'a/../b'), ('files', 'path', 'a b'), ('files', 'path', 'ä/b'),
    ('files', 'bytes', '-1'), ('files', 'bytes', '1e9'), ('files', 'bytes', '12 GB'), ('files', 'bytes', '0'), ('files', 'bytes', '١٢'), ('files', 'bytes', '1' * 40),
    ('files', 'about', 'large'), ('files', 'sha256', 'A' * 64), ('files', 'sha256', 'a' * 63), ('files', 'part', 'huge'), ('files', 'licence', ''),
    ('files', 'dataset', 'no such'), ('files', 'dataset', 'nosuch'), ('files', 'citation', 'nobody'), ('files', 'source', ' x'),
    ('urls', 'url', 'file:///etc/passwd'), ('urls', 'url', 'ftp://x/y'), ('urls', 'url', ''), ('urls', 'url', 'http://a b'), ('urls', 'path', 'no/such'),
    ('datasets', 'tile_px', '64.0'), ('datasets', 'page', 'nowhere'), ('datasets', 'dataset', 'other'), ('datasets', 'what', 'two\nlines'),
    ('sources', 'modality', 'sentinel3'), ('sources', 'native_gsd_m', 'ten'), ('sources', 'accessed', 'yesterday'), ('citations', 'key', 'a b')])
def test_a_bad_cell_is_named_with_file_line_and_column(tables, table, key, value):
    change(tables / f'{table}.csv', 3, key, value)
    with pytest.raises(ManifestError) as e: read_manifest(tables)
    assert f'{table}.csv' in str(e.value) or (table, key) in (('datasets', 'dataset'), ('files', 'path'), ('citations', 'key'), ('urls', 'path'))
    assert e.value.line >= 2 and e.value.key and e.value.remedy


@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:100], lambda b: b.replace(b'sha256', b'md5'), lambda b: b.replace(b'path,', b'', 1), lambda b: b'\xff' + b,
    lambda b: b + b'"never closed', lambda b: b + b'a,b\n', lambda b: b + b.split(b'\n')[1] + b'\n', lambda b: b.replace(b',MMEarth,', b',MME\0arth,', 1)])
def test_a_damaged_table_is_named(tables, damage):
    (tables / 'files.csv').write_bytes(damage((tables / 'files.csv').read_bytes()))
    with pytest.raises(ManifestError, match='files.csv'): read_manifest(tables)


def test_a_missing_table_and_a_spreadsheets_mark(tables):
    for table in tables.glob('*.csv'): table.write_bytes(b'\xef\xbb\xbf' + table.read_bytes().replace(b'\n', b'\r\n'))  # what spreadsheets write
    assert read_manifest(tables) == read_manifest()
    (tables / 'urls.csv').write_bytes((manifest_folder() / 'urls.csv').read_bytes() + (manifest_folder() / 'urls.csv').read_bytes().splitlines(True)[-1])
    with pytest.raises(ManifestError, match='given twice'): read_manifest(tables)
    (tables / 'urls.csv').unlink()
    with pytest.raises(ManifestError, match='urls.csv'): read_manifest(tables)


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(KeyError, match='MMEarth100k'): read_manifest().select('MMEarth100K')
    with pytest.raises(KeyError, match='m-eurosat'): download('m-eurosatt', 'anywhere', progress=False)


def test_errors_travel_between_processes():
    for e in (ManifestError('f', 3, 'k', 'p', 'r'), DownloadError('f', 'p', 'r', {'http://x': 'y'})): assert str(pickle.loads(pickle.dumps(e))) == str(e)


# ---- downloads ----

def test_a_plain_download_is_recorded_and_verified(server, data, tmp_path):
    manifest = listed(f'{server.address}/file.bin')
    path, = download('thing', tmp_path, manifest, **QUICK)
    assert path.read_bytes() == data and visible(tmp_path) == ['file.bin', 'hashes.csv']
    assert read_hashes(tmp_path)['file.bin']['sha256'] == hashed(data) and int(read_hashes(tmp_path)['file.bin']['bytes']) == len(data)
    assert verify(tmp_path, manifest=manifest) == []
    download('thing', tmp_path, manifest, **QUICK)
    assert len(server.log) == 1  # the second call sent nothing
    path.write_bytes(data[:-1] + b'!')
    assert 'expected by hashes.csv' in verify(tmp_path, manifest=manifest)[0][1]
    assert verify(tmp_path, manifest=manifest, checksum=False) == []
    with pytest.raises(DownloadError, match='move it away'): download('thing', tmp_path, manifest, **QUICK)
    path.write_bytes(data[:-1])
    assert '1,199,999 bytes, 1,200,000 expected' in verify(tmp_path, manifest=manifest)[0][1]


def test_the_environment_names_the_data_folder(server, data, tmp_path, monkeypatch):
    manifest = listed(f'{server.address}/file.bin', sha256=hashed(data), bytes=len(data))
    monkeypatch.setenv('MMEARTH_DIR', str(tmp_path))
    assert download('thing', manifest=manifest, **QUICK) == [tmp_path / 'file.bin']
    assert visible(tmp_path) == ['file.bin']  # a published hash needs no record
    monkeypatch.delenv('MMEARTH_DIR')
    with pytest.raises(ValueError, match='MMEARTH_DIR'): download('thing', manifest=manifest, **QUICK)


@pytest.mark.parametrize('etag', ['"one"', 'W/"weak"', None])
def test_cuts_and_redirects_cost_no_more_than_a_seam_each(server, data, tmp_path, etag):
    server.etag = etag
    server.plan = [dict(redirect=1), dict(cut=400_000), dict(status=503), dict(redirect=1), dict(cut=300_000), dict(redirect=1)]
    path, = download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    assert path.read_bytes() == data
    bodies = [r for r in server.log if r[1] in (200, 206)]
    assert [r[1] for r in bodies] == [200, 206, 206] and all(r[2] > 0 for r in bodies[1:])
    assert server.sent() <= len(data) + 2 * 2 * BLOCK  # per cut: the seam, and at most one block lost on the way


def test_a_server_that_ignores_ranges_sends_it_all_again(server, data, tmp_path):
    server.plan = [dict(cut=700_000), dict(ignore_range=True)]
    path, = download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    assert path.read_bytes() == data and server.log[-1][1:] == (200, 0, len(data))


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server, data, tmp_path):
    server.plan = [dict(cut=700_000, ignore_range=True)] * 50
    with pytest.raises(DownloadError, match='brought nothing new') as e: download('thing', tmp_path, listed(f'{server.address}/file.bin'), retries=3, **QUICK)
    assert 4 <= len(server.log) <= 6 and '655,360 bytes are kept' in str(e.value)
    assert visible(tmp_path) == ['file.bin.part', 'file.bin.part.json']


def begun(server, data, tmp_path, at=700_000, **facts):
    "A download that was cut at byte `at` and given up."
    server.plan = [dict(cut=at), dict(status=503)]
    with pytest.raises(DownloadError): download('thing', tmp_path, listed(f'{server.address}/file.bin', **facts), retries=0, **QUICK)
    server.plan.clear()
    server.forget()
    return tmp_path / 'file.bin.part'


@pytest.mark.parametrize('changed_by', ['etag', 'length', 'bytes', 'length, no etag'])
def test_a_file_that_changes_between_two_attempts_is_not_glued(server, data, tmp_path, changed_by):
    if changed_by in ('bytes', 'length, no etag'): server.etag = None
    part = begun(server, data, tmp_path)
    assert part.stat().st_size > 600_000
    server.files['file.bin'] = new = data + b'more' if 'length' in changed_by else data[::-1]
    if changed_by == 'etag': server.etag = '"two"'
    path, = download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    assert path.read_bytes() == new


def test_ranges_sent_in_portions_make_a_whole(server, data, tmp_path):
    begun(server, data, tmp_path)
    server.plan = [dict(portion=200_000)] * 3
    assert download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)[0].read_bytes() == data
    assert [r[1] for r in server.log] == [206] * 4


def test_the_bar_shows_rate_and_time_left(server, data, tmp_path, capsys):
    download('thing', tmp_path, listed(f'{server.address}/file.bin'), progress=True)
    assert re.search(r'file\.bin: 100%.* 1\.20M/1\.20M \[\d\d:\d\d<\d\d:\d\d, .*B/s\]', capsys.readouterr().err)


def test_a_short_apology_does_not_cost_what_has_come(server, data, tmp_path):
    part = begun(server, data, tmp_path)
    size = part.stat().st_size
    for todo in (dict(ignore_range=True, body=b'back in an hour', etag=None), dict(page='text/html'), dict(status=403)):
        server.plan = [todo]
        with pytest.raises(DownloadError): download('thing', tmp_path, listed(f'{server.address}/file.bin'), retries=0, **QUICK)
        assert part.stat().st_size == size
    download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    assert (tmp_path / 'file.bin').read_bytes() == data and server.log[-1][1] == 206


def test_a_beginning_from_one_address_goes_on_at_another_only_with_a_known_hash(server, data, tmp_path):
    server.files['copy.bin'] = data
    begun(server, data, tmp_path, sha256=hashed(data))
    download('thing', tmp_path, listed(f'{server.address}/gone', f'{server.address}/copy.bin', sha256=hashed(data)), **QUICK)
    assert server.log[-1][1] == 206 and server.sent('copy.bin') < 700_000
    (tmp_path / 'file.bin').unlink()
    begun(server, data, tmp_path)
    download('thing', tmp_path, listed(f'{server.address}/copy.bin'), **QUICK)
    assert server.log[-1] == ('copy.bin', 200, 0, len(data))


def test_a_wrong_range_is_not_written(server, data, tmp_path):
    begun(server, data, tmp_path)
    server.plan = [dict(span='bytes 5-9/1200000')]
    with pytest.raises(DownloadError, match='asked for bytes from'): download('thing', tmp_path, listed(f'{server.address}/file.bin'), retries=0, **QUICK)
    download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    assert (tmp_path / 'file.bin').read_bytes() == data


@pytest.mark.parametrize('todo,facts,reason', [
    (dict(lie=500_000), {}, '500000 more expected'),  # promises more than it has
    (dict(), dict(bytes=1_200_001), '1,200,000 bytes there, 1,200,001 expected'),
    (dict(lie=-500_000), dict(bytes=1_200_000), '700,000 bytes there, 1,200,000 expected'),
    (dict(lie=-500_000), dict(sha256='hash of the data'), 'in the manifest'),  # promises less than it has
    (dict(body=b'wrong' * 240_000), dict(sha256='hash of the data'), 'in the manifest'),
    (dict(flip=600_000), dict(sha256='hash of the data'), 'in the manifest'),  # one bit, far from any seam
    (dict(page='text/html; charset=utf-8'), {}, 'an HTML page'), (dict(page='text/plain'), {}, 'an HTML page'),
    (dict(body=b''), {}, 'empty'), (dict(status=404), {}, 'HTTP 404'), (dict(status=410), {}, 'HTTP 410'), (dict(status=500), {}, 'HTTP 500'),
    (dict(headers={'Content-Encoding': 'gzip'}), {}, 'sent as gzip')])
def test_what_is_not_the_file_is_refused_with_its_reason(server, data, tmp_path, todo, facts, reason):
    facts = {k: hashed(data) if v == 'hash of the data' else v for k, v in facts.items()}
    server.plan = [todo] * 20
    with pytest.raises(DownloadError) as e: download('thing', tmp_path, listed(f'{server.address}/file.bin', **facts), retries=1, **QUICK)
    assert reason in e.value.failures[f'{server.address}/file.bin'] and 'file.bin' in str(e.value)
    assert not (tmp_path / 'file.bin').exists() and not read_hashes(tmp_path)
    if facts.get('bytes') == 1_200_001: return
    server.plan.clear()
    assert download('thing', tmp_path, listed(f'{server.address}/file.bin', **facts), **QUICK)[0].read_bytes() == data


@pytest.mark.parametrize('name,whole', [('tile.h5', None), ('splits.json', b'{"train": [' + b'1, ' * 9000 + b'2]}'), ('set.zip', 'zip')])
def test_a_short_file_betrays_itself_without_a_hash(server, tmp_path, name, whole):
    if name == 'tile.h5':
        with h5py.File(tmp_path / 'x', 'w') as f: f['a'] = np.arange(90_000)
        whole = (tmp_path / 'x').read_bytes()
    if whole == 'zip':
        shutil.make_archive(str(tmp_path / 'z'), 'zip', manifest_folder())
        whole = (tmp_path / 'z.zip').read_bytes()
    server.files[name] = whole
    server.plan = [dict(lie=-3000)]  # a server that says, and sends, less than there is
    manifest, root = listed(f'{server.address}/{name}', path=name), tmp_path / 'root'
    with pytest.raises(DownloadError, match='not (a )?whole'): download('thing', root, manifest, **QUICK)
    assert download('thing', root, manifest, **QUICK)[0].read_bytes() == whole and form(root / name) == ''


def test_without_any_length_a_cut_is_still_a_cut(server, tmp_path):
    with h5py.File(tmp_path / 'x', 'w') as f: f['a'] = np.arange(90_000)
    server.files['tile.h5'] = whole = (tmp_path / 'x').read_bytes()
    server.plan = [dict(headers={'Content-Length': None}, cut=300_000)]
    manifest = listed(f'{server.address}/tile.h5', path='tile.h5')
    with pytest.raises(DownloadError, match='not a whole HDF5'): download('thing', tmp_path / 'root', manifest, **QUICK)
    server.plan = [dict(headers={'Content-Length': None})]
    assert download('thing', tmp_path / 'root', manifest, **QUICK)[0].read_bytes() == whole


def test_addresses_are_tried_in_turn_and_all_reasons_told(server, data, tmp_path):
    gone = 'http://127.0.0.1:9/file.bin'  # nobody listens there
    manifest = listed(gone, f'{server.address}/nothing', 'http://', f'{server.address}/file.bin')
    with pytest.raises(DownloadError) as e: download('thing', tmp_path, listed(*manifest.files['file.bin'].urls[:3]), retries=0, **QUICK)
    assert list(e.value.failures) == list(manifest.files['file.bin'].urls[:3]) and 'HTTP 404' in str(e.value) and 'try again later' in str(e.value)
    assert download('thing', tmp_path, manifest, retries=0, **QUICK)[0].read_bytes() == data
    (tmp_path / 'file.bin').unlink()
    server.forget()
    download('thing', tmp_path, listed(gone), mirrors=[f'{server.address}/'], retries=0, **QUICK)
    assert server.sent() == len(data)


def test_a_later_change_is_refused_until_it_is_allowed(server, data, tmp_path):
    manifest = listed(f'{server.address}/file.bin')
    path, = download('thing', tmp_path, manifest, **QUICK)
    path.unlink()
    server.files['file.bin'] = data[::-1]
    with pytest.raises(DownloadError, match='delete its line in hashes.csv'): download('thing', tmp_path, manifest, **QUICK)
    assert not path.exists()
    (tmp_path / 'hashes.csv').unlink()
    assert download('thing', tmp_path, manifest, **QUICK)[0].read_bytes() == data[::-1]


def test_hashes_written_by_many_at_once_are_all_there(tmp_path):
    threads = [threading.Thread(target=record_hash, args=(tmp_path, f'f{i}', 1 + i, f'{i:064x}')) for i in range(12)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert set(read_hashes(tmp_path)) == {f'f{i}' for i in range(12)}
    (tmp_path / 'hashes.csv').write_text((tmp_path / 'hashes.csv').read_text().replace('f3,4,', 'f3,four,'))
    with pytest.raises(ManifestError, match='hashes.csv'): verify(tmp_path)


# ---- processes ----

CHILD = '''
import sys
from mmearth.manifest import File, Manifest, download
url, root, sha = sys.argv[1:]
download('thing', root, Manifest({'file.bin': File('file.bin', 'thing', 'tiny', 'CC-BY-4.0', 'mmearth', 'invented', sha256=sha, urls=(url,))}, dict(thing={}), (), {}), progress=False, wait=0)
'''


def child(server, root, sha=''): return subprocess.Popen([sys.executable, '-c', CHILD, f'{server.address}/file.bin', str(root), sha], stderr=subprocess.DEVNULL)


def test_a_killed_download_goes_on(server, data, tmp_path):
    server.plan = [dict(pause=.02)]
    process, part = child(server, tmp_path), tmp_path / 'file.bin.part'
    while not part.exists() or part.stat().st_size < 4 * BLOCK:
        assert process.poll() is None
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert 4 * BLOCK <= kept < len(data) and not (tmp_path / 'file.bin').exists()
    server.forget()
    path, = download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    assert path.read_bytes() == data and visible(tmp_path) == ['file.bin', 'hashes.csv']
    assert server.log == [('file.bin', 206, kept - BLOCK, len(data) - kept + BLOCK)]


def test_two_processes_that_want_the_same_file_share_one_download(server, data, tmp_path):
    server.plan = [dict(pause=.005)]
    both = [child(server, tmp_path), child(server, tmp_path)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert (tmp_path / 'file.bin').read_bytes() == data and server.sent() == len(data)


# ---- the disk ----

def test_a_full_disk_is_named_before_the_first_byte(server, data, tmp_path, monkeypatch):
    monkeypatch.setattr('mmearth.transfer.shutil.disk_usage', lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(DownloadError, match='1,200,000 more bytes needed, 1,000 are free.*free some space'): download('thing', tmp_path, listed(f'{server.address}/file.bin', 'http://never'), **QUICK)


def test_a_disk_that_fills_up_keeps_what_has_come(server, data, tmp_path, monkeypatch):
    count = Part.count
    def full(part, block):
        if part.size > 500_000: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count(part, block)
    monkeypatch.setattr(Part, 'count', full)
    with pytest.raises(DownloadError, match='No space left.*what has come is kept'): download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)
    monkeypatch.undo()
    assert (tmp_path / 'file.bin.part').stat().st_size > 500_000
    server.forget()
    assert download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)[0].read_bytes() == data and server.sent() < len(data)


def test_a_folder_that_cannot_be_written_is_named(server, data, tmp_path, monkeypatch):
    (tmp_path / 'a file').write_text('')
    with pytest.raises(DownloadError, match='cannot be written.*choose another root'): download('thing', tmp_path / 'a file', listed(f'{server.address}/file.bin'), **QUICK)
    def denied(*args, **kwargs): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Part, 'restart', denied)
    with pytest.raises(DownloadError, match='Permission denied'): download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)


def test_a_folder_that_holds_everything_may_be_read_only(server, data, tmp_path, monkeypatch):
    manifest = listed(f'{server.address}/file.bin')
    path, = download('thing', tmp_path, manifest, **QUICK)
    def denied(*args, **kwargs): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr('mmearth.manifest.FileLock', denied)
    monkeypatch.setattr('mmearth.manifest.os.access', lambda *args: False)
    assert download('thing', tmp_path, manifest, **QUICK) == [path]
    (tmp_path / 'hashes.csv').unlink()
    assert download('thing', tmp_path, manifest, **QUICK) == [path] and len(server.log) == 1


def test_a_file_that_came_another_way_is_recorded(server, data, tmp_path):
    (tmp_path / 'file.bin').write_bytes(data)
    download('thing', tmp_path, listed('http://never'), **QUICK)
    assert read_hashes(tmp_path)['file.bin']['sha256'] == hashed(data)
    (tmp_path / 'file.bin').write_bytes(data[::-1])
    with pytest.raises(DownloadError, match='move it away'): download('thing', tmp_path, listed('http://never'), **QUICK)


def test_a_note_that_is_no_note_starts_anew(server, data, tmp_path):
    part = begun(server, data, tmp_path)
    for note in ('[1', '[1, 2]', '7', ''):
        (tmp_path / 'file.bin.part.json').write_text(note)
        assert Part(tmp_path / 'file.bin').origin == {}
    assert download('thing', tmp_path, listed(f'{server.address}/file.bin'), **QUICK)[0].read_bytes() == data and not part.exists()


def test_verify_speaks_of_what_has_begun(tmp_path):
    assert verify(tmp_path) == []
    (tmp_path / 'data_100k_v001').mkdir()
    (tmp_path / 'data_100k_v001' / 'data_100k_v001.h5.part').write_bytes(b'12345')
    found = dict(verify(tmp_path))
    assert found['data_100k_v001/data_100k_v001.h5'] == 'missing, 5 bytes of it are in data_100k_v001.h5.part' and len(found) == 5
    assert len(verify(tmp_path, 'checkpoints')) == 11


# ---- the card ----

@pytest.mark.parametrize('name', ['MMEarth', 'MMEarth64', 'MMEarth100k', 'm-eurosat', 'm-SA-crop-type', 'pt-all_mod_atto_1M_64_uncertainty_56-8'])
def test_cards_are_valid_croissant(name, tmp_path):
    mlc = pytest.importorskip('mlcroissant')
    (tmp_path / 'card.json').write_text(json.dumps(croissant(name)))
    card = mlc.Dataset(str(tmp_path / 'card.json'))
    assert not card.metadata.ctx.issues.errors
    assert {f.content_url for f in card.metadata.file_objects} == {f.urls[0] for f in read_manifest().select(name)}
    if name.startswith('MMEarth'):
        rows = {r['modalities/name']: r for r in card.records('modalities')}
        assert set(rows) == {*TASKS, *S2_MASKS} and all(rows[m]['modalities/bands'] == ', '.join(MODALITIES[m].bands) for m in rows)


def test_recorded_hashes_make_a_card_exact(tmp_path):
    mlc = pytest.importorskip('mlcroissant')
    for i, f in enumerate(read_manifest().select('MMEarth100k')): record_hash(tmp_path, f.path, 10, f'{i:064x}')
    card = croissant('MMEarth100k', root=tmp_path)
    assert 'isLiveDataset' not in card and [d['sha256'] for d in card['distribution']] == [f'{i:064x}' for i in range(5)]
    (tmp_path / 'card.json').write_text(json.dumps(card))
    assert not mlc.Dataset(str(tmp_path / 'card.json')).metadata.ctx.issues.errors
    broken = card | dict(distribution=[{k: v for k, v in d.items() if k != 'sha256'} for d in card['distribution']])
    (tmp_path / 'card.json').write_text(json.dumps(broken))
    with pytest.raises(mlc.ValidationError, match='sha256'): mlc.Dataset(str(tmp_path / 'card.json'))
