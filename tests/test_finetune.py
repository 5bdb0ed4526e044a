"Fine-tuning: every oddity of the published code alone, and what must not happen."
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from mmearth import finetune as f
from mmearth.baselines import untrained
from mmearth.probe import Planes, probe

NAMES = ('B2', 'B4', 'B8A', 'B8')
PLAIN = f.Protocol(epochs=2, batch=8, warmup_epochs=0, drop_path=0., augment=False, scale='dataset')


def data(n, seed, side=16):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    return Planes((rng.gamma(9, 100, (n, 4, side, side)) * (1 + y[:, None, None, None])).astype('uint16'), NAMES), y


@pytest.fixture(scope='module')
def encoder():
    made = untrained(data(30, 0)[0], size='pico-test')
    for name, p in made.named_parameters():
        if 'grn' in name: torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    return made


class Recorder:
    "An optimiser that only writes down what it is asked to do."
    def __init__(self, groups): self.param_groups, self.lrs, self.gradients = groups, [], []
    def step(self):
        self.lrs.append([g['lr'] for g in self.param_groups])
        self.gradients.append([p.grad.clone() for g in self.param_groups for p in g['params']])
    def zero_grad(self, set_to_none=True):
        for g in self.param_groups:
            for p in g['params']: p.grad = None


def inputs_of(encoder, protocol, images): return f.Inputs(encoder.contract, band_swap=protocol.band_swap, stats=f.dataset_stats(images) if protocol.scale == 'dataset' else None)


def run(encoder, protocol, n=30, epochs=1):
    "Gradients and rates of the updates of some epochs, nothing learned."
    images, y = data(n, 0)
    torch.manual_seed(0)
    model = f.Classifier(encoder, 3, protocol)
    model.train()
    recorder, inputs, generator = Recorder(model.groups()), inputs_of(encoder, protocol, images), torch.Generator().manual_seed(0)
    for epoch in range(epochs): f._one_epoch(model, recorder, epoch, lambda rows: inputs(images, rows), model, torch.tensor(y), generator, range(n), tqdm(disable=True))
    return recorder, model


def test_learning_rates_are_those_of_the_published_code(encoder):
    p = replace(f.PROTOCOLS['finetune-paper'], batch=4, accumulate=3, epochs=5)
    recorder, model = run(encoder, p, 30, 5)
    passes, wanted = 30 // 4, []  # seven micro-batches, one left over
    for epoch in range(5):
        for step in range(passes - passes % 3):
            if step % 3 == 0: wanted.append(1e-6 + (p.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step / passes + epoch) / 5)))
    assert len(recorder.lrs) == len(wanted) == 10
    for lrs, lr in zip(recorder.lrs, wanted): assert np.allclose(lrs, [lr * g['scale'] for g in recorder.param_groups])


def published_layer(name, depths):
    "optim_factory of the published code, under its names."
    if name.startswith('downsample_layers'): return sum(depths[:int(name.split('.')[1])]) + 1
    if name.startswith('stages'): return sum(depths[:int(name.split('.')[1])]) + int(name.split('.')[2]) + 1
    return sum(depths) + 1


def test_layers_as_published_and_right(encoder):
    depths = [2, 2, 6, 2]
    theirs = {'stem.0.weight': 'initial_conv.0.weight', 'stem.3.bias': 'stem.0.bias', 'norm.weight': 'norm.weight', 'head.bias': 'head.bias'}
    for i in range(4):
        for j in range(depths[i]): theirs[f'stages.{i}.blocks.{j}.mlp.fc1.weight'] = f'stages.{i}.{j}.pwconv1.weight'
        if i: theirs[f'stages.{i}.downsample.1.weight'] = f'downsample_layers.{i - 1}.1.weight'
    for ours, name in theirs.items(): assert f.layer_id('encoder.' + ours, depths, 'published') == published_layer(name, depths), ours
    for i in range(1, 4): assert f.layer_id(f'encoder.stages.{i}.downsample.0.weight', depths) == f.layer_id(f'encoder.stages.{i}.blocks.0.norm.weight', depths)
    groups = f.Classifier(encoder, 3, f.Protocol(weight_decay=0.3)).groups()
    assert all((g['weight_decay'] == 0.3) == all(p.ndim > 1 for p in g['params']) for g in groups)
    assert max(g['scale'] for g in groups) == 1 and min(g['scale'] for g in groups) == pytest.approx(0.9 ** 5)


@pytest.mark.parametrize('patch, side, places', [(8, 56, 6), (8, 64, 7), (8, 32, 3), (8, 120, 14), (16, 112, 7), (16, 64, 4), (16, 32, 2), (16, 120, 7)])
def test_unpadded_maps_are_those_of_the_dense_network(patch, side, places):
    encoder = untrained(data(4, 0)[0], size='pico-test', patch=patch)
    model, padded = f.Classifier(encoder, 3, replace(PLAIN, unpadded_stem=True)).eval(), f.Classifier(encoder, 3, PLAIN).eval()
    x = torch.randn(1, 4, side, side)
    assert model.encoder(x).shape[-1] == places and padded.encoder(x).shape[-1] == side // patch
    first = F.conv2d(x, encoder.stem[0].weight, encoder.stem[0].bias)
    assert torch.allclose(model.encoder.stem[0](x), first, atol=1e-5)
    assert encoder.stem[0].padding == (1, 1)


def test_bands_are_swapped_and_nothing_else(encoder):
    images, _ = data(6, 0)
    right, swapped = (inputs_of(encoder, replace(PLAIN, band_swap=s), images)(images, np.arange(6)) for s in (False, True))
    assert torch.equal(swapped, right[:, [0, 1, 3, 2]])
    x = images.x.astype(float)
    assert np.allclose(right, (x - x.mean((0, 2, 3))[:, None, None]) / x.std((0, 2, 3))[:, None, None], atol=1e-4)


def test_a_dataset_of_two_levels_has_one_mean_and_spread_of_what_was_measured():
    images, _ = data(6, 0)
    x = images.x.copy()
    x[2, :, :3] = 0  # not measured
    found = f.dataset_stats(Planes(x, NAMES, ['l1c', 'l2a'] * 3))
    for band, (mean, std) in found.items():
        measured = x[:, NAMES.index(band)][x[:, NAMES.index(band)] > 0].astype(float)
        assert (mean, std) == pytest.approx((measured.mean(), measured.std()), rel=1e-12)
    assert list(found) == list(NAMES)
    for (mean, std), (m, s) in zip(found.values(), f.dataset_stats(Planes(x / 10_000, NAMES, unit='reflectance')).values()): assert (mean, std) == pytest.approx((m, s), rel=1e-5)


def test_images_of_other_order_and_unit_give_the_same_input(encoder):
    images, _ = data(6, 0)
    for stats in (None, f.dataset_stats(images)):
        want = f.Inputs(encoder.contract, stats=stats)(images, [4, 1])
        other = SimpleNamespace(x=images.x[:, ::-1].astype('float32') / 10_000, level='L2A')
        assert torch.allclose(f.Inputs(encoder.contract, NAMES[::-1], 'reflectance', stats=stats)(other, [4, 1]), want, atol=1e-4)
    with pytest.raises(ValueError, match='do not fit 3 names'): f.Inputs(encoder.contract)(Planes(images.x, NAMES[:3]), [0])
    with pytest.raises(ValueError, match='do not fit 4 names'): f.Inputs(encoder.contract)(SimpleNamespace(x=images.x[:, :2], level='l2a'), [0])


@pytest.mark.parametrize('side, ways', [((5, 5), 8), ((5, 7), 4)])
def test_turned_is_what_numpy_turns(side, ways):
    x = torch.randn(16, 2, *side)
    which = torch.arange(16) % 8
    found, seen = f.turned(x, which), set()
    for image, k, got in zip(x.numpy(), which.tolist(), found.numpy()):
        want = np.rot90(image[..., ::-1] if k & 4 else image, k & 3 if side[0] == side[1] else k & 2, (-2, -1))
        assert np.array_equal(got, want)
    for got in f.turned(torch.arange(1. * math.prod(side)).view(1, *side).repeat(8, 1, 1), torch.arange(8)): seen.add(tuple(got.flatten().tolist()))
    assert len(seen) == ways


def test_a_frozen_encoder_in_training_mode_is_noisy(encoder):
    x = torch.randn(4, 4, 16, 16)
    noisy, still = (f.Classifier(encoder, 3, replace(PLAIN, frozen=True, drop_path=0.5, train_mode_probe=t)).train() for t in (True, False))
    assert not torch.equal(noisy.pooled(x), noisy.pooled(x)) and torch.equal(still.pooled(x), still.pooled(x))
    assert torch.equal(noisy.eval().pooled(x), still.pooled(x))
    assert {n for n, p in noisy.named_parameters() if p.requires_grad} == {'head.weight', 'head.bias'}


def test_rates_of_drop_path_grow_with_depth(encoder):
    model = f.Classifier(encoder, 3, replace(PLAIN, drop_path=0.4)).train()
    for number, block in enumerate(b for s in model.encoder.stages for b in s.blocks):
        x = torch.randn(2000, block.norm.weight.numel(), 1, 1)
        with torch.no_grad(): skipped = (block(x) == x).flatten(1).all(1).float().mean().item()
        assert skipped == pytest.approx(0.1 * number, abs=0.05)


def test_leftovers(encoder):
    sound, published = (run(encoder, replace(PLAIN, accumulate=2, drop_leftover=d))[0] for d in (False, True))
    assert len(sound.lrs) == 2 and len(published.lrs) == 1  # 30 images: 16 and 14, or 16
    assert all(torch.equal(a, b) for a, b in zip(sound.gradients[0], published.gradients[0]))


def test_accumulation_is_one_large_batch(encoder):
    small, large = run(encoder, replace(PLAIN, batch=8, accumulate=4))[0], run(encoder, replace(PLAIN, batch=32, accumulate=1))[0]
    assert len(small.gradients) == len(large.gradients) == 1
    for a, b in zip(small.gradients[0], large.gradients[0]): assert torch.allclose(a, b, atol=1e-6, rtol=1e-3)


def test_the_last_or_the_best_epoch(encoder):
    train, val = data(32, 0), data(24, 5)
    last, best = (f.train_classifier(encoder, train, val, 3, replace(PLAIN, epochs=5, blr=0.1, last_checkpoint=l), progress=False) for l in (True, False))
    values = [row['val'] for row in best.log]
    assert last.epoch == 5 and all(math.isnan(row['val']) for row in last.log)
    assert [r['loss'] for r in last.log] == [r['loss'] for r in best.log]
    assert values[best.epoch - 1] == max(values)
    assert (best.answers(val[0]).argmax(1) == val[1]).mean() == pytest.approx(max(values))


def test_numbers_of_the_published_recipe(encoder):
    p = f.PROTOCOLS['linear-paper']
    assert (p.epochs, p.batch * p.accumulate, p.weight_decay, p.layer_decay, p.drop_path, p.smoothing, p.warmup_epochs, p.min_lr, p.augment) == (100, 1024, 0.3, 0.9, 0.1, 0.2, 0, 1e-6, False)
    model = f.Classifier(encoder, 400, p)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not model.head.bias.any()
    assert {m.eps for m in model.encoder.modules() if isinstance(m, f.GRN)} == {1e-4} and {m.eps for m in encoder.modules() if isinstance(m, f.GRN)} == {1e-6}
    assert torch.equal(model.norm.weight, torch.ones(128)) and model.norm.eps == 1e-6


@pytest.mark.parametrize('change, computed_once', [(dict(), False), (dict(drop_path=0.), True), (dict(train_mode_probe=False), True)])
def test_features_are_computed_once_where_nothing_is_random(encoder, change, computed_once, monkeypatch):
    calls = []
    forward = type(encoder).forward
    monkeypatch.setattr(type(encoder), 'forward', lambda self, x, *a, **k: calls.append(len(x)) or forward(self, x, *a, **k))
    p = replace(f.PROTOCOLS['linear-paper'], batch=8, accumulate=1, epochs=4, **change)
    f.train_classifier(encoder, data(32, 0), data(16, 1), 3, p, progress=False)
    assert sum(calls) == (32 if computed_once else 32 * 4)


def test_once_or_each_epoch_is_the_same_head(encoder, monkeypatch):
    p = replace(f.PROTOCOLS['linear-paper'], batch=8, accumulate=1, epochs=3, drop_path=0., blr=1.)
    once = f.train_classifier(encoder, data(32, 0), data(16, 1), 3, p, progress=False).model.head.weight
    each = f.train_classifier(encoder, data(32, 0), data(16, 1), 3, replace(p, drop_path=1e-12), progress=False).model.head.weight
    assert torch.allclose(once, each, atol=1e-5) and once.abs().max() > 1e-3


def test_rows_are_those_of_probe_and_repeat(encoder):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    train, val, test = data(40, 0), data(30, 1), data(30, 2)
    rows = [f.finetune(encoder, train, val, dict(test=test, places=(*test, np.arange(30) // 3)), 'single', ['a', 'b', 'c'], replace(PLAIN, augment=True, drop_path=0.2), seed=3, device='cpu', progress=False, fraction=0.5, task='t', run_id='r') for _ in range(2)]
    rng = np.random.default_rng(0)
    probed = probe(rng.normal(size=(30, 4)), train[1][:30], rng.normal(size=(30, 4)), val[1], dict(test=(rng.normal(size=(30, 4)), test[1])), fractions=(1.0,))
    assert list(rows[0]) == list(probed) and rows[0].equals(rows[1])
    assert rows[0].n_train.unique().item() in (19, 20, 21) and rows[0].protocol.unique().item() == 'finetune-own' and len(rows[0]) == 4
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    other = f.finetune(encoder, train, val, dict(test=test), 'single', 3, replace(PLAIN, blr=0.1), seed=4, device='cpu', progress=False)
    assert not np.array_equal(other.attrs['log'][0]['loss'], rows[0].attrs['log'][0]['loss'])


def test_arrays_and_several_classes(encoder):
    (x, y), (v, w) = data(40, 0), data(30, 1)
    many = lambda y: np.stack([y == 0, y < 2, np.arange(len(y)) % 7 == 0], 1)
    rows = f.finetune(encoder, (x.x[:, ::-1] / 10_000, many(y)), (v.x[:, ::-1] / 10_000, many(w)), dict(test=(v.x[:, ::-1] / 10_000, many(w))), 'multi', 3, replace(f.PROTOCOLS['finetune-paper'], batch=8, accumulate=2),
                      epochs=1, device='cpu', progress=False, bands=NAMES[::-1], unit='reflectance')
    assert set(rows.metric) == {'micro_f1', 'micro_f1_tuned', 'macro_f1', 'map_micro', 'map_macro'} and rows.value.between(0, 1).all()


def test_bad_input_is_named(encoder):
    train, val = data(20, 0), data(10, 1)
    def call(t=train, v=val, kind='single', classes=3, protocol=PLAIN, **kw): return f.finetune(encoder, t, v, {}, kind, classes, protocol, device='cpu', progress=False, **kw)
    with pytest.raises(ValueError, match='val labels must be whole numbers from 0 to 2'): call(v=(val[0], val[1] + 1))
    with pytest.raises(ValueError, match='train labels must be whole numbers'): call(t=(train[0], train[1] / 2))
    with pytest.raises(ValueError, match='train labels hold 0.3; for several classes each must be 0 or 1'): call(t=(train[0], np.full((20, 3), 0.3)), kind='multi')
    with pytest.raises(ValueError, match='val has no images'): call(v=(val[0].x[:0], val[1][:0]), bands=NAMES)
    with pytest.raises(ValueError, match='Protocol: blr must be positive, not nan'): replace(PLAIN, blr=math.nan)
    with pytest.raises(ValueError, match='20 images and 19 labels'): call(t=(train[0], train[1][:19]))
    with pytest.raises(ValueError, match=r'train labels are \(20,\)'): call(kind='multi')
    with pytest.raises(ValueError, match='kind must be'): call(kind='segment')
    with pytest.raises(ValueError, match='there are finetune, finetune-paper'): call(protocol='linear_paper')
    with pytest.raises(ValueError, match='linear-paper-few'): call(protocol='linear-paper')
    with pytest.raises(KeyError, match='B8A'): call(t=(train[0].x[:, :2], train[1]), bands=('B2', 'B4'))
    x = train[0].x.astype('float32')
    x[7, 1, 2, 2] = np.nan
    with pytest.raises(f.Diverged, match='epoch 1, update .* img7'): call(t=(x, train[1]), bands=NAMES, ids=[f'img{i}' for i in range(20)], stats={b: (900, 300) for b in NAMES})
    with pytest.raises(KeyError, match='stats has no band B8'): call(stats={b: (900, 300) for b in NAMES[:3]})
    x = train[0].x.copy()
    x[:, 1] = 800
    with pytest.raises(ValueError, match='band B4 of the dataset has mean 800 and spread 0'): call(t=(x, train[1]), bands=NAMES)
    with pytest.raises(ValueError, match='spread nan; a band that is constant or not finite'): call(stats={b: (900, math.nan) for b in NAMES})
