"""The packed and the masked dense encoder against each other and against kept values of the real MinkowskiEngine."""
import numpy as np
import pytest
import torch
from mmearth.convnext import ConvNeXtV2
from mmearth.masking import random_mask
from mmearth.sparse import packed

GOLDEN = ['sparse_56_8_mmearth', 'sparse_112_16_orig']
EXECUTIONS = {'masked': lambda e, x, m: e(x, m), 'packed': packed}


def published_name(name, original):
    "Name of a parameter of `ConvNeXtV2` in the kept files."
    part, rest = name.split('.', 1)
    if part == 'stem':
        layer, kind = rest.split('.')
        first = {'0': 'stem', '1': 'stem.ln'} if original else {'0': 'init', '1': 'init.ln', '3': 'stem', '4': 'stem.ln'}
        return f'{first[layer]}.{kind[0]}'
    _, i, inner, *tail = name.split('.')
    i = int(i)
    if inner == 'downsample': return f'd{i - 1}.ln.{tail[1][0]}' if tail[0] == '0' else f'd{i - 1}.{tail[1][0]}'
    j, what = tail[0], '.'.join(tail[1:])
    leaf = {'conv_dw.weight': 'dw.w', 'conv_dw.bias': 'dw.b', 'norm.weight': 'ln.w', 'norm.bias': 'ln.b', 'mlp.fc1.weight': 'w1', 'mlp.fc1.bias': 'b1',
            'mlp.grn.weight': 'grn.g', 'mlp.grn.bias': 'grn.b', 'mlp.fc2.weight': 'w2', 'mlp.fc2.bias': 'b2'}[what]
    return f's{i}.{j}.{leaf}'


def golden_encoder(kept, monkeypatch):
    "An encoder of the kept file's architecture with its weights, and the kept name of each parameter."
    original = 'p/init.w' not in kept
    weights = {k[2:]: torch.from_numpy(kept[k]) for k in kept.files if k.startswith('p/')}
    depths = tuple(sum(k.startswith(f's{i}.') and k.endswith('.w1') for k in weights) for i in range(4))
    widths = tuple(weights[f's{i}.0.w1'].shape[1] for i in range(4))
    monkeypatch.setitem(__import__('mmearth.convnext', fromlist=['SIZES']).SIZES, 'golden', (depths, widths))
    bands = tuple(f'b{i}' for i in range(kept['x'].shape[1]))
    grid = 7
    encoder = ConvNeXtV2('golden', bands, kept['x'].shape[-1] // grid, 'original' if original else 'mmearth', 'batch').double()
    names = {n: published_name(n, original) for n, _ in encoder.named_parameters()}
    assert sorted(names.values()) == sorted(weights)
    with torch.no_grad():
        for n, p in encoder.named_parameters(): p.copy_(weights[names[n]].reshape(p.shape))
    return encoder, names


@pytest.mark.parametrize('execution', EXECUTIONS)
@pytest.mark.parametrize('name', GOLDEN)
def test_equals_minkowski_engine(name, execution, shared, monkeypatch):
    kept = np.load(shared / 'golden' / f'{name}.npz')
    encoder, names = golden_encoder(kept, monkeypatch)
    mask = torch.ones(len(kept['x']), 49, dtype=torch.bool).scatter_(1, torch.from_numpy(kept['ids']), False)
    y = EXECUTIONS[execution](encoder, torch.from_numpy(kept['x']).double(), mask)
    want = torch.from_numpy(kept['y'])
    assert (y - want).norm() / want.norm() < 1e-12
    (y * torch.from_numpy(kept['r'])).sum().backward()
    for n, p in encoder.named_parameters():
        g = torch.from_numpy(kept[f'g/{names[n]}']).reshape(p.shape)
        assert (p.grad - g).norm() <= 1e-12 * max(1.0, g.norm()), n


@pytest.mark.parametrize('size,patch,stem,scope,grid,ratio,batch', [
    ('atto', 8, 'mmearth', 'image', 7, 0.6, 2), ('atto', 16, 'mmearth', 'batch', 7, 0.6, 2), ('pico-test', 32, 'original', 'image', 3, 0.3, 3),
    ('pico-test', 8, 'mmearth', 'batch', 8, 0.9, 1), ('tiny', 8, 'original', 'image', 4, 0.75, 1), ('pico-test', 16, 'mmearth', 'image', 7, 0.0, 2)])
def test_packed_equals_masked(size, patch, stem, scope, grid, ratio, batch):
    g = torch.Generator().manual_seed(0)
    encoder = ConvNeXtV2(size, patch=patch, stem=stem, grn_scope=scope).double()
    for p in encoder.parameters(): torch.nn.init.normal_(p, std=0.1, generator=g)
    x = torch.randn(batch, 12, grid * patch, grid * patch, generator=g, dtype=torch.double)
    mask = random_mask(batch, grid, ratio, g)
    results = []
    for run in EXECUTIONS.values():
        y = run(encoder, x, mask)
        r = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        results.append([y, *torch.autograd.grad((y * r).sum(), list(encoder.parameters()))])
    for a, b in zip(*results): assert (a - b).norm() <= 1e-10 * max(1e-3, a.norm())


def test_autocast_stays_close():
    g = torch.Generator().manual_seed(0)
    encoder = ConvNeXtV2('pico-test')
    for p in encoder.parameters(): torch.nn.init.normal_(p, std=0.1, generator=g)
    x, mask = torch.randn(2, 12, 56, 56, generator=g), random_mask(2, 7, generator=g)
    want = encoder(x, mask)
    with torch.autocast('cpu', torch.bfloat16): got = packed(encoder, x, mask).float()
    assert (got - want).norm() / want.norm() < 5e-2
