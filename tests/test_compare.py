"From rows to a table and a sentence: what must hold whatever the numbers are."
import numpy as np
import pandas as pd
import pytest

from mmearth import compare as c


def rows(arm='a', runs=3, seeds=3, value=0.6, fraction=0.01, spread=0.02, width=0.02, **more):
    rng = np.random.default_rng(0)
    out = []
    for r in range(runs):
        for s in range(seeds):
            v = value + spread * rng.normal()
            out.append(dict(arm=arm, protocol='linear', fraction=fraction, seed=s, split='test_image', metric='accuracy', value=v, low=v - width, high=v + width, run_id=f'{arm}-{r}') | more)
    return pd.DataFrame(out)


def half(frame):
    t = c.comparison_table(frame).iloc[0]
    return (t.high - t.low) / 2


def test_one_run_and_seed_has_the_interval_of_its_test_images():
    assert half(rows(runs=1, seeds=1)) == pytest.approx(0.02)


def test_sources_add_in_squares():
    frame = rows(runs=1, seeds=3)
    means = frame.value
    t = 4.302652729911275 * means.std(ddof=1) / np.sqrt(3)
    assert half(frame) == pytest.approx(np.hypot(t, 0.02), rel=1e-6)


def test_paired_runs_and_seeds_are_counted_once():
    frame = rows(runs=3, seeds=1)
    frame['seed'] = range(3)
    t = 4.302652729911275 * frame.value.std(ddof=1) / np.sqrt(3)
    assert half(frame) == pytest.approx(np.hypot(t, 0.02), rel=1e-6)


def test_runs_weigh_alike_however_many_seeds_they_have():
    frame = pd.concat([rows(runs=1, seeds=5, value=0.5, spread=0), rows(runs=1, seeds=1, value=0.7, spread=0).assign(run_id='other')])
    assert c.comparison_table(frame)['mean'][0] == pytest.approx(0.6)


def test_intervals_stay_in_range_and_rows_name_their_runs():
    t = c.comparison_table(rows(value=0.99, spread=0.02)).iloc[0]
    assert t.high <= 1 and t.run_ids == 'a-0 a-1 a-2' and (t.runs, t.label_seeds) == (3, 3)
    without = rows().drop(columns='arm')
    assert set(c.comparison_table(without).arm) == {'a-0', 'a-1', 'a-2'}


def test_order_of_arms_is_kept():
    frame = pd.concat([rows('z'), rows('m'), rows('a')])
    assert list(c.wide_table(c.comparison_table(frame)).columns[-3:]) == ['z', 'm', 'a']


@pytest.mark.parametrize('value, word', [(0.9, 'is above `base`'), (0.3, 'is below `base`'), (0.6, 'is not told apart from `base`')])
def test_headline_says_which_way(value, word):
    table = c.comparison_table(pd.concat([rows('base', spread=0.001), rows('new', value=value, spread=0.001)]))
    assert word in c.headline(table) and '1 % of the labels' in c.headline(table)


def test_headline_needs_two_arms():
    with pytest.raises(ValueError, match='needs both'): c.headline(c.comparison_table(rows()))
    with pytest.raises(ValueError, match='none'): c.headline(c.comparison_table(rows()), metric='macro_f1')


def test_markdown_is_a_table():
    text = c.markdown(pd.DataFrame(dict(a=[1.23456, 2], b=['x|y', 'z'])))
    assert text == '| a | b |\n| --- | --- |\n| 1.235 | x/y |\n| 2 | z |\n'


@pytest.mark.parametrize('n', [2, 3, 11, 12, 20, 100])
def test_student_is_student(n):
    stats = pytest.importorskip('scipy.stats')
    x = np.arange(n) / n
    assert c.t_interval(x) == pytest.approx(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / np.sqrt(n), rel=2e-3)
