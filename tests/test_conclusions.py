"The page of conclusions against slow computations, with arms missing, with one seed, and with none."
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmearth import conclusions as c
from mmearth.report import load_runs
from mmearth.tables import SETTING, described, other_work, paper_numbers, result_rows


@pytest.fixture(scope='module')
def work(): return other_work(described(result_rows([]), []), paper_numbers())


def rows(group='all', values=((0.5, 0.52), (0.54, 0.56)), task='m-so2sat', protocol='linear', fraction=0.05, targets='all', width=0.01, metric='accuracy', split='test', **more):
    "values[pretraining seed][label seed]."
    known = dict(zip(SETTING, ('MMEarth64', 'S2 12 bands', targets, 'Atto', 'uncertainty', '56-8'))) | dict(epochs=200.) | more
    return pd.DataFrame([known | dict(group=group, task=task, protocol=protocol, fraction=fraction, seed=s, split=split, metric=metric, value=v, low=v - width, high=v + width, run_id=f'{group}-s{p}', pretrain_seed=p, n_test=986)
                         for p, per in enumerate(values) for s, v in enumerate(per)])


def test_pairs_against_a_slow_loop():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 3)), rng.random((4, 3))
    found = c.paired(pd.concat([rows('all', a), rows('s2', b)]), 'all', 's2').iloc[0]
    differences = [np.mean([a[p][s] - b[p][s] for s in range(3)]) for p in range(4)]
    assert found.difference == pytest.approx(np.mean(differences)) and found.pairs == 4
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)
    assert found.p == pytest.approx(stats.ttest_rel(a.mean(1), b.mean(1)).pvalue, rel=1e-9)
    low, high = stats.t.interval(0.95, 3, np.mean(differences), stats.sem(differences))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assert found.images == pytest.approx(np.hypot(0.01, 0.01))


def test_only_common_label_seeds_make_a_pair():
    a, b = rows('all', [[0.5, 0.9], [0.5, 0.9], [0.6, 0.9]]), rows('s2', [[0.4], [0.4], [0.4]])
    found = c.paired(pd.concat([a, b]), 'all', 's2').iloc[0]
    assert found.difference == pytest.approx(np.mean([0.1, 0.1, 0.2])) and found.pairs == 3


def test_an_arm_that_was_never_pretrained_meets_every_run():
    found = c.paired(pd.concat([rows('all', [[0.5], [0.6], [0.7]]), rows('floor', [[0.4]])]), 'all', 'floor').iloc[0]
    assert (found.difference, found.pairs, found.of) == (pytest.approx(0.2), 3, 'pretraining seeds')
    back = c.paired(pd.concat([rows('all', [[0.5], [0.6], [0.7]]), rows('floor', [[0.4]])]), 'floor', 'all').iloc[0]
    assert (back.difference, back.low, back.high) == (pytest.approx(-found.difference), pytest.approx(-found.high), pytest.approx(-found.low))


def test_different_seeds_make_no_pair():
    other = rows('s2', [[0.4], [0.4]]).assign(pretrain_seed=lambda t: t.pretrain_seed + 7)
    assert c.paired(pd.concat([rows('all', [[0.5], [0.6]]), other]), 'all', 's2').empty


def test_cells_are_not_mixed():
    both = pd.concat([rows('all'), rows('s2', protocol='knn'), rows('s2', task='m-eurosat'), rows('s2', fraction=1.0), rows('s2', split='test_region'), rows('s2', metric='macro_f1')])
    assert c.paired(both, 'all', 's2').empty
    assert c.comparisons(both).empty


def test_holm_is_holm():
    p = np.random.default_rng(0).random(40) ** 3
    slow = np.empty(40)
    for rank, i in enumerate(np.argsort(p)): slow[i] = max(min(1, (40 - k) * p[j]) for k, j in enumerate(np.argsort(p)[:rank + 1]))
    np.testing.assert_allclose(c.holm(p), slow)
    assert np.isnan(c.holm([np.nan, 0.2])).tolist() == [True, False] and c.holm([np.nan, 0.2])[1] == 0.2


def test_no_effect_is_seldom_called_one():
    "Sixteen cells, no difference anywhere: a claim may be supported or contradicted in at most one case of twenty, with luck in the seeds alone."
    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        frames = [rows(g, 0.5 + 0.02 * rng.normal(size=(4, 1)), fraction=f, protocol=p, width=0.0001, targets=g) for g in ('all', 'S2') for f in (0.01, 0.05, 0.5, 1.0) for p in ('knn', 'linear')]
        wrong += c.verdict(3, pd.concat(frames))[0] in ('supported', 'contradicted', 'divided')
    assert wrong <= 8  # 3 expected of 60; 8 or more has a chance below one in a hundred


GOOD, BAD = [[0.70], [0.71], [0.72], [0.73]], [[0.5], [0.51], [0.52], [0.5302]]


@pytest.mark.parametrize('frames, want', [
    ([rows('all', GOOD), rows('S2', BAD, targets='S2')], 'supported'),
    ([rows('all', BAD), rows('S2', GOOD, targets='S2')], 'contradicted'),
    ([rows('all', GOOD), rows('S2', BAD, targets='S2'), rows('all', BAD, task='m-eurosat'), rows('S2', GOOD, targets='S2', task='m-eurosat')], 'divided'),
    ([rows('all', GOOD[:1]), rows('S2', BAD[:1], targets='S2')], 'open'),
    ([rows('all', GOOD, width=0.3), rows('S2', BAD, targets='S2', width=0.3)], 'open'),
    ([rows('all', GOOD), rows('S2', BAD, targets='S2', encoder='Tiny')], 'untested'),
    ([rows('all', GOOD), rows('S2', BAD, targets='S2', epochs=5.)], 'untested'),
    ([rows('all', GOOD), rows('random', BAD, targets='', pretrain='none, random weights', epochs=0.)], 'untested'),
    ([rows('all', GOOD, split='val'), rows('S2', BAD, targets='S2', split='val')], 'untested'),
    ([rows('all', GOOD, pretrain='synthetic-9'), rows('S2', BAD, targets='S2', pretrain='synthetic-9')], 'untested'),
    ([rows('all', GOOD)], 'untested')])
def test_a_verdict_for_each_case(frames, want, work):
    data = pd.concat(frames, ignore_index=True)
    assert c.verdict(3, data)[0] == want
    page = c.conclusions(data, work)
    said = page[page.index('### 3.'):page.index('### 4.')]
    assert c.VERDICTS[want].split(':')[0][1:] in said and 'nan' not in page


def test_claims_one_and_two_ask_for_their_own_arms():
    imagenet = dict(pretrain='ImageNet', input='RGB', targets='RGB', loss='', image='224-32')
    s2, bgr = rows('S2', GOOD, targets='S2'), rows('BGR', BAD, targets='BGR', input='BGR')
    assert c.verdict(1, pd.concat([s2, rows('imagenet', BAD, **imagenet)]))[0] == 'supported'
    assert c.verdict(1, pd.concat([rows('all', GOOD), rows('imagenet', BAD, **imagenet)]))[0] == 'untested'  # would be two claims in one
    assert c.verdict(2, pd.concat([s2, bgr]))[0] == 'supported' and c.verdict(1, pd.concat([s2, bgr]))[0] == 'untested'


def test_unknown_claims_are_named():
    with pytest.raises(ValueError, match='no claim 4; there are 1, 2, 3'): c.verdict(4, pd.DataFrame())


def test_unknown_arms_are_named():
    with pytest.raises(ValueError, match='no rows of pixel; there are all'): c.paired(rows(), 'all', 'pixel')


def test_ranks_stay_within_a_protocol(work):
    places = c.ranks(work)
    assert not places.protocol.str.contains('torchgeo').any() and (places.whose != 'measured here').all()
    euro = places[(places.protocol == 'finetune-galileo') & (places.task == 'm-eurosat')].iloc[0]
    assert (euro.value, euro.below, euro.others) == (95.7, 0, 12)


def test_the_kept_runs_make_a_page(work):
    runs = load_runs()
    data = described(result_rows(runs), runs)
    page = c.conclusions(data, work)
    every = c.comparisons(data)
    assert f'{len(every)} comparisons' in page and 'nan' not in page and page.count('\n## ') == 4
    assert set(every.groupby(['arm', 'baseline']).task.nunique()) == {1} or data.task.nunique() > 2
