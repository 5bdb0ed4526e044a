"""Runs that are killed, damaged data, damaged checkpoints: nothing is lost and every error says what to do."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mmearth.checkpoint import alone, checkpoints, latest
from mmearth.guard import Diverged
from mmearth.log import CLOCK
from mmearth.modalities import TASKS, modality
from mmearth.named import repo_root
from mmearth.pack import Pack, pack
from mmearth.pretrain import Feed, Trainer, build, pictures, pretrain
from mmearth.recipe import Recipe, RecipeError, load_recipe, save_recipe
from mmearth.store import Store, StoreError
from mmearth.synthetic import write_store
from mmearth.together import Stopped
from mmearth.weights import WeightsError, encoder_alone, load_encoder, load_model

SMOKE = repo_root() / 'nbs' / 'runs' / 'recipes' / 'smoke.yaml'

SMALL = Recipe(batch=4, epochs=4, save_every=3, log_every=2, decoder_width=32, blr=6e-3)

KILLED = '''
import sys
from pathlib import Path
from mmearth.pretrain import pretrain
from mmearth.recipe import load_recipe
from mmearth.store import Store
pretrain(load_recipe(sys.argv[1]), Store(sys.argv[2]), Path(sys.argv[3]), progress=False)
'''


def weights(run): return load_file(run / 'model.safetensors')


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sigkill_at_any_moment_ends_with_the_same_bits(tiny_store, tmp_path):
    whole = pretrain(SMALL, Store(tiny_store), tmp_path / 'whole', progress=False)
    recipe, out = save_recipe(SMALL, tmp_path / 'r.yaml'), tmp_path / 'killed'
    kills, wait = 0, 0.0
    while True:
        p = subprocess.Popen([sys.executable, '-c', KILLED, recipe, tiny_store, out], env=os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())})
        before = len(checkpoints(out)) and latest(out).name
        while p.poll() is None and (kills == 3 or not (len(checkpoints(out)) and latest(out).name != before)): time.sleep(0.01)
        time.sleep(wait)
        if p.poll() is not None: break
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills, wait = kills + 1, (wait + 0.07) % 0.2
    assert kills >= 2 and p.returncode == 0
    assert same(weights(latest(out)), weights(whole.checkpoint))
    assert not list((out / 'checkpoints').glob('*.part'))


@pytest.mark.parametrize('save_every,log_every,keep', [(1, 50, 1), (2, 3, 1), (5, 2, 2)])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_stopping_anywhere_changes_nothing(save_every, log_every, keep, accumulate, tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, batch=2, accumulate=accumulate, epochs=0.75, tasks=('sentinel2', 'biome'), save_every=save_every, log_every=log_every, keep=keep)
    whole = pretrain(recipe, Store(tiny_store), tmp_path / 'whole', progress=False)
    for until in (1, 3, 4, None): parts = pretrain(recipe, Store(tiny_store), tmp_path / 'parts', until=until, progress=False)
    assert same(weights(parts.checkpoint), weights(whole.checkpoint)) and len(checkpoints(tmp_path / 'parts')) <= keep
    assert parts.log.drop(columns=[*CLOCK]).equals(whole.log.drop(columns=[*CLOCK]))


def test_the_running_mean_of_the_weights_is_kept_and_gone_on_from(tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, epochs=1.5, ema=0.7, clip=0.5, tasks=('sentinel2', 'biome'), save_every=2)
    whole = pretrain(recipe, Store(tiny_store), tmp_path / 'whole', progress=False)
    for until in (1, 3, 4, None): parts = pretrain(recipe, Store(tiny_store), tmp_path / 'parts', until=until, progress=False)
    assert same(weights(parts.checkpoint), weights(whole.checkpoint)) and same(load_file(parts.checkpoint / 'trained.safetensors'), load_file(whole.checkpoint / 'trained.safetensors'))
    trainer, mean = Trainer(recipe, Store(tiny_store), tmp_path / 'loop'), None
    for step in range(whole.updates):
        trainer.update(step)
        now = {k: v.detach().double().clone() for k, v in trainer.model.state_dict().items()}
        mean = now if mean is None else {k: 0.7 * mean[k] + 0.3 * v for k, v in now.items()}
    for k, v in weights(whole.checkpoint).items(): torch.testing.assert_close(v.double(), mean[k], rtol=1e-5, atol=1e-6)
    assert not same(weights(whole.checkpoint), load_file(whole.checkpoint / 'trained.safetensors'))


def test_the_gradient_is_clipped_by_its_norm(tiny_store, tmp_path):
    seen = {}
    for clip in (0., 1e-2, 1e6):
        trainer = Trainer(dataclasses.replace(SMALL, clip=clip), Store(tiny_store), tmp_path / str(clip))
        stepped, step = [], trainer.optimiser.step
        trainer.optimiser.step = lambda: (stepped.extend(p.grad.clone() for p in trainer.model.parameters()), step())
        trainer.update(0)
        seen[clip] = stepped, trainer.count[2].item()
    norm = lambda gradients: sum(g.double().square().sum() for g in gradients).sqrt().item()
    assert norm(seen[0.][0]) == pytest.approx(seen[0.][1], rel=1e-5) and seen[0.][1] > 1e-2
    assert norm(seen[1e-2][0]) == pytest.approx(1e-2, rel=1e-3) and seen[1e-2][1] == seen[0.][1]
    assert all(torch.equal(a, b) for a, b in zip(seen[0.][0], seen[1e6][0]))


def test_a_full_disk_loses_nothing(tiny_store, tmp_path):
    "Files may not grow beyond 100 kB: the checkpoint fails, says so, leaves no half folder; with room again the run goes on."
    recipe = dataclasses.replace(SMALL, epochs=1, save_every=2)
    whole = pretrain(recipe, Store(tiny_store), tmp_path / 'whole', progress=False)
    out, path = tmp_path / 'full', save_recipe(recipe, tmp_path / 'r.yaml')
    pretrain(recipe, Store(tiny_store), out, until=3, progress=False)
    code = KILLED.replace('import sys\n', 'import sys, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n', 1).replace('pretrain(load', 'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\npretrain(load')
    p = subprocess.run([sys.executable, '-c', code, path, tiny_store, out], env=os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}, capture_output=True, text=True)
    assert p.returncode and 'step-00000004 could not be written' in p.stderr and 'make room on the disk' in p.stderr, p.stderr[-800:]
    assert [c.name for c in (out / 'checkpoints').iterdir()] == ['step-00000002']
    assert same(weights(pretrain(recipe, Store(tiny_store), out, progress=False).checkpoint), weights(whole.checkpoint))


def test_a_kill_before_the_first_row_or_while_pruning(tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, batch=4, epochs=1, tasks=('lat',), save_every=2, log_every=50, keep=1)
    pretrain(recipe, Store(tiny_store), tmp_path, until=3, progress=False)
    (tmp_path / 'log.csv').write_text('')
    (tmp_path / 'checkpoints' / 'step-00000001.old').mkdir()
    (tmp_path / 'checkpoints' / 'step-00000004.part').mkdir()
    run = pretrain(recipe, Store(tiny_store), tmp_path, progress=False)
    assert run.updates == 6 and len(run.log) == 1


@pytest.mark.parametrize('name', TASKS)
def test_a_modality_without_a_single_measurement_is_ignored(name, tiny_store, tmp_path):
    "NaN in floats, no-data codes in integers: the loss stays finite and the task learns nothing."
    root = tmp_path / 'store'
    shutil.copytree(tiny_store, root)
    m = modality(name)
    with h5py.File(next(root.glob('*.h5')), 'r+') as f: f[name][:] = np.nan if m.dtype.startswith('float') else m.nodata_stored[0]
    trainer = Trainer(dataclasses.replace(SMALL, tasks=(name, 'lat' if name != 'lat' else 'lon')), Store(root), tmp_path / 'run')
    before = {k: v.clone() for k, v in trainer.model.heads[name].state_dict().items()}
    assert np.isfinite(trainer.update(0))
    decay = 1 - trainer.optimiser.param_groups[0]['lr'] * SMALL.weight_decay
    for k, v in trainer.model.heads[name].state_dict().items(): torch.testing.assert_close(v, before[k] * (decay if v.ndim > 1 else 1))


def test_nan_scattered_through_the_data(tiny_store, tmp_path):
    root = tmp_path / 'store'
    shutil.copytree(tiny_store, root)
    rng = np.random.default_rng(0)
    with h5py.File(next(root.glob('*.h5')), 'r+') as f:
        for name in TASKS:
            if not modality(name).dtype.startswith('float'): continue
            x = f[name][:]
            x[rng.random(x.shape) < 0.3] = rng.choice([np.nan, np.inf, -np.inf])
            f[name][:] = x
    run = pretrain(dataclasses.replace(SMALL, epochs=1), Store(root), tmp_path / 'run', progress=False)
    assert np.isfinite(run.log.loss).all()


def test_divergence_names_task_and_tiles_and_keeps_the_checkpoint(tiny_store, tmp_path):
    trainer = Trainer(SMALL, Store(tiny_store), tmp_path)
    torch.nn.init.constant_(trainer.model.heads['aster'].bias, float('inf'))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(Diverged, match='update 0: the loss of aster is not finite on all 4 tiles. Not the tiles but the weights are at fault: lower blr.*there is no checkpoint yet'): trainer.update(0)
    assert same(trainer.model.state_dict(), before)


def test_one_broken_tile_among_many_is_named(tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, batch=5, epochs=3, save_every=2, tasks=('sentinel2', 'sentinel1'), balance='sum')
    fine = pretrain(recipe, Store(tiny_store), tmp_path / 'run', until=2, progress=False)
    row = int(Feed(Store(tiny_store), recipe, fine.model.wanted, torch.device('cpu')).batch(15)[2][3])
    root = tmp_path / 'store'
    shutil.copytree(tiny_store, root)
    with h5py.File(next(root.glob('*.h5')), 'r+') as f: f['sentinel1'][row, 0] = 1e30  # its square is more than a float32 holds
    broken = Store(root)
    trainer = Trainer(recipe, broken, tmp_path / 'run')
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(Diverged) as e: trainer.update(3)
    assert f'update 3: the loss of sentinel1 is not finite on 1 of 5 tiles: {broken.tile_ids[row]} (sentinel1 up to ' in str(e.value), str(e.value)
    assert 'step-00000002, the newest checkpoint, is whole' in str(e.value) and '--rows' in str(e.value)
    assert same(trainer.model.state_dict(), before)


def test_another_recipe_does_not_overwrite_a_run(tiny_store, tmp_path):
    pretrain(dataclasses.replace(SMALL, epochs=0), Store(tiny_store), tmp_path, progress=False)
    with pytest.raises(RecipeError, match='another recipe .seed: 0 and 1.*choose another folder'):
        pretrain(dataclasses.replace(SMALL, epochs=0, seed=1), Store(tiny_store), tmp_path, progress=False)


def test_other_data_is_noticed(tiny_store, tmp_path):
    pretrain(dataclasses.replace(SMALL, epochs=0), Store(tiny_store), tmp_path / 'run', progress=False)
    other = Store(write_store(tmp_path / 'store', n=24, seed=4))
    with pytest.raises(RecipeError, match='fingerprint'): pretrain(dataclasses.replace(SMALL, epochs=0), other, tmp_path / 'run', progress=False)


@pytest.fixture(scope='module')
def checkpoint(tiny_store, tmp_path_factory):
    return pretrain(dataclasses.replace(SMALL, epochs=0), Store(tiny_store), tmp_path_factory.mktemp('ckpt'), progress=False).checkpoint


def edited(checkpoint, tmp_path, **changes):
    copy = tmp_path / 'copy'
    shutil.copytree(checkpoint, copy)
    contract = json.loads((copy / 'contract.json').read_text())
    for key, value in changes.items():
        if value is None: del contract[key]
        else: contract[key] = value
    (copy / 'contract.json').write_text(json.dumps(contract))
    return copy


@pytest.mark.parametrize('changes,message', [
    (dict(bands=None), "'bands' is missing"), (dict(sha256='0' * 64), 'sha256 differs'), (dict(colour='red'), "unknown key 'colour'"),
    (dict(size='atto'), 'by its contract'), (dict(patch=16), 'by its contract'), (dict(bands=['B2', 'B3']), 'one per band'),
    (dict(size='giant'), 'unknown size')])
def test_a_wrong_contract_is_refused(checkpoint, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message): load_encoder(edited(checkpoint, tmp_path, **changes))


@pytest.mark.parametrize('file', ['model.safetensors', 'contract.json'])
@pytest.mark.parametrize('keep', [0, 0.5])
def test_a_truncated_or_missing_file_is_refused_by_name(checkpoint, tmp_path, file, keep):
    copy = edited(checkpoint, tmp_path)
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[:int(keep * len(whole))])
    with pytest.raises(WeightsError, match=file): load_model(copy)
    (copy / file).unlink()
    with pytest.raises(WeightsError, match=f'{file}.* missing'): load_model(copy)


def test_accumulation_is_one_larger_batch_seen_in_parts(tiny_store, tmp_path):
    "Two half batches see the samples of one, and the summed loss is the mean of theirs."
    parts = Trainer(dataclasses.replace(SMALL, batch=4, accumulate=2), Store(tiny_store), tmp_path / 'a')
    seen = [parts.feed.batch(p)[2] for p in (0, 4)]
    whole = Trainer(dataclasses.replace(SMALL, batch=8), Store(tiny_store), tmp_path / 'b')
    assert np.concatenate(seen).tolist() == whole.feed.batch(0)[2].tolist()
    assert parts.total == whole.total


def test_a_pack_trains_to_the_same_bits_as_its_store(tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, epochs=1)
    store = Store(tiny_store)
    packed = Pack(pack(store, tmp_path / 'pack', split='train', samples=7))
    a, b = (pretrain(recipe, source, tmp_path / name, progress=False) for source, name in ((store, 'a'), (packed, 'b')))
    assert same(weights(a.checkpoint), weights(b.checkpoint))


TOGETHER = '''
import sys
from pathlib import Path
import torch
from mmearth.pretrain import pretrain
from mmearth.recipe import load_recipe
from mmearth.store import Store
from mmearth.together import together
torch.set_num_threads(1)
with together(): pretrain(load_recipe(sys.argv[1]), Store(sys.argv[2]), Path(sys.argv[3]), progress=False)
'''


def test_two_processes_learn_what_one_learns(tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, batch=2, accumulate=4, epochs=3, log_every=1, save_every=4)
    one = pretrain(recipe, Store(tiny_store), tmp_path / 'one', progress=False)
    (tmp_path / 'train.py').write_text(TOGETHER)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', tmp_path / 'train.py', save_recipe(recipe, tmp_path / 'r.yaml'), tiny_store, tmp_path / 'two']
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two, columns = pd.read_csv(tmp_path / 'two' / 'log.csv'), [c for c in one.log if c not in CLOCK]
    assert len(two) == one.updates == 9
    np.testing.assert_allclose(two[columns], one.log[columns], rtol=2e-3, atol=1e-5)
    start = build(recipe, Store(tiny_store))[0].state_dict()
    for k, v in weights(one.checkpoint).items(): assert torch.allclose(v, weights(latest(tmp_path / 'two'))[k], rtol=1e-4, atol=1e-5), k
    assert max((v - start[k]).abs().max() for k, v in weights(one.checkpoint).items()) > 1e-3  # far more than what is tolerated


def launch(script, *words, **env):
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


def test_processes_on_disks_of_their_own_are_refused(tiny_store, tmp_path):
    "What several nodes would do whose folder is not shared: one has a checkpoint, the other has none."
    recipe = dataclasses.replace(SMALL, batch=2, accumulate=2, epochs=2, tasks=('lat',), save_every=2)
    pretrain(recipe, Store(tiny_store), tmp_path / 'node0', until=4, progress=False)
    (tmp_path / 'train.py').write_text(TOGETHER.replace('Path(sys.argv[3])', "Path(sys.argv[3] + __import__('os').environ['RANK'])"))
    p = launch(tmp_path / 'train.py', save_recipe(recipe, tmp_path / 'r.yaml'), tiny_store, tmp_path / 'node')
    said = p.communicate(timeout=120)[1]
    assert p.returncode and 'on a disk that all nodes share' in said, said[-1500:]
    assert latest(tmp_path / 'node0').name == 'step-00000004' and not checkpoints(tmp_path / 'node1')


def test_a_signal_to_torchrun_costs_nothing(tiny_store, tmp_path):
    recipe = save_recipe(dataclasses.replace(SMALL, data=str(tiny_store), batch=2, accumulate=2, epochs=40, tasks=('lat', 'biome'), log_every=1, save_every=1000), tmp_path / 'r.yaml')
    (tmp_path / 'train.py').write_text('from mmearth.cli import main\nmain()\n')
    words = ['pretrain', recipe, tmp_path / 'run', '--no-progress']
    p, log = launch(tmp_path / 'train.py', *words, OMP_NUM_THREADS='1'), tmp_path / 'run' / 'log.csv'
    while p.poll() is None and not (log.exists() and log.read_text().count('\n') > 3): time.sleep(.02)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=120)[1]
    assert p.returncode and 'the same command goes on from there' in said, said[-1500:]
    done = int(latest(tmp_path / 'run').name.split('-')[1])
    one = pretrain(load_recipe(recipe), Store(tiny_store), tmp_path / 'run', until=done + 2, progress=False)
    assert one.updates == done + 2 and one.log.step.tolist() == list(range(1, done + 3))


@pytest.mark.parametrize('world', [2, 4])
def test_processes_share_the_samples_and_none_sees_anothers(world, tiny_store):
    store, recipe = Store(tiny_store), dataclasses.replace(SMALL, batch=2, accumulate=4, tasks=('lat',))
    wanted = {t: modality(t).train_bands for t in ('sentinel2', 'lat')}
    alone = Feed(store, recipe, wanted, torch.device('cpu'))
    parts = [Feed(store, recipe, wanted, torch.device('cpu'), rank=r, world=world) for r in range(world)]
    for micro in range(12):
        mine, theirs = alone.batch(2 * micro), parts[micro % world].batch(2 * micro)
        assert mine[2].tolist() == theirs[2].tolist() and torch.equal(mine[1], theirs[1]) and torch.equal(mine[0]['sentinel2'], theirs[0]['sentinel2'])


def test_more_processes_than_forward_passes_are_refused(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr('mmearth.pretrain.ranks', lambda: (0, 3))
    with pytest.raises(RecipeError, match='not a multiple of the 3 processes'): Trainer(dataclasses.replace(SMALL, accumulate=4), Store(tiny_store), tmp_path)


@pytest.mark.parametrize('save_every', [1, 1000])
def test_a_scheduler_may_end_a_run_and_start_it_again(save_every, tiny_store, tmp_path):
    recipe = dataclasses.replace(SMALL, data=str(tiny_store), epochs=6, save_every=save_every, keep=1)
    whole = pretrain(recipe, Store(tiny_store), tmp_path / 'whole', progress=False)
    words = ['-m', 'mmearth.cli', 'pretrain', save_recipe(dataclasses.replace(recipe, epochs=1), tmp_path / 'r.yaml'), tmp_path / 'ended', '-p', 'epochs=6', '--no-progress']
    p = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())})
    log = tmp_path / 'ended' / 'log.csv'
    while p.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3): time.sleep(.005)
    p.send_signal(signal.SIGTERM)
    said = p.communicate()[1]
    assert p.returncode == 75 and 'the same command goes on from there' in said and len(checkpoints(tmp_path / 'ended')) == 1, said
    ended = pretrain(recipe, Store(tiny_store), tmp_path / 'ended', progress=False)
    assert same(weights(ended.checkpoint), weights(whole.checkpoint)) and ended.log.drop(columns=[*CLOCK]).equals(whole.log.drop(columns=[*CLOCK]))


def test_a_signal_in_the_last_save_or_before_the_first_update(tiny_store, tmp_path, monkeypatch):
    import mmearth.pretrain as module
    recipe, saved = dataclasses.replace(SMALL, epochs=1, tasks=('lat',), save_every=1000), module.save
    monkeypatch.setattr(module, 'save', lambda *a: (signal.raise_signal(signal.SIGTERM), saved(*a))[1])
    run = pretrain(recipe, Store(tiny_store), tmp_path / 'last', progress=False)
    assert run.checkpoint.name == 'step-00000006' and run.updates == 6
    monkeypatch.setattr(module, 'resume', lambda trainer: (signal.raise_signal(signal.SIGTERM), 0)[1])
    with pytest.raises(Stopped, match='behind update 0 of 6'): pretrain(recipe, Store(tiny_store), tmp_path / 'first', progress=False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not checkpoints(tmp_path / 'first')


EARLY = '''
import builtins, signal
from mmearth.cli import main
found = builtins.__import__
def slow(name, *a, **k):
    if name == 'torch': signal.raise_signal(signal.SIGTERM)
    return found(name, *a, **k)
builtins.__import__ = slow
main()
'''


def test_a_signal_while_everything_is_imported(tiny_store, tmp_path):
    recipe = save_recipe(dataclasses.replace(SMALL, data=str(tiny_store)), tmp_path / 'r.yaml')
    p = subprocess.Popen([sys.executable, '-c', EARLY, 'pretrain', recipe, tmp_path / 'run'], stderr=subprocess.PIPE, text=True)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 75 and 'Traceback' not in said, said[-800:]


def spoil(path, how):
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(dict(flipped=whole[:middle] + bytes(255 - b for b in whole[middle:middle + 9]) + whole[middle + 9:], truncated=whole[:middle], empty=b'')[how])


@pytest.mark.parametrize('how', ['flipped', 'truncated', 'empty', 'gone'])
@pytest.mark.parametrize('file', ['model.safetensors', 'optimiser.safetensors', 'state.json', 'contract.json'])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(file, how, stopped, tmp_path, capsys):
    recipe, store, whole, parts = stopped
    out = tmp_path / 'run'
    shutil.copytree(parts, out)
    hurt = latest(out) / file
    if how == 'gone': hurt.unlink()
    else: spoil(hurt, how)
    run = pretrain(recipe, store, out, progress=False)
    assert same(weights(run.checkpoint), weights(whole.checkpoint)) and run.log.drop(columns=[*CLOCK]).equals(whole.log.drop(columns=[*CLOCK]))
    said = capsys.readouterr().err
    assert file in said and 'step-00000004.damaged' in said and (out / 'checkpoints' / 'step-00000004.damaged').is_dir()


@pytest.fixture(scope='module')
def stopped(tiny_store, tmp_path_factory):
    "A run that was stopped behind update 5, with checkpoints of 2 and 4; and what it should come to."
    folder, store = tmp_path_factory.mktemp('stopped'), Store(tiny_store)
    recipe = dataclasses.replace(SMALL, epochs=1, tasks=('lat', 'biome'), save_every=2, keep=2, log_every=1)
    whole = pretrain(recipe, store, folder / 'whole', progress=False)
    pretrain(recipe, store, folder / 'parts', until=5, progress=False)
    return recipe, store, whole, folder / 'parts'


def test_without_a_whole_checkpoint_nothing_is_begun_anew(stopped, tmp_path):
    recipe, store, _, parts = stopped
    shutil.copytree(parts, tmp_path / 'run')
    for c in checkpoints(tmp_path / 'run'): spoil(c / 'optimiser.safetensors', 'flipped')
    log = (tmp_path / 'run' / 'log.csv').read_text()
    for again in range(2):
        with pytest.raises(WeightsError, match='none of its checkpoints is whole .*optimiser.safetensors'): pretrain(recipe, store, tmp_path / 'run', progress=False)
    assert len(checkpoints(tmp_path / 'run')) == 2 and (tmp_path / 'run' / 'log.csv').read_text() == log


def test_an_encoder_that_travelled_alone_is_not_gone_on_with(stopped, tmp_path):
    recipe, store, _, parts = stopped
    encoder_alone(latest(parts), tmp_path / 'run' / 'checkpoints' / 'step-00000004')
    with pytest.raises(WeightsError, match='the encoder alone'): pretrain(recipe, store, tmp_path / 'run', progress=False)


@pytest.mark.parametrize('text,lost', [(b'6', 0), (b'6,24,1.5e-', 0), (b'step,sam', 4), (b'', 4), (b'\xff\xfe\x00rubbish', 4), (b'step,waited\n"', 4)])
def test_a_damaged_log_does_not_stop_a_run(text, lost, stopped, tmp_path):
    recipe, store, whole, parts = stopped
    shutil.copytree(parts, tmp_path / 'run')
    log = tmp_path / 'run' / 'log.csv'
    log.write_bytes((log.read_bytes() if not lost else b'') + text)
    run = pretrain(recipe, store, tmp_path / 'run', progress=False)
    assert same(weights(run.checkpoint), weights(whole.checkpoint)) and run.log.step.tolist() == list(range(1 + lost, 7)) and run.log.loss.notna().all()


def test_what_may_change_in_a_run(stopped, tmp_path):
    recipe, store, whole, parts = stopped
    shutil.copytree(parts, tmp_path / 'run')
    with pytest.raises(RecipeError, match='mask_ratio'): pretrain(dataclasses.replace(recipe, mask_ratio=0.5), store, tmp_path / 'run', progress=False)
    moved = dataclasses.replace(recipe, data='elsewhere', keep=5, save_every=3, log_every=2)
    run = pretrain(moved, store, tmp_path / 'run', progress=False)
    assert same(weights(run.checkpoint), weights(whole.checkpoint)) and run.log.step.tolist() == [1, 2, 3, 4, 6]


def test_two_runs_in_one_folder(stopped, tmp_path):
    recipe, store, _, parts = stopped
    shutil.copytree(parts, tmp_path / 'run')
    path = save_recipe(recipe, tmp_path / 'r.yaml')
    with alone(tmp_path / 'run'):
        done = subprocess.run([sys.executable, '-c', KILLED, path, store.root, tmp_path / 'run'], capture_output=True, text=True)
    assert done.returncode and 'another process is at work in this folder' in done.stderr, done.stderr[-500:]
    assert [c.name for c in checkpoints(tmp_path / 'run')] == ['step-00000002', 'step-00000004']


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tiny_store, tmp_path, monkeypatch):
    import mmearth.weights as module
    done, to_disk, rename = [], module._to_disk, Path.rename
    monkeypatch.setattr(module, '_to_disk', lambda path: (done.append(('disk', path.name)), to_disk(path))[1])
    monkeypatch.setattr(Path, 'rename', lambda self, target: (done.append(('name', Path(target).name)), rename(self, target))[1])
    pretrain(dataclasses.replace(SMALL, epochs=0), Store(tiny_store), tmp_path, progress=False)
    files = [name for what, name in done[:done.index(('name', 'step-00000000'))]]
    assert sorted(files) == ['contract.json', 'model.safetensors', 'optimiser.safetensors', 'state.json'] and done[-1] == ('disk', 'checkpoints')


def test_half_precision_learns_what_single_precision_learns(tiny_store, tmp_path):
    runs = {p: pretrain(dataclasses.replace(SMALL, epochs=3, log_every=1, precision=p), Store(tiny_store), tmp_path / p, progress=False) for p in ('fp32', 'bf16')}
    loss = {p: r.log.loss.to_numpy() for p, r in runs.items()}
    assert not np.array_equal(loss['fp32'], loss['bf16'])
    np.testing.assert_allclose(loss['bf16'], loss['fp32'], rtol=0.05)
    assert all(v.dtype == torch.float32 for v in weights(runs['bf16'].checkpoint).values()) and loss['bf16'][-1] < loss['bf16'][0]
    assert 0 < runs['fp32'].overhead < 1


def test_a_run_goes_on_with_the_kernels_it_was_begun_with(tiny_store, tmp_path, monkeypatch):
    recipe = dataclasses.replace(SMALL, epochs=1, tasks=('lat',), save_every=2)
    run = pretrain(recipe, Store(tiny_store), tmp_path / 'run', until=3, progress=False)
    began = run.model.execution
    assert began in ('numba', 'plain') and json.loads((run.checkpoint / 'state.json').read_text())['execution'] == began
    monkeypatch.setattr('mmearth.kernels._missing', lambda execution: 'No module named numba' if execution == 'numba' else '')
    if began == 'numba':
        with pytest.raises(RecipeError, match='begun with other kernels.*No module named numba'): pretrain(recipe, Store(tiny_store), tmp_path / 'run', progress=False)
    assert pretrain(recipe, Store(tiny_store), tmp_path / 'fresh', until=1, progress=False).model.execution == 'plain'


@pytest.mark.parametrize('part, value', [('mean', float('nan')), ('std', 0.), ('std', float('inf'))])
def test_statistics_that_cannot_scale_are_refused(tmp_path, part, value):
    root = write_store(tmp_path / 'tiles', 8, size=16)
    file = root / 'data_synthetic_v001_16_band_stats.json'
    told = json.loads(file.read_text())
    told['aster'][part][0] = value
    file.write_text(json.dumps(told))
    recipe = Recipe(batch=4, crop=16, epochs=1, decoder_width=32)
    with pytest.raises(StoreError, match='aster, elevation: its mean and deviation cannot scale') as caught: pretrain(recipe, Store(root), tmp_path / 'run', progress=False)
    assert file.name in str(caught.value) and '--statistics measured' in str(caught.value)
    packed = pack(Store(root), tmp_path / 'pack', statistics='measured')
    assert pretrain(recipe, Pack(packed), tmp_path / 'mended', progress=False).log.loss.notna().all()


def test_ctrl_c_ends_behind_a_checkpoint(tmp_path):
    root = write_store(tmp_path / 'tiles', 16, size=16)
    words = ['-m', 'mmearth.cli', 'pretrain', str(SMOKE), str(tmp_path / 'run'), '-p', f'data={root}', '-p', 'crop=16', '-p', 'batch=4', '-p', 'epochs=400']
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    log = tmp_path / 'run' / 'log.csv'
    while child.poll() is None and not (log.exists() and log.read_text().count('\n') > 1): time.sleep(.05)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 75 and 'goes on from there' in said, said[-500:]
    done = int(latest(tmp_path / 'run').name.split('-')[1])
    again = pretrain(load_recipe(SMOKE, data=str(root), crop=16, batch=4, epochs=400), Store(root), tmp_path / 'run', until=done + 1, progress=False)
    assert again.updates == done + 1


def test_the_tile_that_is_shown_has_maps_and_contrast(tiny_store):
    store, recipe = Store(tiny_store), dataclasses.replace(SMALL, batch=16)
    model, _ = build(recipe, store)
    feed = Feed(store, recipe, model.wanted, torch.device('cpu'))
    batch, mask, rows = feed.batch(0)
    pixel = [t for t in recipe.tasks if modality(t).level == 'pixel']
    for maps, contrast in ((0, 0.01), (1, 1.1), (2, 30)):  # water, land, snow: rows 3, 4, 5
        batch['sentinel2'][3 + maps] = contrast * torch.linspace(-1.7, 1.7, 56 * 56).reshape(56, 56)
    for t in pixel: batch['valid'][t][:] = False
    for t in pixel[:2]: batch['valid'][t][3:6] = True
    feed.batch = lambda position: (batch, mask, rows)
    truth, _, hidden = pictures(model.eval(), feed)
    mean, inverse = (table['sentinel2'][('l1c', 'l2a').index(store.levels[rows[4]])][:, None, None] for table in (feed.scale.mean, feed.scale.inverse))
    np.testing.assert_allclose(truth['sentinel2'], (batch['sentinel2'][4] / inverse + mean).numpy(), rtol=1e-5)
    np.testing.assert_array_equal(hidden, np.kron(mask[4].numpy().reshape(7, 7), np.ones((8, 8))) > 0)
    batch['valid'][pixel[2]][5] = True  # one more map is worth more than any contrast
    np.testing.assert_array_equal(pictures(model, feed)[2], np.kron(mask[5].numpy().reshape(7, 7), np.ones((8, 8))) > 0)
