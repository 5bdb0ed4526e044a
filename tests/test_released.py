"""Files in the layout of the authors' checkpoints (reference 3.6), read against a slow network that works on that layout itself."""
import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmearth.benchmark import open_encoder
from mmearth.cli import app
from mmearth.convnext import SIZES
from mmearth.dataset import Scale, decode
from mmearth.masking import random_mask
from mmearth.modalities import TASKS, modality
from mmearth.released import RELEASED_STATS, convert, read_state, released_model
from mmearth.sparse import make_plan
from mmearth.store import Store
from mmearth.synthetic import write_store
from mmearth.weights import WeightsError, encode, load_encoder, load_model, read_contract

SIZE = dict(sentinel2=12, sentinel1=8, aster=2, canopy_height_eth=2, dynamic_world=9, esa_worldcover=11, era5=12, lat=2, lon=2, month=2, biome=14, eco_region=846)
PIXEL = list(SIZE)[:6]


def released(size='pico-test', k=1, inputs=12, tasks=TASKS, width=32, original=False, log_vars=True, outputs=None):
    "A state dict as reference fact 3.6 lists it, of random numbers."
    g = torch.Generator().manual_seed(7)
    depths, dims = SIZES[size]
    state = {}
    def put(name, *shape): state[name] = torch.randn(shape, generator=g) * 0.2
    def norm(name, n): put(f'{name}.weight', n), put(f'{name}.bias', n)
    put('mask_token', 1, width, 1, 1)
    if log_vars: put('loss_fn.log_vars', len(tasks))
    if not original:
        put('encoder.initial_conv.0.kernel', 9, inputs, dims[0]), put('encoder.initial_conv.0.bias', 1, dims[0])
        norm('encoder.initial_conv.1.ln', dims[0])
        put('encoder.stem.0.kernel', k * k, dims[0])
    else: put('encoder.stem.0.kernel', *((k * k, inputs, dims[0]) if k > 1 else (inputs, dims[0])))
    put('encoder.stem.0.bias', 1, dims[0]), norm('encoder.stem.1.ln', dims[0])
    for s, (depth, d) in enumerate(zip(depths, dims)):
        for b in range(depth):
            at = f'encoder.stages.{s}.{b}'
            put(f'{at}.dwconv.kernel', 49, d), put(f'{at}.dwconv.bias', 1, d), norm(f'{at}.norm.ln', d)
            put(f'{at}.pwconv1.linear.weight', 4 * d, d), put(f'{at}.pwconv1.linear.bias', 4 * d)
            put(f'{at}.pwconv2.linear.weight', d, 4 * d), put(f'{at}.pwconv2.linear.bias', d)
            put(f'{at}.grn.gamma', 1, 4 * d), put(f'{at}.grn.beta', 1, 4 * d)
    for i in range(3):
        norm(f'encoder.downsample_layers.{i}.0.ln', dims[i])
        put(f'encoder.downsample_layers.{i}.1.kernel', 4, dims[i], dims[i + 1]), put(f'encoder.downsample_layers.{i}.1.bias', 1, dims[i + 1])
    put('proj.weight', width, dims[3], 1, 1), put('proj.bias', width)
    block = {}
    for name, shape in {'dwconv.weight': (width, 1, 7, 7), 'dwconv.bias': (width,), 'norm.weight': (width,), 'norm.bias': (width,), 'pwconv1.weight': (4 * width, width), 'pwconv1.bias': (4 * width,),
                        'grn.gamma': (1, 1, 1, 4 * width), 'grn.beta': (1, 1, 1, 4 * width), 'pwconv2.weight': (width, 4 * width), 'pwconv2.bias': (width,)}.items(): block[name] = torch.randn(shape, generator=g) * 0.2
    for t in tasks:
        state |= {f'decoder_dict.{t}.0.{name}': v for name, v in block.items()}
        n = (outputs or SIZE)[t] * ((8 * k) ** 2 if t in PIXEL else 1)
        put(f'pred_dict.{t}.weight', *((n, width, 1, 1) if t in PIXEL else (n, width))), put(f'pred_dict.{t}.bias', n)
    norm('layer_norm_tmp', width)
    return state


def convolve(x, kernel, bias, stride, pad, depthwise=False):
    "MinkowskiEngine's kernel, place by place: place c * side + r reaches r rows down and c columns right."
    side = max(1, round(len(kernel) ** 0.5)) if kernel.ndim == 3 or depthwise else 1
    kernel = kernel.reshape(side * side, *kernel.shape[1:]) if kernel.ndim == 3 or depthwise else kernel[None]
    x = F.pad(x, (pad,) * 4)
    h, w = ((n - side) // stride + 1 for n in x.shape[-2:])
    y = bias.reshape(1, -1, 1, 1)
    for place in range(side * side):
        c, r = divmod(place, side)
        seen = x[:, :, r:r + stride * (h - 1) + 1:stride, c:c + stride * (w - 1) + 1:stride]
        y = y + (seen * kernel[place].reshape(1, -1, 1, 1) if depthwise else torch.einsum('nihw,io->nohw', seen, kernel[place]))
    return y


def published_forward(state, x, original, k, mask=None):
    "The released encoder on its own layout; with a mask, only visible places exist and GRN is over the whole batch."
    s = {n: v.double() for n, v in state.items()}
    keep = torch.ones_like(x[:, :1]) if mask is None else (~mask).reshape(len(x), 1, *[round(mask.shape[1] ** 0.5)] * 2).repeat_interleave(8 * k, 2).repeat_interleave(8 * k, 3).double()
    def norm(x, at): return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], s[f'{at}.weight'], s[f'{at}.bias'], 1e-6).permute(0, 3, 1, 2)
    x = x * keep
    if not original:
        x = F.gelu(norm(convolve(x, s['encoder.initial_conv.0.kernel'], s['encoder.initial_conv.0.bias'], 1, 1), 'encoder.initial_conv.1.ln')) * keep
    keep = keep[:, :, ::k, ::k]
    x = norm(convolve(x, s['encoder.stem.0.kernel'], s['encoder.stem.0.bias'], k, 0, not original), 'encoder.stem.1.ln') * keep
    for i in range(4):
        if i:
            keep = keep[:, :, ::2, ::2]
            x = convolve(norm(x, f'encoder.downsample_layers.{i - 1}.0.ln'), s[f'encoder.downsample_layers.{i - 1}.1.kernel'], s[f'encoder.downsample_layers.{i - 1}.1.bias'], 2, 0) * keep
        for b in range(sum(n.startswith(f'encoder.stages.{i}.') and n.endswith('dwconv.kernel') for n in s)):
            at = f'encoder.stages.{i}.{b}'
            y = norm(convolve(x, s[f'{at}.dwconv.kernel'], s[f'{at}.dwconv.bias'], 1, 3, True), f'{at}.norm.ln').permute(0, 2, 3, 1)
            y = F.gelu(y @ s[f'{at}.pwconv1.linear.weight'].T + s[f'{at}.pwconv1.linear.bias']) * keep.permute(0, 2, 3, 1)
            length = (y ** 2).sum((1, 2) if mask is None else (0, 1, 2), keepdim=True).sqrt()
            y = s[f'{at}.grn.gamma'] * (y * (length / (length.mean(-1, keepdim=True) + 1e-6))) + s[f'{at}.grn.beta'] + y
            x = x + (y @ s[f'{at}.pwconv2.linear.weight'].T + s[f'{at}.pwconv2.linear.bias']).permute(0, 3, 1, 2) * keep
    return x


def put_down(folder, state, name='pt-all_mod_pico'):
    file = folder / name / 'checkpoint-199.pth'
    file.parent.mkdir(parents=True)
    torch.save(dict(model=state, optimizer=dict(state={0: dict(step=3, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=1e-3)]), epoch=199, scaler={}, args=argparse.Namespace(data_dir=Path('a') / 'b', betas=(0.9, 0.95), resume='')), file)
    return file


def test_every_tensor_of_a_released_atto_finds_its_place():
    state = released('atto', width=512)
    assert len(state) == 290 and len({v.data_ptr() for v in state.values()}) == 180  # reference 3.6
    model, encoder, pretext = released_model(state)
    assert sum(p.numel() for p in model.parameters()) == 7_580_674  # reference 3.1
    assert encoder['size'] == 'atto' and tuple(pretext['tasks']) == TASKS


@pytest.mark.parametrize('k,inputs,original', [(1, 12, False), (2, 12, False), (2, 3, False), (4, 12, True), (1, 3, True), (2, 12, True)])
def test_features_are_those_of_the_released_layout(tmp_path, k, inputs, original):
    tasks = TASKS if inputs == 12 else ('sentinel2',)
    state = released(k=k, inputs=inputs, original=original, tasks=tasks, outputs=SIZE | dict(sentinel2=inputs))
    folder = convert(put_down(tmp_path, state), tmp_path / 'out')
    encoder, contract = load_encoder(folder), read_contract(folder)
    assert (contract.patch, contract.stem, len(contract.bands)) == (8 * k, 'original' if original else 'mmearth', inputs)
    raw = torch.randint(0, 5000, (2, inputs, 64, 64)).float()
    at = [modality('sentinel2').train_bands.index(b) for b in contract.bands]
    mean, std = (torch.tensor(RELEASED_STATS['l1c'][p], dtype=torch.double)[at][:, None, None] for p in ('mean', 'std'))
    want = published_forward(state, (raw.double() - mean) / std, original, k)
    assert torch.allclose(encode(encoder, raw, level='l1c').double(), want, rtol=1e-3, atol=1e-3 * want.abs().max())
    assert torch.allclose(encoder.double()((raw.double() - mean) / std), want, rtol=1e-9, atol=1e-9 * want.abs().max())


def test_pretraining_features_with_grn_over_the_batch():
    state = released(k=2)
    model = released_model(state, grn_scope='batch')[0].double()
    x, mask = torch.randn(3, 12, 112, 112, dtype=torch.double), random_mask(3, 7, 0.6, torch.Generator().manual_seed(1))
    want = published_forward(state, x, False, 2, mask)
    assert torch.allclose(model.encoder(x, mask), want, rtol=1e-9, atol=1e-9 * want.abs().max())


def test_predictions_of_all_tasks():
    state, x = released(k=1), torch.randn(2, 12, 56, 56, dtype=torch.double)
    model, mask = released_model(state)[0].double(), torch.zeros(2, 49, dtype=torch.bool)
    s = {n: v.double() for n, v in state.items()}
    z = F.conv2d(published_forward(state, x, False, 1), s['proj.weight'], s['proj.bias'])
    at = 'decoder_dict.biome.0'
    y = F.conv2d(z, s[f'{at}.dwconv.weight'], s[f'{at}.dwconv.bias'], padding=3, groups=32).permute(0, 2, 3, 1)
    y = F.gelu(F.layer_norm(y, (32,), s[f'{at}.norm.weight'], s[f'{at}.norm.bias'], 1e-6) @ s[f'{at}.pwconv1.weight'].T + s[f'{at}.pwconv1.bias'])
    length = y.norm(dim=(1, 2), keepdim=True)
    y = s[f'{at}.grn.gamma'] * (y * (length / (length.mean(-1, keepdim=True) + 1e-6))) + s[f'{at}.grn.beta'] + y
    decoded = z + (y @ s[f'{at}.pwconv2.weight'].T + s[f'{at}.pwconv2.bias']).permute(0, 3, 1, 2)
    preds = model.predict(x, make_plan(mask))
    pooled = F.layer_norm(decoded.permute(0, 2, 3, 1), (32,), s['layer_norm_tmp.weight'], s['layer_norm_tmp.bias'], 1e-6).mean((1, 2))
    for t in TASKS:
        if t in PIXEL: want = F.conv2d(decoded, s[f'pred_dict.{t}.weight'], s[f'pred_dict.{t}.bias']).flatten(2).transpose(1, 2)
        else: want = pooled @ s[f'pred_dict.{t}.weight'].T + s[f'pred_dict.{t}.bias']
        assert torch.allclose(preds[t], want, rtol=1e-8, atol=1e-8 * want.abs().max()), t
    assert torch.equal(model.balance.log_vars, s['loss_fn.log_vars'])


def test_other_configurations(tmp_path):
    assert released_model(released(tasks=('sentinel2',)))[0].image_norm is None  # layer_norm_tmp is in the file all the same
    unweighted = load_model(convert(put_down(tmp_path, released(log_vars=False)), tmp_path / 'out'))
    assert unweighted.balance.log_vars is None
    assert json.loads((tmp_path / 'out' / 'state.json').read_text())['released'] == dict(data_dir='a/b', betas=[0.9, 0.95], resume='')


def test_statistics_of_a_store_and_a_word_for_an_encoder(tmp_path):
    file = put_down(tmp_path, released())
    write_store(tmp_path / 'store', 4, progress=False)
    said = CliRunner().invoke(app, ['convert', str(file), str(tmp_path / 'out'), '--stats', str(tmp_path / 'store')])
    assert said.exit_code == 0 and said.output.strip() == str(tmp_path / 'out'), said.output
    tiles = Store(tmp_path / 'store')
    encoder = open_encoder('out', tiles, tmp_path)
    stored = tiles.bands('sentinel2')
    assert encoder.contract.stats['sentinel2_l2a']['mean'] == [tiles.stats['sentinel2_l2a']['mean'][stored.index(b)] for b in modality('sentinel2').train_bands]
    x = torch.from_numpy(tiles.read(range(4), ['sentinel2'])['sentinel2'].astype('float32'))
    scale = Scale(tiles.stats, dict(sentinel2=encoder.bands), dict(sentinel2=stored))
    assert torch.allclose(encode(encoder, x, stored, list(tiles.levels[:4])), encoder(decode(dict(sentinel2=x), tiles.levels[:4], scale)['sentinel2']), atol=1e-5)
    with pytest.raises(ValueError, match='mmearth convert'): open_encoder(str(file), tiles)


def test_the_order_of_a_file_does_not_matter(tmp_path):
    "safetensors sorts its names; log_vars stays in the order of the released code."
    state = released()
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / 'm.safetensors')
    for tensors in (read_state(tmp_path / 'm.safetensors')[0], dict(sorted(state.items()))):
        model = released_model(tensors)[0]
        assert tuple(model.tasks) == TASKS and torch.equal(model.balance.log_vars, state['loss_fn.log_vars'])


def test_a_command_line_with_paths_in_it(tmp_path):
    file = tmp_path / 'checkpoint-199.pth'
    torch.save(dict(model=released(), args=argparse.Namespace(data=[Path('a') / 'b', 'c'], more=dict(d=Path('e')))), file)
    assert json.loads((convert(file, tmp_path / 'out') / 'state.json').read_text())['released'] == dict(data=['a/b', 'c'], more=dict(d='e'))


def change(**made): return lambda state: state | made


@pytest.mark.parametrize('spoil,said', [
    (lambda s: {n: v for n, v in s.items() if n != 'encoder.stages.1.0.pwconv1.linear.bias'}, 'encoder.stages.1.blocks.0.mlp.fc1.bias is missing'),
    (lambda s: {n: v for n, v in s.items() if 'mask_token' not in n}, 'mask_token'),
    (lambda s: {n: v for n, v in s.items() if not n.startswith('encoder.stages.3')}, 'stages.3'),
    (change(**{'encoder.stages.0.0.norm.ln.weight': torch.full((16,), float('nan'))}), 'not finite'),
    (change(**{'decoder_dict.biome.0.norm.bias': torch.ones(32)}), 'decoder_dict.biome.0.norm.bias'),
    (change(**{'pred_dict.biome.bias': torch.ones(13), 'pred_dict.biome.weight': torch.ones(13, 32)}), 'pred_dict.biome'),
    (change(**{'pred_dict.soil.bias': torch.ones(13)}), 'soil'),
    (change(**{'encoder.initial_conv.0.kernel': torch.ones(9, 5, 16)}), '5 input bands'),
    (change(**{'encoder.initial_conv.0.kernel': torch.ones(8, 12, 16)}), 'initial_conv'),
    (change(**{'encoder.strange.weight': torch.ones(3)}), 'encoder.strange.weight'),
    (lambda s: {n: v for n, v in s.items() if 'decoder_dict' not in n}, 'no decoder_dict'),
    (lambda s: {n: v for n, v in s.items() if 'pred_dict' not in n}, 'no pred_dict'),
    (change(**{'encoder.stages.0.0.pwconv1.linear.weight': torch.ones(16, 64)}), r'\(16, 64\)'),
])
def test_what_does_not_fit_is_named(tmp_path, spoil, said):
    file = put_down(tmp_path, spoil(released()))
    with pytest.raises(WeightsError, match=said) as e: convert(file, tmp_path / 'out')
    assert 'checkpoint-199.pth' in str(e.value) and not (tmp_path / 'out').exists()


def test_a_network_of_photographs_is_not_taken_for_one_of_sentinel2(tmp_path):
    rgb = lambda k: released(k=k, inputs=3, tasks=('sentinel2',), original=True, outputs=dict(sentinel2=3))
    with pytest.raises(WeightsError, match='learned from photographs.*imagenet-SIZE:FILE'): convert(put_down(tmp_path, rgb(4), 'pt-imagenet'), tmp_path / 'photographs')
    assert not (tmp_path / 'photographs').exists() and read_contract(convert(put_down(tmp_path, rgb(2), 'pt-rgb'), tmp_path / 'bgr')).bands == ('B2', 'B3', 'B4')


@pytest.mark.parametrize('content,said', [(b'', 'cannot be read'), (b'<html>not found</html>', 'plain state dict'), ('half', 'cannot be read'), (dict(model={}), 'no tensors'), ([1, 2], 'holds a list')])
def test_files_that_are_none(tmp_path, content, said):
    file = tmp_path / 'checkpoint-199.pth'
    if content == 'half': file.write_bytes(put_down(tmp_path, released()).read_bytes()[:20_000])
    elif isinstance(content, bytes): file.write_bytes(content)
    else: torch.save(content, file)
    with pytest.raises(WeightsError, match=said) as e: read_state(file)
    assert 'checkpoint-199.pth' in str(e.value)
