"Frozen features and their readers: edge cases that the lessons of 31_probe leave out."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mmearth import probe as p


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


def test_intervals():
    assert p.bootstrap(np.ones(50)) == (1, 1) and p.bootstrap(np.zeros(50)) == (0, 0)
    low, high = p.bootstrap(np.arange(400) < 300)
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert abs(low - (0.75 - spread)) < 0.01 and abs(high - (0.75 + spread)) < 0.01
    table = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert p.macro_f1(table) == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert np.array_equal(p.confusion(list('aaaabb'), list('aaabbb'), 'abc'), table)


def test_validation_labels_are_rationed():
    (x, y), (v, w), test = blobs(400, 0), blobs(400, 1), blobs(300, 2)
    kw = dict(fractions=(0.02,), seeds=(0,), protocols=('linear',))
    used = []
    original, p.linear_probe = p.linear_probe, lambda *a: used.append(len(a[3])) or original(*a)
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
