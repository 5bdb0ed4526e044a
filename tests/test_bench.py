"A race is fair, its summary is right, and what limits memory or looks into the page cache says so where it cannot."
import os

import numpy as np
import pandas as pd
import pytest

from mmearth import bench


class Machine:
    "A clock that work moves; it may lose or gain speed."
    def __init__(self, drift=0.): self.now, self.drift, self.calls = 0., drift, []

    def clock(self): return self.now

    def work(self, name, cost, samples=1):
        def run():
            self.calls.append(name)
            self.now += cost * (1 + self.drift * self.now)
            return samples
        return run


def test_every_variant_runs_once_a_round_in_rotating_order():
    m = Machine()
    timed = bench.laps({n: m.work(n, 0.01) for n in 'abc'}, seconds=0.1, rounds=4, clock=m.clock)
    orders = timed.sort_values(['round', 'place']).groupby('round').variant.apply(''.join).tolist()
    assert orders == ['abc', 'bca', 'cab', 'abc']


@pytest.mark.parametrize('drift', [0., 0.02, -0.002])
def test_ratios_do_not_depend_on_the_drift_of_the_machine(drift):
    m = Machine(drift)
    timed = bench.laps(dict(a=m.work('a', 0.01), b=m.work('b', 0.03)), seconds=1, rounds=6, clock=m.clock)
    assert bench.ratio(timed, 'a', 'b')[0] == pytest.approx(3, rel=0.1)


def test_samples_are_counted_whatever_a_call_returns():
    m = Machine()
    frame = bench.race(dict(small=m.work('s', 0.01, 10), large=m.work('l', 0.1, 100)), seconds=1, rounds=2, clock=m.clock, sample_bytes=1e6, floor='small')
    assert frame.samples_per_s.tolist() == pytest.approx([1000, 1000], rel=1e-6)
    assert frame.gb_per_s.tolist() == pytest.approx([1, 1], rel=1e-6)
    assert frame.share['small'] == 1


def test_what_was_prepared_before_a_lap_is_not_counted():
    "A reader with full buffers delivers a few batches at once; a lap must not be paid for them."
    m = Machine()
    def prefetching():
        m.now += 1e-6 if (free := prefetching.ready > 0) else 0.01
        prefetching.ready -= free
        return 1
    prefetching.ready = 3
    timed = bench.laps(dict(a=prefetching), seconds=0.5, rounds=1, clock=m.clock)
    assert timed.samples_per_s[0] == pytest.approx(100, rel=0.05)


def test_a_slow_variant_still_finishes_one_call():
    m = Machine()
    assert bench.laps(dict(a=m.work('a', 50.)), seconds=0.1, rounds=1, clock=m.clock).samples.tolist() == [1]


@pytest.mark.parametrize('given', [dict(variants={}), dict(rounds=0), dict(seconds=0)])
def test_races_without_runners_rounds_or_time_are_refused(given):
    with pytest.raises(ValueError, match='at least one of each'): bench.laps(**dict(dict(variants=dict(a=lambda: 1)), **given))


def test_ratio_names_the_missing_variant():
    m = Machine()
    timed = bench.laps(dict(a=m.work('a', 0.01)), seconds=0.1, rounds=1, clock=m.clock)
    with pytest.raises(KeyError, match="'b'"): bench.ratio(timed, 'a', 'b')
    with pytest.raises(KeyError, match="'b'"): bench.standing(timed, floor='b')


def test_the_floor_copies_every_byte_of_its_region():
    seen = np.zeros(5000, bool)
    class Watched(np.ndarray):
        def __getitem__(self, key):
            seen[key] = True
            return np.asarray(self)[key]
    copy = bench.two_thread_copy(10, 100, source=np.arange(5000, dtype=np.uint8).view(Watched))
    assert sum(copy() for _ in range(3)) == 3 * 800
    assert seen.all()


def test_page_cache_helpers_on_files_of_any_size(tmp_path):
    (tmp_path / 'sub').mkdir()
    for name, size in dict(empty=0, odd=4097, large=1_000_003).items(): (tmp_path / 'sub' / name).write_bytes(bytes(size))
    total = 4097 + 1_000_003
    assert bench.warm(tmp_path) == (total, total)
    held, size = bench.forget(tmp_path)
    assert size == total and held <= total
    assert bench.warm(tmp_path / 'sub' / 'odd') == (4097, 4097)
    for ask in (bench.warm, bench.forget, bench.resident):
        with pytest.raises(FileNotFoundError, match='nowhere'): ask(tmp_path / 'nowhere')


def test_forgetting_empties_the_cache(tmp_path):
    path = tmp_path / 'data'
    path.write_bytes(os.urandom(1 << 22))
    bench.warm(path)
    if bench.forget(path)[0]: pytest.skip('this file system lives in memory')
    assert bench.resident(path) == (0, 1 << 22)


def test_memory_limit_says_what_to_do_where_it_cannot(tmp_path):
    with pytest.raises(bench.LimitError, match='systemd-run --scope -p MemoryMax=4096'):
        with bench.memory_limit(4096, groups=tmp_path / 'none'): pass
    assert not list(tmp_path.iterdir())


def test_memory_limit_holds_the_page_cache_and_lets_go(tmp_path):
    path = tmp_path / 'data'
    path.write_bytes(os.urandom(96 << 20))
    if bench.forget(path)[0]: pytest.skip('this file system lives in memory')
    before = open('/proc/self/cgroup').read()
    try:
        with bench.memory_limit(48 << 20) as group:
            held, size = bench.warm(path)
            assert str(group.name) in open('/proc/self/cgroup').read()
    except bench.LimitError as e: pytest.skip(str(e))
    assert held <= 48 << 20 < size
    assert open('/proc/self/cgroup').read() == before and not group.exists()


def test_memory_limit_lets_go_after_an_error():
    before = open('/proc/self/cgroup').read() if os.path.exists('/proc/self/cgroup') else ''
    with pytest.raises((bench.LimitError, ZeroDivisionError)):
        with bench.memory_limit(1 << 30): 1 / 0
    assert not before or open('/proc/self/cgroup').read() == before


def test_pictures_show_every_variant():
    frame = pd.DataFrame(dict(samples_per_s=[100., 1.], low=[90., 0.5], high=[110., 2.]), index=['a', 'b'])
    fig = bench.bars(frame, ours=['a'], floor='b', log=True)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['b', 'a']
    assert [t.get_text() for t in fig.axes[0].texts] == ['1.00', '100']
    rates = [0.012345, 1.005, 2.96, 9.996, 99.95, 999.6, 65_487.]
    small = bench.bars(frame.iloc[[0] * len(rates)].assign(samples_per_s=rates, low=rates, high=rates).set_axis(range(len(rates))))
    assert [t.get_text() for t in small.axes[0].texts] == ['0.0123', '1.00', '2.96', '10.0', '100', '1,000', '65,500']
    fig = bench.curve(dict(x=frame.set_axis([10, 20])), 'tiles')
    assert fig.axes[0].get_ylim()[0] == 0
