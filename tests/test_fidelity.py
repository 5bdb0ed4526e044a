"""Each published behaviour against its description, computed another way; none of them is on by default."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm

from mmearth.convnext import ConvNeXtV2
from mmearth.dataset import Scale, decode
from mmearth.fidelity import FILLED, SWITCHES, decayed, published_view, switches, wide_init
from mmearth.masking import patchify, random_mask
from mmearth.modalities import TASKS, modality, select
from mmearth.mpmae import MPMAE
from mmearth.pretrain import Trainer, build, parameter_groups, pretrain
from mmearth.recipe import Recipe, RecipeError, load_recipe
from mmearth.store import Store

WANTED = {t: modality(t).train_bands for t in TASKS}
SMALL = Recipe(batch=4, epochs=1, decoder_width=32, blr=6e-3)


@pytest.fixture(scope='module')
def tiles(tiny_store):
    store = Store(tiny_store)
    raw = {k: torch.from_numpy(v) for k, v in store.read(range(12), list(WANTED)).items()}
    raw['sentinel2'][0, :, :4] = 0
    raw['aster'][1, 0, 3:5] = -32768
    raw['canopy_height_eth'][2, :, 7] = 127
    raw['canopy_height_eth'][3, :, 9] = -128
    raw['esa_worldcover'][4, 0, :2] = 0
    raw['sentinel1'][5] = -torch.inf
    return store, raw, store.levels[:12], Scale(store.stats, WANTED, {m: store.bands(m) for m in WANTED})


def view(tiles, names):
    store, raw, levels, scale = tiles
    return published_view(decode(raw, levels, scale), raw, levels, scale, switches(names))


def test_sound_is_the_default_and_paper_is_all():
    assert Recipe().fidelity == () == Recipe(fidelity='sound').fidelity == Recipe(fidelity=[]).fidelity
    assert Recipe(fidelity='paper').fidelity == tuple(SWITCHES)
    for bad in ('papers', ['wide_init', 'x'], 3, [3]):
        with pytest.raises(RecipeError, match='^fidelity: .* known are sound, paper'): Recipe(fidelity=bad)
    for recipe in Path('nbs/runs/recipes').glob('*.yaml'): assert load_recipe(recipe).fidelity == (), recipe


def test_sound_changes_nothing(tiles):
    store, raw, levels, scale = tiles
    plain, seen = decode(raw, levels, scale), view(tiles, 'sound')
    assert all(torch.equal(plain[t], seen[t]) and torch.equal(plain['valid'][t], seen['valid'][t]) for t in WANTED)


@pytest.mark.parametrize('names', [('nodata_after_scaling',), ('missing_as_mean',), ('nodata_after_scaling', 'missing_as_mean')])
def test_missing_data_as_described(tiles, names):
    "By a loop over tiles and bands in float64, in the order of the published loader."
    store, raw, levels, _ = tiles
    seen = view(tiles, names)
    for name in FILLED:
        m, places = modality(name), select(WANTED[name], store.bands(name))
        for i, level in enumerate(levels):
            s = store.stats[m.stats_key(level)]
            for c, at in enumerate(places):
                x = raw[name][i, at].double().numpy() if raw[name].dtype != torch.uint16 else raw[name][i, at].numpy().astype(float)
                with np.errstate(invalid='ignore'): z = (x - s['mean'][at]) / s['std'][at]
                if 'nodata_after_scaling' not in names: z[np.isin(x, [v for v in m.nodata_stored if np.isfinite(v)])] = np.nan
                z[~np.isfinite(z)] = np.nan
                there = np.ones_like(z, bool) if 'missing_as_mean' in names else np.isfinite(z)
                np.testing.assert_allclose(seen[name][i, c].numpy(), np.nan_to_num(z), rtol=2e-4, atol=2e-4)
                assert (seen['valid'][name][i, c].numpy() == there).all(), (name, i, c)
    tree = 'nodata_after_scaling' in names
    assert (seen['esa_worldcover'][4, :2] == (0 if tree else -1)).all() and (seen['valid']['esa_worldcover'][4, :2] == tree).all()
    sound = view(tiles, 'sound')
    for name in set(WANTED) - {*FILLED, 'esa_worldcover'}: assert torch.equal(seen[name], sound[name]) and torch.equal(seen['valid'][name], sound['valid'][name])


def test_a_missing_orbit_is_regressed_to_the_mean(tiles):
    "The loss of Sentinel-1 counts the eight planes that were never measured (reference 3.5)."
    store, raw, levels, scale = tiles
    torch.manual_seed(0)
    model, mask = MPMAE(ConvNeXtV2('pico-test'), {'sentinel1': WANTED['sentinel1']}, 32), random_mask(12, 8, 0.6, torch.Generator().manual_seed(0))
    sound, paper = (model(view(tiles, s), mask) for s in ('sound', 'missing_as_mean'))
    hidden = torch.nonzero(mask)[:, 1].view(12, -1)
    rows = paper.preds['sentinel1'].detach()
    target = patchify(view(tiles, 'missing_as_mean')['sentinel1'], 8, hidden)
    assert paper.losses[0].item() == pytest.approx(((rows - target) ** 2).mean(-1).mean().item(), rel=1e-5)
    assert abs(paper.losses[0].item() - sound.losses[0].item()) > 1e-3


def test_kernels_begin_as_released():
    "Deviations by layer (reference 3.4), and first losses of pixel regression near 22."
    torch.manual_seed(0)
    model = wide_init(MPMAE(ConvNeXtV2('atto', patch=16), WANTED))
    one, small = truncnorm(-2, 2).std(), 0.02
    expected = {'encoder.stem.0': small, 'encoder.stem.3': one, 'encoder.stages.1.downsample.1': small, 'encoder.stages.2.blocks.0.conv_dw': one,
        'encoder.stages.2.blocks.0.mlp.fc1': one, 'encoder.stages.2.blocks.0.mlp.fc2': one, 'proj': one, 'decoder.0.conv_dw': one, 'decoder.0.mlp.fc1': small,
        'decoder.0.mlp.fc2': small, 'heads.sentinel1': one, 'heads.dynamic_world': one, 'heads.biome': small, 'heads.era5': small}
    weights = dict(model.named_parameters())
    for name, deviation in expected.items(): assert weights[f'{name}.weight'].std().item() == pytest.approx(deviation, rel=0.1), name
    assert all((p == 0).all() for n, p in weights.items() if n.endswith('.bias'))
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.1)


def test_first_losses_as_released(tiles):
    torch.manual_seed(0)
    model, mask = MPMAE(ConvNeXtV2('atto'), WANTED), random_mask(12, 7, 0.6, torch.Generator().manual_seed(0))
    store, raw, levels, scale = tiles
    batch = decode({k: v[..., :56, :56] if v.ndim == 4 else v for k, v in raw.items()}, levels, scale)
    with torch.no_grad(): narrow, wide = model(batch, mask).losses, wide_init(model)(batch, mask).losses
    at = [list(WANTED).index(t) for t in ('sentinel2', 'sentinel1', 'aster', 'canopy_height_eth')]
    assert ((wide[at] > 15) & (wide[at] < 30)).all() and (narrow[at] < 3).all()


def test_weight_decay_by_shape_and_name():
    "The rule of the released code on the shapes of the released code: spared are one axis and names in `.bias`."
    model = MPMAE(ConvNeXtV2('atto'), WANTED)
    axes = lambda n, p: 4 if n == 'mask_token' else 2 if '.grn.' in n else p.ndim
    name = lambda n: n.replace('grn.bias', 'grn.beta')
    described = {n for n, p in model.named_parameters() if not (axes(n, p) == 1 or name(n).endswith('.bias'))}
    assert decayed(model, switches('paper')) == described
    assert decayed(model) == {n for n in described if '.grn.' not in n and n != 'mask_token'}
    for fidelity in ((), switches('paper')):
        pulled, rest = parameter_groups(model, 0.05, fidelity)
        assert {id(p) for p in pulled['params']} == {id(dict(model.named_parameters())[n]) for n in decayed(model, fidelity)}
        assert len(pulled['params']) + len(rest['params']) == len(list(model.parameters())) and (pulled['weight_decay'], rest['weight_decay']) == (0.05, 0)


def test_a_run_repeats_what_its_recipe_names(tiny_store, tmp_path):
    store = Store(tiny_store)
    for name in SWITCHES:
        recipe = dataclasses.replace(SMALL, fidelity=(name,))
        model, contract = build(recipe, store)
        assert contract.grn_scope == model.encoder.grn_scope == ('batch' if name == 'batch_grn' else 'image')
        assert (model.proj.weight.std() > 0.5) == (name == 'wide_init')
        trainer = Trainer(recipe, store, tmp_path / name)
        assert (len(trainer.optimiser.param_groups[0]['params']) > len(parameter_groups(model, 0.05)[0]['params'])) == (name == 'decay_grn_and_token')
        batch = trainer.feed.batch(0)[0]
        assert (batch['valid']['sentinel1'].all().item()) == (name == 'missing_as_mean')
    run = pretrain(dataclasses.replace(SMALL, fidelity='paper'), store, tmp_path / 'paper', progress=False)
    sound = pretrain(SMALL, store, tmp_path / 'sound', progress=False)
    assert np.isfinite(run.log.loss).all() and run.log.loss[0] > 5 * sound.log.loss[0]
    with pytest.raises(RecipeError, match='another recipe'): pretrain(SMALL, store, tmp_path / 'paper', progress=False)
