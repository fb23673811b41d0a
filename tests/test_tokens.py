"""vq, hrvq, shared: against an independent library, by hand, and against what must not change."""
import numpy as np
import pytest
import torch
from atari_hrvq.core import BookError, FitConfig, fit
from atari_hrvq.encoder import Background, cell_size, frame_batches
from atari_hrvq.frames import RandomPolicy, collect
from atari_hrvq.hrvq import ResidualVQ, Tokenizer, TokenizerConfig, start_codebooks
from atari_hrvq.shared import (DIRECTIONS, MotionCodes, PressedConfig, PressedTokenizer, SharedConfig, SharedTokenizer, bootstrap_episodes, cell_motion, count_table,
                               few_shot, game_information, moving_cells, sharing_report)
from atari_hrvq.vq import Pass, VectorQuantizer, assign


def trained(dim=16, codes=32, steps=8, **kw):
    torch.manual_seed(0)
    q = ResidualVQ(dim, codes=codes, **kw).train()
    x = torch.randn(2000, dim)
    with torch.no_grad():
        for _ in range(steps): q(x)
    return q.eval(), x


def test_indices_equal_the_librarys():
    library = pytest.importorskip('vector_quantize_pytorch')
    q, x = trained()
    other = library.ResidualVQ(dim=16, codebook_size=32, num_quantizers=3, kmeans_init=False).eval()
    for mine, layer in zip(q.levels, other.layers, strict=True): layer._codebook.embed.data.copy_(mine.codebook[None])
    assert torch.equal(q.encode(x).long(), other(x)[1])


def test_decode_of_encode_is_the_evaluation_output():
    q, x = trained()
    out = q(x)
    assert torch.equal(out.codes, q.encode(x)) and torch.equal(q.encode(x), q.encode(x, chunk=13))
    assert torch.allclose(q.decode(out.codes), out.quantised, atol=1e-5)
    errors = [(x - q.decode(out.codes, n)).pow(2).mean() for n in range(4)]
    assert all(a > b for a, b in zip(errors, errors[1:]))


def test_evaluation_changes_nothing():
    q, x = trained(); before = {k: v.clone() for k, v in q.state_dict().items()}
    q(x); q.encode(x)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_first_codes_have_the_size_of_the_data():
    q, x = trained(steps=1)
    ratio = q.levels[0].codebook.norm(dim=1).mean() / x.norm(dim=1).mean()
    assert .5 < ratio < 2


def test_commitment_gradient_reaches_every_level():
    q, x = trained()
    for l in range(3):
        z = x.clone().requires_grad_(); q(z).losses[l].backward()
        left = x - q.decode(q.encode(x), l + 1)
        assert z.grad.abs().sum() > 0 and torch.allclose(z.grad, 2 * (.05, .25, .60)[l] * left / x.numel(), atol=1e-7)


def test_frozen_encoder_makes_costs_irrelevant():
    a, _ = trained(commitment=(.05, .25, .60)); b, _ = trained(commitment=(.3, .3, .3))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_state_resumes_bitwise_whatever_torch_drew_meanwhile():
    "The quantizer draws from a generator of its own, which is part of its state: revivals come out the same."
    a, x = trained(dim=4, codes=64, steps=1)
    for q in a.levels: q.count[:9] = 0.; q.total[:9] = 0.
    b = ResidualVQ(4, codes=64); b.load_state_dict(a.state_dict())
    revived = []
    for k, q in enumerate((a, b)):
        torch.manual_seed(k); q.train()
        with torch.no_grad(): revived.append([q(x[:300]).revived for _ in range(3)])
    assert revived[0] == revived[1] and sum(revived[0][0]) >= 9
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize('rotate', [False, True])
def test_chunks_change_neither_codes_nor_gradients(rotate):
    q, x = trained()
    books, costs = [level.codebook for level in q.levels], (.05, .25, .60)
    results = []
    for chunk in (7, 500, 10_000):
        z = x[:900].clone().requires_grad_()
        out = Pass.apply(z, books, costs, rotate, True, chunk)
        (out[0].pow(3).sum() + out[2].sum()).backward()
        results.append((out[1], z.grad, out[2].detach(), out[5]))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        for u, v in zip(other[1:], results[0][1:], strict=True): assert torch.allclose(u, v, rtol=1e-4, atol=1e-5)


def test_two_level_pass_equals_the_plain_formula():
    "Against the textbook version, written out with autograd."
    q, x = trained()
    z = x.clone().requires_grad_(); out = q(z)
    w = torch.randn_like(x)
    ((out.quantised * w).sum() + out.losses.sum()).backward()
    y = x.clone().requires_grad_(); r, total, cost = y, 0., 0.
    for level, c in zip(q.levels, (.05, .25, .60), strict=True):
        e = level.codebook[torch.cdist(r, level.codebook).argmin(1)]
        cost = cost + c * (r - e).pow(2).mean(); r, total = r - e, total + e
    (((y + (total - y).detach()) * w).sum() + cost).backward()
    assert torch.allclose(out.quantised, total, atol=1e-5) and torch.allclose(z.grad, y.grad, atol=1e-5)


def test_commitment_without_a_gradient_warns():
    q, x = trained()
    with pytest.warns(UserWarning, match='need no gradient'): q.train()(x)


def _one_of_two(rank, folder, out):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.manual_seed(0); torch.set_num_threads(1)
    q, x = ResidualVQ(8, codes=16), torch.load(f'{folder}/x.pt', weights_only=True)
    with torch.no_grad():
        q.start(x[:500]); q.train()
        for k in range(4): q(x[k * 1000:(k + 1) * 1000][rank * 500:(rank + 1) * 500])
    out.put((rank, {k: v.numpy() for k, v in q.state_dict().items()}))
    dist.destroy_process_group()


def test_two_processes_make_the_codebook_of_one(tmp_path):
    import torch.multiprocessing as mp
    torch.manual_seed(5); x = torch.randn(4000, 8); torch.save(x, tmp_path / 'x.pt')
    context = mp.get_context('spawn'); out = context.Queue()
    workers = [context.Process(target=_one_of_two, args=(rank, str(tmp_path), out)) for rank in range(2)]
    for w in workers: w.start()
    states = dict(out.get(timeout=120) for _ in workers)
    for w in workers: w.join(60); assert w.exitcode == 0
    q = ResidualVQ(8, codes=16)
    with torch.no_grad():
        q.start(x[:500]); q.train()
        for k in range(4): q(x[k * 1000:(k + 1) * 1000])
    for k, v in q.state_dict().items():
        assert np.array_equal(states[0][k], states[1][k]), k
        if 'started' not in k and 'random' not in k: assert np.allclose(states[0][k], v, atol=1e-4), k


@pytest.mark.parametrize('x, message', [(torch.full((3, 16), float('inf')), 'NaN or infinite'), (torch.full((3, 16), float('nan')), 'NaN or infinite'), (torch.zeros(3, 5), r'\[N, 16\]'), (torch.zeros(0, 16), 'N > 0')])
def test_bad_vectors_leave_the_state(x, message):
    q, _ = trained(); before = {k: v.clone() for k, v in q.state_dict().items()}
    for call in (q.encode, lambda x: q.train()(x)):
        with pytest.raises(BookError, match=message): call(x)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_codes_out_of_range():
    with pytest.raises(BookError, match='0..31'): VectorQuantizer(4, 32).decode(torch.tensor([32]))


def test_ties_go_to_the_smallest_index(): assert assign(torch.zeros(4, 2), torch.ones(5, 2)).tolist() == [0] * 4


def test_tokenizer_saves_and_loads(tmp_path):
    t = Tokenizer(TokenizerConfig(games=('pong', 'breakout'), codes=16)).eval()
    frames = torch.randint(0, 255, (20, 2, 84, 84), dtype=torch.uint8)
    t.quantizer.start(t.features(frames)[0].flatten(0, 1))
    again = Tokenizer.from_pretrained(t.save_pretrained(tmp_path / 't'))
    assert torch.equal(t.encode(frames), again.encode(frames)) and t.hash() == again.hash()
    assert torch.equal(t.encode(frames), t.encode(frames[:, -1:])) and t.decode(t.encode(frames), 1).shape == (20, 84, 84)
    with pytest.raises(BookError, match='does not know'): t.game_index('ms_pacman')
    with pytest.raises(BookError, match='uint8'): t.encode(frames.float())
    with pytest.raises(BookError, match=r'expected codes \[N, 9, 3\], got \[2, 16, 3\]: they are of another tokenizer'): t.decode(torch.zeros(2, 16, 3, dtype=torch.uint8), 0)
    for game in (len(t.config.games), -1):
        with pytest.raises(BookError, match='a game is an index from 0 to'): t.decode(t.encode(frames), game)


def test_sharing_of_known_answers():
    rng = np.random.default_rng(0)
    for n in (3_000, 30_000):
        g = np.repeat([0, 1, 2], n)
        assert abs(sharing_report(g * 80 + rng.integers(80, size=3 * n), g).information - np.log2(3)) < .02
        assert abs(sharing_report(rng.integers(256, size=3 * n), g).information) < .02


def test_information_does_not_depend_on_sample_size():
    rng = np.random.default_rng(1)
    draw = lambda n: ((g := np.repeat([0, 1, 2], n)), (g * 30 + rng.integers(100, size=3 * n)))
    values = [game_information(count_table(c, g, 3)) for g, c in (draw(4_000), draw(40_000))]
    assert abs(values[0] - values[1]) < .05 * values[1]


def test_bootstrap_resamples_episodes_and_is_centred_on_the_value():
    codes, game, episode = np.repeat([0, 1, 2, 3], 50), np.repeat([0, 0, 1, 1], 50), np.repeat([0, 1, 2, 3], 50)
    lo, hi = bootstrap_episodes(codes, game, episode, lambda c, g: float(c.mean()), 200)              # 0 or 1 twice, 2 or 3 twice: means of 1 to 2
    assert abs(lo - 1) < .1 and abs(hi - 2) < .1
    codes, game, episode = np.random.default_rng(0).integers(0, 60, 600), np.repeat([0, 1], 300), np.repeat(np.arange(20), 30)
    information = lambda c, g: game_information(count_table(c, g, 2, 60))                             # an episode drawn twice looks like evidence: uncentred, the interval lies above
    lo, hi = bootstrap_episodes(codes, game, episode, information, 100)
    assert lo <= information(codes, game) <= hi


def test_bits_about_the_game_do_not_grow_with_unequal_counts():
    rng = np.random.default_rng(0)
    said = [game_information(count_table(rng.integers(0, 100, sum(n)), np.repeat([0, 1, 2], n), 3, 100)) for n in ((2_000, 2_000, 2_000), (600, 1_500, 10_000)) for _ in range(5)]
    assert max(map(abs, said)) < .02


def test_motion_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    pairs = (rng.random((40, 2, 84, 84)) < .002).astype(np.uint8) * rng.integers(20, 255, (40, 2, 84, 84), dtype=np.uint8)
    motion, place = cell_motion(torch.from_numpy(pairs), 3)
    rows, columns = (np.mgrid[:28, :28] + .5) / 28
    for n in range(40):
        for p in range(9):
            cell = (slice(28 * (p // 3), 28 * (p // 3) + 28), slice(28 * (p % 3), 28 * (p % 3) + 28))
            change = pairs[n, 1][cell].astype(int) - pairs[n, 0][cell]
            on, off = np.maximum(change - 8, 0), np.maximum(-change - 8, 0)
            if not on.any() and not off.any(): assert motion[n, p] == 0; continue
            at = [(float((columns * m).sum() / m.sum()), float((rows * m).sum() / m.sum())) if m.any() else None for m in (on, off)]
            if at[0] is None: want = 'vanishes'
            elif at[1] is None: want = 'appears'
            else:
                dx, dy = at[0][0] - at[1][0], at[0][1] - at[1][1]
                if abs(abs(dx) - abs(dy)) < 1e-6: continue
                want = ('right' if dx > 0 else 'left') if abs(dx) >= abs(dy) else ('down' if dy > 0 else 'up')
            assert DIRECTIONS[motion[n, p]] == want and np.allclose(place[n, p], [*(at[0] or at[1]), on.sum() + off.sum()], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def played(): return {g: collect(g, RandomPolicy(g), 700, 0) for g in ('pong', 'breakout')}


def pairs_of(e): return torch.from_numpy(e.stacks(e.windows(2) + 1, 2))


@pytest.fixture(scope='module')
def shared(played):
    torch.manual_seed(0)
    t = SharedTokenizer(SharedConfig(games=('pong', 'breakout'), channels=(4, 8), hidden=32, codes=64, motion=48, cell_dim=16))
    t.background.measure(played); t.motion.measure({i: pairs_of(e) for i, e in enumerate(played.values())})
    batches = frame_batches(played, 32, stack=2)
    history = fit(t, batches, FitConfig(40, lr=2e-3, log_points=40), callback=start_codebooks(t, batches, 4, 0))
    return t, history


def test_motion_codes_use_all_words_in_each_game(played):
    motion = MotionCodes(2, 24).measure({i: pairs_of(e) for i, e in enumerate(played.values())})
    for i, e in enumerate(played.values()):
        pairs = pairs_of(e); game = torch.full((len(pairs),), i)
        words = motion(pairs, game)
        assert torch.equal(words[:100], motion(pairs[:100], game[:100]))                     # a row depends on itself alone
        kind = cell_motion(pairs, 3)[0]
        assert torch.equal(words < 0, kind == 0)
        for m in range(1, 7):                                                               # a word belongs to one motion, and the words of a motion are used alike
            of = words[kind == m]
            lo, hi = int(motion.first[m].min()), int(motion.first[m + 1].min()) if m < 6 else 24
            assert ((lo <= of) & (of < hi)).all()
            if len(of) > 40 * (hi - lo): assert torch.bincount(of - lo, minlength=hi - lo).min() > len(of) / (hi - lo) / 2.5
    with pytest.raises(BookError, match='never measured'): MotionCodes(2, 24)(pairs, game)


def test_shared_tokenizer_decodes_what_it_encodes(shared, played):
    t, history = shared
    assert history[-1]['reconstruction'] < .9 * history[0]['reconstruction'] and np.isfinite(history[-1]['quantisation'])
    pairs = pairs_of(played['breakout'])[:60]; game = torch.ones(60, dtype=torch.long)
    codes = t.encode(pairs)
    assert codes.shape == (60, 9, 3) and codes.dtype == torch.uint8 and torch.equal(codes, t.encode(pairs, chunk=7))
    words = t.motion(pairs, game)
    assert torch.equal(codes[..., 0].long()[words >= 0], words[words >= 0]) and (codes[..., 0][words < 0] >= 48).all()
    with torch.no_grad(): z, _ = t.features(pairs, game)
    errors = [(z - t.embed(codes, n, game)).pow(2).mean().item() for n in range(4)]
    assert errors[3] < errors[2] < errors[1] < errors[0] * 1.01
    assert t.decode_foreground(codes, game=game).shape == t.decode(codes, game).shape == (60, 84, 84)
    with pytest.raises(BookError, match='depends on the game'): t.embed(codes)
    with pytest.raises(BookError, match='T >= 2'): t.encode(pairs[:, 1:])


def test_means_of_words_and_places_by_hand():
    t = SharedTokenizer(SharedConfig(games=('pong', 'breakout'), channels=(4, 8), hidden=32, codes=64, motion=48, cell_dim=2, grid=1, decay=.75))
    for x in ([[1., 0.]], [[3., 0.]], [[5., 4.], [7., 4.]]): t.follow_mean('word', torch.full((len(x),), 50), torch.tensor(x))
    assert t.word_mean[50].tolist() == pytest.approx([4., 2.]) and t.word_count[50] == 4 and t.word_mean[49].abs().sum() == 0      # 1; (1 + 3) / 2; (2 * 2 + 12) / 4
    t.follow_mean('word', torch.tensor([50]), torch.tensor([[0., 0.]]))                                  # now a memory of three: decay / (1 - decay)
    assert t.word_mean[50].tolist() == pytest.approx([3., 1.5])
    t.follow_mean('place', torch.tensor([50]), torch.tensor([[9., 0.]]))
    assert t.expected(torch.tensor([[50]]))[0, 0].tolist() == pytest.approx([(2 * 3 + 9) / 3, 1.])       # seen once here: the word's mean weighs two thirds
    assert t.places_of(torch.tensor([[2, 0, 1]])).tolist() == [[6, 1, 5]]


def test_shared_tokenizer_saves_and_loads(shared, played, tmp_path):
    t, _ = shared; pairs = pairs_of(played['pong'])[:20]
    again = SharedTokenizer.from_pretrained(t.save_pretrained(tmp_path / 't'))
    assert torch.equal(t.encode(pairs), again.encode(pairs))


@pytest.mark.parametrize('pressure', ['centring', 'adversary', 'marginals'])
def test_pressure_reaches_the_encoder(played, pressure):
    batches = frame_batches(played, 16, stack=2)
    def gradient(make):
        torch.manual_seed(0)
        t = make(); t.background.measure(played); frames, action, game = batches(np.random.default_rng(0))
        t.start(*(torch.cat([batches(np.random.default_rng(k))[i] for k in range(3)]) for i in (0, 2)))
        t.train(); torch.manual_seed(1); t.loss(frames, action, game)[0].backward()
        return t, t.encoder.cell2.weight.grad
    c = PressedConfig(games=('pong', 'breakout'), channels=(4, 8), hidden=32, codes=16, cell_dim=16, level_dropout=0., pressure=pressure)
    t, pressed = gradient(lambda: PressedTokenizer(c)); _, plain = gradient(lambda: Tokenizer(c))
    assert not torch.allclose(pressed, plain, rtol=1e-4) and torch.isfinite(pressed).all()
    if pressure == 'centring': assert t.centre.abs().sum() > 0 and (t.centre[0] != t.centre[1]).any()
    if pressure == 'adversary': assert t.judge[0].weight.grad.abs().sum() > 0
    with pytest.raises(BookError, match='unknown pressure'): PressedTokenizer(PressedConfig(pressure='hope'))


def test_a_pressed_tokenizer_loads_again(tmp_path):
    t = PressedTokenizer(PressedConfig(games=('pong',), channels=(4, 8), hidden=32, codes=16, cell_dim=16, pressure='adversary'))
    t.save_pretrained(tmp_path / 't'); again = PressedTokenizer.from_pretrained(tmp_path / 't')
    assert again.config.pressure == 'adversary' and torch.equal(again.judge[0].weight, t.judge[0].weight)


@pytest.mark.parametrize('grid', [1, 2, 3, 4, 7])
def test_everybody_cuts_the_same_cells(grid):
    "A dot moves by two pixels: the cell that the encoder counts it in is the cell that moves."
    f = np.zeros((2, 84, 84), np.uint8); f[0, 41:43, 45:47] = f[1, 41:43, 47:49] = 200
    moving = moving_cells(f, np.zeros(2), grid)[1]
    motion = cell_motion(torch.from_numpy(f)[None], grid)[0][0].numpy()
    b = Background(('pong',)); b.rarity += 299
    mass = b.where(torch.from_numpy(f[1:, None]), torch.tensor([0]), grid, cell_size(grid)).view(-1, 16, 3)[:, 12, 0].numpy()
    assert set(np.flatnonzero(mass)) <= set(np.flatnonzero(moving)) and (moving == (motion > 0)).all()


def test_few_shot_moves_copies_only():
    torch.manual_seed(0)
    q = ResidualVQ(6, 2, 32, (.1, .1)).train(); q.start(torch.randn(500, 6)); new = torch.randn(3000, 6) * 2 + 3
    before = {k: v.clone() for k, v in q.state_dict().items()}
    versions = few_shot(q, new, (0, 1, 2)); again = few_shot(q, new, (2,))
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
    assert torch.equal(versions[0].encode(new), q.eval().encode(new)) and torch.equal(versions[2].encode(new), again[2].encode(new))
    error = [(new - v.decode(v.encode(new))).pow(2).mean().item() for v in versions.values()]
    assert error[2] < error[1] < error[0]
