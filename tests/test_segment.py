"Maps: counts, scores, U-Net, each published oddity and the linear readers, against independent computations and bad input."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmearth import finetune, segment, unet
from mmearth.convnext import SIZES, ConvNeXtV2
from mmearth.guard import Diverged
from mmearth.probe import Planes
from mmearth.weights import Contract, WeightsError

m = SimpleNamespace(**{**vars(finetune), **vars(unet), **vars(segment)})

BANDS = ('B2', 'B3', 'B4', 'B8', 'B8A')  # as the images have them
OWN = ('B2', 'B3', 'B4', 'B8A', 'B8')  # as the encoder wants them


def make_encoder(patch=8, stem='mmearth', bands=OWN, seed=0):
    torch.manual_seed(seed)
    stats = dict(sentinel2_l2a=dict(mean=[1000. + 100 * i for i in range(len(bands))], std=[300. + 10 * i for i in range(len(bands))]))
    return Contract('pico-test', bands, patch, stem, 'image', stats).encoder().eval()


def fields(n, size=16, seed=0, classes=3):
    "Images of fields whose brightness in every band follows from the class."
    rng = np.random.default_rng(seed)
    y = np.kron(rng.integers(0, classes, (n, size // 8, size // 8)), np.ones((8, 8), int))
    x = np.stack([700 + 400 * ((y + band) % classes) for band in range(len(BANDS))], 1) + rng.normal(0, 120, (n, len(BANDS), size, size))
    y[rng.random(y.shape) < 0.1] = -1
    return m.Scenes(x.clip(1).astype('uint16'), y)


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


# counts and scores

def test_tables_and_scores_agree_with_a_loop_and_scikit_learn():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(-1, 4, (5, 6, 7)), rng.integers(0, 4, (5, 6, 7))
    said[said == 2] = 1
    truth[truth == 2] = -1  # class 2 is neither true nor predicted; class 4 does not occur either
    tables = m.image_tables(torch.tensor(truth), torch.tensor(said), 5)
    slow = np.zeros((5, 5, 5), int)
    for i, r, c in np.ndindex(truth.shape):
        if truth[i, r, c] >= 0: slow[i, truth[i, r, c], said[i, r, c]] += 1
    assert np.array_equal(tables, slow)
    t, p, table = truth[truth >= 0], said[truth >= 0], tables.sum(0)
    seen = np.union1d(t, p)
    assert np.isclose(m.macro_iou(table), jaccard_score(t, p, labels=seen, average='macro'))
    assert np.isclose(m.macro_iou(table, 'zero'), jaccard_score(t, p, labels=range(5), average='macro', zero_division=0))
    each = m.iou(table)
    assert np.allclose(each[seen], jaccard_score(t, p, labels=seen, average=None)) and np.isnan(each[[2, 4]]).all()
    assert np.isclose(m.SCORES['accuracy'](table), (t == p).mean())


def test_a_class_only_predicted_counts_as_zero_in_both():
    table = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert m.macro_iou(table) == pytest.approx((3 / 4 + 0) / 2) and m.macro_iou(table, 'zero') == pytest.approx(3 / 4 / 3)
    with pytest.raises(ValueError, match="'left out' or 'zero', not 'nan'"): m.macro_iou(table, 'nan')


def test_intervals_redraw_images_or_blocks():
    rng = np.random.default_rng(1)
    tables = rng.integers(0, 30, (12, 3, 3))
    rows = {r['metric']: r for r in m.map_scores(tables, n=200, seed=5)}
    draws = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), 200)
    slow = [m.macro_iou(sum(k * t for k, t in zip(d, tables))) for d in draws]
    assert (rows['macro_iou']['low'], rows['macro_iou']['high']) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    blocks = np.repeat(list('abcd'), 3)
    summed = np.stack([tables[blocks == b].sum(0) for b in 'abcd'])
    assert m.map_scores(tables, blocks, 200, 5) == m.map_scores(summed, n=200, seed=5) != list(rows.values())
    with pytest.raises(ValueError, match='1 test images or blocks cannot be redrawn'): m.map_scores(tables, np.zeros(12))


@pytest.mark.parametrize('truth, said, told', [
    ([[[0, 3]]], [[[0, 1]]], 'truth holds 0 to 3; classes are 0 to 2'), ([[[0, -2]]], [[[0, 1]]], 'truth holds -2'),
    ([[[0, 1]]], [[[0, -1]]], 'prediction holds -1'), ([[[0, 1]]], [[[0]]], r'truth has shape \(1, 1, 2\), prediction \(1, 1, 1\)')])
def test_counts_refuse_what_they_cannot_place(truth, said, told):
    with pytest.raises(ValueError, match=told): m.image_tables(torch.tensor(truth), torch.tensor(said), 3)


# images

@pytest.mark.parametrize('change, told', [
    (dict(x=np.zeros((4, 16, 16), 'uint16')), 'images of shape'), (dict(y=np.zeros((4, 8, 8), int)), r'\(n, C, H, W\) and \(n, H, W\) are needed'),
    (dict(y=np.zeros((4, 16, 16))), 'labels are float64; whole numbers'), (dict(y=np.full((4, 16, 16), 255, 'uint8')), 'labels 255 in images 0, 1, 2, 3 are not among the 3 classes'),
    (dict(y=np.full((4, 16, 16), -2)), 'labels -2'), (dict(y=np.full((4, 16, 16), -1)), 'no pixel has a label'), (dict(level=['l2a'] * 3), '3 entries in level for 4 images'),
    (dict(blocks=np.zeros(5)), '5 entries in blocks'), (dict(x=np.zeros((0, 5, 16, 16)), y=np.zeros((0, 16, 16), int)), 'no images')])
def test_bad_parts_are_refused_by_name(change, told):
    with pytest.raises(ValueError, match=f'^train: .*{told}|^train: {told}'): m.scenes(fields(4)._replace(**change), 3, 'train')


def test_parts_may_be_objects_or_tuples():
    part = fields(4)
    thing = SimpleNamespace(x=part.x, y=part.y, level=np.array(['l2a', 'l1c', 'l2a', 'l2a']), bands=BANDS, classes=('a', 'b', 'c'))
    assert m.scenes(thing, 3).level[:2].tolist() == ['l2a', 'l1c'] and m.scenes(thing, 3).blocks is None
    assert m.scenes((part.x, part.y), 3).level == 'l2a'


def test_inputs_pick_bands_by_name_and_scale_by_the_contract():
    part, encoder = fields(3), make_encoder()
    part.x[0, :, :2] = 0
    x = m.Inputs(encoder.contract, BANDS)(part, [0, 2]).numpy()
    s = encoder.contract.stats['sentinel2_l2a']
    order = [0, 1, 2, 4, 3]
    expected = (part.x[[0, 2]][:, order].astype(float) - np.array(s['mean'])[:, None, None]) / np.array(s['std'])[:, None, None]
    expected[0, :, :2] = 0  # not measured
    assert np.allclose(x, expected, atol=1e-4)


def test_band_swap_exchanges_two_planes_and_nothing_else():
    part, c = fields(3), make_encoder().contract
    for stats in (None, m.dataset_stats(Planes(part.x, BANDS))):
        sound, swapped = (m.Inputs(c, BANDS, band_swap=s, stats=stats)(part, [0]) for s in (False, True))
        assert torch.equal(swapped, sound[:, [0, 1, 2, 4, 3]]) and not torch.equal(swapped, sound)
    rgb = make_encoder(bands=('B4', 'B3', 'B2')).contract
    assert m.Inputs(rgb, BANDS, band_swap=True).order == m.Inputs(rgb, BANDS).order == [0, 1, 2]


def test_task_stats_are_those_of_the_training_images():
    part, c = fields(70), make_encoder().contract
    x = m.Inputs(c, BANDS, stats=m.dataset_stats(Planes(part.x, BANDS)))(part, [1, 69]).numpy()
    raw = part.x[:, [0, 1, 2, 4, 3]].astype(float)
    expected = (raw - raw.mean((0, 2, 3), keepdims=True)) / raw.std((0, 2, 3), keepdims=True)
    assert np.allclose(x, expected[[1, 69]], atol=1e-4)
    published = m.learn(make_encoder(), part, None, 3, BANDS, 'unet-paper', epochs=1, progress=False)
    assert np.array_equal(published.inputs(part, [1, 69]).numpy(), x[:, [0, 1, 2, 4, 3]])
    told = {b: (900 + i, 300 + i) for i, b in enumerate(BANDS)}
    given = m.learn(make_encoder(), part, None, 3, BANDS, 'unet-paper', epochs=1, progress=False, stats=told)
    assert given.inputs.stats == told and m.learn(make_encoder(), part, part, 3, BANDS, 'unet', epochs=1, progress=False, stats=told).inputs.stats is None
    flat = part._replace(x=part.x.copy())
    flat.x[:, 3] = 7
    with pytest.raises(ValueError, match='band B8 of the dataset has mean 7 and spread 0'): m.learn(make_encoder(), flat, None, 3, BANDS, 'unet-paper', progress=False)
    hole = part._replace(x=part.x[:32].astype('float32'), y=part.y[:32])
    hole.x[5, 1, 3, 3] = np.nan
    with pytest.raises(Diverged, match='update 1: .* training images .*5'): m.learn(make_encoder(), hole, None, 3, BANDS, 'unet-paper', progress=False)


def test_images_that_do_not_fit_the_encoder_are_refused():
    part, c = fields(3), make_encoder().contract
    with pytest.raises(KeyError, match="no band 'B8A'"): m.Inputs(c, BANDS[:-1])
    with pytest.raises(ValueError, match='do not fit 5 names'): m.Inputs(c, BANDS)(part._replace(x=part.x[:, :4]), [0])
    with pytest.raises(WeightsError, match="no statistics for level 'l1c'"): m.Inputs(c, BANDS)(part._replace(level='l1c'), [0])


# the U-Net

def by_hand(w, x, encoder, depths, patch):
    "The U-Net of reference fact 3.8 from its tensors alone."
    def norm(x, name): return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), w[name + '.weight'], w[name + '.bias'], 1e-6).permute(0, 3, 1, 2)
    def conv(x, name, **how): return F.conv2d(x, w[name + '.weight'], w[name + '.bias'], **how)
    def block(x, name):
        y = norm(conv(x, name + '.conv_dw', padding=3, groups=x.shape[1]), name + '.norm').permute(0, 2, 3, 1)
        y = F.gelu(F.linear(y, w[name + '.mlp.fc1.weight'], w[name + '.mlp.fc1.bias']))
        g = (y ** 2).sum((1, 2), keepdim=True).sqrt()
        y = w[name + '.mlp.grn.weight'] * y * g / (g.mean(-1, keepdim=True) + 1e-6) + w[name + '.mlp.grn.bias'] + y
        return x + F.linear(y, w[name + '.mlp.fc2.weight'], w[name + '.mlp.fc2.bias']).permute(0, 3, 1, 2)
    k, full = patch // 8, None
    if encoder.stem_kind == 'mmearth':
        full = F.gelu(norm(conv(x, 'encoder.stem.0', padding=1), 'encoder.stem.1'))
        x = norm(conv(full, 'encoder.stem.3', stride=k, groups=full.shape[1]), 'encoder.stem.4')
    else: x = norm(conv(x, 'encoder.stem.0', stride=k), 'encoder.stem.1')
    outputs = [x]
    for s, depth in enumerate(depths):
        if s: x = conv(norm(x, f'encoder.stages.{s}.downsample.0'), f'encoder.stages.{s}.downsample.1', stride=2)
        for b in range(depth): x = block(x, f'encoder.stages.{s}.blocks.{b}')
        outputs.append(x)
    for i, (skip, times) in enumerate(((outputs[3], 2), (outputs[2], 2), (outputs[0], 2), (full, k))):
        x = x.repeat_interleave(times, 2).repeat_interleave(times, 3)
        x = F.gelu(norm(conv(x, f'up.{i}.1', padding=1), f'up.{i}.2'))
        if skip is not None: x = torch.cat([x, skip], 1)
    return conv(F.gelu(norm(conv(x, 'last.0', padding=1), 'last.1')), 'head')


@pytest.mark.parametrize('patch, stem', [(8, 'mmearth'), (16, 'mmearth'), (16, 'original')])
def test_unet_is_the_one_described(patch, stem):
    encoder = make_encoder(patch, stem)
    net = m.UNet(encoder, 3).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(2, 5, 2 * patch, 3 * patch)
        assert torch.allclose(net(x), by_hand(net.state_dict(), x, encoder, SIZES['pico-test'][0], patch), atol=1e-4)


def test_unet_counts_as_published():
    "4,183,127 with 640 of a LayerNorm that is made and never called (reference fact 3.1)."
    net = m.UNet(ConvNeXtV2('atto'), 7)
    assert sum(p.numel() for p in net.parameters()) + 2 * 320 == 4_183_127


def test_unet_starts_with_a_small_head():
    torch.manual_seed(0); full = m.UNet(make_encoder(), 3)
    torch.manual_seed(0); small = m.UNet(make_encoder(), 3, head_scale=1e-3)
    assert torch.allclose(small.head.weight, full.head.weight * 1e-3) and same(state(full.last), state(small.last))


@pytest.mark.parametrize('side', [(5, 9), (17, 31), (60, 60)])
def test_sides_need_not_be_multiples_of_the_patch(side):
    net = m.UNet(make_encoder(16), 3).eval()
    x = torch.randn(2, 5, *side)
    h, w = side
    more = F.pad(x.double(), (0, -w % 16, 0, -h % 16), mode='replicate').float()
    assert net(x).shape == (2, 3, h, w) and torch.allclose(net(x), net(more)[..., :h, :w])


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    net = m.UNet(make_encoder(), 3, drop_path=0.5)
    assert net.chances == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    block, x = net.encoder.stages[0].blocks[0], torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
        net.train()
        out = net._block(block, x.expand(2000, -1, -1, -1), 0.5)
        kept = (out != x).flatten(1).any(1)
        assert 0.45 < kept.float().mean() < 0.55 and torch.allclose(out[kept][0], (x + 2 * (y - x))[0], atol=1e-5)
        net.eval()
        assert torch.equal(net._block(block, x, 0.5), y)


# the protocol

def test_published_settings_and_their_schedule():
    s = m.PAPER
    assert (s.epochs, s.frozen, s.batch, s.accumulate, s.smoothing, s.weight_decay, s.layer_decay, s.drop_path) == (200, 50, 8, 4, 0, 0.3, 0.9, 0.1)
    assert s.lr == pytest.approx(1.25e-3) and s.min_lr == 1e-6
    short = replace(s, epochs=3, frozen=1)
    _, log = m.train_unet(make_encoder(), m.Inputs(make_encoder().contract, BANDS), fields(80), None, 3, short, progress=False)
    at = (np.arange(3) * 10 + 4) / 10 / 3  # ten batches of 8 an epoch; the second update begins at batch 4
    assert np.allclose(log.lr, 1e-6 + (1.25e-3 - 1e-6) * 0.5 * (1 + np.cos(np.pi * at)))


def trained(n=32, seed=0, encoder=None, val=None, **switches):
    encoder = encoder or make_encoder()
    settings = replace(m.PAPER, epochs=1, frozen=0, accumulate=2, scale='contract', band_swap=False) if not switches.get('of') else switches.pop('of')
    return m.train_unet(encoder, m.Inputs(encoder.contract, BANDS), fields(n), val, 3, replace(settings, **switches), seed, progress=False)


def test_training_repeats_by_seed_and_leaves_the_encoder_alone():
    encoder = make_encoder().train()
    before = state(encoder)
    a, b, c = (state(trained(seed=s, encoder=encoder)[0]) for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)
    assert same(before, state(encoder)) and encoder.training and all(p.requires_grad for p in encoder.parameters())


def test_frozen_epochs_leave_the_encoder_of_the_model_alone():
    encoder = make_encoder()
    frozen, free = trained(encoder=encoder, epochs=2, frozen=2)[0], trained(encoder=encoder, epochs=2, frozen=1)[0]
    assert same(state(encoder), state(frozen.encoder)) and not same(state(encoder), state(free.encoder))


def test_frozen_noise():
    def end(noise, drop): return state(trained(frozen=1, frozen_noise=noise, drop_path=drop)[0])
    assert same(end(False, 0.9), end(False, 0.)) and not same(end(True, 0.9), end(True, 0.))


def test_plain_encoder():
    net = m.UNet(make_encoder(), 3)
    mine = {id(p): n for n, p in net.named_parameters()}
    def group(settings): return {mine[id(p)]: (g['weight_decay'], g['scale']) for g in m.unet_groups(net, settings) for p in g['params']}
    plain, sound = group(m.PAPER), group(replace(m.PAPER, plain_encoder=False))
    assert plain.keys() == sound.keys() == set(mine.values())
    assert {v for n, v in plain.items() if n.startswith('encoder.')} == {(0., 1.)}
    assert {v for n, v in plain.items() if not n.startswith('encoder.')} == {(0.3, 1.), (0., 1.)}  # the layer decay of 0.9 acts on nothing
    for name, blocks_after in {'encoder.stem.0.weight': 6, 'encoder.stages.0.blocks.0.conv_dw.weight': 5, 'encoder.stages.1.downsample.1.weight': 4, 'encoder.stages.2.blocks.0.mlp.fc1.weight': 3,
                               'encoder.stages.2.blocks.1.mlp.fc1.weight': 2, 'encoder.stages.3.blocks.0.conv_dw.weight': 1, 'up.0.1.weight': 0, 'head.weight': 0}.items():
        assert sound[name] == pytest.approx((0.3, 0.9 ** blocks_after)), name
    assert sound['encoder.stages.0.blocks.0.mlp.grn.weight'] == pytest.approx((0., 0.9 ** 5)) and sound['head.bias'] == (0., 1.)


def test_layer_decay_acts_only_without_the_plain_encoder():
    assert same(state(trained(layer_decay=0.9)[0]), state(trained(layer_decay=0.1)[0]))
    assert not same(state(trained(layer_decay=0.9, plain_encoder=False)[0]), state(trained(layer_decay=0.1, plain_encoder=False)[0]))


def test_last_checkpoint_or_the_best():
    val = fields(8, seed=9)
    last, log = trained(epochs=4, last_checkpoint=True, blr=0.3)
    best, log = trained(epochs=4, last_checkpoint=False, val=val, blr=0.3)
    inputs = m.Inputs(make_encoder().contract, BANDS)
    def score(net): return m.macro_iou(m.tables_of(net, inputs, val, 3).sum(0))
    assert score(best) == pytest.approx(log.macro_iou.max()) and score(last) == pytest.approx(log.macro_iou.iloc[-1])
    with pytest.raises(ValueError, match='validation images are needed'): trained(last_checkpoint=False)


def test_the_best_epoch_is_put_back(monkeypatch):
    seen, said = [], iter([0.1, 0.9, 0.2, 0.9])
    monkeypatch.setattr(unet, 'tables_of', lambda model, *_, **__: seen.append(state(model)) or np.zeros((1, 3, 3)))
    monkeypatch.setattr(unet, 'macro_iou', lambda table: next(said))
    best, log = trained(epochs=4, last_checkpoint=False, val=fields(8))
    assert same(state(best), seen[1]) and not same(seen[1], seen[3]) and log.macro_iou.tolist() == [0.1, 0.9, 0.2, 0.9]


def test_drop_leftover():
    rng, s = np.random.default_rng(0), replace(m.PAPER, batch=4, accumulate=3)
    for n, updates in ((12, 1), (23, 1), (27, 2)):
        dropped, kept = (m.updates_of(rng.permutation(n), replace(s, drop_leftover=d)) for d in (True, False))
        assert [[len(b) for b in u] for u in dropped] == [[4] * 3] * updates
        rows = np.concatenate([b for u in kept for b in u])
        assert sorted(rows) == list(range(n)) and max(len(u) for u in kept) <= 3
    with pytest.raises(ValueError, match='11 images are less than one update of 4 x 3'): trained(11, batch=4, accumulate=3)


def test_augmentation_turns_images_with_their_labels():
    rng = np.random.default_rng(0)
    for h, w, ways in ((4, 4, 8), (4, 6, 4)):
        y = torch.arange(h * w).view(1, h, w).repeat(200, 1, 1)
        which = m.drawn_turns(200, h == w, rng)
        x, z = m.turned(torch.stack([y, -y], 1).float(), which), m.turned(y, which)
        assert torch.equal(x[:, 0].long(), z) and torch.equal(x[:, 1].long(), -z) and len({tuple(t.ravel().tolist()) for t in z}) == ways
    assert not same(state(trained(augment=True)[0]), state(trained(augment=False)[0]))


@pytest.mark.parametrize('bad', [dict(epochs=0), dict(batch=0), dict(frozen=201), dict(frozen=-1), dict(blr=0.), dict(blr=float('nan')), dict(scale='task'), dict(drop_path=1.), dict(smoothing=-0.1)])
def test_settings_that_cannot_be(bad):
    with pytest.raises(ValueError, match=f'UNetSettings: .*{next(iter(bad.values()))}'): replace(m.PAPER, **bad)


def test_loss_skips_what_is_not_known_and_smooths():
    logits, y = torch.randn(2, 3, 4, 4), torch.randint(-1, 3, (2, 4, 4))
    assert torch.allclose(m.pixel_loss(logits, y), F.cross_entropy(logits.permute(0, 2, 3, 1)[y >= 0], y[y >= 0]), atol=1e-6)
    p = logits.permute(0, 2, 3, 1)[y >= 0].log_softmax(-1)
    assert torch.allclose(m.pixel_loss(logits, y, 0.2), -(0.8 * p.gather(1, y[y >= 0][:, None])[:, 0] + 0.2 * p.mean(-1)).mean(), atol=1e-6)
    assert m.pixel_loss(logits, torch.full_like(y, -1)) == 0


def test_a_loss_that_is_not_finite_names_update_and_images():
    part, encoder = fields(8), make_encoder()
    inputs = m.Inputs(encoder.contract, BANDS, stats={b: (0, 1) for b in BANDS})
    part = part._replace(x=part.x.astype('float32'))
    part.x[6, 0, 2, 2] = np.inf
    settings = replace(m.PAPER, epochs=1, frozen=0, batch=2, accumulate=1)
    order = m.updates_of(np.random.default_rng(3).permutation(8), settings)
    step = next(i for i, (rows,) in enumerate(order) if 6 in rows)
    named = ', '.join(map(str, sorted(order[step][0])))
    with pytest.raises(Diverged, match=f'update {step + 1}: the loss is nan on training images {named};'): m.train_unet(encoder, inputs, part, None, 3, settings, 3, progress=False)


# linear readers

@pytest.mark.parametrize('size', [(16, 16), (13, 21)])
def test_features_of_pixels_are_those_of_the_enlarged_maps(size):
    encoder = make_encoder(16)
    maps, inputs = m.StageMaps(encoder), m.Inputs(encoder.contract, BANDS)
    part = fields(3, 24)
    part = part._replace(x=part.x[..., :size[0], :size[1]], y=part.y[:, :size[0], :size[1]])
    places = [np.arange(size[0] * size[1]), np.array([], int), np.array([5, 77])]
    with torch.no_grad():
        found, x = m.pixel_features(maps, inputs, part, places, batch=2, progress=False), m.padded(inputs(part, [0, 2]), 16)
        y, full = encoder.stem(x), []
        for stage in encoder.stages:
            y = stage(y)
            z = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
            full.append(F.interpolate(z, x.shape[-2:], mode='bilinear'))
    full = torch.cat(full, 1)[..., :size[0], :size[1]].flatten(2).transpose(1, 2).numpy()
    assert np.allclose(found, np.concatenate([full[0], full[1][[5, 77]]]), atol=1e-4)


def test_pixels_are_drawn_with_equal_chance():
    y = np.full((3, 10, 10), -1)
    y[0], y[1, :5] = 0, 1
    rng = np.random.default_rng(0)
    counts = np.zeros(200)
    for _ in range(2000):
        a, b, c = m.draw_pixels(y, 30, rng)
        assert len(a) + len(b) == 30 and not len(c) and b.max(initial=0) < 50
        counts[a] += 1; counts[100 + b] += 1
    share = counts[:150] / 2000
    assert abs(share.mean() - 0.2) < 1e-9 and abs(share[:100].mean() - 0.2) < 0.005 and abs(share - 0.2).max() < 0.045


@pytest.mark.parametrize('classes', [2, 3])
def test_reader_is_the_regression_of_scikit_learn(classes):
    encoder, part, val = make_encoder(), fields(12, classes=classes), fields(6, seed=1, classes=classes)
    inputs = m.Inputs(encoder.contract, BANDS)
    head, log = m.fit_head(m.PixelMaps(), inputs, part, val, classes + 1, grid=(1e-4, 1.), progress=False)  # one more class than there is
    x, v = (inputs(p, range(len(p.x))).permute(0, 2, 3, 1).numpy() for p in (part, val))
    scores = []
    for C in (1e-4, 1.):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-4, max_iter=2000)).fit(x[part.y >= 0].astype(float), part.y[part.y >= 0])
        scores.append(jaccard_score(val.y[val.y >= 0], model.predict(v[val.y >= 0]), average='macro'))
    assert np.allclose(log.macro_iou, scores, atol=2e-3)
    best = head(inputs(val, range(6))).argmax(1).numpy()
    assert np.isclose(jaccard_score(val.y[val.y >= 0], best[val.y >= 0], average='macro'), log.macro_iou.max()) and best.max() < classes


def test_readers_refuse_what_they_cannot_learn():
    encoder, part = make_encoder(), fields(4)
    inputs, one = m.Inputs(encoder.contract, BANDS), part._replace(y=np.where(part.y >= 0, 1, -1))
    with pytest.raises(ValueError, match='all .* training pixels are of class 1'): m.fit_head(m.PixelMaps(), inputs, one, part, 3, progress=False)
    with pytest.raises(ValueError, match='validation images are needed'): m.fit_head(m.PixelMaps(), inputs, part, None, 3, progress=False)
    encoder.stem[0].weight.data[0, 0] = float('nan')
    with pytest.raises(ValueError, match='features are not finite'): m.fit_head(m.StageMaps(encoder), inputs, part, part, 3, progress=False)


# all of it

def test_tables_do_not_depend_on_the_batch():
    part, encoder = fields(7), make_encoder()
    net, inputs = m.UNet(encoder, 3), m.Inputs(encoder.contract, BANDS)
    a, b = (m.tables_of(net, inputs, part, 3, batch=k) for k in (2, 16))
    assert np.array_equal(a, b) and a.sum((1, 2)).tolist() == (part.y >= 0).sum((1, 2)).tolist()


@pytest.mark.parametrize('protocol', m.MAP_PROTOCOLS)
def test_every_protocol_gives_rows_and_learns_fields(protocol):
    encoder = make_encoder()
    before = state(encoder)
    more = {} if protocol in ('pixels', 'segmentation') else dict(epochs=4, settings=replace(m.PAPER if protocol == 'unet-paper' else m.SOUND, blr=0.1, head_scale=1.))
    tests = dict(near=fields(6, seed=2), far=(*fields(8, seed=3), )[:2] + ('l2a', np.arange(8) // 2))
    rows = m.segment(encoder, fields(32), fields(8, seed=1), tests, list('abc'), protocol, bands=BANDS, task='t', run_id='r', fraction=0.5, progress=False, **more)
    assert list(rows) == ['task', 'protocol', 'fraction', 'seed', 'split', 'metric', 'value', 'low', 'high', 'run_id', 'n_train', 'n_test', 'chosen']
    assert rows.split.tolist() == ['near'] * 3 + ['far'] * 3 and rows.metric.tolist() == list(m.SCORES) * 2
    assert set(rows.protocol) == {protocol} and set(rows.n_train) == {32} and set(rows.n_test) == {6, 8} and set(rows.fraction) == {0.5}
    assert ((rows.low <= rows.value) & (rows.value <= rows.high)).all()
    assert rows[rows.metric == 'accuracy'].value.min() > 0.6  # a third by chance
    assert same(before, state(encoder)) and all(p.requires_grad for p in encoder.parameters())


def test_what_cannot_be_asked():
    part = fields(8)
    def ask(**k): return m.segment(make_encoder(), part, part, dict(test=part), 3, **dict(bands=BANDS, progress=False) | k)
    with pytest.raises(ValueError, match="unknown protocol 'svm'; there are pixels"): ask(protocol='svm')
    with pytest.raises(ValueError, match='pixels is solved, not trained'): ask(protocol='pixels', epochs=3)
    with pytest.raises(ValueError, match='no test split'): m.segment(make_encoder(), part, part, {}, 3, bands=BANDS)
    with pytest.raises(ValueError, match='^test: labels 2 in images'): m.segment(make_encoder(), part._replace(y=part.y.clip(-1, 1)), part._replace(y=part.y.clip(-1, 1)), dict(test=part), 2, bands=BANDS)


def test_band_names_may_come_with_the_images():
    part = fields(8)
    thing = SimpleNamespace(x=part.x[:, ::-1].copy(), y=part.y, bands=BANDS[::-1], level='l2a')
    a = m.segment(make_encoder(), thing, thing, dict(test=thing), 3, 'pixels', progress=False)
    b = m.segment(make_encoder(), part, part, dict(test=part), 3, 'pixels', bands=BANDS, progress=False)
    assert np.allclose(a.value, b.value)
