"""The run notebooks against what they run: parameters are the recipe, recipes and experiments load, real pixels go through."""
import dataclasses
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from mmearth.convnext import ConvNeXtV2
from mmearth.cost import Setting, work
from mmearth.eurosat import write_eurosat
from mmearth.experiment import finished, load_experiment
from mmearth.masking import mask_to_pixels
from mmearth.modalities import MODALITIES, Modality, declare, modality
from mmearth.mpmae import MPMAE
from mmearth.named import open_data, repo_root
from mmearth.pretrain import Feed, learning_rate, pretrain
from mmearth.probe import features, probe
from mmearth.recipe import TASK_SETS, Recipe, RecipeError, load_recipe, peak_lr, read_values, to_dict
from mmearth.rehearsal import rehearse, schedule, view
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


@pytest.mark.parametrize('path', sorted((RUNS / 'recipes').glob('pt-*.yaml')), ids=lambda p: p.stem)
def test_published_recipes_reckon_their_time_from_what_was_measured(path):
    "The measured rate, scaled by the arithmetic of this recipe (44_cost), lies within the time its head tells, and the head tells the measured shape."
    r, all64 = load_recipe(path), load_recipe(RUNS / 'recipes' / 'pt-all_mod_atto_1M_64_uncertainty_56-8.yaml')
    def flops(r):
        model = MPMAE(ConvNeXtV2(r.size, r.bands, r.patch), {t: r.bands if t == 'sentinel2' else modality(t).train_bands for t in r.tasks}, r.decoder_width)
        return work(model, Setting(r.size, r.crop, r.patch, tasks=r.tasks))['flops']
    kept = repo_root() / 'reports' / 'runs' / 'rate-h200-atto-56'
    rate, shape = json.loads((kept / 'metrics.json').read_text())['samples_per_second'], json.loads((kept / 'params.json').read_text())
    hours = (100_000 if '100k' in path.stem else 1_228_121) * r.epochs / rate / 3600 * flops(r) / flops(all64)
    head = ' '.join(line.lstrip('# ') for line in path.read_text().splitlines() if line.startswith('#'))
    low, high, unit = re.search(r'One H200, ([\d.]+)(?: to ([\d.]+))? (hours|minutes)', head, re.I).groups()
    told = [float(v) / (60 if unit == 'minutes' else 1) for v in (low, high or low)]
    assert told[0] * 0.95 < hours < told[1] * 1.05, f'{hours:.2f} hours'
    for text in (f'{rate:,.0f} samples per second', f'batch {shape["batch"]} x accumulate {shape["accumulate"]} (reports/runs/{kept.name})', f'batch {r.batch} x accumulate {r.accumulate} is the published one',
                 f'-p batch={shape["batch"]} -p accumulate={shape["accumulate"]}'): assert text in head, text
    assert shape['batch'] * shape['accumulate'] == r.batch * r.accumulate


def test_all_published_recipes_are_here(): assert len(list((RUNS / 'recipes').glob('pt-*.yaml'))) == 10


@pytest.mark.parametrize('text,key,lines', [('epochs: 3\nseed: 1\nepochs: 50\n', 'epochs', (1, 3)), ('seed: 1\n"seed": 1\n', 'seed', (1, 2)), ('a: {tasks: s2, tasks: all}\n', 'tasks', (1, 1)),
                                            ('arms:\n  all: {}\n  s2: {}\n  all: {epochs: 2}\n', 'all', (2, 4))])
def test_a_key_given_twice_is_refused(text, key, lines, tmp_path):
    path = tmp_path / 'twice.yaml'
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"twice\.yaml: key '{key}' stands in line {lines[0]} and again in line {lines[1]}; keep one"): read_values(path)
    path.write_text('base: &base {epochs: 3, seed: 1}\nthis: {<<: *base, epochs: 4}\n')  # what YAML means to be replaced
    assert read_values(path)['this'] == {'epochs': 4, 'seed': 1}


@pytest.mark.parametrize('text', ['seed: ' + '9' * 5000, 'data: 2024-13-45', 'data: ' + '[' * 5000, 'seed: !!python/object:os.system x', 'epochs: "'])
def test_what_is_no_yaml_names_its_file(text, tmp_path):
    (tmp_path / 'odd.yaml').write_text(text)
    with pytest.raises(RecipeError, match='odd.yaml'): load_recipe(tmp_path / 'odd.yaml')


SILLY = {int: (-2 ** 70, -1, 0, 1, 3, 8, 16, 2 ** 16, 2 ** 31, 2 ** 32, 2 ** 63, 10 ** 20, 10 ** 400), float: (-1e300, -1, 0, 5e-324, 1e-45, 0.5, 1 - 2 ** -53, 1, 7, 1e6, 1e39, 1e300, 10 ** 400, float('nan'), float('inf'))}


@pytest.mark.parametrize('field', [f for f in dataclasses.fields(Recipe) if type(f.default) in SILLY], ids=lambda f: f.name)
def test_a_number_that_loads_can_be_run(field, tiny_store, tmp_path):
    "Every silly number is refused with the name of a key, or its schedule is sound; the largest and the smallest that load really train."
    base, taken = dict(crop=16, batch=4, epochs=1., decoder_width=8, tasks=('lat', 'sentinel2')), []
    for value in SILLY[type(field.default)]:
        try: taken.append(Recipe(**base | {field.name: value}))
        except RecipeError as e: assert str(e).startswith((f'{field.name}: ', 'warmup_epochs: ', 'weight_decay: ', 'min_lr: ', 'mask_ratio: ')) and len(str(e)) < 300, e
    assert taken
    for r in taken:
        warm, peak = round(100 * min(1, r.warmup_epochs / r.epochs)) if r.epochs else 0, peak_lr(r)
        rates = [learning_rate(s, 100, warm, peak, r.min_lr) for s in range(100)]
        assert max(rates) <= peak and rates[warm:] == sorted(rates[warm:], reverse=True) and peak * r.weight_decay < 1
    heavy = field.name in ('crop', 'batch', 'accumulate', 'decoder_width', 'epochs', 'blr')
    for r in {taken[0], taken[0 if heavy else -1]}: assert np.isfinite(pretrain(dataclasses.replace(r, crop=16), Store(tiny_store), tmp_path / str(taken.index(r)), until=1, progress=False).log.loss.astype(float)).all()


@pytest.mark.parametrize('given,says', [(dict(min_lr=1.0), 'min_lr: 1 is above the peak learning rate 9.375e-06'), (dict(seed=99999999999999999999), 'seed: must be at most 4,294,967,295'), (dict(warmup_epochs=2), 'warmup_epochs: 2 is more than the 1 epochs'),
    (dict(mask_ratio=0), 'mask_ratio: 0 hides none of 49 patches'), (dict(decoder_width=12), 'decoder_width: 12 is not a multiple of 8'), (dict(blr=320, weight_decay=0.05), 'weight_decay: 0.05 at the peak learning rate 20'), (dict(data='a\nb'), 'data: name or folder')])
def test_values_that_contradict_each_other_are_refused(given, says, tmp_path):
    (tmp_path / 'r.yaml').write_text(json.dumps(given))
    with pytest.raises(RecipeError, match=f'r.yaml: {says}'): load_recipe(tmp_path / 'r.yaml')


def test_every_kept_run_is_still_a_recipe():
    kept = [json.loads(p.read_text()) for p in (repo_root() / 'reports' / 'runs').glob('*/params.json')]
    kept = [{k: p[k] for k in to_dict(Recipe())} for p in kept if {'blr', 'min_lr', 'mask_ratio', 'warmup_epochs', 'keep'} <= p.keys()]
    assert len(kept) > 30 and all(to_dict(Recipe(**p)) == p for p in kept)


def test_plain_papermill_refuses_a_name_that_is_no_parameter(tmp_path):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError) as found:
        papermill.execute_notebook(RUNS / 'pretrain.ipynb', tmp_path / 'out.ipynb', dict(epoch=2, decoder_width=64), kernel_name='python3', cwd=RUNS, progress_bar=False, extra_arguments=['--log-level=CRITICAL'])
    assert f'{found.value.ename}: {found.value.evalue}' == "RecipeError: unknown key 'epoch'; did you mean 'epochs'?"


@pytest.mark.parametrize('unseen', [False, True])
def test_the_pretrain_notebook_says_where_it_writes_and_what_it_shows(unseen, tiny_store, tmp_path, capsys):
    "Its cells one after another, as a notebook runs them, on a store with and without a validation split of three tiles."
    root = tmp_path / 'store'
    shutil.copytree(tiny_store, root)
    path = next(root.glob('*_splits.json'))
    splits = json.loads(path.read_text())
    if unseen: path.write_text(json.dumps(splits | dict(train=splits['train'][3:], val=splits['train'][:3])))
    cells = {c['id']: ''.join(c['source']) for c in json.loads((RUNS / 'pretrain.ipynb').read_text())['cells'] if c['cell_type'] == 'code'}
    names = dict(display=print)
    exec(cells.pop('parameters'), names)
    names.update(data=str(root), epochs=1, batch=4, crop=16, decoder_width=8, tasks=['sentinel2', 'dynamic_world'])
    for source in cells.values(): exec(source, names)
    folder = Path(re.search(r'nothing is kept: log and checkpoints lie in (\S+) until', capsys.readouterr().out)[1])
    assert (folder / 'log.csv').is_file() and len(list((folder / 'checkpoints').iterdir())) == 1
    assert names['figure'].get_suptitle() == ('A validation tile, not trained on' if unseen else 'A tile of split train, which was trained on')
    assert set(names['feed'].rows) == set(names['store'].rows('val' if unseen else 'train'))
    shutil.rmtree(folder)


def test_a_plan_tells_what_is_done_and_what_is_left(tiny_store, tmp_path):
    store, recipe = Store(tiny_store), Recipe(batch=4, epochs=2, crop=16, decoder_width=8, tasks=('lat',), save_every=2)
    found = rehearse(recipe, store, 0.1)
    assert 'done already' not in schedule(recipe, store, found, tmp_path).index
    pretrain(recipe, store, tmp_path, until=3, progress=False)  # the last checkpoint is that of update 2
    table = schedule(recipe, store, found | dict(hours=10.), tmp_path)['how much']
    assert table['done already'] == '2 updates' and table['the whole run'] == '10.0 hours' and table['the rest'] == f'{10 * (1 - 2 / found["updates"]):.1f} hours'


def test_the_view_is_of_the_numbers_the_run_draws(tiny_store):
    "Against the loop's own first batch: the same tiles, the same hidden patches, the frame where the crop was taken."
    store, recipe = Store(tiny_store), Recipe(batch=4, crop=16, patch=8, bands=('B4', 'B3', 'B2'), tasks=('sentinel2',), seed=11)
    batch, mask, rows = Feed(store, recipe, {'sentinel2': recipe.bands}, torch.device('cpu'), memory=0).batch(0)
    axes = view(recipe, store, 3).axes
    for i, (above, below) in enumerate(zip(axes[:3], axes[3:])):
        assert above.get_title() == f'tile {store.tile_ids[rows[i]]}'
        x, y = (int(v + 0.5) for v in above.patches[0].get_xy())
        raw = store.read(rows[i:i + 1], ['sentinel2'])['sentinel2'][0, [3, 2, 1], y:y + 16, x:x + 16].astype(float)
        level = str(store.levels[rows[i]])
        mean, std = (np.array(store.stats[f'sentinel2_{level}'][k])[[3, 2, 1]][:, None, None] for k in ('mean', 'std'))
        np.testing.assert_allclose(batch['sentinel2'][i].numpy(), (raw - mean) / std, rtol=1e-4, atol=1e-4)
        grey = (below.images[0].get_array() == np.float32([0.6, 0.6, 0.6, 1])).all(-1)
        assert (grey == mask_to_pixels(mask[i:i + 1], 16)[0, 0].numpy()).all()


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
    recipe = dataclasses.replace(e.recipe('all', 0), epochs=1.0, warmup_epochs=0.2, batch=16, decoder_width=32, log_every=4)
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
