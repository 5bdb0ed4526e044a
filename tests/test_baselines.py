"Baselines: against timm where it is installed, and against slow loops."
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmearth import baselines as b
from mmearth.probe import Planes, features
from mmearth.store import Store
from mmearth.synthetic import write_store
from mmearth.weights import WeightsError


@pytest.fixture
def images():
    x = np.random.default_rng(0).integers(100, 3000, (20, 4, 24, 24)).astype('uint16')
    x[0, 0, :5] = 0
    return Planes(x, ('B2', 'B3', 'B4', 'B8'))


def test_statistics_are_of_valid_pixels_of_the_training_rows(images):
    found = b.own_statistics(images, [0, 3])['sentinel2_l2a']
    for c in range(4):
        values = images.x[[0, 3], c].astype(float)
        values = values[values > 0]
        assert found['mean'][c] == pytest.approx(values.mean()) and found['std'][c] == pytest.approx(values.std())
    encoder = b.untrained(images, [0, 3], 'pico-test', ('B8', 'B2'))
    assert encoder.contract.stats['sentinel2_l2a']['mean'] == [found['mean'][3], found['mean'][0]]
    again, other = b.untrained(images, [0, 3], 'pico-test', ('B8', 'B2')), b.untrained(images, [0, 3], 'pico-test', ('B8', 'B2'), seed=1)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert not torch.equal(encoder.stages[0].blocks[0].conv_dw.weight, other.stages[0].blocks[0].conv_dw.weight)


@pytest.mark.parametrize('filters', ['patches', 'gaussian'])
def test_random_features_are_means_of_filtered_pixels(images, filters):
    model = b.RandomFeatures(images, np.arange(10), num_features=8, filters=filters, seed=3)
    found = features(model, images, [11], progress=False)[0]
    stats = model.contract.stats['sentinel2_l2a']
    x = (images.x[11].astype(float) - np.array(stats['mean'])[:, None, None]) / np.array(stats['std'])[:, None, None]
    weight = model.weight.numpy()
    for k in range(4):
        z = np.array([[(x[:, i:i + 3, j:j + 3] * weight[k]).sum() - 1 for j in range(22)] for i in range(22)])
        assert found[k] == pytest.approx(np.maximum(z, 0).mean(), abs=1e-4) and found[k + 4] == pytest.approx(np.maximum(-z, 0).mean(), abs=1e-4)
    assert not np.allclose(weight, b.RandomFeatures(images, np.arange(10), num_features=8, filters=filters, seed=4).weight)
    if filters == 'gaussian': assert torch.equal(model.weight, torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(3)))


def test_patches_are_whitened(images):
    contract = b.untrained(images, size='pico-test').contract
    patches = b.image_patches(images, np.arange(20), contract, 4000, 2, 0).reshape(4000, -1).double().numpy()
    raw_contract_free = np.cov(patches.T, bias=True)
    kept = np.linalg.eigvalsh(raw_contract_free)[1:]  # one direction is lost to centring
    assert kept.max() / kept.min() < 3
    with pytest.raises(ValueError, match='smaller than a filter'): b.image_patches(images, np.arange(20), contract, 5, 30, 0)


@pytest.mark.parametrize('damage, message', [('cut', 'cannot be read'), ('shape', 'stem.0.weight'), ('missing', 'missing'), ('other', 'not expected|in the file'), ('pickle', 'plain state dict|cannot be read')])
def test_broken_files_are_named(tmp_path, images, damage, message):
    good = b.ConvNeXtV2('pico-test', b.RGB, 32, 'original').state_dict()
    file = tmp_path / ('weights.pt' if damage == 'pickle' else 'weights.safetensors')
    if damage == 'shape': good['stem.0.weight'] = good['stem.0.weight'][:, :2].contiguous()
    if damage == 'missing': del good['stages.1.blocks.0.norm.bias']
    if damage == 'other': good['stages.9.blocks.0.norm.bias'] = torch.zeros(3)
    if damage == 'pickle': file.write_bytes(b'not a file of torch')
    else: save_file(good, file)
    if damage == 'cut': file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=message) as caught: b.imagenet_encoder(file, images, size='pico-test')
    assert file.name in str(caught.value)


def test_the_weights_of_timm_give_the_features_of_timm(tmp_path, images):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    theirs = timm.create_model('convnextv2_atto', pretrained=False).eval()
    for name, p in theirs.named_parameters(): torch.nn.init.normal_(p, std=0.2 if 'grn' in name else 0.05)
    save_file(theirs.state_dict(), tmp_path / 'w.safetensors')
    ours, x = b.imagenet_encoder(tmp_path / 'w.safetensors', images), torch.randn(2, 3, 64, 96)
    with torch.no_grad(): assert torch.allclose(ours(x), theirs.forward_features(x), rtol=1e-3, atol=1e-4)
    assert 'timm' in set(b.extraction_rates('atto', 1, rounds=1, grid=16).model)


def test_random_filters_leave_out_a_band_that_was_never_there(tmp_path):
    store = Store(write_store(tmp_path / 'scenes', 24, size=16, labelled=True))
    assert 'B10' in store.bands('sentinel2') and set(store.levels) == {'l1c', 'l2a'}
    filters = b.RandomFeatures(store, num_features=16)
    assert 'B10' not in filters.contract.bands and len(filters.contract.bands) == 12
    assert np.isfinite(features(filters, store, progress=False)).all()
