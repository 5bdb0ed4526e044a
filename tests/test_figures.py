"Figures draw whatever a run holds, holes included."
import json
from contextlib import chdir

import numpy as np
import pandas as pd
import pytest

from mmearth import figures as f
from mmearth.modalities import TASKS


def titles(fig): return [a.get_title() for a in fig.axes]


def pictures(fig): return [a.images[0].get_array() if a.images else None for a in fig.axes]


def test_reconstructions_need_only_arrays():
    rng, shape = np.random.default_rng(0), (16, 16)
    mask = rng.random(shape) < 0.5
    true = dict(sentinel2=rng.uniform(0, 3000, (3, *shape)), aster=np.where(rng.random((2, *shape)) < 0.1, np.nan, 300), dynamic_world=rng.integers(-1, 9, shape), biome=3)
    fig = f.reconstructions(true, {k: v for k, v in true.items()}, mask, dict(sentinel2=('B4', 'B3', 'B2')))
    assert [t.split('\n')[0] for t in titles(fig) if t] == ['S2, true colour', 'Elevation', 'Dynamic World']
    visible, predicted, original = (np.array(pictures(fig)[i]) for i in (0, 3, 6))
    np.testing.assert_array_equal(predicted, original)  # a perfect prediction, put together, is the original
    assert (visible[mask] == [0, 0, 0, 1]).all()
    np.testing.assert_array_equal(visible[~mask], original[~mask])


def test_what_is_predicted_for_visible_patches_is_never_drawn():
    rng, mask = np.random.default_rng(0), np.zeros((8, 8), bool)
    mask[:, 4:] = True
    true, guess = rng.uniform(500, 2500, (3, 8, 8)), np.full((3, 8, 8), 1500.)
    bands = dict(sentinel2=('B4', 'B3', 'B2'))
    one, two = (pictures(f.reconstructions(dict(sentinel2=true), dict(sentinel2=np.where(mask, guess, v)), mask, bands))[1] for v in (0, 9e4))
    np.testing.assert_array_equal(one, two)


def test_a_dark_tile_is_drawn_on_its_own_scale():
    dark = np.random.default_rng(0).uniform(300, 900, (3, 32, 32))
    fig = f.reconstructions(dict(sentinel2=dark), dict(sentinel2=dark), np.zeros((32, 32), bool), dict(sentinel2=('B4', 'B3', 'B2')))
    high = np.percentile(dark, 99)
    np.testing.assert_allclose(pictures(fig)[2][..., :3], np.moveaxis(np.clip(dark / high, 0, 1), 0, -1), atol=1e-6)
    assert fig.axes[0].get_ylabel().endswith('reflectance 0 to 0.09')


def test_a_task_without_measurements_shows_no_prediction():
    holes = dict(sentinel2=np.full((3, 8, 8), 900.), canopy_height_eth=np.full((2, 8, 8), np.nan), esa_worldcover=np.full((8, 8), -1))
    guess = {k: np.nan_to_num(v).clip(0) for k, v in holes.items()}
    fig = f.reconstructions(holes, guess, np.ones((8, 8), bool), dict(sentinel2=('B4', 'B3', 'B2')))
    assert [p is None for p in pictures(fig)] == [False, True, True] * 3
    assert sum(t.get_text() == 'not measured' for a in fig.axes for t in a.texts) == 6


@pytest.mark.parametrize('tasks', [('sentinel2',), ('lat', 'lon', 'slope'), TASKS])
def test_losses_of_any_set_of_tasks(tasks):
    log = pd.DataFrame({'step': [1, 2], 'samples': [4, 8], 'lr': 1e-3, 'loss': [3., 2.], **{t: [1., np.nan] for t in tasks}, **{f's_{t}': [0., 0.1] for t in tasks}, 'seconds': 1.})
    drawn = [t for t in titles(f.losses(log)) if t]
    assert drawn == [f.plain(t) for t in TASKS if t in tasks] + [f.plain(t) for t in tasks if t not in TASKS] + ['Total', 'Log-variances s']
    unweighted = f.losses(log[[c for c in log if not c.startswith('s_')]])
    assert titles(unweighted) == drawn[:-1] and unweighted.axes[-1].get_ylabel() == 'sum'


def test_a_short_interval_is_averaged_with_its_neighbour():
    step = np.array([1, 10, 20, 30, 40, 50, 52])
    log = pd.DataFrame(dict(step=step, loss=np.arange(7.), lat=[9, 1, 1, 1, 1, 2, 12], biome=[9, np.nan, 3, 3, 3, 3, np.nan], s_lat=0.1 * step))
    fig = f.losses(log)
    lat, biome = (a.lines[0] for a in fig.axes[:2])
    assert lat.get_xdata().tolist() == [10, 20, 30, 40, 52]
    np.testing.assert_allclose(lat.get_ydata(), [(9 * 1 + 1 * 9) / 10, 1, 1, 1, (2 * 10 + 12 * 2) / 12])
    np.testing.assert_allclose(biome.get_ydata(), [9, 3, 3, 3, 3])  # what is missing has no weight
    s = fig.axes[-1].lines[0]
    assert s.get_xdata().tolist() == step.tolist()  # log-variances are values, not means
    even = f.losses(log.iloc[:6].assign(step=[10, 20, 30, 40, 50, 57])).axes[0].lines[0]
    assert even.get_xdata().tolist() == [10, 20, 30, 40, 50, 57]  # longer than half the others: left alone
    assert f.losses(log.iloc[:3]).axes[0].lines[0].get_xdata().tolist() == [1, 10, 20]  # too few lines to tell


def test_log_variances_are_named_apart_and_tasks_never_measured_left_out():
    log = pd.DataFrame({'step': range(10, 70, 10), 'loss': 1., **{t: np.nan if t == 'era5' else 1. for t in TASKS}, **{f's_{t}': 0.001 * i for i, t in enumerate(TASKS)}})
    fig = f.losses(log)
    fig.canvas.draw()
    texts = fig.axes[-1].texts
    assert [t.get_text() for t in texts] == [f.plain(t) for t in TASKS if t != 'era5']
    boxes = [t.get_window_extent() for t in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [t.get_text() for t in fig.axes[list(TASKS).index('era5')].texts] == ['not measured']


def rows(arms=('random', 'all'), **more):
    return pd.DataFrame([dict(arm=a, protocol='linear', fraction=x, seed=s, split=p, metric='accuracy', value=v, low=v - 0.01, high=v + 0.01, run_id=f'{a}-{r}') | more
                         for a in arms for x in (0.05, 1.0) for s in range(2) for p in ('val', 'test_region') for r in range(2) for v in [0.5 + 0.01 * s + 0.02 * r]])


def test_label_efficiency_draws_any_arms_and_quoted_numbers():
    quoted = pd.DataFrame([dict(arm='all', split='test_region', fraction=0.05, value=0.37), dict(arm='all', split='test_region', fraction=1.0, value=0.737)])
    fig = f.label_efficiency(rows(('all', 'mystery')), quoted=quoted)
    labels = [t.get_text() for t in fig.legends[0].get_texts()]
    assert len(fig.axes) == 1 and labels == ['all', 'all, quoted', 'mystery']
    with pytest.raises(ValueError, match='no rows for knn'): f.label_efficiency(rows(), 'knn')


def test_figures_and_tables_repeat_to_the_byte(tmp_path):
    (tmp_path / 'data_manifest').mkdir()
    with chdir(tmp_path):
        first = {}
        for _ in range(2):
            png = f.save_figure('a', f.label_efficiency(rows()), rows().run_id, 'runs/report')
            csv = f.write_table('t', f.comparison_table(rows()))
            found = {p.name: p.read_bytes() for p in (*png.parent.iterdir(), *csv.parent.iterdir())}
            assert not first or found == first
            first = found
    assert set(first) == {'a.png', 'a.json', 't.csv', 't.md'}
    side = json.loads(first['a.json'])
    assert side == dict(maker='runs/report', run_ids=['all-0', 'all-1', 'random-0', 'random-1'], commit='unknown')


def test_unknown_arms_get_different_colours():
    colours = f.arm_colours([f'arm {i}' for i in range(5)] + ['all'])
    assert len(set(colours.values())) == 6 and colours['all'] == '#F98E09'
    assert len(set(f.arm_marks(colours).values())) == 6
