"""Five executions of one network: against each other, against kept values of the real MinkowskiEngine, compiled, exported, in two processes."""
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

from mmearth.convnext import SIZES, Block, ConvNeXtV2
from mmearth.kernels import EXECUTIONS, choose, hindrance, mix, visible_features
from mmearth.lean import TORCH, lean_block
from mmearth.masking import patch_ids, random_mask
from mmearth.modalities import modality
from mmearth.mpmae import MPMAE
from mmearth.sparse import make_plan, packed

EXACT = ('masked', 'plain', 'lean')


def usable(execution, encoder, x):
    if why := hindrance(execution, encoder, x): pytest.skip(why)


def everything(encoder, x, plan, execution, checkpoint=False):
    "Features, and the gradient of every parameter."
    y = visible_features(encoder, x, plan, execution, checkpoint)
    r = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double).to(y)
    return [y.detach(), *torch.autograd.grad(y, list(encoder.parameters()), r)]


def off(a, b, least=1e-3): return (a.double() - b.double()).norm().item() / max(least, b.double().norm().item())


def random_encoder(*args, std=.1, **kwargs):
    encoder, g = ConvNeXtV2(*args, **kwargs), torch.Generator().manual_seed(0)
    for p in encoder.parameters(): torch.nn.init.normal_(p, std=std, generator=g)
    return encoder, g


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
    monkeypatch.setitem(SIZES, 'golden', (depths, widths))
    bands = tuple(f'b{i}' for i in range(kept['x'].shape[1]))
    encoder = ConvNeXtV2('golden', bands, 8 * weights['stem.w'].shape[-1], 'original' if original else 'mmearth', 'batch').double()
    names = {n: published_name(n, original) for n, _ in encoder.named_parameters()}
    assert sorted(names.values()) == sorted(weights)
    with torch.no_grad():
        for n, p in encoder.named_parameters(): p.copy_(weights[names[n]].reshape(p.shape))
    return encoder, names


@pytest.mark.parametrize('checkpoint', [False, True])
@pytest.mark.parametrize('execution', EXACT)
def test_equals_minkowski_engine(execution, checkpoint, shared, monkeypatch):
    files = sorted((shared / 'golden').glob('sparse_*.npz'))
    assert len(files) >= 2
    for file in files:
        kept = np.load(file)
        encoder, names = golden_encoder(kept, monkeypatch)
        x, ids = torch.from_numpy(kept['x']).double(), torch.from_numpy(kept['ids'])
        grid = x.shape[-1] // encoder.patch
        plan = make_plan(torch.ones(len(x), grid * grid, dtype=torch.bool).scatter_(1, ids, False))
        y = visible_features(encoder, x, plan, execution, checkpoint)
        full = torch.zeros(len(x), grid * grid, y.shape[-1], dtype=torch.double).scatter(1, plan.ids[..., None].expand_as(y), y).transpose(1, 2).reshape(kept['y'].shape)
        want = torch.from_numpy(kept['y'])
        assert (full - want).norm() / want.norm() < 1e-13, file.name
        (full * torch.from_numpy(kept['r'])).sum().backward()
        for n, p in encoder.named_parameters():
            g = torch.from_numpy(kept[f'g/{names[n]}']).reshape(p.shape)
            assert (p.grad - g).norm() <= 1e-12 * max(1.0, g.norm()), (file.name, n)


CASES = [('atto', 8, 'mmearth', 'image', 7, .6, 2), ('atto', 16, 'mmearth', 'batch', 7, .6, 2), ('pico-test', 32, 'original', 'image', 3, .3, 3), ('pico-test', 8, 'mmearth', 'batch', 8, .9, 1),
         ('tiny', 8, 'original', 'image', 4, .75, 1), ('pico-test', 16, 'mmearth', 'image', 7, 0., 2), ('pico-test', 32, 'mmearth', 'image', 2, .6, 33), ('pico-test', 16, 'original', 'batch', 5, .5, 2), ('nano', 8, 'mmearth', 'image', 3, .8, 2)]


@pytest.mark.parametrize('size,patch,stem,scope,grid,ratio,batch', CASES)
def test_executions_agree_in_double_precision(size, patch, stem, scope, grid, ratio, batch):
    encoder, g = random_encoder(size, patch=patch, stem=stem, grn_scope=scope)
    encoder, x = encoder.double(), torch.randn(batch, 12, grid * patch, grid * patch, generator=g, dtype=torch.double)
    plan = make_plan(random_mask(batch, grid, ratio, g))
    want = everything(encoder, x, plan, 'masked')
    for how in (('plain',), ('lean',), ('lean', True), ('plain', True)):
        for a, b in zip(everything(encoder, x, plan, *how), want): assert off(a, b) <= 1e-10, how
    full = torch.zeros(batch, grid * grid, encoder.num_features, dtype=torch.double).scatter(1, plan.ids[..., None].expand_as(want[0]), want[0])
    assert off(packed(encoder, x, plan.mask).flatten(2).transpose(1, 2), full) < 1e-10


@pytest.mark.parametrize('size,patch,stem,scope,grid,ratio,batch', CASES)
def test_numba_is_as_near_as_single_precision_allows(size, patch, stem, scope, grid, ratio, batch):
    encoder, g = random_encoder(size, patch=patch, stem=stem, grn_scope=scope)
    x, plan = torch.randn(batch, 12, grid * patch, grid * patch, generator=g), make_plan(random_mask(batch, grid, ratio, g))
    usable('numba', encoder, x)
    want = everything(encoder.double(), x.double(), plan, 'plain')
    plain, numba, frugal = ([off(a, b) for a, b in zip(everything(encoder.float(), x, plan, *how), want)] for how in (('plain',), ('numba',), ('numba', True)))
    assert max(numba) < max(1e-5, 4 * max(plain)) and max(frugal) < max(1e-5, 4 * max(plain))


@pytest.mark.parametrize('execution', ['lean', 'numba'])
def test_the_same_bits_on_any_number_of_cores(execution):
    block, g = Block(40), torch.Generator().manual_seed(0)
    for p in block.parameters(): torch.nn.init.normal_(p, std=.1, generator=g)
    x, plan = torch.randn(37, 19 * 64, 40, generator=g, requires_grad=True), make_plan(random_mask(37, 7, generator=g))
    usable(execution, block, x)
    pieces, before, found = import_module('mmearth.fast').NUMBA if execution == 'numba' else TORCH, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            y = lean_block(block, x, plan, 8, pieces)
            found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])])
    finally: torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other): assert torch.equal(a, b)


def test_grn_of_silent_channels_has_a_gradient():
    encoder, g = random_encoder('pico-test')
    with torch.no_grad():
        for stage in encoder.stages:
            for block in stage.blocks: block.mlp.fc1.weight.zero_(), block.mlp.fc1.bias.zero_()
    x, plan = torch.randn(2, 12, 56, 56, generator=g), make_plan(random_mask(2, 7, generator=g))
    for execution in ('lean', 'numba'):
        if hindrance(execution, encoder, x): continue
        assert all(t.isfinite().all() for t in everything(encoder, x, plan, execution))


@pytest.mark.parametrize('execution', ['plain', 'auto'])
def test_autocast_stays_close(execution):
    encoder, g = random_encoder('pico-test')
    x, plan = torch.randn(2, 12, 56, 56, generator=g), make_plan(random_mask(2, 7, generator=g))
    want = everything(encoder, x, plan, 'masked')
    with torch.autocast('cpu', torch.bfloat16): got = everything(encoder, x, plan, execution)
    assert off(got[0], want[0]) < 2e-2 and max(off(a, b) for a, b in zip(got, want)) < 1.5e-1


def test_decoder_is_the_same_in_all_executions():
    tasks = {t: modality(t).train_bands for t in ('sentinel2', 'biome')}
    model = MPMAE(ConvNeXtV2('pico-test'), tasks, decoder_width=64, decoder_depth=2).double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.1, generator=torch.Generator().manual_seed(p.numel()))
    rows = torch.randn(5, 49, 64, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for execution, checkpoint in (('plain', False), ('lean', False), ('lean', True), ('plain', True)):
        y = mix(model.decoder, rows, execution, checkpoint)
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [rows, *model.decoder.parameters()])])
    for other in found[1:]:
        for a, b in zip(other, found[0]): assert off(a, b) < 1e-10


def test_choice_says_why_not():
    encoder, x = ConvNeXtV2('pico-test'), torch.zeros(1, 12, 56, 56)
    assert choose('auto', encoder, x.double()) == 'plain' and choose('auto', encoder, x) in ('numba', 'plain')
    with pytest.raises(ValueError, match="not possible: .*cpu.*take \"auto\""): choose('triton', encoder, x)
    with pytest.raises(ValueError, match='no gradient of the image'): choose('lean', encoder, x.clone().requires_grad_())
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(ValueError, match='precisions'): choose('lean', encoder, x)
    with pytest.raises(ValueError, match='must be'): choose('packed', encoder, x)
    with pytest.raises(ValueError, match='the same number'): patch_ids(torch.eye(3, 9).bool() | (torch.arange(3) == 0)[:, None])
    assert set(EXECUTIONS) > set(EXACT)


def test_without_numba_and_triton_everything_still_works():
    code = '''
import sys
sys.modules.update(numba=None, triton=None)
import torch
from mmearth.convnext import ConvNeXtV2
from mmearth.kernels import choose, visible_features
from mmearth.masking import random_mask
from mmearth.sparse import make_plan
encoder, x = ConvNeXtV2('pico-test'), torch.randn(2, 12, 56, 56)
assert choose('auto', encoder, x) == 'plain'
visible_features(encoder, x, make_plan(random_mask(2, 7)), 'lean').sum().backward()
try: choose('numba', encoder, x)
except ValueError as e: assert 'pip install' in str(e), e
else: raise SystemExit('numba was chosen')
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_compiles_without_a_graph_break():
    encoder, g = random_encoder('pico-test')
    x, plan = torch.randn(2, 12, 56, 56, generator=g), make_plan(random_mask(2, 7, generator=g))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, plan: packed(encoder, x, plan), fullgraph=True, backend='aot_eager')
    y = compiled(x, plan)
    want = packed(encoder, x, plan)
    assert off(y.detach(), want.detach()) < 1e-5
    grads = [torch.autograd.grad(out.square().sum(), list(encoder.parameters())) for out in (y, want)]
    for a, b in zip(*grads): assert off(a, b) < 1e-4
    dense = torch.compile(encoder, fullgraph=True, backend='aot_eager')
    assert off(dense(x).detach(), encoder(x).detach()) < 1e-5 and off(dense(x, plan.mask).detach(), encoder(x, plan.mask).detach()) < 1e-5


def test_dense_execution_exports_for_any_size():
    encoder, g = random_encoder('pico-test')
    batch, side = torch.export.Dim('batch', min=1, max=64), torch.export.Dim('side', min=1, max=64)
    program = torch.export.export(encoder.eval(), (torch.randn(2, 12, 64, 64, generator=g),), dynamic_shapes=({0: batch, 2: 8 * side, 3: 8 * side},))
    for n, size in ((1, 56), (3, 128)):
        x = torch.randn(n, 12, size, size, generator=g)
        assert off(program.module()(x), encoder(x).detach()) < 1e-5


TWO = '''
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from mmearth.convnext import ConvNeXtV2
from mmearth.kernels import visible_features
from mmearth.masking import random_mask
from mmearth.sparse import make_plan
torch.set_num_threads(1)
rank, execution, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
class Features(torch.nn.Module):
    def __init__(self): super().__init__(); self.encoder = ConvNeXtV2('pico-test')
    def forward(self, x, plan): return visible_features(self.encoder, x, plan, execution)
torch.manual_seed(0)
model, g = Features(), torch.Generator().manual_seed(1)
for p in model.parameters(): torch.nn.init.normal_(p, std=.1, generator=g)
x, mask = torch.randn(4, 12, 56, 56, generator=g), random_mask(4, 7, generator=g)
half = slice(rank * 2, rank * 2 + 2)
one = torch.autograd.grad(visible_features(model.encoder, x, make_plan(mask), 'masked').square().mean(), list(model.parameters()))
parallel = DistributedDataParallel(model) # must live until backward is done
parallel(x[half], make_plan(mask[half])).square().mean().backward()
worst = max(((p.grad - a).norm() / a.norm().clamp(min=1e-3)).item() for a, p in zip(one, model.parameters()))
print('worst', worst)
assert worst < 1e-4
dist.destroy_process_group()
'''


@pytest.mark.parametrize('execution', ['plain', 'lean', 'numba'])
def test_two_processes_get_the_gradient_of_one(execution, tmp_path):
    usable(execution, ConvNeXtV2('pico-test'), torch.zeros(1, 12, 56, 56))
    children = [subprocess.Popen([sys.executable, '-c', TWO, str(rank), execution, str(tmp_path / 'meet')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (0, 1)]
    said = [c.communicate(timeout=300)[0] for c in children]
    assert [c.returncode for c in children] == [0, 0], said
