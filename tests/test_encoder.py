"""encoder: weights by rarity, objectives that each reach the network, keypoints, probes and legacy figures on known answers, weights that do not fit."""
import numpy as np
import pytest
import torch
from atari_hrvq.core import BookError, FitConfig, fit, rng_for
from atari_hrvq.encoder import (OBJECTIVES, Background, CellDecoder, Encoder, EncoderConfig, EncoderTraining, PointDecoder, cell_nce, cell_size, diversity, embed, episode_draws,
                                fit_probe, frame_batches, info_nce, probe_fidelity, state_correlation, state_fidelity, temporal_ratio)
from atari_hrvq.frames import RandomPolicy, collect

SMALL = dict(games=('pong', 'breakout'), channels=(4, 8), hidden=16, cell_dim=6, dim=24, keypoints=4, where=0)


@pytest.fixture(scope='module')
def episodes(): return {g: collect(g, RandomPolicy(g), 160, 0) for g in ('pong', 'breakout')}


@pytest.fixture(scope='module')
def batch(episodes): return frame_batches(episodes, 8)(rng_for(0))


def training(episodes, **options):
    torch.manual_seed(0)
    t = EncoderTraining(EncoderConfig(**SMALL), **options)
    t.encoder.background.measure(episodes)
    return t


def test_rarity_counts_how_often_a_pixel_has_its_gray(episodes):
    b = Background(('pong', 'breakout')).measure(episodes)
    frames = episodes['pong'].frames
    for t, row, column in ((20, 5, 5), (90, 40, 40), (150, 60, 72)):
        share = (frames[:, row, column] // 16 == frames[t, row, column] // 16).mean()
        x = b(torch.from_numpy(frames[t][None, None]), torch.tensor([0]))[0][:, 0]
        assert abs(float(b.weight(x, torch.tensor([0]))[0, row, column]) - min(300, 1 / (share + .003))) < 1e-3


def test_batches_are_stacks_of_consecutive_steps(episodes, batch):
    frames, action, game = batch
    assert frames.shape == (8, 5, 84, 84) and frames.dtype == torch.uint8 and game.tolist() == [0] * 4 + [1] * 4
    for f, a, g in zip(frames.numpy(), action.tolist(), game.tolist()):
        e = list(episodes.values())[g]
        assert any(np.array_equal(f, e.stacks([t + 1], 5)[0]) and e.actions[t] == a for t in e.windows(2))


@pytest.mark.parametrize('name', OBJECTIVES)
def test_every_objective_alone_teaches_the_encoder(episodes, batch, name):
    t = training(episodes, weights={name: 1.})
    loss, parts = t.loss(*batch)
    assert list(parts) == [name] and torch.isfinite(loss)
    loss.backward()
    assert t.encoder.conv1.weight.grad.abs().sum() > 0
    before = float(loss.detach())
    fit(t, lambda rng: batch, FitConfig(12, lr=3e-3), desc=name)
    assert float(t.train().loss(*batch)[0].detach()) < before


def test_only_their_own_objective_trains_the_attention_of_the_keypoints(episodes, batch):
    for name, moves in (('time', False), ('keypoints', True)):
        t = training(episodes, weights={name: 1.})
        t.loss(*batch)[0].backward()
        assert (t.encoder.attention.weight.grad is not None) == moves, name


def test_objectives_add_by_their_weights(episodes, batch):
    t = training(episodes, weights={'time': .3, 'inverse': 2.}); t.eval()
    loss, parts = t.loss(*batch)
    assert torch.allclose(loss, .3 * parts['time'] + 2 * parts['inverse'])


@pytest.mark.parametrize('weights, message', [({}, 'switched off'), ({'time': 0.}, 'switched off'), ({'beauty': 1.}, 'unknown objective')])
def test_objectives_that_make_no_sense(weights, message):
    with pytest.raises(BookError, match=message): EncoderTraining(EncoderConfig(**SMALL), weights)


def test_contrasts_by_hand():
    v = torch.tensor([[1., 0.], [0., 1.]])
    assert torch.allclose(info_nce(v, v.flip(0), .5), torch.log(1 + torch.exp(torch.tensor(2.))))
    assert torch.allclose(cell_nce(v[:, None] * 3, v[:, None], .5), torch.log(1 + torch.exp(torch.tensor(-2.))))


def test_keypoint_follows_a_spot():
    encoder = Encoder(EncoderConfig(**SMALL)).eval()
    with torch.no_grad(): encoder.attention.weight.fill_(2.)
    h = torch.zeros(2, 8, 21, 21); h[0, :, 3, 17], h[1, :, 20, 0] = 5., 5.
    assert torch.allclose(encoder.points(h)[:, 0], torch.tensor([[.7, -.7], [-1., 1.]]), atol=1e-3)
    rows = PointDecoder(1).bumps(torch.tensor([[[.7, -.7]]]))[0, 0]
    assert divmod(int(rows.argmax()), 21) == (3, 17)


def test_cells_do_not_mix():
    encoder, decoder = Encoder(EncoderConfig(**SMALL)).eval(), CellDecoder(EncoderConfig(**SMALL), frames=2)
    x = torch.zeros(1, 4, 84, 84); y = x.clone(); y[:, :, 75:, 75:] = 1.             # the last cell only (of 3 x 3, 28 pixels each)
    changed = (encoder.cells(x) != encoder.cells(y)).any(-1)[0]
    assert changed.tolist() == [False] * 8 + [True]
    assert decoder(encoder.cells(x)).shape == (1, 2, 84, 84)


def scene(*spots, size=3):
    "A black stack of four frames with bright squares at (row, column) in each."
    f = torch.zeros(1, 4, 84, 84, dtype=torch.uint8)
    for row, column in spots: f[..., row:row + size, column:column + size] = 200
    return f


@pytest.fixture(scope='module')
def counter():
    b = Background(('pong',)); b.rarity[:] = 1.; b.rarity[0, 12] = 300.                  # gray 192 to 207 is rare everywhere
    return lambda frames, grid=3: b.where(frames, torch.zeros(len(frames), dtype=torch.long), grid, cell_size(grid)).view(len(frames), grid ** 2, 16, 3)


@pytest.mark.parametrize('grid', [1, 2, 3, 4, 7])
def test_counted_places_move_with_the_object(counter, grid):
    size = 4 * -(-21 // grid)
    row, column = 2, 5
    a, b = (counter(scene((row, column + d)), grid)[0] for d in (0, 3))
    assert a[0, 12, 0] == b[0, 12, 0] and torch.allclose(b[0, 12] - a[0, 12], torch.tensor([0., 3 * 2 / (size - 1), 0.]) * a[0, 12, 0], atol=1e-5)
    assert torch.equal(a[1:], torch.zeros_like(a[1:])) and a[0].abs().sum(1).nonzero().tolist() == [[12]]
    if grid > 1:                                                                         # the same thing, one cell to the right: the same numbers there
        c = counter(scene((row, column + size)), grid)[0]
        assert torch.equal(c[1], a[0]) and not c[0].any()


def test_counted_by_hand(counter):
    m = counter(scene((30, 60), size=2))[0]                                              # rows 30, 31 and columns 60, 61: cell 5, rows 2, 3 and columns 4, 5 of 28; 16 pixels in 4 frames
    mass, x, y = 16., 4.5 * 2 / 27 - 1, 2.5 * 2 / 27 - 1
    assert torch.allclose(m[5, 12], torch.tensor([1., x, y]) * mass / (mass + 1), atol=1e-5)


def test_a_common_gray_counts_nothing(counter):
    f = scene((30, 60)); f[f == 200] = 90
    assert not counter(f).any()


def test_vector_with_counted_cells(episodes):
    torch.manual_seed(0)
    e = Encoder(EncoderConfig(**{**SMALL, 'cell_dim': 54, 'dim': 64, 'where': 2})).eval(); e.background.measure(episodes)
    frames = torch.from_numpy(episodes['breakout'].stacks(np.arange(20, 60, 10)))
    v, grid = e(frames)
    assert v.shape == (4, 64) and grid.shape == (4, 54, 3, 3) and torch.allclose(v.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.equal(grid.flatten(2).transpose(1, 2)[..., -48:], e.background.where(frames[:, -2:], torch.ones(4, dtype=torch.long), 3, 28))
    with pytest.raises(BookError, match='above 48'): Encoder(EncoderConfig(**{**SMALL, 'where': 2, 'dim': 0}))
    with pytest.raises(BookError, match='0 to 4 frames'): Encoder(EncoderConfig(where=5))


def test_calibration_standardises(episodes):
    encoder = training(episodes).encoder
    draws = [(f[:, 1:], g) for f, _, g in (frame_batches(episodes, 32)(rng_for(k)) for k in range(4))]
    loose = encoder.eval()(draws[0][0], draws[0][1])[0]
    tight = encoder.calibrate(draws)(draws[0][0], draws[0][1])[0]
    assert diversity(tight.detach().numpy(), rng_for(0)) > diversity(loose.detach().numpy(), rng_for(0)) and not encoder.standard.training
    assert torch.allclose(tight.norm(dim=1), torch.ones(32), atol=1e-5)


def test_embed_is_the_forward_pass(episodes):
    encoder = training(episodes).encoder.eval()
    v, z = embed(encoder, episodes['pong'], np.arange(10), chunk=3)
    vector, grid = encoder(torch.from_numpy(episodes['pong'].stacks(np.arange(10))))
    assert np.allclose(v, vector.detach(), atol=1e-5) and np.allclose(z.reshape(10, 9, 6), grid.flatten(2).transpose(1, 2).detach(), atol=1e-4)


def test_legacy_figures_of_known_vectors():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(600, 8)), 0); noise = rng.normal(size=(3000, 256)); noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert temporal_ratio(walk, np.zeros(600), rng_for(0)) < .3 and abs(temporal_ratio(noise, np.zeros(3000), rng_for(0)) - 1) < .01
    assert abs(diversity(noise, rng_for(0)) - 2 ** .5) < .01
    label = rng.normal(size=(400, 2)); x = np.c_[-2 * label[:, :1] + 1, rng.normal(size=(400, 3))]
    assert state_correlation(x, label, np.ones((400, 2), bool)) == pytest.approx((1 + max(abs(np.corrcoef(c, label[:, 1])[0, 1]) for c in x.T)) / 2, abs=1e-6)


def test_draws_are_of_whole_episodes():
    episode = np.repeat([0, 1, 2], [4, 1, 7])
    drawn = []
    assert episode_draws(episode, lambda rows: drawn.append(rows) or 7., 20).tolist() == [7.] * 20 and len({len(r) for r in drawn}) > 1
    for rows in drawn: assert all(np.array_equal(np.unique(rows[episode[rows] == e]), np.flatnonzero(episode == e)) for e in set(episode[rows].tolist()))


@pytest.mark.parametrize('kind', ['ridge', 'mlp'])
def test_probes_learn_what_is_there_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 6)).astype(np.float32)
    y = np.c_[40 * x[:, 0] + 90, rng.normal(size=900) * 30].astype(np.float32)
    there = np.ones_like(y, bool); there[:, 1] = rng.random(900) < .5
    split = lambda a, b: (y[a:b], ['known', 'noise'], there[a:b])
    scores = state_fidelity(x[:700], x[700:], split(0, 700), split(700, 900), kind, steps=200)
    assert scores['known'] > .95 and scores['noise'] < .1
    probe = fit_probe(x[:700], y[:700], there[:700], kind, steps=50)
    assert set(probe_fidelity(probe, x[700:], (y[700:], ['known', 'noise'], there[700:] & [True, False]))) == {'known'}


def test_unknown_probe():
    with pytest.raises(BookError, match='expected ridge or mlp'): fit_probe(np.zeros((4, 2)), np.zeros((4, 1)), kind='oracle')


def test_saved_encoder_is_the_same_and_another_shape_is_named(tmp_path, episodes):
    encoder = training(episodes).encoder.eval()
    encoder.save_pretrained(tmp_path / 'e')
    again = Encoder.from_pretrained(tmp_path / 'e')
    frames = torch.from_numpy(episodes['pong'].stacks(np.arange(4)))
    assert all(torch.equal(a, b) for a, b in zip(encoder(frames), again(frames), strict=True))
    Encoder(EncoderConfig(**{**SMALL, 'hidden': 20})).save_pretrained(tmp_path / 'other')
    (tmp_path / 'other' / 'model.safetensors').replace(tmp_path / 'e' / 'model.safetensors')
    with pytest.raises(BookError, match='another size or version'): Encoder.from_pretrained(tmp_path / 'e')


@pytest.mark.parametrize('frames', [torch.zeros(2, 4, 84, 84), torch.zeros(2, 4, 96, 96, dtype=torch.uint8), torch.zeros(2, 84, 84, dtype=torch.uint8), torch.zeros(2, 3, 84, 84, dtype=torch.uint8)])
def test_frames_of_another_kind(frames):
    with pytest.raises(BookError, match='frames must be uint8'): Encoder(EncoderConfig(**SMALL))(frames)


def test_no_room_for_keypoints():
    with pytest.raises(BookError, match='no room'): Encoder(EncoderConfig(dim=32, keypoints=16))
