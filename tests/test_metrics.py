"Scores and intervals: against scikit-learn, and against a slow redrawing of images."
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from mmearth import metrics as m


def answers(n=120, classes=6, seed=0, decimals=2):
    rng = np.random.default_rng(seed)
    truth = rng.random((n, classes)) < np.linspace(0.02, 0.5, classes)
    return truth, np.round(1 / (1 + np.exp(-(2 * truth - 1.5 + rng.normal(size=truth.shape)))), decimals)


@pytest.mark.parametrize('decimals', [1, 2, 9])
def test_every_redrawn_set_scores_what_scikit_learn_says(decimals):
    truth, given = answers(decimals=decimals)
    drawn, image = m.draws(len(truth), 7, 3), np.arange(len(truth))
    micro = m.average_precisions(truth.ravel(), given.ravel(), np.repeat(image, truth.shape[1]), drawn)
    for copies, value in zip(drawn, micro):
        again = np.repeat(image, copies)
        assert value == pytest.approx(average_precision_score(truth[again], given[again], average='micro'), abs=1e-12)
    for k in range(truth.shape[1]):
        for copies, value in zip(drawn, m.average_precisions(truth[:, k], given[:, k], image, drawn)):
            again = np.repeat(image, copies)
            if truth[again, k].any(): assert value == pytest.approx(average_precision_score(truth[again, k], given[again, k]), abs=1e-12)
            else: assert np.isnan(value)


@pytest.mark.parametrize('blocks', [None, np.repeat(np.arange(30), 4)])
def test_values_and_intervals_against_a_slow_loop(blocks):
    truth, given = answers()
    line = m.best_threshold(truth, given)
    rows = {r['metric']: r for r in m.multilabel_scores(truth, given, line, n=200, seed=5, blocks=blocks)}
    of = np.arange(120) if blocks is None else blocks
    slow = {name: [] for name in rows}
    for copies in m.draws(of.max() + 1, 200, 5):
        i = np.repeat(np.arange(120), copies[of])
        t, g = truth[i], given[i]
        there = t.any(0)
        slow['micro_f1'].append(f1_score(t, g > 0.5, average='micro', zero_division=0))
        slow['micro_f1_tuned'].append(f1_score(t, g > line, average='micro', zero_division=0))
        slow['macro_f1'].append(f1_score(t[:, there], g[:, there] > 0.5, average='macro', zero_division=0))
        slow['map_micro'].append(average_precision_score(t, g, average='micro'))
        slow['map_macro'].append(average_precision_score(t[:, there], g[:, there], average='macro'))
    for name, values in slow.items(): assert np.allclose([rows[name]['low'], rows[name]['high']], np.quantile(values, [0.025, 0.975]), atol=1e-12), name
    there = truth.any(0)
    assert rows['map_macro']['value'] == pytest.approx(average_precision_score(truth[:, there], given[:, there]))
    assert rows['micro_f1_tuned']['value'] == pytest.approx(f1_score(truth, given > line, average='micro'))


def test_the_line_is_the_best_there_is():
    truth, given = answers(seed=4)
    tried = [f1_score(truth, given > t, average='micro', zero_division=0) for t in np.r_[-1, np.unique(given)]]
    assert f1_score(truth, given > m.best_threshold(truth, given), average='micro') == pytest.approx(max(tried))
    everything = np.ones((5, 2), bool)
    assert (np.full((5, 2), 0.3) > m.best_threshold(everything, np.full((5, 2), 0.3))).all()


def test_intervals():
    assert m.bootstrap(np.ones(50)) == (1, 1) and m.bootstrap(np.zeros(50)) == (0, 0)
    low, high = m.bootstrap(np.arange(400) < 300)
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert abs(low - (0.75 - spread)) < 0.01 and abs(high - (0.75 + spread)) < 0.01
    table = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert m.macro_f1(table) == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert np.array_equal(m.confusion(list('aaaabb'), list('aaabbb'), 'abc'), table)


def test_what_cannot_be_scored_is_refused():
    truth, given = answers()
    with pytest.raises(ValueError, match='not finite'): m.multilabel_scores(truth, np.where(truth, np.nan, given))
    with pytest.raises(ValueError, match='no test image has any class'): m.multilabel_scores(truth & False, given)
    with pytest.raises(ValueError, match='30 blocks for 120'): m.multilabel_scores(truth, given, blocks=np.arange(30))
    with pytest.raises(ValueError, match='must both be'): m.multilabel_scores(truth[:, 0], given[:, 0])
    with pytest.raises(ValueError, match='finite, of'): m.best_threshold(truth, np.where(truth, np.nan, given))
    with pytest.raises(ValueError, match='repair the reader'): m.best_threshold(truth, given[1:])
    with pytest.raises(ValueError, match='4 true classes and 1 predicted'): m.confusion(list('abab'), ['a'], 'ab')
    with pytest.raises(ValueError, match='3 blocks for 4 test images'): m.scores(list('abab'), list('abba'), 'ab', blocks=['x', 'y', 'z'])


def test_blocks_may_be_any_names():
    truth, said, blocks = list('abababab'), list('abbaabba'), ['x', 'x', 'y', 'y', 'z', 'z', 'z', 'x']
    assert m.scores(truth, said, 'ab', blocks=blocks) == m.scores(truth, said, 'ab', blocks=np.unique(blocks, return_inverse=True)[1])
