"Batched regressions against scikit-learn's own."
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from mmearth import logistic as l


def problem(n=400, width=30, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.gamma(1, 1, (n, width)) @ (rng.normal(size=(width, width)) / np.arange(1, width + 1))
    x = (x - x.mean(0)) / x.std(0)
    return x, x @ rng.normal(size=(width, 6)) * 0.4 + rng.gumbel(size=(n, 6))


def objective(C, model, x, y):
    p = model.predict_proba(x)
    loss = -np.log(p[np.arange(len(y)), y]).sum()
    return C * loss + (model.coef_ ** 2).sum() / 2


@pytest.mark.parametrize('n, width', [(400, 30), (25, 60)])
def test_softmax(n, width):
    x, s = problem(n, width)
    y = s.argmax(1)
    y = np.unique(y, return_inverse=True)[1]
    for C, weight, intercept, _ in l.regressions(x, y, (10, 1e-3, 1), tol=1e-9):
        ours, theirs = l.as_sklearn(C, np.unique(y), weight, intercept), LogisticRegression(C=C, tol=1e-9, max_iter=5000).fit(x, y)
        assert objective(C, ours, x, y) <= objective(C, theirs, x, y) * (1 + 1e-6)
        assert np.abs(ours.predict_proba(x) - theirs.predict_proba(x)).max() < 1e-3
        assert np.array_equal(ours.predict(x), theirs.predict(x))
    for C, weight, intercept, _ in l.regressions(x, y, (1e-3, 1)):
        assert objective(C, l.as_sklearn(C, np.unique(y), weight, intercept), x, y) <= objective(C, LogisticRegression(C=C, tol=1e-9, max_iter=5000).fit(x, y), x, y) * (1 + 1e-5)


def test_each_class_and_classes_that_are_constant():
    x, s = problem()
    y = np.column_stack([s > 1, np.zeros(400, bool), np.ones(400, bool), np.arange(400) == 7])
    theirs = OneVsRestClassifier(LogisticRegression(C=0.1, tol=1e-9, max_iter=5000)).fit(x, y[:, [0, 1, 2, 3, 4, 5, 8]])
    (C, weight, intercept, _), = l.regressions(x, y, (0.1,))
    ours = l.as_sklearn(C, y.shape[1], weight, intercept)
    assert np.abs(ours.predict_proba(x)[:, [0, 1, 2, 3, 4, 5, 8]] - theirs.predict_proba(x)).max() < 2e-3
    assert not ours.predict(x)[:, 6].any() and ours.predict(x)[:, 7].all() and np.isfinite(ours.predict_proba(x)).all()
    assert ours.predict(x).shape == (400, 9) and ours.C == 0.1


def test_directions_without_spread_and_separable_classes():
    x, s = problem(40, 8)
    x = np.column_stack([x, x[:, :3], np.zeros(40)])
    y = (s[:, 0] > 0).astype(int)
    x[:, 0] += 50 * y
    for C, weight, intercept, iterations in l.regressions(x, y[:, None] == 1, l_grid := (1e-3, 1, 1e4)):
        model = l.as_sklearn(C, [0, 1], weight, intercept)
        assert np.isfinite(weight).all() and weight[0, -1] == 0 and iterations < 1000
    assert model.score(x, y) == 1 and len(l_grid) == 3


def test_holes_are_refused():
    x, s = problem()
    x[3, 4] = np.inf
    with pytest.raises(ValueError, match='1 of 400 images'): next(l.regressions(x, s.argmax(1), (1,)))
