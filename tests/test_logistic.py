"Batched regressions against scikit-learn's own."
import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize('C', [1e-2, 1])
def test_coefficients_are_those_of_the_optimum(C):
    "Newton's method needs no tolerance to speak of; the loss alone would not show directions that hardly change it."
    x, s = problem(2000, 40)
    y, many = s.argmax(1), s > np.quantile(s, [0.3, 0.5, 0.7, 0.9, 0.95, 0.98], axis=0).diagonal()
    (_, weight, intercept, _), = l.regressions(x, y, (C,))
    best = LogisticRegression(C=C, solver='newton-cholesky', tol=1e-12, max_iter=200).fit(x, y)
    assert np.linalg.norm(weight - best.coef_) < 2e-4 * np.linalg.norm(best.coef_)
    assert np.abs(weight.sum(0)).max() < 1e-10  # nothing in the direction that no answer sees
    (_, weight, intercept, _), = l.regressions(x, many, (C,))
    for k in range(6):
        best = LogisticRegression(C=C, solver='newton-cholesky', tol=1e-12, max_iter=200).fit(x, many[:, k])
        assert np.linalg.norm(weight[k] - best.coef_) < 2e-4 * np.linalg.norm(best.coef_) and abs(intercept[k] - best.intercept_[0]) < 1e-3


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('n', [40, 3000])
def test_a_search_in_float32_is_as_close_as_one_in_float64(several, n):
    "The weakest penalty on 40 images, which any line tells apart, is where rounding would show."
    x, s = problem(n, 60)
    y = s > 1 if several else np.unique(s.argmax(1), return_inverse=True)[1]
    exact, rough = (list(l.regressions(x, y, (1e-4, 1e-2, 1, 100), tol=1e-6, dtype=d)) for d in (torch.float64, torch.float32))
    for (C, weight, intercept, _), (_, a, b, iterations) in zip(exact, rough):
        classes = y.shape[1] if several else np.unique(y)
        p, q = (l.as_sklearn(C, classes, *m).predict_proba(x) for m in ((weight, intercept), (a, b)))
        assert iterations < 1000 and np.abs(p - q).max() < 0.02 and ((p > 0.5) == (q > 0.5)).mean() > 0.998


def test_a_tolerance_that_float32_cannot_tell_is_refused():
    x, s = problem()
    with pytest.raises(ValueError, match='use float64'): next(l.regressions(x, s.argmax(1), (1,), tol=1e-8, dtype=torch.float32))


def test_nearly_certain_answers_keep_their_digits():
    z = torch.tensor([[[30., -30., 12., -4.]]])
    y = torch.tensor([[[1., -1., 1., 1.]]])
    loss, change = l.losses(z, y)
    exact, exact_change = l.losses(z.double(), y.double())
    assert abs(loss - exact) < 1e-6 * exact and torch.allclose(change.double(), exact_change, rtol=1e-5, atol=0)
    assert torch.allclose(l.losses(z[..., :1], y[..., :1])[0].double(), torch.tensor(9.357623e-14).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('several', [False, True])
def test_the_derivative_is_that_of_the_loss(several):
    torch.manual_seed(0)
    z = torch.randn(3 if several else 1, 1 if several else 4, 7, dtype=torch.double, requires_grad=True)
    y = torch.randn(3, 1, 7).sign().double() if several else torch.randint(0, 4, (1, 1, 7))
    loss, change = l.losses(z, y)
    assert torch.allclose(torch.autograd.grad(l.losses(z.clone(), y)[0].sum(), z)[0], change.detach()) if several else torch.allclose(torch.autograd.grad(torch.nn.functional.cross_entropy(z, y[:, 0], reduction='sum'), z)[0], change.detach())


def test_images_of_more_than_one_chunk_count_alike():
    x, s = problem(5000, 12)
    z = torch.cat([torch.tensor(x), torch.ones(5000, 1)], 1).double()
    y, w, penalty = torch.tensor(s.argmax(1))[None, None], torch.randn(1, 6, 13).double(), torch.rand(13).double()
    whole, parts = (l._objective(z, y, penalty, w, chunk) for chunk in (5000, 999))
    assert torch.allclose(whole[0], parts[0]) and torch.allclose(whole[1], parts[1])
    spread = l._spread(z, w, 999)[0]
    p = (w[0] @ z.T).softmax(0).numpy()
    assert np.allclose(spread, np.diag(p.mean(1)) - p @ p.T / 5000)
