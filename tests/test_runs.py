"""The run notebooks against what they run: parameters are the recipe, recipes and experiments load, real pixels go through."""
import dataclasses
import json
import re
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from mmearth.eurosat import write_eurosat
from mmearth.experiment import finished, load_experiment
from mmearth.modalities import MODALITIES, Modality, declare
from mmearth.named import open_data, repo_root
from mmearth.pretrain import pretrain
from mmearth.probe import features, probe
from mmearth.recipe import TASK_SETS, Recipe, load_recipe, to_dict
from mmearth.report import declared
from mmearth.store import Store
from mmearth.weights import load_encoder, load_model

RUNS = repo_root() / 'nbs' / 'runs'


def test_parameters_of_the_pretrain_notebook_are_the_recipe():
    assert {k: v for k, v in declared(RUNS / 'pretrain.ipynb').items() if k != 'out'} == to_dict(Recipe())


@pytest.mark.parametrize('path', sorted((RUNS / 'recipes').glob('*.yaml')), ids=lambda p: p.stem)
def test_recipes_load_and_say_what_they_cost(path):
    load_recipe(path)
    header = [line for line in path.read_text().split('\n') if line.startswith('#')]
    for word in ('Command:', 'Hardware and time:', 'Expected:'): assert any(word in line for line in header), f'{path.name}: no {word}'


@pytest.mark.parametrize('path', sorted((RUNS / 'recipes').glob('pt-*.yaml')), ids=lambda p: p.stem)
def test_published_recipes_are_what_their_names_say(path):
    "Names as in the published list of checkpoints (reference 3.7)."
    tasks, size, amount, side, how, crop, patch = re.fullmatch(r'pt-(all_mod|img_mod|pix_mod|S2|rgb)_(atto|tiny)_(1M|100k)_(64|128)_(\w+)_(\d+)-(\d+)', path.stem).groups()
    r = load_recipe(path)
    assert r.tasks == TASK_SETS[dict(all_mod='all', img_mod='image', pix_mod='pixel', S2='s2', rgb='s2')[tasks]]
    assert (r.bands == ('B2', 'B3', 'B4')) == (tasks == 'rgb') and (tasks == 'rgb' or len(r.bands) == 12)
    assert (r.size, r.crop, r.patch, r.balance) == (size, int(crop), int(patch), dict(uncertainty='uncertainty', unweighted='sum')[how])
    assert r.data == f'data_{amount}_v001' + '_64' * (side == '64')
    assert (r.batch * r.accumulate, r.epochs, r.warmup_epochs, r.blr, r.weight_decay, r.beta2, r.mask_ratio) == (4096, 200, 40, 1.5e-4, 0.05, 0.95, 0.6)


def test_all_published_recipes_are_here(): assert len(list((RUNS / 'recipes').glob('pt-*.yaml'))) == 10


@pytest.mark.parametrize('path', sorted((RUNS / 'experiments').glob('*.yaml')), ids=lambda p: p.stem)
def test_experiments_load(path):
    e = load_experiment(path)
    assert len(e.seeds) >= 3 and set(e.probe) <= set(declared(RUNS / 'probe.ipynb'))
    same = [to_dict(e.recipe(a, 0)) for a in e.arms]
    for key in set(same[0]) - {'tasks', 'epochs', 'balance'}: assert len({str(r[key]) for r in same}) == 1, f'arms differ in {key}'


def test_a_run_made_with_other_parameters_is_not_taken_for_finished(tmp_path):
    assert not finished('nothing-here', {}, 'reports/runs')


def test_mini_store_absent_modalities_are_ignored(shared, tmp_path):
    "Real pixels: era5, canopy and WorldCover are absent everywhere and must neither learn nor disturb."
    store = Store(shared / 'data_mini_v001_64')
    recipe = Recipe(data='mini', batch=16, epochs=1, decoder_width=32, log_every=5, blr=8e-3)
    run = pretrain(recipe, store, tmp_path / 'run', progress=False)
    absent = ['era5', 'canopy_height_eth', 'esa_worldcover']
    assert run.log[absent].isna().all().all() and run.log[['sentinel2', 'sentinel1', 'aster', 'lat', 'biome']].notna().all().all()
    assert (run.log[[f's_{t}' for t in absent]] == 0).all().all()
    fresh = pretrain(dataclasses.replace(recipe, epochs=0), store, tmp_path / 'fresh', progress=False)
    before, after = (load_model(r.checkpoint) for r in (fresh, run))
    for t in absent:
        for a, b in zip(before.heads[t].parameters(), after.heads[t].parameters()):
            assert torch.allclose(b, a, rtol=0.02) if a.ndim > 1 else torch.equal(a, b)  # weight decay is all that reaches a kernel


@pytest.fixture(scope='module')
def some_eurosat(shared, tmp_path_factory):
    "200 of each EuroSAT class would take a minute to read; 40 of each will do."
    folder, source = tmp_path_factory.mktemp('eurosat'), shared / 'eurosat_rgb'
    index = pd.read_csv(source / 'eurosat_rgb_index.csv').groupby('label').head(40)
    index.to_csv(folder / 'index.csv', index=False)
    return Store(write_eurosat(sorted(source.glob('*.zip')), folder / 'index.csv', folder / 'store'))


def test_eurosat_from_pixels_to_accuracy(some_eurosat, tmp_path):
    e = load_experiment(RUNS / 'experiments' / 'eurosat.yaml')
    recipe = dataclasses.replace(e.recipe('all', 0), epochs=1.0, batch=16, decoder_width=32, log_every=4)
    run = pretrain(recipe, some_eurosat, tmp_path, progress=False)
    assert np.isfinite(run.log.loss).all()
    encoder, labels = load_encoder(run.checkpoint), some_eurosat.labels
    x, y = {}, {}
    for split, part in labels.groupby('split'): x[split], y[split] = features(encoder, some_eurosat, part.row.to_numpy(), progress=False), part.label.to_numpy()
    rows = probe(x['train'], y['train'], x['val'], y['val'], {s: (x[s], y[s]) for s in ('test_image', 'test_region')}, fractions=(1.0,), seeds=(0,))
    images = rows[(rows.metric == 'accuracy') & (rows.split == 'test_image') & (rows.protocol == 'linear')]
    assert images.value.item() > 0.25  # ten classes: far from chance, whatever the network


def test_a_new_task_is_one_declaration(some_eurosat, tmp_path):
    "Declares a modality nobody knew, writes it into a store, pretrains on it: no other line of the package is touched."
    declare(Modality('brightness', 'image', 'continuous', ('brightness',), 'float32', nodata_stored=(np.nan,)))
    try:
        root = tmp_path / 'store'
        shutil.copytree(some_eurosat.root, root)
        values = some_eurosat.read(range(len(some_eurosat)), ['sentinel2'])['sentinel2'].mean((1, 2, 3), dtype='float32')[:, None]
        with h5py.File(next(root.glob('*.h5')), 'r+') as f: f['brightness'] = values
        stats_path = next(root.glob('*_band_stats.json'))
        stats = json.loads(stats_path.read_text())
        stats['brightness'] = {k: [float(getattr(values, k)())] for k in ('mean', 'std', 'min', 'max')}
        stats_path.write_text(json.dumps(stats))
        recipe = Recipe(bands=('B4', 'B3', 'B2'), tasks=('brightness',), batch=16, epochs=6, decoder_width=32, log_every=5, blr=3e-2)
        log = pretrain(recipe, Store(root), tmp_path / 'run', progress=False).log
        assert log.brightness.iloc[-1] < 0.7 * log.brightness.iloc[0]
    finally: del MODALITIES['brightness']
