"""GPU kernels without a GPU: interpreted on the CPU against PyTorch, compiled for sm_90 and asked for spilled registers; with one, on it."""
import subprocess
import sys

import pytest
import torch

from mmearth.convnext import SIZES

pytest.importorskip('triton')

INTERPRETED = '''
import torch
from torch import nn
from mmearth.convnext import Block
from mmearth.gpu import TRITON
from mmearth.lean import TORCH, lean_block
from mmearth.masking import random_mask
from mmearth.sparse import make_plan
torch.set_num_threads(1)  # the interpreter serves one thread
g = torch.Generator().manual_seed(0)
for side, C, scope, grid, ratio, batch in [(8, 12, 'image', 2, .5, 1), (4, 40, 'batch', 2, .5, 2), (2, 24, 'image', 2, 0., 1), (1, 72, 'image', 4, .6, 2)]:
    plan, block = make_plan(random_mask(batch, grid, ratio, g), g.device), Block(C, scope)
    for p in block.parameters(): nn.init.normal_(p, std=.3, generator=g)
    x, d = torch.randn(2, batch, plan.ids.shape[1] * side ** 2, C, generator=g)
    def run(pieces, kind, keep=True):
        at = x.to(kind, copy=True).requires_grad_()
        y = lean_block(block.to(kind), at, plan, side, pieces, keep)
        return [y.detach(), *torch.autograd.grad(y, [at, *block.parameters()], d.to(y.dtype))]
    off = lambda a, b: max(((s.double() - t).norm() / t.norm()).item() for s, t in zip(a, b))
    want, found = run(TORCH, torch.double), run(TRITON, torch.float)
    assert off(found, want) < 1e-5 and off(run(TRITON, torch.float, False), want) < 1e-5, (side, off(found, want))
    for a, b in zip(found, run(TRITON, torch.float)): assert torch.equal(a, b)
    with torch.autocast('cpu', torch.bfloat16): half = run(TRITON, torch.float)
    assert off(half[:1], want[:1]) < 1e-2 and off(half, want) < 1e-1, (side, [off([a], [b]) for a, b in zip(half, want)])
'''

COMPILED = '''
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmearth import gpu

def spilled(name, types, constants, warps):
    kernel = getattr(gpu, name)
    names = kernel.arg_names
    source = ASTSource(fn=kernel, signature={n: 'constexpr' if n in constants else types[n] for n in names}, constexprs={(names.index(k),): v for k, v in constants.items()})
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=warps)).asm['cubin'])
        file.flush()
        tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
        report = subprocess.run([tool, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r'REG:(\\d+) STACK:(\\d+).*?LOCAL:(\\d+)', report).groups())
    print(name, constants, warps, registers, stack, local)
    return stack or local

low, full, whole = '*bf16', '*fp32', 'i32'
bad = []
for side, C in map(eval, sys.argv[1:]):
    (_, W, P), (*_, N) = gpu._shape(side, C), gpu._flat(C)
    shape, rows, many = dict(S=side, C=C, W=W, P=P), dict(C=C, W=W, N=N), dict(T=gpu._TILES)
    ints = dict(V=whole, eps='fp32', patches=whole, run=whole, rows=whole)
    tensors = dict(x=low, d=low, da=low, xh=low, dx=low, y=low, dy=low, table='*i32', taps=full, flipped=full, bias=full, weight=full, rstd=full, part=full)
    near = min(W, 64)
    for name, constants, w in [('_conv_norm_kernel', shape, gpu._warps(side * side * W * P)), ('_conv_back_kernel', shape, gpu._warps(side * side * W * P)),
            ('_gains_kernel', shape | dict(W=near, P=64 // side ** 2), 4), ('_norm_back_kernel', rows | many, 4), ('_layer_kernel', rows, 4), ('_layer_back_kernel', rows | many, 4)]:
        if spilled(name, tensors | ints, constants, w): bad.append((name, constants))
for name in ('_squares_kernel', '_activate_kernel', '_products_kernel', '_activate_back_kernel'):
    types = dict(h=low, ds=low, part=full, scale=full, pull=full, rows=whole, K=whole)
    if spilled(name, types, dict(N=gpu._ROWS, W=gpu._CHANNELS), 8): bad.append((name, ''))
sys.exit(f'spilled: {bad}' if bad else 0)
'''


def program(code, *words, **environment):
    import os
    done = subprocess.run([sys.executable, '-c', code, *words], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card: tested on it')
def test_interpreted_kernels_equal_pytorch(): program(INTERPRETED, TRITON_INTERPRET='1')


def test_no_kernel_spills_its_registers(tmp_path):
    shapes = [f'({8 >> i}, {width})' for size in ('atto', 'tiny') for i, width in enumerate(SIZES[size][1])] + ['(1, 512)']
    said = program(COMPILED, *shapes, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    assert len(said.splitlines()) == 6 * len(shapes) + 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
def test_on_the_card():
    program(INTERPRETED.replace("g = torch.Generator().manual_seed(0)", "torch.set_default_device('cuda')\ng = torch.Generator('cuda').manual_seed(0)").replace("autocast('cpu'", "autocast('cuda'"))
