"""The benchmark against its parts called directly; killed tables, published shares, rows that fit torchgeo-bench."""
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mmearth.baselines import RGB, untrained
from mmearth.benchmark import Benched, COLUMNS, METHODS, TORCHGEO, append_rows, as_columns, as_rows, benchmark, cell_rows, open_encoder, open_labelled, open_task, planes, read_table
from mmearth.convnext import ConvNeXtV2
from mmearth.geobench import GeoBench
from mmearth.named import repo_root
from mmearth.probe import features, image_statistics, probe, weights_hash
from mmearth.report import check, declared
from mmearth.standin import FRACTIONS, write_standin
from mmearth.weights import WeightsError

RUNS = repo_root() / 'nbs' / 'runs'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('standin')
    write_standin(root, 160, tasks=('standin-scene', 'standin-climate', 'standin-covers', 'standin-land'))
    return root


@pytest.fixture(scope='module')
def scene(root): return open_task(GeoBench(root, 'standin-scene'))


def test_weights_of_photographs_by_name(scene, tmp_path):
    torch.manual_seed(0)
    weights = ConvNeXtV2('pico-test', RGB, 32, 'original').state_dict()
    save_file(weights, tmp_path / 'photographs.safetensors')
    first = planes(scene.parts['train'], None)
    encoder = open_encoder('imagenet-pico-test:photographs.safetensors', first, tmp_path)
    assert encoder.contract.bands == RGB and all(torch.equal(v, weights[k]) for k, v in encoder.state_dict().items())
    assert cell_rows(scene, encoder, 'linear', 1.0, 0).value.between(0, 1).all()
    for name, error, words in (('imagenet-giant:photographs.safetensors', ValueError, 'SIZE:FILE'), ('imagenet-atto:', ValueError, 'SIZE:FILE'), ('imagenet-atto:photographs.safetensors', WeightsError, 'choose another size'), ('imagenet-atto:lost.pt', WeightsError, 'lost.pt does not exist')):
        with pytest.raises(error, match=words): open_encoder(name, first, tmp_path)


def test_the_same_words_name_an_encoder_of_a_store(tmp_path):
    "What the probe notebook hands over: a store and its training rows; folders relative to the repository."
    from mmearth.baselines import RandomFeatures, untrained
    from mmearth.pretrain import pretrain
    from mmearth.recipe import Recipe
    from mmearth.store import Store
    from mmearth.synthetic import write_store
    store = Store(write_store(tmp_path / 'tiles', 24, labelled=True))
    rows = np.arange(0, 24, 2)
    for name, direct in (('random_filters', RandomFeatures(store, rows)), ('untrained-pico-test', untrained(store, rows, 'pico-test'))):
        found = open_encoder(name, store, tmp_path, rows=rows)
        assert found.contract.stats == direct.contract.stats != open_encoder(name, store, tmp_path).contract.stats
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), direct.state_dict().values()))
    assert open_encoder('image_statistics', store, rows=rows) is None
    run = pretrain(Recipe(epochs=0, batch=8, decoder_width=16), store, tmp_path / 'mine', progress=False)
    by_run, by_checkpoint = open_encoder('mine', store, tmp_path, rows=rows), open_encoder(f'mine/{run.checkpoint.parent.name}/{run.checkpoint.name}', store, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(by_run.state_dict().values(), by_checkpoint.state_dict().values()))
    (tmp_path / 'kept').mkdir()
    (tmp_path / 'kept' / 'params.json').write_text('{}')
    for name, error, words in (('', FileNotFoundError, "'': no such run or checkpoint; give a run folder, image_statistics"), ('untrained', ValueError, 'untrained-SIZE is needed'), ('untrained-atto:x', ValueError, 'untrained-SIZE is needed'),
                               ('kept', WeightsError, '`mmearth replay kept --into runs` makes them again, in runs/kept')):
        with pytest.raises(error, match=words): open_encoder(name, store, tmp_path)


def test_a_cell_is_what_its_parts_give(scene):
    encoder = open_encoder('untrained-pico-test', planes(scene.parts['train'], None))
    x = {s: features(encoder, planes(p, encoder), progress=False) for s, p in scene.parts.items()}
    y = {s: p.y for s, p in scene.parts.items()}
    for method in ('knn', 'linear'):
        direct = probe(x['train'], y['train'], x['val'], y['val'], dict(test=(x['test'], y['test'])), (1.0,), (0,), (method,))
        cell = cell_rows(scene, encoder, method, 1.0, 0)
        pd.testing.assert_frame_equal(cell[direct.columns.drop('task')], direct.drop(columns='task'))
    s = {k: image_statistics(planes(p, None), range(len(p))) for k, p in scene.parts.items()}
    direct = probe(s['train'], y['train'], s['val'], y['val'], dict(test=(s['test'], y['test'])), (1.0,), (0,), ('linear',))
    assert cell_rows(scene, None, 'linear', 1.0, 0).value.tolist() == direct.value.tolist()


def test_a_published_share_is_the_partition_of_the_task(root, scene):
    task = GeoBench(root, 'standin-scene')
    assert set(scene.shares) >= {0.01, 0.05, 0.5}
    for fraction, at in scene.shares.items():
        assert [scene.parts['train'].ids[i] for i in at['train']] == task.ids('train', f'{fraction:.2f}x_train')
    rows = cell_rows(scene, None, 'knn', 0.5, 0)
    assert set(rows.n_train) == {len(task.ids('train', '0.50x_train'))} and set(rows.partition) == {'0.50x_train'}
    assert set(cell_rows(scene, None, 'knn', 0.25, 0).partition) == {'nested-0.25'}


def test_nothing_is_done_twice_and_a_line_cut_off_is_done_again(scene, tmp_path):
    path, run = tmp_path / 'r.csv', lambda **kw: benchmark([scene], ['image_statistics', 'random_filters'], ['knn', 'linear'], tmp_path / 'r.csv', progress=False, **kw)
    whole = run()
    text = path.read_text()
    assert run().equals(whole) and path.read_text() == text
    path.write_text(text[:-40])
    assert len(read_table(path)) == len(whole) - 1 and path.read_text().endswith('\n')
    grown = run(seeds=(0, 1), fractions=(0.25, 1.0))
    assert set(map(tuple, grown[['fraction', 'seed']].drop_duplicates().to_numpy())) == {(1.0, 0), (0.25, 0), (0.25, 1)}
    assert not as_rows(grown).duplicated(['task', 'arm', 'protocol', 'fraction', 'seed', 'split', 'metric']).any()
    assert tuple(grown.columns) == COLUMNS and COLUMNS[:len(TORCHGEO)] == TORCHGEO


def test_other_weights_under_the_same_name_are_another_encoder(scene, tmp_path):
    path = tmp_path / 'r.csv'
    for seed in (0, 1):
        encoder = open_encoder('untrained-pico-test', planes(scene.parts['train'], None), seed=seed)
        append_rows(path, as_columns(cell_rows(scene, encoder, 'knn', 1.0, 0), scene, encoder, 'same', weights_hash(encoder)[:16], None))
    assert read_table(path).weights.nunique() == 2


def test_bands_that_a_task_lacks_are_stood_in_for(root):
    task = open_task(GeoBench(root, 'standin-climate'))
    assert 'B1' not in task.parts['train'].bands
    scene = open_task(GeoBench(root, 'standin-scene'))
    twelve = [b for b in scene.parts['train'].bands if b != 'B10']
    encoder = untrained(planes(scene.parts['train'], None), size='pico-test', bands=twelve)
    got = planes(task.parts['test'], encoder).read(slice(0, 2))['sentinel2']
    own = planes(task.parts['test'], None)
    scaled = own.read(slice(0, 2))['sentinel2']
    assert np.array_equal(got[:, twelve.index('B1')], scaled[:, own.bands().index('B2')]) and np.array_equal(got[:, twelve.index('B4')], scaled[:, own.bands().index('B4')])


def test_the_paper_scales_a_stood_in_band_by_what_stands_in(root):
    task, scene = open_task(GeoBench(root, 'standin-climate')), open_task(GeoBench(root, 'standin-scene'))
    assert 'B1' not in task.stats
    encoder = untrained(planes(scene.parts['train'], None), size='pico-test', bands=[b for b in scene.parts['train'].bands if b != 'B10'])
    rows = cell_rows(task, encoder, 'linear-paper-few', 1.0, 0, epochs=1)
    assert set(rows.protocol) == {'linear-paper-few'} and rows.value.between(0, 1).all()


def test_published_protocols_scale_by_what_the_task_says_and_others_do_not(root, monkeypatch):
    seen = []
    monkeypatch.setattr('mmearth.benchmark.finetune', lambda *a, **k: seen.append(k['stats']) or pd.DataFrame(dict(value=[0.])))
    monkeypatch.setattr('mmearth.benchmark.segment', lambda *a, **k: seen.append(k['stats']) or pd.DataFrame(dict(value=[0.])))
    for name, method in (('standin-scene', 'finetune-paper'), ('standin-land', 'unet-paper')):
        task = open_task(GeoBench(root, name), 12)
        encoder = untrained(planes(task.parts['train'], None), size='pico-test', bands=('B4', 'B3', 'B2'))
        cell_rows(task, encoder, method, 1.0, 0)
        assert seen[-1] == {b: (task.stats[b]['mean'], task.stats[b]['std']) for b in ('B4', 'B3', 'B2')}


def test_a_share_of_maps_is_drawn_by_seed_and_shows_every_class(root, monkeypatch):
    task, seen = open_task(GeoBench(root, 'standin-land')), []
    monkeypatch.setattr('mmearth.benchmark.segment', lambda e, train, *a, **k: seen.append(train) or pd.DataFrame(dict(value=[0.])))
    encoder = untrained(planes(task.parts['train'], None), size='pico-test', bands=('B4', 'B3', 'B2'))
    cut = [cell_rows(Benched(task.name, task.parts, {}), encoder, 'unet', f, s) is not None and seen[-1] for f, s in ((0.3, 0), (0.3, 0), (0.3, 1), (1.0, 0))]
    assert all(np.array_equal(a, b) for a, b in zip(cut[0][:2], cut[1][:2])) and not np.array_equal(cut[0][0][:20], cut[2][0][:20])
    assert len(cut[0][0]) == len(cut[0][1]) < 0.5 * len(cut[3][0]) == 0.5 * len(task.parts['train'])
    assert set(np.unique(cut[0][1])) == set(np.unique(task.parts['train'].y))


def test_other_partitions_are_no_shares(tmp_path):
    write_standin(tmp_path, 40, tasks=('standin-scene',))
    folder = tmp_path / 'classification_v1.0' / 'standin-scene'
    (folder / 'mine_x_train_partition.json').write_text((folder / 'default_partition.json').read_text())
    assert sorted(open_task(GeoBench(tmp_path, 'standin-scene')).shares) == [f for f in FRACTIONS if f < 1]


def test_what_does_not_fit_is_refused(scene, tmp_path):
    with pytest.raises(ValueError, match="'unet' is not for it; there are knn"): cell_rows(scene, None, 'unet', 1.0, 0)
    with pytest.raises(ValueError, match='finetune trains an encoder with stages'): cell_rows(scene, None, 'finetune', 1.0, 0)
    with pytest.raises(FileNotFoundError, match='no such run or checkpoint'): benchmark([scene], ['reports/runs/none'], ['knn'], tmp_path / 'r.csv', progress=False)
    with pytest.raises(ValueError, match='methods: nothing unknown'): benchmark([scene], [], ['nothing'], tmp_path / 'r.csv')
    (tmp_path / 'r.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='r.csv has other columns .* write into another file'): read_table(tmp_path / 'r.csv')


def test_few_images_are_drawn_from_everywhere():
    task = open_labelled('standin-160/standin-scene', 24)
    assert len(task.parts['train']) == 24 and len(set(task.parts['train'].y.tolist())) > 4


@pytest.mark.parametrize('notebook,folder', [('benchmark', 'evaluations'), ('laboratory', 'laboratories')])
def test_files_of_parameters_fit_their_notebooks(notebook, folder):
    found = list((RUNS / folder).glob('*.yaml'))
    assert found
    for path in found:
        given = yaml.safe_load(path.read_text())
        check(given, declared(RUNS / f'{notebook}.ipynb'), path.name)
        if notebook == 'benchmark': assert set(given['methods']) <= {m for ms in METHODS.values() for m in ms}
        assert 'Command:' in path.read_text() and 'Hardware and time:' in path.read_text()
