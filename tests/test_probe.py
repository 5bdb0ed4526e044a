"Frozen features and their readers: edge cases that the lessons of 31_probe leave out."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mmearth import probe as p
from mmearth.samples import STAND_INS


def blobs(n, seed, classes=4, width=16):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    y = rng.integers(0, classes, n)
    return (centres[y] + rng.normal(size=(n, width))).astype('float32'), np.array([f'c{i}' for i in range(classes)])[y]


def test_features_use_the_contract_not_the_store():
    tiles = np.random.default_rng(0).integers(1, 3000, (5, 3, 16, 16)).astype('uint16')
    tiles[0, :, :8] = 0
    stats = dict(sentinel2_l2a=dict(mean=[1000., 2000.], std=[10., 20.]), sentinel2_l1c=dict(mean=[0., 0.], std=[1., 1.]))
    class Encoder(torch.nn.Module):
        contract, num_features = SimpleNamespace(bands=('B2', 'B4'), stats=stats), 2
        def forward(self, x): return x
    store = SimpleNamespace(stem='s', levels=np.array(['l2a', 'l2a', 'l1c', 'l2a', 'l2a']), bands=lambda name: ('B4', 'B3', 'B2'), read=lambda rows, names: dict(sentinel2=tiles[rows]))
    x = p.features(Encoder(), store, [0, 2, 3], batch=2, progress=False)
    assert x.dtype == np.float32 and x.shape == (3, 2)
    raw = tiles[:, [2, 0]].astype(float)
    np.testing.assert_allclose(x[2], ((raw[3] - [[[1000]], [[2000]]]) / [[[10]], [[20]]]).mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(x[1], raw[2].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(x[0], ((raw[0] - [[[1000]], [[2000]]]) / [[[10]], [[20]]])[:, 8:].sum((1, 2)) / 256, rtol=1e-4)
    assert p.features(Encoder(), store, [], progress=False).shape == (0, 2)


def test_image_statistics_skip_holes():
    tiles = np.full((2, 3, 4, 4), 100, 'uint16')
    tiles[0, 0, 0] = 0
    tiles[1] = 0
    store = SimpleNamespace(bands=lambda name: ('B4', 'B3', 'B2'), read=lambda rows, names: dict(sentinel2=tiles[rows]))
    x = p.image_statistics(store, [0, 1])
    assert x[0].tolist() == [100] * 3 + [0] * 3 + [100] * 6 and not x[1].any()


@pytest.mark.parametrize('seed', range(3))
def test_subsets_are_nested_stratified_and_complete(seed):
    y = np.random.default_rng(seed).choice(5, 997, p=[0.6, 0.3, 0.08, 0.015, 0.005])
    parts = p.nested_subsets(y, (0.5, 0.01, 1, 0.05), seed)
    assert list(parts) == [0.01, 0.05, 0.5, 1]
    for small, large in zip(list(parts), list(parts)[1:]): assert set(parts[small]) <= set(parts[large])
    for fraction, part in parts.items():
        assert set(y[part]) == set(y)
        for c in range(5): assert abs((y[part] == c).sum() - max(1, fraction * (y == c).sum())) <= 1
    assert np.array_equal(parts[1], np.arange(997))
    assert all(np.array_equal(a, b) for a, b in zip(parts.values(), p.nested_subsets(y, (0.5, 0.01, 1, 0.05), seed).values()))


def test_neighbours_agree_with_scikit_learn():
    (x, y), (v, _) = blobs(300, 0), blobs(200, 1)
    ours = p.knn_probe(x, y, v, block=64)
    theirs = KNeighborsClassifier(5, metric='cosine').fit(x, y).predict(v)
    assert (ours == theirs).mean() > 0.93  # ties are broken differently
    assert set(p.knn_probe(x[:3], y[:3], v)) <= set(y[:3])


def test_the_strength_is_the_best_of_the_grid():
    (x, y), (v, w), (t, _) = blobs(120, 0), blobs(200, 1), blobs(50, 2)
    model = p.linear_probe(x, y, v, w)
    mean, std = x.astype(float).mean(0), x.astype(float).std(0)
    alone = {C: LogisticRegression(C=C, tol=1e-6, max_iter=5000).fit((x - mean) / std, y).score((v - mean) / std, w) for C in p.C_GRID}
    assert alone[model.named_steps.logistic.C] >= max(alone.values()) - 0.011
    again = p.linear_probe(x, y, v, w)
    assert np.array_equal(model.predict_proba(t), again.predict_proba(t))


def test_constant_and_unseen_things_do_no_harm():
    (x, y), (v, w) = blobs(100, 0), blobs(50, 1)
    x[:, 3] = v[:, 3] = 7
    w = w.astype('U9')
    w[:5] = 'elsewhere'
    assert np.isfinite(p.linear_probe(x, y, v, w).predict_proba(v)).all()
    rows = p.probe(x, y, v, w, {'images': (v, w)}, fractions=(1.0,))
    assert rows.value.max() <= 0.9 and len(rows) == 4


def test_validation_labels_are_rationed():
    (x, y), (v, w), test = blobs(400, 0), blobs(400, 1), blobs(300, 2)
    kw = dict(fractions=(0.02,), seeds=(0,), protocols=('linear',))
    used = []
    original, p.linear_probe = p.linear_probe, lambda *a, **k: used.append(len(a[3])) or original(*a, **k)
    try:
        p.probe(x, y, v, w, {'images': test}, **kw)
        p.probe(x, y, v, w, {'images': test}, val_fraction=1.0, **kw)
    finally: p.linear_probe = original
    assert used[0] <= 12 and used[1] == 400


def test_rows_are_complete_and_repeatable():
    (x, y), (v, w), test = blobs(400, 0), blobs(200, 1), blobs(300, 2)
    rows = [p.probe(x, y, v, w, {'images': test, 'regions': test}, fractions=(0.05, 1.0), seeds=(3, 4), task='t', run_id='r') for _ in range(2)]
    assert list(rows[0]) == ['task', 'protocol', 'fraction', 'seed', 'split', 'metric', 'value', 'low', 'high', 'run_id', 'n_train', 'n_test', 'C']
    assert rows[0].equals(rows[1]) and len(rows[0]) == 3 * 2 * 2 * 2
    assert rows[0].query('fraction == 1').seed.unique().tolist() == [3]
    assert rows[0].groupby(['protocol', 'fraction']).value.mean()['linear', 1.0] > 0.8


def many(n, seed, classes=7):
    x, _ = blobs(n, seed, width=16)
    return x, x[:, :classes] > np.linspace(0.5, 2.2, classes)


@pytest.mark.parametrize('seed', range(3))
def test_subsets_of_several_classes(seed):
    y = np.random.default_rng(seed).random((3000, 12)) < np.geomspace(0.001, 0.6, 12)
    y[:, 5] = y[:, 10] & (y[:, 2] | y[:, 3])  # comes only with rarer ones
    parts = p.nested_subsets(y, (0.5, 0.01, 1, 0.05), seed)
    assert list(parts) == [0.01, 0.05, 0.5, 1]
    for small, large in zip(list(parts), list(parts)[1:]): assert set(parts[small]) <= set(parts[large])
    for f, i in parts.items():
        assert (y[i].any(0) == y.any(0)).all() and abs(len(i) - 3000 * f) < 20 + 60 * f
        wanted = np.maximum(1, f * y.sum(0))
        assert (np.abs(y[i].sum(0) - wanted) <= 3 + 0.15 * wanted).all(), f
    assert np.array_equal(parts[1], np.arange(3000))
    again = p.nested_subsets(y, (0.5, 0.01, 1, 0.05), seed)
    assert all(np.array_equal(parts[f], again[f]) for f in parts)
    assert not np.array_equal(parts[0.05], p.nested_subsets(y, (0.05,), seed + 9)[0.05])


def test_several_classes_against_scikit_learn():
    from sklearn.metrics import average_precision_score
    from sklearn.multiclass import OneVsRestClassifier
    (x, y), (v, w), (t, _) = many(300, 0), many(200, 1), many(60, 2)
    model = p.linear_probe(x, y, v, w)
    mean, std = x.astype(float).mean(0), x.astype(float).std(0)
    alone = {C: OneVsRestClassifier(LogisticRegression(C=C, tol=1e-7, max_iter=5000)).fit((x - mean) / std, y) for C in p.C_GRID}
    found = {C: average_precision_score(w, m.predict_proba((v - mean) / std), average='micro') for C, m in alone.items()}
    C = model.named_steps.logistic.C
    assert found[C] >= max(found.values()) - 1e-3
    assert np.abs(model.predict_proba(t) - alone[C].predict_proba((t - mean) / std)).max() < 5e-3
    votes = p.knn_probe(x, y, t, k=5)
    near = KNeighborsClassifier(5, metric='cosine').fit(x, y).kneighbors(t, return_distance=False)
    assert np.abs(votes - y[near].mean(1)).max() < 1e-6
    both = p.linear_probe(x, y, v, w, grid=(0.1,), refit=True)
    whole = OneVsRestClassifier(LogisticRegression(C=0.1, tol=1e-7, max_iter=5000)).fit((np.concatenate([x, v]) - mean) / std, np.concatenate([y, w]))
    assert np.abs(both.predict_proba(t) - whole.predict_proba((t - mean) / std)).max() < 5e-3


def test_rows_of_several_classes():
    (x, y), (v, w), test = many(400, 0), many(200, 1), many(150, 2)
    rows = p.probe(x, y, v, w, dict(images=test, regions=(*test, np.arange(150) // 5)), fractions=(0.05, 1.0), seeds=(0, 1), task='t')
    assert set(rows.metric) == {'micro_f1', 'micro_f1_tuned', 'macro_f1', 'map_micro', 'map_macro'} and len(rows) == 3 * 2 * 2 * 5
    wide = (rows.high - rows.low).groupby(rows.split).mean()
    assert rows.value.between(0, 1).all() and (rows.low <= rows.value + 0.02).all() and wide['images'] > 0
    x[3] = np.nan
    with pytest.raises(ValueError, match='1 training images'): p.probe(x, y, v, w, {})
    with pytest.raises(ValueError, match='no class tells'): p.linear_probe(v, w & False, v, w)


def test_two_classes_are_one_logit():
    (x, y), (v, w) = blobs(200, 0, classes=2), blobs(100, 1, classes=2)
    model = p.linear_probe(x, y, v, w)
    assert model.named_steps.logistic.coef_.shape == (1, 16) and set(model.predict(v)) == {'c0', 'c1'}
    mean, std = x.astype(float).mean(0), x.astype(float).std(0)
    alone = LogisticRegression(C=model.named_steps.logistic.C, tol=1e-8, max_iter=5000).fit((x - mean) / std, y)
    assert np.abs(alone.predict_proba((v - mean) / std) - model.predict_proba(v)).max() < 2e-3


class Counting(torch.nn.Module):
    "Counts the images it sees."
    def __init__(self):
        super().__init__()
        stats = dict(sentinel2_l2a=dict(mean=[0., 0.], std=[1., 1.]))
        self.contract, self.seen = SimpleNamespace(bands=('B2', 'B4'), patch=1, stem='none', grn_scope='image', stats=stats), 0
        self.weight = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        self.seen += len(x)
        return x * self.weight


def test_the_cache_knows_what_features_depend_on(tmp_path):
    x = np.random.default_rng(0).integers(1, 3000, (6, 2, 8, 8)).astype('uint16')
    encoder, data = Counting(), p.Planes(x, ('B2', 'B4'))
    def read(**kw): return p.features(encoder, kw.pop('data', data), kw.pop('rows', None), progress=False, cache=tmp_path, **kw)
    first = read()
    assert encoder.seen == 6 and np.array_equal(read(), first) and encoder.seen == 6
    read(rows=[1, 2]); assert encoder.seen == 8
    read(size=4); assert encoder.seen == 14
    changed = x.copy(); changed[0, 0, 0, 0] += 1
    read(data=p.Planes(changed, ('B2', 'B4'))); assert encoder.seen == 20
    turned = read(data=p.Planes(x, ('B4', 'B2'))); assert encoder.seen == 26 and np.allclose(turned, first[:, ::-1])
    encoder.weight.data += 1
    assert np.allclose(read(), 2 * first, rtol=1e-5) and encoder.seen == 32
    encoder.contract.stats['sentinel2_l2a']['mean'] = [1., 1.]
    read(); assert encoder.seen == 38


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'other', 'nan', 'no key'])
def test_a_broken_cache_is_built_again(tmp_path, damage):
    encoder, data = Counting(), p.Planes(np.ones((6, 2, 8, 8), 'uint16'), ('B2', 'B4'))
    first = p.features(encoder, data, progress=False, cache=tmp_path)
    file, = tmp_path.iterdir()
    if damage == 'truncated': file.write_bytes(file.read_bytes()[:-30])
    elif damage == 'empty': file.write_bytes(b'')
    elif damage == 'other': np.savez(open(file, 'wb'), x=first + 1, key='another')
    elif damage == 'nan':
        key = str(np.load(file)['key'])
        np.savez(open(file, 'wb'), x=first * np.nan, key=key)
    else: np.savez(open(file, 'wb'), x=first)
    with pytest.warns(UserWarning, match='comput'): again = p.features(encoder, data, progress=False, cache=tmp_path)
    assert np.array_equal(again, first) and encoder.seen == 12
    p.features(encoder, data, progress=False, cache=tmp_path)
    assert encoder.seen == 12 and len(list(tmp_path.iterdir())) == 1


def test_planes():
    x = np.random.default_rng(0).random((4, 3, 8, 8)).astype('float32')
    data = p.Planes(x, ('B2', 'B4', 'B8A'), level=['l2a', 'l1c', 'l2a', 'l2a'], unit='reflectance')
    assert np.allclose(data.read([2])['sentinel2'], 10_000 * x[[2]]) and data.levels.tolist()[1] == 'l1c' and len(data) == 4
    wide = data.arrange(('B9', 'B4', 'B2'), STAND_INS)
    assert np.allclose(wide.read([0])['sentinel2'], 10_000 * x[[0]][:, [2, 1, 0]]) and wide.bands() == ('B9', 'B4', 'B2')
    assert np.allclose(wide.arrange(('B2', 'B9')).read([0])['sentinel2'], 10_000 * x[[0]][:, [0, 2]])
    with pytest.raises(KeyError, match='B9'): data.arrange(('B9',))
    with pytest.raises(KeyError, match='B11'): data.arrange(('B11',), STAND_INS)
    other = p.Planes(x, ('B2', 'B4', 'B8')).arrange(('B8A', 'B9', 'B1'), STAND_INS)  # neither B8A nor B9: what is nearest
    assert np.array_equal(other.read([0])['sentinel2'], x[[0]][:, [2, 2, 0]])
    with pytest.raises(ValueError, match='unit must be'): p.Planes(x, ('B2', 'B4', 'B8A'), unit='percent')


@pytest.mark.parametrize('several', [False, True])
def test_the_rough_search_chooses_what_an_exact_one_would(several):
    "The strength, and with scikit-learn's Newton solver at that strength the coefficients."
    from sklearn.metrics import average_precision_score
    from sklearn.preprocessing import StandardScaler

    from mmearth.logistic import regressions
    def solutions(x, y, v, w, **how):
        z = {C: v @ weight.T + intercept for C, weight, intercept, _ in regressions(x, y, p.C_GRID, **how)}
        return {C: average_precision_score(w, a, average='micro') if several else (a.argmax(1) == w).mean() for C, a in z.items()}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        raw = rng.gamma(1, 1, (1500, 40)) @ (rng.normal(size=(40, 40)) / np.arange(1, 41))
        s = 0.4 * StandardScaler().fit_transform(raw) @ rng.normal(size=(40, 6)) + rng.gumbel(size=(1500, 6))
        y = s > np.quantile(s, 0.8) if several else s.argmax(1)
        (x, v), (y, w) = np.split(raw, [1000]), np.split(y, [1000])
        model = p.linear_probe(x, y, v, w).named_steps
        scaled = model.scale.transform(x)
        rough, same, best = (solutions(scaled, y, model.scale.transform(v), w, **how) for how in (dict(tol=1e-6, dtype=torch.float32), dict(tol=1e-6), dict(tol=1e-12)))
        assert rough == pytest.approx(same, abs=1e-4 if several else 2.1e-3)  # an answer on the edge, of 500, may tip
        assert best[C := model.logistic.C] >= max(best.values()) - (1e-4 if several else 4.1e-3)
        newton = dict(C=C, solver='newton-cholesky', tol=1e-12, max_iter=200)
        ours, theirs = ([e.coef_ for e in model.logistic.estimators_], [LogisticRegression(**newton).fit(scaled, t).coef_ for t in y.T]) if several else ([model.logistic.coef_], [LogisticRegression(**newton).fit(scaled, y).coef_])
        for a, b in zip(ours, theirs): assert np.linalg.norm(a - b) < 2e-4 * np.linalg.norm(b)


def test_rows_do_not_depend_on_the_number_of_threads():
    (x, y), (v, w), test = many(300, 0), many(200, 1), many(100, 2)
    kw = dict(fractions=(0.1, 1.0), seeds=(0, 1, 2))
    before, frames = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            frames.append(p.probe(x, y, v, w, {'images': test}, **kw))
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    pd.testing.assert_frame_equal(*frames)
    assert frames[0].seed.tolist() == sorted(frames[0].seed) and len(frames[0]) == 4 * 2 * 5


def test_jobs_side_by_side_keep_their_order_and_their_errors():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert p.side_by_side([lambda i=i: (i, torch.get_num_threads()) for i in range(9)], 1) == [(i, 1) for i in range(9)]
        assert p.side_by_side([torch.get_num_threads] * 3, 3 * 2**30) == [2] * 3  # no room for two
        with pytest.raises(ZeroDivisionError): p.side_by_side([lambda: 1, lambda: 1 / 0], 1)
        assert torch.get_num_threads() == 2 and p.side_by_side([], 1) == []
    finally: torch.set_num_threads(before)
