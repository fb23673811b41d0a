"""core: files are whole or not there, runs refuse what does not fit, training resumes bitwise."""
import json
import os
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as hs
from atari_hrvq import core
from atari_hrvq.core import BookError, FitConfig, Stage, fit, load_checkpoint, load_tree, pack, save_checkpoint, save_tree, unpack, write_atomic

leaves = hs.one_of(hs.none(), hs.booleans(), hs.integers(-2**40, 2**40), hs.floats(allow_nan=False, allow_infinity=False), hs.text(max_size=8))
trees = hs.recursive(leaves, lambda t: hs.one_of(hs.lists(t, max_size=3), hs.dictionaries(hs.one_of(hs.text(max_size=4), hs.integers(0, 9)), t, max_size=3)), max_leaves=12)


@given(trees)
@settings(max_examples=60, deadline=None)
def test_pack_round_trip(tree):
    assert unpack(*pack(tree)) == tree


def test_disk_full_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.safetensors'
    save_tree(path, {'x': torch.ones(3)})
    before = path.read_bytes()

    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(BookError, match='No space left'): save_tree(path, {'x': torch.zeros(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.safetensors']


def test_no_write_permission_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(BookError, match='cannot write'): Stage('01_frames', tmp_path / 'file' / 'run', 'smoke', ['pong'], 0)


@pytest.mark.parametrize('damage', [lambda b: b[:-8], lambda b: b[:20], lambda b: b''])
def test_truncated_file_is_named(tmp_path, damage):
    path = tmp_path / 'a.safetensors'
    save_tree(path, {'x': torch.ones(300)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BookError, match='a.safetensors is damaged'): load_tree(path)


def test_altered_artefact_is_named(tmp_path):
    stage = Stage('04_hrvq', tmp_path, 'smoke', ['pong'], 0)
    stage.save('vq', {'x': torch.ones(4)})
    path = stage.path('vq.safetensors')
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
    with pytest.raises(BookError, match='vq.safetensors was altered or cut short'): stage.load('vq')
    path.unlink()
    with pytest.raises(BookError, match='vq.safetensors is missing'): stage.load('vq')


class Net(core.Pretrained):
    from dataclasses import dataclass

    @dataclass
    class Config: width: int = 3

    def __init__(self, config):
        super().__init__()
        self.config, self.f = config, torch.nn.Linear(2, config.width)

    def loss(self, x): return (self.f(x) - x.sum(1, keepdim=True)).pow(2).mean() + 0 * torch.rand(()), {}


def batch(rng): return (torch.from_numpy(rng.random((4, 2), dtype=np.float32)),)


def test_pretrained_round_trip_and_misfits(tmp_path):
    net = Net(Net.Config())
    net.save_pretrained(tmp_path / 'net')
    assert torch.equal(Net.from_pretrained(tmp_path / 'net').f.weight, net.f.weight)
    other = Net(Net.Config(width=4))
    before = other.f.weight.clone()
    with pytest.raises(BookError, match='does not fit Net'): core.load_weights(other, tmp_path / 'net' / 'model.safetensors')
    assert torch.equal(before, other.f.weight)
    config = json.loads((tmp_path / 'net' / 'config.json').read_text())
    (tmp_path / 'net' / 'config.json').write_text(json.dumps({**config, 'depth': 9}))
    with pytest.raises(BookError, match='another version'): Net.from_pretrained(tmp_path / 'net')
    with pytest.raises(BookError, match='is not a folder'): Net.from_pretrained(tmp_path / 'nothing')
    with pytest.raises(BookError, match='FitConfig: steps is 0 or more, got -3'): core.FitConfig(-3)


@pytest.mark.parametrize('kill_at', [1, 13, 29])
def test_resume_is_bitwise(tmp_path, kill_at):
    c = FitConfig(steps=30, checkpoint_s=0.)
    torch.manual_seed(0); whole = Net(Net.Config()); expected = fit(whole, batch, c)

    class Killed(Exception): pass
    def callback(k, _):
        if k == kill_at: raise Killed
    torch.manual_seed(0); net = Net(Net.Config())
    with pytest.raises(Killed): fit(net, batch, c, checkpoint=tmp_path / 'c', callback=callback)
    torch.manual_seed(7); again = Net(Net.Config())
    assert fit(again, batch, c, checkpoint=tmp_path / 'c') == expected
    assert torch.equal(again.f.weight, whole.f.weight) and torch.equal(again.f.bias, whole.f.bias)


def test_another_setting_of_the_module_starts_afresh(tmp_path):
    "A field of the configuration that changes no shape, or a plain attribute of a part, must not bring back the weights that were trained without it; the same ones do."
    class Goal(torch.nn.Module):
        def __init__(self, goal):
            super().__init__()
            self.w, self.inner = torch.nn.Parameter(torch.zeros(1)), torch.nn.Dropout(0.); self.goal = goal
        def loss(self, x): return (self.w - self.goal).square().sum(), {}
    def trained(goal, rate=0.):
        m = Goal(goal); m.inner.p = rate; steps = []
        fit(m, batch, FitConfig(steps=30, lr=.1), checkpoint=tmp_path / 'c', callback=lambda k, _: steps.append(k))
        return len(steps), m.w.item()
    assert trained(1.)[0] == 30 and trained(1.)[0] == 0
    again, w = trained(-1.)
    assert again == 30 and w < 0 and trained(-1., .5)[0] == 30


def test_a_large_checkpoint_is_small_files_and_whole_at_any_moment(tmp_path, monkeypatch):
    "40 MB of arrays, no file beyond 16 MiB; a kill between its files leaves the state before it; a piece that is damaged is named; old pieces go."
    state = lambda seed: {'model': {f'w{i}': torch.randn(2**18, generator=torch.Generator().manual_seed(seed + i)) for i in range(40)}, 'history': [{'step': seed}]}
    path, same = tmp_path / 'x-fit.safetensors', lambda a, b: a['history'] == b['history'] and all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
    save_checkpoint(path, 'm', state(0))
    files = list(tmp_path.iterdir())
    assert len(files) == 3 and max(f.stat().st_size for f in files) < 16 * 2**20 and all(f.name.startswith('x-fit.') for f in files)
    assert same(state(0), load_checkpoint(path, 'm')) and load_checkpoint(path, 'other') is None
    original, calls = core.write_atomic, []

    def dies(*a):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        original(*a)
    monkeypatch.setattr(core, 'write_atomic', dies)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(path, 'm', state(100))
    monkeypatch.undo()
    assert same(state(0), load_checkpoint(path, 'm'))
    save_checkpoint(path, 'm', state(100))
    assert same(state(100), load_checkpoint(path, 'm')) and len(list(tmp_path.iterdir())) == 3
    piece = next(f for f in tmp_path.iterdir() if f != path)
    piece.write_bytes(piece.read_bytes()[:-4])
    with pytest.raises(BookError, match=f'{piece.name} is missing or damaged: delete .*x-fit.safetensors'): load_checkpoint(path, 'm')
    save_checkpoint(path, 'm', {'step': 1})
    assert load_checkpoint(path, 'm')['step'] == 1 and list(tmp_path.iterdir()) == [path]


def test_large_matrices_in_8_bits(tmp_path):
    "Each row of a large matrix is off by at most half of its step; what is small stays in half precision, and the file is a quarter as large."
    class Wide(core.Pretrained):
        Config = Net.Config
        def __init__(self, config):
            super().__init__()
            self.config, self.large, self.small = config, torch.nn.Linear(300, 400), torch.nn.Linear(4, 3)
    torch.manual_seed(0)
    model = Wide(Net.Config())
    with torch.no_grad(): model.large.weight[7] *= 100; model.large.weight[8] = 0.
    model.save_pretrained(tmp_path / 'bytes', torch.int8); model.save_pretrained(tmp_path / 'whole')
    again = Wide.from_pretrained(tmp_path / 'bytes')
    step = model.large.weight.abs().amax(1, keepdim=True) / 127
    assert ((again.large.weight - model.large.weight).abs() <= .501 * step + 1e-9).all() and (again.large.weight != model.large.weight).any()
    assert torch.equal(again.small.weight, model.small.weight.half().float())
    small, whole = ((tmp_path / f / 'model.safetensors').stat().st_size for f in ('bytes', 'whole'))
    assert small < .27 * whole


def test_nan_loss_stops_and_keeps_the_checkpoint(tmp_path):
    def poisoned(rng):
        x = batch(rng)[0]
        return (x * float('nan') if poisoned.calls.append(1) or len(poisoned.calls) > 5 else x,)
    poisoned.calls = []
    with pytest.raises(BookError, match='at step 5'): fit(Net(Net.Config()), poisoned, FitConfig(steps=9, checkpoint_s=0.), checkpoint=tmp_path / 'c')
    assert load_tree(tmp_path / 'c')['step'] == 5


def test_metrics_are_valid_json(tmp_path):
    stage = Stage('02_encoder', tmp_path, 'smoke', ['pong'], 0)
    stage.metric('x', float('nan'), lo=torch.tensor(1.)); stage.done()
    assert core.read_metrics(tmp_path)[0] == {'chapter': '02_encoder', 'name': 'x', 'value': None, 'lo': 1.0, 'seeds': 1}

    (tmp_path / 'metrics.jsonl').write_text('{"name": "x"}\n{"name": ')
    with pytest.raises(BookError, match='metrics.jsonl is damaged'): core.read_jsonl(tmp_path / 'metrics.jsonl')
    with pytest.raises(BookError, match='tried.jsonl does not exist'): core.read_jsonl(tmp_path / 'tried.jsonl')
    assert core.read_jsonl(tmp_path / 'tried.jsonl', []) == []


def test_write_atomic_leaves_no_temporary(tmp_path):
    write_atomic(tmp_path / 'a', 'x'); write_atomic(tmp_path / 'a', 'y')
    assert os.listdir(tmp_path) == ['a'] and (tmp_path / 'a').read_text() == 'y'


def test_a_training_leaves_one_picture_in_the_saved_notebook(tmp_path):
    "Two trainings in one cell: one picture, updated; without a checkpoint (probes) none."
    import nbclient
    import nbformat
    code = f'''import torch
from atari_hrvq.core import FitConfig, fit
class Line(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Linear(3, 1)
    def loss(self, x): return self.w(x).pow(2).mean(), {{}}
batch = lambda rng: (torch.from_numpy(rng.normal(size=(8, 3)).astype('float32')),)
for n in names: fit(Line(), batch, FitConfig(20), checkpoint=f'{tmp_path}/x-{{n}}.safetensors' if n else None)'''
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f'names = {names}\n' + code) for names in (['one', 'two'], [None])])
    nbclient.NotebookClient(nb, kernel_name='python3').execute()
    pictures = [[o for o in c.outputs if 'image/png' in o.get('data', {})] for c in nb.cells]
    assert [len(p) for p in pictures] == [1, 0]
    assert 'loss of one now' in pictures[0][0].metadata['image/png']['alt'] and 'loss of two now' in pictures[0][0].metadata['image/png']['alt']
