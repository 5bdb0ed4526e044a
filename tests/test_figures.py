"Figures draw whatever a run holds, holes included."
import json
from contextlib import chdir

import numpy as np
import pandas as pd
import pytest

from mmearth import figures as f
from mmearth.modalities import TASKS


def titles(fig): return [a.get_title() for a in fig.axes]


def test_reconstructions_need_only_arrays():
    rng, shape = np.random.default_rng(0), (16, 16)
    true = dict(sentinel2=rng.uniform(0, 3000, (3, *shape)), aster=np.where(rng.random((2, *shape)) < 0.1, np.nan, 300), dynamic_world=rng.integers(-1, 9, shape), biome=3)
    fig = f.reconstructions(true, {k: v for k, v in true.items()}, rng.random(shape) < 0.5, dict(sentinel2=('B4', 'B3', 'B2')))
    assert [t for t in titles(fig) if t] == ['S2, true colour', 'Elevation', 'Dynamic World']
    pictures = [a.images[0].get_array() for a in fig.axes]
    np.testing.assert_array_equal(pictures[6], pictures[9])  # a perfect prediction, put together, is the original


@pytest.mark.parametrize('tasks', [('sentinel2',), ('lat', 'lon', 'slope'), TASKS])
def test_losses_of_any_set_of_tasks(tasks):
    log = pd.DataFrame({'step': [1, 2], 'samples': [4, 8], 'lr': 1e-3, 'loss': [3., 2.], **{t: [1., np.nan] for t in tasks}, **{f's_{t}': [0., 0.1] for t in tasks}, 'seconds': 1.})
    drawn = [t for t in titles(f.losses(log)) if t]
    assert drawn == [t for t in TASKS if t in tasks] + [t for t in tasks if t not in TASKS] + ['total', 'log-variance']
    plain = log[[c for c in log if not c.startswith('s_') or c == 's_']]
    if set(tasks) <= set(TASKS): assert 'log-variance' not in titles(f.losses(plain.drop(columns=[c for c in plain if c.startswith('s_')])))


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
