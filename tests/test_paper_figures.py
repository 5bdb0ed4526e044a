"The paper's figures draw what they are given, say what is missing, and refuse what cannot be drawn."
import json

import numpy as np
import pandas as pd
import pytest

from mmearth import paper_figures as f
from mmearth.atlas import paper_months
from mmearth.modalities import TASKS, modality
from mmearth.named import repo_root
from mmearth.tables import GRIDS, paper_numbers


@pytest.fixture(scope='module')
def numbers(): return paper_numbers()


def rows(task='m-eurosat', protocol='linear-paper', fractions=(0.01, 1.0), which=2, value=0.7, metric='accuracy'):
    return pd.DataFrame([GRIDS['efficiency'][1][which] | dict(epochs=200., group='mine', task=task, protocol=protocol + '-few' * (x < 1 and protocol == 'linear-paper'), fraction=x, seed=0, split='test', metric=metric, value=value + 0.01 * s, low=value - 0.02, high=value + 0.03, run_id=f'mine-s{s}', pretrain_seed=s, n_test=1000)
                         for x in fractions for s in range(3)])


def lines_of(ax): return [(line.get_linestyle(), line.get_markerfacecolor(), line.get_ydata()) for line in ax.lines]


def test_label_efficiency_draws_the_paper_hollow_and_ours_solid(numbers):
    drawn = f.efficiency_figure(rows(), numbers)
    titles = [ax.get_title() for ax in drawn.fig.axes]
    assert titles == ['BigEarthNet20k', 'EuroSat2k', 'So2Sat20k']
    euro = lines_of(drawn.fig.axes[1])
    assert [fc for _, fc, _ in euro].count('white') == 3 and len(euro) == 4
    assert [e for ls, fc, e in euro if fc == 'white'][1].tolist() == [34.0, 37.0, 67.5, 73.7]
    mine = [e for ls, fc, e in euro if fc != 'white'][0]
    np.testing.assert_allclose(mine, [71, 71])
    gaps = [any('not available' in t.get_text() for t in ax.texts) for ax in drawn.fig.axes]
    assert gaps == [True, False, True]
    ours = drawn.numbers[drawn.numbers.whose == 'mine']
    assert ours.low.notna().all() and ours.known_from.iloc[0] == 'mine-s0 mine-s1 mine-s2'


def test_another_protocol_never_enters_label_efficiency(numbers):
    assert set(f.efficiency_figure(rows(protocol='linear'), numbers).numbers.whose) == {'paper'}
    assert f.efficiency_figure(rows().assign(protocol='linear-paper'), numbers).numbers.query("whose == 'mine'").fraction.tolist() == [1.0]  # the paper had another recipe for few labels
    assert set(f.efficiency_figure(rows(metric='macro_f1'), numbers).numbers.whose) == {'paper'}


def test_the_gap_calls_runs_by_what_they_are(numbers):
    from mmearth.tables import FLOOR_SETTINGS
    mine = rows(task='eurosat-rgb', which=2).assign(pretrain='EuroSAT RGB', targets='1 pixel and 7 image tasks', group='eurosat-all')
    floor = rows(task='eurosat-rgb', protocol='knn').assign(**FLOOR_SETTINGS['random_filters'], group='eurosat-protocols random_filters', run_id='eurosat-protocols')
    drawn = f.protocol_gap(pd.concat([mine, floor], ignore_index=True), numbers)
    labels = [t.get_text() for t in drawn.fig.axes[0].get_yticklabels()]
    assert set(labels[-2:]) == {'EuroSAT RGB, 1 pixel and 7 image tasks', 'random filters'} and 'EuroSAT RGB, accuracy' in [t.get_text() for t in drawn.fig.axes[0].texts]
    assert not any('eurosat-' in x for x in labels) and set(drawn.numbers.whose) >= {'eurosat-all'}


def test_the_legend_shows_what_is_drawn(numbers):
    said = [[t.get_text() for t in f.efficiency_figure(r, numbers).fig.legends[0].get_texts()] for r in (rows(), rows()[:0])]
    assert said[0] == [*said[1], 'ours, 95 % interval'] and said[1][-1] == 'paper, digitised'


def test_the_gap_holds_every_reader_and_nothing_else(numbers):
    frame = pd.concat([rows(protocol=p, value=v) for p, v in (('linear-paper', 0.7), ('linear', 0.9), ('knn', 0.8), ('finetune', 0.95))])
    table = f.protocol_gap(frame, numbers).numbers
    mine = table[table.whose == 'mine'].set_index('reader').value
    assert mine.round(6).to_dict() == {'linear-paper': 71.0, 'linear': 91.0, 'knn': 81.0}
    assert table[table.whose == 'paper'].set_index(['task', 'arm']).value[('m-eurosat', 'MMEarth64')] == 73.7
    assert len(f.protocol_gap(rows(task='scenes', protocol='linear'), numbers).numbers.query("whose == 'mine'")) == 0  # no probe of the paper to be far from


# ---- reconstructions ----

def arrays(side=16, classes=9):
    rng = np.random.default_rng(0)
    mask = rng.random((side, side)) < 0.6
    true = dict(sentinel2=rng.uniform(100, 2500, (12, side, side)), sentinel1=rng.uniform(-30, 0, (8, side, side)), aster=np.zeros((2, side, side)), canopy_height_eth=np.full((2, side, side), np.nan),
                dynamic_world=rng.integers(-1, classes, (side, side)), esa_worldcover=rng.integers(0, 11, (side, side)), biome=3)
    return true, {k: v if np.ndim(v) < 2 else v + (0 if v.ndim == 2 else 1) for k, v in true.items()}, mask


def test_kept_arrays_are_those_drawn_and_repeat(tmp_path):
    true, guess, mask = arrays()
    path = f.keep_reconstruction(tmp_path, true, guess, mask)
    first = path.read_bytes()
    found = f.read_reconstruction(tmp_path)
    names = modality('sentinel2').train_bands
    np.testing.assert_array_equal(found['sentinel2.original'], true['sentinel2'][[names.index(b) for b in ('B4', 'B3', 'B2')]].astype(np.float16))
    assert found['dynamic_world.original'].dtype == np.int8 and found['aster.original'].shape == (1, 16, 16) and found['sentinel1.original'].shape == (2, 16, 16)
    assert f.keep_reconstruction(tmp_path, true, guess, mask).read_bytes() == first
    numbers = f.reconstruction_figure(tmp_path).numbers.set_index('task')
    assert numbers.loc['sentinel1', 'value'] == pytest.approx(1, abs=0.02) and numbers.loc['dynamic_world', 'value'] == 1
    assert numbers.loc['dynamic_world', 'pixels'] == (mask & (true['dynamic_world'] >= 0)).sum() and np.isnan(numbers.loc['canopy_height_eth', 'value'])


def test_pictures_are_put_together_from_their_parts(tmp_path):
    f.keep_reconstruction(tmp_path, *arrays())
    _, _, mask = arrays()
    axes = np.array(f.reconstruction_figure(tmp_path).fig.axes).reshape(4, 5)
    masked, predicted, joined, original = (ax.images[0].get_array() for ax in axes[:, 0])
    assert (predicted[~mask][:, :3] > 0.69).all()  # never taught, drawn pale
    assert (masked[mask][:, :3] == 0).all()
    np.testing.assert_array_equal(joined[mask], predicted[mask])
    np.testing.assert_array_equal(joined[~mask], original[~mask])
    assert not any(ax.images for ax in axes[:, 1]) and axes[0, 1].texts[0].get_text() == 'not measured'  # canopy height: nothing was measured, nothing is shown


def test_kept_arrays_go_back_into_the_other_figure(tmp_path):
    true, guess, mask = arrays()
    f.keep_reconstruction(tmp_path, true, guess, mask)
    originals, predictions, found, bands = f.kept_views(tmp_path)
    assert set(originals) == set(predictions) == set(f.COLUMNS) | {'aster'} and bands['sentinel1'] == ('asc_VV', 'asc_VH')
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(predictions['sentinel1'], guess['sentinel1'][[modality('sentinel1').train_bands.index(b) for b in bands['sentinel1']]].astype(np.float16).astype(np.float32))
    arrays_ = dict(np.load(tmp_path / 'reconstructions.npz'))  # as older runs kept them: VH alone
    np.savez(tmp_path / 'reconstructions.npz', **{k: v[-1:] if k.startswith('sentinel1') else v for k, v in arrays_.items() if not k.startswith('aster')})
    assert f.kept_views(tmp_path)[3]['sentinel1'] == ('asc_VH',) and f.reconstruction_figure(tmp_path).numbers.task.tolist() == list(f.COLUMNS)


def test_other_bands_of_the_image(tmp_path):
    true, guess, mask = arrays()
    f.keep_reconstruction(tmp_path, dict(sentinel2=true['sentinel2'][:3]), dict(sentinel2=guess['sentinel2'][:3]), mask, dict(sentinel2=('B4', 'B3', 'B2')))
    assert f.reconstruction_figure(tmp_path).numbers.task.tolist() == ['sentinel2']


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(KeyError, match='no prediction of dynamic_world; give one for every original'): f.keep_reconstruction(tmp_path, dict(dynamic_world=np.zeros((8, 8), int)), {}, np.ones((8, 8), bool))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match='it is kept by runs/pretrain'): f.reconstruction_figure(tmp_path)
    path = f.keep_reconstruction(tmp_path, *arrays())
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b'', b'not a zip'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='reconstructions.npz cannot be read'): f.reconstruction_figure(tmp_path)
    np.savez(path, **{'mask': np.zeros((4, 4), bool), 'sentinel2.original': np.zeros((3, 5, 5))})
    with pytest.raises(ValueError, match=r'sentinel2.original: shape \(3, 5, 5\) does not fit'): f.reconstruction_figure(tmp_path)
    np.savez(path, mask=np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match='holds none of sentinel2'): f.reconstruction_figure(tmp_path)


# ---- the network and the data ----

def test_the_network_has_the_outputs_of_the_code():
    drawn = f.architecture()
    texts = {t.get_text() for t in drawn.fig.axes[0].texts}
    assert set(drawn.numbers.task) == set(TASKS) and {'846 classes', '14 classes', '8 bands', '9 classes', '11 classes'} <= texts
    assert drawn.numbers.groupby('level').size().to_dict() == {'image': 6, 'pixel': 6}


def test_months_stand_beside_those_of_the_paper():
    report = json.loads((repo_root() / 'reports/runs/dataset-synthetic/inspect.json').read_text())
    drawn = f.temporal_figure(report)
    top, bottom = ([bar.get_height() for bar in ax.patches] for ax in drawn.fig.axes)
    assert bottom == paper_months().tolist() and sum(top) == sum(sum(m.values()) for m in report['months'].values()) == drawn.numbers.ours.sum()


def test_dataset_figures_leave_out_what_was_not_measured():
    mini = json.loads((repo_root() / 'reports/runs/dataset-mini/inspect.json').read_text())
    found = f.dataset_figures(mini)
    assert 'temperature' not in found and {'months', 'classes', 'elevation', 'holes'} <= set(found)
    assert found['classes'].numbers['count'].sum() == sum(sum(mini['classes'][n].values()) for n in ('dynamic_world', 'esa_worldcover'))
    assert found['elevation'].numbers[found['elevation'].numbers.what == 'aster/elevation']['count'].sum() == sum(mini['histograms']['aster/elevation']['counts'])


def test_figures_overlap_nowhere(numbers):
    "No text of the network's picture, and no tick label of the gap, lies over another."
    for fig in (f.architecture().fig, f.protocol_gap(rows(), numbers).fig):
        fig.canvas.draw()
        boxes = [t.get_window_extent() for ax in fig.axes for t in (*ax.texts, *ax.get_yticklabels()) if t.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
