"The fuzzer: reproducible damage, verdicts that mean what they say, and a few hundred cases."
import json
import os
import shutil

import numpy as np
import pytest

from mmearth.fuzz import BYTES, SUBJECTS, Subject, damage, edit_json, edit_table, fuzz, is_named, judged, same, snapshot, verdict
from mmearth.store import Store, StoreError


@pytest.fixture(scope='module', params=list(SUBJECTS))
def sound(request, tmp_path_factory):
    "Name and folder of each subject."
    folder = tmp_path_factory.mktemp('sound')
    SUBJECTS[request.param].make(folder)
    return request.param, folder


def content(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_damage_is_reproducible_and_damages(sound, tmp_path):
    name, folder = sound
    before, changed = content(folder), 0
    for seed in range(8):
        a, b = (shutil.copytree(folder, tmp_path / f'{x}{seed}') for x in 'ab')
        assert damage(a, seed) == damage(b, seed) and content(a) == content(b)
        changed += content(a) != before
    assert changed >= 5  # a value may be replaced by itself


def test_sound_folders_are_harmless(sound, tmp_path):
    name, folder = sound
    truth = SUBJECTS[name].read(shutil.copytree(folder, tmp_path / 'a'))
    assert verdict(SUBJECTS[name], shutil.copytree(folder, tmp_path / 'b'), truth) == ('harmless', '')


@pytest.mark.parametrize('how', [*BYTES, edit_json, edit_table])
def test_every_kind_of_damage_works_on_anything(how):
    for i, data in enumerate([b'a', b'ab', b'{}', b'[]', b'1', b'{"a": [1, {"b": null}]}', b'x,y\n1,2\n', b'\xff\x00\n', b'\n', bytes(5000)] * 8):
        assert isinstance(how(np.random.default_rng(i), data), bytes)


def test_verdicts_mean_what_they_say(tmp_path):
    def raises(e):
        def read(folder): raise e
        return Subject(None, read, None)
    (tmp_path / 'file.h5').touch()
    judge = lambda read, check: verdict(Subject(None, read, check), tmp_path, 1)[0]
    assert judge(lambda f: 1, lambda f: []) == judge(lambda f: 1, lambda f: [('a', 'b')]) == 'harmless'
    assert judge(lambda f: 2, lambda f: []) == 'silent' and judge(lambda f: 2, lambda f: ['x']) == 'hash' and judge(lambda f: 2, None) == 'plausible'
    assert verdict(raises(ValueError(f'{tmp_path}/file.h5: numpy says')), tmp_path, 1)[0] == 'crash'  # not raised by the package
    assert verdict(raises(ZeroDivisionError()), tmp_path, 1)[0] == 'crash'
    assert judge(lambda f: Store(f), None) == 'named'
    assert verdict(Subject(None, lambda f: Store(f / 'elsewhere'), None), tmp_path / 'b', 1)[0] == 'named'
    try: Store(tmp_path)
    except StoreError as e: assert is_named(e, tmp_path) and not is_named(e, tmp_path / 'another' / 'name')


def test_comparison_is_strict(tiny_store):
    nan = float('nan')
    assert same(dict(a=[1.0, nan, (2,)]), dict(a=[1.0, nan, (2,)]))
    for a, b in [(1, 1.0), (1, True), (0.0, -0.0), ([1], (1,)), ('a', b'a'), (nan, 0.0), (dict(a=1), dict(a=1, b=2)), ([1], [1, 2]), (None, 0)]: assert not same(a, b) and not same(b, a)
    one, other = Store(tiny_store), snapshot(Store(tiny_store))
    assert same(snapshot(one), other)
    one.stats['aster']['mean'][0] += 1e-9
    assert not same(snapshot(one), other)


@pytest.mark.parametrize('act, says', [('os.kill(os.getpid(), 11)', 'died with -11'), ('time.sleep(60)', 'no answer within')])
def test_a_case_that_takes_the_process_down_is_a_crash_and_the_next_is_read(act, says, tmp_path, monkeypatch):
    folder = tmp_path / 'sound'
    folder.mkdir()
    SUBJECTS['manifest'].make(folder)
    code = ('import os, time, mmearth.fuzz as z\nread = z.SUBJECTS["manifest"].read\nseen = []\n'
            f'def bad(folder):\n    if (folder / "tables" / "files.csv").read_bytes() != (z.Path({str(folder)!r}) / "tables" / "files.csv").read_bytes(): {act}\n    return read(folder)\n'
            'z.SUBJECTS["manifest"] = z.Subject(None, bad, None)\nimport sys\nz._serve(*sys.argv[1:])')
    stub = tmp_path / 'python'
    stub.write_text(f'#!/bin/sh\nshift 2\nexec {os.sys.executable} {tmp_path / "code.py"} "$@"\n')
    (tmp_path / 'code.py').write_text(code)
    stub.chmod(0o755)
    monkeypatch.setattr('mmearth.fuzz.sys.executable', str(stub))
    found = list(judged('manifest', folder, range(6), timeout=3.))
    assert [f[0] for f in found] == list(range(6))
    crashed = [f for f in found if f[2] == 'crash']
    assert crashed and len(crashed) < 6 and all(says in f[3] for f in crashed)


def test_a_sound_folder_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match='cannot be read'): list(judged('manifest', tmp_path, range(1)))


@pytest.mark.parametrize('name, n', [('store', 120), ('plain store', 60), ('pack', 40), ('shared pack', 12), ('manifest', 80)])
def test_no_crash_and_nothing_silent(name, n):
    found = fuzz(n, (name,), first=100_000, progress=False)
    bad = found[found.verdict.isin(['crash', 'silent'])]
    assert len(found) == n and bad.empty, json.dumps(bad.to_dict('records'), indent=1)
    assert (found.verdict == 'named').sum() > n / 10


@pytest.mark.parametrize('name, case', [('store', 377), ('shared pack', 1626)])
def test_cases_that_once_crashed(name, case):
    assert fuzz(1, (name,), first=case, progress=False).verdict.tolist() == ['named']
