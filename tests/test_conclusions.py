"The page of conclusions against slow computations, with arms missing, with one seed, and with none."
import itertools
import re

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
    ([rows('all', GOOD)], 'untested')])
def test_a_verdict_for_each_case(frames, want, work):
    data = pd.concat(frames, ignore_index=True)
    assert c.verdict(3, data)[0] == want
    made = c.conclusions(data, work)
    assert f'**{c.VERDICTS[want]}**' in next(line for line in made.page.split('\n') if line.startswith('- **Claim 3**')) and 'nan' not in made.page
    assert ('### 3.' in made.page) == (want != 'untested') and len(made.claims) == len(c.verdict(3, data)[1])


def test_synthetic_earth_is_judged_apart(work):
    planet = pd.concat([rows('all', GOOD, pretrain='synthetic-9', task='scenes-9'), rows('S2', BAD, targets='S2', pretrain='synthetic-9', task='scenes-9')])
    mixed = planet.assign(task='m-so2sat')
    assert c.verdict(3, mixed)[0] == c.verdict(3, mixed, True)[0] == 'untested'
    real = pd.concat([rows('real-all', BAD), rows('real-S2', GOOD, targets='S2')])
    for data, want, told in ((planet, ('untested', 'supported'), 'on real images tests it**; on synthetic Earth: **supported**.'), (pd.concat([planet, real]), ('contradicted', 'supported'), '**contradicted**; on synthetic Earth: **supported**.')):
        assert tuple(c.verdict(3, data, synthetic)[0] for synthetic in (False, True)) == want
        made = c.conclusions(data, work)
        assert told in next(line for line in made.page.split('\n') if line.startswith('- **Claim 3**'))
        assert made.page.count('### 3.') == 1 and sorted(made.claims.synthetic) == [False] * (want[0] != 'untested') + [True]


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


# ---- experiments ----

FLOOR = dict(pretrain='none, random filters', targets='', encoder='', epochs=0.)


@pytest.mark.parametrize('group, kind, want', [
    ('eurosat-all', 'pretrained', ('eurosat', 'all')), ('eurosat-atto-image_only', 'image alone', ('eurosat-atto', 'image only')), ('bench', 'random weights', ('', 'bench')),
    ('eurosat-random_filters', 'random filters', ('eurosat', 'random filters')), ('eurosat-random_filters-stages', 'random filters', ('eurosat', 'random filters')),
    ('eurosat-protocols image_statistics', 'image statistics', ('eurosat-protocols', 'image statistics')), ('big-test untrained-atto', 'random weights', ('big-test', 'untrained-atto')),
    ('released pt-all_mod_atto_1M_64_uncertainty_56-8', 'pretrained', ('released', 'pt-all_mod_atto_1M_64_uncertainty_56-8'))])
def test_a_group_belongs_to_an_experiment(group, kind, want): assert c._named(group, kind) == want


def test_a_floor_is_lent_on_the_same_images_only():
    lender = [rows('eurosat-all'), rows('eurosat-random_filters', ((0.8, 0.82),), **FLOOR)]
    def found(*frames):
        data = c.by_experiment(pd.concat([*lender, *frames], ignore_index=True))
        return data[(data.experiment == 'atto') & (data.kind == 'random filters')]
    borrower = rows('atto-all')
    assert set(found(borrower).value) == {0.8, 0.82} and set(found(borrower).run_id) == {'eurosat-random_filters-s0'}
    for other in (borrower.assign(n_test=7), borrower.assign(task='m-eurosat'), borrower.assign(protocol='knn')): assert found(other).empty
    own = rows('atto-random_filters', ((0.3, 0.3),), **FLOOR)
    assert set(found(borrower, own).value) == {0.3}
    twice = c.by_experiment(pd.concat([*lender, borrower, rows('third-all'), rows('fourth-random_filters', ((0.1, 0.1),), **FLOOR)], ignore_index=True))
    assert twice[twice.experiment.isin(('atto', 'third'))].groupby(['experiment', 'arm', 'seed']).size().max() == 2  # of one lender; two pretraining seeds of `all`


def test_pairs_stay_within_an_experiment():
    data = pd.concat([rows(f'{e}-{a}', targets=t, **(dict(pretrain='none, random weights', epochs=0.) if a == 'random' else {})) for e in ('one', 'two') for a, t in (('all', 'all'), ('s2', 'S2'), ('random', ''))])
    pairs = c.comparisons(data)
    assert pairs.groupby('experiment').size().to_dict() == dict(one=3, two=3)
    assert {(r.arm, r.baseline): r.against for r in pairs.itertuples()} == {('all', 's2'): 'image alone', ('all', 'random'): 'random weights', ('s2', 'random'): 'random weights'}


@pytest.mark.parametrize('other, want', [(dict(), 'image alone'), (dict(encoder='Tiny'), ''), (dict(epochs=5.), ''), (dict(pretrain='MMEarth'), ''), (dict(input='BGR', targets='BGR'), '')])
def test_the_image_alone_is_a_baseline_of_its_like(other, want):
    assert c.comparisons(pd.concat([rows('t-all'), rows('t-s2', **(dict(targets='S2') | other))])).against.tolist() == [want]


# ---- marks ----

SIDES = {'▲': [[0.80], [0.81], [0.82]], '▼': [[0.20], [0.21], [0.22]], '△': [[0.52], [0.521], [0.523]], '▽': [[0.48], [0.479], [0.477]], '·': [[0.5], [0.52], [0.48]]}


@pytest.mark.parametrize('mark', SIDES)
def test_a_mark_for_each_case(mark):
    data = pd.concat([rows('t-all', SIDES[mark], width=0.05), rows('t-s2', [[0.5], [0.5], [0.5]], targets='S2', width=0.05)])
    table = c.marks_table(c.comparisons(data))
    assert table['against image alone (s2)'].tolist() == [mark]
    line = c.in_short(c.scores(data), c.comparisons(data)).iloc[0]
    assert line['against image alone'] == ('none of 1' if mark == '·' else f'1 {mark} of 1') and ('above all others' in line['best with all labels']) == (mark in '▲▼')


def test_marks_stand_at_their_share_and_split():
    frames = []
    for i, (split, f) in enumerate(itertools.product(('test_image', 'test_region'), (0.01, 0.05, 1.0))):
        frames += [rows('t-all', SIDES['▲▼·△▽▲'[i]], width=0.05, split=split, fraction=f), rows('t-s2', [[0.5], [0.5], [0.5]], targets='S2', width=0.05, split=split, fraction=f)]
    table = c.marks_table(c.comparisons(pd.concat(frames)))
    assert table['against image alone (s2)'].item() == '▲▼· / △▽▲' and table['1 %'].item() == '81.0 / 52.1' and table['100 %'].item() == '50.0 / 81.0'
    short = c.marks_table(c.comparisons(pd.concat(frames[:-2])))
    assert short['against image alone (s2)'].item() == '▲▼· / △▽–'


def test_splits_may_have_other_shares(work):
    frames = [rows(f't-{a}', targets=t, split=s, fraction=f) for s, f in (('test_image', 0.05), ('test_image', 0.5), ('test_region', 0.01), ('test_region', 1.0)) for a, t in (('all', 'all'), ('s2', 'S2'))]
    data = pd.concat(frames)
    assert c.in_short(c.scores(data), c.comparisons(data))['best with few labels'].item().startswith('5 %: ')
    page = c.conclusions(data, work).page
    assert 'labels: 1 %, 5 %, 50 %, 100 %. With 50 % (linear probe, held-out images): all 53.0, s2 53.0. With 5 % (' in page and '| –··– / ·––· |' in page


def test_neighbours_are_shown_where_nothing_else_is():
    both = pd.concat([rows(f't-{a}', targets=t, protocol=p) for p in ('knn', 'linear') for a, t in (('all', 'all'), ('s2', 'S2'))])
    assert c.marks_table(c.comparisons(both)).reader.tolist() == ['linear probe']
    assert c.marks_table(c.comparisons(both[both.protocol == 'knn'])).reader.tolist() == ['nearest neighbours']


def test_the_clearest_cells_are_the_farthest_from_zero():
    rng, frames = np.random.default_rng(3), []
    for f in (0.01, 0.05, 0.5, 1.0):
        for p in ('knn', 'linear', 'finetune'): frames += [rows('all', 0.5 + 0.05 * rng.normal() + 0.01 * rng.normal(size=(4, 1)), fraction=f, protocol=p), rows('S2', 0.5 + 0.01 * rng.normal(size=(4, 1)), fraction=f, protocol=p, targets='S2')]
    _, cells = c.verdict(3, pd.concat(frames))
    lines = [re.split(r' \| ', line) for line in c._clearest(cells).split('\n')[2:-1]]
    low, high = cells[cells.difference > 0].low.nlargest(2), cells[cells.difference < 0].high.nsmallest(2)
    assert [line[4] for line in lines] == [f'{100 * r.difference:+.1f} ({100 * r.low:+.1f} to {100 * r.high:+.1f})' for i in (*low.index, *high.index) for r in [cells.loc[i]]]


# ---- figure ----

def test_the_figure_draws_every_pair_once():
    data = pd.concat([rows(f't-{a}', v, targets=t, fraction=f, width=0.05) for f in (0.01, 1.0) for a, t, v in (('all', 'all', SIDES['▲']), ('pixel', 'pixel', SIDES['△']), ('s2', 'S2', SIDES['·']))])
    drawn = c.drawn_pairs(c.comparisons(data))
    figure = c.differences_figure(drawn)
    ax, = figure.axes
    points = sorted(round(float(line.get_xdata()[0]), 6) for line in ax.lines if line.get_marker() in 'osD^vPX' and len(line.get_xdata()) == 1)
    assert points == sorted(round(100 * d, 6) for d in drawn.difference) and len(points) == 4
    assert [t.get_text() for t in ax.get_yticklabels()] == ['1 %', '100 %']
    with pytest.raises(ValueError, match='at least two pairs'): c.differences_figure(drawn[:0])


# ---- the page ----

def test_a_page_of_everything_at_once_stays_short(work):
    "Three experiments of five arms, two readers, four shares and two splits: some 17 lines for each, no line for a pair."
    arms, frames = dict(all='all', pixel='pixel', image='image', s2='S2', random=''), []
    for e, (a, t), p, f, s in itertools.product(range(3), arms.items(), ('linear', 'linear-stages'), (0.01, 0.05, 0.5, 1.0), ('test_image', 'test_region')):
        frames.append(rows(f'e{e}-{a}', targets=t, protocol=p, fraction=f, split=s, **(dict(pretrain='none, random weights', epochs=0.) if a == 'random' else {})))
    made = c.conclusions(pd.concat(frames, ignore_index=True), work)
    assert len(made.pairs) == 3 * 10 * 16 and made.page.count('\n') < 65 + 3 * 17


def test_the_kept_runs_make_a_page(work):
    runs = load_runs()
    data = described(result_rows(runs), runs)
    made = c.conclusions(data, work)
    told = made.pairs[made.pairs.against != '']
    assert f'In {len(told)} comparisons' in made.page and 'nan' not in made.page and made.page.count('\n## ') == 4
    assert made.page.count('\n') <= 60 + 18 * len(told.groupby(['experiment', 'task']))
    for column, want in (('claims', sum(len(c.verdict(3, data, synthetic)[1]) for synthetic in (False, True))), ('pairs', None)):
        table = getattr(made, column)
        assert (len(table) == want if want is not None else len(table) >= len(told)) and not table.duplicated([k for k in ('claim', 'synthetic', 'experiment', 'arm', 'baseline', *c.CELLS) if k in table]).any()
    assert made.claims.difference.dtype == made.pairs.difference.dtype == float  # else `round` passes over them
    marks = ''.join(''.join(t) for t in re.findall(r'[▲△▽▼]+', made.page.split('## Where intervals part')[1].split('\n', 3)[3]))
    shown = told[[p in c._ordered_protocols(told[(told.experiment == e) & (told.task == t)].protocol) for e, t, p in zip(told.experiment, told.task, told.protocol)]]
    assert {m: marks.count(m) for m in '▲▼'} == {'▲': (shown.part == 'above').sum(), '▼': (shown.part == 'below').sum()}
