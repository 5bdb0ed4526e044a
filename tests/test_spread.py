"Work spread over processes: same results, same order, errors that say where they come from."
import os
import sys
import time

import numpy as np
import pytest

from mmearth.spread import spread
from mmearth.store import StoreError

distributed = pytest.importorskip('distributed')


def slow_square(x):
    time.sleep(.02 * (x % 3))
    return x * x, os.getpid()


def refuse(x):
    if x == 5: raise StoreError('earth.h5', 'aster', 'damaged', 'download it again')
    return x


@pytest.fixture(scope='module')
def cluster():
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0', memory_limit=0) as cluster: yield cluster


def test_processes_give_the_same_in_the_same_order(cluster):
    here = [v for v, _ in spread(slow_square, range(20))]
    local, pids = zip(*spread(slow_square, range(20), workers=2))
    far, far_pids = zip(*spread(slow_square, iter(range(20)), scheduler=cluster.scheduler_address))
    assert list(local) == list(far) == here == [x * x for x in range(20)]
    assert len(set(pids)) == 2 and os.getpid() not in set(pids) | set(far_pids)
    assert len(list(spread(slow_square, range(2), scheduler=cluster.scheduler_address))) == 2  # the scheduler was left running


@pytest.mark.parametrize('far', [False, True])
def test_an_error_keeps_its_type_and_names_its_part(cluster, far):
    with pytest.raises(StoreError, match='aster') as e: list(spread(refuse, range(9), scheduler=cluster.scheduler_address if far else None))
    assert 'in part 5: 5' in e.value.__notes__
    assert e.value.remedy == 'download it again'


def test_few_parts_are_under_way(cluster):
    taken = []
    def parts():
        for i in range(1000):
            taken.append(i)
            yield i
    results = spread(refuse, parts(), scheduler=cluster.scheduler_address)
    assert next(results) == 0 and len(taken) <= 9
    results.close()


def test_a_killed_worker_is_an_error_not_a_hang(cluster):
    with pytest.raises(Exception) as e: list(spread(lambda x: os._exit(1), [1], workers=1))
    assert any('in part 0: 1' in n for n in e.value.__notes__)


def test_large_things_travel_with_the_function():
    big = np.ones(1_000_000)
    assert list(spread(lambda i: float(big[:i].sum()), range(5), workers=1)) == [0, 1, 2, 3, 4]


def test_bad_input():
    for workers in (-1, 1.5, True, '2', None):
        with pytest.raises(ValueError, match='count of processes'): spread(refuse, [1], workers=workers)
    with pytest.raises(ConnectionError, match='no Dask scheduler'): list(spread(refuse, [1], scheduler='nonsense://here'))


def test_dask_is_needed_only_for_workers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    assert list(spread(refuse, [1, 2])) == [1, 2]
    with pytest.raises(ImportError, match=r'pip install "mmearth\[build\]"'): list(spread(refuse, [1], workers=1))


def test_a_bar_is_shown_when_asked_for(capsys):
    list(spread(refuse, range(3), desc='Counting'))
    assert 'Counting' in capsys.readouterr().err


def test_the_environment_is_left_as_it_was():
    before = dict(os.environ)
    list(spread(abs, [1, -2], workers=1))
    assert dict(os.environ) == before
