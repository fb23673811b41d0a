"""foundation: shapes and unit length, folders that hold the weights or do not, the labelled random fallback, bad frames."""
import sys
from types import SimpleNamespace
import numpy as np
import pytest
import safetensors.torch as st
import torch
from atari_hrvq import foundation
from atari_hrvq.core import BookError

HUB_FOLDER = foundation.hub_folder           # before the fixture below takes it away
TINY = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70)


def test_without_transformers_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(BookError, match='install'): foundation.load_foundation()


@pytest.fixture(scope='module')
def tiny():
    pytest.importorskip('transformers')
    return foundation.random_vit(3, **TINY).eval()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.delenv(foundation.VARIABLE, raising=False)
    monkeypatch.setattr(foundation, 'hub_folder', lambda: None)


def episodes(n=7, dtype=np.uint8, side=84):
    return SimpleNamespace(game='pong', frames=np.random.default_rng(0).integers(0, 256, (n, side, side)).astype(dtype))


def test_shapes_and_unit_length(tiny):
    v, grid = foundation.embed_foundation(tiny, episodes(), np.arange(5), size=70, chunk=2)
    assert v.shape == (5, 24) and grid.shape == (5, 9 * 24) and v.dtype == grid.dtype == np.float32
    assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    whole = foundation.embed_foundation(tiny, episodes(), [3, 1], size=70)
    assert np.allclose(whole[0], v[[3, 1]], atol=1e-5) and np.allclose(whole[1], grid[[3, 1]], atol=1e-4)


def test_cells_lie_where_the_picture_lies(tiny):
    "With three patches a side and no mixing, a bright upper right corner changes the third cell alone."
    e = episodes(2)
    e.frames[:] = 0
    e.frames[1, :20, 64:] = 255                              # inside the third cell even after antialiasing
    patches = torch.nn.Identity()
    patches.config, patches.anchor = tiny.config, torch.nn.Parameter(torch.zeros(1))
    project = tiny.embeddings.patch_embeddings
    patches.forward = lambda pixel_values: SimpleNamespace(last_hidden_state=torch.cat([torch.ones(len(pixel_values), 1, 24), project(pixel_values)], 1))
    _, grid = foundation.embed_foundation(patches, e, [0, 1], size=42)
    changed = np.abs(grid[1] - grid[0]).reshape(9, 24).max(1) > 1e-4
    assert changed.tolist() == [False, False, True, *[False] * 6]


@pytest.mark.parametrize('wrong', [episodes(dtype=np.float32), episodes(side=64)], ids=['float', 'size'])
def test_frames_of_another_type(tiny, wrong):
    with pytest.raises(BookError, match='uint8'): foundation.embed_foundation(tiny, wrong, [0], size=42)


def test_bad_size_and_rows(tiny):
    for size in (50, 28):
        with pytest.raises(BookError, match='multiple of 14'): foundation.embed_foundation(tiny, episodes(), [0], size=size)
    for index in ([7], [-1], []):
        with pytest.raises(BookError, match='rows'): foundation.embed_foundation(tiny, episodes(), index, size=42)


def test_a_saved_folder_gives_the_same_network(tiny, tmp_path, monkeypatch):
    tiny.save_pretrained(tmp_path)
    x = torch.rand(2, 3, 42, 42)
    for source in (tmp_path, None):
        if source is None: monkeypatch.setenv(foundation.VARIABLE, str(tmp_path))
        loaded = foundation.load_foundation(source)
        assert loaded.pretrained and loaded.name != foundation.RANDOM and not loaded.model.training
        assert torch.equal(loaded.model(x).last_hidden_state, tiny(x).last_hidden_state)
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert not foundation.can_settle(loaded)             # another shape than ViT-S/14


def test_a_folder_without_the_weights_is_an_error(tiny, tmp_path, monkeypatch):
    for source in (tmp_path / 'nowhere', tmp_path):
        with pytest.raises(BookError, match='does not hold'): foundation.load_foundation(source)
    monkeypatch.setenv(foundation.VARIABLE, str(tmp_path))
    with pytest.raises(BookError, match='model.safetensors'): foundation.load_foundation()
    tiny.save_pretrained(tmp_path)
    weights = tmp_path / 'model.safetensors'
    state = st.load_file(weights)
    st.save_file({k: v for k, v in state.items() if k != 'layernorm.weight'}, weights, {'format': 'pt'})
    with pytest.raises(BookError, match='layernorm.weight'): foundation.load_foundation(tmp_path)
    st.save_file({**state, 'layernorm.weight': torch.ones(7)}, weights, {'format': 'pt'})
    with pytest.raises(BookError): foundation.load_foundation(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BookError, match='cannot|can be read'): foundation.load_foundation(tmp_path)


def test_the_random_fallback_is_seeded_and_labelled(tiny, monkeypatch):
    monkeypatch.setattr(foundation, 'SHAPE', {**foundation.SHAPE, **TINY})
    torch.manual_seed(5); expected = torch.rand(1)
    torch.manual_seed(5); a, b, c = (foundation.load_foundation(seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected), 'the global generator moved'
    assert a.name == foundation.RANDOM == 'random ViT-S/14 (no weights reachable)' and not a.pretrained and not foundation.can_settle(a)
    same = lambda m, n: all(torch.equal(p, q) for p, q in zip(m.parameters(), n.parameters(), strict=True))
    assert same(a.model, b.model) and not same(a.model, c.model)


def test_only_trained_weights_of_the_right_shape_settle_anything(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(foundation, 'SHAPE', {**foundation.SHAPE, **TINY})
    model = foundation.random_vit()
    model.save_pretrained(tmp_path)
    assert not foundation.can_settle(foundation.load_foundation(tmp_path)) and 'never trained' in foundation.load_foundation(tmp_path).name
    torch.nn.init.normal_(model.layernorm.bias)
    model.save_pretrained(tmp_path)
    loaded = foundation.load_foundation(tmp_path)
    assert foundation.can_settle(loaded) and loaded.name == 'DINOv2 ViT-S/14'


def test_offline_asks_nobody(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(foundation.urllib.request, 'urlopen', lambda *a, **k: pytest.fail('a request was sent'))
    assert not foundation.hub_reachable()
    monkeypatch.delenv('HF_HUB_OFFLINE'); monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "not an address")
    assert not foundation.hub_reachable()


def test_the_hub_gives_a_whole_folder_or_none(tiny, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    asked = []
    def download(name, local_files_only, **kw):
        asked.append(local_files_only)
        if not local_files_only: raise ConnectionError('broke off')
        return str(tmp_path)
    monkeypatch.setattr(hub, 'snapshot_download', download)
    monkeypatch.setattr(foundation, 'hub_reachable', lambda: True)
    assert HUB_FOLDER() is None and asked == [True, False]             # nothing whole in the cache, and the download breaks off
    tiny.save_pretrained(tmp_path)
    assert HUB_FOLDER() == tmp_path
    monkeypatch.setattr(foundation, 'hub_folder', HUB_FOLDER)
    assert foundation.load_foundation().pretrained
    monkeypatch.setattr(foundation, 'hub_reachable', lambda: pytest.fail('the cache was enough'))
    assert HUB_FOLDER() == tmp_path
